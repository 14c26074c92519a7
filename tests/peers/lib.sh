# Shared by the scripts that build real peers; sourced, not run. Everything a person reads goes to stderr, because
# the callers read paths from stdout.
# shellcheck shell=bash

readonly GO_MINIMUM=1.26

# What the Go caches and the binaries take when nothing is there yet.
readonly BUILD_DISK_MB=6000

peers_cache() {
    printf '%s\n' "${XDG_CACHE_HOME:-$HOME/.cache}/fleet-kms/peers"
}

# Tools that only tests use, one name with its version each.
tools_cache() {
    printf '%s\n' "${XDG_CACHE_HOME:-$HOME/.cache}/fleet-kms/tools"
}

say() {
    printf '%s\n' "$*" >&2
}

die() {
    say "$*"
    exit 1
}

# version_at_least 3.7.0 3.5.13: is the first the same as or newer than the second?
version_at_least() {
    [ "$(printf '%s\n%s\n' "$1" "$2" | sort -V | head -n 1)" = "$2" ]
}

# The installed Go, not one that go.mod could make it fetch: asked outside any module. Empty without Go.
go_version() {
    (cd / && GOTOOLCHAIN=local go env GOVERSION 2>/dev/null) | sed -n 's/^go\([0-9.]*\).*/\1/p'
}

require_linux() {
    [ "$(uname -s)" = Linux ] || die "fleet-kms needs Linux to run kube-apiserver and etcd; this is $(uname -s)"
}

require_go() {
    local found
    found=$(go_version)
    [ -n "$found" ] || die "Go $GO_MINIMUM or newer is needed to build kube-apiserver, and there is no go in PATH"
    version_at_least "$found" "$GO_MINIMUM" ||
        die "Go $GO_MINIMUM or newer is needed to build kube-apiserver, and $(command -v go) is $found"
}

# Megabytes free where DIR is or will be made.
free_mb() {
    local dir=$1
    while [ ! -d "$dir" ]; do dir=$(dirname "$dir"); done
    df -Pm "$dir" | awk 'NR == 2 { print $4 }'
}

require_disk() {
    local dir
    for dir in "$(peers_cache)" "$(cd / && go env GOCACHE)" "$(cd / && go env GOMODCACHE)"; do
        require_space 'building kube-apiserver' "$BUILD_DISK_MB" "$dir"
    done
}

# require_space WHAT MB DIR
require_space() {
    local free
    free=$(free_mb "$3")
    [ "$free" -ge "$2" ] || die "$1 needs $2 MB of disk, and $3 has $free MB free"
}

# timed WHAT COMMAND...: runs it and shows how long it has been at it, for a build silent for minutes looks hung.
timed() {
    local what=$1 started=$SECONDS status=0 ticker
    shift
    tick "$what" $$ &
    ticker=$!
    "$@" || status=$?
    kill "$ticker" 2>/dev/null || true
    wait "$ticker" 2>/dev/null || true
    [ ! -t 2 ] || printf '\r\033[K' >&2
    [ "$status" -eq 0 ] || die "$what: failed after $((SECONDS - started)) s"
    say "$what: $((SECONDS - started)) s"
}

# The loop ends with its parent by itself: after Ctrl-C nobody is left to kill it.
tick() {
    local what=$1 parent=$2 seconds=0
    while sleep 1 && kill -0 "$parent" 2>/dev/null; do
        seconds=$((seconds + 1))
        if [ -t 2 ]; then
            printf '\r\033[K%s ... %d s' "$what" "$seconds" >&2
        elif [ $((seconds % 30)) -eq 0 ]; then
            say "$what ... $seconds s"
        fi
    done
}

# Static and without paths of this machine: the same everywhere.
readonly BUILD_ENV='CGO_ENABLED=0 GOWORK=off'
readonly BUILD_FLAGS='-mod=readonly -buildvcs=false -trimpath'

# Names a folder of the cache by what the binaries in it are made from, so that a changed pin never meets an old binary.
source_key() {
    { go_version && printf '%s\n' "$BUILD_ENV" "$BUILD_FLAGS" && cat "$@"; } | sha256sum | cut -c 1-12
}

# with_lock FILE COMMAND...: one build at a time; the second caller then finds what the first one made.
with_lock() {
    local lock=$1
    shift
    mkdir -p "$(dirname "$lock")"
    (
        flock -n 9 || { say 'another build of the same is under way: waiting for it' && flock 9; }
        "$@"
    ) 9>"$lock"
}

# go_build MODULE_DIR MODFILE PACKAGE LDFLAGS OUTPUT: never leaves half a binary at OUTPUT.
#
# The caller's GOFLAGS and workspace do not take part: what is built depends on the committed files alone.
go_build() {
    local module=$1 modfile=$2 package=$3 ldflags=$4 output=$5
    local partial="$output.partial"
    # Chained, because `set -e` does not hold in what `timed` runs.
    # shellcheck disable=SC2086 # the constant is a list of assignments
    mkdir -p "$(dirname "$output")" &&
        (cd "$module" && env $BUILD_ENV GOFLAGS="$BUILD_FLAGS" \
            go build -modfile "$modfile" -ldflags "$ldflags" -o "$partial" "$package" >&2) &&
        mv "$partial" "$output"
}
