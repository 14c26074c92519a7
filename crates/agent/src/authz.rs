//! Who may do what: one table, compiled in, and the permits it hands out.
//!
//! A [`Permit`] is the only way to key material. It is made here and nowhere
//! else, carries the cluster and the action, cannot be cloned and is never
//! stored. An RPC or an admin operation without a row in [`TABLE`] fails a
//! test; so does a row that nothing serves.

use std::marker::PhantomData;
use std::sync::Arc;

use fleet_kms_identity::{Standing, Subject};
use fleet_kms_keyring::ClusterId;

use crate::caller::Caller;
use crate::clusters::Clusters;
use crate::identities::{LiveIdentities, LiveIdentity, SerialStanding};

mod table;

pub use table::{FLEET_WIDE, Role, Row, TABLE, Who, actions, may_grant};

/// One thing that can be done; its row in [`TABLE`] says by whom.
pub trait Action {
    /// The gRPC path, the admin operation id, or `internal:` and a name.
    const ID: &'static str;
}

/// Proof that the caller may do `A` to one cluster.
#[must_use]
pub struct Permit<A> {
    cluster: ClusterId,
    who: Arc<str>,
    action: PhantomData<fn() -> A>,
}

impl<A: Action> Permit<A> {
    /// Returns the cluster that the permit is for.
    pub fn cluster(&self) -> ClusterId {
        self.cluster
    }

    /// Returns who holds it, for the audit.
    pub fn who(&self) -> &Arc<str> {
        &self.who
    }

    fn new(cluster: ClusterId, who: Arc<str>) -> Self {
        Self { cluster, who, action: PhantomData }
    }
}

/// Proof that the caller may do `A`, which concerns no single cluster.
#[must_use]
pub struct FleetPermit<A> {
    who: Arc<str>,
    scope: Scope,
    action: PhantomData<fn() -> A>,
}

impl<A: Action> FleetPermit<A> {
    /// Returns who holds it, for the audit.
    pub fn who(&self) -> &Arc<str> {
        &self.who
    }

    /// Returns the permit for a cluster that is being made and has no name in
    /// the scope yet.
    pub fn for_new_cluster(&self, cluster: ClusterId) -> Permit<A> {
        Permit::new(cluster, Arc::clone(&self.who))
    }

    /// Says whether the holder may see every cluster.
    pub fn sees_all(&self) -> bool {
        self.scope == Scope::All
    }

    /// Says whether the holder may see this cluster.
    pub fn sees(&self, cluster: &ClusterId) -> bool {
        self.scope.covers(cluster)
    }
}

/// Permits that nobody gave, for tests of what stands behind them.
#[cfg(test)]
impl<A: Action> Permit<A> {
    pub(crate) fn danger_for_test(cluster: ClusterId) -> Self {
        Self::new(cluster, "test".into())
    }
}

#[cfg(test)]
impl<A: Action> FleetPermit<A> {
    pub(crate) fn danger_for_test() -> Self {
        Self { who: "test".into(), scope: Scope::All, action: PhantomData }
    }
}

/// Which clusters an admin may act on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Scope {
    /// Every cluster, and what belongs to none.
    All,
    /// The named clusters only.
    Clusters(Vec<ClusterId>),
}

impl Scope {
    fn covers(&self, cluster: &ClusterId) -> bool {
        match self {
            Self::All => true,
            Self::Clusters(ids) => ids.contains(cluster),
        }
    }
}

