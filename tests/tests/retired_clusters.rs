//! A cluster is retired and comes back: who calls meanwhile reads why not, and no key is lost on the way.
#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "tests: what is not there fails them")]

use std::time::Duration;

use fleet_kms_tests::fleet::{Fleet, Sidecar, until_true};
use fleet_kms_tests::kms_client::{Api, KmsClient};
use fleet_kms_tests::peers::ClientVersion;
use fleet_kms_tests::wait::START_LIMIT;
use serde_json::Value;

fn client(sidecar: &Sidecar, api: Api) -> KmsClient {
    KmsClient::new(ClientVersion::V0_37_2, api, &sidecar.socket).unwrap()
}

fn metric(fleet: &Fleet, name: &str) -> i64 {
    let text = fleet.agent.ops("/metrics").unwrap().ok().unwrap();
    let line = text.lines().find(|line| line.starts_with(&format!("{name} ")));
    line.unwrap().rsplit(' ').next().unwrap().parse().unwrap()
}

#[test]
fn a_retired_cluster_says_so_to_the_api_server_and_reads_its_old_values_once_it_is_back() {
    let mut fleet = Fleet::start().unwrap();
    let cluster = fleet.cluster("plant").unwrap();
    let mut sidecar = fleet.sidecar(&cluster, "cp-1").unwrap();
    let other = fleet.sidecar(&fleet.cluster("other").unwrap(), "cp-1").unwrap();
    let values: Vec<(Api, Value)> =
        Api::ALL.map(|api| (api, client(&sidecar, api).call(&["encrypt"]).unwrap().last().unwrap())).into();

    let refused = fleet.kmsctl_output(&["cluster", "retire", "plant"]).unwrap();
    assert_eq!(refused.status.code(), Some(2), "nobody confirmed it");
    let retired = fleet.kmsctl(&["cluster", "retire", "plant", "--yes", "--reason", "sold"]).unwrap();
    assert!(retired.contains("1 node or worker is removed"), "{retired}");
    for (api, value) in &values {
        for call in [vec!["encrypt"], vec!["decrypt", "-answer", &value.to_string()]] {
            let failure = client(&sidecar, *api).call(&call).unwrap().refused().unwrap();
            assert_eq!(failure.code, "FailedPrecondition", "{api:?} {call:?}: {}", failure.error);
            assert!(failure.error.contains("this cluster is retired in kms-agent"), "{}", failure.error);
        }
    }
    client(&other, Api::V2).call(&["round-trip", "-sizes", "32"]).unwrap().ok().unwrap();

    assert!(!fleet.kmsctl(&["cluster", "list"]).unwrap().contains("plant"));
    let listed = fleet.kmsctl(&["cluster", "list", "--retired"]).unwrap();
    assert!(listed.contains("plant") && listed.contains("keys kept until"), "{listed}");
    assert!(fleet.kmsctl(&["status"]).unwrap().contains("1 more retired"));
    assert!(!fleet.kmsctl(&["node", "list"]).unwrap().contains("plant"));
    let gauges =
        (metric(&fleet, "fleet_kms_agent_clusters"), metric(&fleet, "fleet_kms_agent_clusters_retired"));
    assert_eq!(gauges, (1, 1));

    // A backup and a rotation of the store key carry what nobody uses now.
    let backup = fleet.path().join("backup");
    let made = fleet.host(&["backup", backup.to_str().unwrap()]).unwrap();
    assert!(made.contains("4 versions of 2 clusters, each opened"), "{made}");
    let second = fleet.agent.directory.join("second.key");
    fleet.host(&["slot", "add", "file", second.to_str().unwrap()]).unwrap();
    let opened = fleet.host(&["slot", "test", "--root-file", second.to_str().unwrap()]).unwrap();
    fleet.host(&["slot", "remove", opened.trim().rsplit(' ').next().unwrap(), "--new-passphrase"]).unwrap();
    let rotated = || Ok(fleet.agent.log()?.contains("the older key is gone"));
    until_true("the end of the store key's rotation", START_LIMIT, rotated).unwrap();
    fleet.agent.restart_after(Duration::ZERO).unwrap();
    let failure = client(&sidecar, Api::V1).call(&["encrypt"]).unwrap().refused().unwrap();
    assert!(failure.error.contains("retired"), "after a restart of the agent: {}", failure.error);

    // The name was free meanwhile, so that it comes back under another.
    fleet.cluster("plant").unwrap();
    let taken = fleet.kmsctl_output(&["cluster", "restore", &cluster.id]).unwrap();
    assert_eq!(taken.status.code(), Some(4), "{}", String::from_utf8_lossy(&taken.stderr));
    fleet.kmsctl(&["cluster", "restore", "plant", "--name", "plant-old"]).unwrap();
    let failure = client(&sidecar, Api::V1).call(&["encrypt"]).unwrap().refused().unwrap();
    assert_eq!(failure.code, "PermissionDenied", "its nodes need join tokens: {}", failure.error);
    sidecar.stop().unwrap();
    sidecar.enrol(&fleet.token_for("plant-old", "cp-1").unwrap()).unwrap();
    sidecar.start().unwrap();
    sidecar.wait_ready().unwrap();
    for (api, value) in &values {
        client(&sidecar, *api).call(&["decrypt", "-answer", &value.to_string()]).unwrap().ok().unwrap();
    }
    assert!(
        fleet.kmsctl(&["cluster", "list", "-o", "wide"]).unwrap().contains(&cluster.id),
        "its id is its own"
    );

    // A rename is of no concern to the nodes.
    fleet.kmsctl(&["cluster", "rename", "plant-old", "plant-2"]).unwrap();
    client(&sidecar, Api::V2).call(&["round-trip", "-sizes", "32"]).unwrap().ok().unwrap();
    fleet.agent.stop().unwrap();
    let audit = fleet.agent.audit("changes").unwrap();
    let actions: Vec<&str> = audit.iter().filter_map(|line| line["action"].as_str()).collect();
    for action in ["cluster_retire", "node_remove", "cluster_restore", "cluster_rename"] {
        assert!(actions.contains(&action), "{action} is missing in {actions:?}");
    }
    assert!(audit.iter().any(|line| line["action"] == "cluster_retire" && line["reason"] == "sold"));
}
