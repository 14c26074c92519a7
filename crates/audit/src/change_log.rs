//! The chain of changes: intent before, outcome after, each durable before its call returns.
//!
//! Each file but the first begins with the intents that are still open, so that opening a log reads its last file
//! and not its history. Its calls block on the disk; an async caller uses a blocking thread.

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::SystemTime;

use data_encoding::HEXLOWER;
use serde_json::{Map, Value};

use crate::chain::{Chain, Entry, Head};
use crate::record::object;
use crate::retention::{Removal, Retention};
use crate::walk::lines_of;
use crate::writer::{LogError, MAX_FILE, Opened, Writer};
use crate::{ChangeId, Event, Intent, Outcome, Recorded};

/// The changes of one agent.
pub struct ChangeLog {
    directory: PathBuf,
    opened: Opened,
    state: Mutex<State>,
}

struct State {
    writer: Writer,
    open: BTreeMap<ChangeId, OpenIntent>,
}

/// An intent whose true outcome is not in the log: a crash, a lost reply, or a commit under way.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OpenIntent {
    /// The change, to be looked for in the store.
    pub change: ChangeId,
    /// Where the intent is in the chain; the store transaction carries the same.
    pub recorded: Recorded,
    /// What was to be done.
    pub action: String,
    /// Who asked.
    pub who: String,
}

impl ChangeLog {
    /// Opens the chain in a directory, which is created if need be, and continues it.
    ///
    /// A torn end is cut off, and set aside in a file of its own if there is room. A chain that does not hold
    /// is continued all the same; [`ChangeLog::opened`] tells of both.
    ///
    /// # Errors
    /// When another process has it open, or the file system refuses.
    pub fn open(directory: &Path) -> Result<Self, LogError> {
        Self::open_with(directory, MAX_FILE)
    }

    /// As [`Self::open`]; a file that has `max_file` bytes is followed by the next.
    ///
    /// # Errors
    /// As [`Self::open`].
    pub fn open_with(directory: &Path, max_file: u64) -> Result<Self, LogError> {
        let mut open = BTreeMap::new();
        let follow = |entry: &Entry, head| follow(&mut open, entry, head);
        let (writer, opened) = Writer::open(directory, Chain::Changes, max_file, carries_all, follow)?;
        Ok(Self { directory: directory.to_owned(), opened, state: Mutex::new(State { writer, open }) })
    }

    /// Returns what opening found; the caller logs it and records an event.
    #[must_use]
    pub fn opened(&self) -> &Opened {
        &self.opened
    }

    /// Records that a change is about to be done. After an error the change must not be done.
    ///
    /// # Errors
    /// When the record is not durable; it is then not in the log either.
    pub fn intent(&self, intent: &Intent<'_>, now: SystemTime) -> Result<Recorded, LogError> {
        let body = intent.body();
        let mut state = self.state();
        let recorded = state.append(&body, now)?;
        let open = OpenIntent {
            change: intent.change,
            recorded,
            action: intent.action.to_owned(),
            who: intent.who.to_owned(),
        };
        state.open.insert(intent.change, open);
        Ok(recorded)
    }

    /// Records how a change ended. After [`Outcome::Unknown`] the intent stays open: the next start looks it up.
    ///
    /// # Errors
    /// When the record is not durable; the intent then stays open.
    pub fn outcome(
        &self,
        change: &ChangeId,
        outcome: Outcome<'_>,
        now: SystemTime,
    ) -> Result<Recorded, LogError> {
        let mut state = self.state();
        let recorded = state.append(&outcome.body(change), now)?;
        if !matches!(outcome, Outcome::Unknown) {
            state.open.remove(change);
        }
        Ok(recorded)
    }

    /// Records something that happened.
    ///
    /// # Errors
    /// When the record is not durable; it is then not in the log either.
    pub fn event(&self, event: &Event<'_>, now: SystemTime) -> Result<Recorded, LogError> {
        self.state().append(&event.body(), now)
    }

