//! A store that somebody has edited behind the agent's back.
#![allow(clippy::unwrap_used, reason = "tests: what is not there fails them")]

use std::fs;
use std::path::PathBuf;

use fleet_kms_tests::fleet::{Agent, Cluster, Fleet, Sidecar, until_true};
use fleet_kms_tests::kms_client::{Api, KmsClient};
use fleet_kms_tests::peers::ClientVersion;
use fleet_kms_tests::programs::Program;
use fleet_kms_tests::refusal::{Refusal, refusal};
use fleet_kms_tests::wait::START_LIMIT;
use rusqlite::{Connection, params};

const DATA: i32 = 65;
/// What kmsctl ends with when the agent cannot do it now.
const UNAVAILABLE: i32 = 5;

/// A fleet whose agent is stopped, and its store as it was.
struct Stopped {
    fleet: Fleet,
    store: PathBuf,
    kept: Vec<u8>,
}

impl Stopped {
    fn new(mut fleet: Fleet) -> Self {
        fleet.agent.stop().unwrap();
        let store = fleet.agent.directory.join("store.db");
        let kept = fs::read(&store).unwrap();
        Self { fleet, store, kept }
    }

    /// Puts the store back and flips a bit in the middle of the first row whose name begins so; returns its name.
    fn flip(&self, prefix: &str) -> String {
        fs::write(&self.store, &self.kept).unwrap();
        let store = Connection::open(&self.store).unwrap();
        let (name, mut bytes): (String, Vec<u8>) = store
            .query_row(
                "SELECT name, bytes FROM rows WHERE substr(name, 1, length(?1)) = ?1 ORDER BY name",
                params![prefix],
                |row| Ok((row.get(0)?, row.get(1)?)),
            )
            .unwrap();
        let middle = bytes.len() / 2;
        *bytes.get_mut(middle).unwrap() ^= 0x40;
        store.execute("UPDATE rows SET bytes = ?2 WHERE name = ?1", params![name, bytes]).unwrap();
        name
    }

    fn refused(&self, command: &str) -> Refusal {
        refusal(Program::Agent, [command, "--config", self.agent().config.to_str().unwrap()], &[]).unwrap()
    }

    fn agent(&self) -> &Agent {
        &self.fleet.agent
    }
}

fn node(fleet: &Fleet, name: &str) -> (Cluster, Sidecar, KmsClient) {
    let cluster = fleet.cluster(name).unwrap();
    let sidecar = fleet.sidecar(&cluster, "node-1").unwrap();
    let client = KmsClient::new(ClientVersion::V0_37_2, Api::V1, &sidecar.socket).unwrap();
    (cluster, sidecar, client)
}

#[test]
fn a_row_that_the_agent_cannot_do_without_is_named_and_nothing_starts() {
    let fleet = Fleet::start().unwrap();
    let _node = node(&fleet, "edited");
    let stopped = Stopped::new(fleet);
    let row = stopped.flip("ca/issuing/");
    let named = format!("in row {row} fails authentication: it was edited");
    stopped.refused("run").must_be(DATA, &[&named, "restore a backup"]);
    stopped.refused("check-store").must_be(DATA, &[&format!("; altered: {row}; restore a backup")]);
    let row = stopped.flip("ca-key/issuing/");
    let named = format!("the issuing CA's private key in row {row} does not open; restore a backup");
    stopped.refused("run").must_be(DATA, &[&named]);
    stopped.refused("check-store").must_be(DATA, &[&format!("; altered: {row}; restore a backup")]);

    for (prefix, what) in [
        (
            "head",
            "the store's head does not open: it was edited or comes from another store; restore a backup",
        ),
        (
            "slot/",
            "does not open the store; use a root key or passphrase of one of its slots; if it is one, the store was altered",
        ),
        (
            "meta",
            "does not open the store; use a root key or passphrase of one of its slots; if it is one, the store was altered",
        ),
    ] {
        stopped.flip(prefix);
        stopped.refused("run").must_be(DATA, &[what]);
        stopped.refused("check-store").must_be(DATA, &[what]);
    }

    fs::write(&stopped.store, &stopped.kept).unwrap();
    Connection::open(&stopped.store)
        .unwrap()
        .execute("DELETE FROM rows WHERE name LIKE 'token/%'", [])
        .unwrap();
    let deleted = "each row that is left is authentic, so rows were deleted or replayed; restore a backup";
    stopped.refused("check-store").must_be(DATA, &[deleted]);
}

/// What a damaged row costs: the node's reading of a refusal, and a metric.
struct Cost {
    row: String,
    code: &'static str,
    logged: &'static str,
    metric: &'static str,
}

#[test]
fn a_row_of_one_cluster_that_was_altered_costs_this_cluster_only_and_changes_are_refused() {
    let fleet = Fleet::start().unwrap();
    let (_, _sidecar, whole) = node(&fleet, "whole");
    let (damaged, _other, damaged_client) = node(&fleet, "damaged");
    let mut stopped = Stopped::new(fleet);
    let id = &damaged.id;
    let left_out = "a record was edited or damaged: it is left out";
    let costs = [
        Cost {
            row: format!("kek/{id}/0000000001"),
            code: "FailedPrecondition",
            logged: "a stored key does not open",
            metric: "damaged_keys",
        },
        Cost {
            row: format!("keyring/{id}"),
            code: "FailedPrecondition",
            logged: left_out,
            metric: "damaged_records",
        },
        Cost {
            row: format!("identity/node/{id}/node-1"),
            code: "PermissionDenied",
            logged: left_out,
            metric: "damaged_records",
        },
    ];
    for Cost { row, code, logged, metric } in costs {
        stopped.flip(&row);
        stopped.refused("check-store").must_be(DATA, &[&format!("; altered: {row}; restore a backup")]);
        stopped.fleet.agent.start().unwrap();
        let log = stopped.agent().log().unwrap();
        let edited = "rows of the store were edited, replayed or deleted behind the agent's back";
        assert!(log.contains(edited) && log.contains(logged) && log.contains(&row), "{row}: {log}");
        until_true("the whole cluster's link", START_LIMIT, || {
            Ok(whole.call(&["round-trip", "-sizes", "32"])?.ok().is_ok())
        })
        .unwrap();
        let refused = damaged_client.call(&["encrypt"]).unwrap().refused().unwrap();
        assert_eq!(refused.code, code, "{row}: {}", refused.error);
        assert!(refused.error.contains("see kms-sidecar's log"), "{row}: {}", refused.error);
        let metrics = stopped.agent().ops("/metrics").unwrap().ok().unwrap();
        assert!(metrics.contains(&format!("\nfleet_kms_agent_{metric} 1\n")), "{row}: {metrics}");
        assert!(metrics.contains("\nfleet_kms_agent_store_unconfirmed 1\n"), "{metrics}");

        let change = stopped.fleet.kmsctl_output(&["cluster", "create", "another"]).unwrap();
        let text = String::from_utf8_lossy(&change.stderr).into_owned();
        assert_eq!(change.status.code(), Some(UNAVAILABLE), "{text}");
        assert!(text.contains("(recovered_unconfirmed)") && text.contains("remedy: "), "{text}");
        assert!(stopped.fleet.kmsctl(&["status"]).unwrap().contains("store_damaged"), "{row}");
        if metric == "damaged_records" {
            let refused = stopped.fleet.host(&["restore", "--confirm"]).unwrap_err().to_string();
            assert!(refused.contains(&format!("row {row} is damaged")), "{refused}");
        }
        stopped.fleet.agent.stop().unwrap();
    }
}
