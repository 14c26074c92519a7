//! The chain of data calls: sums, or a record for each call, and a few denials in detail.
//!
//! Counting takes one short lock and never touches the disk. What cannot be written is not forgotten: it goes into the
//! sums, and a gap record says from when to when that was so.

use std::collections::HashMap;
use std::io;
use std::mem;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use serde::Serialize;
use serde_json::{Map, Value};

use crate::chain::{Chain, Head, rfc3339};
use crate::record::object;
use crate::retention::{Removal, Retention};
use crate::writer::{LogError, MAX_FILE, Opened, Sync, Writer};

mod sums;
mod each;

pub use each::Done;
use each::{Item, Queue, Threads};
pub use sums::MAX_IDENTITIES;
use sums::{Key, Sum, Sums};

/// Most denials in detail between two flushes, whoever calls.
pub const MAX_DETAILS: usize = 100;
/// Most denials in detail between two flushes of one caller.
pub const MAX_DETAILS_EACH: usize = 5;
/// In [`DataMode::EachWritten`], no call is answered while an older record waits for its sync longer than this.
pub const MAX_UNSYNCED: Duration = Duration::from_millis(50);

/// Longest identity or address in a record (a SPIFFE ID has at most 2,048 bytes): no name a caller can choose
/// may make a record too long to be written.
const MAX_NAME: usize = 2048;

/// How data calls are recorded.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum DataMode {
    /// Summed up; a crash loses what was counted since the last flush.
    #[default]
    Summary,
    /// One record each, handed to the kernel before the answer; a power cut loses [`MAX_UNSYNCED`] at most.
    EachWritten,
    /// One record each, durable before the answer.
    EachDurable,
}

/// What to do with data calls that cannot be recorded.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum OnFull {
    /// Answer them, count them in memory, and say so in the chain as soon as it can be written.
    #[default]
    Serve,
    /// Refuse them.
    Refuse,
}

/// How a [`DataLog`] works.
#[derive(Clone, Copy, Debug)]
pub struct DataOptions {
    /// How calls are recorded.
    pub mode: DataMode,
    /// What happens when they cannot be.
    pub on_full: OnFull,
    /// A file that has so many bytes is followed by the next.
    pub max_file: u64,
}

impl Default for DataOptions {
    fn default() -> Self {
        Self { mode: DataMode::default(), on_full: OnFull::default(), max_file: MAX_FILE }
    }
}

/// The clocks of a [`DataLog`].
#[derive(Clone)]
pub struct Clocks {
    /// The time in records.
    pub wall: Arc<dyn Fn() -> SystemTime + Send + std::marker::Sync>,
    /// The time that passes.
    pub monotonic: fn() -> Instant,
}

/// What is counted together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Call<'a> {
    /// The caller's SPIFFE ID, or its address if it has none.
    pub identity: &'a str,
    /// The id of the caller's cluster.
    pub cluster: Option<&'a [u8; 16]>,
    /// Such as `unwrap`.
    pub operation: &'static str,
    /// The key version used, when one was.
    pub version: Option<u32>,
    /// Such as `ok` or `denied`.
    pub outcome: &'static str,
}

/// A call that gets a record of its own.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CallRecord {
    /// The caller's SPIFFE ID.
    pub identity: Arc<str>,
    /// The id of the caller's cluster.
    pub cluster: Option<[u8; 16]>,
    /// Such as `unwrap`.
    pub operation: &'static str,
    /// The key version used, when one was.
    pub version: Option<u32>,
    /// Such as `ok`.
    pub outcome: &'static str,
    /// How many keys it handled.
    pub items: u64,
    /// How long it took.
    pub took: Duration,
}

/// A refused caller, in detail. Denials are also counted, through [`DataLog::count`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Denial<'a> {
    /// The caller's SPIFFE ID, or its address if it has none.
    pub identity: &'a str,
    /// Where it called from.
    pub address: &'a str,
    /// What it asked for.
    pub operation: &'static str,
    /// Why it was refused.
    pub reason: &'static str,
}

