//! Stores of every format that was ever released are opened by this release: the golden databases.
#![allow(clippy::unwrap_used, reason = "a test")]

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use fleet_kms_agent::records::format_of;
use fleet_kms_agent::storage::FORMAT;
use fleet_kms_store::{RowName, SqliteStore, Store as _};
use fleet_kms_tests::child::{Spec, run};
use fleet_kms_tests::crash::shim::{DiskError, Fault, Shim, Where};
use fleet_kms_tests::fleet::{Cluster, Fleet, Sidecar};
use fleet_kms_tests::golden::{self, Golden, PASSPHRASE, Recorded};
use fleet_kms_tests::kms_client::{Api, KmsClient};
use fleet_kms_tests::peers::ClientVersion;
use fleet_kms_tests::programs::Program;
use fleet_kms_tests::refusal::{Refusal, refusal};
use fleet_kms_tests::wait::{self, START_LIMIT};
use serde_json::Value;

const FORMATS: [u8; 2] = [1, 2];
const AS_LEFT: &str = "each as the last transaction left it";
/// The exit status for data that cannot be used.
const DATA: i32 = 65;
const FAILURE: i32 = 1;
/// How many places of a migration are tried as the last one.
const TRIALS: &str = "FLEET_KMS_MIGRATION_TRIALS";
const FEW: u64 = 12;

/// A fleet whose agent has a golden store and does not run.
fn fleet_over(golden: &Golden) -> Fleet {
    let mut fleet = Fleet::start().unwrap();
    fleet.agent.stop().unwrap();
    golden.put_in_place(&fleet.agent.directory).unwrap();
    fleet
}

/// Starts the agent and makes an admin of its store.
fn start(fleet: &mut Fleet) {
    fleet.agent.start().unwrap();
    let admin = fleet.agent.directory.join("admin");
    fs::remove_dir_all(&admin).unwrap();
    let directory = admin.to_str().unwrap();
    let roles = ["--role", "operator", "--role", "key-officer"];
    fleet.host(&[&["admin", "issue", "again", "--directory", directory], &roles[..]].concat()).unwrap();
}

fn decrypts(sidecar: &Sidecar, recorded: &Recorded) -> Result<(), String> {
    let client = KmsClient::new(ClientVersion::V0_37_2, Api::V1, &sidecar.socket).unwrap();
    let outcome = client.call(&["decrypt", "-answer", &recorded.answer]).unwrap();
    outcome.ok().map(drop).map_err(|error| format!("{error:#}"))
}

fn of<'a>(golden: &'a Golden, cluster: &Cluster) -> impl Iterator<Item = &'a Recorded> {
    let name = cluster.name.clone();
    golden.wrapped.iter().filter(move |recorded| recorded.cluster == name)
}

fn change(fleet: &Fleet, verb: &str, recorded: &Recorded) -> Result<String, (i32, String)> {
    let version = recorded.version.to_string();
    let output = fleet.kmsctl_output(&["key", verb, &recorded.cluster, &version, "--yes"]).unwrap();
    match output.status.code() {
        Some(0) => Ok(String::from_utf8(output.stdout).unwrap()),
        code => Err((code.unwrap(), String::from_utf8(output.stderr).unwrap())),
    }
}

/// All that was wrapped opens, or is refused for the reason that its version's state gives; then the refused ones are
/// brought back as far as that state allows.
fn everything_recorded_opens(fleet: &Fleet, golden: &Golden) {
    for cluster in &golden.clusters {
        let sidecar = fleet.sidecar(cluster, "reader").unwrap();
        for recorded in of(golden, cluster) {
            let refused = decrypts(&sidecar, recorded);
            let context = format!("{recorded:?}: {refused:?}");
            match recorded.state.as_str() {
                "active" | "decrypt_only" => assert!(refused.is_ok(), "{context}"),
                "destroyed" => {
                    assert!(refused.unwrap_err().contains("is destroyed"), "{context}");
                    let (code, text) = change(fleet, "enable", recorded).unwrap_err();
                    assert!(code == 4 && text.contains("its key is gone for good"), "{code}: {text}");
                    change(fleet, "cancel-destroy", recorded).unwrap_err();
                }
                state => {
                    assert!(refused.unwrap_err().contains("is disabled"), "{context}");
                    if state == "destroy_scheduled" {
                        let (code, text) = change(fleet, "enable", recorded).unwrap_err();
                        assert!(code == 4 && text.contains("cancel its destruction first"), "{code}: {text}");
                        change(fleet, "cancel-destroy", recorded).unwrap();
                        let state = golden::state_of(fleet, cluster, recorded.version).unwrap();
                        assert_eq!(state, "disabled");
                    }
                    change(fleet, "enable", recorded).unwrap();
                    decrypts(&sidecar, recorded).unwrap();
                }
            }
        }
    }
}

