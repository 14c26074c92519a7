//! The main job: a real kube-apiserver and a real etcd through kms-sidecar and kms-agent, undisturbed and rotated.
//! What disturbs them is in `outages.rs`.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context, ensure};
use fleet_kms_tests::control_plane::{ControlPlane, value_of};
use fleet_kms_tests::encryption_config::EncryptionConfig;
use fleet_kms_tests::fleet::Fleet;
use fleet_kms_tests::stored::{Header, V1_PREFIX, V2_PREFIX};
use fleet_kms_tests::wait;
use serde_json::Value;

/// kube-apiserver asks a v2 plugin for its key id every minute, and when its health is asked for 20 s after the last
/// time.
const KEY_ID_LAG: Duration = Duration::from_secs(90);

/// The whole of it, as the documentation of KMS tells a user to check it.
fn encrypts_and_reads_back(plane: &ControlPlane, prefix: &str) -> anyhow::Result<()> {
    plane.create("secret1")?;
    let stored = plane.etcd.secret("default", "secret1")?;
    ensure!(stored.starts_with(prefix.as_bytes()), "{}", String::from_utf8_lossy(&stored));
    ensure!(!String::from_utf8_lossy(&stored).contains(&value_of("secret1")), "a thief reads it");
    plane.read("secret1")?;
    let checks = plane.api.raw("/readyz?verbose")?.ok()?;
    ensure!(checks.contains("[+]kms-providers ok"), "{checks}");
    Ok(())
}

#[test]
fn secrets_are_encrypted_with_kms_v1_and_read_back_with_a_cold_cache() -> anyhow::Result<()> {
    let mut fleet = Fleet::start()?;
    let mut plane = ControlPlane::start(&fleet, "alpha", EncryptionConfig::v1)?;
    encrypts_and_reads_back(&plane, V1_PREFIX)?;
    let stored = plane.etcd.secret("default", "secret1")?;
    let length = stored.get(V1_PREFIX.len()..V1_PREFIX.len() + 2);
    assert_eq!(length, Some(&[0, 93][..]), "a wrapped DEK of 93 bytes");
    let header = plane.header("secret1")?;
    assert_eq!((header.format, header.version), (1, 1));
    assert_eq!(header, active(&fleet, "alpha")?);

    let names = plane.create_many(50)?;
    plane.api.restart()?;
    plane.read_all(&names)?;
    fleet.agent.stop()?;
    fleet.agent.start()?;
    plane.api.restart()?;
    plane.read_all(&names)
}

#[test]
fn secrets_are_encrypted_with_kms_v2_and_read_back_with_a_cold_cache() -> anyhow::Result<()> {
    let mut fleet = Fleet::start()?;
    let mut plane = ControlPlane::start(&fleet, "alpha", EncryptionConfig::v2)?;
    encrypts_and_reads_back(&plane, V2_PREFIX)?;
    assert_eq!(plane.header("secret1")?, active(&fleet, "alpha")?);

    let names = plane.create_many(50)?;
    plane.api.restart()?;
    plane.read_all(&names)?;
    fleet.agent.stop()?;
    fleet.agent.start()?;
    plane.api.restart()?;
    plane.read_all(&names)
}

/// The same against the same handlers without the rewrite of `:authority`: the proof that it can fail, and on what.
#[test]
fn without_the_authority_rewrite_every_call_of_kube_apiserver_ends_in_a_protocol_error() -> anyhow::Result<()>
{
    let fleet = Fleet::start()?;
    let mut sidecar = fleet.unenrolled_sidecar(&fleet.cluster("alpha")?, "node")?;
    sidecar.enrol(&fleet.token_for("alpha", "node")?)?;
    let program = Path::new(env!("CARGO_BIN_EXE_kms-sidecar-without-rewrite"));
    sidecar.respec(|spec| spec.program(program));
    sidecar.start()?;
    let plane = ControlPlane::start_unready(sidecar, EncryptionConfig::v1)?;

    let error = encrypts_and_reads_back(&plane, V1_PREFIX).err().context("it encrypts")?.to_string();
    assert!(error.contains("stream terminated by RST_STREAM with error code: PROTOCOL_ERROR"), "{error}");
    assert!(plane.etcd.secret("default", "secret1").is_err());
    let checks = plane.api.raw("/readyz?verbose")?;
    assert!(checks.status == 500 && checks.body.contains("[-]kms-providers failed"), "{checks:?}");
    Ok(())
}

