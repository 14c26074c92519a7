//! The one table of operations: router, client, authorization table and
//! OpenAPI document are all checked against it, none repeats it.

use std::fmt;

/// HTTP method of an operation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Method {
    /// Reads.
    Get,
    /// Creates, or does a named thing.
    Post,
    /// Replaces.
    Put,
    /// Removes.
    Delete,
}

impl Method {
    /// The method as it stands in a request line.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Get => "GET",
            Self::Post => "POST",
            Self::Put => "PUT",
            Self::Delete => "DELETE",
        }
    }
}

/// What kind of operation it is, which decides its query and its answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Answers one thing.
    Read,
    /// Answers a page of a list.
    List,
    /// Changes something; takes the change options.
    Change,
}

macro_rules! operations {
    ($($(#[$meta:meta])* $variant:ident = $id:literal, $kind:ident $method:ident $path:literal, $summary:literal;)+) => {
        /// An operation of the admin API.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        pub enum Operation {
            $(#[doc = $summary] $(#[$meta])* $variant,)+
        }

        impl Operation {
            /// Every operation.
            pub const ALL: &'static [Self] = &[$(Self::$variant),+];

            /// Stable id: in the OpenAPI document, the authorization table and the audit.
            pub const fn id(self) -> &'static str {
                match self { $(Self::$variant => $id,)+ }
            }

            /// What kind of operation it is.
            pub const fn kind(self) -> Kind {
                match self { $(Self::$variant => Kind::$kind,)+ }
            }

            /// HTTP method.
            pub const fn method(self) -> Method {
                match self { $(Self::$variant => Method::$method,)+ }
            }

            /// Path template, with `{cluster}` and the like for parameters.
            pub const fn path(self) -> &'static str {
                match self { $(Self::$variant => $path,)+ }
            }

            /// One line on what it does.
            pub const fn summary(self) -> &'static str {
                match self { $(Self::$variant => $summary,)+ }
            }
        }
    };
}

operations! {
    ListClusters = "cluster_list", List Get "/v1/clusters", "Lists the clusters, by name.";
    CreateCluster = "cluster_create", Change Post "/v1/clusters", "Creates a cluster with its first key.";
    ShowCluster = "cluster_show", Read Get "/v1/clusters/{cluster}", "Shows a cluster and its key at a glance.";
    RetireCluster = "cluster_retire", Change Post "/v1/clusters/{cluster}/retire",
        "Retires a cluster: its nodes are removed, its calls refused, its name is free; its keys are kept.";
    RestoreCluster = "cluster_restore", Change Post "/v1/clusters/{cluster}/restore",
        "Brings a retired cluster back; its nodes need join tokens.";
    RenameCluster = "cluster_rename", Change Post "/v1/clusters/{cluster}/rename",
        "Gives a cluster another name; its id, keys and nodes stay.";
    SetRotation = "rotation_set", Change Put "/v1/clusters/{cluster}/rotation",
        "Changes the time between rotations.";
    SetMaxOffline = "max_offline_set", Change Put "/v1/clusters/{cluster}/max-offline",
        "Changes how long a cluster's nodes may be off and still renew.";
    RotateKey = "key_rotate", Change Post "/v1/clusters/{cluster}/rotate",
        "Rotates the key now, which resets the schedule.";
    ListVersions = "key_versions", List Get "/v1/clusters/{cluster}/versions",
        "Lists the key's versions, in ascending order.";
    DisableVersion = "key_disable", Change Post "/v1/clusters/{cluster}/versions/{version}/disable",
        "Disables a version: what it wrapped cannot be read until it is enabled again.";
    EnableVersion = "key_enable", Change Post "/v1/clusters/{cluster}/versions/{version}/enable",
        "Enables a disabled version again.";
    DestroyVersion = "key_destroy", Change Post "/v1/clusters/{cluster}/versions/{version}/destroy",
        "Schedules a disabled version's destruction, if every guard agrees.";
    CancelDestroyVersion = "key_cancel_destroy",
        Change Post "/v1/clusters/{cluster}/versions/{version}/cancel-destroy",
        "Cancels a scheduled destruction; the version is disabled again.";
    ExplainVersion = "key_explain", Read Get "/v1/clusters/{cluster}/versions/{version}/explain",
        "Says, guard by guard, why a version may or may not be destroyed.";
    CreateToken = "token_create", Change Post "/v1/clusters/{cluster}/tokens",
        "Issues a join token; the only answer that shows it.";
    ListTokens = "token_list", List Get "/v1/clusters/{cluster}/tokens",
        "Lists the join tokens that can still be used.";
    RevokeToken = "token_revoke", Change Delete "/v1/clusters/{cluster}/tokens/{token}",
        "Revokes a join token.";
    ListNodes = "node_list", List Get "/v1/nodes", "Lists the nodes of all clusters.";
    ListClusterNodes = "cluster_node_list", List Get "/v1/clusters/{cluster}/nodes",
        "Lists the nodes of a cluster, by name.";
    BanNode = "node_ban", Change Post "/v1/clusters/{cluster}/nodes/{node}/ban",
        "Bans a node: its calls are refused and its connections closed.";
    UnbanNode = "node_unban", Change Post "/v1/clusters/{cluster}/nodes/{node}/unban",
        "Lifts a ban.";
    RemoveNode = "node_remove", Change Delete "/v1/clusters/{cluster}/nodes/{node}",
        "Removes a node; to come back it needs a new join token.";
    SearchAudit = "audit_search", List Get "/v1/audit",
        "Lists records of the answering agent's audit, the newest first; a page may have fewer than asked for.";
    ListAuditHeads = "audit_heads", List Get "/v1/audit/heads",
        "Lists the ends of all agents' audit chains, to verify their files with.";
    ListWorkers = "worker_list", List Get "/v1/clusters/{cluster}/workers", "Lists the workers of a cluster, by name.";
    BanWorker = "worker_ban", Change Post "/v1/clusters/{cluster}/workers/{worker}/ban",
        "Bans a worker: its calls are refused and its connections closed.";
    UnbanWorker = "worker_unban", Change Post "/v1/clusters/{cluster}/workers/{worker}/unban",
        "Lifts a worker's ban.";
    RemoveWorker = "worker_remove", Change Delete "/v1/clusters/{cluster}/workers/{worker}",
        "Removes a worker; to come back it needs a new join token.";
    ListAdmins = "admin_list", List Get "/v1/admins", "Lists the admins, by name.";
    ShowAdmin = "admin_show", Read Get "/v1/admins/{admin}", "Shows an admin: roles, scope, certificate.";
    SetAdminRoles = "admin_set_role", Change Put "/v1/admins/{admin}/roles",
        "Replaces an admin's roles, from its next call on.";
    SetAdminScope = "admin_set_scope", Change Put "/v1/admins/{admin}/scope",
        "Replaces the clusters an admin may act on, from its next call on.";
    RemoveAdmin = "admin_remove", Change Delete "/v1/admins/{admin}",
        "Removes an admin and closes its connections.";
    ListSlots = "slot_list", List Get "/v1/slots", "Lists the root slots: the ways to open the store.";
    ShowCa = "ca_show", Read Get "/v1/ca", "Shows the fleet CA: its generations, and which nodes it lost.";
    RotateCa = "ca_rotate", Change Post "/v1/ca/rotate",
        "Replaces the issuing CA, and the root if asked; every certificate stays good.";
    ReplaceCa = "ca_replace", Change Post "/v1/ca/replace",
        "Replaces a compromised CA: every certificate of a node is refused at once.";
    ShowStatus = "status_show", Read Get "/v1/status", "Shows the answering agent's view of the fleet.";
    ShowOpenapi = "openapi_show", Read Get "/openapi.json", "Shows this document.";
}

