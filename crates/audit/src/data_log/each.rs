//! One record for each call: a queue, a thread that writes what is in it at once, and a thread that syncs.
//!
//! Callers wait for their record through a function that the writing thread calls; no thread of theirs ever waits for
//! the disk. What piles up while the disk works is written, and in [`DataMode::EachDurable`] synced, together.

use std::mem;
use std::sync::{Arc, Condvar, Mutex};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use serde::Serialize;

use super::{CallRecord, DataMode, NotRecorded, Shared, locked};
use crate::record::hyphenated;

/// Calls whose record waits to be written; more than the agent has under way.
const MAX_QUEUED: usize = 8192;
/// A sync begins so long after the first record that waits for it.
const SYNC_AFTER: Duration = Duration::from_millis(25);

/// Told what became of the record of a call.
pub type Done = Box<dyn FnOnce(Result<(), NotRecorded>) + Send>;

/// The records of one call.
pub(super) struct Item {
    pub(super) calls: Vec<CallRecord>,
    pub(super) done: Done,
}

#[derive(Default)]
pub(super) struct Queue {
    state: Mutex<State>,
    filled: Condvar,
}

#[derive(Default)]
struct State {
    items: Vec<Item>,
    stopped: bool,
}

impl Queue {
    /// Adds a call, or gives it back.
    pub(super) fn push(&self, item: Item) -> Result<(), Item> {
        let mut state = locked(&self.state);
        if state.stopped || state.items.len() >= MAX_QUEUED {
            return Err(item);
        }
        state.items.push(item);
        drop(state);
        self.filled.notify_one();
        Ok(())
    }

    /// Waits for calls and takes all of them; none once it is stopped and empty.
    fn take(&self) -> Vec<Item> {
        let mut state = locked(&self.state);
        while state.items.is_empty() && !state.stopped {
            state = self.filled.wait(state).unwrap_or_else(std::sync::PoisonError::into_inner);
        }
        mem::take(&mut state.items)
    }

    fn stop(&self) {
        locked(&self.state).stopped = true;
        self.filled.notify_all();
    }
}

/// The threads; they end, with all written and synced, when this is dropped.
pub(super) struct Threads {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
}

impl Threads {
    pub(super) fn start(shared: &Arc<Shared>) -> std::io::Result<Self> {
        let mut threads = Vec::new();
        let spawn = |name: &str, run: fn(&Shared)| {
            let shared = Arc::clone(shared);
            thread::Builder::new().name(name.to_owned()).spawn(move || run(&shared))
        };
        if shared.mode != DataMode::Summary {
            threads.push(spawn("audit-write", write_all)?);
        }
        if shared.mode == DataMode::EachWritten {
            threads.push(spawn("audit-sync", sync_all)?);
        }
        Ok(Self { shared: Arc::clone(shared), threads })
    }
}

impl Drop for Threads {
    fn drop(&mut self) {
        self.shared.queue.stop();
        let mut threads = mem::take(&mut self.threads).into_iter();
        // The writer first: what it still writes is to be synced.
        let ended = threads.next().map(JoinHandle::join);
        locked(&self.shared.file).stopped = true;
        self.shared.unsynced.notify_all();
        drop((ended, threads.map(JoinHandle::join).collect::<Vec<_>>()));
    }
}

fn write_all(shared: &Shared) {
    loop {
        let items = shared.queue.take();
        if items.is_empty() {
            return;
        }
        let lines: Vec<_> = items.iter().flat_map(|item| &item.calls).map(Line::from).collect();
        let now = (shared.clocks.wall)();
        let written = locked(&shared.file).put(&lines, now, shared);
        for Item { calls, done } in items {
            match &written {
                Ok(_) => done(Ok(())),
                Err(_) => done(shared.unrecorded(&calls, now)),
            }
        }
    }
}

fn sync_all(shared: &Shared) {
    let mut file = locked(&shared.file);
    loop {
        let age =
            file.unsynced_since.map(|since| (shared.clocks.monotonic)().saturating_duration_since(since));
        let pause = match age {
            _ if file.stopped => {
                // Nobody is left to be told; what is written survives this process.
                _ = file.sync(shared);
                return;
            }
            // After a failure the next record, or the next flush, tries again.
            Some(_) if file.sync_failed => None,
            Some(age) if age >= SYNC_AFTER => Some(Duration::ZERO),
            Some(age) => Some(SYNC_AFTER.saturating_sub(age)),
            None => None,
        };
        file = match pause {
            None => shared.unsynced.wait(file).unwrap_or_else(std::sync::PoisonError::into_inner),
            Some(Duration::ZERO) => {
                let (sync, began) = (file.writer.begin_sync(), (shared.clocks.monotonic)());
                drop(file);
                let result = sync.wait();
                let mut file = locked(&shared.file);
                file.synced(&sync, result.is_ok(), began, shared);
                file
            }
            Some(pause) => {
                let waited = shared.unsynced.wait_timeout(file, pause);
                waited.unwrap_or_else(std::sync::PoisonError::into_inner).0
            }
        };
    }
}

/// A record as it is written; its members stand in the order of their names, as in every record.
#[derive(Serialize)]
struct Line<'a> {
    #[serde(skip_serializing_if = "Option::is_none")]
    cluster: Option<String>,
    identity: &'a str,
    items: u64,
    kind: &'static str,
    micros: u64,
    operation: &'static str,
    outcome: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    version: Option<u32>,
}

impl<'a> From<&'a CallRecord> for Line<'a> {
    fn from(call: &'a CallRecord) -> Self {
        Self {
            cluster: call.cluster.as_ref().map(hyphenated),
            identity: super::shortened(&call.identity),
            items: call.items,
            kind: "call",
            micros: u64::try_from(call.took.as_micros()).unwrap_or(u64::MAX),
            operation: call.operation,
            outcome: call.outcome,
            version: call.version,
        }
    }
}
