//! The table itself. One row for each RPC, admin operation and internal job.

use super::Action;

/// An admin's role; it lives in the store, not in the certificate.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Role {
    /// Runs the fleet: clusters, nodes, tokens, rotation.
    Operator,
    /// Decides about key versions: disable, enable, destroy.
    KeyOfficer,
    /// Sees everything, changes nothing.
    Auditor,
    /// Makes join tokens, nothing else.
    Enroller,
}

impl Role {
    /// All roles.
    pub const ALL: [Self; 4] = [Self::Operator, Self::KeyOfficer, Self::Auditor, Self::Enroller];

    /// Returns the role's name, as stored and as typed.
    pub fn name(self) -> &'static str {
        match self {
            Self::Operator => "operator",
            Self::KeyOfficer => "key-officer",
            Self::Auditor => "auditor",
            Self::Enroller => "enroller",
        }
    }

    /// Finds a role by its name.
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|role| role.name() == name)
    }
}

/// Who may.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Who {
    /// Anyone who reaches the port, certificate or not.
    Anyone,
    /// A node with a valid certificate, on its own cluster.
    Node,
    /// A node whose certificate has expired, on its own cluster.
    ExpiredNode,
    /// An admin who has this role, on the clusters of its scope.
    Admin(Role),
    /// The agent itself, by this function of [`super::internal`].
    Internal(&'static str),
}

/// One row of the table.
#[derive(Debug)]
pub struct Row {
    /// The gRPC path, the admin operation id, or `internal:` and a name.
    pub id: &'static str,
    /// Who may.
    pub who: &'static [Who],
}

const OPERATOR: Who = Who::Admin(Role::Operator);
const KEY_OFFICER: Who = Who::Admin(Role::KeyOfficer);
const AUDITOR: Who = Who::Admin(Role::Auditor);
const ENROLLER: Who = Who::Admin(Role::Enroller);

macro_rules! table {
    ($($(#[$doc:meta])* $action:ident = $id:literal => [$($who:expr),* $(,)?]),* $(,)?) => {
        /// Who may do what. Everything not listed is refused.
        pub const TABLE: &[Row] = &[$(Row { id: $id, who: &[$($who),*] }),*];

        /// The actions of the table, as types for [`super::Permit`].
        pub mod actions {
            $(
                $(#[$doc])*
                pub enum $action {}
                impl super::Action for $action {
                    const ID: &'static str = $id;
                }
            )*
        }
    };
}

table! {
    /// Wrap a DEK.
    Wrap = "/fleet_kms.agent.v1.DataPlane/Wrap" => [Who::Node],
    /// Unwrap DEKs.
    Unwrap = "/fleet_kms.agent.v1.DataPlane/Unwrap" => [Who::Node],
    /// Report a node's state, learn the active version.
    Status = "/fleet_kms.agent.v1.DataPlane/Status" => [Who::Node],
    /// Exchange a join token for a certificate.
    Enrol = "/fleet_kms.agent.v1.Enrolment/Enrol" => [Who::Anyone],
    /// Exchange a certificate for the next one.
    Renew = "/fleet_kms.agent.v1.Enrolment/Renew" => [Who::Node, Who::ExpiredNode],
    /// Ask for the time.
    Time = "/fleet_kms.agent.v1.Enrolment/Time" => [Who::Anyone],

    /// List clusters.
    ClusterList = "cluster_list" => [OPERATOR, KEY_OFFICER, AUDITOR, ENROLLER],
    /// Make a cluster.
    ClusterCreate = "cluster_create" => [OPERATOR],
    /// Show one cluster.
    ClusterShow = "cluster_show" => [OPERATOR, KEY_OFFICER, AUDITOR, ENROLLER],
    /// List a cluster's versions.
    KeyVersions = "key_versions" => [OPERATOR, KEY_OFFICER, AUDITOR],
    /// Rotate a cluster's KEK now.
    KeyRotate = "key_rotate" => [OPERATOR, KEY_OFFICER],
    /// Change the time between rotations.
    RotationSet = "rotation_set" => [OPERATOR, KEY_OFFICER],
    /// Disable a version.
    KeyDisable = "key_disable" => [KEY_OFFICER],
    /// Enable a version again.
    KeyEnable = "key_enable" => [KEY_OFFICER],
    /// Schedule a version's destruction.
    KeyDestroy = "key_destroy" => [KEY_OFFICER],
    /// Cancel a version's destruction.
    KeyCancelDestroy = "key_cancel_destroy" => [KEY_OFFICER],
    /// Say why a version may or may not be destroyed.
    KeyExplain = "key_explain" => [OPERATOR, KEY_OFFICER, AUDITOR],
    /// Make a join token.
    TokenCreate = "token_create" => [OPERATOR, ENROLLER],
    /// List a cluster's join tokens.
    TokenList = "token_list" => [OPERATOR, AUDITOR, ENROLLER],
    /// Revoke a join token.
    TokenRevoke = "token_revoke" => [OPERATOR, ENROLLER],
    /// List the nodes of all clusters.
    NodeList = "node_list" => [OPERATOR, KEY_OFFICER, AUDITOR, ENROLLER],
    /// List a cluster's nodes.
    ClusterNodeList = "cluster_node_list" => [OPERATOR, KEY_OFFICER, AUDITOR, ENROLLER],
    /// Ban a node.
    NodeBan = "node_ban" => [OPERATOR],
    /// Lift a ban.
    NodeUnban = "node_unban" => [OPERATOR],
    /// Remove a node.
    NodeRemove = "node_remove" => [OPERATOR],
    /// Search the agent's audit.
    AuditSearch = "audit_search" => [OPERATOR, KEY_OFFICER, AUDITOR],
    /// List the ends of the agents' audit chains.
    AuditHeads = "audit_heads" => [OPERATOR, KEY_OFFICER, AUDITOR],
    /// Show the fleet CA.
    CaShow = "ca_show" => [OPERATOR, KEY_OFFICER, AUDITOR],
    /// Replace the issuing CA or the root in good order.
    CaRotate = "ca_rotate" => [OPERATOR, KEY_OFFICER],
    /// Replace a compromised CA, which shuts every node out.
    CaReplace = "ca_replace" => [KEY_OFFICER],
    /// Show the agent's status.
    StatusShow = "status_show" => [OPERATOR, KEY_OFFICER, AUDITOR, ENROLLER],
    /// Show the admin API's document.
    OpenapiShow = "openapi_show" => [OPERATOR, KEY_OFFICER, AUDITOR, ENROLLER],

    /// Rotate a cluster that is due.
    ScheduledRotation = "internal:schedule" => [Who::Internal("schedule")],
    /// Read a cluster's keyring into memory.
    Load = "internal:load" => [Who::Internal("load")],
    /// Rotate a cluster fresh because its store was, or may be, an old copy.
    Recovery = "internal:recovery" => [Who::Internal("recovery")],
    /// Copy the store and look whether every key in the copy opens.
    Backup = "internal:backup" => [Who::Internal("backup")],
    /// Add, test and remove root slots, and rotate the store key.
    Slots = "internal:slots" => [Who::Internal("slots")],
    /// Open and seal the private keys of the fleet CA.
    Authority = "internal:authority" => [Who::Internal("authority")],
}

/// Operations on what belongs to no single cluster: only an admin whose scope is
/// all clusters may.
pub(super) const FLEET_WIDE: &[&str] = &["cluster_create", "ca_show", "ca_rotate", "ca_replace"];

/// Finds a row by its id.
pub(super) fn row(id: &str) -> Option<&'static Row> {
    TABLE.iter().find(|row| row.id == id)
}
