//! The ledger: every write of the agent's store, one transaction at a time.
//!
//! Each transaction carries the change's own record (so that a crash or an
//! unclear reply can be cleared up later) and moves the sealed *head*: a count
//! of transactions and a keyed hash of the set of all other rows. A row that
//! is edited, replayed from an older copy, or deleted behind the agent's back
//! shows when the head is checked. The ledger never decides what to write.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex, PoisonError};

use arc_swap::ArcSwap;
use fleet_kms_audit::{ChangeId, Recorded};
use fleet_kms_keyring::sealed::{self, Kind, SealContext, SealKey};
use fleet_kms_seal::{LockedKey, StoreKey};
use fleet_kms_store::{CommitError, ReadError, Revision, Row, RowName, Store, Txn};

use crate::records::payload::ChangeRecord;
use crate::records::{Codec, Payload, Record, RecordError, rows};

mod changeset;
mod commit;
mod head;
mod keys;
mod rebase;

pub use changeset::Changeset;
use head::Head;
pub use head::{HeadError, Integrity};
use keys::Keys;
pub use rebase::EpochError;
pub(crate) use rebase::{RowKind, kind_of};

/// Makes the random generator for one operation; picked by `main`.
pub type Generator = fn() -> Box<dyn rand_core::CryptoRng + Send>;

/// Rows read from the store in one go.
pub const PAGE: usize = 500;
/// Settled changes removed by one transaction: it leaves room for the rest.
const SETTLED_PER_COMMIT: usize = 16;

/// Ties a store transaction to its intent in the audit.
#[derive(Debug, Clone)]
pub struct Mark {
    /// The change's random id.
    pub change: ChangeId,
    /// Where the intent stands in the audit.
    pub intent: Recorded,
}

