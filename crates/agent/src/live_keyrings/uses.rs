//! When each version was last asked to unwrap, by this process's monotonic
//! time: evidence before a destruction. Noted without a lock on the way of a
//! call, and forgotten when the process ends.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use arc_swap::ArcSwap;
use fleet_kms_keyring::wrapped_dek::WrappedDek;
use fleet_kms_keyring::{ClusterId, Version};

use super::{LiveKeyrings, UnwrapError, Unwrapped};
use crate::authz::{Permit, actions};

/// How long ago a version was used; `None` for what this process has not seen.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct LastUse {
    /// It unwrapped.
    pub unwrapped: Option<Duration>,
    /// It was asked to, and refused because it is disabled.
    pub refused: Option<Duration>,
}

/// The last uses of one cluster's versions.
#[derive(Default)]
pub(super) struct Uses(ArcSwap<BTreeMap<Version, Arc<Entry>>>);

/// Milliseconds since the process began to look, plus one; 0 for never.
#[derive(Default)]
struct Entry {
    unwrapped: AtomicU64,
    refused: AtomicU64,
}

impl Uses {
    fn entry(&self, version: Version) -> Arc<Entry> {
        if let Some(entry) = self.0.load().get(&version) {
            return Arc::clone(entry);
        }
        self.0.rcu(|entries| {
            let mut entries = BTreeMap::clone(entries);
            entries.entry(version).or_default();
            entries
        });
        self.0.load().get(&version).map(Arc::clone).unwrap_or_default()
    }
}

impl LiveKeyrings {
    /// Notes what came of an unwrap.
    pub(crate) fn note_use(
        &self,
        permit: &Permit<actions::Unwrap>,
        wrapped: &[u8],
        result: &Result<Unwrapped, UnwrapError>,
        at: Instant,
    ) {
        let Ok(live) = self.live(permit.cluster()) else { return };
        let at = u64::try_from(at.saturating_duration_since(self.since(at)).as_millis()).unwrap_or(u64::MAX);
        let mark = |time: &AtomicU64| {
            time.fetch_max(at.saturating_add(1), Ordering::Relaxed);
        };
        match result {
            Ok(unwrapped) => mark(&live.uses.entry(unwrapped.version).unwrapped),
            Err(UnwrapError::Disabled) => {
                // Refused by its header, which is therefore one of ours.
                if let Ok(wrapped) = WrappedDek::parse(wrapped) {
                    mark(&live.uses.entry(wrapped.header().version).refused);
                }
            }
            Err(_) => {}
        }
    }

    /// Returns how long ago a version was last used, as far as this process
    /// has seen.
    pub fn last_use(&self, cluster: &ClusterId, version: Version, now: Instant) -> LastUse {
        let clusters = self.clusters.load();
        let Some(live) = clusters.get(cluster) else { return LastUse::default() };
        let looked = now.saturating_duration_since(self.since(now));
        let ago = |time: &AtomicU64| {
            let at = time.load(Ordering::Relaxed).checked_sub(1)?;
            Some(looked.saturating_sub(Duration::from_millis(at)))
        };
        let entries = live.uses.0.load();
        let entry = entries.get(&version);
        LastUse {
            unwrapped: entry.and_then(|entry| ago(&entry.unwrapped)),
            refused: entry.and_then(|entry| ago(&entry.refused)),
        }
    }

    /// Returns for how long this process has looked at what is used.
    pub fn watched(&self, now: Instant) -> Duration {
        now.saturating_duration_since(self.since(now))
    }

    /// When the first who asks came.
    fn since(&self, now: Instant) -> Instant {
        *self.since.get_or_init(|| now)
    }
}
