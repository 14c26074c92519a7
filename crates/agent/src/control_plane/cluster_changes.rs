//! A cluster is retired, restored or renamed, or its nodes may be off for
//! longer. None of it touches a key: what was ever wrapped can be read again
//! once the cluster is back.

use fleet_kms_keyring::ClusterId;
use fleet_kms_store::Revision;

use super::{ControlPlane, Stale, Wish};
use crate::authz::{Action, Permit, actions};
use crate::changes::ChangeError;
use crate::clusters::{self, ClusterError, ClusterName, InvalidClusterName, LiveClusterName};
use crate::ledger::{Changeset, LedgerError};
use crate::max_offline::MaxOffline;
use crate::records::payload::{ClusterRecord, KeyringRecord, NameRecord};
use crate::records::{Record, rows};
use crate::times::{from_ms, optional, to_ms};
use crate::trail::Intent;

/// What is to become of a cluster.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ClusterChange {
    /// Its calls are refused and its name is free.
    Retire,
    /// It is live again, under its name or another.
    Restore(Option<ClusterName>),
    /// It has another name.
    Rename(ClusterName),
    /// Its nodes may be off for so long.
    MaxOffline(MaxOffline),
}

/// Why a cluster was not changed.
#[derive(Debug, thiserror::Error)]
pub enum ClusterChangeError {
    /// There is none.
    #[error("there is no such cluster")]
    Unknown,
    /// Its record is damaged.
    #[error(transparent)]
    Cluster(#[from] ClusterError),
    /// The name is not one.
    #[error(transparent)]
    Name(#[from] InvalidClusterName),
    /// A live cluster has the name.
    #[error("a cluster named {0} exists already")]
    Taken(ClusterName),
    /// Only a live one can become that.
    #[error("the cluster is retired")]
    Retired,
    /// Only a retired one can become that.
    #[error("the cluster is not retired")]
    Live,
    /// The caller decided on an older state.
    #[error(transparent)]
    Stale(#[from] Stale),
    /// The store cannot be read.
    #[error(transparent)]
    Ledger(#[from] LedgerError),
}

/// An action whose permit allows a change of a cluster itself, apart from its keys.
pub trait ChangesCluster: Action {
    /// Says whether it allows this one.
    fn allows(change: &ClusterChange) -> bool;
}

impl ChangesCluster for actions::ClusterRetire {
    fn allows(change: &ClusterChange) -> bool {
        matches!(change, ClusterChange::Retire)
    }
}
impl ChangesCluster for actions::ClusterRestore {
    fn allows(change: &ClusterChange) -> bool {
        matches!(change, ClusterChange::Restore(_))
    }
}
impl ChangesCluster for actions::ClusterRename {
    fn allows(change: &ClusterChange) -> bool {
        matches!(change, ClusterChange::Rename(_))
    }
}
impl ChangesCluster for actions::MaxOfflineSet {
    fn allows(change: &ClusterChange) -> bool {
        matches!(change, ClusterChange::MaxOffline(_))
    }
}

impl ControlPlane {
    /// Changes a cluster as its permit's action says. Renewals judge by a new
    /// `max_offline` at once.
    ///
    /// # Errors
    ///
    /// When the cluster's state, the name, the wished revision or the store
    /// refuse, or the change is not the permit's.
    pub async fn change_cluster<A: ChangesCluster>(
        &self,
        permit: &Permit<A>,
        change: &ClusterChange,
        wish: Wish<'_>,
    ) -> Result<LiveClusterName, ChangeError<ClusterChangeError>> {
        assert!(A::allows(change), "a permit is for its own change");
        let mut intent = self.key_intent(A::ID, permit).reason(wish.reason);
        match change {
            ClusterChange::Restore(Some(name)) | ClusterChange::Rename(name) => {
                intent = intent.detail("name", name.to_string());
            }
            ClusterChange::MaxOffline(wished) => {
                intent = intent.detail("max_offline_seconds", wished.time().as_secs().to_string());
            }
            ClusterChange::Retire | ClusterChange::Restore(None) => {}
        }
        self.commit_cluster(intent, permit.cluster(), change, wish).await
    }

    async fn commit_cluster(
        &self,
        intent: Intent,
        cluster: ClusterId,
        change: &ClusterChange,
        wish: Wish<'_>,
    ) -> Result<LiveClusterName, ChangeError<ClusterChangeError>> {
        let prepare = || self.prepare_cluster_change(cluster, change, wish);
        let publish = |changed, revision| {
            let changed = LiveClusterName { revision, ..changed };
            self.clusters.publish(changed.clone());
            changed
        };
        self.changes.run_applied(intent, prepare, publish).await
    }

    /// Says what a change would make of a cluster, and changes nothing.
    ///
    /// # Errors
    ///
    /// As [`Self::change_cluster`].
    pub async fn check_cluster_change(
        &self,
        cluster: ClusterId,
        change: &ClusterChange,
        wish: Wish<'_>,
    ) -> Result<LiveClusterName, ClusterChangeError> {
        self.prepare_cluster_change(cluster, change, wish).await.map(|(_, changed)| changed)
    }

    /// Says whether a cluster is retired.
    pub fn is_retired(&self, cluster: &ClusterId) -> bool {
        self.clusters.is_retired(cluster)
    }

    async fn prepare_cluster_change(
        &self,
        id: ClusterId,
        change: &ClusterChange,
        wish: Wish<'_>,
    ) -> Result<(Changeset, LiveClusterName), ClusterChangeError> {
        let ledger = self.changes.ledger();
        let record = ledger.read::<ClusterRecord>(&rows::cluster(&id)).await?;
        let record = record.ok_or(ClusterChangeError::Unknown)?;
        if wish.at.is_some() {
            let keyring = ledger.read::<KeyringRecord>(&rows::keyring(&id)).await?;
            wish.check_row(keyring.map_or(record.revision, |keyring| keyring.revision.max(record.revision)))?;
        }
        let old: ClusterName = record.payload.name.parse()?;
        let is_retired = record.payload.retired_ms != 0;
        let mut max_offline = clusters::max_offline(&record)?;
        let mut changeset = ledger.changeset();
        let (name, retired_ms) = match change {
            ClusterChange::Retire | ClusterChange::Rename(_) | ClusterChange::MaxOffline(_) if is_retired => {
                return Err(ClusterChangeError::Retired);
            }
            ClusterChange::MaxOffline(wished) => {
                max_offline = *wished;
                (old, 0)
            }
            ClusterChange::Restore(_) if !is_retired => return Err(ClusterChangeError::Live),
            ClusterChange::Retire => {
                self.free_name(&mut changeset, &old, id).await?;
                (old, to_ms(self.changes.now()).max(1))
            }
            ClusterChange::Restore(name) => {
                let name = name.clone().unwrap_or(old);
                self.take_name(&mut changeset, &name, id).await?;
                (name, 0)
            }
            ClusterChange::Rename(name) => {
                self.take_name(&mut changeset, name, id).await?;
                self.free_name(&mut changeset, &old, id).await?;
                (name.clone(), 0)
            }
        };
        let max_offline_seconds = max_offline.time().as_secs();
        let payload = ClusterRecord {
            name: name.to_string(),
            retired_ms,
            max_offline_seconds,
            ..record.payload.clone()
        };
        changeset.update(&record, &payload);
        Ok((
            changeset,
            LiveClusterName {
                id,
                name,
                created: from_ms(payload.created_ms),
                max_offline,
                retired: optional(retired_ms),
                revision: Revision::ABSENT,
            },
        ))
    }

    async fn free_name(
        &self,
        changeset: &mut Changeset,
        name: &ClusterName,
        holder: ClusterId,
    ) -> Result<(), ClusterChangeError> {
        // None, or another's: after damage that an operator let pass. It is not this cluster's to free.
        let held = self.holder(name).await?.filter(|record| record.payload.cluster == holder.as_bytes());
        if let Some(record) = held {
            changeset.delete(&record);
        }
        Ok(())
    }

    async fn take_name(
        &self,
        changeset: &mut Changeset,
        name: &ClusterName,
        holder: ClusterId,
    ) -> Result<(), ClusterChangeError> {
        if self.holder(name).await?.is_some() {
            return Err(ClusterChangeError::Taken(name.clone()));
        }
        let record = NameRecord { cluster: holder.as_bytes().to_vec() };
        changeset.insert(rows::cluster_name(name.as_str()), &record);
        Ok(())
    }

    async fn holder(&self, name: &ClusterName) -> Result<Option<Record<NameRecord>>, LedgerError> {
        self.changes.ledger().read::<NameRecord>(&rows::cluster_name(name.as_str())).await
    }
}
