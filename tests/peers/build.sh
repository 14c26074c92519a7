#!/usr/bin/env bash
# Prints where kube-apiserver, etcd, etcdctl and kubectl are, one NAME=path a line, and builds those that are not there.
#
#   tests/peers/build.sh [VERSION]          VERSION of Kubernetes, 1.37.2 if not given
#   tests/peers/build.sh --plan [VERSION]   builds nothing: prints  tool <tab> path or "to build"  one a line
#
# Each is taken from its variable (KUBE_APISERVER, ETCD, ETCDCTL, KUBECTL), else from KUBEBUILDER_ASSETS, else from PATH
# where its version suits, else from the cache, else it is built into the cache from the module in kube/.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
# shellcheck source=tests/peers/lib.sh
. "$here/lib.sh"

readonly DEFAULT_VERSION=1.37.2
readonly TOOLS='kube-apiserver etcd etcdctl kubectl'

# From here on a LIST without resourceVersion comes from kube-apiserver's watch cache; with an older etcd it decrypts
# every object again, which no test of ours means to measure.
readonly ETCD_MINIMUM=3.5.13
readonly ETCDCTL_MINIMUM=3.5.0
readonly KUBECTL_MINIMUM=1.30.0

main() {
    local plan=no
    if [ "${1:-}" = --plan ]; then
        plan=yes
        shift
    fi
    version=${1:-$DEFAULT_VERSION}
    version=${version#v}
    [ -f "$(modfile_of kube-apiserver)" ] || die "Kubernetes $version is not pinned: see kube/go.*.mod and kube/pin.sh"

    local tool path
    for tool in $TOOLS; do
        path=$(find_tool "$tool")
        if [ "$plan" = yes ]; then
            printf '%s\t%s\n' "$tool" "${path:-to build}"
            continue
        fi
        if [ -z "$path" ]; then
            path=$(cached "$tool")
            build_tool "$tool" "$path"
        fi
        printf '%s=%s\n' "$(variable_of "$tool")" "$path"
    done
}

variable_of() {
    tr 'a-z-' 'A-Z_' <<<"$1"
}

# Only kube-apiserver comes in other versions; the other three always come from the default version's module.
modfile_of() {
    if [ "$1" = kube-apiserver ] && [ "$version" != "$DEFAULT_VERSION" ]; then
        printf '%s\n' "$here/kube/go.$version.mod"
    else
        printf '%s\n' "$here/kube/go.mod"
    fi
}

cached() {
    local modfile of=$DEFAULT_VERSION
    modfile=$(modfile_of "$1")
    [ "$1" != kube-apiserver ] || of=$version
    printf '%s\n' "$(peers_cache)/$of-$(source_key "$modfile" "${modfile%.mod}.sum")/$1"
}

# Prints a path, or nothing when the tool has to be built.
find_tool() {
    local tool=$1 variable named candidate
    variable=$(variable_of "$tool")
    named=${!variable:-}
    if [ -n "$named" ]; then
        [ -x "$named" ] || die "$variable=$named: no such program"
        suits "$tool" "$named" || die "$variable=$named: not the version that is needed ($(wanted "$tool"))"
        printf '%s\n' "$named"
        return
    fi
    for candidate in "${KUBEBUILDER_ASSETS:+$KUBEBUILDER_ASSETS/$tool}" "$(command -v "$tool" || true)"; do
        if [ -x "$candidate" ] && suits "$tool" "$candidate"; then
            printf '%s\n' "$candidate"
            return
        fi
    done
    candidate=$(cached "$tool")
    [ ! -x "$candidate" ] || printf '%s\n' "$candidate"
}

wanted() {
    case $1 in
    kube-apiserver) printf 'exactly %s\n' "$version" ;;
    etcd) printf '%s or newer\n' "$ETCD_MINIMUM" ;;
    etcdctl) printf '%s or newer\n' "$ETCDCTL_MINIMUM" ;;
    kubectl) printf '%s or newer\n' "$KUBECTL_MINIMUM" ;;
    esac
}

suits() {
    local found
    case $1 in
    kube-apiserver) [ "$("$2" --version 2>/dev/null)" = "Kubernetes v$version" ] ;;
    etcd)
        found=$("$2" --version 2>/dev/null | sed -n 's/^etcd Version: //p')
        [ -n "$found" ] && version_at_least "$found" "$ETCD_MINIMUM"
        ;;
    etcdctl)
        found=$("$2" version 2>/dev/null | sed -n 's/^etcdctl version: //p')
        [ -n "$found" ] && version_at_least "$found" "$ETCDCTL_MINIMUM"
        ;;
    kubectl)
        found=$("$2" version --client 2>/dev/null | sed -n 's/^Client Version: v\([0-9.]*\).*/\1/p')
        [ -n "$found" ] && version_at_least "$found" "$KUBECTL_MINIMUM"
        ;;
    esac
}

build_tool() {
    require_linux
    require_go
    require_disk
    with_lock "$2.lock" build_unless_there "$1" "$2"
}

build_unless_there() {
    [ ! -x "$2" ] || return 0
    timed "building $1" go_build "$here/kube" "$(modfile_of "$1")" "$(package_of "$1")" "$(ldflags_of "$1")" "$2"
}

package_of() {
    case $1 in
    kube-apiserver) printf 'k8s.io/kubernetes/cmd/kube-apiserver\n' ;;
    kubectl) printf 'k8s.io/kubernetes/cmd/kubectl\n' ;;
    etcd) printf 'go.etcd.io/etcd/server/v3\n' ;;
    etcdctl) printf 'go.etcd.io/etcd/etcdctl/v3\n' ;;
    esac
}

# Without a version kube-apiserver calls itself v0.0.0-master and refuses some of its own flags.
ldflags_of() {
    local kube=k8s.io/component-base/version of=$DEFAULT_VERSION minor
    [ "$1" != kube-apiserver ] || of=$version
    minor=${of#1.}
    case $1 in
    kube*) printf -- '-s -w -X %s.gitVersion=v%s -X %s.gitMajor=1 -X %s.gitMinor=%s\n' \
        $kube "$of" $kube $kube "${minor%%.*}" ;;
    *) printf -- '-s -w\n' ;;
    esac
}

main "$@"
