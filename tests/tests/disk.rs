//! What an agent does on a bad disk, and what its operator reads: the facts of docs/operations/disk.md.
#![allow(clippy::unwrap_used, clippy::indexing_slicing, clippy::panic, reason = "a test")]

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use fleet_kms_tests::child::{Spec, run};
use fleet_kms_tests::crash::shim::{DiskError, Where};
use fleet_kms_tests::crash::stage::{Stage, Started};
use fleet_kms_tests::crash::template::Scene;
use fleet_kms_tests::programs::Program;
use fleet_kms_tests::wait;

const WELL: Started = Started::Serves { unconfirmed: false, damaged: 0, unreadable: 0 };
const UNCONFIRMED: Started = Started::Serves { unconfirmed: true, damaged: 0, unreadable: 0 };
/// The exit status for data that cannot be used.
const DATA: Option<i32> = Some(65);
const FAILURE: Option<i32> = Some(1);
/// DEKs that nodes of a stage hold already.
const OLD_DEKS: usize = 16;

#[tokio::test]
async fn a_running_agent_serves_on_and_refuses_changes_until_the_disk_takes_them() {
    let mut stage = Stage::new().await.unwrap();
    for (error, place) in [
        (DiskError::Full, Where::Everywhere),
        (DiskError::ReadOnly, Where::Everywhere),
        (DiskError::Io, Where::Everywhere),
        (DiskError::Io, Where::Syncs),
        (DiskError::Full, Where::Files("/audit/")),
    ] {
        stage.reset().unwrap();
        assert_eq!(stage.start().await.unwrap(), WELL);
        stage.disk.fail_now(error, place).unwrap();
        assert_eq!(stage.unreadable().await.unwrap(), 0, "{error:?} {place:?}");
        let refusal = stage.refusal().await.unwrap();
        assert!(refusal.contains("cannot be recorded in the audit, so it was refused"), "{refusal}");
        assert!(
            stage.metrics().unwrap().contains("\nfleet_kms_agent_audit_refused_changes_total 1\n"),
            "{place:?}"
        );
        stage.refusal().await.unwrap();
        assert_eq!(stage.unreadable().await.unwrap(), 0, "{error:?} {place:?}");
        stage.disk.heal().unwrap();
        stage.enrol().await.unwrap();
        let log = stage.log().unwrap();
        for line in ["the audit takes no record: changes are refused", "the audit takes records again"] {
            assert_eq!(log.matches(line).count(), 1, "{line:?}, once for two refusals: {log}");
        }
        stage.stop().await.unwrap();
        assert_eq!(stage.violations().await.unwrap(), [""; 0], "{error:?} {place:?}");
    }
}

#[tokio::test]
async fn a_store_that_is_full_takes_nothing_and_no_start_is_needed_once_there_is_room() {
    let mut stage = Stage::new().await.unwrap();
    stage.start().await.unwrap();
    stage.disk.fail_now(DiskError::Full, Where::Files("/store.db")).unwrap();
    let refusal = stage.refusal().await.unwrap();
    assert!(refusal.contains("the store did not take the change; nothing was written"), "{refusal}");
    assert_eq!(stage.unreadable().await.unwrap(), 0);
    stage.disk.heal().unwrap();
    stage.enrol().await.unwrap();
    stage.stop().await.unwrap();
    assert_eq!(stage.violations().await.unwrap(), [""; 0]);
}

