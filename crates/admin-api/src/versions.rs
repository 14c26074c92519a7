//! Key versions: their states, rotation, and why one may or may not go.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::open_enum::open_enum;
use crate::scalars::Timestamp;

open_enum! {
    /// State of a key version.
    VersionState {
        /// Prepared; becomes active at the next rotation.
        Next = "next",
        /// Wraps and unwraps.
        Active = "active",
        /// Unwraps only.
        DecryptOnly = "decrypt_only",
        /// Does nothing; can be enabled again.
        Disabled = "disabled",
        /// Disabled, to be destroyed after the waiting period; can be cancelled.
        DestroyScheduled = "destroy_scheduled",
        /// Gone; only its tombstone is left.
        Destroyed = "destroyed",
    }
}

/// One version of a cluster's key.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Version {
    /// Counts up from 1, never reused.
    pub version: u32,
    /// Key id, a UUID.
    pub key_id: String,
    /// What it may do now.
    pub state: VersionState,
    /// When it was made.
    pub created: Timestamp,
    /// When it became active.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub activated: Option<Timestamp>,
    /// When it stopped being active.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub deactivated: Option<Timestamp>,
    /// When it was disabled.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub disabled: Option<Timestamp>,
    /// Earliest time of its destruction.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub destroy_not_before: Option<Timestamp>,
    /// DEKs wrapped so far, as last flushed (within a minute).
    pub wraps: u64,
    /// Whether no verified backup can hold it yet.
    pub unbacked: bool,
}

/// Request to rotate.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct RotateKey {
    /// Make a brand-new version active instead of the prepared one, which is
    /// retired: for a key that may be known to others.
    #[serde(default)]
    pub fresh: bool,
}

/// Why a version may or may not be destroyed, guard by guard.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Explanation {
    /// Name of the cluster.
    pub cluster: String,
    /// The version asked about.
    pub version: u32,
    /// Its state.
    pub state: VersionState,
    /// Whether every guard agrees to destruction.
    pub destroyable: bool,
    /// All guards, in the order in which they are asked.
    pub guards: Vec<Guard>,
}

/// One guard before destruction.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Guard {
    /// Stable name, such as `disabled` or `census`.
    pub name: String,
    /// Whether it agrees.
    pub ok: bool,
    /// Why, in a sentence.
    pub why: String,
}
