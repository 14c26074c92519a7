//! A node or worker is banned, unbanned or removed. All three are visible to
//! the next call as soon as they are committed, and no later word of an earlier
//! change takes them back.

use fleet_kms_identity::{SpiffeId, Subject};

use super::{IssueFailure, Issuer, identities, write_identity};
use crate::authz::{Action, Permit, actions};
use crate::bans;
use crate::control_plane::{Stale, Wish};
use crate::records::payload::IdentityRecord;
use crate::records::rows;
use crate::times::to_ms;
use crate::trail::Intent;

/// Why a node or worker was not changed.
#[derive(Debug, thiserror::Error)]
pub enum MemberChangeError {
    /// There is none.
    #[error("the cluster has no such node or worker")]
    Unknown,
    /// It is what it should become.
    #[error("it is {0} already")]
    Already(&'static str),
    /// The caller decided on an older state.
    #[error(transparent)]
    Stale(#[from] Stale),
    /// Store or audit failed.
    #[error(transparent)]
    Failed(#[from] IssueFailure),
}

macro_rules! allow {
    ($($(#[$doc:meta])* $what:ident: $($action:ident),+;)+) => {$(
        $(#[$doc])*
        pub trait $what: Action {}
        $(impl $what for actions::$action {})+
    )+};
}

allow! {
    /// Actions whose permit allows to ban a member of the cluster.
    Bans: NodeBan, WorkerBan;
    /// Actions whose permit allows to lift a ban.
    Unbans: NodeUnban, WorkerUnban;
    /// Actions whose permit allows to remove a member: a retired cluster keeps none.
    Removes: NodeRemove, WorkerRemove, ClusterRetire, ClusterRestore;
}

impl Issuer {
    /// Refuses a member's calls from now on, whatever its certificate says.
    ///
    /// # Errors
    ///
    /// When there is no such member, it is banned already, or the store refuses.
    pub async fn ban<A: Bans>(
        &self,
        permit: &Permit<A>,
        member: &SpiffeId,
        cluster_name: &str,
        wish: Wish<'_>,
    ) -> Result<(), MemberChangeError> {
        let banned_ms = to_ms(self.now()).max(1);
        let intent = intent(A::ID, permit, member, cluster_name, wish);
        self.rewrite(intent, member, wish, &|record| match record.banned_ms {
            0 => Ok(IdentityRecord { banned_ms, ..record.clone() }),
            _ => Err(MemberChangeError::Already("banned")),
        })
        .await
    }

    /// Lets a banned member call again.
    ///
    /// # Errors
    ///
    /// When there is no such member, it is not banned, or the store refuses.
    pub async fn unban<A: Unbans>(
        &self,
        permit: &Permit<A>,
        member: &SpiffeId,
        cluster_name: &str,
        wish: Wish<'_>,
    ) -> Result<(), MemberChangeError> {
        let intent = intent(A::ID, permit, member, cluster_name, wish);
        self.rewrite(intent, member, wish, &|record| match record.banned_ms {
            0 => Err(MemberChangeError::Already("active")),
            _ => Ok(IdentityRecord { banned_ms: 0, ..record.clone() }),
        })
        .await
    }

    /// Forgets a member; its name is free for a new join token.
    ///
    /// # Errors
    ///
    /// When there is no such member, or the store refuses.
    pub async fn remove<A: Removes>(
        &self,
        permit: &Permit<A>,
        member: &SpiffeId,
        cluster_name: &str,
        wish: Wish<'_>,
    ) -> Result<(), MemberChangeError> {
        // A removal has one name in the audit, whatever it is part of: bans are read back from there.
        let action = match member.subject {
            Subject::Worker { .. } => bans::REMOVE_WORKER,
            _ => bans::REMOVE,
        };
        let intent = intent(action, permit, member, cluster_name, wish);
        let prepare = || async {
            let record = self.identity(member).await?.ok_or(MemberChangeError::Unknown)?;
            wish.check_row(record.revision)?;
            let mut changeset = self.ledger().changeset();
            changeset.delete(&record);
            Ok::<_, MemberChangeError>((changeset, ()))
        };
        let forget = |(), revision| self.identities.remove(member, revision);
        let run = self.changes.run_applied(intent, prepare, forget).await;
        run.map_err(IssueFailure::flatten::<MemberChangeError>)
    }

    /// Forgets all nodes and workers of the permit's cluster, one change each;
    /// returns how many there were.
    ///
    /// # Errors
    ///
    /// At the first that cannot be removed; running it again goes on.
    pub async fn remove_all<A: Removes>(
        &self,
        permit: &Permit<A>,
        cluster_name: &str,
        reason: Option<&str>,
    ) -> Result<usize, MemberChangeError> {
        let mut removed = 0;
        for member in self.members(permit).await? {
            match self.remove(permit, &member, cluster_name, Wish { reason, at: None }).await {
                Ok(()) => removed += 1,
                Err(MemberChangeError::Unknown) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(removed)
    }

    /// Lists all nodes and workers of the permit's cluster, as the store has
    /// them.
    ///
    /// # Errors
    ///
    /// When the store cannot be read or a record is damaged.
    pub async fn members<A: Action>(&self, permit: &Permit<A>) -> Result<Vec<SpiffeId>, IssueFailure> {
        let mut members = Vec::new();
        for prefix in rows::members(&permit.cluster()) {
            for record in self.ledger().scan::<IdentityRecord>(&prefix).await? {
                members.push(identities::parse(&record)?.id);
            }
        }
        Ok(members)
    }

    async fn rewrite(
        &self,
        intent: Intent,
        member: &SpiffeId,
        wish: Wish<'_>,
        after: &(dyn Fn(&IdentityRecord) -> Result<IdentityRecord, MemberChangeError> + Send + Sync),
    ) -> Result<(), MemberChangeError> {
        let prepare = || async {
            let before = self.identity(member).await?.ok_or(MemberChangeError::Unknown)?;
            wish.check_row(before.revision)?;
            let mut changeset = self.ledger().changeset();
            let after = after(&before.payload)?;
            let record = write_identity(&mut changeset, member, Some(&before), after);
            Ok::<_, MemberChangeError>((changeset, record))
        };
        // In memory before the audit has the outcome: a ban waits for no disk.
        let publish = |record, revision| self.publish(record, revision);
        let run = self.changes.run_applied(intent, prepare, publish).await;
        Ok(run.map_err(IssueFailure::flatten::<MemberChangeError>)??)
    }
}

fn intent<A: Action>(
    action: &'static str,
    permit: &Permit<A>,
    member: &SpiffeId,
    cluster_name: &str,
    wish: Wish<'_>,
) -> Intent {
    Intent::new(action, permit.who())
        .cluster(permit.cluster(), cluster_name)
        .target(member.to_string())
        .reason(wish.reason)
}
