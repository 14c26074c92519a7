//! One transaction over the head, and what became of it when the reply is lost.
//!
//! It must never call a transaction not applied that may still apply: the audit
//! would say that a change did not happen, and then it happens.

use fleet_kms_store::{CommitError, Revision, RowName, Txn};

use super::head::{Head, HeadError};
use super::{Changeset, Ledger, WriteError};
use crate::records::rows;

/// Attempts to commit while only the head moved (another agent's change).
pub(super) const HEAD_ATTEMPTS: usize = 16;

impl Ledger {
    pub(super) async fn commit_over(
        &self,
        head: &mut Head,
        changeset: &Changeset,
        change_row: Option<&RowName>,
    ) -> Result<Revision, WriteError> {
        let keys = self.keys.load_full();
        if keys.are_locked() {
            return Err(HeadError::Locked.into());
        }
        for _ in 0..HEAD_ATTEMPTS {
            let mut next = head.next();
            changeset.toggle_elements(&mut next, &keys);
            match self.store.commit(self.with_head(changeset.txn(), head, &next)).await {
                Ok(revision) => {
                    next.set_row_revision(revision);
                    *head = next;
                    return Ok(revision);
                }
                Err(CommitError::Conflict) => {
                    let now = self.load_head().await?;
                    if now.row_revision() == head.row_revision() {
                        return Err(WriteError::Conflict);
                    }
                    *head = now;
                }
                Err(error @ CommitError::Unknown(_)) => {
                    return self.clear_up(head, change_row, error).await;
                }
                Err(error) => return Err(WriteError::NotApplied(error)),
            }
        }
        Err(WriteError::Conflict)
    }

    /// After a lost reply: the change's own record says whether it happened.
    ///
    /// If the record is not there the transaction may still be on its way. It
    /// expects the head that it was made over, so it can be called not applied
    /// only when that head is gone; if nobody else moves it, this does.
    async fn clear_up(
        &self,
        head: &mut Head,
        change_row: Option<&RowName>,
        error: CommitError,
    ) -> Result<Revision, WriteError> {
        let expected = head.row_revision();
        for _ in 0..HEAD_ATTEMPTS {
            // The head first, the record then: a record that is not there once the head has moved never comes.
            let Ok(now) = self.load_head().await else { break };
            *head = now;
            let Some(change_row) = change_row else { break };
            match self.store.get(change_row).await {
                Ok(Some(row)) => return Ok(row.revision),
                Ok(None) if head.row_revision() != expected => return Err(WriteError::NotApplied(error)),
                Ok(None) => {}
                Err(_) => break,
            }
            let mut next = head.next();
            match self.store.commit(self.with_head(Txn::new(), head, &next)).await {
                Ok(revision) => {
                    next.set_row_revision(revision);
                    *head = next;
                    return Err(WriteError::NotApplied(error));
                }
                Err(CommitError::Conflict | CommitError::Unknown(_)) => {}
                Err(_) => break,
            }
        }
        Err(WriteError::Unknown(error))
    }

    async fn load_head(&self) -> Result<Head, HeadError> {
        Head::load(&*self.store, &self.keys.load_full()).await
    }

    /// Adds to a transaction that it moves the head from `head` to `next`.
    fn with_head(&self, txn: Txn, head: &Head, next: &Head) -> Txn {
        let sealed = next.seal(&self.keys.load_full(), &mut *(self.generator)());
        let name = rows::fixed(rows::HEAD);
        txn.expect(name.clone(), head.row_revision()).put(name, sealed)
    }
}
