//! Clusters by name and id, in memory. A cluster's id is its identity; its
//! name is a label, unique among live clusters; a retired one keeps it without
//! holding it.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::fmt;
use std::ops::Bound::{Excluded, Unbounded};
use std::str::FromStr;
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard};
use std::time::{Duration, SystemTime};

use arc_swap::ArcSwap;
use fleet_kms_keyring::ClusterId;
use fleet_kms_store::Revision;

use crate::ledger::{Ledger, LedgerError};
use crate::max_offline::MaxOffline;
use crate::records::Record;
use crate::records::payload::ClusterRecord;
use crate::records::rows;
use crate::times::{from_ms, optional};

/// The longest cluster name, as for a DNS label.
pub const MAX_NAME: usize = 63;

/// A cluster's name: a DNS label (RFC 1123).
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ClusterName(String);

/// Not a cluster name.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "{name:?} is not a cluster name: use 1 to 63 of a-z, 0-9 and '-', beginning and ending with a letter or digit, and no UUID"
)]
pub struct InvalidClusterName {
    name: String,
}

impl ClusterName {
    /// Returns the name.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for ClusterName {
    type Err = InvalidClusterName;

    fn from_str(name: &str) -> Result<Self, Self::Err> {
        let label = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit();
        let good = (1..=MAX_NAME).contains(&name.len())
            && name.chars().all(|c| label(c) || c == '-')
            && name.starts_with(label)
            && name.ends_with(label)
            // An id would hide it: both stand in the same place of a path.
            && name.parse::<ClusterId>().is_err();
        if good {
            Ok(Self(name.to_owned()))
        } else {
            Err(InvalidClusterName { name: name.chars().take(MAX_NAME + 1).collect() })
        }
    }
}

impl fmt::Display for ClusterName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// A cluster, live or retired.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LiveClusterName {
    /// Its identity.
    pub id: ClusterId,
    /// Its label.
    pub name: ClusterName,
    /// When it was made.
    pub created: SystemTime,
    /// How long its nodes may be off.
    pub max_offline: MaxOffline,
    /// When it was retired, if it is.
    pub retired: Option<SystemTime>,
    /// Of its record, not of its keyring's.
    pub revision: Revision,
}

/// All clusters of the store.
#[derive(Default)]
pub struct Clusters {
    index: RwLock<Index>,
    /// Looked at on every call, so beside the lock.
    retired: ArcSwap<HashSet<ClusterId>>,
}

#[derive(Default)]
struct Index {
    by_id: HashMap<ClusterId, LiveClusterName>,
    by_name: BTreeSet<(String, ClusterId)>,
}

