//! What a change log promises over crashes and failures.

use std::fs::{self, OpenOptions};
use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::time::UNIX_EPOCH;

use super::*;
use crate::walk::{Torn, Why};
use crate::{MAX_LINE, verify};

const NOW: SystemTime = UNIX_EPOCH;

fn intent(change: u8) -> Intent<'static> {
    Intent {
        change: ChangeId::from_bytes([change; 16]),
        action: "key_rotate",
        who: "schedule",
        cluster: None,
        target: None,
        reason: None,
        details: Map::new(),
    }
}

fn first_file(directory: &Path) -> PathBuf {
    directory.join("changes-000001.jsonl")
}

fn append(directory: &Path, bytes: &[u8]) {
    OpenOptions::new().append(true).open(first_file(directory)).unwrap().write_all(bytes).unwrap();
}

#[test]
fn an_intent_without_outcome_is_open_after_a_restart_and_until_its_outcome() {
    let directory = tempfile::tempdir().unwrap();
    let log = ChangeLog::open(directory.path()).unwrap();
    let recorded: Vec<_> = [3, 1, 2].map(|n| log.intent(&intent(n), NOW).unwrap()).into();
    log.outcome(&ChangeId::from_bytes([1; 16]), Outcome::Done, NOW).unwrap();
    drop(log);
    let log = ChangeLog::open(directory.path()).unwrap();
    let open = log.open_intents();
    let found: Vec<_> = open.iter().map(|open| (open.change.as_bytes()[0], open.recorded)).collect();
    assert_eq!(found, [(3, recorded[0]), (2, recorded[2])], "in the order of their records");
    assert_eq!((open[0].action.as_str(), open[0].who.as_str()), ("key_rotate", "schedule"));
    log.outcome(&ChangeId::from_bytes([3; 16]), Outcome::NotDone { why: "conflict" }, NOW).unwrap();
    let unclear = ChangeId::from_bytes([2; 16]);
    log.outcome(&unclear, Outcome::Unknown, NOW).unwrap();
    drop(log);
    let log = ChangeLog::open(directory.path()).unwrap();
    let open: Vec<_> = log.open_intents().into_iter().map(|intent| intent.change).collect();
    assert_eq!(open, [unclear], "what was unknown is looked up at the next start");
    log.outcome(&unclear, Outcome::Done, NOW).unwrap();
    assert_eq!(log.open_intents(), []);
    drop(log);
    assert_eq!(ChangeLog::open(directory.path()).unwrap().open_intents(), []);
    assert!(verify(directory.path()).unwrap().is_sound());
}

#[test]
fn a_torn_last_line_is_cut_off_set_aside_and_reported() {
    let directory = tempfile::tempdir().unwrap();
    for (round, torn) in [&b"{\"seq\":2,\"ti"[..], b"\0\0\0\0\0", b"half\n", b"{}\n\0\0"].iter().enumerate() {
        let log = ChangeLog::open(directory.path()).unwrap();
        assert_eq!(log.opened(), &Opened::default());
        log.intent(&intent(1), NOW).unwrap();
        let head = log.head();
        drop(log);
        let keep = fs::metadata(first_file(directory.path())).unwrap().len();
        append(directory.path(), torn);
        assert!(!verify(directory.path()).unwrap().is_sound(), "an unfinished end is named");
        let log = ChangeLog::open(directory.path()).unwrap();
        let found = log.opened().clone();
        let (file, bytes) = ("changes-000001.jsonl".to_owned(), torn.len() as u64);
        let expected = Torn { file, line: round as u64 * 2 + 2, keep, bytes };
        assert_eq!(found, Opened { torn: Some(expected), broken: None });
        let aside = directory.path().join(format!("changes-000001.jsonl.torn-at-{keep}"));
        assert_eq!(fs::read(aside).unwrap(), *torn);
        assert_eq!(log.head(), head, "every acknowledged record is there");
        log.intent(&intent(2), NOW).unwrap();
        drop(log);
        assert!(verify(directory.path()).unwrap().is_sound());
    }
}

#[test]
fn a_broken_chain_is_reported_and_continued() {
    let directory = tempfile::tempdir().unwrap();
    let log = ChangeLog::open(directory.path()).unwrap();
    for n in 0..4 {
        log.intent(&intent(n), NOW).unwrap();
    }
    drop(log);
    let text = fs::read_to_string(first_file(directory.path())).unwrap();
    let edited = text.replacen("schedule", "somebody", 1);
    fs::write(first_file(directory.path()), &edited).unwrap();
    let log = ChangeLog::open(directory.path()).unwrap();
    let broken = log.opened().broken.clone().unwrap();
    assert_eq!((broken.line, &broken.why), (2, &Why::Link));
    assert_eq!(log.intent(&intent(9), NOW).unwrap().seq, 5);
    assert!(fs::read_to_string(first_file(directory.path())).unwrap().starts_with(&edited));
    assert_eq!(verify(directory.path()).unwrap().changes.broken, Some(broken), "and stays named");
}

