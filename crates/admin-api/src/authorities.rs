//! The fleet CA: its generations, and who has to be enrolled after one was
//! replaced without a way from the old one.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::open_enum::open_enum;
use crate::scalars::Timestamp;

open_enum! {
    /// What a CA signs.
    CaKind {
        /// Issuing CAs; it is what everybody pins.
        Root = "root",
        /// Certificates of nodes, agents and admins.
        Issuing = "issuing",
    }
}

open_enum! {
    /// State of a CA's generation.
    CaState {
        /// Nodes are told of it; it signs nothing yet.
        Prepared = "prepared",
        /// Signs.
        Active = "active",
        /// Signs nothing; what it signed is still trusted for a while.
        Retiring = "retiring",
        /// Signs nothing, and nothing that it signed is trusted.
        Retired = "retired",
    }
}

/// One generation of the root CA or of the issuing CA.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct CaGeneration {
    /// Root or issuing.
    pub kind: CaKind,
    /// Counts up from 1, never reused.
    pub generation: u32,
    /// What it may do now.
    pub state: CaState,
    /// SHA-256 of its certificate (DER), in hexadecimal.
    pub sha256: String,
    /// First moment of its certificate: the fleet's, however young the CA is.
    pub not_before: Timestamp,
    /// Last moment of its certificate.
    pub not_after: Timestamp,
    /// Of an issuing CA: the generation of its root.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub signed_by: Option<u32>,
    /// Of a prepared root: when it becomes active by itself.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub activates: Option<Timestamp>,
    /// When its successor became active.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub retired: Option<Timestamp>,
    /// Of a replaced root: until when nodes that were off can come back from it,
    /// and nodes are told to trust it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub trusted_until: Option<Timestamp>,
}

/// The fleet CA.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Ca {
    /// All generations on record: roots, then issuing CAs, each in ascending order.
    pub generations: Vec<CaGeneration>,
    /// SPIFFE IDs of nodes whose newest certificate no trusted root vouches for:
    /// each needs a join token. Banned nodes are left out.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub nodes_to_enrol: Vec<String>,
}

/// Request to replace CAs in good order.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct RotateCa {
    /// Replace the root too, not only the issuing CA.
    #[serde(default)]
    pub root: bool,
}

/// What a client needs to go on after CAs were replaced.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct RotatedCa {
    /// The fleet CA after the change.
    pub ca: Ca,
    /// The roots to trust from now on, PEM, the active one first.
    pub roots: String,
    /// The caller's next certificate, for the key that it has, with its issuers,
    /// PEM: after a compromise only, because the one before is refused.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub certificate: Option<String>,
}
