//! The sealed head: a count of transactions and a keyed hash of the set of all
//! other rows.
//!
//! The set hash is the XOR of each row's element, a PRF of its name and bytes
//! (MSet-XOR-Hash for sets, Clarke et al., ASIACRYPT 2003). Elements and hash
//! stay hidden from whoever holds the file, and a name occurs once in a store,
//! so a set with the same hash cannot be looked for.

use fleet_kms_keyring::sealed::{self, SealKey};
use fleet_kms_store::{ReadError, Revision, RowName, Store};

use super::{Keys, PAGE, head_context, seal_with};
use crate::records::rows;

const LENGTH: usize = 8 + 32;

/// Why the head cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum HeadError {
    /// The store did not answer.
    #[error("the store cannot be read")]
    Read(#[from] ReadError),
    /// The row is gone.
    #[error("the store has no head row: it is damaged or was edited; restore a backup")]
    Missing,
    /// The row is not this store's.
    #[error("the store's head does not open: it was edited or comes from another store; restore a backup")]
    Altered,
    /// `kms-agent lock` wiped the keys.
    #[error("the agent is locked; restart it to unlock it")]
    Locked,
}

/// What comparing head and rows found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Integrity {
    /// Every row is as the last transaction left it.
    Intact { rows: usize },
    /// At least one row was edited, replayed or deleted.
    Broken { rows: usize },
}

/// The head as of one transaction.
#[derive(Debug, Clone)]
pub(super) struct Head {
    count: u64,
    set: [u8; 32],
    /// The epoch whose keys the set hash and the sealed row are under.
    epoch: u32,
    row_revision: Revision,
}

impl Head {
    /// The head of an empty store.
    pub(super) fn empty(epoch: u32) -> Self {
        Self { count: 0, set: [0; 32], epoch, row_revision: Revision::ABSENT }
    }

    /// Reads and opens the head.
    pub(super) async fn load(store: &dyn Store, keys: &Keys) -> Result<Self, HeadError> {
        if keys.are_locked() {
            return Err(HeadError::Locked);
        }
        let row = store.get(&rows::fixed(rows::HEAD)).await?.ok_or(HeadError::Missing)?;
        let epoch = sealed::epoch_of(&row.bytes).map_err(|_| HeadError::Altered)?;
        let key = keys.head(epoch).ok_or(HeadError::Altered)?;
        let context = head_context(keys.codec(), epoch);
        let key = SealKey::from_bytes(&mut key.expose_secret().clone());
        let opened = sealed::open(&key, &context, &row.bytes).map_err(|_| HeadError::Altered)?;
        let bytes: &[u8; LENGTH] = opened.as_slice().try_into().map_err(|_| HeadError::Altered)?;
        let (count, set) = bytes.split_first_chunk::<8>().expect("the length is fixed");
        let set = set.try_into().expect("the length is fixed");
        Ok(Self { count: u64::from_be_bytes(*count), set, epoch, row_revision: row.revision })
    }

    /// Returns the head that follows, with the same rows.
    pub(super) fn next(&self) -> Self {
        Self { count: self.count + 1, ..self.clone() }
    }

    /// Adds a row to the set, or takes it away.
    pub(super) fn toggle(&mut self, keys: &Keys, row: &RowName, stored: &[u8]) {
        let element = keys.codec().element(self.epoch, row, stored);
        for (byte, other) in self.set.iter_mut().zip(element) {
            *byte ^= other;
        }
    }

    pub(super) fn seal(&self, keys: &Keys, rng: &mut dyn rand_core::CryptoRng) -> Vec<u8> {
        let key = keys.head(self.epoch).expect("the head's epoch is open");
        let mut bytes = [0; LENGTH];
        let (count, set) = bytes.split_at_mut(8);
        count.copy_from_slice(&self.count.to_be_bytes());
        set.copy_from_slice(&self.set);
        seal_with(key, &head_context(keys.codec(), self.epoch), &bytes, rng)
    }

    pub(super) fn count(&self) -> u64 {
        self.count
    }

    pub(super) fn epoch(&self) -> u32 {
        self.epoch
    }

    /// Returns the head that describes the rows that are there, under `epoch`,
    /// with a count that is above this one's and above `count`.
    pub(super) async fn of_rows(
        &self,
        store: &dyn Store,
        keys: &Keys,
        epoch: u32,
        count: u64,
    ) -> Result<Self, HeadError> {
        let (set, _) = set_of_rows(store, keys, epoch).await?;
        let count = self.count.max(count) + 1;
        Ok(Self { count, set, epoch, row_revision: self.row_revision })
    }

    pub(super) fn row_revision(&self) -> Revision {
        self.row_revision
    }

    pub(super) fn set_row_revision(&mut self, revision: Revision) {
        self.row_revision = revision;
    }

    /// Reads every row and compares.
    pub(super) async fn check(&self, store: &dyn Store, keys: &Keys) -> Result<Integrity, HeadError> {
        let (set, rows) = set_of_rows(store, keys, self.epoch).await?;
        Ok(if set == self.set { Integrity::Intact { rows } } else { Integrity::Broken { rows } })
    }
}

/// Reads every row; returns the set hash and the number of rows.
async fn set_of_rows(store: &dyn Store, keys: &Keys, epoch: u32) -> Result<([u8; 32], usize), HeadError> {
    let mut found = Head::empty(epoch);
    let mut rows = 0;
    let mut after: Option<RowName> = None;
    loop {
        let page = store.page_rows("", after.as_ref(), PAGE).await?;
        let full = page.len() == PAGE;
        for row in page {
            if row.name.as_str() != rows::HEAD {
                found.toggle(keys, &row.name, &row.bytes);
                rows += 1;
            }
            after = Some(row.name);
        }
        if !full {
            return Ok((found.set, rows));
        }
    }
}
