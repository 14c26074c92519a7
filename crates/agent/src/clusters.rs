//! Clusters by name and id, in memory. A cluster's id is its identity; its
//! name is a label, unique among live clusters.

use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;
use std::sync::{PoisonError, RwLock};
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
    by_name: RwLock<BTreeMap<ClusterName, LiveClusterName>>,
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

    /// Makes a committed cluster visible.
    pub fn publish(&self, cluster: LiveClusterName) {
        let mut by_name = self.by_name.write().unwrap_or_else(PoisonError::into_inner);
        by_name.insert(cluster.name.clone(), cluster);
    }

    /// Finds a cluster by name or id.
    pub fn find(&self, name_or_id: &str) -> Option<LiveClusterName> {
        let by_name = self.by_name.read().unwrap_or_else(PoisonError::into_inner);
        if let Ok(id) = name_or_id.parse::<ClusterId>() {
            return by_name.values().find(|cluster| cluster.id == id).cloned();
        }
        by_name.get(&name_or_id.parse().ok()?).cloned()
    }

    /// Returns the name of a cluster.
    pub fn name_of(&self, id: &ClusterId) -> Option<ClusterName> {
        let by_name = self.by_name.read().unwrap_or_else(PoisonError::into_inner);
        by_name.values().find(|cluster| cluster.id == *id).map(|cluster| cluster.name.clone())
    }

    /// Returns up to `limit` clusters after a name, in the order of their
    /// names.
    pub fn page(&self, after: Option<&str>, limit: usize) -> Vec<LiveClusterName> {
        let by_name = self.by_name.read().unwrap_or_else(PoisonError::into_inner);
        let after = |cluster: &&LiveClusterName| after.is_none_or(|after| cluster.name.as_str() > after);
        by_name.values().filter(after).take(limit).cloned().collect()
    }
}
