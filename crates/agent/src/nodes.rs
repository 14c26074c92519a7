//! What the nodes last said of themselves, in memory: one look at the agent
//! shows the fleet.

use std::collections::HashMap;
use std::sync::{PoisonError, RwLock};
use std::time::SystemTime;

use fleet_kms_identity::SpiffeId;
use fleet_kms_proto::agent::StatusRequest;

/// The longest build text that is kept.
const MAX_BUILD: usize = 64;

/// What a node last said of itself.
#[derive(Debug, Clone)]
pub struct NodeReport {
    /// When.
    pub seen: SystemTime,
    /// The sidecar's version.
    pub build: String,
    /// Calls it answered with an error since its start.
    pub errors: u64,
    /// The highest key version it has seen.
    pub highest_version: u32,
}

/// The last report of each node.
#[derive(Default)]
pub struct Nodes {
    reports: RwLock<HashMap<SpiffeId, NodeReport>>,
}

impl Nodes {
    /// Takes a node's report.
    pub fn report(&self, node: &SpiffeId, request: StatusRequest, now: SystemTime) {
        let build: String = request.build.chars().filter(|c| c.is_ascii_graphic()).take(MAX_BUILD).collect();
        let report =
            NodeReport { seen: now, build, errors: request.errors, highest_version: request.highest_version };
        self.reports.write().unwrap_or_else(PoisonError::into_inner).insert(node.clone(), report);
    }

    /// Returns when a node last reported to this agent since its start.
    pub fn last_seen(&self, node: &SpiffeId) -> Option<SystemTime> {
        self.reports.read().unwrap_or_else(PoisonError::into_inner).get(node).map(|report| report.seen)
    }

    /// Returns a node's last report to this agent since its start.
    pub fn find(&self, node: &SpiffeId) -> Option<NodeReport> {
        self.reports.read().unwrap_or_else(PoisonError::into_inner).get(node).cloned()
    }
}
