//! How changes ended since the start, and whether store and audit take them
//! now: for the metrics, which must not touch either.

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
    audit_failing: AtomicBool,
    data_audit_failing: AtomicBool,
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
        // Only what reached the store, or the audit, says something about it.
        match index {
            0 => self.set(Some(false), Some(false)),
            3 | 4 => self.set(Some(true), Some(false)),
            6 => self.set(None, Some(true)),
            _ => {}
        }
    }

    /// Notes whether the data calls' audit could be written.
    pub fn data_audit(&self, written: bool) {
        self.data_audit_failing.store(!written, Ordering::Relaxed);
    }

    /// Notes that the audit of changes did not take an event or an outcome.
    pub(super) fn audit_failed(&self) {
        self.set(None, Some(true));
    }

    /// How many changes ended in each way.
    pub fn ends(&self) -> impl Iterator<Item = (&'static str, u64)> {
        ENDS.iter().zip(&self.ends).map(|(end, count)| (*end, count.load(Ordering::Relaxed)))
    }

    /// Whether the last change that reached the store failed there.
    pub fn store_failing(&self) -> bool {
        self.store_failing.load(Ordering::Relaxed)
    }

    /// Whether the last record of a change could not be written.
    pub fn audit_failing(&self) -> bool {
        self.audit_failing.load(Ordering::Relaxed)
    }

    /// Whether the last sums of data calls could not be written.
    pub fn data_audit_failing(&self) -> bool {
        self.data_audit_failing.load(Ordering::Relaxed)
    }

    fn set(&self, store: Option<bool>, audit: Option<bool>) {
        if let Some(failing) = store {
            self.store_failing.store(failing, Ordering::Relaxed);
        }
        if let Some(failing) = audit {
            self.audit_failing.store(failing, Ordering::Relaxed);
        }
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
        assert!(tally.store_failing() && !tally.audit_failing());
        let audit: Ended = Err(ChangeError::Audit(LogError::Io(full())));
        tally.note(&audit);
        assert!(tally.store_failing() && tally.audit_failing());
        let refused: Ended = Err(ChangeError::Refused(full()));
        tally.note(&refused);
        assert!(tally.store_failing() && tally.audit_failing());
        tally.note(&Ended::Ok(()));
        assert!(!tally.store_failing() && !tally.audit_failing());
        let counted: Vec<_> = tally.ends().filter(|(_, count)| *count > 0).collect();
        assert_eq!(counted, [("done", 1), ("refused", 1), ("store_failed", 1), ("audit_failed", 1)]);
    }
}
