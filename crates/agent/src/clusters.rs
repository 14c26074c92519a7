//! Clusters by name and id, in memory. A cluster's id is its identity; its
//! name is a label, unique among live clusters.

use std::borrow::Borrow;
use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::ops::Bound;
use std::str::FromStr;
use std::sync::{PoisonError, RwLock, RwLockReadGuard};
use std::time::SystemTime;

use fleet_kms_keyring::ClusterId;

use crate::ledger::{Ledger, LedgerError};
use crate::records::payload::ClusterRecord;
use crate::records::rows;
use crate::times::from_ms;

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

/// A name orders and hashes as its text, so that a page can begin after any text.
impl Borrow<str> for ClusterName {
    fn borrow(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for ClusterName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// A live cluster.
#[derive(Debug, Clone)]
pub struct LiveClusterName {
    /// Its identity.
    pub id: ClusterId,
    /// Its label.
    pub name: ClusterName,
    /// When it was made.
    pub created: SystemTime,
}

/// All clusters of the store.
#[derive(Default)]
pub struct Clusters {
    index: RwLock<Index>,
}

/// Both ways to a cluster: no look-up goes through all of them.
#[derive(Default)]
struct Index {
    by_name: BTreeMap<ClusterName, LiveClusterName>,
    names: HashMap<ClusterId, ClusterName>,
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
            });
        }
        Ok(clusters)
    }

    /// Makes a committed cluster visible; a renamed one is found by its new name only.
    pub fn publish(&self, cluster: LiveClusterName) {
        let mut index = self.index.write().unwrap_or_else(PoisonError::into_inner);
        if let Some(old) = index.names.insert(cluster.id, cluster.name.clone()) {
            index.by_name.remove(&old);
        }
        index.by_name.insert(cluster.name.clone(), cluster);
    }

    /// Finds a cluster by name or id.
    pub fn find(&self, name_or_id: &str) -> Option<LiveClusterName> {
        let index = self.index();
        if let Ok(id) = name_or_id.parse::<ClusterId>() {
            return index.by_name.get(index.names.get(&id)?).cloned();
        }
        index.by_name.get(name_or_id).cloned()
    }

    /// Returns the name of a cluster.
    pub fn name_of(&self, id: &ClusterId) -> Option<ClusterName> {
        self.index().names.get(id).cloned()
    }

    /// Returns up to `limit` clusters after a name, in the order of their
    /// names.
    pub fn page(&self, after: Option<&str>, limit: usize) -> Vec<LiveClusterName> {
        let index = self.index();
        let from = after.map_or(Bound::Unbounded, Bound::Excluded);
        let rest = index.by_name.range::<str, _>((from, Bound::Unbounded));
        rest.take(limit).map(|(_, cluster)| cluster.clone()).collect()
    }

    fn index(&self) -> RwLockReadGuard<'_, Index> {
        self.index.read().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use std::time::UNIX_EPOCH;

    use super::*;

    fn cluster(id: u8, name: &str) -> LiveClusterName {
        LiveClusterName {
            id: ClusterId::from_bytes([id; 16]),
            name: name.parse().unwrap(),
            created: UNIX_EPOCH,
        }
    }

    fn names(page: &[LiveClusterName]) -> Vec<&str> {
        page.iter().map(|cluster| cluster.name.as_str()).collect()
    }

    #[test]
    fn a_page_begins_after_any_text_and_a_cluster_is_found_both_ways() {
        let clusters = Clusters::default();
        for (id, name) in [(1, "b"), (2, "a"), (3, "c")] {
            clusters.publish(cluster(id, name));
        }
        assert_eq!(names(&clusters.page(None, 2)), ["a", "b"]);
        assert_eq!(names(&clusters.page(Some("a"), 9)), ["b", "c"]);
        assert_eq!(names(&clusters.page(Some("a no name"), 9)), ["b", "c"]);
        assert!(clusters.page(Some("c"), 9).is_empty());
        let id = ClusterId::from_bytes([3; 16]);
        assert_eq!(clusters.find(&id.to_string()).unwrap().name.as_str(), "c");
        assert_eq!(clusters.name_of(&id).unwrap().as_str(), "c");
        assert_eq!(clusters.find("b").unwrap().id, ClusterId::from_bytes([1; 16]));
        assert!(clusters.find("B!").is_none());
    }

    #[test]
    fn a_renamed_cluster_has_one_name() {
        let clusters = Clusters::default();
        clusters.publish(cluster(1, "old"));
        clusters.publish(cluster(1, "new"));
        assert!(clusters.find("old").is_none());
        assert_eq!(names(&clusters.page(None, 9)), ["new"]);
    }
}
