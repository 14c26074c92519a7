//! The identities that may connect, in memory: the store's list of current
//! serials is the authority, this is its image.
//!
//! Written by the control plane after each commit, read on every call. A ban
//! takes effect with the next look-up.

use std::collections::HashMap;
use std::sync::{Arc, PoisonError, RwLock};
use std::time::SystemTime;

use fleet_kms_identity::{Certificate, ClusterUuid, Serial, SpiffeId, Subject};
use fleet_kms_keyring::ClusterId;
use fleet_kms_store::Revision;

use crate::authz::{Role, Scope};
use crate::ledger::{Ledger, LedgerError};
use crate::records::payload::{IdentityRecord, IssuedCertificate, RestoredRecord};
use crate::records::{Record, rows};
use crate::restored::Restored;
use crate::times::{from_ms, optional};

/// One certificate that an identity may use.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Issued {
    /// The certificate's serial.
    pub serial: Serial,
    /// SHA-256 of its public key.
    pub spki_sha256: [u8; 32],
    /// When it expires.
    pub not_after: SystemTime,
}

/// How a serial stands to its identity.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SerialStanding {
    /// The one in use.
    Current,
    /// Issued, not yet seen in use.
    Next,
    /// Neither: an older one, or a clone's.
    Superseded,
    /// One of them, with another key: whoever signed it had the CA's key and
    /// took part in no change of this store.
    ForeignKey,
}

/// An identity as the data path sees it.
#[derive(Debug, Clone)]
pub struct LiveIdentity {
    /// Of the row that it was read from.
    pub revision: Revision,
    /// Whose it is.
    pub id: SpiffeId,
    /// The certificate in use.
    pub current: Option<Issued>,
    /// The certificate issued last and not yet seen in use.
    pub next: Option<Issued>,
    /// An operator banned it.
    pub banned: bool,
    /// When a certificate from before a restore was last taken as current.
    pub readopted: Option<SystemTime>,
    /// Admins only.
    pub roles: Vec<Role>,
    /// Admins only.
    pub scope: Scope,
}

impl LiveIdentity {
    /// Says how a certificate's serial stands to this identity.
    pub fn standing_of(&self, certificate: &Certificate) -> SerialStanding {
        let serial = certificate.serial();
        let known = [&self.current, &self.next].into_iter().flatten().find(|issued| issued.serial == serial);
        if known.is_some_and(|issued| issued.spki_sha256 != *certificate.spki_sha256()) {
            return SerialStanding::ForeignKey;
        }
        let is = |issued: &Option<Issued>| issued.as_ref().is_some_and(|issued| issued.serial == serial);
        match (is(&self.current), is(&self.next)) {
            (true, _) => SerialStanding::Current,
            (false, true) => SerialStanding::Next,
            (false, false) => SerialStanding::Superseded,
        }
    }
}

