//! How often each version has wrapped: a hint to rotate early, never a reason
//! to refuse. Counted without a lock on the way of a call; what was counted
//! since the last flush is lost by a crash.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use arc_swap::ArcSwap;
use fleet_kms_keyring::{ClusterId, Version};

use super::LiveKeyrings;

/// Counters that are kept though nothing was counted lately; more versions
/// than this wrap within one flush only by hand.
const KEPT: usize = 4;

/// Wraps by version.
pub type WrapCounts = BTreeMap<Version, u64>;

/// The wraps of one cluster.
#[derive(Default)]
pub(super) struct Wraps {
    /// As the store has it.
    flushed: ArcSwap<WrapCounts>,
    /// Since then, for the few versions that wrap.
    fresh: ArcSwap<Vec<Arc<Counter>>>,
}

struct Counter {
    version: Version,
    count: AtomicU64,
}

impl Wraps {
    /// Starts from what the store has.
    pub(super) fn from_flushed(flushed: WrapCounts) -> Self {
        Self { flushed: ArcSwap::from_pointee(flushed), fresh: ArcSwap::default() }
    }

    /// Counts wraps of one version.
    pub(super) fn count(&self, version: Version, wraps: u64) {
        let known = |counters: &[Arc<Counter>]| {
            let found = counters.iter().find(|counter| counter.version == version);
            found.map(|counter| counter.count.fetch_add(wraps, Ordering::Relaxed)).is_some()
        };
        while !known(&self.fresh.load()) {
            self.fresh.rcu(|counters| {
                let mut counters = Vec::clone(counters);
                if counters.iter().all(|counter| counter.version != version) {
                    counters.push(Arc::new(Counter { version, count: AtomicU64::new(0) }));
                }
                counters
            });
        }
    }

    /// Takes what was counted since the last time.
    fn take(&self) -> WrapCounts {
        let counters = self.fresh.load();
        let taken: WrapCounts = counters
            .iter()
            .map(|counter| (counter.version, counter.count.swap(0, Ordering::Relaxed)))
            .filter(|(_, wraps)| *wraps > 0)
            .collect();
        if counters.len() > KEPT {
            // A call that holds the old list may lose its one wrap: it is a hint.
            self.fresh.store(Arc::default());
        }
        taken
    }

    fn total(&self) -> WrapCounts {
        let mut total = WrapCounts::clone(&self.flushed.load());
        for counter in self.fresh.load().iter() {
            *total.entry(counter.version).or_default() += counter.count.load(Ordering::Relaxed);
        }
        total.retain(|_, wraps| *wraps > 0);
        total
    }

    fn of(&self, version: Version) -> u64 {
        let flushed = self.flushed.load().get(&version).copied().unwrap_or_default();
        let fresh = self.fresh.load();
        let fresh = fresh.iter().filter(|counter| counter.version == version);
        fresh.map(|counter| counter.count.load(Ordering::Relaxed)).sum::<u64>().saturating_add(flushed)
    }
}

impl LiveKeyrings {
    /// Returns how often each version of a cluster has wrapped, as far as this
    /// agent knows; versions that never did are left out.
    pub fn wraps(&self, cluster: &ClusterId) -> WrapCounts {
        self.clusters.load().get(cluster).map(|live| live.wraps.total()).unwrap_or_default()
    }

    /// Returns how often the active version of each cluster has wrapped.
    pub fn active_wraps(&self) -> Vec<(ClusterId, Version, u64)> {
        let clusters = self.clusters.load();
        let active = clusters.iter().map(|(id, live)| {
            let version = live.snapshot.load().keyring.active().version;
            (*id, version, live.wraps.of(version))
        });
        active.collect()
    }

    /// Takes what was counted since the last flush, by cluster.
    pub(crate) fn take_wraps(&self) -> Vec<(ClusterId, WrapCounts)> {
        let clusters = self.clusters.load();
        let taken = clusters.iter().map(|(id, live)| (*id, live.wraps.take()));
        taken.filter(|(_, counts)| !counts.is_empty()).collect()
    }

    /// Puts back what could not be stored.
    pub(crate) fn put_back_wraps(&self, cluster: &ClusterId, counts: &WrapCounts) {
        if let Some(live) = self.clusters.load().get(cluster) {
            counts.iter().for_each(|(version, wraps)| live.wraps.count(*version, *wraps));
        }
    }

    /// Notes what the store has now.
    pub(crate) fn set_flushed_wraps(&self, cluster: &ClusterId, counts: WrapCounts) {
        if let Some(live) = self.clusters.load().get(cluster) {
            live.wraps.flushed.store(Arc::new(counts));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn version(number: u32) -> Version {
        Version::new(number).unwrap()
    }

    #[test]
    fn what_is_taken_is_counted_once_and_what_is_put_back_counts_again() {
        let wraps = Wraps::from_flushed(WrapCounts::from([(version(1), 10)]));
        wraps.count(version(1), 1);
        wraps.count(version(2), 5);
        assert_eq!(wraps.total(), WrapCounts::from([(version(1), 11), (version(2), 5)]));
        let taken = wraps.take();
        assert_eq!(taken, WrapCounts::from([(version(1), 1), (version(2), 5)]));
        assert_eq!(wraps.take(), WrapCounts::new());
        assert_eq!((wraps.of(version(1)), wraps.of(version(2))), (10, 0));
        taken.iter().for_each(|(version, count)| wraps.count(*version, *count));
        assert_eq!((wraps.of(version(1)), wraps.of(version(2))), (11, 5));
    }

    #[test]
    fn no_wrap_is_lost_between_threads_and_flushes() {
        let wraps = Wraps::default();
        let mut taken = 0;
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| (0..10_000).for_each(|n| wraps.count(version(1 + n % 2), 1)));
            }
            for _ in 0..100 {
                taken += wraps.take().values().sum::<u64>();
                std::thread::yield_now();
            }
        });
        assert_eq!(taken + wraps.take().values().sum::<u64>(), 40_000);
    }

    #[test]
    fn counters_of_versions_that_no_longer_wrap_are_dropped() {
        let wraps = Wraps::default();
        (1..=100).for_each(|n| wraps.count(version(n), 1));
        assert_eq!(wraps.take().len(), 100);
        assert!(wraps.fresh.load().is_empty());
    }
}