/// A call could not be recorded and [`OnFull::Refuse`] says that it must be refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the call cannot be recorded in the audit; look at the audit's disk")]
pub struct NotRecorded;

/// What a [`DataLog`] has to tell an operator.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DataState {
    /// The chain cannot be written at present.
    pub failing: bool,
    /// Calls that were answered without a record of their own since the start.
    pub unrecorded: u64,
    /// Calls that were refused because they could not be recorded since the start.
    pub refused: u64,
}

/// The data calls of one agent.
pub struct DataLog {
    directory: PathBuf,
    opened: Opened,
    shared: Arc<Shared>,
    _threads: Threads,
}

struct Shared {
    mode: DataMode,
    on_full: OnFull,
    clocks: Clocks,
    sums: Sums,
    denials: Mutex<Denials>,
    queue: Queue,
    file: Mutex<File>,
    /// Told when something begins to wait for a sync.
    unsynced: Condvar,
    failing: AtomicBool,
    unrecorded: AtomicU64,
    refused: AtomicU64,
}

struct File {
    writer: Writer,
    /// When the sums that are not yet written began.
    since: SystemTime,
    /// When the first record that waits for a sync was written.
    unsynced_since: Option<Instant>,
    sync_failed: bool,
    gap: Option<Gap>,
    stopped: bool,
}

/// A time in which the chain could not be written.
struct Gap {
    from: SystemTime,
    calls: u64,
}

#[derive(Default)]
struct Denials {
    details: Vec<Map<String, Value>>,
    each: HashMap<String, usize>,
}

impl DataLog {
    /// Opens the chain in a directory, which is created if need be, and continues it.
    ///
    /// # Errors
    /// When another process has it open, or the file system refuses.
    pub fn open(directory: &Path, options: DataOptions, clocks: Clocks) -> Result<Self, LogError> {
        let (writer, opened) = Writer::open_end(directory, Chain::Data, options.max_file)?;
        let since = (clocks.wall)();
        let file =
            File { writer, since, unsynced_since: None, sync_failed: false, gap: None, stopped: false };
        let shared = Arc::new(Shared {
            mode: options.mode,
            on_full: options.on_full,
            clocks,
            sums: Sums::default(),
            denials: Mutex::default(),
            queue: Queue::default(),
            file: Mutex::new(file),
            unsynced: Condvar::new(),
            failing: AtomicBool::new(false),
            unrecorded: AtomicU64::new(0),
            refused: AtomicU64::new(0),
        });
        let threads = Threads::start(&shared)?;
        Ok(Self { directory: directory.to_owned(), opened, shared, _threads: threads })
    }

    /// Returns what opening found in the last file; the caller logs it and records an event among the changes.
    #[must_use]
    pub fn opened(&self) -> &Opened {
        &self.opened
    }

    /// Says whether each permitted call gets a record of its own, by [`Self::record`].
    #[must_use]
    pub fn records_each(&self) -> bool {
        self.shared.mode != DataMode::Summary
    }

    /// Says whether calls are to be refused at once: they cannot be recorded.
    #[must_use]
    pub fn refuses(&self) -> bool {
        let refuses = self.shared.on_full == OnFull::Refuse && self.shared.failing.load(Ordering::Relaxed);
        if refuses {
            self.shared.refused.fetch_add(1, Ordering::Relaxed);
        }
        refuses
    }

    /// Says whether a call may be answered whose record takes too long: the disk hangs.
    ///
    /// # Errors
    /// When it must be refused.
    pub fn late(&self) -> Result<(), NotRecorded> {
        match self.shared.on_full {
            OnFull::Serve => Ok(()),
            OnFull::Refuse => {
                self.shared.refused.fetch_add(1, Ordering::Relaxed);
                Err(NotRecorded)
            }
        }
    }

    /// Returns what an operator has to know.
    #[must_use]
    pub fn state(&self) -> DataState {
        DataState {
            failing: self.shared.failing.load(Ordering::Relaxed),
            unrecorded: self.shared.unrecorded.load(Ordering::Relaxed),
            refused: self.shared.refused.load(Ordering::Relaxed),
        }
    }

