//! Bans read back from audit files: a store that was restored must not forget
//! whom an operator banned since its backup.

use std::collections::BTreeMap;
use std::io;
use std::path::Path;

use fleet_kms_audit::{PastChange, past_changes};
use fleet_kms_identity::SpiffeId;

/// The action of a ban.
pub const BAN: &str = "node_ban";
/// The action that lifts a ban.
pub const UNBAN: &str = "node_unban";
/// The action that forgets a node. The restored store may know it still, so it
/// comes back as banned.
pub(crate) const REMOVE: &str = "node_remove";
/// The same actions for workers.
const BAN_WORKER: &str = "worker_ban";
const UNBAN_WORKER: &str = "worker_unban";
pub(crate) const REMOVE_WORKER: &str = "worker_remove";
/// The action that makes a node, also one that was removed before.
const ENROL: &str = "enrol";

/// What the audit says about bans.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Bans {
    /// Each identity that was ever banned, and whether it is now.
    pub states: Vec<(SpiffeId, bool)>,
    /// Directories whose chain does not hold: what was lost there is not known.
    pub broken: Vec<String>,
    /// How many records were looked at.
    pub lines: u64,
}

/// Why the bans cannot be read.
#[derive(Debug, thiserror::Error)]
#[error("cannot read the audit in {directory}")]
pub struct BansError {
    directory: String,
    #[source]
    source: io::Error,
}

/// Reads the bans from the audit directories of all agents that shared the
/// store. Of what several say, the latest counts.
///
/// A ban whose outcome nobody recorded counts: the agent may have died with it
/// in the store. The lifting of one counts only when it was done.
///
/// # Errors
///
/// When a directory cannot be read.
pub fn read<P: AsRef<Path>>(directories: &[P]) -> Result<Bans, BansError> {
    let mut bans = Bans::default();
    let mut changes: Vec<PastChange> = Vec::new();
    for directory in directories {
        let directory = directory.as_ref();
        let failed = |source| BansError { directory: directory.display().to_string(), source };
        let past = past_changes(directory, |action| word_of(action).is_some()).map_err(failed)?;
        bans.lines += past.lines;
        if past.broken.is_some() {
            bans.broken.push(directory.display().to_string());
        }
        changes.extend(past.changes);
    }
    changes.sort_by(|a, b| a.time.cmp(&b.time));
    let mut states: BTreeMap<String, (SpiffeId, &'static str)> = BTreeMap::new();
    for change in changes {
        let Some(id) = change.target.as_deref().and_then(|id| id.parse::<SpiffeId>().ok()) else { continue };
        let known = states.get(&id.to_string()).map(|(_, action)| *action);
        let Some(said) = word_of(&change.action) else { continue };
        let word = match said {
            BAN => BAN,
            UNBAN if change.done => UNBAN,
            REMOVE if known != Some(BAN) => REMOVE,
            ENROL if change.done && known == Some(REMOVE) => UNBAN,
            _ => continue,
        };
        states.insert(id.to_string(), (id, word));
    }
    bans.states = states.into_values().map(|(id, word)| (id, word != UNBAN)).collect();
    Ok(bans)
}

/// What an action says, whatever kind of identity it is about.
fn word_of(action: &str) -> Option<&'static str> {
    match action {
        BAN | BAN_WORKER => Some(BAN),
        UNBAN | UNBAN_WORKER => Some(UNBAN),
        REMOVE | REMOVE_WORKER => Some(REMOVE),
        ENROL => Some(ENROL),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use fleet_kms_audit::{ChangeId, ChangeLog, Outcome};

    use super::*;
    use crate::times::from_ms;
    use crate::trail::Intent;

    fn log(directory: &Path, lines: &[(u64, &'static str, &str, Option<Outcome<'_>>)]) {
        let log = ChangeLog::open(directory).unwrap();
        for (n, (second, action, node, outcome)) in (0u8..).zip(lines) {
            let now = from_ms(1_800_000_000_000) + Duration::from_secs(*second);
            let change = ChangeId::from_bytes([n; 16]);
            let id = format!("spiffe://fleet.test/cluster/07070707-0707-0707-0707-070707070707/node/{node}");
            log.intent(&Intent::new(action, "admin").target(id).line(change), now).unwrap();
            if let Some(outcome) = outcome {
                log.outcome(&change, *outcome, now).unwrap();
            }
        }
    }

    #[test]
    fn the_latest_word_of_all_agents_counts_and_an_unfinished_ban_is_one() {
        let (one, two) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let done = Some(Outcome::Done);
        let refused = Some(Outcome::NotDone { why: "conflict" });
        log(
            one.path(),
            &[
                (1, BAN, "lifted", done),
                (2, BAN, "again", done),
                (3, BAN, "never", refused),
                (9, BAN, "open", None),
            ],
        );
        log(
            two.path(),
            &[
                (4, UNBAN, "lifted", done),
                (5, UNBAN, "again", None),
                (6, ENROL, "other", done),
                (7, REMOVE, "gone", done),
                (7, REMOVE, "back", done),
                (8, ENROL, "back", done),
                (8, BAN_WORKER, "census", done),
            ],
        );
        let bans = read(&[one.path(), two.path()]).unwrap();
        let names: Vec<_> = bans.states.iter().map(|(id, banned)| (id.to_string(), *banned)).collect();
        let short: Vec<_> =
            names.iter().map(|(id, banned)| (id.rsplit('/').next().unwrap(), *banned)).collect();
        let expected = [
            ("again", true),
            ("back", false),
            ("census", true),
            ("gone", true),
            ("lifted", false),
            ("open", true),
        ];
        assert_eq!(short, expected);
        assert!(bans.broken.is_empty());
    }
}
