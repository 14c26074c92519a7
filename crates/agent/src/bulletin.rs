//! What every node is told: where the agents are and which roots to trust.

use arc_swap::ArcSwap;
use fleet_kms_proto::agent::AgentAddress;

/// What every node is told.
pub struct Bulletin {
    agents: Vec<AgentAddress>,
    /// A rollover changes them.
    roots: ArcSwap<Vec<Vec<u8>>>,
}

impl Bulletin {
    /// Makes the bulletin from the configured addresses and the trusted roots
    /// (DER).
    pub fn new(agents: Vec<AgentAddress>, roots: Vec<Vec<u8>>) -> Self {
        Self { agents, roots: ArcSwap::from_pointee(roots) }
    }

    /// Returns the agents' addresses.
    pub fn agents(&self) -> Vec<AgentAddress> {
        self.agents.clone()
    }

    /// Returns the trusted roots, DER.
    pub fn roots(&self) -> Vec<Vec<u8>> {
        self.roots.load().to_vec()
    }

    /// Tells nodes to trust these roots, DER, from now on.
    pub fn set_roots(&self, roots: Vec<Vec<u8>>) {
        self.roots.store(roots.into());
    }
}