    /// Counts one call that handled `items` keys and took so long.
    pub fn count(&self, call: &Call<'_>, items: u64, took: Duration) {
        self.shared.count(call, items, took);
    }

    /// Records the parts of one call, each with a record of its own; `done` is told when they are recorded as the mode
    /// says, maybe at once, and must not block.
    pub fn record(&self, calls: Vec<CallRecord>, done: Done) {
        let item = Item { calls, done };
        let refused = if self.shared.failing.load(Ordering::Relaxed) {
            Err(item)
        } else {
            self.shared.queue.push(item)
        };
        if let Err(Item { calls, done }) = refused {
            done(self.shared.unrecorded(&calls, (self.shared.clocks.wall)()));
        }
    }

    /// Keeps a denial in detail, or drops it if there were many since the last flush.
    pub fn denied(&self, denial: &Denial<'_>, now: SystemTime) {
        let identity = shortened(denial.identity);
        let mut denials = locked(&self.shared.denials);
        if denials.details.len() >= MAX_DETAILS {
            return;
        }
        let seen = denials.each.entry(identity.to_owned()).or_default();
        *seen += 1;
        if *seen > MAX_DETAILS_EACH {
            return;
        }
        denials.details.push(object([
            ("kind", "denied".into()),
            ("at", rfc3339(now).into()),
            ("identity", identity.into()),
            ("address", shortened(denial.address).into()),
            ("operation", denial.operation.into()),
            ("reason", denial.reason.into()),
        ]));
    }

    /// Writes what was counted since the last flush, and returns the number of records; they are durable, or in
    /// [`DataMode::EachWritten`] soon will be. Blocks on the disk; the caller does it from time to time, more often
    /// while [`DataState::failing`], and when it stops.
    ///
    /// # Errors
    /// When the records cannot be written: nothing is lost, the sums go on and the next flush tries again.
    pub fn flush(&self, now: SystemTime) -> Result<usize, LogError> {
        let shared = &*self.shared;
        let mut file = locked(&shared.file);
        let sums = shared.sums.take();
        let denials = mem::take(&mut *locked(&shared.denials));
        if sums.is_empty() && denials.details.is_empty() && file.gap.is_none() {
            file.since = now;
            return Ok(0);
        }
        let (from, to) = (rfc3339(file.since), rfc3339(now));
        let gap = file.gap.as_ref().map(|gap| gap.body(&to, shared.on_full));
        let lines = sums.iter().map(|(identity, key, sum)| key.body(identity, sum, &from, &to));
        let bodies: Vec<_> = gap.into_iter().chain(lines).chain(denials.details.iter().cloned()).collect();
        if let Err(error) = file.put(&bodies, now, shared) {
            for (identity, key, sum) in sums {
                shared.sums.add(&identity, key, sum);
            }
            shared.put_back(denials);
            return Err(error);
        }
        file.since = now;
        file.gap = None;
        shared.failing.store(false, Ordering::Relaxed);
        Ok(bodies.len())
    }

    /// Returns the end of the chain that is durable, to be kept outside this host.
    #[must_use]
    pub fn head(&self) -> Head {
        locked(&self.shared.file).writer.durable()
    }

    /// Says which old files are to be removed; nothing is removed yet.
    ///
    /// # Errors
    /// When a file cannot be read.
    pub fn removal(&self, retention: &Retention, now: SystemTime) -> io::Result<Option<Removal>> {
        let current = locked(&self.shared.file).writer.number();
        Removal::plan(&self.directory, Chain::Data, (current, u64::MAX), retention, now)
    }
}

impl Shared {
    fn count(&self, call: &Call<'_>, items: u64, took: Duration) {
        let micros = u64::try_from(took.as_micros()).unwrap_or(u64::MAX);
        self.sums.add(call.identity, Key::from(call), Sum { calls: 1, items, micros, micros_max: micros });
    }

