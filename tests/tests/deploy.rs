//! What the shipped manifests and units must have for a node to come back from power-off by itself. That the API
//! server accepts them is shown elsewhere, by a dry run on a real one.
#![expect(clippy::indexing_slicing, reason = "a test: a wrong index fails it")]

use serde_json::Value;
use std::collections::BTreeSet;
use std::fs;
use std::path::PathBuf;

const PODS: [&str; 2] = ["kms-sidecar.static-pod.yaml", "kube-apiserver.native-sidecar.yaml"];

fn shipped(path: &str) -> String {
    let file = PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../deploy")).join(path);
    fs::read_to_string(file).expect("a shipped file")
}

fn yaml(name: &str) -> Value {
    serde_saphyr::from_str(&shipped(&format!("kubernetes/{name}"))).expect("YAML")
}

fn list(value: &Value) -> impl Iterator<Item = &Value> {
    value.as_array().into_iter().flatten()
}

fn containers(pod: &Value) -> impl Iterator<Item = &Value> {
    list(&pod["spec"]["initContainers"]).chain(list(&pod["spec"]["containers"]))
}

#[test]
fn the_pods_need_nothing_that_only_a_running_api_server_could_give() {
    for name in PODS {
        let pod = yaml(name);
        let spec = &pod["spec"];
        assert_eq!(spec["hostNetwork"], true, "{name}: there is no CNI yet");
        assert_eq!(spec["priorityClassName"], "system-node-critical", "{name}");
        assert!(spec["serviceAccountName"].is_null(), "{name}");
        let kinds: BTreeSet<&str> = list(&spec["volumes"])
            .flat_map(|volume| volume.as_object().expect("a volume").keys())
            .map(String::as_str)
            .collect();
        assert_eq!(
            kinds.difference(&BTreeSet::from(["name", "hostPath", "emptyDir"])).next(),
            None,
            "{name}"
        );
        for container in containers(&pod) {
            assert_eq!(container["imagePullPolicy"], "IfNotPresent", "{name}: the image is on the node");
            assert!(container["envFrom"].is_null() && container["env"].is_null(), "{name}");
        }
    }
}

#[test]
fn every_probe_names_the_loopback_address() {
    for name in PODS {
        for container in containers(&yaml(name)) {
            for probe in ["startupProbe", "livenessProbe", "readinessProbe"] {
                if !container[probe].is_null() {
                    assert_eq!(container[probe]["httpGet"]["host"], "127.0.0.1", "{name}: {probe}");
                }
            }
        }
    }
}

#[test]
fn the_api_server_starts_while_the_agents_are_away() {
    let pod = yaml(PODS[1]);
    let sidecar = containers(&pod).find(|container| container["name"] == "kms-sidecar").expect("the sidecar");
    assert_eq!(sidecar["restartPolicy"], "Always");
    assert_eq!(sidecar["startupProbe"]["httpGet"]["path"], "/livez");
}

#[test]
fn the_sidecar_runs_without_root_and_without_capabilities() {
    for name in PODS {
        let pod = yaml(name);
        let sidecar =
            containers(&pod).find(|container| container["name"] == "kms-sidecar").expect("the sidecar");
        let context = &sidecar["securityContext"];
        assert_eq!(context["runAsNonRoot"], true, "{name}");
        assert_eq!(context["allowPrivilegeEscalation"], false, "{name}");
        assert_eq!(context["readOnlyRootFilesystem"], true, "{name}");
        assert_eq!(context["capabilities"], serde_json::json!({ "drop": ["ALL"] }), "{name}");
    }
}

#[test]
fn one_path_and_one_user_run_through_all_files() {
    for version in ["v1", "v2"] {
        let config = yaml(&format!("encryption-configuration.{version}.yaml"));
        let providers = &config["resources"][0]["providers"];
        let kms = &providers[0]["kms"];
        assert_eq!(kms["apiVersion"], version);
        assert_eq!(kms["name"], "kms-plugin");
        assert_eq!(kms["endpoint"], "unix:///run/fleet-kms/kms.sock");
        assert_eq!(
            providers[1],
            serde_json::json!({ "identity": {} }),
            "the last one reads what is still in clear"
        );
        assert_eq!(kms["cachesize"].is_null(), version == "v2", "v2 refuses a cache size");
    }
    assert!(shipped("systemd/kms-sidecar.socket").contains("ListenStream=/run/fleet-kms/kms.sock\n"));
    assert!(shipped("config/sidecar.toml").contains("path = \"/run/fleet-kms/kms.sock\"\n"));
    assert!(
        shipped("tmpfiles.d/fleet-kms.conf").contains("d /run/fleet-kms               0750 65532 65532 -\n")
    );
    assert!(shipped("sysusers.d/fleet-kms.conf").contains("u kms-sidecar 65532 "));
}

#[test]
fn the_units_restart_for_ever_but_not_on_a_wrong_configuration() {
    for unit in ["systemd/kms-agent.service", "systemd/kms-sidecar.service"] {
        let text = shipped(unit);
        for line in ["StartLimitIntervalSec=0", "Restart=always", "LimitCORE=0", "CapabilityBoundingSet="] {
            assert!(text.lines().any(|found| found == line), "{unit}: {line}");
        }
        assert!(text.contains("RestartPreventExitStatus=64"), "{unit}");
    }
}
