//! What removal leaves behind still verifies, and nothing else does.

use std::time::UNIX_EPOCH;

use tempfile::TempDir;

use super::*;
use crate::writer::Writer;
use crate::{Against, ChangeLog, Intent, Outcome, Range, search, verify, verify_against};

fn at(seconds: u64) -> SystemTime {
    UNIX_EPOCH + Duration::from_secs(seconds)
}

/// One record a second, three in each file, 8 files.
fn chain_of_files() -> (TempDir, Writer) {
    let directory = tempfile::tempdir().unwrap();
    let (mut writer, _) = Writer::open_end(directory.path(), Chain::Data, 400).unwrap();
    for n in 0..24 {
        let body =
            crate::record::object([("kind", "calls".into()), ("n", n.into()), ("outcome", "ok".into())]);
        writer.append(&[body], at(n)).unwrap();
    }
    assert_eq!(writer.number(), 8);
    (directory, writer)
}

fn plan(directory: &TempDir, writer: &Writer, retention: Retention, now: u64) -> Option<Removal> {
    let current = (writer.number(), u64::MAX);
    Removal::plan(directory.path(), Chain::Data, current, &retention, at(now)).unwrap()
}

fn carry_out(removal: Removal) {
    let checkpoint = removal.checkpoint("agent-1", at(100));
    removal.carry_out(checkpoint.text(), checkpoint, b"signed".to_vec(), vec![b"issuer".to_vec()]).unwrap();
}

fn age(seconds: u64) -> Retention {
    Retention { max_age: Some(Duration::from_secs(seconds)), max_bytes: None }
}

#[test]
fn old_files_go_and_the_rest_verifies_by_its_checkpoint() {
    let (directory, mut writer) = chain_of_files();
    assert_eq!(plan(&directory, &writer, age(100), 30), None, "nothing is so old");
    assert_eq!(plan(&directory, &writer, Retention::default(), 3000), None, "nothing is asked for");
    let removal = plan(&directory, &writer, age(17), 30).unwrap();
    assert_eq!((removal.files(), removal.broken()), (4, None));
    carry_out(removal);
    let report = verify(directory.path()).unwrap();
    assert!(report.is_sound(), "{report:?}");
    let checkpoint = report.data.checkpoint.unwrap();
    assert_eq!((checkpoint.seq, checkpoint.file, report.data.lines), (12, 5, 12));
    // The next removal goes on from there, and even all but the written file may go.
    let all = plan(&directory, &writer, Retention { max_bytes: Some(0), max_age: None }, 30).unwrap();
    assert_eq!(all.files(), 3);
    carry_out(all);
    writer.append(&[crate::record::object([])], at(40)).unwrap();
    let report = verify(directory.path()).unwrap();
    assert!(report.is_sound() && report.data.head == writer.head(), "{report:?}");
    drop(writer);
    let (writer, opened) = Writer::open_end(directory.path(), Chain::Data, 400).unwrap();
    assert_eq!((writer.head(), opened.broken), (report.data.head, None));
}

#[test]
fn a_removal_that_was_cut_short_anywhere_still_verifies() {
    let (directory, writer) = chain_of_files();
    let removal = plan(&directory, &writer, age(17), 30).unwrap();
    let files: Vec<_> =
        removal.files.iter().map(|(_, path)| (path.clone(), fs::read(path).unwrap())).collect();
    carry_out(removal);
    for gone in 0..files.len() {
        for (path, bytes) in &files[gone..] {
            fs::write(path, bytes).unwrap();
        }
        let report = verify(directory.path()).unwrap();
        assert!(report.is_sound(), "{gone} files gone: {report:?}");
        files.iter().for_each(|(path, _)| drop(fs::remove_file(path)));
    }
}

#[test]
fn without_its_own_checkpoint_a_chain_that_begins_late_does_not_hold() {
    let (directory, writer) = chain_of_files();
    carry_out(plan(&directory, &writer, age(17), 30).unwrap());
    let path = directory.path().join("data.checkpoint");
    let good = fs::read_to_string(&path).unwrap();
    let why = || verify(directory.path()).unwrap().data.broken.unwrap().why;
    fs::remove_file(&path).unwrap();
    assert_eq!(why(), Why::FileMissing);
    for (from, to) in [("\\\"seq\\\":12", "\\\"seq\\\":11"), ("\\\"file\\\":5", "\\\"file\\\":4")] {
        assert!(good.contains(from), "{good}");
        fs::write(&path, good.replace(from, to)).unwrap();
        assert!(verify(directory.path()).unwrap().data.broken.is_some(), "{to}");
    }
    for rubbish in ["", "{}", &good.replace("data", "changes")] {
        fs::write(&path, rubbish).unwrap();
        assert_eq!(why(), Why::NotACheckpoint);
    }
    fs::write(&path, &good).unwrap();
    let against = |signer: &dyn Fn(&SignedCheckpoint) -> Result<(), String>| {
        let against = Against { signer: Some(signer), ..Against::default() };
        verify_against(directory.path(), against).unwrap().data.broken
    };
    let genuine =
        |signed: &SignedCheckpoint| match (&*signed.signature, signed.message().starts_with(b"fleet-kms")) {
            (b"signed", true) => Ok(()),
            _ => Err("forged".to_owned()),
        };
    assert_eq!(against(&genuine), None);
    let refused = against(&|_| Err("forged".to_owned())).unwrap();
    assert_eq!(
        (refused.file.as_str(), refused.why),
        ("data.checkpoint", Why::Signature("forged".to_owned()))
    );
}

