//! Reads records back, the newest first: who did what, and how it ended.
//!
//! It reads the files while they are written, and shows whatever is a record; whether the chain holds is the
//! verifier's to say.

use std::collections::HashMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

use crate::chain::{Chain, Entry};
use crate::retention::first_record;
use crate::walk::{files, lines_of};

/// Files that one search reads at most before it answers with what it has.
const MAX_FILES: usize = 4;

/// A record that was found.
#[derive(Clone, Debug, PartialEq)]
pub struct Found {
    /// Its number in the chain.
    pub seq: u64,
    /// When it was written, RFC 3339 in UTC.
    pub time: String,
    /// The whole record but number, time and link.
    pub body: Map<String, Value>,
    /// How an intent ended, or a call: `done`, `not done`, `unknown`, `ok`, …; `open` for an intent without outcome.
    pub outcome: Option<String>,
}

/// One page of a search.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct FoundPage {
    /// The records, the newest first.
    pub items: Vec<Found>,
    /// Records before this number were not looked at yet; `None` at the end.
    pub next: Option<u64>,
}

/// Which part of a chain is searched.
#[derive(Clone, Copy, Debug)]
pub struct Range<'a> {
    /// The chain.
    pub chain: Chain,
    /// Only records before this number.
    pub before: Option<u64>,
    /// Only records from this time on, as RFC 3339 in UTC with milliseconds.
    pub from: Option<&'a str>,
    /// The most records.
    pub limit: usize,
}

/// Finds records that are `wanted`, the newest first. It may answer with fewer than `limit` before the end.
///
/// # Errors
/// When the directory or a file cannot be read.
pub fn search(directory: &Path, range: Range<'_>, wanted: impl Fn(&Found) -> bool) -> io::Result<FoundPage> {
    let files = files(directory, range.chain)?;
    let (mut page, mut outcomes, mut read) = (FoundPage::default(), HashMap::new(), 0);
    for (index, (_, path)) in files.iter().enumerate().rev() {
        if let Some(before) = range.before
            && first_record(path)?.is_some_and(|first| first.seq >= before)
        {
            continue;
        }
        let Some(entries) = entries(path)? else { continue };
        if read == 0 {
            outcomes_after(&files, index, &mut outcomes)?;
        }
        read += 1;
        for entry in entries.iter().rev() {
            note_outcome(entry, &mut outcomes);
            if range.before.is_some_and(|before| entry.seq >= before) {
                continue;
            }
            let Some(found) = found(entry, &outcomes) else { continue };
            if range.from.is_none_or(|from| found.time.as_str() >= from) && wanted(&found) {
                page.items.push(found);
            }
            if page.items.len() >= range.limit {
                page.next = (entry.seq > 1).then_some(entry.seq);
                return Ok(page);
            }
        }
        let newer =
            |entry: &Entry| range.from.is_none_or(|from| entry.text("time").is_some_and(|time| time >= from));
        if !entries.is_empty() && !entries.iter().any(newer) {
            return Ok(page);
        }
        if read == MAX_FILES && index > 0 {
            page.next = entries.first().map(|first| first.seq);
            return Ok(page);
        }
    }
    Ok(page)
}

/// Reads the outcomes in the files after the one that is searched first, as far as intents are carried on.
fn outcomes_after(
    files: &[(u64, PathBuf)],
    index: usize,
    outcomes: &mut HashMap<String, String>,
) -> io::Result<()> {
    for (_, path) in files.iter().skip(index + 1) {
        let Some(first) = first_record(path)? else { continue };
        if first.body.get("open").and_then(Value::as_u64).unwrap_or_default() == 0 {
            return Ok(());
        }
        entries(path)?.unwrap_or_default().iter().for_each(|entry| note_outcome(entry, outcomes));
    }
    Ok(())
}

/// The records of a file; `None` when retention has removed it meanwhile.
fn entries(path: &Path) -> io::Result<Option<Vec<Entry>>> {
    match fs::read(path) {
        Ok(bytes) => Ok(Some(lines_of(&bytes).filter_map(Entry::parse).collect())),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

fn note_outcome(entry: &Entry, outcomes: &mut HashMap<String, String>) {
    if entry.text("kind") == Some("outcome")
        && let (Some(change), Some(outcome)) = (entry.text("change"), entry.text("outcome"))
    {
        // The last one counts: a later look may clear up an unknown one.
        let known = outcomes.entry(change.to_owned()).or_insert_with(|| outcome.to_owned());
        if known == "unknown" {
            outcome.clone_into(known);
        }
    }
}

fn found(entry: &Entry, outcomes: &HashMap<String, String>) -> Option<Found> {
    let outcome = match entry.text("kind")? {
        "outcome" | "open" | "file" => return None,
        "intent" => entry.text("change").map(|id| outcomes.get(id).map_or("open", String::as_str).to_owned()),
        "denied" => Some("denied".to_owned()),
        _ => entry.text("outcome").map(str::to_owned),
    };
    let mut body = entry.body.clone();
    let time = body.remove("time").and_then(|time| time.as_str().map(str::to_owned)).unwrap_or_default();
    Some(Found { seq: entry.seq, time, body, outcome })
}
