//! Nodes: the identities that may wrap and unwrap for their cluster.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::open_enum::open_enum;
use crate::scalars::Timestamp;

open_enum! {
    /// State of a node's identity.
    NodeState {
        /// May call.
        Active = "active",
        /// May not, until it is unbanned.
        Banned = "banned",
    }
}

/// A node, as its enrolment and its last calls show it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Node {
    /// SPIFFE ID.
    pub id: String,
    /// Name within its cluster.
    pub name: String,
    /// Cluster id.
    pub cluster_id: String,
    /// Cluster name.
    pub cluster: String,
    /// Whether it may call.
    pub state: NodeState,
    /// Serial of the certificate that it may use now, in hexadecimal.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub serial: Option<String>,
    /// When that certificate ends.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub certificate_not_after: Option<Timestamp>,
    /// When the answering agent last heard from it; absent if not since its start.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub last_seen: Option<Timestamp>,
    /// Build of its sidecar, as it said last.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub build: Option<String>,
    /// Highest key version it has seen, as it said last.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub highest_version: Option<u32>,
}
