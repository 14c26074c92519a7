//! Backup and restore with real programs: what was ever wrapped is unwrapped, and nobody has to touch a node.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, ensure};
use fleet_kms_process::runtime;
use fleet_kms_proto::agent::unwrap_item::Outcome;
use fleet_kms_tests::fleet::{Cluster, Fleet, Sidecar, until_true};
use fleet_kms_tests::kms_client::{Api, KmsClient};
use fleet_kms_tests::member::{Member, reason_of};
use fleet_kms_tests::peers::ClientVersion;
use fleet_kms_tests::wait::START_LIMIT;
use serde_json::Value;

/// What `encrypt` printed, and the key version in it.
struct Encrypted(String);

fn client(sidecar: &Sidecar) -> anyhow::Result<KmsClient> {
    KmsClient::new(ClientVersion::V0_37_2, Api::V1, &sidecar.socket)
}

fn encrypt(sidecar: &Sidecar) -> anyhow::Result<Encrypted> {
    Ok(Encrypted(client(sidecar)?.call(&["encrypt"])?.last()?.to_string()))
}

fn decrypt(sidecar: &Sidecar, encrypted: &Encrypted) -> anyhow::Result<()> {
    client(sidecar)?.call(&["decrypt", "-answer", &encrypted.0])?.ok().map(drop)
}

/// Number and state of each version.
fn versions(fleet: &Fleet, cluster: &Cluster) -> anyhow::Result<Vec<(u64, String)>> {
    let found = fleet.kmsctl_json(&["key", "versions", &cluster.name])?;
    let items = found.get("items").or(Some(&found)).and_then(Value::as_array).context("a list")?;
    let version = |item: &Value| {
        let number = item.get("version").and_then(Value::as_u64)?;
        Some((number, item.get("state")?.as_str()?.to_owned()))
    };
    items.iter().map(|item| version(item).with_context(|| item.to_string())).collect()
}

fn active(fleet: &Fleet, cluster: &Cluster) -> anyhow::Result<u64> {
    let versions = versions(fleet, cluster)?;
    let active = versions.iter().find(|(_, state)| state == "active");
    active.map(|(number, _)| *number).with_context(|| format!("{versions:?}"))
}

fn audited(fleet: &Fleet, action: &str) -> anyhow::Result<usize> {
    let lines = fleet.agent.audit("changes")?;
    Ok(lines.iter().filter(|line| line["action"] == action).count())
}

fn store_files(directory: &Path) -> [PathBuf; 3] {
    ["store.db", "store.db-wal", "store.db-shm"].map(|name| directory.join(name))
}

fn lose_the_store(fleet: &Fleet) -> anyhow::Result<()> {
    for file in store_files(&fleet.agent.directory).iter().filter(|file| file.exists()) {
        fs::remove_file(file)?;
    }
    Ok(())
}

#[test]
fn after_a_restore_everything_opens_without_an_alarm_and_every_node_comes_back_but_a_banned_one()
-> anyhow::Result<()> {
    let mut fleet = Fleet::start()?;
    let cluster = fleet.cluster("alpha")?;
    let early = fleet.sidecar(&cluster, "early")?;
    let banned = fleet.sidecar(&cluster, "banned")?;
    let before = encrypt(&early)?;
    let backup = fleet.path().join("backup.db");
    let backup = backup.to_str().context("a path in UTF-8")?;
    let made = fleet.host(&["backup", backup])?;
    ensure!(made.contains("2 versions of 1 clusters"), "{made}");
    ensure!(fleet.host(&["backup", "verify", backup])?.contains("opens it"));

    // What the backup does not know: a rotation, a node, a ban.
    fleet.kmsctl(&["key", "rotate", "alpha"])?;
    let after = encrypt(&early)?;
    let late = fleet.sidecar(&cluster, "late")?;
    fleet.kmsctl(&["node", "ban", "--cluster", "alpha", "banned", "--yes"])?;

    let refused = fleet.host(&["restore", backup]).unwrap_err().to_string();
    ensure!(refused.contains("in use by process"), "{refused}");
    fleet.agent.stop()?;
    lose_the_store(&fleet)?;
    let done = fleet.host(&["restore", backup])?;
    ensure!(
        done.contains("rotated fresh   1 clusters") && done.contains("banned          1 identities"),
        "{done}"
    );
    fleet.agent.start()?;

    for sidecar in [&early, &late] {
        until_true("the sidecar's link", START_LIMIT, || Ok(decrypt(sidecar, &before).is_ok()))?;
        decrypt(sidecar, &after)?;
    }
    ensure!(decrypt(&banned, &before).is_err(), "a banned node was served");
    ensure!(active(&fleet, &cluster)? > 1_000);
    decrypt(&late, &encrypt(&early)?)?;
    assert_eq!(audited(&fleet, "store_rolled_back")?, 0);
    assert_eq!(audited(&fleet, "identity_readopt")?, 1, "the late node, once");
    Ok(())
}

