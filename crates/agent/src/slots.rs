//! Root slots while the agent runs: add, test, list, remove.
//!
//! Any slot opens the store, so the rules are about what must not be lost: the
//! last slot that is known to open it stays, and so does, unless forced, the
//! last that opens a backup that is kept. A removed slot's root key opens old
//! copies for ever; removing one therefore begins a new epoch of the store key
//! ([`reseal`]), which it never learns.

use std::sync::Arc;
use std::time::Duration;

use fleet_kms_keyring::SlotId;
use fleet_kms_seal::{MalformedSlotRecord, RootSlot, SlotError, SlotKind, SlotRecord};
use fleet_kms_store::{ReadError, Row};
use tokio::sync::Notify;

use crate::authz::internal;
use crate::backup::{self, BackupError, Backups};
use crate::changes::{ChangeError, Changes};
use crate::ledger::{Changeset, Generator, LedgerError};
use crate::live_keyrings::{KeysError, LiveKeyrings, SlotSealError};
use crate::records::payload::SlotNote;
use crate::records::rows;
use crate::storage::MAX_SLOTS;
use crate::times::to_ms;
use crate::trail::Intent;

mod remove;
pub mod reseal;

pub use remove::{Removal, Removed};

/// A wrong passphrase is answered after so long.
const WRONG_DELAY: Duration = Duration::from_secs(1);
/// The slot that opens the store at a start is noted so often.
const NOTE_EVERY: Duration = Duration::from_secs(24 * 60 * 60);

/// Why a slot was not changed.
#[derive(Debug, thiserror::Error)]
pub enum SlotsError {
    /// The store cannot be read.
    #[error(transparent)]
    Ledger(#[from] LedgerError),
    /// A slot's row is damaged.
    #[error("root slot {row} is damaged; restore a backup")]
    Damaged {
        row: String,
        #[source]
        source: MalformedSlotRecord,
    },
    /// The agent is locked.
    #[error(transparent)]
    Keys(#[from] KeysError),
    /// The root key does not seal or open.
    #[error(transparent)]
    Slot(#[from] SlotError),
    /// There are too many.
    #[error("the store has {MAX_SLOTS} root slots, the most there may be; remove one first")]
    TooMany,
    /// No slot has this id.
    #[error("there is no root slot {0}; `kms-agent slot list` shows them")]
    Unknown(String),
    /// Nothing else is known to open the store.
    #[error(
        "root slot {0} is the last one known to open the store; add another, or run `kms-agent slot test` for one that is there"
    )]
    LastVerified(SlotId),
    /// Nothing else opens a backup.
    #[error(
        "root slot {slot} is the last one that opens the backup {backup}; make a new backup and let that one go, or use --force"
    )]
    LastOfBackup { slot: SlotId, backup: String },
    /// The new store key cannot be sealed for a slot that stays.
    #[error(
        "the store key is renewed with this, and no root key was given for slot {slot} ({kind}); give it, or replace the passphrase slots by a new one with --new-passphrase"
    )]
    NotGiven { slot: SlotId, kind: SlotKind },
    /// Nothing would open the store.
    #[error("no root slot would be left")]
    NoneLeft,
    /// The last rotation has not finished.
    #[error("the store key's rotation of before has not finished; try again when the agent's log says so")]
    Rotating,
    /// The kept backups cannot be looked at.
    #[error(transparent)]
    Backups(#[from] BackupError),
    /// The change was not made.
    #[error("the change was not made: {0}")]
    Change(String),
}

impl From<SlotSealError> for SlotsError {
    fn from(error: SlotSealError) -> Self {
        match error {
            SlotSealError::Keys(error) => error.into(),
            SlotSealError::Slot(error) => error.into(),
        }
    }
}

impl From<ReadError> for SlotsError {
    fn from(error: ReadError) -> Self {
        Self::Ledger(error.into())
    }
}

/// A slot with what is known of it.
pub struct Slot {
    /// As it is stored.
    pub record: SlotRecord,
    /// What is known of it beyond that.
    pub note: SlotNote,
    row: Row,
}

/// Works on the root slots.
pub struct Slots {
    changes: Arc<Changes>,
    keyrings: Arc<LiveKeyrings>,
    backups: Arc<Backups>,
    /// Opened the store at this start.
    in_use: SlotId,
    generator: Generator,
    rotate: Notify,
    /// Held while slots are added or removed: a slot that is added while
    /// another is removed would be sealed for a store key that goes.
    one_at_a_time: tokio::sync::Mutex<()>,
}

impl Slots {
    /// Makes the only one who works on the slots.
    pub fn new(
        changes: Arc<Changes>,
        keyrings: Arc<LiveKeyrings>,
        backups: Arc<Backups>,
        in_use: SlotId,
        generator: Generator,
    ) -> Self {
        let (rotate, one_at_a_time) = (Notify::new(), tokio::sync::Mutex::default());
        Self { changes, keyrings, backups, in_use, generator, rotate, one_at_a_time }
    }

    /// Returns the slot that opened the store at this start.
    pub fn in_use(&self) -> SlotId {
        self.in_use
    }