/// A stored identity that does not parse: only damage or a newer release does
/// that.
#[derive(Debug, thiserror::Error)]
pub enum IdentityError {
    /// The store cannot be read.
    #[error(transparent)]
    Ledger(#[from] LedgerError),
    /// A field has no meaning to this release.
    #[error("the identity in row {row} has a bad {field}")]
    Field { row: String, field: &'static str },
}

/// All identities of the store.
#[derive(Default)]
pub struct LiveIdentities {
    by_id: RwLock<HashMap<SpiffeId, Seat>>,
    /// How many nodes each cluster has, so that a list of clusters need not look at every node.
    nodes: RwLock<HashMap<ClusterUuid, u32>>,
    restored: RwLock<Option<Restored>>,
}

/// What is known of one identity. It only moves forward, because two changes
/// may reach the memory in another order than the store; a removed one keeps
/// its seat, so that no late word of an earlier change brings it back.
struct Seat {
    revision: Revision,
    identity: Option<Arc<LiveIdentity>>,
}

impl LiveIdentities {
    /// Reads all identities from the store. One whose record is damaged is
    /// denied.
    ///
    /// # Errors
    ///
    /// When the store cannot be read or a record has no meaning to this
    /// release.
    pub async fn load(ledger: &Ledger) -> Result<Self, IdentityError> {
        let identities = Self::default();
        for record in ledger.scan_sound::<IdentityRecord>(rows::IDENTITIES).await? {
            identities.publish(parse(&record)?);
        }
        let restored = ledger.read_sound::<RestoredRecord>(&rows::fixed(rows::RESTORED)).await?;
        identities.set_restored(restored.map(|record| Restored::from(&record.payload)));
        Ok(identities)
    }

    /// Returns the store's last restore.
    pub fn restored(&self) -> Option<Restored> {
        *self.restored.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// Makes a restore visible to the next call.
    pub fn set_restored(&self, restored: Option<Restored>) {
        *self.restored.write().unwrap_or_else(PoisonError::into_inner) = restored;
    }

    /// Returns an identity.
    pub fn find(&self, id: &SpiffeId) -> Option<Arc<LiveIdentity>> {
        let by_id = self.by_id.read().unwrap_or_else(PoisonError::into_inner);
        by_id.get(id).and_then(|seat| seat.identity.clone())
    }

    /// Returns all identities, sorted by id.
    pub fn all(&self) -> Vec<Arc<LiveIdentity>> {
        let mut all = Vec::new();
        self.for_each(|identity| all.push(Arc::clone(identity)));
        all.sort_by_key(|identity| identity.id.to_string());
        all
    }

    /// Returns how many nodes a cluster has, banned ones included.
    pub fn nodes_of(&self, cluster: &ClusterUuid) -> u32 {
        self.nodes.read().unwrap_or_else(PoisonError::into_inner).get(cluster).copied().unwrap_or(0)
    }

    /// Looks at all identities, in no order; not under the lock, for whom the
    /// data path waits.
    pub fn for_each(&self, look: impl FnMut(&Arc<LiveIdentity>)) {
        let all: Vec<Arc<LiveIdentity>> = {
            let by_id = self.by_id.read().unwrap_or_else(PoisonError::into_inner);
            by_id.values().filter_map(|seat| seat.identity.clone()).collect()
        };
        all.iter().for_each(look);
    }

    /// Makes a committed identity visible to the next call, unless a later
    /// change is visible already.
    pub fn publish(&self, identity: LiveIdentity) {
        let (id, revision) = (identity.id.clone(), identity.revision);
        self.seat(id, Seat { revision, identity: Some(Arc::new(identity)) });
    }

    /// Forgets an identity that was removed from the store at `revision`.
    pub fn remove(&self, id: &SpiffeId, revision: Revision) {
        self.seat(id.clone(), Seat { revision, identity: None });
    }

    fn seat(&self, id: SpiffeId, seat: Seat) {
        let mut by_id = self.by_id.write().unwrap_or_else(PoisonError::into_inner);
        if by_id.get(&id).is_some_and(|known| known.revision > seat.revision) {
            return;
        }
        if let Subject::Node { cluster, .. } = &id.subject {
            let was = by_id.get(&id).is_some_and(|known| known.identity.is_some());
            let mut nodes = self.nodes.write().unwrap_or_else(PoisonError::into_inner);
            let count = nodes.entry(*cluster).or_default();
            *count = (*count + u32::from(seat.identity.is_some())).saturating_sub(u32::from(was));
        }
        by_id.insert(id, seat);
    }
}

/// Reads a live identity off its record.
///
/// # Errors
///
/// When a field has no meaning to this release.
pub fn parse(record: &Record<IdentityRecord>) -> Result<LiveIdentity, IdentityError> {
    let bad = |field| IdentityError::Field { row: record.row.as_str().to_owned(), field };
    let payload = &record.payload;
    let issued = |issued: &Option<IssuedCertificate>| {
        issued.as_ref().map(|issued| parse_issued(issued).ok_or_else(|| bad("certificate"))).transpose()
    };
    let roles = payload.roles.iter().map(|name| Role::from_name(name).ok_or_else(|| bad("role")));
    let scope = payload
        .scope
        .iter()
        .map(|id| id.as_slice().try_into().map(ClusterId::from_bytes).map_err(|_| bad("scope")))
        .collect::<Result<Vec<_>, _>>()?;
    Ok(LiveIdentity {
        revision: record.revision,
        id: payload.id.parse().map_err(|_| bad("SPIFFE ID"))?,
        current: issued(&payload.current)?,
        next: issued(&payload.next)?,
        banned: payload.banned_ms != 0,
        readopted: optional(payload.readopted_ms),
        roles: roles.collect::<Result<_, _>>()?,
        scope: if scope.is_empty() { Scope::All } else { Scope::Clusters(scope) },
    })
}

fn parse_issued(issued: &IssuedCertificate) -> Option<Issued> {
    Some(Issued {
        serial: Serial::from_bytes(issued.serial.as_slice().try_into().ok()?)?,
        spki_sha256: issued.spki_sha256.as_slice().try_into().ok()?,
        not_after: from_ms(issued.not_after_ms),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn identity(revision: u64, banned: bool) -> LiveIdentity {
        LiveIdentity {
            readopted: None,
            id: "spiffe://fleet.test/admin/ada".parse().unwrap(),
            revision: Revision(revision),
            current: None,
            next: None,
            banned,
            roles: Vec::new(),
            scope: Scope::All,
        }
    }

    #[test]
    fn an_older_record_published_late_does_not_bring_a_removed_identity_back() {
        let identities = LiveIdentities::default();
        identities.publish(identity(7, false));
        identities.remove(&identity(7, false).id, Revision(9));
        identities.publish(identity(8, false));
        assert!(identities.all().is_empty());
        identities.publish(identity(10, false));
        assert_eq!(identities.all().len(), 1);
    }

    #[test]
    fn nodes_are_counted_as_they_come_and_go() {
        let node = |name: &str, revision| LiveIdentity {
            id: format!("spiffe://fleet.test/cluster/0b5e1a52-7c1f-4f0e-9a36-5d0c3a1f2e44/node/{name}")
                .parse()
                .unwrap(),
            ..identity(revision, false)
        };
        let identities = LiveIdentities::default();
        let Subject::Node { cluster, .. } = node("a", 1).id.subject else { panic!("a node") };
        for (name, revision) in [("a", 1), ("a", 2), ("b", 3)] {
            identities.publish(node(name, revision));
        }
        identities.publish(identity(4, false));
        assert_eq!(identities.nodes_of(&cluster), 2);
        identities.remove(&node("a", 1).id, Revision(1));
        assert_eq!(identities.nodes_of(&cluster), 2, "late word of an earlier removal");
        identities.remove(&node("a", 1).id, Revision(5));
        identities.remove(&node("a", 1).id, Revision(6));
        assert_eq!(identities.nodes_of(&cluster), 1);
    }

    #[test]
    fn an_older_record_published_late_does_not_lift_a_ban() {
        let identities = LiveIdentities::default();
        identities.publish(identity(7, false));
        identities.publish(identity(9, true));
        identities.publish(identity(8, false));
        assert!(identities.all()[0].banned);
        identities.publish(identity(10, false));
        assert!(!identities.all()[0].banned);
    }
}