#[test]
fn every_golden_database_opens_and_gives_what_was_wrapped_under_it() {
    for format in FORMATS {
        let golden = Golden::of_format(format).unwrap();
        let mut fleet = fleet_over(&golden);
        start(&mut fleet);
        everything_recorded_opens(&fleet, &golden);
        let days = if format == 1 { "180d" } else { "400d" };
        assert_eq!(fleet.kmsctl_json(&["cluster", "show", "beta"]).unwrap()["max_offline"], days);
        let nodes = fleet.kmsctl_json(&["node", "list", "--cluster", "beta"]).unwrap();
        let banned = nodes.as_array().unwrap().iter().find(|node| node["name"] == "banned").unwrap().clone();
        assert_eq!(banned["state"], "banned");
        let tokens = fleet.kmsctl_json(&["node", "tokens", "--cluster", "alpha"]).unwrap();
        assert!(tokens.is_array(), "{tokens}");
        golden::with_passphrase(&fleet, PASSPHRASE, &["slot", "test", "--passphrase-fd", "3"]).unwrap();
        fleet.agent.stop().unwrap();
        let checked = fleet.host(&["check-store"]).unwrap();
        assert!(checked.contains(AS_LEFT) && !checked.contains("migrat"), "{checked}");
    }
}

#[test]
fn the_golden_database_with_destroyed_versions_has_them() {
    let golden = Golden::of_format(2).unwrap();
    let states: Vec<&str> = golden.wrapped.iter().map(|recorded| recorded.state.as_str()).collect();
    for state in ["active", "decrypt_only", "disabled", "destroy_scheduled", "destroyed"] {
        assert!(states.contains(&state), "{states:?}");
    }
}

#[test]
fn an_older_store_is_backed_up_then_migrated_and_tools_that_read_only_say_so() {
    let golden = Golden::of_format(1).unwrap();
    let mut fleet = fleet_over(&golden);
    let store = fleet.agent.directory.join("store.db");
    let will = "the store has format 1: kms-agent run first backs it up beside itself";
    let store_text = store.to_str().unwrap();
    for args in [&["check-config"][..], &["check-store"], &["backup", "verify", store_text]] {
        let said = fleet.host(args).unwrap();
        assert!(said.contains(will), "{args:?}: {said}");
    }
    assert_eq!(format_in(&store, "meta"), Some(1), "nothing was migrated");

    start(&mut fleet);
    let backup = fleet.agent.directory.join("store.db.format-1");
    assert_eq!(fs::metadata(&backup).unwrap().permissions().mode() & 0o777, 0o600);
    let verified = fleet.host(&["backup", "verify", backup.to_str().unwrap()]).unwrap();
    assert!(verified.contains("each opened") && verified.contains(will), "{verified}");
    assert!(is_migrated(&store, &golden));
    let log = fleet.agent.log().unwrap();
    assert!(
        log.contains("backing it up, then migrating it") && log.contains("the store is migrated"),
        "{log}"
    );
    let audit = fleet.agent.audit("changes").unwrap();
    for action in ["store_migrate", "store_migrate_rows", "store_migrated"] {
        assert_eq!(audit.iter().filter(|line| line["action"] == action).count(), 1, "{action}");
    }
    let begun = audit.iter().find(|line| line["action"] == "store_migrate").unwrap();
    assert_eq!((&begun["details"]["from"], &begun["details"]["to"]), (&Value::from("1"), &Value::from("2")));
    fleet.agent.stop().unwrap();
    assert!(!fleet.host(&["check-config"]).unwrap().contains("format"));
    // A second start migrates nothing.
    fs::remove_file(&backup).unwrap();
    fleet.agent.start().unwrap();
    assert!(!backup.exists());
}

#[test]
fn a_restored_backup_of_an_older_format_is_migrated_at_the_next_start() {
    let golden = Golden::of_format(1).unwrap();
    let mut fleet = fleet_over(&golden);
    let done = fleet.host(&["restore", golden.store().to_str().unwrap(), "--without-bans"]).unwrap();
    assert!(done.contains("rotated fresh   2 clusters"), "{done}");
    assert_eq!(format_in(&fleet.agent.directory.join("store.db"), "meta"), Some(1));
    start(&mut fleet);
    assert_eq!(format_in(&fleet.agent.directory.join("store.db"), "meta"), Some(FORMAT));
    everything_recorded_opens(&fleet, &golden);
}