/// Why a caller may not. The text goes to the caller and to the audit.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Denied {
    /// No certificate on this connection.
    #[error("no client certificate was shown")]
    NoCertificate,
    /// The certificate has expired; it may only renew.
    #[error("the certificate has expired; it may only be renewed, on the enrolment port")]
    Expired,
    /// The store knows no such identity.
    #[error("the fleet does not know this identity; enrol it with a join token")]
    UnknownIdentity,
    /// An operator banned the identity.
    #[error("this identity is banned")]
    Banned,
    /// The serial is neither the identity's current nor its next one.
    #[error("this certificate was superseded by a newer one of the same identity")]
    Superseded,
    /// The serial is the identity's, the certificate's key is not.
    #[error("this certificate's key is not the one on record")]
    ForeignKey,
    /// This kind of identity may never do this.
    #[error("this kind of identity may not do this")]
    WrongKind,
    /// The admin lacks the role.
    #[error("none of this admin's roles allows this")]
    Role,
    /// The admin's scope does not cover the cluster.
    #[error("there is no such cluster in this admin's scope")]
    Scope,
    /// The caller's cluster is retired, with all its identities.
    #[error("this cluster is retired; an operator can restore it with kmsctl cluster restore")]
    ClusterRetired,
}

impl Denied {
    /// Says whether a restore may be the reason: the store has forgotten what
    /// it issued since its backup.
    pub fn may_be_forgotten(self) -> bool {
        matches!(self, Self::UnknownIdentity | Self::Superseded)
    }

    /// Returns the closed metric and audit label.
    pub fn label(self) -> &'static str {
        match self {
            Self::NoCertificate => "no_certificate",
            Self::Expired => "expired",
            Self::UnknownIdentity => "unknown_identity",
            Self::Banned => "banned",
            Self::Superseded => "superseded",
            Self::ForeignKey => "foreign_key",
            Self::WrongKind => "wrong_kind",
            Self::Role => "role",
            Self::Scope => "scope",
            Self::ClusterRetired => "cluster_retired",
        }
    }
}

/// The table together with the identities it judges.
pub struct Policy {
    identities: Arc<LiveIdentities>,
    clusters: Arc<Clusters>,
}

impl Policy {
    /// Makes the policy over the live identities and clusters.
    pub fn new(identities: Arc<LiveIdentities>, clusters: Arc<Clusters>) -> Self {
        Self { identities, clusters }
    }

    /// Says whether the caller is an admin of the fleet at all, whatever it may
    /// do: certificate, identity and serial are judged, roles are not.
    ///
    /// # Errors
    ///
    /// When it is not.
    pub fn admin(&self, caller: &Caller) -> Result<(), Denied> {
        let Subject::Admin { .. } = &caller.id().subject else { return Err(Denied::WrongKind) };
        self.known(caller, false).map(drop)
    }

    /// Permits a node or worker what it may do to its own cluster, which its certificate
    /// names.
    ///
    /// # Errors
    ///
    /// When the table or the identity's state says no.
    pub fn permit<A: Action>(&self, caller: &Caller) -> Result<Permit<A>, Denied> {
        let (Subject::Node { cluster, .. } | Subject::Worker { cluster, .. }) = &caller.id().subject else {
            return Err(Denied::WrongKind);
        };
        let cluster = ClusterId::from_bytes(*cluster.as_bytes());
        // First: its identities are gone with it, and "unknown" would send people the wrong way.
        if self.clusters.is_retired(&cluster) {
            return Err(Denied::ClusterRetired);
        }
        self.admit::<A>(caller)?;
        Ok(Permit::new(cluster, caller.id().to_string().into()))
    }

    /// Permits an admin what it may do to `cluster`.
    ///
    /// # Errors
    ///
    /// When the table, the admin's roles or its scope say no.
    pub fn permit_on<A: Action>(&self, caller: &Caller, cluster: ClusterId) -> Result<Permit<A>, Denied> {
        match self.admit::<A>(caller)? {
            Some(scope) if scope.covers(&cluster) => Ok(Permit::new(cluster, caller.id().to_string().into())),
            Some(_) => Err(Denied::Scope),
            None => Err(Denied::WrongKind),
        }
    }

    /// Permits an admin what concerns no single cluster.
    ///
    /// # Errors
    ///
    /// When the table or the admin's roles say no.
    pub fn permit_fleet<A: Action>(&self, caller: &Caller) -> Result<FleetPermit<A>, Denied> {
        let scope = self.admit::<A>(caller)?.ok_or(Denied::WrongKind)?;
        if FLEET_WIDE.contains(&A::ID) && scope != Scope::All {
            return Err(Denied::Scope);
        }
        Ok(FleetPermit { who: caller.id().to_string().into(), scope, action: PhantomData })
    }