#[test]
fn a_damaged_file_is_set_aside_and_the_checkpoint_says_so() {
    let (directory, writer) = chain_of_files();
    let path = directory.path().join(Chain::Data.file_name(2));
    fs::write(&path, fs::read_to_string(&path).unwrap().replace("\"n\":4", "\"n\":9")).unwrap();
    let removal = plan(&directory, &writer, age(17), 30).unwrap();
    assert_eq!(removal.broken().unwrap().file, "data-000002.jsonl");
    carry_out(removal);
    assert!(directory.path().join("data-000002.jsonl.broken").exists() && !path.exists());
    let checkpoint = verify(directory.path()).unwrap().data.checkpoint.unwrap();
    assert!(checkpoint.broken.unwrap().contains("data-000002.jsonl line 3"));
}

#[test]
fn a_file_with_an_open_intent_stays() {
    let directory = tempfile::tempdir().unwrap();
    let log = ChangeLog::open_with(directory.path(), 600).unwrap();
    let change = |n: u8| crate::ChangeId::from_bytes([n; 16]);
    let intend = |n: u8| {
        let (cluster, target, reason, details) = (None, None, None, serde_json::Map::new());
        let (action, who) = ("key_rotate", "schedule");
        log.intent(&Intent { change: change(n), action, who, cluster, target, reason, details }, at(n.into()))
    };
    for n in 0..20 {
        intend(n).unwrap();
        if n != 7 {
            log.outcome(&change(n), Outcome::Done, at(n.into())).unwrap();
        }
    }
    let kept = log.removal(&age(0), at(1000)).unwrap().unwrap();
    let (files, end) = (kept.files(), kept.end);
    carry_out(kept);
    assert!(end.seq < log.open_intents()[0].recorded.seq);
    assert_eq!(log.removal(&age(0), at(1000)).unwrap(), None);
    log.outcome(&change(7), Outcome::Done, at(30)).unwrap();
    assert!(log.removal(&age(0), at(1000)).unwrap().unwrap().files() > files);
    assert!(verify(directory.path()).unwrap().is_sound());
}

#[test]
fn a_search_shows_the_newest_first_page_by_page_with_outcomes() {
    let directory = tempfile::tempdir().unwrap();
    let log = ChangeLog::open_with(directory.path(), 900).unwrap();
    let change = |n: u8| crate::ChangeId::from_bytes([n; 16]);
    for n in 0..40 {
        let (cluster, target, reason, details) = (None, None, None, serde_json::Map::new());
        let action = if n % 2 == 0 { "key_rotate" } else { "node_ban" };
        let intent = Intent { change: change(n), action, who: "schedule", cluster, target, reason, details };
        log.intent(&intent, at(n.into())).unwrap();
    }
    for n in 0..39 {
        let outcome = if n == 3 { Outcome::NotDone { why: "conflict" } } else { Outcome::Done };
        log.outcome(&change(n), outcome, at(100)).unwrap();
    }
    let (mut found, mut before, mut pages) = (Vec::new(), None, 0);
    loop {
        let range = Range { chain: Chain::Changes, before, from: None, limit: 7 };
        let page = search(directory.path(), range, |found| found.body["action"] == "node_ban").unwrap();
        found.extend(page.items);
        (before, pages) = (page.next, pages + 1);
        if before.is_none() {
            break;
        }
    }
    let outcomes: Vec<_> = found.iter().map(|found| found.outcome.as_deref().unwrap()).collect();
    assert_eq!((found.len(), outcomes[0], outcomes[18], outcomes[19]), (20, "open", "not done", "done"));
    assert!(found.is_sorted_by(|newer, older| newer.seq > older.seq) && pages > 2);
    let from = Some("1970-01-01T00:00:30.000Z");
    let (mut found, mut before) = (0, None);
    loop {
        let range = Range { chain: Chain::Changes, before, from, limit: 1000 };
        let page = search(directory.path(), range, |_| true).unwrap();
        found += page.items.len();
        before = page.next;
        if before.is_none() {
            break;
        }
    }
    assert_eq!(found, 10);
}
