#!/usr/bin/env bash
# Prints the path of kms-client, built with the client code of one version of kube-apiserver unless it is in the cache.
#
#   tests/peers/kms-client/build.sh v0.28.3 | v0.31.14 | v0.37.2
#
# v0.28.3 names the raw socket path as :authority, v0.31.14 the percent-encoded path in v1 and v2, v0.37.2 `localhost`
# in v2.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
# shellcheck source=tests/peers/lib.sh
. "$here/../lib.sh"

# Its module file has the plain name, without which Go does not take the folder for a module.
readonly NEWEST=v0.37.2

main() {
    local version=${1:-$NEWEST} modfile binary
    modfile=go.$version.mod
    [ "$version" != "$NEWEST" ] || modfile=go.mod
    [ -f "$here/$modfile" ] || die "kms-client: no module file for $version"

    binary="$(peers_cache)/kms-client-$version-$(cd "$here" && source_key ./*.go "$modfile" "${modfile%.mod}.sum")/kms-client"
    if [ ! -x "$binary" ]; then
        require_go
        with_lock "$binary.lock" build_unless_there "$version" "$modfile" "$binary"
    fi
    printf '%s\n' "$binary"
}

build_unless_there() {
    [ ! -x "$3" ] || return 0
    timed "building kms-client $1" go_build "$here" "$2" . '-s -w' "$3"
}

main "$@"
