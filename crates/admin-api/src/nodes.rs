//! Nodes: the identities that may wrap and unwrap for their cluster.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::open_enum::open_enum;
use crate::scalars::{HumanDuration, Timestamp};

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
    /// Revision of the identity; goes into `If-Match`.
    #[serde(default)]
    pub revision: u64,
    /// Serial of the certificate that it may use now, in hexadecimal.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub serial: Option<String>,
    /// When that certificate ends.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub certificate_not_after: Option<Timestamp>,
    /// When it was last known to live: its last call to the answering agent, or, after that agent's
    /// restart, when its newest certificate was made, which is at most a few days earlier.
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

/// Query of the lists of nodes.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NodeQuery {
    /// Items wanted, 1 to 1,000; 100 when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub limit: Option<u32>,
    /// The `next` of the page before; absent for the first page.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub after: Option<String>,
    /// Only nodes that nobody has heard of for so long.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub unseen: Option<HumanDuration>,
}
