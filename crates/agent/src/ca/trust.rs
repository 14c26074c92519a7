//! Which roots are trusted, where, and until when; and which certificates lead
//! from a leaf to each of them.
//!
//! A root that was replaced stays trusted for as long as something that it
//! vouches for may come by: a leaf on the data port, an admin's on the admin
//! port, a node that was off on the enrolment port. All of it follows from
//! dates on record; a clock that jumps and is repaired loses no root.

use std::time::{Duration, SystemTime};

use super::generation::{MAX_RETIRING, activates};
use super::{ADMIN_LIFE, LEAF_LIFE};
use crate::enrolment::issue::MAX_OFFLINE;
use crate::records::payload::AuthorityState;

/// Root or issuing CA.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// What everybody pins.
    Root,
    /// What signs leaves.
    Issuing,
}

/// A port, as far as roots are concerned.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Port {
    /// Valid leaves only.
    Data,
    /// Nodes that were off; it is also what nodes are told to trust.
    Enrolment,
    /// Admins.
    Admin,
}

/// One generation of a CA as it is stored.
#[derive(Debug, Clone)]
pub struct Stored {
    /// Root or issuing.
    pub kind: Kind,
    /// Counts up from 1, never reused.
    pub generation: u32,
    /// DER.
    pub certificate: Vec<u8>,
    /// The same key and name, signed by the root before.
    pub(super) cross_signed: Option<Vec<u8>>,
    /// Prepared, active or retiring.
    pub state: AuthorityState,
    /// The certificate's first moment.
    pub not_before: SystemTime,
    /// The certificate's last moment.
    pub not_after: SystemTime,
    /// When its successor became active.
    pub retired: Option<SystemTime>,
    /// Of an issuing CA: the root generation that signed it.
    pub signed_by: Option<u32>,
}

impl Stored {
    /// Returns until when a replaced generation is trusted on `port`; `None`
    /// while it is prepared or active.
    pub fn trusted_until(&self, port: Port) -> Option<SystemTime> {
        self.retired.map(|retired| retired + trusted_for(port))
    }

    /// Returns when a prepared root becomes active by itself.
    pub fn activates(&self) -> Option<SystemTime> {
        (self.state == AuthorityState::Prepared).then(|| activates(self.not_after))
    }

    /// Says whether `port` trusts it at `now`.
    pub fn is_trusted(&self, port: Port, now: SystemTime) -> bool {
        self.trusted_until(port).is_none_or(|until| now <= until)
    }
}

/// How long a replaced root stays trusted.
fn trusted_for(port: Port) -> Duration {
    match port {
        Port::Data => LEAF_LIFE,
        Port::Enrolment => LEAF_LIFE + MAX_OFFLINE,
        Port::Admin => ADMIN_LIFE,
    }
}

/// The roots that `port` trusts at `now`: the active one, then the others, the
/// newest first. `stored` is in ascending order.
pub(super) fn trusted_roots(stored: &[Stored], port: Port, now: SystemTime) -> Vec<&Stored> {
    let roots = || stored.iter().rev().filter(|stored| stored.kind == Kind::Root);
    let is_active = |root: &&Stored| root.state == AuthorityState::Active;
    let others = roots().filter(|root| !is_active(root) && root.is_trusted(port, now));
    roots().filter(is_active).chain(others).collect()
}

/// The active root, then those before it that somebody may know alone: a chain
/// has to lead to each of them.
pub(super) fn lineage(stored: &[Stored], now: SystemTime) -> Vec<&Stored> {
    let mut roots = trusted_roots(stored, Port::Enrolment, now);
    roots.retain(|root| root.state != AuthorityState::Prepared);
    roots.truncate(1 + MAX_RETIRING);
    roots
}
