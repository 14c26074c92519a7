//! Root slots: the ways to open a store key.
//!
//! All kinds share one trait and one record, so that a hardware slot is a new implementation and no new code
//! path. A slot here is ready to use: its root key is read, or its passphrase given. It never keeps the store
//! key.

use std::error::Error;

use fleet_kms_keyring::{SlotId, StoreId};
use rand_core::CryptoRng;

use crate::{SlotKind, SlotRecord, StoreKey};

/// One way to open the store key.
pub trait RootSlot: Send + Sync {
    /// The kind of records that it makes and opens.
    fn kind(&self) -> SlotKind;

    /// Seals the store key into a new record.
    ///
    /// # Errors
    /// [`SlotError::Unavailable`] if the slot's root key cannot be used now.
    fn seal(&self, key: &StoreKey, slot: SlotId, rng: &mut dyn CryptoRng) -> Result<SlotRecord, SlotError>;

    /// Opens the store key in a record of this kind.
    ///
    /// # Errors
    /// [`SlotError`].
    fn open(&self, record: &SlotRecord, store: StoreId) -> Result<StoreKey, SlotError>;
}

/// Opens the store key with whichever of the records fits.
///
/// A passphrase costs some 100 ms a record; the caller delays the answer after a refusal.
///
/// # Errors
/// [`SlotError::NoSuchSlot`] if no record is of this kind; else [`SlotError::DoesNotOpen`], with one constant
/// text, or what kept a record from being tried.
pub fn open_any<'r>(
    slot: &dyn RootSlot,
    records: impl IntoIterator<Item = &'r SlotRecord>,
    store: StoreId,
) -> Result<(SlotId, StoreKey), SlotError> {
    let mut refused = SlotError::NoSuchSlot { kind: slot.kind() };
    for record in records.into_iter().filter(|record| record.kind() == slot.kind()) {
        match slot.open(record, store) {
            Ok(key) => return Ok((record.slot(), key)),
            Err(error) => refused = error,
        }
    }
    Err(refused)
}

/// Why a slot does not seal or open a store key.
#[derive(Debug, thiserror::Error)]
pub enum SlotError {
    /// The root key is another's, or the record or its place is.
    #[error("no slot opens with this {kind}")]
    DoesNotOpen {
        /// The slot's kind.
        kind: SlotKind,
    },
    /// The store has no slot of this kind.
    #[error("the store has no slot of kind {kind}: open it with another kind, then add one")]
    NoSuchSlot {
        /// The slot's kind.
        kind: SlotKind,
    },
    /// The record belongs to another kind of slot.
    #[error("a {kind} cannot open a slot of kind {found}")]
    WrongKind {
        /// The slot's kind.
        kind: SlotKind,
        /// The record's kind.
        found: SlotKind,
    },
    /// The record's parameters are not of its kind, or ask for more than this release would spend.
    #[error("the slot's parameters are malformed or out of bounds")]
    Parameters,
    /// The root key cannot be used now.
    #[error("the {kind} cannot be used now")]
    Unavailable {
        /// The slot's kind.
        kind: SlotKind,
        /// What is in the way.
        source: Box<dyn Error + Send + Sync>,
    },
}
