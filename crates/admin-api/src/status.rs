//! One agent's view of the fleet: what an operator looks at each morning.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::scalars::Timestamp;

/// State of the agent, its store and the fleet.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Status {
    /// Name of the answering agent.
    pub agent: String,
    /// Its release.
    pub version: String,
    /// Its clock, so that a wrong one shows.
    pub time: Timestamp,
    /// The store.
    pub store: StoreStatus,
    /// Counts of clusters.
    pub clusters: ClusterCounts,
    /// Counts of nodes.
    pub nodes: NodeCounts,
    /// The rotations due next, soonest first, a few.
    #[serde(default)]
    pub next_rotations: Vec<DueRotation>,
    /// Certificates that end soon and were not renewed, soonest first, a few.
    #[serde(default)]
    pub expiring_certificates: Vec<ExpiringCertificate>,
    /// When the last backup that was verified was made; absent if there is none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub last_verified_backup: Option<Timestamp>,
    /// What an operator must decide or mend, most urgent first.
    #[serde(default)]
    pub warnings: Vec<Warning>,
}

/// State of the store.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct StoreStatus {
    /// Whether reads and changes work.
    pub ok: bool,
    /// Why not, or what is special about it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub detail: Option<String>,
}

/// Counts of clusters.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ClusterCounts {
    /// All that are in use.
    pub total: u32,
    /// Those that are retired; their keys are kept.
    #[serde(default)]
    pub retired: u32,
    /// Those whose rotation is late.
    pub overdue: u32,
    /// Those with a version that no verified backup can hold yet.
    pub unbacked: u32,
}

/// Counts of nodes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct NodeCounts {
    /// All that are enrolled.
    pub total: u32,
    /// Those that are banned.
    pub banned: u32,
}

/// A rotation that is due.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct DueRotation {
    /// Cluster name.
    pub cluster: String,
    /// When.
    pub due: Timestamp,
}

/// A certificate that ends soon.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ExpiringCertificate {
    /// SPIFFE ID.
    pub id: String,
    /// When it ends.
    pub not_after: Timestamp,
}

/// Something an operator must decide or mend.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Warning {
    /// Stable name, such as `store_rolled_back`.
    pub code: String,
    /// What it is, in a sentence.
    pub text: String,
    /// What to do.
    pub remedy: String,
}
