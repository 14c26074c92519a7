//! Rollovers of the fleet CA under real programs: nobody notices a new issuing CA or a new root; after a compromise
//! every node is shut out at once, and one token each lets it in again.

use std::fs;
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context, ensure};
use fleet_kms_tests::child::run;
use fleet_kms_tests::fleet::{Fleet, Sidecar};
use fleet_kms_tests::kms_client::{Api, KmsClient};
use fleet_kms_tests::peers::ClientVersion;
use fleet_kms_tests::wait::{self, START_LIMIT};
use serde_json::Value;

fn client(sidecar: &Sidecar) -> anyhow::Result<KmsClient> {
    KmsClient::new(ClientVersion::V0_37_2, Api::V1, &sidecar.socket)
}

fn round_trips(sidecar: &Sidecar) -> anyhow::Result<()> {
    client(sidecar)?.call(&["round-trip"])?.ok().map(drop)
}

fn pinned_roots(sidecar: &Sidecar) -> anyhow::Result<usize> {
    let pem = fs::read_to_string(sidecar.identity.join("roots.pem"))?;
    Ok(pem.matches("BEGIN CERTIFICATE").count())
}

/// Kind, generation and state of each generation.
fn generations(fleet: &Fleet) -> anyhow::Result<Vec<String>> {
    let ca = fleet.kmsctl_json(&["ca", "show"])?;
    let generations = ca.get("generations").and_then(Value::as_array).context("generations")?;
    let text = |one: &Value| -> Option<String> {
        let part = |name| one.get(name).and_then(Value::as_str);
        let number = one.get("generation").and_then(Value::as_u64)?;
        Some(format!("{} {number} {}", part("kind")?, part("state")?))
    };
    generations.iter().map(|one| text(one).with_context(|| one.to_string())).collect()
}

#[test]
fn a_rollover_in_good_order_costs_a_running_node_no_call_and_an_old_token_still_works() -> anyhow::Result<()>
{
    let mut fleet = Fleet::start()?;
    let cluster = fleet.cluster("alpha")?;
    let mut node = fleet.sidecar(&cluster, "node")?;
    let old_token = fleet.token(&cluster, "late")?;
    let backup = fleet.path().join("before.db");
    fleet.host(&["backup", backup.to_str().context("a path in UTF-8")?])?;
    ensure!(generations(&fleet)? == ["root 1 active", "issuing 1 active"]);

    let logs = fleet.path().join("loop");
    let mut calls = client(&node)?.start(&["loop", "-duration", "8s"], &logs)?;
    calls.wait_for_line("started", START_LIMIT)?;
    let dry = fleet.kmsctl(&["ca", "rotate", "--root", "--dry-run"])?;
    ensure!(dry.contains("nothing was changed") && dry.contains("signed by the old one too"), "{dry}");
    ensure!(generations(&fleet)?.len() == 2);
    fleet.kmsctl(&["ca", "rotate"])?;
    fleet.kmsctl(&["ca", "rotate", "--root", "--reason", "drill"])?;
    let after =
        ["root 1 retiring", "root 2 active", "issuing 1 retiring", "issuing 2 retiring", "issuing 3 active"];
    ensure!(generations(&fleet)? == after, "{:?}", generations(&fleet)?);
    ensure!(fleet.agent.audit("changes")?.iter().any(|line| line["reason"] == "drill"));
    let table = fleet.kmsctl(&["ca", "show"])?;
    ensure!(table.contains("trusted until"), "{table}");

    // The node hears of the new root with its next report, and reconnects to an agent that has a new certificate.
    node.restart()?;
    wait::until("the new root to be pinned", START_LIMIT, || Ok((pinned_roots(&node)? == 2).then_some(())))?;
    let ended = calls.wait_exit(START_LIMIT)?;
    ensure!(ended.success(), "{}", calls.stdout()?);
    fleet.agent.restart_after(Duration::ZERO)?;
    round_trips(&node)?;

    // Who knows only the fingerprint of the old root comes in by it.
    let mut late = fleet.unenrolled_sidecar(&cluster, "late")?;
    late.enrol(&old_token)?;
    late.start()?;
    late.wait_ready()?;
    round_trips(&late)?;
    ensure!(pinned_roots(&late)? == 2);

    // A restore of a backup from before brings the old root back: nobody is touched by hand.
    fleet.agent.stop()?;
    for name in ["store.db", "store.db-wal", "store.db-shm"] {
        let file = fleet.agent.directory.join(name);
        if file.exists() {
            fs::remove_file(file)?;
        }
    }
    fleet.host(&["restore", backup.to_str().context("a path in UTF-8")?])?;
    fleet.agent.start()?;
    ensure!(generations(&fleet)? == ["root 1 active", "issuing 1 active"]);
    wait::until("the node to come back", START_LIMIT, || Ok(round_trips(&node).ok()))
}

#[test]
fn after_a_compromise_every_node_is_shut_out_and_listed_and_the_operator_goes_on() -> anyhow::Result<()> {
    let fleet = Fleet::start()?;
    let cluster = fleet.cluster("alpha")?;
    let (one, two) = (fleet.sidecar(&cluster, "one")?, fleet.sidecar(&cluster, "two")?);
    let wrapped = client(&one)?.call(&["encrypt"])?.last()?.to_string();
    let other = fleet.path().join("other");
    let directory = other.to_str().context("a path in UTF-8")?;
    fleet.host(&["admin", "issue", "other", "--role", "operator", "--directory", directory])?;
    let void_token = fleet.token(&cluster, "two")?;

    let unasked = fleet.kmsctl_output(&["ca", "rotate", "--compromised"])?;
    ensure!(unasked.status.code() == Some(2), "{unasked:?}");
    let said = fleet.kmsctl(&["ca", "rotate", "--compromised", "--yes", "--reason", "the key leaked"])?;
    for node in ["one", "two"] {
        ensure!(said.contains(&format!(
            "needs a join token: spiffe://fleet.test/cluster/{}/node/{node}",
            cluster.id
        )));
    }
    // By the same context: kmsctl has put the new roots and the new certificate into its files.
    ensure!(generations(&fleet)? == ["root 2 active", "issuing 2 active"], "{:?}", generations(&fleet)?);
    fleet.agent.ops("/readyz")?.ok()?;
    let mut by_another = fleet.kmsctl_command(&["status"])?;
    by_another.env("KMSCTL_CONFIG", other.join("kmsctl.toml"));
    ensure!(run(by_another.stdin(Stdio::null())).is_err(), "another admin's certificate is of the old CA");

    // The open connections are closed, so that it is at once.
    for node in [&one, &two] {
        client(node)?.call(&["decrypt", "-answer", &wrapped])?.refused()?;
    }
    let refused = two.enrol_output(&void_token)?;
    let text = String::from_utf8_lossy(&refused.stderr).into_owned();
    ensure!(text.contains("does not show the root certificate that the join token names"), "{text}");

    one.enrol(&fleet.token(&cluster, "one")?)?;
    wait::until("the enrolled node to serve", START_LIMIT, || {
        Ok(client(&one)?.call(&["decrypt", "-answer", &wrapped])?.ok().ok())
    })?;
    ensure!(pinned_roots(&one)? == 1);
    let ca = fleet.kmsctl_json(&["ca", "show"])?;
    let left = ca.get("nodes_to_enrol").and_then(Value::as_array).context("the nodes")?;
    ensure!(left.len() == 1 && left[0].as_str().is_some_and(|id| id.ends_with("/node/two")), "{ca}");
    client(&two)?.call(&["decrypt", "-answer", &wrapped])?.refused().map(drop)
}
