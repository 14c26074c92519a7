//! Join tokens: what lets a node enrol. Only their creation ever shows one.

use std::fmt;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::scalars::{HumanDuration, Timestamp};

/// Request for a join token.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct CreateToken {
    /// Exact name of the node that may enrol, also one that exists already.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false, pattern = "^[a-z0-9]([a-z0-9.-]{0,61}[a-z0-9])?$", max_length = 63)]
    pub node: Option<String>,
    /// Pattern of new names, with `*` for any text; excludes `node`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false, max_length = 63, example = "plant-7-*")]
    pub pattern: Option<String>,
    /// Exact name of a worker that may enrol, also one that exists already; excludes `node` and `pattern`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false, pattern = "^[a-z0-9]([a-z0-9.-]{0,61}[a-z0-9])?$", max_length = 63)]
    pub worker: Option<String>,
    /// Network from which it may be used.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false, max_length = 43, example = "10.1.0.0/16")]
    pub cidr: Option<String>,
    /// How many nodes may use it; 1 when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false, minimum = 1, maximum = 10000)]
    pub uses: Option<u32>,
    /// How long it is valid, up to a year; 15 minutes when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub ttl: Option<HumanDuration>,
}

/// A join token as the agent knows it: without its secret.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Token {
    /// Public name of the token; no secret.
    pub id: String,
    /// Cluster that its nodes join.
    pub cluster_id: String,
    /// That cluster's name.
    pub cluster: String,
    /// Exact node name, if it is bound to one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub node: Option<String>,
    /// Pattern of new names, if it has one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub pattern: Option<String>,
    /// Exact worker name, if it is for a worker.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub worker: Option<String>,
    /// Revision of the token; goes into `If-Match`.
    #[serde(default)]
    pub revision: u64,
    /// Network from which it may be used, if it is bound to one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub cidr: Option<String>,
    /// How many nodes may use it.
    pub uses: u32,
    /// How many have.
    pub used: u32,
    /// When it was issued.
    pub created: Timestamp,
    /// Who issued it, a SPIFFE ID.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub created_by: Option<String>,
    /// When it stops working.
    pub expires: Timestamp,
}

/// A new join token, with its secret: shown once.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct IssuedToken {
    /// The secret text, `fkjt1.…`, for the node. Never logged.
    pub token: String,
    /// What stands behind it.
    pub details: Token,
}

impl fmt::Debug for IssuedToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("IssuedToken").field("details", &self.details).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn debug_does_not_show_the_secret() {
        let time = Timestamp::from(std::time::UNIX_EPOCH);
        let details = Token {
            id: "t1".into(),
            cluster_id: "c".into(),
            cluster: "a".into(),
            node: None,
            pattern: None,
            worker: None,
            revision: 7,
            cidr: None,
            uses: 1,
            used: 0,
            created: time,
            created_by: None,
            expires: time,
        };
        let issued = IssuedToken { token: "fkjt1.planted".into(), details };
        assert!(!format!("{issued:?}").contains("planted"));
    }
}