impl Operation {
    /// Says whether it changes one thing that was there before, whose revision
    /// `if-match` may name; what is made new and the CA have none.
    pub const fn has_revision(self) -> bool {
        matches!(self.kind(), Kind::Change)
            && !matches!(self, Self::CreateCluster | Self::CreateToken | Self::RotateCa | Self::ReplaceCa)
    }

    /// Names of the path's parameters, in order.
    pub fn parameters(self) -> impl Iterator<Item = &'static str> {
        self.path().split('/').filter_map(|part| part.strip_prefix('{')?.strip_suffix('}'))
    }

    /// The path with its parameters filled in, percent-encoded.
    ///
    /// `values` stand in the order of [`Self::parameters`]; a missing one is
    /// left empty, which no route matches.
    pub fn path_with(self, values: &[&str]) -> String {
        let mut values = values.iter();
        let mut path = String::new();
        for part in self.path().split('/').skip(1) {
            path.push('/');
            if part.starts_with('{') {
                percent_encode(values.next().unwrap_or(&""), &mut path);
            } else {
                path.push_str(part);
            }
        }
        path
    }
}

impl fmt::Display for Operation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.id())
    }
}

/// Appends `text` with all but RFC 3986's unreserved characters encoded.
pub fn percent_encode(text: &str, to: &mut String) {
    for byte in text.bytes() {
        match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'.' | b'_' | b'~' => to.push(char::from(byte)),
            _ => to.push_str(&format!("%{byte:02X}")),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn no_two_operations_share_an_id_or_a_route() {
        let ids: HashSet<_> = Operation::ALL.iter().map(|operation| operation.id()).collect();
        let routes: HashSet<_> =
            Operation::ALL.iter().map(|operation| (operation.method().as_str(), operation.path())).collect();
        assert_eq!(ids.len(), Operation::ALL.len());
        assert_eq!(routes.len(), Operation::ALL.len());
    }

    #[test]
    fn reads_are_get_and_changes_are_not() {
        for operation in Operation::ALL {
            assert_eq!(operation.kind() == Kind::Change, operation.method() != Method::Get, "{operation}");
        }
    }

    #[test]
    fn a_parameter_cannot_leave_its_place_in_the_path() {
        let path = Operation::BanNode.path_with(&["a/../b", "x?y ü"]);
        assert_eq!(path, "/v1/clusters/a%2F..%2Fb/nodes/x%3Fy%20%C3%BC/ban");
    }
}
