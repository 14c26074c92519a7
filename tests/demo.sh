#!/usr/bin/env bash
# The main job on the real thing: kube-apiserver -> kms-sidecar -> kms-agent, with a real etcd below.
#
#   tests/demo.sh          shows it and cleans up                      (make demo)
#   tests/demo.sh --keep   leaves the cluster running                  (make demo KEEP=1)
#   tests/demo.sh --stop   stops a cluster that was left running       (make demo-stop)
#
# No root, free ports on 127.0.0.1 only. kube-apiserver, etcd, etcdctl and kubectl come from peers/build.sh. Our own
# programs are built, or taken from the folder in FLEET_KMS_BIN.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
repository=$(dirname "$here")
state=$repository/target/demo
logs=$state/logs
# shellcheck source=tests/peers/lib.sh
. "$here/peers/lib.sh"
# shellcheck source=tests/demo/show.sh
. "$here/demo/show.sh"
# shellcheck source=tests/demo/processes.sh
. "$here/demo/processes.sh"
# shellcheck source=tests/demo/config.sh
. "$here/demo/config.sh"

readonly RUST_MINIMUM=1.95
readonly CLUSTER=demo

# What cargo's target folder takes when nothing is built yet, and what a demo writes.
readonly CARGO_DISK_MB=2000
readonly DEMO_DISK_MB=500

# A value that occurs nowhere else, to look for in etcd's files.
readonly SECRET_VALUE=mydata-3f9c1d7e

main() {
    case ${1:-} in
    '') keep=no ;;
    --keep) keep=yes ;;
    --stop) stop_kept_demo && exit ;;
    *) die 'usage: demo.sh [--keep | --stop]' ;;
    esac
    preflight
    build
    prepare
    start_fleet
    start_cluster
    show_encryption
    show_rotation
    finish
}

# --- before anything is built -------------------------------------------------------------------------------------------

preflight() {
    require_linux
    [ ! -f "$state/processes" ] || die 'a demo was left running: make demo-stop'
    local plan
    plan=$("$here/peers/build.sh" --plan)
    require_rust
    if grep -q 'to build' <<<"$plan"; then
        require_go
        require_disk
    fi
    require_demo_disk
    print_plan "$plan"
}

require_rust() {
    [ -z "${FLEET_KMS_BIN:-}" ] || return 0
    command -v cc >/dev/null || die 'a C compiler is needed (SQLite and AWS-LC are C), and there is no cc in PATH'
    command -v cargo >/dev/null || die "Rust $RUST_MINIMUM is needed, and there is no cargo in PATH"
    # With rustup, rust-toolchain.toml brings the right version.
    ! command -v rustup >/dev/null || return 0
    local found
    found=$(cargo --version | cut -d ' ' -f 2)
    version_at_least "$found" "$RUST_MINIMUM" || die "Rust $RUST_MINIMUM or newer is needed, and cargo is $found"
}

require_demo_disk() {
    local target=${CARGO_TARGET_DIR:-$repository/target}
    if [ -z "${FLEET_KMS_BIN:-}" ] && [ ! -x "$target/debug/kms-agent" ]; then
        require_space 'building our programs' "$CARGO_DISK_MB" "$target"
    fi
    require_space 'the demo' "$DEMO_DISK_MB" "$state"
}

print_plan() {
    local tool path minutes disk
    printf '%-15s %-8s %-9s %s\n' TOOL MINUTES DISK FROM
    if [ -n "${FLEET_KMS_BIN:-}" ]; then
        printf '%-15s %-8s %-9s %s\n' 'our programs' 0 - "$FLEET_KMS_BIN"
    else
        printf '%-15s %-8s %-9s %s\n' 'our programs' '0-4' '2 GB' 'cargo build'
    fi
    while IFS=$'\t' read -r tool path; do
        minutes=0 disk=-
        if [ "$path" = 'to build' ]; then
            case $tool in
            kube-apiserver) minutes=3-8 disk='5 GB' ;;
            *) minutes=0-1 disk='0.1 GB' ;;
            esac
        fi
        printf '%-15s %-8s %-9s %s\n' "$tool" "$minutes" "$disk" "$path"
    done <<<"$1"
}

