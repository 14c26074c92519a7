//! What a sidecar remembers beside its identity. All of it can be learnt again; none of it is secret.

use std::time::{Duration, SystemTime};

use serde::{Deserialize, Serialize};

/// The addresses of one agent. They say where to knock, never who answers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct AgentAddress {
    /// `host:port` of the data port.
    pub data: String,
    /// `host:port` of the enrolment port.
    pub enrolment: String,
}

/// The state beside an identity. Fields that a newer program wrote are ignored and lost: each can be learnt again.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct State {
    /// The trust domain that this node was enrolled in.
    pub trust_domain: Option<String>,
    /// The agents, as the last answer named them.
    pub agents: Vec<AgentAddress>,
    /// The life of the current leaf at its issue, in seconds; what renewal is timed by.
    pub leaf_life_seconds: u64,
    /// The last time that an agent proved, in seconds since 1970.
    pub last_good_time: u64,
    /// The highest key version that this node has seen.
    pub highest_version: u32,
}

impl State {
    /// Returns the last time that an agent proved.
    pub fn last_good_time(&self) -> SystemTime {
        SystemTime::UNIX_EPOCH
            .checked_add(Duration::from_secs(self.last_good_time))
            .unwrap_or(SystemTime::UNIX_EPOCH)
    }

    /// Returns the life of the current leaf at its issue.
    pub fn leaf_life(&self) -> Duration {
        Duration::from_secs(self.leaf_life_seconds)
    }
}
