# All configuration text of the demo. Sourced by demo.sh, which chooses the ports.
# shellcheck shell=bash disable=SC2154

write_agent_config() {
    cat >"$state/agent.toml" <<END
[agent]
name = "agent-1"
trust_domain = "fleet.example"
addresses = [{ data = "127.0.0.1:$agent_data_port", enrolment = "127.0.0.1:$agent_enrolment_port" }]

[listen]
data = "127.0.0.1:$agent_data_port"
enrolment = "127.0.0.1:$agent_enrolment_port"
admin = "127.0.0.1:$agent_admin_port"
ops = "127.0.0.1:$agent_ops_port"

[store]
path = "$state/agent/store.db"

[root]
file = "$state/agent/root.key"

[audit]
directory = "$state/agent/audit"
END
}

write_sidecar_config() {
    cat >"$state/sidecar.toml" <<END
[socket]
path = "$socket"

[identity]
directory = "$state/sidecar"

[agents]
addresses = [{ data = "127.0.0.1:$agent_data_port", enrolment = "127.0.0.1:$agent_enrolment_port" }]

[ops]
address = "127.0.0.1:$sidecar_ops_port"
END
}

# The API server's one user, in the group that may do everything, and what kubectl needs to be it.
write_kubernetes_config() {
    printf 'demo-token,demo,1,system:masters\n' >"$state/tokens.csv"
    cat >"$state/encryption.yaml" <<END
apiVersion: apiserver.config.k8s.io/v1
kind: EncryptionConfiguration
resources:
  - resources: [secrets]
    providers:
      - kms:
          apiVersion: v1
          name: kms-plugin
          endpoint: unix://$socket
          cachesize: 20000
          timeout: 3s
END
    cat >"$state/kubeconfig" <<END
apiVersion: v1
kind: Config
current-context: demo
clusters:
  - name: demo
    cluster: {server: "https://127.0.0.1:$api_port", certificate-authority: "$state/kube-apiserver/apiserver.crt"}
contexts:
  - name: demo
    context: {cluster: demo, user: demo}
users:
  - name: demo
    user: {token: demo-token}
END
}

# To be sourced by the person who keeps the demo.
write_env() {
    cat >"$state/env" <<END
export KUBECONFIG="$state/kubeconfig"
export KMS_SOCKET="$socket"
export ETCDCTL_ENDPOINTS="http://127.0.0.1:$etcd_port"
export KMSCTL_CONFIG="$KMSCTL_CONFIG"
export KMS_AGENT_OPS="http://127.0.0.1:$agent_ops_port"
export KMS_SIDECAR_OPS="http://127.0.0.1:$sidecar_ops_port"
export PATH="$state/bin:\$PATH"
END
}
