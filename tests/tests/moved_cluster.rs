//! A cluster whose nodes are gone: its etcd, started on new ones, is read with tokens of that cluster and of no other.

use anyhow::ensure;
use fleet_kms_tests::apiserver::ApiServer;
use fleet_kms_tests::control_plane::{ControlPlane, value_of};
use fleet_kms_tests::encryption_config::EncryptionConfig;
use fleet_kms_tests::fleet::Fleet;
use fleet_kms_tests::wait::{self, START_LIMIT};

#[test]
fn an_etcd_on_new_nodes_is_read_with_a_token_of_its_own_cluster_and_of_no_other() -> anyhow::Result<()> {
    let fleet = Fleet::start()?;
    let mut old = ControlPlane::start(&fleet, "alpha", EncryptionConfig::v1)?;
    let names = old.create_many(20)?;
    fleet.kmsctl(&["key", "rotate", "alpha"])?;
    old.create("late")?;
    old.api.stop();
    old.sidecar.kill9()?;
    let ControlPlane { etcd, sidecar: gone, .. } = old;
    std::fs::remove_dir_all(&gone.identity)?;
    let etcd = etcd.move_to(&fleet.path().join("new-machine"))?;

    let alpha = fleet.cluster_named("alpha")?;
    let new = fleet.sidecar(&alpha, "new-node")?;
    let encryption = EncryptionConfig::v1(&new.socket);
    let mut api = ApiServer::start(&fleet.path().join("kube"), &etcd, &encryption)?;
    for name in names.iter().map(String::as_str).chain(["late"]) {
        ensure!(api.read_secret(name)? == value_of(name), "{name}");
    }
    api.create_secret("new", &value_of("new"))?.ok()?;

    let beta = fleet.sidecar(&fleet.cluster("beta")?, "new-node")?;
    api.set_encryption(&EncryptionConfig::v1(&beta.socket))?;
    api.restart_unready()?;
    let mut refused = String::new();
    wait::until("an answer about a Secret of another cluster", START_LIMIT, || {
        let answer = api.raw("/api/v1/namespaces/default/secrets/late").ok();
        Ok(answer.filter(|answer| answer.status == 500).map(|answer| refused = answer.body))
    })?;
    ensure!(!refused.contains(&value_of("late")), "{refused}");
    Ok(())
}
