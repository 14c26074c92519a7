//! Calls summed per identity, cluster, operation, version and outcome. Adding takes one short lock of one of
//! [`SHARDS`] and never touches the disk.

use std::collections::HashMap;
use std::hash::{BuildHasher, RandomState};
use std::mem;
use std::sync::Mutex;

use serde_json::{Map, Value};

use super::{Call, locked, shortened};
use crate::record::{hyphenated, object};

/// Locks among which identities are spread.
pub(super) const SHARDS: usize = 16;
/// Identities that one shard keeps apart between two flushes; further ones are summed under `(others)`.
const IDENTITIES_PER_SHARD: usize = 1024;
/// Most identities that are kept apart between two flushes.
pub const MAX_IDENTITIES: usize = SHARDS * IDENTITIES_PER_SHARD;

const OTHERS: &str = "(others)";

/// What was counted since the last flush. Per identity few keys, so a list beats a map and a look-up copies no name.
#[derive(Default)]
pub(super) struct Sums {
    hasher: RandomState,
    shards: [Mutex<Shard>; SHARDS],
}

type Shard = HashMap<String, Vec<(Key, Sum)>>;

#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Key {
    cluster: Option<[u8; 16]>,
    operation: &'static str,
    version: Option<u32>,
    outcome: &'static str,
}

#[derive(Clone, Copy, Default)]
pub(super) struct Sum {
    pub(super) calls: u64,
    pub(super) items: u64,
    pub(super) micros: u64,
    pub(super) micros_max: u64,
}

impl Sums {
    pub(super) fn add(&self, identity: &str, key: Key, sum: Sum) {
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
    pub(super) fn take(&self) -> Vec<(String, Key, Sum)> {
        let mut sums = Vec::new();
        for shard in &self.shards {
            for (identity, keys) in mem::take(&mut *locked(shard)) {
                sums.extend(keys.into_iter().map(|(key, sum)| (identity.clone(), key, sum)));
            }
        }
        sums.sort_by(|(a, key_a, _), (b, key_b, _)| (a, key_a).cmp(&(b, key_b)));
        sums
    }
}

impl From<&Call<'_>> for Key {
    fn from(call: &Call<'_>) -> Self {
        let Call { cluster, operation, version, outcome, identity: _ } = *call;
        Self { cluster: cluster.copied(), operation, version, outcome }
    }
}

impl Key {
    pub(super) fn body(&self, identity: &str, sum: &Sum, from: &str, to: &str) -> Map<String, Value> {
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
