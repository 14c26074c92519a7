//! The rotation of the store key: rows are re-sealed and records written again,
//! page by page, while the agent serves; the head moves last.
//!
//! Until then the older key is in the store, under the newer one, so that a
//! crash at any point costs nothing: the next start goes on.

use std::sync::Arc;
use std::time::Duration;

use fleet_kms_store::{Row, RowName};
use tokio_util::sync::CancellationToken;

use super::{Slots, SlotsError, flatten};
use crate::authz::internal;
use crate::errors::chain;
use crate::ledger::{Changeset, EpochError, PAGE, RowKind, kind_of};
use crate::records::{RecordError, epoch_of, rows};
use crate::trail::Intent;

/// Rows of one transaction.
const PER_CHANGE: usize = 50;
/// Bytes of one transaction, well below the store's limit.
const BYTES_PER_CHANGE: usize = 512 * 1024;
/// A failed rotation goes on after so long.
const RETRY_AFTER: Duration = Duration::from_secs(60);
/// Calls and changes that began before the end are over after so long.
const LAST_USES: Duration = Duration::from_secs(10);

/// Finishes store-key rotations until `stop`: one that a crash cut off at once,
/// others as slots are removed.
pub async fn run(slots: Arc<Slots>, stop: CancellationToken) {
    loop {
        if slots.keyrings.is_rotating() && slots.changes.unconfirmed().is_none() {
            match slots.reseal().await {
                Ok(rows) => {
                    tracing::info!(
                        rows,
                        "every row is under the new store key; the store has lost the older"
                    );
                    tokio::select! {
                        () = stop.cancelled() => return,
                        () = tokio::time::sleep(LAST_USES) => slots.forget_older(),
                    }
                    tracing::info!("the store key is rotated; the older key is gone");
                }
                Err(error) => {
                    tracing::error!(error = chain(&error), "the store key's rotation goes on in a minute");
                }
            }
        }
        tokio::select! {
            () = stop.cancelled() => return,
            () = slots.rotate.notified() => {}
            () = tokio::time::sleep(RETRY_AFTER) => {}
        }
    }
}

/// Why a rotation stopped.
#[derive(Debug, thiserror::Error)]
pub enum ResealError {
    /// A row was not written again.
    #[error(transparent)]
    Slots(#[from] SlotsError),
    /// The head was not moved.
    #[error("the store's head could not be moved under the new key")]
    Epoch(#[from] EpochError),
    /// The older key's row is gone.
    #[error("the row of the older store key is gone: the store is damaged; restore a backup")]
    NoOlderKey,
}

impl From<RecordError> for SlotsError {
    fn from(error: RecordError) -> Self {
        Self::Ledger(error.into())
    }
}

impl Slots {
    /// Finishes a rotation that is under way, where no task does.
    ///
    /// # Errors
    ///
    /// When the store refuses; the next start goes on.
    pub async fn finish(&self) -> Result<(), ResealError> {
        if self.keyrings.is_rotating() && self.changes.unconfirmed().is_none() {
            self.reseal().await?;
            self.forget_older();
        }
        Ok(())
    }

    /// Brings every row under the newest key and the older one out of the store.
    /// Returns how many rows were written. Memory still has the older key, for
    /// calls and changes that began before.
    async fn reseal(&self) -> Result<usize, ResealError> {
        let mut written = 0;
        loop {
            written += self.reseal_rows().await?;
            let ledger = self.changes.ledger();
            let older = ledger.scan_rows(rows::OLDER_STORE_KEYS).await.map_err(SlotsError::from)?;
            let older = older.first().ok_or(ResealError::NoOlderKey)?;
            // What was written under the older key meanwhile needs another round.
            if ledger.finish_epoch(older).await? {
                break;
            }
        }
        self.keyrings.reseal_in_memory(&internal::slots());
        Ok(written)
    }

    /// Wipes the older key from memory.
    fn forget_older(&self) {
        let permit = internal::slots();
        self.keyrings.reseal_in_memory(&permit);
        self.keyrings.end_epoch(&permit);
    }

    async fn reseal_rows(&self) -> Result<usize, SlotsError> {
        let store = Arc::clone(self.changes.ledger().store());
        let epoch = self.changes.ledger().codec().epoch();
        let mut after: Option<RowName> = None;
        let mut written = 0;
        loop {
            let page = store.page_rows("", after.as_ref(), PAGE).await?;
            let full = page.len() == PAGE;
            after = page.last().map(|row| row.name.clone());
            let old = page.into_iter().filter(|row| {
                kind_of(row.name.as_str()) != RowKind::Other && epoch_of(&row.bytes) != Some(epoch)
            });
            for batch in batches(old.collect()) {
                written += self.reseal_batch(&batch).await?;
            }
            if !full {
                return Ok(written);
            }
        }
    }

    async fn reseal_batch(&self, names: &[RowName]) -> Result<usize, SlotsError> {
        let intent = Intent::new("store_key_reseal", "agent").detail("rows", names.len().to_string());
        let prepare = || async {
            let mut changeset = self.changes.ledger().changeset();
            for name in names {
                if let Some(row) = self.changes.ledger().store().get(name).await? {
                    self.reseal_row(&mut changeset, &row)?;
                }
            }
            Ok::<_, SlotsError>((changeset, names.len()))
        };
        let written = self.changes.run(intent, prepare).await.map_err(flatten)?;
        for name in names {
            self.changes.ledger().refresh_settled(name).await?;
        }
        Ok(written)
    }

    fn reseal_row(&self, changeset: &mut Changeset, row: &Row) -> Result<(), SlotsError> {
        let ledger = self.changes.ledger();
        let name = row.name.as_str();
        if ledger.is_settled(&row.name) {
            // The commit removes it. Any other change's row is the only proof
            // that it happened.
            return Ok(());
        }
        let renewed = match kind_of(name) {
            RowKind::Other => None,
            RowKind::Record => ledger.codec().renew(row)?,
            RowKind::Sealed(kind) => self.keyrings.reseal(&internal::slots(), row, kind)?,
        };
        if let Some(bytes) = renewed {
            changeset.replace_sealed(row, bytes);
        }
        Ok(())
    }
}

/// Cuts rows into transactions.
fn batches(rows: Vec<Row>) -> Vec<Vec<RowName>> {
    let mut batches: Vec<Vec<RowName>> = Vec::new();
    let mut bytes = 0;
    for row in rows {
        let fits = bytes + row.bytes.len() <= BYTES_PER_CHANGE;
        match batches.last_mut().filter(|batch| fits && batch.len() < PER_CHANGE) {
            Some(batch) => {
                bytes += row.bytes.len();
                batch.push(row.name);
            }
            None => {
                bytes = row.bytes.len();
                batches.push(vec![row.name]);
            }
        }
    }
    batches
}
