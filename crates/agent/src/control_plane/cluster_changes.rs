//! What an operator changes about a cluster itself, apart from its keys.

use fleet_kms_keyring::ClusterId;

use super::ControlPlane;
use crate::authz::{Permit, actions};
use crate::changes::ChangeError;
use crate::clusters::{self, ClusterError};
use crate::ledger::{Changeset, LedgerError};
use crate::max_offline::MaxOffline;
use crate::records::payload::ClusterRecord;
use crate::records::rows;

/// Why a cluster was not changed.
#[derive(Debug, thiserror::Error)]
pub enum ClusterChangeError {
    /// The cluster is gone from the store.
    #[error("there is no such cluster")]
    UnknownCluster,
    /// Its record is damaged.
    #[error(transparent)]
    Cluster(#[from] ClusterError),
    /// The store cannot be read.
    #[error(transparent)]
    Ledger(#[from] LedgerError),
}

impl ControlPlane {
    /// Changes how long the nodes of a cluster may be off; returns how long it
    /// was before. Renewals judge by the new time at once.
    ///
    /// # Errors
    ///
    /// When the cluster is unknown or the store refuses.
    pub async fn set_max_offline(
        &self,
        permit: &Permit<actions::MaxOfflineSet>,
        max_offline: MaxOffline,
        reason: Option<&str>,
    ) -> Result<MaxOffline, ChangeError<ClusterChangeError>> {
        let cluster = permit.cluster();
        let seconds = max_offline.time().as_secs().to_string();
        let intent = self.key_intent("max_offline_set", permit).reason(reason);
        let intent = intent.detail("max_offline_seconds", seconds);
        let prepare = || self.prepare_max_offline(cluster, max_offline);
        let publish = |before, _| {
            self.clusters.set_max_offline(&cluster, max_offline);
            before
        };
        self.changes.run_applied(intent, prepare, publish).await
    }

    async fn prepare_max_offline(
        &self,
        cluster: ClusterId,
        max_offline: MaxOffline,
    ) -> Result<(Changeset, MaxOffline), ClusterChangeError> {
        let ledger = self.changes.ledger();
        let record = ledger.read::<ClusterRecord>(&rows::cluster(&cluster)).await?;
        let record = record.ok_or(ClusterChangeError::UnknownCluster)?;
        let before = clusters::max_offline(&record)?;
        let mut changeset = ledger.changeset();
        let max_offline_seconds = max_offline.time().as_secs();
        changeset.update(&record, &ClusterRecord { max_offline_seconds, ..record.payload.clone() });
        Ok((changeset, before))
    }
}
