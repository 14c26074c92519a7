//! A node is banned, unbanned or removed. All three are visible to the next
//! call as soon as they are committed, and no later word of an earlier change
//! takes them back.

use fleet_kms_identity::SpiffeId;

use super::{IssueFailure, Issuer, write_identity};
use crate::authz::{Action, Permit, actions};
use crate::records::payload::IdentityRecord;
use crate::times::to_ms;
use crate::trail::Intent;

/// Why a node was not changed.
#[derive(Debug, thiserror::Error)]
pub enum NodeChangeError {
    /// There is none.
    #[error("the cluster has no such node")]
    Unknown,
    /// It is what it should become.
    #[error("the node is {0} already")]
    Already(&'static str),
    /// Store or audit failed.
    #[error(transparent)]
    Failed(#[from] IssueFailure),
}

impl Issuer {
    /// Refuses a node's calls from now on, whatever its certificate says.
    ///
    /// # Errors
    ///
    /// When there is no such node, it is banned already, or the store refuses.
    pub async fn ban(
        &self,
        permit: &Permit<actions::NodeBan>,
        node: &SpiffeId,
        cluster_name: &str,
        reason: Option<&str>,
    ) -> Result<(), NodeChangeError> {
        let banned_ms = to_ms(self.now()).max(1);
        let intent = intent(permit, node, cluster_name, reason);
        self.rewrite(intent, node, &|record| match record.banned_ms {
            0 => Ok(IdentityRecord { banned_ms, ..record.clone() }),
            _ => Err(NodeChangeError::Already("banned")),
        })
        .await
    }

    /// Lets a banned node call again.
    ///
    /// # Errors
    ///
    /// When there is no such node, it is not banned, or the store refuses.
    pub async fn unban(
        &self,
        permit: &Permit<actions::NodeUnban>,
        node: &SpiffeId,
        cluster_name: &str,
        reason: Option<&str>,
    ) -> Result<(), NodeChangeError> {
        let intent = intent(permit, node, cluster_name, reason);
        self.rewrite(intent, node, &|record| match record.banned_ms {
            0 => Err(NodeChangeError::Already("active")),
            _ => Ok(IdentityRecord { banned_ms: 0, ..record.clone() }),
        })
        .await
    }

    /// Forgets a node; its name is free for a new join token.
    ///
    /// # Errors
    ///
    /// When there is no such node, or the store refuses.
    pub async fn remove(
        &self,
        permit: &Permit<actions::NodeRemove>,
        node: &SpiffeId,
        cluster_name: &str,
        reason: Option<&str>,
    ) -> Result<(), NodeChangeError> {
        let intent = intent(permit, node, cluster_name, reason);
        let prepare = || async {
            let record = self.identity(node).await?.ok_or(NodeChangeError::Unknown)?;
            let mut changeset = self.ledger().changeset();
            changeset.delete(&record);
            Ok::<_, NodeChangeError>((changeset, ()))
        };
        let run = self.changes.run_with_revision(intent, prepare).await;
        let ((), revision) = run.map_err(IssueFailure::flatten::<NodeChangeError>)?;
        self.identities.remove(node, revision);
        Ok(())
    }

    async fn rewrite(
        &self,
        intent: Intent,
        node: &SpiffeId,
        after: &(dyn Fn(&IdentityRecord) -> Result<IdentityRecord, NodeChangeError> + Send + Sync),
    ) -> Result<(), NodeChangeError> {
        let prepare = || async {
            let before = self.identity(node).await?.ok_or(NodeChangeError::Unknown)?;
            let mut changeset = self.ledger().changeset();
            let after = after(&before.payload)?;
            let record = write_identity(&mut changeset, node, Some(&before), after);
            Ok::<_, NodeChangeError>((changeset, record))
        };
        let run = self.changes.run_with_revision(intent, prepare).await;
        let (record, revision) = run.map_err(IssueFailure::flatten::<NodeChangeError>)?;
        Ok(self.publish(record, revision)?)
    }
}

fn intent<A: Action>(
    permit: &Permit<A>,
    node: &SpiffeId,
    cluster_name: &str,
    reason: Option<&str>,
) -> Intent {
    Intent::new(A::ID, permit.who())
        .cluster(permit.cluster(), cluster_name)
        .target(node.to_string())
        .reason(reason)
}
