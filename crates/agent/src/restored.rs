//! After a restore: which certificates from before it are still good.
//!
//! A restored store has forgotten the certificates that were issued since its
//! backup. Their issue numbers are higher than the ones on record and not above
//! the floor from which the restored store went on to count. For the time that a
//! cluster's nodes may be off and a certificate's life (187 days by default) such
//! a certificate of our CA is taken once for each identity that is not banned, so
//! that no node has to be touched by hand.

use std::time::{Duration, SystemTime};

use crate::ca::LEAF_LIFE;
use crate::identities::LiveIdentity;
use crate::records::payload::RestoredRecord;
use crate::times::{from_ms, to_ms};

/// How far the issue numbers jump: further than any store issues in its life.
pub const ISSUE_NUMBER_JUMP: u64 = 1 << 40;

/// The last restore of the store.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Restored {
    /// When.
    pub at: SystemTime,
    /// The last issue number in what was restored.
    pub issued_before: u64,
    /// The highest issue number that the lost store can have given.
    pub issued_floor: u64,
}

impl From<&RestoredRecord> for Restored {
    fn from(record: &RestoredRecord) -> Self {
        Self {
            at: from_ms(record.restored_ms),
            issued_before: record.issued_before,
            issued_floor: record.issued_floor,
        }
    }
}

impl From<&Restored> for RestoredRecord {
    fn from(restored: &Restored) -> Self {
        Self {
            restored_ms: to_ms(restored.at),
            issued_before: restored.issued_before,
            issued_floor: restored.issued_floor,
        }
    }
}

impl Restored {
    /// Says whether a certificate with `number`, which chains to our CA and is
    /// no longer, or not, on record, is to be taken as the identity's current
    /// one. `identity` is what the store knows of it, if anything.
    pub fn readopts(
        &self,
        identity: Option<&LiveIdentity>,
        number: u64,
        now: SystemTime,
        max_offline: Duration,
    ) -> bool {
        // A node that was off for as long as it may be, with a certificate issued right before.
        let window = max_offline + LEAF_LIFE;
        // A clock that is behind the restore lengthens the time, it does not end it.
        let open = now.duration_since(self.at).unwrap_or_default() <= window;
        let on_record = match identity {
            Some(identity) if identity.banned => return false,
            Some(identity) if identity.readopted.is_some_and(|at| at >= self.at) => return false,
            Some(identity) => {
                let issued = [&identity.current, &identity.next].into_iter().flatten();
                issued.map(|issued| issued.serial.issue_number()).max().unwrap_or(0)
            }
            // Enrolled after the backup.
            None => self.issued_before,
        };
        open && on_record < number && number <= self.issued_floor
    }
}

#[cfg(test)]
mod tests {
    use fleet_kms_identity::Serial;

    use super::*;
    use crate::authz::Scope;
    use crate::identities::Issued;
    use crate::max_offline::MaxOffline;

    const AT: u64 = 1_800_000_000_000;
    const OFF: Duration = MaxOffline::DEFAULT.time();

    fn restored() -> Restored {
        Restored { at: from_ms(AT), issued_before: 100, issued_floor: 100 + ISSUE_NUMBER_JUMP }
    }

    fn identity(number: u64) -> LiveIdentity {
        let id = "spiffe://fleet.test/cluster/07070707-0707-0707-0707-070707070707/node/cp1";
        let serial = Serial::new(number, [1; 8]).unwrap();
        LiveIdentity {
            id: id.parse().unwrap(),
            revision: fleet_kms_store::Revision(1),
            current: Some(Issued { serial, spki_sha256: [0; 32], not_after: from_ms(AT) }),
            next: None,
            banned: false,
            readopted: None,
            roles: Vec::new(),
            scope: Scope::All,
        }
    }

    #[test]
    fn a_higher_number_than_the_rows_is_taken_and_a_lower_or_equal_one_is_not() {
        let (restored, identity) = (restored(), identity(40));
        let takes = |number| restored.readopts(Some(&identity), number, from_ms(AT), OFF);
        assert!(takes(41) && takes(101) && takes(restored.issued_floor));
        assert!(!takes(40) && !takes(39) && !takes(restored.issued_floor + 1));
    }

    #[test]
    fn an_identity_that_was_enrolled_after_the_backup_is_known_by_its_number() {
        assert!(restored().readopts(None, 101, from_ms(AT), OFF));
        // Removed before the backup.
        assert!(!restored().readopts(None, 100, from_ms(AT), OFF));
    }

    #[test]
    fn it_happens_once_never_for_a_banned_one_and_ends_after_187_days() {
        let restored = restored();
        let takes = |identity: &LiveIdentity, now| restored.readopts(Some(identity), 50, now, OFF);
        let day = Duration::from_secs(86_400);
        assert!(takes(&identity(40), restored.at + day * 187));
        assert!(!takes(&identity(40), restored.at + day * 187 + Duration::from_secs(1)));
        assert!(takes(&identity(40), restored.at - day));
        assert!(!takes(&LiveIdentity { banned: true, ..identity(40) }, restored.at));
        let once = LiveIdentity { readopted: Some(restored.at), ..identity(40) };
        assert!(!takes(&once, restored.at));
        // In an earlier restore.
        let before = LiveIdentity { readopted: Some(restored.at - day), ..identity(40) };
        assert!(takes(&before, restored.at));
    }
}