    /// Lists the intents without outcome, or with an unknown one, in the order of their records: at open, those of a crash.
    #[must_use]
    pub fn open_intents(&self) -> Vec<OpenIntent> {
        let mut open: Vec<_> = self.state().open.values().cloned().collect();
        open.sort_by_key(|intent| intent.recorded.seq);
        open
    }

    /// Returns the end of the chain, to be kept outside this host.
    #[must_use]
    pub fn head(&self) -> Head {
        self.state().writer.head()
    }

    /// Says which old files are to be removed; nothing is removed yet. A file with an open intent stays.
    ///
    /// # Errors
    /// When a file cannot be read.
    pub fn removal(&self, retention: &Retention, now: SystemTime) -> io::Result<Option<Removal>> {
        let (current, needed) = {
            let state = self.state();
            let needed = state.open.values().map(|intent| intent.recorded.seq).min();
            (state.writer.number(), needed.unwrap_or(u64::MAX))
        };
        Removal::plan(&self.directory, Chain::Changes, (current, needed), retention, now)
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // The writer stays consistent whatever panics: it moves its head only after a sync.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn append(&mut self, body: &Map<String, Value>, now: SystemTime) -> Result<Recorded, LogError> {
        let mut bodies = if self.writer.begins_file() { self.carried() } else { Vec::new() };
        bodies.push(body.clone());
        let Head { seq, hash } = self.writer.append(&bodies, now)?;
        Ok(Recorded { seq, hash })
    }

    /// The beginning of a file: how many intents are open, and each of them.
    fn carried(&self) -> Vec<Map<String, Value>> {
        let count = object([("kind", "file".into()), ("open", self.open.len().into())]);
        let open = self.open.values().map(|intent| {
            object([
                ("kind", "open".into()),
                ("change", intent.change.to_string().into()),
                ("action", intent.action.as_str().into()),
                ("who", intent.who.as_str().into()),
                ("intent_seq", intent.recorded.seq.into()),
                ("intent_hash", HEXLOWER.encode(&intent.recorded.hash).into()),
            ])
        });
        std::iter::once(count).chain(open).collect()
    }
}

/// Says whether a file begins with all intents that were open before it. A crash may have cut that short; then the
/// file before it is read as well.
fn carries_all(bytes: &[u8]) -> bool {
    let mut entries = lines_of(bytes).map(Entry::parse);
    let Some(Some(first)) = entries.next() else { return false };
    let count = first.body.get("open").and_then(Value::as_u64);
    let Some(count) = count.filter(|_| first.text("kind") == Some("file")) else { return false };
    let is_open = |entry: Option<Entry>| entry.is_some_and(|entry| entry.text("kind") == Some("open"));
    (0..count).all(|_| entries.next().is_some_and(is_open))
}

fn follow(open: &mut BTreeMap<ChangeId, OpenIntent>, entry: &Entry, head: Head) {
    let Some(change) = entry.text("change").and_then(|id| id.parse::<ChangeId>().ok()) else { return };
    let text = |field| entry.text(field).unwrap_or_default().to_owned();
    let recorded = match entry.text("kind") {
        Some("intent") => Recorded { seq: head.seq, hash: head.hash },
        Some("open") => match carried_place(entry) {
            Some(recorded) => recorded,
            None => return,
        },
        Some("outcome") if entry.text("outcome") != Some("unknown") => {
            open.remove(&change);
            return;
        }
        _ => return,
    };
    open.insert(change, OpenIntent { change, recorded, action: text("action"), who: text("who") });
}

/// Where a carried intent stands in its chain.
fn carried_place(entry: &Entry) -> Option<Recorded> {
    let seq = entry.body.get("intent_seq")?.as_u64()?;
    let hash = HEXLOWER.decode(entry.text("intent_hash")?.as_bytes()).ok()?.try_into().ok()?;
    Some(Recorded { seq, hash })
}

#[cfg(test)]
mod tests;
