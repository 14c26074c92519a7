//! Keys of one cluster: their versions and states, when they rotate, and the bytes that they make.
//!
//! Everything here is a pure function of its arguments. This crate never does I/O, never reads a clock
//! (time is a parameter), never picks a generator (randomness is a parameter), and never serializes a key:
//! disk and wire have types of their own.
//!
//! The modules stand in the order in which a call passes them.

mod ids;
mod state;
mod keyring;
mod refused;
mod lifecycle;
pub mod rotation;
mod kek;
pub mod wrapped_dek;
pub mod sealed;
pub mod aead;
pub mod stack;

pub use ids::{ClusterId, InvalidId, KeyId, SlotId, StoreId, Version};
pub use kek::Kek;
pub use keyring::{InvalidKeyring, KeyVersion, Keyring, NAMED_WRAP_GRACE};
pub use lifecycle::{MIN_DESTRUCTION_WAIT, RESTORE_JUMP, Rotate, RotateError, TransitionError};
pub use refused::{UnwrapRefused, WrapRefused};
pub use state::{Operation, State};