    /// Judges identity, serial, dates and table. Returns the scope of an admin.
    fn admit<A: Action>(&self, caller: &Caller) -> Result<Option<Scope>, Denied> {
        let row = table::row(A::ID).ok_or(Denied::WrongKind)?;
        let may_be_expired =
            row.who.contains(&Who::ExpiredNode) && matches!(caller.id().subject, Subject::Node { .. });
        let identity = self.known(caller, may_be_expired)?;
        match &caller.id().subject {
            Subject::Node { .. } if row.who.iter().any(|who| matches!(who, Who::Node | Who::ExpiredNode)) => {
                Ok(None)
            }
            Subject::Worker { .. } if row.who.contains(&Who::Worker) => Ok(None),
            Subject::Admin { .. } => {
                let admin = row.who.iter().any(|who| matches!(who, Who::Admin(_)));
                let role = row.who.iter().any(|who| match who {
                    Who::Admin(role) => identity.roles.contains(role),
                    Who::Anyone | Who::Node | Who::ExpiredNode | Who::Worker | Who::Internal(_) => false,
                });
                match (admin, role) {
                    (true, true) => Ok(Some(identity.scope.clone())),
                    (true, false) => Err(Denied::Role),
                    (false, _) => Err(Denied::WrongKind),
                }
            }
            Subject::Node { .. } | Subject::Worker { .. } | Subject::Agent { .. } => Err(Denied::WrongKind),
        }
    }

    /// Judges certificate, identity and serial.
    fn known(&self, caller: &Caller, may_be_expired: bool) -> Result<Arc<LiveIdentity>, Denied> {
        match caller.standing() {
            Standing::Valid => {}
            Standing::Expired { .. } if may_be_expired => {}
            Standing::Expired { .. } | Standing::NotYetValid { .. } => return Err(Denied::Expired),
        }
        let identity = self.identities.find(caller.id()).ok_or(Denied::UnknownIdentity)?;
        if identity.banned {
            return Err(Denied::Banned);
        }
        match identity.standing_of(caller.certificate()) {
            SerialStanding::Current | SerialStanding::Next => Ok(identity),
            SerialStanding::Superseded => Err(Denied::Superseded),
            SerialStanding::ForeignKey => Err(Denied::ForeignKey),
        }
    }
}

/// Permits for work that the agent does by itself. Each function has a row in
/// [`TABLE`] that names it.
pub mod internal {
    use std::marker::PhantomData;

    use super::{ClusterId, FleetPermit, Permit, Scope, actions};

    /// The schedule rotates a cluster that is due.
    pub fn schedule(cluster: ClusterId) -> Permit<actions::ScheduledRotation> {
        Permit::new(cluster, "schedule".into())
    }

    /// The agent reads a cluster's keyring into memory: at start, after a
    /// change, or when a key id is unknown.
    pub fn load(cluster: ClusterId) -> Permit<actions::Load> {
        Permit::new(cluster, "agent".into())
    }

    /// The agent makes a cluster's keys anew after a restore, or because the
    /// store turned out to be an old copy.
    pub fn recovery(cluster: ClusterId) -> Permit<actions::Recovery> {
        Permit::new(cluster, "recovery".into())
    }

    /// The agent backs its store up and looks whether the copy opens.
    pub fn backup() -> FleetPermit<actions::Backup> {
        FleetPermit { who: "backup".into(), scope: Scope::All, action: PhantomData }
    }

    /// Somebody on the agent's host, as root or as the agent's user, works on
    /// the root slots.
    pub fn slots() -> FleetPermit<actions::Slots> {
        FleetPermit { who: "host".into(), scope: Scope::All, action: PhantomData }
    }

    /// The agent opens and seals the private keys of its CAs.
    pub fn authority() -> FleetPermit<actions::Authority> {
        FleetPermit { who: "agent".into(), scope: Scope::All, action: PhantomData }
    }
}

#[cfg(test)]
mod tests;