    /// Counts calls that have no record of their own, and says whether they may be answered.
    fn unrecorded(&self, calls: &[CallRecord], now: SystemTime) -> Result<(), NotRecorded> {
        let refused = self.on_full == OnFull::Refuse;
        for call in calls {
            let outcome = if refused { "audit_full" } else { call.outcome };
            let (cluster, identity) = (call.cluster.as_ref(), &*call.identity);
            let CallRecord { operation, version, items, took, .. } = *call;
            self.count(&Call { identity, cluster, operation, version, outcome }, items, took);
        }
        locked(&self.file).gap(now, self).calls += 1;
        let counter = if refused { &self.refused } else { &self.unrecorded };
        counter.fetch_add(1, Ordering::Relaxed);
        if refused { Err(NotRecorded) } else { Ok(()) }
    }

    fn put_back(&self, earlier: Denials) {
        let mut denials = locked(&self.denials);
        let later = mem::replace(&mut denials.details, earlier.details);
        denials.details.extend(later);
        denials.details.truncate(MAX_DETAILS);
        for (identity, seen) in earlier.each {
            *denials.each.entry(identity).or_default() += seen;
        }
    }
}

impl File {
    /// Writes records as the mode says.
    fn put(&mut self, bodies: &[impl Serialize], now: SystemTime, shared: &Shared) -> Result<Head, LogError> {
        let put = match shared.mode {
            DataMode::EachWritten => self.write(bodies, now, shared),
            DataMode::Summary | DataMode::EachDurable => self.writer.append(bodies, now),
        };
        if put.is_err() {
            self.gap(now, shared);
        }
        put
    }

    fn write(
        &mut self,
        bodies: &[impl Serialize],
        now: SystemTime,
        shared: &Shared,
    ) -> Result<Head, LogError> {
        let monotonic = shared.clocks.monotonic;
        let age = self.unsynced_since.map(|since| monotonic().saturating_duration_since(since));
        if self.sync_failed || age.is_some_and(|age| age > MAX_UNSYNCED) {
            self.sync(shared)?;
        }
        let head = self.writer.write(bodies, now)?;
        if self.unsynced_since.is_none() {
            self.unsynced_since = Some(monotonic());
            shared.unsynced.notify_all();
        }
        Ok(head)
    }

    fn sync(&mut self, shared: &Shared) -> io::Result<()> {
        let result = self.writer.sync();
        self.sync_failed = result.is_err();
        if result.is_ok() {
            self.unsynced_since = None;
        } else {
            self.gap((shared.clocks.wall)(), shared);
        }
        result
    }

    /// Takes note of a sync that began at `began` without holding the file.
    fn synced(&mut self, sync: &Sync, succeeded: bool, began: Instant, shared: &Shared) {
        self.writer.end_sync(sync, succeeded);
        if !succeeded {
            self.sync_failed = true;
            self.gap((shared.clocks.wall)(), shared);
        } else if self.writer.is_unsynced() {
            self.unsynced_since = self.unsynced_since.map(|since| since.max(began));
        } else {
            self.unsynced_since = None;
        }
    }

    /// The gap that is open, from now on if there was none.
    fn gap(&mut self, now: SystemTime, shared: &Shared) -> &mut Gap {
        shared.failing.store(true, Ordering::Relaxed);
        self.gap.get_or_insert(Gap { from: now, calls: 0 })
    }
}

impl Gap {
    fn body(&self, to: &str, on_full: OnFull) -> Map<String, Value> {
        let calls = match on_full {
            OnFull::Serve => "served",
            OnFull::Refuse => "refused",
        };
        object([
            ("kind", "gap".into()),
            ("from", rfc3339(self.from).into()),
            ("to", to.into()),
            ("calls", self.calls.into()),
            ("were", calls.into()),
        ])
    }
}

fn shortened(name: &str) -> &str {
    name.get(..name.floor_char_boundary(MAX_NAME)).unwrap_or_default()
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Sums are sums after a panic, too.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests;