#[test]
fn an_old_file_copied_into_place_serves_with_an_alarm_and_changes_nothing_until_it_is_confirmed()
-> anyhow::Result<()> {
    let mut fleet = Fleet::start()?;
    let cluster = fleet.cluster("alpha")?;
    let sidecar = fleet.sidecar(&cluster, "cp-1")?;
    let before = encrypt(&sidecar)?;
    fleet.agent.stop()?;
    let (store, old) = (fleet.agent.directory.join("store.db"), fleet.path().join("old.db"));
    fs::copy(&store, &old)?;
    fleet.agent.start()?;
    fleet.kmsctl(&["key", "rotate", "alpha"])?;
    let mut after = None;
    until_true("the sidecar's link", START_LIMIT, || {
        Ok(encrypt(&sidecar).map(|new| after = Some(new)).is_ok())
    })?;
    let after = after.context("a value")?;
    fleet.agent.stop()?;
    lose_the_store(&fleet)?;
    fs::copy(&old, &store)?;
    fleet.agent.start()?;

    until_true("the sidecar's link", START_LIMIT, || Ok(decrypt(&sidecar, &before).is_ok()))?;
    assert_eq!(audited(&fleet, "store_rolled_back")?, 0);
    decrypt(&sidecar, &after)?;
    until_true("the alarm", START_LIMIT, || Ok(audited(&fleet, "store_rolled_back")? == 1))?;
    let status = fleet.kmsctl(&["status"])?;
    ensure!(status.contains("recovered_unconfirmed") && status.contains("store_rolled_back"), "{status}");
    let refused = fleet.kmsctl(&["key", "rotate", "alpha"]).unwrap_err().to_string();
    ensure!(refused.contains("kms-agent restore --confirm"), "{refused}");
    assert_eq!(active(&fleet, &cluster)?, 1);

    let done = fleet.host(&["restore", "--confirm"])?;
    ensure!(done.contains("1 clusters have a fresh version"), "{done}");
    ensure!(active(&fleet, &cluster)? > 1_000);
    for value in [&before, &after, &encrypt(&sidecar)?] {
        decrypt(&sidecar, value)?;
    }
    fleet.agent.stop()?;
    ensure!(fleet.host(&["check-store"])?.contains("each as the last transaction left it"));
    fleet.agent.start()?;
    fleet.kmsctl(&["key", "rotate", "alpha"])?;
    Ok(())
}

#[test]
fn scheduled_backups_are_verified_kept_in_number_and_required_where_configured() -> anyhow::Result<()> {
    let directory = tempfile::tempdir()?;
    let backups = directory.path().join("backups");
    let extra =
        format!("[backup]\ndirectory = \"{}\"\nevery = \"1h\"\nkeep = 2\nrequired = true", backups.display());
    let fleet = Fleet::start_with(&extra)?;
    let cluster = fleet.cluster("alpha")?;
    let shown = fleet.kmsctl_json(&["cluster", "show", &cluster.name])?.to_string();
    ensure!(!shown.contains("\"unbacked\":[1"), "created before a backup held it: {shown}");
    fleet.kmsctl(&["key", "rotate", "alpha", "--fresh", "--yes"])?;
    let metrics = fleet.agent.ops("/metrics")?.ok()?;
    ensure!(metrics.contains("fleet_kms_agent_versions_unbacked 0"), "{metrics}");
    let kept = fs::read_dir(&backups)?.count();
    ensure!((1..=2).contains(&kept), "{kept} backups");
    Ok(())
}

/// Nodes of the fleet that is restored, and how many of them the backup does not know.
const NODES: usize = 100;
const LATE: usize = 10;
/// Renewals of each node that the backup does not know: one for each day.
const DAYS: usize = 3;

/// Enrols nodes of one cluster with one token.
async fn enrolled(
    fleet: &Fleet,
    token: &str,
    names: impl Iterator<Item = usize>,
) -> anyhow::Result<Vec<Member>> {
    let mut nodes = Vec::new();
    for n in names {
        nodes.push(Member::enrol(fleet.agent.ports, token, &format!("node-{n}")).await?);
    }
    Ok(nodes)
}

