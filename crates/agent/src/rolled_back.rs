//! The alarm for a DEK that opens under a version that is still to come: this
//! copy of the store is behind what nodes have seen.
//!
//! The DEK is served. The alarm is raised once for each cluster and version,
//! and the cluster goes on with a fresh version that the lost days cannot have
//! used; while the store is unconfirmed that is left to the operator's word.

use std::collections::HashSet;
use std::sync::{Arc, Mutex, PoisonError};

use fleet_kms_keyring::{ClusterId, Version};

use crate::authz::internal;
use crate::changes::Changes;
use crate::clusters::Clusters;
use crate::control_plane::ControlPlane;
use crate::trail::Event;

/// Raises `store_rolled_back`.
pub struct RolledBack {
    changes: Arc<Changes>,
    control_plane: Arc<ControlPlane>,
    clusters: Arc<Clusters>,
    raised: Mutex<HashSet<(ClusterId, Version)>>,
}

impl RolledBack {
    /// Makes the alarm.
    pub fn new(changes: Arc<Changes>, control_plane: Arc<ControlPlane>, clusters: Arc<Clusters>) -> Self {
        Self { changes, control_plane, clusters, raised: Mutex::default() }
    }

    /// Returns the clusters that it was raised for since the start.
    pub fn clusters(&self) -> Vec<ClusterId> {
        let raised = self.raised.lock().unwrap_or_else(PoisonError::into_inner);
        let mut clusters: Vec<_> = raised.iter().map(|(cluster, _)| *cluster).collect();
        clusters.sort_unstable();
        clusters.dedup();
        clusters
    }

    /// Raises the alarm without keeping the caller waiting.
    pub fn raise(self: &Arc<Self>, cluster: ClusterId, version: Version) {
        let first = self.raised.lock().unwrap_or_else(PoisonError::into_inner).insert((cluster, version));
        if first {
            let alarm = Arc::clone(self);
            tokio::spawn(async move { alarm.act(cluster, version).await });
        }
    }

    async fn act(&self, cluster: ClusterId, version: Version) {
        tracing::error!(%cluster, %version, "store_rolled_back: a value was wrapped under a version that this store has not activated");
        let name = self.clusters.name_of(&cluster).map_or_else(String::new, |name| name.to_string());
        let event = Event::new("store_rolled_back", "agent").cluster(cluster, &name);
        self.changes.event(event.target(format!("version {version}"))).await;
        if self.changes.unconfirmed().is_some() {
            return;
        }
        match self.control_plane.rotate_recovered(&internal::recovery(cluster)).await {
            Ok(rotated) => {
                tracing::warn!(%cluster, version = %rotated.active, "the cluster has a fresh version");
            }
            Err(error) => {
                // The next unwrap under it tries again.
                self.raised.lock().unwrap_or_else(PoisonError::into_inner).remove(&(cluster, version));
                tracing::error!(%cluster, error = crate::errors::chain(&error), "the cluster could not be rotated");
            }
        }
    }
}