/// A stored cluster that does not parse.
#[derive(Debug, thiserror::Error)]
pub enum ClusterError {
    /// The store cannot be read.
    #[error(transparent)]
    Ledger(#[from] LedgerError),
    /// A field has no meaning to this release.
    #[error("the cluster in row {row} has a bad {field}")]
    Field { row: String, field: &'static str },
}

impl Clusters {
    /// Reads all clusters from the store. One whose record is damaged goes on
    /// without a name.
    ///
    /// # Errors
    ///
    /// When the store cannot be read or a record has no meaning to this
    /// release.
    pub async fn load(ledger: &Ledger) -> Result<Self, ClusterError> {
        let clusters = Self::default();
        for record in ledger.scan_sound::<ClusterRecord>(rows::CLUSTERS).await? {
            let bad = |field| ClusterError::Field { row: record.row.as_str().to_owned(), field };
            let id = record.payload.id.as_slice().try_into().map_err(|_| bad("id"))?;
            clusters.publish(LiveClusterName {
                id: ClusterId::from_bytes(id),
                name: record.payload.name.parse().map_err(|_| bad("name"))?,
                created: from_ms(record.payload.created_ms),
                max_offline: max_offline(&record)?,
                retired: optional(record.payload.retired_ms),
                revision: record.revision,
            });
        }
        Ok(clusters)
    }

    /// Makes a committed cluster visible, unless a later change is visible
    /// already.
    pub fn publish(&self, cluster: LiveClusterName) {
        let mut index = self.index.write().unwrap_or_else(PoisonError::into_inner);
        let id = cluster.id;
        if let Some(known) = index.by_id.get(&id) {
            if known.revision > cluster.revision {
                return;
            }
            let old = (known.name.to_string(), id);
            index.by_name.remove(&old);
        }
        // Under the index's lock, so that the two never disagree for longer than this.
        if self.retired.load().contains(&id) != cluster.retired.is_some() {
            let mut retired = HashSet::clone(&self.retired.load());
            match cluster.retired {
                Some(_) => retired.insert(id),
                None => retired.remove(&id),
            };
            self.retired.store(Arc::new(retired));
        }
        index.by_name.insert((cluster.name.to_string(), id));
        index.by_id.insert(id, cluster);
    }

    /// Says whether a cluster is retired. Takes no lock.
    pub fn is_retired(&self, id: &ClusterId) -> bool {
        self.retired.load().contains(id)
    }

    /// Returns how many clusters are retired.
    pub fn retired(&self) -> Vec<ClusterId> {
        self.retired.load().iter().copied().collect()
    }

    /// Finds a cluster by its id, or a live one by its name.
    pub fn find(&self, name_or_id: &str) -> Option<LiveClusterName> {
        let index = self.read();
        if let Ok(id) = name_or_id.parse::<ClusterId>() {
            return index.by_id.get(&id).cloned();
        }
        index.named(name_or_id).find(|cluster| cluster.retired.is_none()).cloned()
    }

    /// Finds the retired clusters of this id or that had this name.
    pub fn find_retired(&self, name_or_id: &str) -> Vec<LiveClusterName> {
        let index = self.read();
        if let Ok(id) = name_or_id.parse::<ClusterId>() {
            return index
                .by_id
                .get(&id)
                .filter(|cluster| cluster.retired.is_some())
                .cloned()
                .into_iter()
                .collect();
        }
        index.named(name_or_id).filter(|cluster| cluster.retired.is_some()).cloned().collect()
    }

    /// Returns the name of a cluster.
    pub fn name_of(&self, id: &ClusterId) -> Option<ClusterName> {
        self.read().by_id.get(id).map(|cluster| cluster.name.clone())
    }

    /// Returns up to `limit` clusters after one, or after all of a name, in the
    /// order of their names; the retired ones too if wanted.
    pub fn page(
        &self,
        after: Option<(&str, Option<ClusterId>)>,
        limit: usize,
        with_retired: bool,
    ) -> Vec<LiveClusterName> {
        let index = self.read();
        let last = ClusterId::from_bytes([0xff; 16]);
        let from = after.map(|(name, id)| (name.to_owned(), id.unwrap_or(last)));
        let rest = index.by_name.range((from.map_or(Unbounded, Excluded), Unbounded));
        let clusters = rest.filter_map(|(_, id)| index.by_id.get(id));
        clusters.filter(|cluster| with_retired || cluster.retired.is_none()).take(limit).cloned().collect()
    }

    fn read(&self) -> RwLockReadGuard<'_, Index> {
        self.index.read().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Index {
    fn named<'a>(&'a self, name: &'a str) -> impl Iterator<Item = &'a LiveClusterName> {
        let from = (name.to_owned(), ClusterId::from_bytes([0; 16]));
        let named = self.by_name.range(from..).take_while(move |(known, _)| known == name);
        named.filter_map(|(_, id)| self.by_id.get(id))
    }
}

/// Reads off a cluster's record how long its nodes may be off.
///
/// # Errors
///
/// When no release wrote such a time.
pub fn max_offline(record: &Record<ClusterRecord>) -> Result<MaxOffline, ClusterError> {
    let time = Duration::from_secs(record.payload.max_offline_seconds);
    let bad = |_| ClusterError::Field { row: record.row.as_str().to_owned(), field: "max_offline" };
    MaxOffline::try_new(time).map_err(bad)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cluster(id: u8, name: &str, revision: u64, retired: bool) -> LiveClusterName {
        LiveClusterName {
            id: ClusterId::from_bytes([id; 16]),
            name: name.parse().unwrap(),
            created: from_ms(1),
            max_offline: MaxOffline::DEFAULT,
            retired: retired.then(|| from_ms(2)),
            revision: Revision(revision),
        }
    }

    #[test]
    fn a_retired_cluster_is_found_by_its_id_and_its_name_is_anothers() {
        let clusters = Clusters::default();
        clusters.publish(cluster(1, "north", 1, false));
        clusters.publish(cluster(1, "north", 2, true));
        assert!(clusters.find("north").is_none() && clusters.is_retired(&ClusterId::from_bytes([1; 16])));
        clusters.publish(cluster(2, "north", 3, false));
        assert_eq!(clusters.find("north").unwrap().id, ClusterId::from_bytes([2; 16]));
        assert!(clusters.find(&ClusterId::from_bytes([1; 16]).to_string()).unwrap().retired.is_some());
        assert_eq!(clusters.find_retired("north").len(), 1);
        // A late word of before brings nothing back.
        clusters.publish(cluster(1, "north", 1, false));
        assert!(clusters.is_retired(&ClusterId::from_bytes([1; 16])));
        clusters.publish(cluster(1, "west", 4, false));
        assert!(clusters.find("west").is_some() && clusters.retired().is_empty());
    }

    #[test]
    fn pages_go_on_between_two_clusters_of_one_name() {
        let clusters = Clusters::default();
        for (id, name, retired) in [(1, "a", true), (2, "a", false), (3, "b", false)] {
            clusters.publish(cluster(id, name, 1, retired));
        }
        let ids = |page: Vec<LiveClusterName>| page.iter().map(|c| c.id.as_bytes()[0]).collect::<Vec<_>>();
        assert_eq!(ids(clusters.page(None, 9, true)), [1, 2, 3]);
        assert_eq!(ids(clusters.page(None, 9, false)), [2, 3]);
        assert_eq!(ids(clusters.page(Some(("a", Some(ClusterId::from_bytes([1; 16])))), 9, true)), [2, 3]);
        assert_eq!(ids(clusters.page(Some(("a", None)), 9, true)), [3]);
    }
}