build() {
    step 'Building what is not there yet'
    local name path paths
    paths=$("$here/peers/build.sh")
    while IFS='=' read -r name path; do
        declare -g "$name=$path"
    done <<<"$paths"

    bin=${FLEET_KMS_BIN:-}
    if [ -z "$bin" ]; then
        (cd "$repository" && cargo build --locked -p fleet-kms-agent -p fleet-kms-sidecar -p fleet-kms-ctl)
        bin=$(cd "$repository" && cargo metadata --format-version 1 --no-deps |
            sed -n 's/.*"target_directory":"\([^"]*\)".*/\1/p')/debug
    fi
}

# --- a fleet of one agent, one cluster and one node -----------------------------------------------------------------------

prepare() {
    rm -rf "$state"
    mkdir -p "$logs" "$state/agent" "$state/sidecar" "$state/bin"
    : >"$state/processes"
    trap 'clean_up $?' EXIT
    # A socket path has at most 107 bytes, and nobody knows how deep this folder lies.
    socket_dir=$(mktemp -d "${TMPDIR:-/tmp}/fleet-kms-demo.XXXXXX")
    socket=$socket_dir/kms.sock
    printf '%s\n' "$socket_dir" >"$state/socket-dir"

    local variable
    for variable in agent_data_port agent_enrolment_port agent_admin_port agent_ops_port sidecar_ops_port \
        etcd_port etcd_peer_port api_port; do
        free_port
        declare -g "$variable=$REPLY"
    done

    # The commands of this demo are shown as a person would type them, and work so with `. target/demo/env`.
    ln -s "$KUBECTL" "$state/bin/kubectl"
    ln -s "$ETCDCTL" "$state/bin/etcdctl"
    local program
    for program in kms-agent kms-sidecar kmsctl; do
        ln -s "$(cd "$bin" && pwd)/$program" "$state/bin/$program"
    done
    export PATH="$state/bin:$PATH"
    export KMSCTL_CONFIG=$state/admin/kmsctl.toml
    write_agent_config
    write_sidecar_config
    write_kubernetes_config
    write_env
    # shellcheck source=/dev/null
    . "$state/env"
    cd "$state"
}

start_fleet() {
    step 'kms-agent: a store, a root key, a fleet CA and a first administrator'
    shown kms-agent init --config agent.toml --admin-directory "$state/admin"
    start kms-agent kms-agent run --config "$state/agent.toml"
    wait_for kms-agent ready http_ok "$agent_ops_port" /readyz

    step "kmsctl: the cluster \"$CLUSTER\" and a token for its node"
    shown kmsctl cluster create "$CLUSTER"
    (umask 077 && shown_line "kmsctl node token --cluster $CLUSTER --node node-1 >token")

    step 'kms-sidecar: enrols with the token, keeps its own key, listens on the KMS socket'
    shown kms-sidecar enrol --config sidecar.toml --token-file token
    start kms-sidecar kms-sidecar run --config "$state/sidecar.toml"
    wait_for kms-sidecar ready http_ok "$sidecar_ops_port" /readyz
}

start_cluster() {
    step 'etcd and kube-apiserver, encrypting Secrets by KMS v1 on that socket'
    # shellcheck disable=SC2154 # the ports are set through their names
    start etcd "$ETCD" --name=demo --data-dir="$state/etcd" --log-level=warn --unsafe-no-fsync \
        --listen-client-urls="http://127.0.0.1:$etcd_port" --advertise-client-urls="http://127.0.0.1:$etcd_port" \
        --listen-peer-urls="http://127.0.0.1:$etcd_peer_port" \
        --initial-advertise-peer-urls="http://127.0.0.1:$etcd_peer_port" \
        --initial-cluster="demo=http://127.0.0.1:$etcd_peer_port"
    wait_for etcd healthy etcdctl endpoint health
    start_kube_apiserver
    shown_line "kubectl get --raw '/readyz?verbose' | grep kms"
}

start_kube_apiserver() {
    # kube-apiserver makes the key pair in its cert-dir at its first start; its service account tokens are signed with
    # it as well, which saves the demo a key of its own.
    start kube-apiserver "$KUBE_APISERVER" --etcd-servers="http://127.0.0.1:$etcd_port" \
        --secure-port="$api_port" --bind-address=127.0.0.1 --advertise-address=127.0.0.1 \
        --endpoint-reconciler-type=none --cert-dir="$state/kube-apiserver" \
        --service-account-key-file="$state/kube-apiserver/apiserver.key" \
        --service-account-signing-key-file="$state/kube-apiserver/apiserver.key" \
        --service-account-issuer=https://kubernetes.default.svc --service-cluster-ip-range=10.0.0.0/24 \
        --token-auth-file="$state/tokens.csv" --authorization-mode=AlwaysAllow \
        --disable-admission-plugins=ServiceAccount \
        --encryption-provider-config="$state/encryption.yaml" \
        --encryption-provider-config-automatic-reload=true --feature-gates=KMSv1=true
    wait_for kube-apiserver ready kubectl get --raw /readyz
    wait_for kube-apiserver ready kubectl get namespace default
}

