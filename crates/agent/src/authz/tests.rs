//! The table against what is served.

use std::collections::BTreeSet;

use super::{FLEET_WIDE, Role, TABLE, Who, may_grant};

/// The RPCs of the agent API, read off its definition.
fn rpcs() -> BTreeSet<String> {
    let definition = include_str!("../../../../proto/fleet_kms/agent.proto");
    let mut service = "";
    let mut found = BTreeSet::new();
    for line in definition.lines().map(str::trim) {
        let word = |prefix| line.strip_prefix(prefix).and_then(|rest: &str| rest.split([' ', '(']).next());
        if let Some(name) = word("service ") {
            service = name;
        } else if let Some(name) = word("rpc ") {
            found.insert(format!("/fleet_kms.agent.v1.{service}/{name}"));
        }
    }
    assert!(found.len() >= 6, "the definition was not understood: {found:?}");
    found
}

#[test]
fn every_rpc_has_one_row_and_every_grpc_row_an_rpc() {
    let rows: Vec<String> =
        TABLE.iter().map(|row| row.id.to_owned()).filter(|id| id.starts_with('/')).collect();
    let unique: BTreeSet<String> = rows.iter().cloned().collect();
    assert_eq!(rows.len(), unique.len(), "a row twice");
    assert_eq!(unique, rpcs());
}

#[test]
fn internal_rows_are_for_the_agent_alone_and_nobody_else_has_them() {
    for row in TABLE {
        let internal = row.who.iter().any(|who| matches!(who, Who::Internal(_)));
        assert_eq!(internal, row.id.starts_with("internal:"), "{}", row.id);
        assert!(!internal || row.who.len() == 1, "{}", row.id);
    }
}

#[test]
fn only_what_needs_no_certificate_is_open_to_anyone() {
    let open: Vec<_> = TABLE.iter().filter(|row| row.who.contains(&Who::Anyone)).map(|row| row.id).collect();
    assert_eq!(open, ["/fleet_kms.agent.v1.Enrolment/Enrol", "/fleet_kms.agent.v1.Enrolment/Time"]);
    let expired: Vec<_> =
        TABLE.iter().filter(|row| row.who.contains(&Who::ExpiredNode)).map(|row| row.id).collect();
    assert_eq!(expired, ["/fleet_kms.agent.v1.Enrolment/Renew"]);
}

#[test]
fn an_auditor_changes_nothing() {
    let changes = [
        "create", "rotate", "disable", "enable", "destroy", "ban", "remove", "set", "revoke", "retire",
        "restore", "rename", "replace",
    ];
    for row in TABLE.iter().filter(|row| row.who.contains(&Who::Admin(Role::Auditor))) {
        assert!(!changes.iter().any(|verb| row.id.contains(verb)), "{}", row.id);
    }
}

#[test]
fn nobody_grants_what_they_may_not_do() {
    use Role::{Auditor, Enroller, KeyOfficer, Operator};
    for (own, role, may) in [
        (&[Operator][..], Operator, true),
        (&[Operator], Auditor, true),
        (&[Operator], Enroller, true),
        (&[Operator], KeyOfficer, false),
        (&[Operator, KeyOfficer], KeyOfficer, true),
        (&[KeyOfficer], Operator, false),
        (&[Auditor, Enroller], Operator, false),
        (&[], Enroller, false),
    ] {
        assert_eq!(may_grant(own, role), may, "{own:?} {role:?}");
    }
}

#[test]
fn a_worker_rewraps_and_renews_and_nothing_else() {
    let worker: Vec<_> =
        TABLE.iter().filter(|row| row.who.contains(&Who::Worker)).map(|row| row.id).collect();
    assert_eq!(worker, ["/fleet_kms.agent.v1.DataPlane/Rewrap", "/fleet_kms.agent.v1.Enrolment/Renew"]);
}

#[test]
fn a_permit_cannot_be_cloned_or_printed() {
    use super::{FleetPermit, Permit, actions};
    static_assertions::assert_not_impl_any!(Permit<actions::Wrap>: Clone, std::fmt::Debug);
    static_assertions::assert_not_impl_any!(FleetPermit<actions::ClusterCreate>: Clone, std::fmt::Debug);
}

const ROLES: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../../docs/admin-roles.md");

/// The part of the table that is about admins, as they read it.
fn roles_document() -> String {
    let mut text = "# Who may do what\n\n\
        Made from the authorization table that the agent is compiled with (`crates/agent/src/authz/table.rs`); a test\n\
        compares the two, and another one asks each operation as each set of roles. *all* means that only an admin whose\n\
        scope is all clusters may; everything else is also for an admin of some clusters, on those.\n\n"
        .to_owned();
    let names: Vec<_> = Role::ALL.iter().map(|role| role.name()).collect();
    text +=
        &format!("| operation | {} | scope |\n|---|{}---|\n", names.join(" | "), "---|".repeat(names.len()));
    for row in TABLE.iter().filter(|row| row.who.iter().any(|who| matches!(who, Who::Admin(_)))) {
        let may = |role: &Role| if row.who.contains(&Who::Admin(*role)) { "yes" } else { "" };
        let cells: Vec<_> = Role::ALL.iter().map(may).collect();
        let scope = if FLEET_WIDE.contains(&row.id) { "all" } else { "" };
        text += &format!("| `{}` | {} | {scope} |\n", row.id, cells.join(" | "));
    }
    text.lines().map(|line| format!("{}\n", line.trim_end())).collect()
}

#[test]
fn the_documented_roles_are_those_of_the_table() {
    let now = roles_document();
    if std::env::var_os("UPDATE_ROLES").is_some() {
        std::fs::write(ROLES, &now).unwrap();
    }
    let tree = std::fs::read_to_string(ROLES).unwrap_or_default();
    assert!(tree == now, "docs/admin-roles.md is behind: run `make roles` and look at the diff");
}
