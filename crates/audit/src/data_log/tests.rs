//! What the sums promise.

use std::fs;
use std::sync::Arc;
use std::time::UNIX_EPOCH;

use tempfile::TempDir;

use super::sums::SHARDS;
use super::*;
use crate::verify;

const NOW: SystemTime = UNIX_EPOCH;
const TOOK: Duration = Duration::from_micros(250);

fn call(identity: &str) -> Call<'_> {
    Call { identity, cluster: Some(&[1; 16]), operation: "unwrap", version: Some(3), outcome: "ok" }
}

fn clocks() -> Clocks {
    Clocks { wall: Arc::new(|| NOW), monotonic }
}

#[expect(clippy::disallowed_methods, reason = "a test of what happens in real time")]
fn monotonic() -> Instant {
    Instant::now()
}

fn open() -> (TempDir, DataLog) {
    let directory = tempfile::tempdir().unwrap();
    let log = DataLog::open(directory.path(), DataOptions::default(), clocks()).unwrap();
    (directory, log)
}

fn lines(directory: &TempDir) -> Vec<Value> {
    let text = fs::read_to_string(directory.path().join("data-000001.jsonl")).unwrap();
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

fn total(lines: &[Value], field: &str) -> u64 {
    lines.iter().filter_map(|line| line[field].as_u64()).sum()
}

#[test]
fn calls_are_summed_per_identity_operation_version_and_outcome() {
    let (directory, log) = open();
    for _ in 0..3 {
        log.count(&call("node-1"), 1, TOOK);
    }
    log.count(&call("node-1"), 512, Duration::from_millis(9));
    log.count(&Call { version: None, outcome: "denied", ..call("node-1") }, 0, TOOK);
    log.count(&Call { operation: "wrap", ..call("node-1") }, 1, TOOK);
    log.count(&call("node-0"), 1, TOOK);
    assert_eq!(log.flush(NOW + Duration::from_secs(10)).unwrap(), 4);
    let lines = lines(&directory);
    let sum = lines.iter().find(|line| line["calls"] == 4).unwrap();
    let facts = ["identity", "operation", "outcome", "cluster", "from", "to"].map(|field| &sum[field]);
    let cluster = "01010101-0101-0101-0101-010101010101";
    let (from, to) = ("1970-01-01T00:00:00.000Z", "1970-01-01T00:00:10.000Z");
    assert_eq!(facts, ["node-1", "unwrap", "ok", cluster, from, to]);
    let numbers =
        ["version", "items", "micros_total", "micros_max"].map(|field| sum[field].as_u64().unwrap());
    assert_eq!(numbers, [3, 515, 9750, 9000]);
    assert_eq!(log.flush(NOW).unwrap(), 0, "nothing is written twice");
    assert!(verify(directory.path()).unwrap().is_sound());
}

#[test]
fn no_call_is_lost_or_doubled_while_flushes_go_on() {
    let (directory, log) = open();
    let log = Arc::new(log);
    let threads: Vec<_> = (0..4)
        .map(|thread| {
            let log = Arc::clone(&log);
            std::thread::spawn(move || {
                for n in 0..1000 {
                    log.count(&call(&format!("node-{}", (n + thread) % 7)), 2, TOOK);
                }
            })
        })
        .collect();
    while !threads.iter().all(|thread| thread.is_finished()) {
        log.flush(NOW).unwrap();
    }
    threads.into_iter().for_each(|thread| thread.join().unwrap());
    log.flush(NOW).unwrap();
    let lines = lines(&directory);
    assert_eq!((total(&lines, "calls"), total(&lines, "items")), (4000, 8000));
    assert!(verify(directory.path()).unwrap().is_sound());
}

#[test]
fn denials_are_always_counted_and_told_in_detail_only_a_few_times() {
    let (directory, log) = open();
    for n in 0..500 {
        let identity = format!("node-{}", n % 50);
        log.count(&Call { version: None, outcome: "denied", ..call(&identity) }, 1, TOOK);
        let denial =
            Denial { identity: &identity, address: "10.0.0.1:5", operation: "unwrap", reason: "banned" };
        log.denied(&denial, NOW);
    }
    log.flush(NOW).unwrap();
    let found = lines(&directory);
    let details: Vec<_> = found.iter().filter(|line| line["kind"] == "denied").collect();
    assert_eq!((total(&found, "calls"), details.len()), (500, MAX_DETAILS));
    let of_one = details.iter().filter(|line| line["identity"] == "node-7").count();
    assert!(of_one <= MAX_DETAILS_EACH, "{of_one}");
    let denial = Denial { identity: "node-7", address: "10.0.0.1:5", operation: "wrap", reason: "banned" };
    log.denied(&denial, NOW);
    assert_eq!(log.flush(NOW).unwrap(), 1, "a flush opens the limit again");
}

#[test]
fn more_identities_than_are_kept_apart_are_counted_together() {
    let (directory, log) = open();
    let many = MAX_IDENTITIES as u64 * 2;
    for n in 0..many {
        log.count(&call(&format!("node-{n}")), 1, TOOK);
    }
    let records = log.flush(NOW).unwrap();
    assert!(records <= MAX_IDENTITIES + SHARDS, "{records}");
    assert_eq!(total(&lines(&directory), "calls"), many);
}

#[test]
fn a_flush_that_fails_loses_no_count() {
    let (directory, log) = open();
    log.count(&call("node-1"), 1, TOOK);
    log.denied(&Denial { identity: "n", address: "a", operation: "o", reason: "r" }, NOW);
    // The next file cannot be made: its name is taken by a directory.
    locked(&log.shared.file).writer.begin_files_at(0);
    let obstacle = directory.path().join("data-000002.jsonl");
    fs::create_dir(&obstacle).unwrap();
    assert!(matches!(log.flush(NOW), Err(LogError::Io(_))));
    log.count(&call("node-1"), 1, TOOK);
    fs::remove_dir(&obstacle).unwrap();
    assert!(log.state().failing);
    assert_eq!(log.flush(NOW).unwrap(), 3, "sums, a denial, and the gap");
    let text = fs::read_to_string(obstacle).unwrap();
    assert!(text.contains("\"calls\":2") && text.contains("\"kind\":\"gap\""), "{text}");
    assert!(!log.state().failing);
    assert!(verify(directory.path()).unwrap().is_sound());
}

#[test]
fn a_name_of_any_length_can_be_written() {
    let (directory, log) = open();
    let long = "\u{1}é".repeat(50_000);
    log.count(&call(&long), 1, TOOK);
    log.denied(&Denial { identity: &long, address: &long, operation: "wrap", reason: "banned" }, NOW);
    assert_eq!(log.flush(NOW).unwrap(), 2);
    assert!(verify(directory.path()).unwrap().is_sound());
}

fn each(mode: DataMode, on_full: OnFull) -> (TempDir, DataLog) {
    let directory = tempfile::tempdir().unwrap();
    let options = DataOptions { mode, on_full, ..DataOptions::default() };
    let log = DataLog::open(directory.path(), options, clocks()).unwrap();
    (directory, log)
}

/// Records one call and waits for what became of it.
fn record(log: &DataLog, items: u64) -> Result<(), NotRecorded> {
    let (sender, receiver) = std::sync::mpsc::channel();
    let cluster = Some([1; 16]);
    let (operation, version, outcome, took) = ("unwrap", Some(3), "ok", TOOK);
    let call = CallRecord { identity: "node-1".into(), cluster, operation, version, outcome, items, took };
    log.record(vec![call], Box::new(move |result| sender.send(result).unwrap()));
    receiver.recv_timeout(Duration::from_secs(60)).unwrap()
}

#[test]
fn a_recorded_call_is_in_the_file_before_its_answer_and_durable_if_so_promised() {
    for mode in [DataMode::EachWritten, DataMode::EachDurable] {
        let (directory, log) = each(mode, OnFull::Serve);
        for n in 1..=5 {
            record(&log, n).unwrap();
            let lines = lines(&directory);
            assert_eq!((lines.len() as u64, &lines.last().unwrap()["items"]), (n, &n.into()));
            if mode == DataMode::EachDurable {
                assert_eq!(log.head().seq, n);
            }
        }
        let began = Instant::elapsed;
        let start = monotonic();
        while log.head().seq < 5 {
            assert!(began(&start) < Duration::from_secs(60), "the sync never comes");
            std::thread::yield_now();
        }
        drop(log);
        assert!(verify(directory.path()).unwrap().is_sound());
    }
}

#[test]
fn the_golden_record_of_a_call() {
    let (directory, log) = each(DataMode::EachDurable, OnFull::Serve);
    record(&log, 1).unwrap();
    let text = fs::read_to_string(directory.path().join("data-000001.jsonl")).unwrap();
    let (_, body) = text.split_once("\"cluster\"").unwrap();
    let expected = r#":"01010101-0101-0101-0101-010101010101","identity":"node-1","items":1,"kind":"call","micros":250,"operation":"unwrap","outcome":"ok","version":3}"#;
    assert_eq!(body.trim_end(), expected);
}

#[test]
fn calls_of_many_threads_are_recorded_once_each() {
    let (directory, log) = each(DataMode::EachDurable, OnFull::Serve);
    std::thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(|| (0..50).for_each(|_| record(&log, 1).unwrap()));
        }
    });
    drop(log);
    let report = verify(directory.path()).unwrap();
    assert!(report.is_sound() && report.data.lines == 400, "{report:?}");
}