# --- the proof ------------------------------------------------------------------------------------------------------------

stored_secret() {
    etcdctl get "/registry/secrets/default/$1" --print-value-only
}

read_secret() {
    kubectl get secret "$1" -o 'jsonpath={.data.mykey}' | base64 -d
}

show_encryption() {
    step 'A Secret, as a thief of etcd sees it'
    shown kubectl create secret generic secret1 --from-literal=mykey="$SECRET_VALUE"
    shown_line 'etcdctl get /registry/secrets/default/secret1 --print-value-only | od -A x -t x1z | head -n 12'
    stored_secret secret1 | decode_stored_secret | indented
    expect 'the key version of secret1' 1 "$(version_of secret1)"
    show_search_of_etcd

    step 'The same Secret, as its owner sees it'
    shown_line "kubectl get secret secret1 -o 'jsonpath={.data.mykey}' | base64 -d && echo"
    expect 'the value of secret1' "$SECRET_VALUE" "$(read_secret secret1)"
}

# A ConfigMap is not encrypted: that the search finds its value shows that it would find the Secret's.
show_search_of_etcd() {
    shown kubectl create configmap not-encrypted --from-literal=mykey="clear-$SECRET_VALUE"
    shown_line "grep -r -a -o -h '[a-z]*-*$SECRET_VALUE' etcd | sort | uniq -c"
    local found
    found=$(grep -r -a -o -h "[a-z]*-*$SECRET_VALUE" etcd | sort -u)
    expect "what etcd's files hold of the two values" "clear-$SECRET_VALUE" "$found"
    note 'only the value of the ConfigMap, which is not encrypted'
}

show_rotation() {
    step 'The key is rotated'
    shown kmsctl key rotate "$CLUSTER" --yes
    shown kmsctl key versions "$CLUSTER"

    step 'A new Secret is wrapped by version 2'
    shown kubectl create secret generic secret2 --from-literal=mykey=written-after-the-rotation
    stored_secret secret2 | decode_stored_secret | indented
    expect 'the key version of secret2' 2 "$(version_of secret2)"

    step 'The old one still reads, by a kube-apiserver that was restarted and has cached nothing'
    stop_named kube-apiserver
    start_kube_apiserver
    shown_line "kubectl get secret secret1 -o 'jsonpath={.data.mykey}' | base64 -d && echo"
    expect 'the value of secret1' "$SECRET_VALUE" "$(read_secret secret1)"

    step 'The command everybody knows does not move it: KMS v1 does not tell kube-apiserver of key versions'
    shown_line 'kubectl get secrets -A -o json | kubectl replace -f -'
    stored_secret secret1 | decode_stored_secret | indented
    expect 'the key version of secret1 after replace' 1 "$(version_of secret1)"
    note 'still version 1, and readable for as long as an operator keeps that version'
}

# --- the end --------------------------------------------------------------------------------------------------------------

finish() {
    if [ "$keep" = no ]; then
        step 'Done; stopping everything'
        return
    fi
    step 'Done; everything keeps running'
    cat <<END

  . target/demo/env            sets KUBECONFIG, ETCDCTL_ENDPOINTS, KMSCTL_CONFIG, KMS_SOCKET and PATH
  kubectl get secrets -A       talks to the cluster
  etcdctl get --prefix /registry/secrets
  kmsctl status
  logs                         target/demo/logs
  make demo-stop               stops it and removes target/demo
END
}

# Runs at the end of the demo, however it ends. A failed demo leaves its logs.
clean_up() {
    trap - EXIT
    cd "$repository"
    [ "$1" -eq 0 ] && [ "$keep" = yes ] && exit 0
    stop_all
    rm -rf "$socket_dir"
    if [ "$1" -eq 0 ]; then
        rm -rf "$state"
    else
        say "the demo failed; its files are in $state"
    fi
    exit "$1"
}

stop_kept_demo() {
    if [ ! -f "$state/processes" ]; then
        say 'no demo is running'
        return 0
    fi
    stop_all
    rm -rf "$(cat "$state/socket-dir")" "$state"
    say 'stopped, and target/demo removed'
}

main "$@"