#[test]
fn a_chain_runs_on_from_file_to_file() {
    let directory = tempfile::tempdir().unwrap();
    let log = ChangeLog::open(directory.path()).unwrap();
    log.state().writer.begin_files_at(600);
    for n in 0..20 {
        log.intent(&intent(n), NOW).unwrap();
    }
    drop(log);
    let report = verify(directory.path()).unwrap();
    assert!(report.is_sound() && report.changes.files > 4, "{report:?}");
    let log = ChangeLog::open(directory.path()).unwrap();
    assert_eq!(
        (log.open_intents().len(), log.intent(&intent(99), NOW).unwrap().seq),
        (20, report.changes.head.seq + 1)
    );
}

#[test]
fn opening_reads_the_last_file_and_knows_the_open_intents_of_all() {
    let directory = tempfile::tempdir().unwrap();
    let log = ChangeLog::open(directory.path()).unwrap();
    log.state().writer.begin_files_at(600);
    let first = log.intent(&intent(1), NOW).unwrap();
    for n in 2..30 {
        log.intent(&intent(n), NOW).unwrap();
        log.outcome(&ChangeId::from_bytes([n; 16]), Outcome::Done, NOW).unwrap();
    }
    let number = log.state().writer.number();
    drop(log);
    assert!(number > 5);
    // Whatever stands in the files before is not looked at.
    for old in 1..number {
        fs::write(directory.path().join(Chain::Changes.file_name(old)), "not read").unwrap();
    }
    let log = ChangeLog::open(directory.path()).unwrap();
    assert_eq!(log.opened(), &Opened::default());
    let open: Vec<_> = log.open_intents().iter().map(|open| (open.change, open.recorded)).collect();
    assert_eq!(open, [(ChangeId::from_bytes([1; 16]), first)]);
}

#[test]
fn a_file_that_was_cut_short_in_its_carried_intents_is_read_with_the_one_before() {
    let directory = tempfile::tempdir().unwrap();
    let log = ChangeLog::open(directory.path()).unwrap();
    log.state().writer.begin_files_at(400);
    let recorded: Vec<_> = [1, 2, 3].map(|n| log.intent(&intent(n), NOW).unwrap()).into();
    assert_eq!(log.state().writer.number(), 2);
    drop(log);
    let path = directory.path().join(Chain::Changes.file_name(2));
    let text = fs::read_to_string(&path).unwrap();
    let lines: Vec<_> = text.split_inclusive('\n').collect();
    for kept in 0..lines.len() {
        let mut cut = lines[..kept].concat();
        cut.push_str(&lines[kept][..20]);
        fs::write(&path, cut).unwrap();
        let log = ChangeLog::open(directory.path()).unwrap();
        let open: Vec<_> = log.open_intents().iter().map(|open| open.recorded).collect();
        assert_eq!(open, recorded[..2], "{kept} lines kept");
        drop(log);
        assert!(verify(directory.path()).unwrap().is_sound());
    }
}

#[test]
fn a_second_writer_is_refused() {
    let directory = tempfile::tempdir().unwrap();
    let log = ChangeLog::open(directory.path()).unwrap();
    assert!(matches!(ChangeLog::open(directory.path()), Err(LogError::InUse(Chain::Changes))));
    drop(log);
    ChangeLog::open(directory.path()).unwrap();
}

#[test]
fn a_record_that_is_too_long_is_refused_and_leaves_no_trace() {
    let directory = tempfile::tempdir().unwrap();
    let log = ChangeLog::open(directory.path()).unwrap();
    let long = "x".repeat(MAX_LINE);
    let refused = log.intent(&Intent { reason: Some(&long), ..intent(1) }, NOW);
    assert!(matches!(refused, Err(LogError::TooLong(_))), "{refused:?}");
    assert_eq!((log.head().seq, log.open_intents().len()), (0, 0));
    let longest = "x".repeat(MAX_LINE - 300);
    log.intent(&Intent { reason: Some(&longest), ..intent(1) }, NOW).unwrap();
    assert!(verify(directory.path()).unwrap().is_sound());
}

#[test]
fn files_are_readable_by_their_group_only() {
    let directory = tempfile::tempdir().unwrap();
    let logs = directory.path().join("audit");
    ChangeLog::open(&logs).unwrap();
    let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
    assert_eq!((mode(&first_file(&logs)) & !0o640, mode(&logs) & !0o750), (0, 0));
}

#[test]
fn quotes_and_line_ends_in_what_a_caller_says_cannot_forge_a_line() {
    let directory = tempfile::tempdir().unwrap();
    let log = ChangeLog::open(directory.path()).unwrap();
    let reason = "done\"}\n{\"seq\":2,\"kind\":\"outcome\"\u{2028}\r\n";
    log.intent(&Intent { reason: Some(reason), ..intent(1) }, NOW).unwrap();
    drop(log);
    assert_eq!(verify(directory.path()).unwrap().changes.lines, 1);
    let line = fs::read_to_string(first_file(directory.path())).unwrap();
    let line: Value = serde_json::from_str(&line).unwrap();
    assert_eq!(line["reason"], reason);
}
