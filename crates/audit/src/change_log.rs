//! The chain of changes: intent before, outcome after, each durable before its call returns.
//!
//! Its calls block on the disk; an async caller uses a blocking thread.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::SystemTime;

use serde_json::{Map, Value};

use crate::chain::{Chain, Entry, Head};
use crate::writer::{LogError, Opened, Writer};
use crate::{ChangeId, Event, Intent, Outcome, Recorded};

/// The changes of one agent.
pub struct ChangeLog {
    opened: Opened,
    state: Mutex<State>,
}

struct State {
    writer: Writer,
    open: BTreeMap<ChangeId, OpenIntent>,
}

/// An intent whose true outcome is not in the log: a crash, a lost reply, or a commit under way.
#[derive(Clone, Debug, PartialEq)]
pub struct OpenIntent {
    /// The change, to be looked for in the store.
    pub change: ChangeId,
    /// Where the intent is in the chain; the store transaction carries the same.
    pub recorded: Recorded,
    /// What was to be done.
    pub action: String,
    /// Who asked.
    pub who: String,
    /// The whole record, without number, time and link.
    pub body: Map<String, Value>,
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
        let mut open = BTreeMap::new();
        let (writer, opened) = Writer::open(directory, Chain::Changes, |entry, head| {
            follow(&mut open, entry, head);
        })?;
        Ok(Self { opened, state: Mutex::new(State { writer, open }) })
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
            body,
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

    fn state(&self) -> MutexGuard<'_, State> {
        // The writer stays consistent whatever panics: it moves its head only after a sync.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn append(&mut self, body: &Map<String, Value>, now: SystemTime) -> Result<Recorded, LogError> {
        let Head { seq, hash } = self.writer.append(std::slice::from_ref(body), now)?;
        Ok(Recorded { seq, hash })
    }
}

fn follow(open: &mut BTreeMap<ChangeId, OpenIntent>, entry: &Entry, head: Head) {
    let Some(change) = entry.text("change").and_then(|id| id.parse::<ChangeId>().ok()) else { return };
    let text = |field| entry.text(field).unwrap_or_default().to_owned();
    match entry.text("kind") {
        Some("intent") => {
            let recorded = Recorded { seq: head.seq, hash: head.hash };
            let (action, who, body) = (text("action"), text("who"), without_place(&entry.body));
            open.insert(change, OpenIntent { change, recorded, action, who, body });
        }
        Some("outcome") if entry.text("outcome") != Some("unknown") => {
            open.remove(&change);
        }
        _ => {}
    }
}

fn without_place(body: &Map<String, Value>) -> Map<String, Value> {
    let mut body = body.clone();
    body.remove("time");
    body
}

#[cfg(test)]
mod tests;
