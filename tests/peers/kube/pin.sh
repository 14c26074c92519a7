#!/usr/bin/env bash
# Writes the pinned module file of one Kubernetes version:  ./pin.sh 1.34.4
#
# k8s.io/kubernetes requires its staging modules at v0.0.0 and replaces them by folders of its own repository.
# Seen from another module those replaces do not count and v0.0.0 does not exist, so each is named here.
set -euo pipefail
cd "$(dirname "$0")"

# The version that the demo and `make test` use has the plain name go.mod and also holds etcd, etcdctl and kubectl.
readonly DEFAULT_VERSION=1.37.2

version=${1:?usage: pin.sh VERSION, for example 1.34.4}
staging="v0.${version#1.}"
modfile="go.$version.mod"
[ "$version" = "$DEFAULT_VERSION" ] && modfile=go.mod

[ -f go.mod ] || echo 'module fleet-kms/tests/peers/kube' >go.mod
upstream=$(cd / && go mod download -json "k8s.io/kubernetes@v$version" | sed -n 's/.*"GoMod": "\(.*\)",/\1/p')

{
    echo '// Written by pin.sh.'
    echo 'module fleet-kms/tests/peers/kube'
    echo
    echo 'go 1.26.0'
    echo
    # Upstream's binaries run with the defaults of the Go they name, and those of a newer Go differ in TLS and HTTP.
    grep '^godebug ' "$upstream" || sed -n 's/^go \(1\.[0-9]*\).*/godebug default=go\1/p' "$upstream"
    echo
    echo 'tool k8s.io/kubernetes/cmd/kube-apiserver'
    if [ "$version" = "$DEFAULT_VERSION" ]; then
        echo 'tool k8s.io/kubernetes/cmd/kubectl'
        echo 'tool go.etcd.io/etcd/server/v3'
        echo 'tool go.etcd.io/etcd/etcdctl/v3'
    fi
    echo
    echo "require k8s.io/kubernetes v$version"
    if [ "$version" = "$DEFAULT_VERSION" ]; then
        # The etcd that upstream tests with; a newer one would raise gRPC above what kube-apiserver ships with.
        sed -n 's#^[[:space:]]*go.etcd.io/etcd/client/v3 \(v[0-9.]*\).*#require go.etcd.io/etcd/etcdctl/v3 \1#p' "$upstream"
    fi
    echo
    echo 'replace ('
    sed -n "s#^[[:space:]]*\(k8s.io/[a-z0-9-]*\) => ./staging/.*#\t\1 => \1 $staging#p" "$upstream"
    echo ')'
} >"$modfile"
rm -f "${modfile%.mod}.sum"

go mod tidy -modfile="$modfile"