#[test]
fn what_cannot_be_recorded_is_summed_or_refused_and_the_gap_is_told() {
    for (mode, on_full) in [
        (DataMode::EachWritten, OnFull::Serve),
        (DataMode::EachDurable, OnFull::Serve),
        (DataMode::EachWritten, OnFull::Refuse),
        (DataMode::EachDurable, OnFull::Refuse),
    ] {
        let (directory, log) = each(mode, on_full);
        record(&log, 1).unwrap();
        locked(&log.shared.file).writer.begin_files_at(0);
        let obstacle = directory.path().join("data-000002.jsonl");
        fs::create_dir(&obstacle).unwrap();
        for _ in 0..3 {
            assert_eq!(record(&log, 1), if on_full == OnFull::Serve { Ok(()) } else { Err(NotRecorded) });
        }
        assert_eq!((log.state().failing, log.refuses()), (true, on_full == OnFull::Refuse));
        assert!(log.flush(NOW).is_err());
        fs::remove_dir(&obstacle).unwrap();
        assert_eq!(log.flush(NOW).unwrap(), 2);
        assert!(!log.state().failing && !log.refuses());
        locked(&log.shared.file).writer.begin_files_at(MAX_FILE);
        record(&log, 1).unwrap();
        drop(log);
        let text = fs::read_to_string(obstacle).unwrap();
        let found: Vec<Value> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        let (gap, sum) = (&found[0], &found[1]);
        let (were, outcome) = match on_full {
            OnFull::Serve => ("served", "ok"),
            OnFull::Refuse => ("refused", "audit_full"),
        };
        assert_eq!((&gap["kind"], &gap["calls"], &gap["were"]), (&"gap".into(), &3.into(), &were.into()));
        assert_eq!((&sum["calls"], &sum["outcome"]), (&3.into(), &outcome.into()));
        assert!(verify(directory.path()).unwrap().is_sound());
    }
}
