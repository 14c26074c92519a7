//! One id names a call of kube-apiserver in the sidecar's log and in the agent's.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "tests: what is not there fails them"
)]

use std::time::Duration;

use fleet_kms_tests::fleet::Fleet;
use fleet_kms_tests::kms_client::{Api, KmsClient};
use fleet_kms_tests::peers::ClientVersion;
use fleet_kms_tests::wait;
use serde_json::Value;

const LIMIT: Duration = Duration::from_secs(20);

#[test]
fn a_refused_call_has_one_id_in_both_logs() {
    let fleet = Fleet::start_with("[log]\nformat = \"json\"").unwrap();
    let cluster = fleet.cluster("traced").unwrap();
    let sidecar = fleet.sidecar(&cluster, "node-1").unwrap();
    fleet.kmsctl(&["node", "ban", "--cluster", "traced", "node-1", "--yes"]).unwrap();
    let client = KmsClient::new(ClientVersion::V0_37_2, Api::V1, &sidecar.socket).unwrap();
    client.call(&["encrypt", "-timeout", "2s"]).unwrap().refused().unwrap();

    let line = wait::until("the sidecar's line", LIMIT, || {
        let log = sidecar.log()?;
        let mut lines = log.lines().filter(|line| line.contains("a call of kube-apiserver failed"));
        Ok(lines.find(|line| line.contains("v1_encrypt")).map(str::to_owned))
    })
    .unwrap();
    let id = line.split("request=").nth(1).unwrap().split(' ').next().unwrap().to_owned();
    assert!(id.len() == 16 && id.bytes().all(|byte| byte.is_ascii_hexdigit()), "{line}");

    let same = wait::until("the agent's line", LIMIT, || {
        let log = fleet.agent.log()?;
        // Every line is one JSON object, spans included.
        let lines: Vec<Value> = log.lines().map(serde_json::from_str).collect::<Result<_, _>>()?;
        Ok(lines.into_iter().find(|line| line["span"]["request"] == *id))
    })
    .unwrap();
    assert_eq!(same["span"]["operation"], "wrap");
    assert_eq!((&same["outcome"], &same["level"]), (&"banned".into(), &"WARN".into()), "{same}");
    assert_eq!(same["caller"], format!("spiffe://fleet.test/cluster/{}/node/node-1", cluster.id));
}
