//! Root slots, as far as they can be seen from afar: never what opens one.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::open_enum::open_enum;
use crate::scalars::Timestamp;

open_enum! {
    /// What opens a root slot.
    SlotKind {
        /// A file with a root key.
        File = "file",
        /// A passphrase.
        Passphrase = "passphrase",
    }
}

/// A root slot. Added, tested and removed on the agent's host only.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Slot {
    /// Its id.
    pub id: String,
    /// What opens it.
    pub kind: SlotKind,
    /// Where its root key was when it last opened the store, in the operator's words.
    pub label: String,
    /// Whether it opened the store at the answering agent's start.
    pub in_use: bool,
    /// When it was added, if that is known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub added: Option<Timestamp>,
    /// When it was last known to open the store; absent for never.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub verified: Option<Timestamp>,
}
