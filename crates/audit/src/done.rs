//! Reads changes back from a chain: what a restored store must be told again.
//!
//! It reads only, and goes on after a break: a ban is better taken from a damaged chain than lost.

use std::collections::BTreeMap;
use std::io;
use std::path::Path;

use serde_json::{Map, Value};

use crate::ChangeId;
use crate::chain::{Chain, Entry};
use crate::walk::{Break, walk};

/// A change that was made, or begun.
#[derive(Clone, Debug, PartialEq)]
pub struct PastChange {
    /// When its intent was recorded, RFC 3339 in UTC: sorts as text.
    pub time: String,
    /// What was to be done.
    pub action: String,
    /// What it was done to.
    pub target: Option<String>,
    /// What else was recorded.
    pub details: Map<String, Value>,
    /// Whether it is known to be in the store; if not, nobody recorded how it ended.
    pub done: bool,
}

/// The changes of a directory.
#[derive(Clone, Debug, PartialEq)]
pub struct PastChanges {
    /// In the order of their intents.
    pub changes: Vec<PastChange>,
    /// How many records the chain has.
    pub lines: u64,
    /// The first place where the chain does not hold.
    pub broken: Option<Break>,
}

/// Reads the changes of the wanted actions that were done or whose end is not known; what was not done is left
/// out.
///
/// # Errors
/// When the directory or a file cannot be read.
pub fn past_changes(directory: &Path, wanted: impl Fn(&str) -> bool) -> io::Result<PastChanges> {
    let mut found: BTreeMap<u64, PastChange> = BTreeMap::new();
    let mut places: BTreeMap<ChangeId, u64> = BTreeMap::new();
    let walked = walk(directory, Chain::Changes, |entry, head, _| {
        let Some(change) = entry.text("change").and_then(|id| id.parse::<ChangeId>().ok()) else { return };
        match entry.text("kind") {
            Some("intent") if entry.text("action").is_some_and(&wanted) => {
                places.insert(change, head.seq);
                found.insert(head.seq, of_intent(entry));
            }
            Some("outcome") => {
                let Some(place) = places.get(&change) else { return };
                match entry.text("outcome") {
                    Some("done") => drop(found.get_mut(place).map(|change| change.done = true)),
                    Some("not done") => drop(found.remove(place)),
                    _ => {}
                }
            }
            _ => {}
        }
    })?;
    Ok(PastChanges { changes: found.into_values().collect(), lines: walked.lines, broken: walked.broken })
}

fn of_intent(entry: &Entry) -> PastChange {
    let text = |field| entry.text(field).map(str::to_owned);
    PastChange {
        time: text("time").unwrap_or_default(),
        action: text("action").unwrap_or_default(),
        target: text("target"),
        details: entry.body.get("details").and_then(Value::as_object).cloned().unwrap_or_default(),
        done: false,
    }
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, UNIX_EPOCH};

    use super::*;
    use crate::{ChangeLog, Intent, Outcome};

    #[test]
    fn changes_are_read_back_by_action_without_those_that_were_not_done() {
        let directory = tempfile::tempdir().unwrap();
        let log = ChangeLog::open(directory.path()).unwrap();
        let now = UNIX_EPOCH + Duration::from_secs(1_800_000_000);
        let begin = |n: u8, action, target| {
            let change = ChangeId::from_bytes([n; 16]);
            let details = Map::new();
            let who = "admin";
            let intent =
                Intent { change, action, who, cluster: None, target: Some(target), reason: None, details };
            log.intent(&intent, now).unwrap();
            change
        };
        let done = |change| {
            log.outcome(&change, Outcome::Done, now).unwrap();
        };
        done(begin(1, "node_ban", "a"));
        done(begin(2, "key_rotate", "b"));
        log.outcome(&begin(3, "node_ban", "c"), Outcome::NotDone { why: "conflict" }, now).unwrap();
        begin(4, "node_ban", "d");
        done(begin(5, "node_unban", "a"));

        let past = past_changes(directory.path(), |action| action.ends_with("ban")).unwrap();
        let seen: Vec<_> =
            past.changes.iter().map(|c| (&*c.action, c.target.as_deref().unwrap(), c.done)).collect();
        assert_eq!(seen, [("node_ban", "a", true), ("node_ban", "d", false), ("node_unban", "a", true)]);
        assert_eq!((past.lines, past.broken), (9, None));
    }
}
