//! The chain of data calls: sums per identity, cluster, operation, version and outcome, and a few denials in
//! detail. Counting takes one short lock of one of [`SHARDS`] and never touches the disk.

use std::collections::HashMap;
use std::hash::{BuildHasher, RandomState};
use std::mem;
use std::path::Path;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use serde_json::{Map, Value};

use crate::chain::{Chain, Head, rfc3339};
use crate::record::{hyphenated, object};
use crate::writer::{LogError, Opened, Writer};

/// Locks among which identities are spread.
const SHARDS: usize = 16;
/// Identities that one shard keeps apart between two flushes; further ones are summed under `(others)`.
const IDENTITIES_PER_SHARD: usize = 1024;
/// Most identities that are kept apart between two flushes.
pub const MAX_IDENTITIES: usize = SHARDS * IDENTITIES_PER_SHARD;
/// Most denials in detail between two flushes, whoever calls.
pub const MAX_DETAILS: usize = 100;
/// Most denials in detail between two flushes of one caller.
pub const MAX_DETAILS_EACH: usize = 5;

/// Longest identity or address in a record (a SPIFFE ID has at most 2,048 bytes): no name a caller can choose
/// may make a record too long to be written.
const MAX_NAME: usize = 2048;

const OTHERS: &str = "(others)";

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

/// The data calls of one agent.
pub struct DataLog {
    opened: Opened,
    hasher: RandomState,
    shards: [Mutex<Sums>; SHARDS],
    denials: Mutex<Denials>,
    file: Mutex<File>,
}

struct File {
    writer: Writer,
    /// When the sums that are not yet written began.
    since: SystemTime,
}

/// Per identity few keys, so a list beats a map and a look-up copies no name.
type Sums = HashMap<String, Vec<(Key, Sum)>>;

#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Key {
    cluster: Option<[u8; 16]>,
    operation: &'static str,
    version: Option<u32>,
    outcome: &'static str,
}

#[derive(Clone, Copy, Default)]
struct Sum {
    calls: u64,
    items: u64,
    micros: u64,
    micros_max: u64,
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
    pub fn open(directory: &Path, now: SystemTime) -> Result<Self, LogError> {
        let (writer, opened) = Writer::open_end(directory, Chain::Data)?;
        Ok(Self {
            opened,
            hasher: RandomState::new(),
            shards: Default::default(),
            denials: Mutex::default(),
            file: Mutex::new(File { writer, since: now }),
        })
    }

    /// Returns what opening found in the last file; the caller logs it and records an event among the changes.
    #[must_use]
    pub fn opened(&self) -> &Opened {
        &self.opened
    }

    /// Counts one call that handled `items` keys and took so long.
    pub fn count(&self, call: &Call<'_>, items: u64, took: Duration) {
        let micros = u64::try_from(took.as_micros()).unwrap_or(u64::MAX);
        self.add(call.identity, Key::from(call), Sum { calls: 1, items, micros, micros_max: micros });
    }

    /// Keeps a denial in detail, or drops it if there were many since the last flush.
    pub fn denied(&self, denial: &Denial<'_>, now: SystemTime) {
        let identity = shortened(denial.identity);
        let mut denials = locked(&self.denials);
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

    /// Writes what was counted since the last flush, durably, and returns the number of records. Blocks on
    /// the disk; the caller does it every 10 s and when it stops.
    ///
    /// # Errors
    /// When the records are not durable: nothing is lost, the sums go on and the next flush tries again.
    pub fn flush(&self, now: SystemTime) -> Result<usize, LogError> {
        let mut file = locked(&self.file);
        let sums = self.take_sums();
        let denials = mem::take(&mut *locked(&self.denials));
        if sums.is_empty() && denials.details.is_empty() {
            file.since = now;
            return Ok(0);
        }
        let (from, to) = (rfc3339(file.since), rfc3339(now));
        let lines = sums.iter().map(|(identity, key, sum)| key.body(identity, sum, &from, &to));
        let bodies: Vec<_> = lines.chain(denials.details.iter().cloned()).collect();
        if let Err(error) = file.writer.append(&bodies, now) {
            for (identity, key, sum) in sums {
                self.add(&identity, key, sum);
            }
            self.put_back(denials);
            return Err(error);
        }
        file.since = now;
        Ok(bodies.len())
    }

    /// Returns the end of the chain, to be kept outside this host.
    #[must_use]
    pub fn head(&self) -> Head {
        locked(&self.file).writer.head()
    }

    fn add(&self, identity: &str, key: Key, sum: Sum) {
        let identity = shortened(identity);
        let shard = self.hasher.hash_one(identity) % SHARDS as u64;
        let Some(shard) = usize::try_from(shard).ok().and_then(|index| self.shards.get(index)) else {
            return;
        };
        let mut shard = locked(shard);
        if let Some(keys) = shard.get_mut(identity) {
            return merge(keys, key, sum);
        }
        let identity = if shard.len() < IDENTITIES_PER_SHARD { identity } else { OTHERS };
        merge(shard.entry(identity.to_owned()).or_default(), key, sum);
    }

    /// Takes all sums, in an order that does not depend on a hash.
    fn take_sums(&self) -> Vec<(String, Key, Sum)> {
        let mut sums = Vec::new();
        for shard in &self.shards {
            for (identity, keys) in mem::take(&mut *locked(shard)) {
                sums.extend(keys.into_iter().map(|(key, sum)| (identity.clone(), key, sum)));
            }
        }
        sums.sort_by(|(a, key_a, _), (b, key_b, _)| (a, key_a).cmp(&(b, key_b)));
        sums
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

impl From<&Call<'_>> for Key {
    fn from(call: &Call<'_>) -> Self {
        let Call { cluster, operation, version, outcome, identity: _ } = *call;
        Self { cluster: cluster.copied(), operation, version, outcome }
    }
}

impl Key {
    fn body(&self, identity: &str, sum: &Sum, from: &str, to: &str) -> Map<String, Value> {
        let mut body = object([
            ("kind", "calls".into()),
            ("from", from.into()),
            ("to", to.into()),
            ("identity", identity.into()),
            ("operation", self.operation.into()),
            ("outcome", self.outcome.into()),
            ("calls", sum.calls.into()),
            ("items", sum.items.into()),
            ("micros_total", sum.micros.into()),
            ("micros_max", sum.micros_max.into()),
        ]);
        if let Some(cluster) = &self.cluster {
            body.insert("cluster".into(), hyphenated(cluster).into());
        }
        if let Some(version) = self.version {
            body.insert("version".into(), version.into());
        }
        body
    }
}

fn merge(keys: &mut Vec<(Key, Sum)>, key: Key, more: Sum) {
    let Some((_, sum)) = keys.iter_mut().find(|(found, _)| *found == key) else {
        return keys.push((key, more));
    };
    sum.calls = sum.calls.saturating_add(more.calls);
    sum.items = sum.items.saturating_add(more.items);
    sum.micros = sum.micros.saturating_add(more.micros);
    sum.micros_max = sum.micros_max.max(more.micros_max);
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