#[test]
fn an_old_copy_of_an_older_format_serves_unchanged_until_it_is_confirmed() {
    let golden = Golden::of_format(1).unwrap();
    let mut fleet = fleet_over(&golden);
    fleet.agent.start().unwrap();
    fleet.agent.stop().unwrap();
    let store = fleet.agent.directory.join("store.db");
    fs::copy(golden.store(), &store).unwrap();
    fleet.agent.start().unwrap();
    let metrics = fleet.agent.ops("/metrics").unwrap().body;
    assert!(metrics.lines().any(|line| line == "fleet_kms_agent_store_unconfirmed 1"), "{metrics}");
    assert_eq!(format_in(&store, "meta"), Some(1), "nobody has said that these rows are right");
    fleet.host(&["restore", "--confirm"]).unwrap();
    assert!(is_migrated_but_for_keys(&store, &golden));
    fleet.agent.stop().unwrap();
    start(&mut fleet);
    everything_recorded_opens(&fleet, &golden);
}

#[test]
fn a_store_of_a_later_release_is_refused_with_what_to_do() {
    let golden = Golden::of_format(2).unwrap();
    let fleet = fleet_over(&golden);
    let store = fleet.agent.directory.join("store.db");
    let edit = |sql: &str| rusqlite::Connection::open(&store).unwrap().execute_batch(sql).unwrap();
    edit("UPDATE rows SET bytes = CAST(x'03' || substr(bytes, 2) AS BLOB) WHERE name = 'meta'");
    let config = fleet.agent.config.to_str().unwrap();
    let remedy =
        "has format 3, this release knows up to 2; run the release that wrote it, or restore a backup";
    for command in ["run", "check-store"] {
        refusal(Program::Agent, [command, "--config", config], &[]).unwrap().must_be(DATA, &[remedy]);
    }
    let said = fleet.host(&["check-config"]).unwrap();
    assert!(said.contains("kms-agent run will not start") && said.contains(remedy), "{said}");
    // One record of a later release in a store that is not.
    golden.put_in_place(&fleet.agent.directory).unwrap();
    edit("UPDATE rows SET bytes = CAST(x'03' || substr(bytes, 2) AS BLOB) WHERE name LIKE 'cluster/%'");
    let remedy = "has format 3, this release knows up to 2; run the release that wrote it";
    refusal(Program::Agent, ["run", "--config", config], &[]).unwrap().must_be(DATA, &["a cluster", remedy]);
}

#[test]
fn nothing_is_migrated_without_room_for_the_backup() {
    let golden = Golden::of_format(1).unwrap();
    let mut fleet = fleet_over(&golden);
    let store = fleet.agent.directory.join("store.db");
    let shim = shim(&fleet, "full", Fault::None);
    shim.fail_now(DiskError::Full, Where::Files(".format-1")).unwrap();
    let refused = ended(&shim, &fleet);
    refused.must_be(FAILURE, &["no backup of it could be made first: remove the cause, or start the older"]);
    assert_eq!(format_in(&store, "meta"), Some(1));
    assert!(!store.with_extension("db.format-1").exists());

    if run(Command::new("unshare").args(["-rm", "true"])).is_ok() {
        let small =
            "mount -t tmpfs -o size=120k tmpfs \"$0\" && cp -a \"$1\"/. \"$0\" && shift && exec \"$@\"";
        let (agent, kept) = (fleet.agent.directory.clone(), fleet.path().join("kept"));
        run(Command::new("cp").arg("-a").arg(&agent).arg(&kept)).unwrap();
        for file in ["kms-agent.stderr", "kms-agent.stdout"] {
            fs::remove_file(kept.join(file)).unwrap();
        }
        let spec = Spec::new("small", Path::new("unshare"), fleet.path())
            .args(["-rm", "sh", "-c", small])
            .args([&agent, &kept, &Program::Agent.path().unwrap()])
            .args(["run", "--config"])
            .arg(&fleet.agent.config);
        let mut child = spec.start().unwrap();
        let status = child.wait_exit(START_LIMIT).unwrap().code().unwrap();
        let text = child.stderr().unwrap();
        Refusal { status, text }.must_be(FAILURE, &["which takes", "are free: free some space there"]);
    } else {
        eprintln!("left out: this machine forbids user namespaces");
    }
    start(&mut fleet);
    everything_recorded_opens(&fleet, &golden);
}

