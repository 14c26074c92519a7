//! A cluster is retired, restored or renamed. None of it touches a key: what
//! was ever wrapped can be read again once the cluster is back.

use fleet_kms_keyring::ClusterId;
use fleet_kms_store::Revision;

use super::{ControlPlane, Stale, Wish};
use crate::authz::{Action, Permit, actions};
use crate::changes::ChangeError;
use crate::clusters::{ClusterName, InvalidClusterName, LiveClusterName};
use crate::ledger::{Changeset, LedgerError};
use crate::records::payload::{ClusterRecord, KeyringRecord, NameRecord};
use crate::records::{Record, rows};
use crate::times::{from_ms, optional, to_ms};
use crate::trail::Intent;

/// What is to become of a cluster.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum LabelChange {
    /// Its calls are refused and its name is free.
    Retire,
    /// It is live again, under its name or another.
    Restore(Option<ClusterName>),
    /// It has another name.
    Rename(ClusterName),
}

/// Why a cluster was not changed.
#[derive(Debug, thiserror::Error)]
pub enum LabelError {
    /// There is none.
    #[error("there is no such cluster")]
    Unknown,
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

/// An action whose permit allows a change of a cluster's label.
pub trait ChangesLabel: Action {
    /// Says whether it allows this one.
    fn allows(change: &LabelChange) -> bool;
}

impl ChangesLabel for actions::ClusterRetire {
    fn allows(change: &LabelChange) -> bool {
        matches!(change, LabelChange::Retire)
    }
}
impl ChangesLabel for actions::ClusterRestore {
    fn allows(change: &LabelChange) -> bool {
        matches!(change, LabelChange::Restore(_))
    }
}
impl ChangesLabel for actions::ClusterRename {
    fn allows(change: &LabelChange) -> bool {
        matches!(change, LabelChange::Rename(_))
    }
}

impl ControlPlane {
    /// Retires, restores or renames a cluster, as its permit's action says.
    ///
    /// # Errors
    ///
    /// When the cluster's state, the name, the wished revision or the store
    /// refuse, or the change is not the permit's.
    pub async fn change_label<A: ChangesLabel>(
        &self,
        permit: &Permit<A>,
        change: &LabelChange,
        wish: Wish<'_>,
    ) -> Result<LiveClusterName, ChangeError<LabelError>> {
        assert!(A::allows(change), "a permit is for its own change");
        let mut intent = self.key_intent(A::ID, permit).reason(wish.reason);
        if let LabelChange::Restore(Some(name)) | LabelChange::Rename(name) = change {
            intent = intent.detail("name", name.to_string());
        }
        self.commit_label(intent, permit.cluster(), change, wish).await
    }

    async fn commit_label(
        &self,
        intent: Intent,
        cluster: ClusterId,
        change: &LabelChange,
        wish: Wish<'_>,
    ) -> Result<LiveClusterName, ChangeError<LabelError>> {
        let prepare = || self.prepare_label(cluster, change, wish);
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
    /// As [`Self::change_label`].
    pub async fn check_label(
        &self,
        cluster: ClusterId,
        change: &LabelChange,
        wish: Wish<'_>,
    ) -> Result<LiveClusterName, LabelError> {
        self.prepare_label(cluster, change, wish).await.map(|(_, changed)| changed)
    }

    /// Says whether a cluster is retired.
    pub fn is_retired(&self, cluster: &ClusterId) -> bool {
        self.clusters.is_retired(cluster)
    }

    async fn prepare_label(
        &self,
        id: ClusterId,
        change: &LabelChange,
        wish: Wish<'_>,
    ) -> Result<(Changeset, LiveClusterName), LabelError> {
        let ledger = self.changes.ledger();
        let record = ledger.read::<ClusterRecord>(&rows::cluster(&id)).await?;
        let record = record.ok_or(LabelError::Unknown)?;
        if wish.at.is_some() {
            let keyring = ledger.read::<KeyringRecord>(&rows::keyring(&id)).await?;
            wish.check_row(keyring.map_or(record.revision, |keyring| keyring.revision.max(record.revision)))?;
        }
        let old: ClusterName = record.payload.name.parse()?;
        let is_retired = record.payload.retired_ms != 0;
        let mut changeset = ledger.changeset();
        let (name, retired_ms) = match change {
            LabelChange::Retire | LabelChange::Rename(_) if is_retired => {
                return Err(LabelError::Retired);
            }
            LabelChange::Restore(_) if !is_retired => return Err(LabelError::Live),
            LabelChange::Retire => {
                self.free_name(&mut changeset, &old, id).await?;
                (old, to_ms(self.changes.now()).max(1))
            }
            LabelChange::Restore(name) => {
                let name = name.clone().unwrap_or(old);
                self.take_name(&mut changeset, &name, id).await?;
                (name, 0)
            }
            LabelChange::Rename(name) => {
                self.take_name(&mut changeset, name, id).await?;
                self.free_name(&mut changeset, &old, id).await?;
                (name.clone(), 0)
            }
        };
        let payload = ClusterRecord { name: name.to_string(), retired_ms, ..record.payload.clone() };
        changeset.update(&record, &payload);
        Ok((
            changeset,
            LiveClusterName {
                id,
                name,
                created: from_ms(payload.created_ms),
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
    ) -> Result<(), LabelError> {
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
    ) -> Result<(), LabelError> {
        if self.holder(name).await?.is_some() {
            return Err(LabelError::Taken(name.clone()));
        }
        let record = NameRecord { cluster: holder.as_bytes().to_vec() };
        changeset.insert(rows::cluster_name(name.as_str()), &record);
        Ok(())
    }

    async fn holder(&self, name: &ClusterName) -> Result<Option<Record<NameRecord>>, LedgerError> {
        self.changes.ledger().read::<NameRecord>(&rows::cluster_name(name.as_str())).await
    }
}