/// KMS v1 does not tell kube-apiserver of key versions, so it has no reason to write.
#[test]
fn after_a_rotation_new_secrets_get_the_new_version_and_v1_leaves_the_old_ones() -> anyhow::Result<()> {
    let fleet = Fleet::start()?;
    let mut plane = ControlPlane::start(&fleet, "alpha", EncryptionConfig::v1)?;
    plane.create("before")?;
    let stored = plane.etcd.secret("default", "before")?;
    fleet.kmsctl(&["key", "rotate", "alpha", "--yes"])?;
    plane.create("after")?;
    assert_eq!(plane.header("after")?, active(&fleet, "alpha")?);
    assert_eq!(plane.header("after")?.version, 2);

    plane.api.restart()?;
    plane.read_all(&["before".to_owned(), "after".to_owned()])?;
    replace_all(&plane)?;
    assert_eq!(plane.etcd.secret("default", "before")?, stored);

    // One annotation is a reason.
    plane.api.kubectl(["annotate", "secret", "before", "touched=yes"])?;
    assert_eq!(plane.header("before")?.version, 2);
    plane.read("before")
}

#[test]
fn after_a_rotation_a_write_that_changes_nothing_moves_a_secret_to_the_new_version_under_v2()
-> anyhow::Result<()> {
    let fleet = Fleet::start()?;
    let mut plane = ControlPlane::start(&fleet, "alpha", EncryptionConfig::v2)?;
    plane.create("before")?;
    let old = plane.header("before")?;
    fleet.kmsctl(&["key", "rotate", "alpha", "--yes"])?;

    let mut count = 0;
    wait::until("a Secret under the new version", KEY_ID_LAG, || {
        // Never an error on the way: Encrypt and Status go on naming one and the same version.
        plane.api.raw("/readyz")?.ok()?;
        count += 1;
        let name = format!("after-{count}");
        plane.create(&name)?;
        Ok((plane.header(&name)? != old).then_some(()))
    })?;
    let new = plane.header(&format!("after-{count}"))?;
    assert_eq!(new, active(&fleet, "alpha")?);
    assert_eq!((old.version, new.version), (1, 2));

    assert_eq!(plane.header("before")?, old);
    replace_all(&plane)?;
    assert_eq!(plane.header("before")?, new);
    plane.api.restart()?;
    plane.read_all(&["before".to_owned(), "after-1".to_owned(), format!("after-{count}")])
}

#[test]
fn two_clusters_of_one_agent_cannot_read_each_other_even_with_the_bytes_of_etcd() -> anyhow::Result<()> {
    let fleet = Fleet::start()?;
    let alpha = ControlPlane::start(&fleet, "alpha", EncryptionConfig::v1)?;
    let mut beta = ControlPlane::start(&fleet, "beta", EncryptionConfig::v1)?;
    alpha.create("theirs")?;
    beta.create("ours")?;

    let key = "/registry/secrets/default/theirs";
    beta.etcd.put(key, &alpha.etcd.value(key)?)?;
    let answer = beta.api.raw("/api/v1/namespaces/default/secrets/theirs")?;
    assert_eq!(answer.status, 500, "{}", answer.body);
    assert!(!answer.body.contains(&value_of("theirs")));
    beta.read("ours")?;
    alpha.read("theirs")?;

    beta.etcd.delete(key)?;
    beta.api.restart()?;
    beta.read("ours")
}

/// The command that everybody knows from the documentation.
fn replace_all(plane: &ControlPlane) -> anyhow::Result<()> {
    let said = plane.api.shell("kubectl get secrets -A -o json | kubectl replace -f -")?;
    ensure!(said.contains("secret/before replaced"), "{said}");
    Ok(())
}

/// The active version, as kmsctl shows it.
fn active(fleet: &Fleet, cluster: &str) -> anyhow::Result<Header> {
    let versions = fleet.kmsctl_json(&["key", "versions", cluster])?;
    let active = versions.as_array().into_iter().flatten().find(|version| {
        version.get("state").and_then(Value::as_str).is_some_and(|state| state.eq_ignore_ascii_case("active"))
    });
    let active = active.with_context(|| format!("no active version in {versions}"))?;
    let version = active.get("version").and_then(Value::as_u64).context("a version")?;
    let key_id = active.get("key_id").and_then(Value::as_str).context("a key id")?;
    Ok(Header { format: 1, version: u32::try_from(version)?, key_id: key_id.to_owned() })
}