#[tokio::test]
async fn a_change_that_the_store_could_not_sync_is_unknown_until_it_can_be_looked_up() {
    let mut stage = Stage::new().await.unwrap();
    for restart in [false, true] {
        stage.reset().unwrap();
        assert_eq!(stage.start().await.unwrap(), WELL);
        stage.disk.fail_now(DiskError::Io, Where::SyncsOf("/store.db")).unwrap();
        let refusal = stage.refusal().await.unwrap();
        assert!(refusal.contains("whether the change happened shows at the next start"), "{refusal}");
        let refusal = stage.refusal().await.unwrap();
        assert!(
            refusal.contains("the store cannot be read"),
            "nothing is built on what may come back: {refusal}"
        );
        assert_eq!(stage.unreadable().await.unwrap(), 0);
        stage.disk.heal().unwrap();
        if !restart {
            stage.enrol().await.unwrap();
        }
        stage.kill().unwrap();
        assert_eq!(stage.start().await.unwrap(), WELL);
        stage.enrol().await.unwrap();
        stage.stop().await.unwrap();
        assert_eq!(stage.violations().await.unwrap(), [""; 0], "restart: {restart}");
    }
}

#[tokio::test]
async fn a_start_needs_no_room_but_a_disk_that_works() {
    let mut stage = Stage::new().await.unwrap();
    stage.disk.fail_now(DiskError::Full, Where::Everywhere).unwrap();
    assert_eq!(stage.start().await.unwrap(), WELL);
    let refusal = stage.refusal().await.unwrap();
    assert!(refusal.contains("cannot be recorded in the audit"), "{refusal}");
    stage.disk.heal().unwrap();
    stage.enrol().await.unwrap();
    for (error, place, status, said) in [
        (DiskError::ReadOnly, Where::Everywhere, DATA, "cannot be used: Read-only file system"),
        (DiskError::Io, Where::Files("/store.db"), DATA, "cannot be used: Input/output error"),
        // The audit is no data that could be damaged by this: docs/operations/exit-statuses.md.
        (DiskError::Io, Where::Files("/audit/"), FAILURE, "the audit cannot be written: Input/output error"),
    ] {
        stage.reset().unwrap();
        stage.disk.fail_now(error, place).unwrap();
        match stage.start().await.unwrap() {
            Started::Ended { code, text } if code == status && text.contains(said) => {}
            other => panic!("{error:?} {place:?}: {other:?}"),
        }
        stage.disk.heal().unwrap();
        assert_eq!(stage.start().await.unwrap(), WELL, "nothing is left to repair");
    }
}

#[tokio::test]
async fn a_log_that_was_cut_short_never_loses_a_change_in_silence() {
    let mut stage = Stage::new().await.unwrap();
    stage.start().await.unwrap();
    stage.enrol().await.unwrap();
    stage.kill().unwrap();
    let (agent, kept) = (stage.path(""), stage.path("").with_file_name("kept"));
    fs::rename(&agent, &kept).unwrap();
    let whole = fs::read(kept.join("store.db-wal")).unwrap();
    for length in [0, 1, 32, 4152, whole.len() / 2, whole.len() - 4096, whole.len() - 1] {
        put_back(&kept, &agent);
        fs::write(stage.path("store.db-wal"), &whole[..length]).unwrap();
        assert_eq!(stage.start().await.unwrap(), UNCONFIRMED, "{length} of {}", whole.len());
        let refusal = stage.refusal().await.unwrap();
        assert!(refusal.contains("the store is older than its witness"), "{length}: {refusal}");
        stage.kill().unwrap();
    }
    put_back(&kept, &agent);
    assert_eq!(stage.start().await.unwrap(), WELL);
}

fn put_back(kept: &Path, agent: &Path) {
    let _ = fs::remove_dir_all(agent);
    run(Command::new("cp").arg("-a").arg(kept).arg(agent)).unwrap();
}

