//! Admins: who may administer, in which roles, on which clusters.
//!
//! Roles and scope live in the store, not in a certificate, so that a change
//! holds from the admin's next call on.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::nodes::NodeState;
use crate::open_enum::open_enum;
use crate::scalars::Timestamp;

open_enum! {
    /// Role of an admin.
    Role {
        /// Runs the fleet: clusters, nodes, tokens, rotation, admins.
        Operator = "operator",
        /// Decides about key versions: disable, enable, destroy.
        KeyOfficer = "key-officer",
        /// Sees everything, changes nothing.
        Auditor = "auditor",
        /// Makes join tokens, nothing else.
        Enroller = "enroller",
    }
}

/// Which clusters an admin may act on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Scope {
    /// Every cluster, those to come too, and what belongs to none.
    pub all: bool,
    /// Else these: their names, or the ids of those that have gone.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub clusters: Vec<String>,
}

/// An admin.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Admin {
    /// SPIFFE ID.
    pub id: String,
    /// Name.
    pub name: String,
    /// What it may do.
    pub roles: Vec<Role>,
    /// On which clusters.
    pub scope: Scope,
    /// Whether it may call.
    pub state: NodeState,
    /// Revision of the identity; goes into `If-Match`.
    pub revision: u64,
    /// Serial of its certificate, in hexadecimal.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub serial: Option<String>,
    /// When that certificate ends; `kms-agent admin issue` makes the next one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub certificate_not_after: Option<Timestamp>,
}

/// Request to replace an admin's roles.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct SetRoles {
    /// The roles from now on, at least one. Nobody can grant what they may not do themselves.
    #[schema(min_items = 1, max_items = 4)]
    pub roles: Vec<Role>,
}

/// Request to replace an admin's scope.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct SetScope {
    /// Every cluster; excludes `clusters`.
    #[serde(default)]
    pub all: bool,
    /// These clusters only, by name or id.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schema(max_items = 1000)]
    pub clusters: Vec<String>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_role_reads_and_writes_as_it_is_typed() {
        let request: SetRoles = serde_json::from_str(r#"{"roles":["key-officer","auditor"]}"#).unwrap();
        assert_eq!(request.roles, [Role::KeyOfficer, Role::Auditor]);
        assert_eq!(serde_json::to_string(&request).unwrap(), r#"{"roles":["key-officer","auditor"]}"#);
    }
}
