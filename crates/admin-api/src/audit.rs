//! The audit of the answering agent: its records, and the ends of all agents' chains.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::open_enum::open_enum;
use crate::scalars::Timestamp;

/// The longest text that is searched for.
pub const MAX_SEARCHED: usize = 512;

open_enum! {
    /// One of the two chains of an agent's audit.
    AuditChain {
        /// What was changed: intents with their outcomes, and events.
        Changes = "changes",
        /// Data calls and refused callers.
        Data = "data",
    }
}

/// A record of the audit.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct AuditRecord {
    /// The chain it stands in.
    pub chain: AuditChain,
    /// Its number in the chain.
    pub seq: u64,
    /// When it was written.
    pub time: Timestamp,
    /// `intent`, `event`, `calls`, `call`, `denied`, `gap`, ….
    pub kind: String,
    /// Who asked, or what noticed it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub who: Option<String>,
    /// What was done or called.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub action: Option<String>,
    /// Name that the cluster had then, or its id.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub cluster: Option<String>,
    /// What it was done to.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub target: Option<String>,
    /// How it ended: `done`, `not done`, `unknown`, `open`; of a call `ok` or why not.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub outcome: Option<String>,
    /// The whole record as it stands in the file, but for number, time and link.
    #[schema(value_type = Object)]
    pub record: serde_json::Map<String, serde_json::Value>,
}

/// The end of one chain of one agent, as the store has it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct AuditHead {
    /// Name of the agent.
    pub agent: String,
    /// The chain.
    pub chain: AuditChain,
    /// Number of the last record.
    pub seq: u64,
    /// SHA-256 of its line, in hexadecimal.
    pub hash: String,
    /// When the store learned of it.
    pub stored: Timestamp,
}

/// Query of a search.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AuditQuery {
    /// Items wanted, 1 to 1,000; 100 when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub limit: Option<u32>,
    /// The `next` of the page before.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub after: Option<String>,
    /// `changes`, the default, or `data`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub chain: Option<String>,
    /// Not before this time.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub from: Option<Timestamp>,
    /// Before this time.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub to: Option<Timestamp>,
    /// A part of the identity that asked.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub who: Option<String>,
    /// Name or cluster id.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cluster: Option<String>,
    /// What was done or called.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub action: Option<String>,
    /// How it ended.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub outcome: Option<String>,
}
