//! Heads that no change makes: of rows as they are after a rollback, and under
//! the next epoch at the end of a store-key rotation.

use fleet_kms_keyring::sealed::Kind;
use fleet_kms_store::{CommitError, Row, Txn};

use super::commit::HEAD_ATTEMPTS;
use super::head::Head;
use super::{Keys, Ledger, LedgerError, WriteError};
use crate::records::{epoch_of, rows};

impl Ledger {
    /// Takes the rows as they are: writes the head that describes them, with a
    /// count above `count` and above its own. Returns the new count.
    ///
    /// Only an operator's word makes this right: it blesses whatever is there.
    ///
    /// # Errors
    ///
    /// When the store cannot be read or does not take it.
    pub async fn accept_rows(&self, count: u64) -> Result<u64, WriteError> {
        let mut head = self.head.lock().await;
        let keys = self.keys.load_full();
        for _ in 0..HEAD_ATTEMPTS {
            let epoch = head.epoch();
            let next = head.of_rows(&*self.store, &keys, epoch, count).await?;
            if self.write_head(&mut head, next, &keys, Txn::new()).await? {
                return Ok(head.count());
            }
        }
        Err(WriteError::Conflict)
    }

    /// Adds the key of the next epoch: records are written under it from now
    /// on, and both epochs are read.
    pub(crate) async fn add_epoch(&self, newer: &fleet_kms_seal::StoreKey) {
        let _head = self.head.lock().await;
        self.keys.store(self.keys.load().with_newer(newer).into());
    }

    /// Ends a store-key rotation: moves the head under the newest epoch,
    /// removes `older_key` and forgets the older epoch, unless a row is still
    /// under it. Returns whether it did.
    ///
    /// # Errors
    ///
    /// When the store cannot be read or does not take it.
    pub(crate) async fn finish_epoch(&self, older_key: &Row) -> Result<bool, EpochError> {
        let mut head = self.head.lock().await;
        let keys = self.keys.load_full();
        let epoch = keys.codec().epoch();
        for row in self.scan_rows("").await? {
            if is_of_an_epoch(row.name.as_str()) && epoch_of(&row.bytes) != Some(epoch) {
                return Ok(false);
            }
        }
        for _ in 0..HEAD_ATTEMPTS {
            let mut next = head.of_rows(&*self.store, &keys, epoch, 0).await.map_err(WriteError::from)?;
            next.toggle(&keys, &older_key.name, &older_key.bytes);
            let txn =
                Txn::new().expect(older_key.name.clone(), older_key.revision).delete(older_key.name.clone());
            if self.write_head(&mut head, next, &keys, txn).await? {
                self.keys.store(keys.without_older().into());
                return Ok(true);
            }
        }
        Err(WriteError::Conflict.into())
    }

    /// Wipes the ledger's keys, after the change that is under way: it reads
    /// and writes nothing from then on.
    pub(crate) async fn lock(&self) {
        let _head = self.head.lock().await;
        self.keys.store(self.keys.load().locked().into());
    }

    /// Writes `next` with `txn`; says whether the head was still the one that
    /// `next` was made from, and if not reads it again.
    async fn write_head(
        &self,
        head: &mut Head,
        mut next: Head,
        keys: &Keys,
        txn: Txn,
    ) -> Result<bool, WriteError> {
        let name = rows::fixed(rows::HEAD);
        let sealed = next.seal(keys, &mut *(self.generator)());
        let txn = txn.expect(name.clone(), head.row_revision()).put(name.clone(), sealed.clone());
        let revision = match self.store.commit(txn).await {
            Ok(revision) => revision,
            Err(CommitError::Conflict) => {
                *head = Head::load(&*self.store, keys).await?;
                return Ok(false);
            }
            // The sealed head has a random nonce: it is ours or somebody else's.
            Err(error @ CommitError::Unknown(_)) => match self.store.get(&name).await {
                Ok(Some(row)) if row.bytes == sealed => row.revision,
                Ok(_) => return Err(WriteError::NotApplied(error)),
                Err(_) => return Err(WriteError::Unknown(error)),
            },
            Err(error) => return Err(WriteError::NotApplied(error)),
        };
        next.set_row_revision(revision);
        *head = next;
        Ok(true)
    }
}

/// Why a store-key rotation did not end.
#[derive(Debug, thiserror::Error)]
pub enum EpochError {
    /// The store cannot be read.
    #[error(transparent)]
    Ledger(#[from] LedgerError),
    /// The store does not take the new head.
    #[error(transparent)]
    Write(#[from] WriteError),
}

impl From<fleet_kms_store::ReadError> for EpochError {
    fn from(error: fleet_kms_store::ReadError) -> Self {
        Self::Ledger(error.into())
    }
}

/// Says whether a row is under the key of an epoch that a rotation changes, and
/// if it is sealed, as what.
pub(crate) fn kind_of(row: &str) -> RowKind {
    let has = |prefix: &str| row.starts_with(prefix);
    if row == rows::META || row == rows::HEAD || has(rows::SLOTS) || has(rows::OLDER_STORE_KEYS) {
        RowKind::Other
    } else if has(rows::KEKS) {
        RowKind::Sealed(Kind::Kek)
    } else if has(rows::AUTHORITY_KEYS) {
        RowKind::Sealed(Kind::CaKey)
    } else {
        RowKind::Record
    }
}

/// How a row's bytes are protected.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum RowKind {
    /// Sealed, as what.
    Sealed(Kind),
    /// A record.
    Record,
    /// Neither, or not by a key that a rotation changes.
    Other,
}

fn is_of_an_epoch(row: &str) -> bool {
    kind_of(row) != RowKind::Other
}
