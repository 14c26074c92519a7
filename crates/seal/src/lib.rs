//! The store key: where it lives in memory, what is derived from it, and the root slots that open it.
//!
//! A store key exists in clear only in the locked arena. Each slot holds it sealed under a root key of its
//! own, from a file or a passphrase here, from hardware later; any one slot opens it. This crate never writes
//! a store key anywhere in clear, reads no configuration or environment, and reaches no row of the store: slot
//! records are bytes that its caller keeps.
//!
//! The modules stand in the order in which opening a store passes them.

mod slot;
mod slot_record;
mod file_slot;
mod passphrase_slot;
mod store_key;
mod locked_key;
mod arena;

pub use file_slot::{FileSlot, RootFileError};
pub use locked_key::LockedKey;
pub use passphrase_slot::{MIN_PASSPHRASE, PassphraseSlot, WeakPassphrase, generate_passphrase};
pub use slot::{RootSlot, SlotError, open_any};
pub use slot_record::{MalformedSlotRecord, SlotKind, SlotRecord};
pub use store_key::{Purpose, StoreKey};
