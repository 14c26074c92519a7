//! Every edit of a file is named.

use std::fs;
use std::path::PathBuf;
use std::time::UNIX_EPOCH;

use serde_json::Map;
use tempfile::TempDir;

use super::*;
use crate::writer::{MAX_FILE, Writer};

/// A chain of 9 records in 3 files, and its head.
fn chain_of_files() -> (TempDir, Head) {
    let directory = tempfile::tempdir().unwrap();
    let (mut writer, _) = Writer::open_end(directory.path(), Chain::Changes, MAX_FILE).unwrap();
    writer.begin_files_at(400);
    for n in 0..9 {
        let body = crate::record::object([("kind", "event".into()), ("n", n.into())]);
        writer.append(&[body], UNIX_EPOCH).unwrap();
    }
    let head = writer.head();
    let report = verify(directory.path()).unwrap();
    assert_eq!((report.changes.files, report.changes.lines, report.changes.head), (3, 9, head));
    assert!(report.is_sound(), "{report:?}");
    (directory, head)
}

fn file(directory: &TempDir, number: u64) -> PathBuf {
    directory.path().join(Chain::Changes.file_name(number))
}

fn broken(directory: &TempDir, head: Option<Head>) -> Option<Break> {
    verify_against(directory.path(), Against { changes: head, ..Against::default() }).unwrap().changes.broken
}

#[test]
fn any_changed_byte_is_named_at_its_line_or_the_next() {
    let (directory, head) = chain_of_files();
    for number in 1..=3 {
        let path = file(&directory, number);
        let whole = fs::read(&path).unwrap();
        for position in 0..whole.len() {
            for flip in [0x01, 0x20, 0x80] {
                let mut edited = whole.clone();
                edited[position] ^= flip;
                fs::write(&path, &edited).unwrap();
                let found = broken(&directory, Some(head));
                let line = whole[..position].iter().filter(|byte| **byte == b'\n').count() as u64 + 1;
                let at = found.map(|found| (found.file, found.line)).expect("every change is found");
                let name = Chain::Changes.file_name(number);
                let first_of_next = (Chain::Changes.file_name(number + 1), 1);
                let places = [(name.clone(), line), (name, line + 1), first_of_next];
                assert!(places.contains(&at), "byte {position} of file {number}: {at:?}");
            }
        }
        fs::write(&path, whole).unwrap();
    }
}

#[test]
fn a_removed_doubled_or_inserted_line_is_named() {
    let (directory, head) = chain_of_files();
    let path = file(&directory, 2);
    let whole = fs::read_to_string(&path).unwrap();
    let lines: Vec<&str> = whole.split_inclusive('\n').collect();
    for index in 0..lines.len() {
        for edit in ["removed", "doubled", "inserted"] {
            let mut edited = lines.clone();
            match edit {
                "removed" => drop(edited.remove(index)),
                "doubled" => edited.insert(index, lines[index]),
                _ => edited.insert(index, "{\"seq\":1}\n"),
            }
            fs::write(&path, edited.concat()).unwrap();
            let found = broken(&directory, None).expect("found without a head");
            let last_removed = edit == "removed" && index + 1 == lines.len();
            let expected = if last_removed { file(&directory, 3) } else { path.clone() };
            assert_eq!(expected.file_name().unwrap(), found.file.as_str(), "{edit} {index}: {found}");
            assert_eq!(broken(&directory, Some(head)), Some(found));
        }
    }
}

#[test]
fn two_swapped_lines_are_named() {
    let (directory, _) = chain_of_files();
    let path = file(&directory, 1);
    let whole = fs::read_to_string(&path).unwrap();
    let lines: Vec<&str> = whole.split_inclusive('\n').collect();
    for first in 0..lines.len() {
        for second in first + 1..lines.len() {
            let mut edited = lines.clone();
            edited.swap(first, second);
            fs::write(&path, edited.concat()).unwrap();
            let found = broken(&directory, None).unwrap();
            assert_eq!(found.line, first as u64 + 1);
            assert!(matches!(found.why, Why::Number { .. }), "{found}");
        }
    }
}

#[test]
fn a_cut_tail_shows_only_against_a_head() {
    let (directory, head) = chain_of_files();
    let path = file(&directory, 3);
    let whole = fs::read_to_string(&path).unwrap();
    let without_last = whole[..whole.len() - 1].rfind('\n').unwrap() + 1;
    fs::write(&path, &whole[..without_last]).unwrap();
    assert_eq!(broken(&directory, None), None, "this is what a head is for");
    let found = broken(&directory, Some(head)).unwrap();
    assert_eq!(found.why, Why::BeforeHead { seq: 9 });
    assert_eq!(found.to_string(), "changes-000003.jsonl: the chain ends here, before its kept head 9");
    for length in without_last + 1..whole.len() {
        fs::write(&path, &whole[..length]).unwrap();
        assert_eq!(broken(&directory, None).unwrap().why, Why::Unfinished, "cut within a line");
    }
}

#[test]
fn a_removed_file_is_named_and_the_last_one_only_against_a_head() {
    for number in 1..=3 {
        let (directory, head) = chain_of_files();
        fs::remove_file(file(&directory, number)).unwrap();
        let found = broken(&directory, Some(head)).unwrap();
        if number == 3 {
            assert_eq!((broken(&directory, None), found.why), (None, Why::BeforeHead { seq: 9 }));
        } else {
            assert_eq!((found.file, found.why), (Chain::Changes.file_name(number), Why::FileMissing));
        }
    }
    let (directory, head) = chain_of_files();
    (1..=3).for_each(|number| fs::remove_file(file(&directory, number)).unwrap());
    assert_eq!(broken(&directory, Some(head)).unwrap().why, Why::BeforeHead { seq: 9 });
}

#[test]
fn a_chain_written_anew_shows_only_against_a_head() {
    let (directory, head) = chain_of_files();
    (1..=3).for_each(|number| fs::remove_file(file(&directory, number)).unwrap());
    let (mut writer, _) = Writer::open_end(directory.path(), Chain::Changes, MAX_FILE).unwrap();
    for _ in 0..12 {
        writer.append(&[Map::new()], UNIX_EPOCH).unwrap();
    }
    assert_eq!(broken(&directory, None), None);
    let found = broken(&directory, Some(head)).unwrap();
    assert_eq!((found.line, found.why), (9, Why::NotTheHead));
}

#[test]
fn a_chain_may_have_grown_since_its_head_was_kept() {
    let (directory, head) = chain_of_files();
    let (mut writer, _) = Writer::open_end(directory.path(), Chain::Changes, MAX_FILE).unwrap();
    writer.append(&[Map::new()], UNIX_EPOCH).unwrap();
    assert_eq!(broken(&directory, Some(head)), None);
    assert_eq!(broken(&directory, Some(writer.head())), None);
    assert_eq!(broken(&directory, Some(Head::start(Chain::Changes))), None);
}

#[test]
fn one_chain_cannot_pass_for_the_other() {
    let (directory, _) = chain_of_files();
    fs::rename(file(&directory, 1), directory.path().join(Chain::Data.file_name(1))).unwrap();
    let found = verify(directory.path()).unwrap().data.broken.unwrap();
    assert_eq!((found.line, found.why), (1, Why::Link));
}