#[test]
fn a_hundred_nodes_that_renewed_since_the_backup_come_back_by_themselves_and_a_banned_one_does_not()
-> anyhow::Result<()> {
    let mut fleet = Fleet::start()?;
    fleet.cluster("alpha")?;
    let uses = NODES.to_string();
    let token = fleet.kmsctl(&["node", "token", "--cluster", "alpha", "--uses", &uses])?;
    let (token, ports) = (token.trim().to_owned(), fleet.agent.ports);
    let runtime = runtime::multi_thread()?;
    let mut nodes = runtime.block_on(enrolled(&fleet, &token, 0..NODES - LATE))?;
    let first = nodes.first().context("a node")?;
    let before = runtime.block_on(async { anyhow::Ok(first.data(ports).await?.wrap(&[1; 32]).await?) })?;
    let backup = fleet.path().join("backup.db");
    let backup = backup.to_str().context("a path in UTF-8")?;
    fleet.host(&["backup", backup])?;

    // What the backup does not know: three days of renewals, new nodes, a rotation and a ban.
    nodes.extend(runtime.block_on(enrolled(&fleet, &token, NODES - LATE..NODES))?);
    fleet.kmsctl(&["key", "rotate", "alpha"])?;
    let after = runtime.block_on(async {
        for (node, n) in nodes.iter_mut().zip(0..) {
            for day in 0..DAYS {
                let next = node.renew(ports).await?;
                match (day + 1 == DAYS, n % 3) {
                    // The last reply was lost, or the new certificate was not used yet.
                    (true, 0) => continue,
                    (true, 1) => {}
                    _ => drop(next.data(ports).await?.status().await?),
                }
                *node = next;
            }
        }
        anyhow::Ok(nodes.first().context("a node")?.data(ports).await?.wrap(&[2; 32]).await?)
    })?;
    let banned = 7;
    fleet.kmsctl(&["node", "ban", "--cluster", "alpha", &format!("node-{banned}"), "--yes"])?;
    fleet.agent.stop()?;

    // The host is lost with its store; its audit had been copied.
    lose_the_store(&fleet)?;
    let (audit, saved) = (fleet.agent.directory.join("audit"), fleet.path().join("saved-audit"));
    fs::rename(&audit, &saved)?;
    fs::create_dir(&audit)?;
    let saved = saved.to_str().context("a path in UTF-8")?;
    let done = fleet.host(&["restore", backup, "--bans-from", saved])?;
    ensure!(done.contains("banned          1 identities"), "{done}");
    fleet.agent.start()?;

    let mut back = 0;
    for (node, n) in nodes.iter().zip(0..) {
        runtime.block_on(async {
            let mut link = node.data(ports).await?;
            if n == banned {
                let refused = link.status().await.err().context("a banned node was served")?;
                ensure!(reason_of(&refused) == "banned", "{refused}");
                ensure!(node.renew(ports).await.is_err(), "a banned node renewed");
                return Ok(());
            }
            link.status().await.with_context(|| format!("node-{n} did not come back"))?;
            for (wrapped, plain) in [(&before, [1; 32]), (&after, [2; 32])] {
                let opened = link.unwrap(wrapped).await?;
                ensure!(matches!(&opened, Outcome::Plain(found) if *found == plain), "{opened:?}");
            }
            // And it goes on for ever.
            let next = node.renew(ports).await.with_context(|| format!("node-{n} cannot renew"))?;
            next.data(ports).await?.status().await?;
            back += 1;
            anyhow::Ok(())
        })?;
    }
    println!("{back} of {NODES} nodes came back by themselves; {} was banned", NODES - back);
    assert_eq!(back, NODES - 1);
    Ok(())
}

#[test]
fn of_what_several_audits_say_of_a_node_the_latest_counts_in_restore_confirm_too() -> anyhow::Result<()> {
    let mut fleet = Fleet::start()?;
    let cluster = fleet.cluster("alpha")?;
    let sidecar = fleet.sidecar(&cluster, "cp-1")?;
    fleet.agent.stop()?;
    let (store, old) = (fleet.agent.directory.join("store.db"), fleet.path().join("old.db"));
    fs::copy(&store, &old)?;
    fleet.agent.start()?;
    fleet.kmsctl(&["node", "ban", "--cluster", "alpha", "cp-1", "--yes"])?;
    fleet.kmsctl(&["node", "unban", "--cluster", "alpha", "cp-1", "--yes"])?;
    // Another agent's audit, which ends with the lifted ban.
    let other = fleet.path().join("other-audit");
    fs::create_dir(&other)?;
    for file in fs::read_dir(fleet.agent.directory.join("audit"))? {
        let file = file?;
        fs::copy(file.path(), other.join(file.file_name()))?;
    }
    fleet.kmsctl(&["node", "ban", "--cluster", "alpha", "cp-1", "--yes"])?;
    fleet.agent.stop()?;
    lose_the_store(&fleet)?;
    fs::copy(&old, &store)?;
    fleet.agent.start()?;
    let other = other.to_str().context("a path in UTF-8")?;
    let done = fleet.host(&["restore", "--confirm", "--bans-from", other])?;
    ensure!(done.contains("1 identities are banned"), "{done}");
    ensure!(encrypt(&sidecar).is_err(), "an older word lifted a newer ban");
    Ok(())
}
