//! An admin's roles or scope are replaced, or it is removed. What it may do is
//! read from its record on every call, so each of these holds from its next one.
//!
//! Two rules keep a fleet governable: the last operator of all clusters stays
//! one, and nobody gives away what they may not do themselves.

use std::time::SystemTime;

use fleet_kms_identity::SpiffeId;

use super::{IssueFailure, Issuer, write_identity};
use crate::authz::{Action, FleetPermit, Role, Scope, actions, may_grant};
use crate::control_plane::{Stale, Wish};
use crate::enrolment::audit_trail;
use crate::ledger::Changeset;
use crate::records::payload::IdentityRecord;
use crate::records::{Record, rows};
use crate::times::to_ms;
use crate::trail::Intent;

/// What is to become of an admin.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum AdminChange {
    /// It has these roles.
    Roles(Vec<Role>),
    /// It may act on these clusters.
    Scope(Scope),
    /// It is forgotten.
    Remove,
}

/// Why an admin was not changed.
#[derive(Debug, thiserror::Error)]
pub enum AdminChangeError {
    /// There is none.
    #[error("there is no such admin")]
    Unknown,
    /// Nobody could run the fleet any more.
    #[error("this is the last operator of all clusters whose certificate is valid")]
    LastOperator,
    /// It would give away what the caller does not have.
    #[error("only who may do all that the role {} allows can grant it, or widen the scope of who has it", .0.name())]
    Grant(Role),
    /// An admin needs a role.
    #[error("an admin needs at least one role")]
    NoRole,
    /// A scope without a cluster would read as "all" once it is stored.
    #[error("a scope names at least one cluster")]
    EmptyScope,
    /// The caller decided on an older state.
    #[error(transparent)]
    Stale(#[from] Stale),
    /// Store or audit failed.
    #[error(transparent)]
    Failed(#[from] IssueFailure),
}

/// An action whose permit allows a change of an admin.
pub trait ChangesAdmin: Action {
    /// Says whether it allows this one.
    fn allows(change: &AdminChange) -> bool;
}

impl ChangesAdmin for actions::AdminSetRole {
    fn allows(change: &AdminChange) -> bool {
        matches!(change, AdminChange::Roles(_))
    }
}
impl ChangesAdmin for actions::AdminSetScope {
    fn allows(change: &AdminChange) -> bool {
        matches!(change, AdminChange::Scope(_))
    }
}
impl ChangesAdmin for actions::AdminRemove {
    fn allows(change: &AdminChange) -> bool {
        matches!(change, AdminChange::Remove)
    }
}

impl Issuer {
    /// Changes an admin, as its permit's action says.
    ///
    /// # Errors
    ///
    /// When there is no such admin, a rule or the wished revision refuses, or
    /// the store does.
    pub async fn change_admin<A: ChangesAdmin>(
        &self,
        permit: &FleetPermit<A>,
        admin: &SpiffeId,
        change: &AdminChange,
        wish: Wish<'_>,
    ) -> Result<(), AdminChangeError> {
        assert!(A::allows(change), "a permit is for its own change");
        // Two operators that demote each other at once: the second one finds what the first did.
        let _turn = self.turn.lock().await;
        let intent = Intent::new(A::ID, permit.who()).target(admin.to_string()).reason(wish.reason);
        let intent = match change {
            AdminChange::Roles(roles) => intent.detail("roles", names(roles).join(",")),
            AdminChange::Scope(scope) => intent.detail("scope", audit_trail::scope_text(scope)),
            AdminChange::Remove => intent,
        };
        let prepare = || self.prepare_admin(permit.who(), admin, change, wish);
        // In memory before the audit has the outcome: a demotion waits for no disk.
        let publish = |record: Option<_>, revision| match record {
            Some(record) => self.publish(record, revision),
            None => {
                self.identities.remove(admin, revision);
                Ok(())
            }
        };
        let run = self.changes.run_applied(intent, prepare, publish).await;
        Ok(run.map_err(IssueFailure::flatten::<AdminChangeError>)??)
    }

    /// Says whether an admin could be changed, and changes nothing.
    ///
    /// # Errors
    ///
    /// As [`Self::change_admin`].
    pub async fn check_admin_change<A: ChangesAdmin>(
        &self,
        permit: &FleetPermit<A>,
        admin: &SpiffeId,
        change: &AdminChange,
        wish: Wish<'_>,
    ) -> Result<(), AdminChangeError> {
        self.prepare_admin(permit.who(), admin, change, wish).await.map(drop)
    }

    async fn prepare_admin(
        &self,
        who: &str,
        admin: &SpiffeId,
        change: &AdminChange,
        wish: Wish<'_>,
    ) -> Result<(Changeset, Option<Record<IdentityRecord>>), AdminChangeError> {
        let all = self.ledger().scan::<IdentityRecord>(&rows::admins()).await.map_err(IssueFailure::from)?;
        let find = |id: &str| all.iter().find(|record| record.payload.id == id);
        let before = find(&admin.to_string()).ok_or(AdminChangeError::Unknown)?;
        wish.check_row(before.revision)?;
        let after = changed(&before.payload, change)?;
        let own = find(who).map(|record| roles_of(&record.payload)).unwrap_or_default();
        if let Some(role) = after.as_ref().and_then(|after| not_to_grant(&own, &before.payload, after)) {
            return Err(AdminChangeError::Grant(role));
        }
        let mut changeset = self.ledger().changeset();
        let now = self.now();
        if runs_fleet(&before.payload, now) && !after.as_ref().is_some_and(|after| runs_fleet(after, now)) {
            let other = all.iter().find(|other| other.row != before.row && runs_fleet(&other.payload, now));
            // Another agent may be about to demote that one.
            changeset.keep(other.ok_or(AdminChangeError::LastOperator)?);
        }
        match after {
            Some(after) => {
                let record = write_identity(&mut changeset, admin, Some(before), after);
                Ok((changeset, Some(record)))
            }
            None => {
                changeset.delete(before);
                Ok((changeset, None))
            }
        }
    }
}

/// What the change makes of a record; nothing when it is removed.
fn changed(
    record: &IdentityRecord,
    change: &AdminChange,
) -> Result<Option<IdentityRecord>, AdminChangeError> {
    match change {
        AdminChange::Roles(roles) if roles.is_empty() => Err(AdminChangeError::NoRole),
        AdminChange::Roles(roles) => {
            let roles = names(roles).into_iter().map(str::to_owned).collect();
            Ok(Some(IdentityRecord { roles, ..record.clone() }))
        }
        AdminChange::Scope(Scope::All) => Ok(Some(IdentityRecord { scope: Vec::new(), ..record.clone() })),
        AdminChange::Scope(Scope::Clusters(ids)) if ids.is_empty() => Err(AdminChangeError::EmptyScope),
        AdminChange::Scope(Scope::Clusters(ids)) => {
            let scope = ids.iter().map(|id| id.as_bytes().to_vec()).collect();
            Ok(Some(IdentityRecord { scope, ..record.clone() }))
        }
        AdminChange::Remove => Ok(None),
    }
}

/// Finds a role that the change gives, or gives on more clusters, and that who
/// makes it may not grant.
fn not_to_grant(own: &[Role], before: &IdentityRecord, after: &IdentityRecord) -> Option<Role> {
    let wider = !before.scope.is_empty()
        && (after.scope.is_empty() || after.scope.iter().any(|id| !before.scope.contains(id)));
    let had = roles_of(before);
    let given = roles_of(after).into_iter().filter(|role| wider || !had.contains(role));
    given.into_iter().find(|role| !may_grant(own, *role))
}

/// Says whether this admin can undo whatever any other may do: an operator of
/// all clusters who can log in.
fn runs_fleet(record: &IdentityRecord, now: SystemTime) -> bool {
    let newest = record.next.as_ref().or(record.current.as_ref());
    roles_of(record).contains(&Role::Operator)
        && record.scope.is_empty()
        && record.banned_ms == 0
        && newest.is_some_and(|issued| issued.not_after_ms > to_ms(now))
}

fn roles_of(record: &IdentityRecord) -> Vec<Role> {
    record.roles.iter().filter_map(|name| Role::from_name(name)).collect()
}

/// Each role once, in the order of the table.
fn names(roles: &[Role]) -> Vec<&'static str> {
    Role::ALL.into_iter().filter(|role| roles.contains(role)).map(Role::name).collect()
}
