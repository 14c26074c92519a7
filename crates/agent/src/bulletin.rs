//! What every node is told: where the agents are and which roots to trust.

use fleet_kms_proto::agent::AgentAddress;

/// What every node is told.
pub struct Bulletin {
    agents: Vec<AgentAddress>,
    roots: Vec<Vec<u8>>,
}

impl Bulletin {
    /// Makes the bulletin from the configured addresses and the trusted roots
    /// (DER).
    pub fn new(agents: Vec<AgentAddress>, roots: Vec<Vec<u8>>) -> Self {
        Self { agents, roots }
    }

    /// Returns the agents' addresses.
    pub fn agents(&self) -> Vec<AgentAddress> {
        self.agents.clone()
    }

    /// Returns the trusted roots, DER.
    pub fn roots(&self) -> Vec<Vec<u8>> {
        self.roots.clone()
    }
}