#[test]
fn a_migration_that_is_cut_off_anywhere_goes_on_at_the_next_start() {
    let golden = Golden::of_format(1).unwrap();
    let mut fleet = fleet_over(&golden);
    let store = fleet.agent.directory.join("store.db");
    let counting = shim(&fleet, "count", Fault::None);
    let child = counting.preload(spec(&fleet, "count")).start().unwrap();
    let log = fleet.path().join("count.stderr");
    let served = || Ok(fs::read_to_string(&log)?.contains("serving").then_some(()));
    wait::until("the end of the migration", START_LIMIT, served).unwrap();
    let operations = counting.operations().unwrap();
    child.kill9().unwrap();
    assert!(is_migrated(&store, &golden));

    let trials = std::env::var(TRIALS).map_or(FEW, |text| text.parse().unwrap()).min(operations);
    let (mut begun, mut died) = (0, 0);
    for trial in 0..trials {
        let at = 1 + trial * operations / trials;
        let fault = if trial % 2 == 0 { Fault::KillAt(at) } else { Fault::PowerCut { at, seed: trial } };
        golden.put_in_place(&fleet.agent.directory).unwrap();
        let shim = shim(&fleet, &format!("trial-{trial}"), fault);
        let mut child = shim.preload(spec(&fleet, &format!("trial-{trial}"))).start().unwrap();
        child.wait_exit(START_LIMIT).unwrap();
        let fired = shim.fired().unwrap();
        died += u64::from(fired.is_some());
        let half_way = format_in(&store, "meta") == Some(FORMAT) && !is_migrated(&store, &golden);
        begun += u64::from(half_way);
        fleet.agent.start().unwrap();
        let metrics = fleet.agent.ops("/metrics").unwrap().body;
        for well in ["fleet_kms_agent_store_unconfirmed 0", "fleet_kms_agent_damaged_keys 0"] {
            assert!(metrics.lines().any(|line| line == well), "{fault:?} {fired:?}: {metrics}");
        }
        fleet.agent.stop().unwrap();
        assert!(is_migrated(&store, &golden), "{fault:?} {fired:?}");
        let checked = fleet.host(&["check-store"]).unwrap();
        assert!(checked.contains(AS_LEFT) && !checked.contains("migrat"), "{fault:?}: {checked}");
    }
    println!("{operations} operations of the disk, {trials} trials, {died} died, {begun} in the middle");
    assert!(died == trials && begun > 0, "{died} of {trials} died, {begun} in the middle");
    start(&mut fleet);
    everything_recorded_opens(&fleet, &golden);
}

fn shim(fleet: &Fleet, name: &str, fault: Fault) -> Shim {
    Shim::new(&fleet.agent.directory, &fleet.path().join(format!("{name}.control")), fault).unwrap()
}

fn spec(fleet: &Fleet, name: &str) -> Spec {
    let program = Program::Agent.path().unwrap();
    Spec::new(name, &program, fleet.path()).args(["run", "--config"]).arg(&fleet.agent.config)
}

/// Starts the agent over a shim under which it must end by itself.
fn ended(shim: &Shim, fleet: &Fleet) -> Refusal {
    let mut child = shim.preload(spec(fleet, "ended")).start().unwrap();
    let status = child.wait_exit(START_LIMIT).unwrap().code().unwrap();
    Refusal { status, text: child.stderr().unwrap() }
}

/// Rows of a store that may be in use, without a key.
fn rows(store: &Path, prefix: &str) -> Vec<(RowName, Vec<u8>)> {
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    let store = SqliteStore::open_read_only(store).unwrap();
    let rows = runtime.block_on(store.page_rows(prefix, None, 100)).unwrap();
    rows.into_iter().map(|row| (row.name, row.bytes)).collect()
}

fn format_in(store: &Path, row: &str) -> Option<u8> {
    rows(store, row).first().and_then(|(_, bytes)| format_of(bytes))
}

/// Whether every record is of this release's format; no KEK may have been touched.
fn is_migrated(store: &Path, golden: &Golden) -> bool {
    assert_eq!(rows(store, "kek/").len(), rows(&golden.store(), "kek/").len());
    is_migrated_but_for_keys(store, golden)
}

/// As [`is_migrated`], where keys were added meanwhile.
fn is_migrated_but_for_keys(store: &Path, golden: &Golden) -> bool {
    assert!(rows(&golden.store(), "kek/").iter().all(|kek| rows(store, "kek/").contains(kek)));
    let clusters = rows(store, "cluster/");
    assert_eq!(clusters.len(), golden.clusters.len());
    format_in(store, "meta") == Some(FORMAT)
        && clusters.iter().all(|(_, bytes)| format_of(bytes) == Some(2))
        && rows(store, "migration").is_empty()
}

/// Not a test: makes a golden database with the programs that are built, once for each format.
#[test]
#[ignore = "makes test data: FLEET_KMS_GOLDEN names the new directory"]
fn make_a_golden_database() {
    let to = PathBuf::from(std::env::var_os("FLEET_KMS_GOLDEN").unwrap());
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    golden::make(&to, |fleet, alpha| runtime.block_on(golden::destroy_some(fleet, &alpha.id))).unwrap();
}