    /// Lists the slots.
    ///
    /// # Errors
    ///
    /// When the store cannot be read.
    pub async fn list(&self) -> Result<Vec<Slot>, SlotsError> {
        let mut slots = Vec::new();
        for row in self.changes.ledger().scan_rows(rows::SLOTS).await? {
            let damaged = |source| SlotsError::Damaged { row: row.name.as_str().to_owned(), source };
            let record = SlotRecord::parse(&row.bytes).map_err(damaged)?;
            let note = self.changes.ledger().read_sound::<SlotNote>(&rows::slot_note(&record.slot())).await?;
            slots.push(Slot { record, note: note.map(|note| note.payload).unwrap_or_default(), row });
        }
        Ok(slots)
    }

    /// Adds a slot, after looking that it opens what it seals.
    ///
    /// # Errors
    ///
    /// When the agent is locked, there are too many, or the store refuses.
    pub async fn add(&self, slot: &dyn RootSlot, label: &str) -> Result<SlotId, SlotsError> {
        let _one = self.one_at_a_time.lock().await;
        if self.list().await?.len() >= MAX_SLOTS {
            return Err(SlotsError::TooMany);
        }
        self.must_not_rotate().await?;
        let id = SlotId::generate(&mut *(self.generator)());
        let intent = Intent::new("slot_add", "host").target(id.to_string()).detail("label", label);
        let intent = intent.detail("kind", slot.kind().to_string());
        let prepare = || async {
            let record = self.keyrings.seal_slot(&internal::slots(), slot, id)?;
            let mut changeset = self.changes.ledger().changeset();
            changeset.insert_sealed(rows::slot(&id), record.encode());
            changeset.insert(rows::slot_note(&id), &self.note_of(label));
            Ok::<_, SlotsError>((changeset, ()))
        };
        self.changes.run(intent, prepare).await.map_err(flatten)?;
        Ok(id)
    }

    /// Refuses while the store key is rotated. The store is asked as well: it
    /// knows of a rotation whose beginning was not answered.
    async fn must_not_rotate(&self) -> Result<(), SlotsError> {
        let older = self.changes.ledger().scan_revisions(rows::OLDER_STORE_KEYS).await?;
        if self.keyrings.is_rotating() || !older.is_empty() {
            return Err(SlotsError::Rotating);
        }
        Ok(())
    }

    /// Says which slot a root key opens, and notes that it does.
    ///
    /// # Errors
    ///
    /// When it opens none; after a while, so that guessing takes long.
    pub async fn test(&self, slot: &dyn RootSlot) -> Result<SlotId, SlotsError> {
        let mut refused = SlotError::NoSuchSlot { kind: slot.kind() };
        for known in self.list().await?.iter().filter(|known| known.record.kind() == slot.kind()) {
            match self.keyrings.test_slot(&internal::slots(), slot, &known.record) {
                Ok(()) => {
                    let id = known.record.slot();
                    self.note(id, &known.note.label, "slot_test").await?;
                    return Ok(id);
                }
                Err(error) => refused = error,
            }
        }
        tokio::time::sleep(WRONG_DELAY).await;
        Err(refused.into())
    }

    /// Notes the slot that opened the store at this start, once a day, and
    /// where its root key is.
    ///
    /// # Errors
    ///
    /// When the store refuses, as it does while it is unconfirmed.
    pub async fn note_in_use(&self, label: &str) -> Result<(), SlotsError> {
        let slots = self.list().await?;
        let known = slots.iter().find(|slot| slot.record.slot() == self.in_use).map(|slot| &slot.note);
        let age = to_ms(self.changes.now()).saturating_sub(known.map_or(0, |note| note.verified_ms));
        let recent = u128::from(age) < NOTE_EVERY.as_millis();
        if recent && known.is_some_and(|note| note.label == label) {
            return Ok(());
        }
        self.note(self.in_use, label, "slot_in_use").await
    }

    async fn note(&self, id: SlotId, label: &str, action: &'static str) -> Result<(), SlotsError> {
        let row = rows::slot_note(&id);
        let prepare = || async {
            let ledger = self.changes.ledger();
            let mut changeset: Changeset = ledger.changeset();
            match ledger.read::<SlotNote>(&row).await? {
                Some(record) => {
                    let added_ms = record.payload.added_ms;
                    changeset.update(&record, &SlotNote { added_ms, ..self.note_of(label) });
                }
                None => changeset.insert(row.clone(), &self.note_of(label)),
            }
            Ok::<_, SlotsError>((changeset, ()))
        };
        let intent = Intent::new(action, "host").target(id.to_string());
        self.changes.run(intent, prepare).await.map_err(flatten)
    }

    fn note_of(&self, label: &str) -> SlotNote {
        let now = to_ms(self.changes.now());
        SlotNote { added_ms: now, verified_ms: now, label: label.to_owned() }
    }
}

fn flatten(error: ChangeError<SlotsError>) -> SlotsError {
    match error {
        ChangeError::Refused(error) => error,
        error => SlotsError::Change(crate::errors::chain(&error)),
    }
}

/// Returns a kept backup that would not open any more.
async fn orphaned_backup(
    backups: &Backups,
    left: &[SlotId],
    removed: SlotId,
) -> Result<Option<String>, SlotsError> {
    for kept in backups.kept()? {
        let slots = backup::slots_of(&kept.path).await?;
        if slots.contains(&removed) && !slots.iter().any(|slot| left.contains(slot)) {
            return Ok(Some(kept.path.display().to_string()));
        }
    }
    Ok(None)
}

#[cfg(test)]
mod tests;
