//! Clusters: the tenants, each with its keyring and rotation policy.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::scalars::{HumanDuration, Timestamp};

/// A cluster and the state of its key, at a glance.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Cluster {
    /// Cluster id, a UUID; its identity for ever.
    pub id: String,
    /// Name, a label that is unique among live clusters.
    pub name: String,
    /// Revision of the keyring record; goes into `If-Match`.
    pub revision: u64,
    /// When the cluster was created.
    pub created: Timestamp,
    /// The version that wraps now.
    pub active_version: u32,
    /// Key id of the active version, a UUID.
    pub key_id: String,
    /// When the active version became active.
    pub activated: Timestamp,
    /// Seconds since then, by the agent's clock.
    pub age_seconds: u64,
    /// Time between rotations.
    pub period: HumanDuration,
    /// How long after its end a node's certificate may still renew.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub max_offline: Option<HumanDuration>,
    /// When the next scheduled rotation is due.
    pub next_rotation: Timestamp,
    /// Whether that time has passed.
    pub overdue: bool,
    /// Key versions that are not destroyed.
    pub versions: u32,
    /// Enrolled nodes.
    pub nodes: u32,
    /// Versions that no verified backup can hold yet.
    #[serde(default)]
    pub unbacked: Vec<u32>,
}

/// Request to create a cluster.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct CreateCluster {
    /// Lower-case letters, digits and `-`, 1 to 63 of them; no UUID.
    #[schema(pattern = "^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$", max_length = 63, example = "plant-7")]
    pub name: String,
    /// Time between rotations, at least one hour; 30 days when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub period: Option<HumanDuration>,
    /// How long after its end a node's certificate may still renew, 7 to 730 days; 180 days when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub max_offline: Option<HumanDuration>,
}

/// Request to change how long a cluster's nodes may be off.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct SetMaxOffline {
    /// How long after its end a node's certificate may still renew, 7 to 730 days.
    pub max_offline: HumanDuration,
}

/// Request to change the rotation policy.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct SetRotation {
    /// Time between rotations, at least one hour.
    pub period: HumanDuration,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_with_an_unknown_field_is_refused() {
        let error = serde_json::from_str::<CreateCluster>(r#"{"name":"a","perod":"30d"}"#).unwrap_err();
        assert!(error.to_string().contains("unknown field `perod`"), "{error}");
    }

    #[test]
    fn a_request_needs_only_a_name() {
        let request: CreateCluster = serde_json::from_str(r#"{"name":"a"}"#).unwrap();
        assert_eq!((request.period, request.max_offline), (None, None));
    }
}
