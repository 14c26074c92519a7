//! How changes ended since the start, and whether the store takes them
//! now: for the metrics, which must not touch it. The audit says so itself.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use super::ChangeError;
use crate::ledger::WriteError;

/// Every way a change can end.
const ENDS: [&str; 7] =
    ["done", "refused", "contended", "store_failed", "unknown", "unconfirmed", "audit_failed"];

/// Counted since the start.
#[derive(Debug, Default)]
pub struct Tally {
    ends: [AtomicU64; ENDS.len()],
    store_failing: AtomicBool,
}

impl Tally {
    /// Counts one change.
    pub(super) fn note<T, E: std::error::Error>(&self, ended: &Result<T, ChangeError<E>>) {
        let index = match ended {
            Ok(_) => 0,
            Err(ChangeError::Refused(_)) => 1,
            Err(ChangeError::Contended | ChangeError::Write(WriteError::Conflict)) => 2,
            Err(ChangeError::Write(WriteError::NotApplied(_) | WriteError::Head(_))) => 3,
            Err(ChangeError::Write(WriteError::Unknown(_))) => 4,
            Err(ChangeError::Unconfirmed(_)) => 5,
            Err(ChangeError::Audit(_)) => 6,
        };
        if let Some(count) = self.ends.get(index) {
            count.fetch_add(1, Ordering::Relaxed);
        }
        // Only what reached the store says something about it.
        match index {
            0 => self.store_failing.store(false, Ordering::Relaxed),
            3 | 4 => self.store_failing.store(true, Ordering::Relaxed),
            _ => {}
        }
    }

    /// How many changes ended in each way.
    pub fn ends(&self) -> impl Iterator<Item = (&'static str, u64)> {
        ENDS.iter().zip(&self.ends).map(|(end, count)| (*end, count.load(Ordering::Relaxed)))
    }

    /// Whether the last change that reached the store failed there.
    pub fn store_failing(&self) -> bool {
        self.store_failing.load(Ordering::Relaxed)
    }
}

#[cfg(test)]
mod tests {
    use std::io;

    use fleet_kms_audit::LogError;
    use fleet_kms_store::CommitError;

    use super::*;

    type Ended = Result<(), ChangeError<io::Error>>;

    fn full() -> io::Error {
        io::ErrorKind::StorageFull.into()
    }

    #[test]
    fn what_fails_shows_until_a_change_gets_through() {
        let tally = Tally::default();
        let cause = CommitError::NotApplied(full().into());
        let store: Ended = Err(ChangeError::Write(WriteError::NotApplied(cause)));
        tally.note(&store);
        assert!(tally.store_failing());
        let audit: Ended = Err(ChangeError::Audit(LogError::Io(full())));
        tally.note(&audit);
        assert!(tally.store_failing());
        let refused: Ended = Err(ChangeError::Refused(full()));
        tally.note(&refused);
        assert!(tally.store_failing());
        tally.note(&Ended::Ok(()));
        assert!(!tally.store_failing());
        let counted: Vec<_> = tally.ends().filter(|(_, count)| *count > 0).collect();
        assert_eq!(counted, [("done", 1), ("refused", 1), ("store_failed", 1), ("audit_failed", 1)]);
    }
}