/// What an agent does with one flipped byte in a row.
#[derive(Debug, Clone, Copy)]
enum Then {
    /// It does not start: status 65, and these words.
    Ends(&'static str),
    /// It serves all, and refuses changes.
    Unconfirmed,
    /// It names the row and serves all, without what the record says, and refuses changes.
    LeftOut,
    /// It names the row and serves all but this node, whose record it is, or this node's cluster, and refuses changes.
    LeftOutAndMissed,
    /// It names the row and serves all but what this key wrapped, and refuses changes.
    Damaged,
}

/// Every kind of row in docs/store-format.md that a store has in peace.
const ROWS: [(&str, Then); 19] = [
    ("meta", Then::Ends("does not open the store")),
    ("slot/", Then::Ends("does not open the store")),
    ("head", Then::Ends("the store's head does not open")),
    ("cluster/", Then::LeftOut),
    ("cluster-name/", Then::Unconfirmed),
    ("keyring/", Then::LeftOutAndMissed),
    ("wraps/", Then::Unconfirmed),
    ("kek/", Then::Damaged),
    ("identity/admin/", Then::LeftOut),
    ("identity/node/", Then::LeftOutAndMissed),
    ("token/", Then::Unconfirmed),
    ("issued", Then::Unconfirmed),
    ("ca/root/", Then::Ends("fails authentication")),
    ("ca/issuing/", Then::Ends("fails authentication")),
    ("ca-key/root/", Then::Unconfirmed),
    (
        "ca-key/issuing/",
        Then::Ends("the issuing CA's private key in row ca-key/issuing/0000000001 does not open"),
    ),
    ("change/", Then::Unconfirmed),
    ("slot-note/", Then::LeftOut),
    ("backup", Then::LeftOut),
];

#[tokio::test]
async fn one_flipped_byte_in_any_kind_of_row_is_noticed_at_start() {
    let mut stage = Stage::new().await.unwrap();
    let kept = lived_in(&mut stage).await;
    let agent = stage.path("");
    for (prefix, then) in ROWS {
        for place in [0, 4, 8] {
            put_back(&kept, &agent);
            let row = stage.flip(prefix, place).await.unwrap();
            let started = stage.start().await.unwrap();
            let context = format!("{}, place {place}: {started:?}", row.as_str());
            judge(then, place, &started, &context);
            let is_named = stage.log().unwrap().contains(row.as_str());
            let must_be_named = matches!(then, Then::LeftOut | Then::LeftOutAndMissed | Then::Damaged);
            assert!(is_named || !must_be_named, "{context}: {}", stage.log().unwrap());
            if matches!(started, Started::Serves { .. }) {
                stage.kill().unwrap();
            }
        }
        // The byte is put right: all is as if nothing had been.
        stage.flip(prefix, 8).await.unwrap();
        assert_eq!(stage.start().await.unwrap(), WELL, "{prefix}");
        stage.kill().unwrap();
    }
}

fn judge(then: Then, place: usize, started: &Started, context: &str) {
    let missed = Started::Serves { unconfirmed: true, damaged: 0, unreadable: OLD_DEKS };
    let damaged = Started::Serves { unconfirmed: true, damaged: 1, unreadable: OLD_DEKS };
    match (then, started) {
        // The first byte is the format: it reads as a later release's.
        (Then::Ends(_), Started::Ended { code, text }) if place == 0 => {
            assert!(*code == DATA && text.contains("kms-agent: "), "{context}");
        }
        (Then::Ends(words), Started::Ended { code, text }) => {
            assert!(*code == DATA && text.contains(words), "{context}");
            assert!(text.contains("restore a backup"), "{context}");
        }
        (Then::Unconfirmed | Then::LeftOut, started) => assert_eq!(*started, UNCONFIRMED, "{context}"),
        (Then::LeftOutAndMissed, started) => assert_eq!(*started, missed, "{context}"),
        (Then::Damaged, started) => assert_eq!(*started, damaged, "{context}"),
        (Then::Ends(_), Started::Serves { .. }) => panic!("{context}"),
    }
}

/// Lets an agent live until its store has every kind of row; returns a copy of its files.
async fn lived_in(stage: &mut Stage) -> PathBuf {
    assert_eq!(stage.start().await.unwrap(), WELL);
    stage.enrol().await.unwrap();
    let mut backup = Command::new(Program::Agent.path().unwrap());
    backup.arg("--config").arg(stage.path("agent.toml")).arg("backup").arg(stage.path("saved.db"));
    run(&mut backup).unwrap();
    stage.stop().await.unwrap();
    let (agent, kept) = (stage.path(""), stage.path("").with_file_name("kept"));
    fs::rename(&agent, &kept).unwrap();
    kept
}

#[tokio::test]
async fn a_damaged_key_costs_only_its_own_items_of_a_call() {
    let mut stage = Stage::with(Scene::Due).await.unwrap();
    stage.start().await.unwrap();
    let mut node = stage.node().await.unwrap();
    while node.version().await.unwrap() < 2 {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    let new = node.wrap(&[9; 32]).await.unwrap();
    stage.stop().await.unwrap();
    let row = stage.flip("kek/", 8).await.unwrap();
    assert!(row.as_str().ends_with("/0000000001"), "{row:?}");
    stage.start().await.unwrap();

    let mut node = stage.node().await.unwrap();
    let old = &stage.old_deks()[0];
    let bad = node.unreadable(&[old.clone(), new.clone(), old.clone(), new]).await.unwrap();
    assert_eq!(bad.len(), 2, "{bad:?}");
    assert!(bad.iter().all(|bad| bad.contains("under version 1: Some(Refused(KeyDamaged))")), "{bad:?}");
    let alone = node.unreadable(std::slice::from_ref(old)).await.unwrap_err().to_string();
    assert!(alone.contains("a stored key does not open"), "{alone}");
}

/// Mounts a small file system over the agent's directory, for the agent alone, and fills it and makes room on demand.
const SMALL_DISK: &str = r#"
agent=$1 kept=$2; shift 2
mount -t tmpfs -o size=600k tmpfs "$agent" && cp -a "$kept"/. "$agent" || exit
(
    unset LD_PRELOAD
    until [ -e "$kept/fill" ]; do sleep 0.05; done
    dd if=/dev/zero of="$agent/filler" bs=4k 2>/dev/null
    touch "$kept/filled"
    until [ -e "$kept/room" ]; do sleep 0.05; done
    rm "$agent/filler" && touch "$kept/roomy"
) &
exec "$@"
"#;

#[tokio::test]
async fn a_file_system_that_is_really_full_costs_changes_but_no_call() {
    let mut stage = Stage::new().await.unwrap();
    let (agent, kept) = (stage.path(""), stage.path("").with_file_name("kept"));
    run(Command::new("cp").arg("-a").arg(&agent).arg(&kept)).unwrap();
    if run(Command::new("unshare").args(["-rm", "true"])).is_err() {
        eprintln!("left out: this machine forbids user namespaces");
        return;
    }
    let small_disk = Spec::new("kms-agent", Path::new("unshare"), agent.parent().unwrap())
        .args(["-rm", "sh", "-c", SMALL_DISK, "sh"])
        .args([&agent, &kept, &Program::Agent.path().unwrap()])
        .args(["run", "--config"])
        .arg(agent.join("agent.toml"));
    assert_eq!(stage.start_as(small_disk).await.unwrap(), WELL);
    ask(&kept, "fill", "filled");
    // The audit's line may still fit into the last block of its file; the store's log does not.
    let refusal = stage.refusal().await.unwrap();
    let refused = ["cannot be recorded in the audit", "nothing was written"];
    assert!(refused.iter().any(|words| refusal.contains(words)), "{refusal}");
    assert_eq!(stage.unreadable().await.unwrap(), 0);
    ask(&kept, "room", "roomy");
    stage.enrol().await.unwrap();
    stage.stop().await.unwrap();
}

fn ask(directory: &Path, what: &str, answer: &str) {
    fs::write(directory.join(what), "").unwrap();
    let done = || Ok(directory.join(answer).exists().then_some(()));
    wait::until(answer, wait::START_LIMIT, done).unwrap();
}