/// Why the ledger could not read.
#[derive(Debug, thiserror::Error)]
pub enum LedgerError {
    /// The store did not answer.
    #[error("the store cannot be read")]
    Read(#[from] ReadError),
    /// A row is not what this store wrote.
    #[error(transparent)]
    Record(#[from] RecordError),
}

/// Why a changeset was not committed.
#[derive(Debug, thiserror::Error)]
pub enum WriteError {
    /// A row changed since it was read: read again, decide again.
    #[error("the store changed meanwhile")]
    Conflict,
    /// The store refused; nothing was written.
    #[error("the store did not take the change; nothing was written")]
    NotApplied(#[source] CommitError),
    /// The store's reply was lost and it cannot be read: the change may or may
    /// not have happened. Start-up clears it up by the change's record.
    #[error("the store's reply was lost; whether the change happened shows at the next start")]
    Unknown(#[source] CommitError),
    /// The head could not be read again.
    #[error("the store's head cannot be read")]
    Head(#[from] HeadError),
}

/// All access to the store.
pub struct Ledger {
    store: Arc<dyn Store>,
    /// Replaced only by who holds `head`.
    keys: ArcSwap<Keys>,
    head: tokio::sync::Mutex<Head>,
    settled: Mutex<Vec<Record<ChangeRecord>>>,
    /// Rows whose records were left out because they are not authentic.
    damaged: Mutex<BTreeSet<RowName>>,
    agent: String,
    generator: Generator,
}

impl Ledger {
    /// Writes the first transaction of an empty store: head and `rows`, which
    /// are plain bytes (meta and slots).
    ///
    /// # Errors
    ///
    /// When the store is not empty or does not take the transaction.
    pub async fn create(
        store: &dyn Store,
        codec: Codec,
        head_key: LockedKey,
        rows: Vec<(RowName, Vec<u8>)>,
        generator: Generator,
    ) -> Result<(), CommitError> {
        let keys = Keys::new(codec, head_key);
        let mut head = Head::empty(keys.codec().epoch());
        let mut txn = Txn::new().expect(rows::fixed(rows::HEAD), Revision::ABSENT);
        for (name, bytes) in rows {
            head.toggle(&keys, &name, &bytes);
            txn = txn.expect(name.clone(), Revision::ABSENT).put(name, bytes);
        }
        let sealed = head.seal(&keys, &mut *generator());
        store.commit(txn.put(rows::fixed(rows::HEAD), sealed)).await.map(drop)
    }

    /// Opens the ledger of an initialised store.
    ///
    /// # Errors
    ///
    /// When the head is missing or is not this store's.
    pub async fn open(
        store: Arc<dyn Store>,
        codec: Codec,
        head_key: LockedKey,
        agent: String,
        generator: Generator,
    ) -> Result<Self, HeadError> {
        Self::open_with(store, Keys::new(codec, head_key), agent, generator).await
    }

    /// Opens the ledger of a store whose key is being rotated: `older` is the
    /// key of the epoch before `newer`'s.
    ///
    /// # Errors
    ///
    /// As [`Self::open`].
    pub async fn open_between(
        store: Arc<dyn Store>,
        older: &StoreKey,
        newer: &StoreKey,
        agent: String,
        generator: Generator,
    ) -> Result<Self, HeadError> {
        let codec = Codec::new(older.store(), older.epoch(), older.mac_key());
        let keys = Keys::new(codec, older.head_key()).with_newer(newer);
        Self::open_with(store, keys, agent, generator).await
    }

    /// Opens a copy of this store with the same keys, to look into it.
    ///
    /// # Errors
    ///
    /// As [`Self::open`].
    pub async fn of_copy(&self, copy: Arc<dyn Store>) -> Result<Self, HeadError> {
        let keys = Keys::clone(&self.keys.load());
        Self::open_with(copy, keys, self.agent.clone(), self.generator).await
    }

    async fn open_with(
        store: Arc<dyn Store>,
        keys: Keys,
        agent: String,
        generator: Generator,
    ) -> Result<Self, HeadError> {
        let head = Head::load(&*store, &keys).await?;
        Ok(Self {
            store,
            keys: ArcSwap::from_pointee(keys),
            head: tokio::sync::Mutex::new(head),
            settled: Mutex::default(),
            damaged: Mutex::default(),
            agent,
            generator,
        })
    }

    /// Returns the record codec.
    pub fn codec(&self) -> Arc<Codec> {
        Arc::clone(self.keys.load().codec())
    }

    /// Returns the store.
    pub(crate) fn store(&self) -> &Arc<dyn Store> {
        &self.store
    }

    /// Returns the number of transactions that the head counts.
    pub async fn head_count(&self) -> u64 {
        self.head.lock().await.count()
    }

    /// Compares the head with all rows.
    ///
    /// # Errors
    ///
    /// When the store cannot be read.
    pub async fn check(&self) -> Result<Integrity, HeadError> {
        let head = self.head.lock().await;
        head.check(&*self.store, &self.keys.load_full()).await
    }

    /// Reads one record.
    ///
    /// # Errors
    ///
    /// When the store cannot be read or the row is damaged.
    pub async fn read<P: Payload>(&self, name: &RowName) -> Result<Option<Record<P>>, LedgerError> {
        let row = self.store.get(name).await?;
        let codec = self.codec();
        Ok(row.map(|row| codec.decode(row)).transpose()?)
    }

    /// Reads all records under a prefix.
    ///
    /// # Errors
    ///
    /// When the store cannot be read or a row is damaged.
    pub async fn scan<P: Payload>(&self, prefix: &str) -> Result<Vec<Record<P>>, LedgerError> {
        let rows = self.scan_rows(prefix).await?;
        let codec = self.codec();
        rows.into_iter().map(|row| Ok(codec.decode(row)?)).collect()
    }

    /// Reads all records under a prefix but those that are not authentic:
    /// whoever damaged one has not damaged the others, which serve on. Each is
    /// named in the log and by [`Self::damaged`].
    ///
    /// # Errors
    ///
    /// When the store cannot be read, or a later release wrote a record.
    pub async fn scan_sound<P: Payload>(&self, prefix: &str) -> Result<Vec<Record<P>>, LedgerError> {
        let rows = self.scan_rows(prefix).await?;
        let codec = self.codec();
        let mut sound = Vec::with_capacity(rows.len());
        for row in rows {
            sound.extend(self.sound(&codec, row)?);
        }
        Ok(sound)
    }

    /// Reads one record as [`Self::scan_sound`] does.
    ///
    /// # Errors
    ///
    /// As there.
    pub async fn read_sound<P: Payload>(&self, name: &RowName) -> Result<Option<Record<P>>, LedgerError> {
        let row = self.store.get(name).await?;
        row.map_or(Ok(None), |row| self.sound(&self.codec(), row))
    }

    fn sound<P: Payload>(&self, codec: &Codec, row: Row) -> Result<Option<Record<P>>, LedgerError> {
        let name = row.name.clone();
        if codec.is_genuine(&row) {
            return Ok(Some(codec.decode(row)?));
        }
        // The decoder may take the damage for a later release's format.
        tracing::error!(
            row = name.as_str(),
            "a record was edited or damaged: it is left out, and the rest is served; restore a backup"
        );
        self.damaged.lock().unwrap_or_else(PoisonError::into_inner).insert(name);
        Ok(None)
    }

    /// Names the rows whose records were left out.
    pub fn damaged(&self) -> Vec<RowName> {
        self.damaged.lock().unwrap_or_else(PoisonError::into_inner).iter().cloned().collect()
    }

    /// Reads one row as it is stored.
    ///
    /// # Errors
    ///
    /// When the store cannot be read.
    pub async fn read_row(&self, name: &RowName) -> Result<Option<Row>, ReadError> {
        self.store.get(name).await
    }

    /// Reads the names and revisions of all rows under a prefix.
    ///
    /// # Errors
    ///
    /// When the store cannot be read.
    pub async fn scan_revisions(&self, prefix: &str) -> Result<Vec<(RowName, Revision)>, ReadError> {
        let mut found: Vec<(RowName, Revision)> = Vec::new();
        loop {
            let after = found.last().map(|(name, _)| name);
            let page = self.store.page_revisions(prefix, after, PAGE).await?;
            let full = page.len() == PAGE;
            found.extend(page);
            if !full {
                return Ok(found);
            }
        }
    }

    /// Reads all rows under a prefix as they are stored.
    ///
    /// # Errors
    ///
    /// When the store cannot be read.
    pub async fn scan_rows(&self, prefix: &str) -> Result<Vec<Row>, ReadError> {
        let mut rows: Vec<Row> = Vec::new();
        loop {
            let after = rows.last().map(|row| row.name.clone());
            let page = self.store.page_rows(prefix, after.as_ref(), PAGE).await?;
            let full = page.len() == PAGE;
            rows.extend(page);
            if !full {
                return Ok(rows);
            }
        }
    }

    /// Starts a changeset.
    pub fn changeset(&self) -> Changeset {
        Changeset::new(self.codec())
    }

    /// Commits a changeset together with the change's record and the head;
    /// returns the revision that all its rows have now. When this returns `Ok`
    /// the change is durable.
    ///
    /// # Errors
    ///
    /// See [`WriteError`]; except for `Unknown` nothing was written.
    pub async fn commit(&self, changeset: Changeset, mark: &Mark) -> Result<Revision, WriteError> {
        let mut changeset = changeset;
        let (held, settled): (Vec<_>, Vec<_>) =
            self.take_settled().into_iter().partition(|record| changeset.writes_to(&record.row));
        self.settled().extend(held);
        for record in &settled {
            changeset.delete(record);
        }
        let change_row = rows::change(&mark.change);
        changeset.insert(change_row.clone(), &self.change_record(mark));
        let mut head = self.head.lock().await;
        let result = self.commit_over(&mut head, &changeset, Some(&change_row)).await;
        if result.is_err() {
            let settled = self.still_there(settled).await;
            self.settled().extend(settled);
        }
        result
    }

    /// Commits what is no change: counts, which no operator asked for and the
    /// audit does not record. After `Unknown` the counts may or may not be
    /// there.
    ///
    /// # Errors
    ///
    /// See [`WriteError`].
    pub async fn commit_counts(&self, changeset: Changeset) -> Result<Revision, WriteError> {
        let mut head = self.head.lock().await;
        self.commit_over(&mut head, &changeset, None).await
    }

    /// Says that a change's outcome is in the audit: a later transaction
    /// removes its record.
    ///
    /// # Errors
    ///
    /// When the store cannot be read.
    pub async fn settle(&self, change: &ChangeId) -> Result<(), LedgerError> {
        if let Some(record) = self.read(&rows::change(change)).await? {
            self.settled().push(record);
        }
        Ok(())
    }

    /// Settles every change of this agent whose record is still in the store.
    /// For the start, once no intent is open: a run ends with some of its last
    /// changes settled in memory only.
    ///
    /// # Errors
    ///
    /// When the store cannot be read.
    pub(crate) async fn settle_all(&self) -> Result<(), LedgerError> {
        let left = self.scan::<ChangeRecord>(rows::CHANGES).await?;
        let left = left.into_iter().filter(|record| record.payload.agent == self.agent);
        *self.settled() = left.collect();
        Ok(())
    }

    /// Says whether a row is the record of a change whose outcome is in the
    /// audit, still to be removed.
    pub(crate) fn is_settled(&self, row: &RowName) -> bool {
        self.settled().iter().any(|record| record.row == *row)
    }

    /// Reads a record that is still to be removed again, after it was written
    /// under another store key.
    ///
    /// # Errors
    ///
    /// When the store cannot be read.
    pub(crate) async fn refresh_settled(&self, row: &RowName) -> Result<(), LedgerError> {
        if self.is_settled(row) {
            let record = self.read::<ChangeRecord>(row).await?;
            let mut settled = self.settled();
            settled.retain(|known| known.row != *row);
            settled.extend(record);
        }
        Ok(())
    }

    /// Says whether a change's transaction happened.
    ///
    /// # Errors
    ///
    /// When the store cannot be read.
    pub async fn happened(&self, change: &ChangeId) -> Result<bool, LedgerError> {
        Ok(self.read::<ChangeRecord>(&rows::change(change)).await?.is_some())
    }

    /// Drops the records that another transaction has removed: after a lost
    /// reply one may apply late, and expecting a record that it took along
    /// would make every later change conflict.
    async fn still_there(&self, settled: Vec<Record<ChangeRecord>>) -> Vec<Record<ChangeRecord>> {
        let mut there = Vec::with_capacity(settled.len());
        for record in settled {
            match self.store.get(&record.row).await {
                Ok(row) if row.as_ref().map(|row| row.revision) != Some(record.revision) => {}
                Ok(_) | Err(_) => there.push(record),
            }
        }
        there
    }

    fn change_record(&self, mark: &Mark) -> ChangeRecord {
        ChangeRecord {
            change: mark.change.as_bytes().to_vec(),
            audit_seq: mark.intent.seq,
            intent: mark.intent.hash.to_vec(),
            agent: self.agent.clone(),
        }
    }

    fn take_settled(&self) -> Vec<Record<ChangeRecord>> {
        let mut settled = self.settled();
        let keep = settled.len().saturating_sub(SETTLED_PER_COMMIT);
        settled.split_off(keep)
    }

    fn settled(&self) -> std::sync::MutexGuard<'_, Vec<Record<ChangeRecord>>> {
        self.settled.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Seals under the head key: the head is a sealed blob of its own kind.
fn seal_with(
    key: &LockedKey,
    context: &SealContext<'_>,
    plaintext: &[u8],
    rng: &mut dyn rand_core::CryptoRng,
) -> Vec<u8> {
    sealed::seal(&SealKey::from_bytes(&mut key.expose_secret().clone()), context, plaintext, rng)
}

/// The context of the head's sealed blob.
fn head_context(codec: &Codec, epoch: u32) -> SealContext<'static> {
    SealContext { store: codec.store(), row: rows::HEAD.as_bytes(), kind: Kind::Head, epoch }
}

#[cfg(test)]
mod tests;
