//! The table against what is served.

use std::collections::BTreeSet;

use super::{Role, TABLE, Who};

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
    let changes =
        ["create", "rotate", "disable", "enable", "destroy", "ban", "remove", "set", "revoke", "replace"];
    for row in TABLE.iter().filter(|row| row.who.contains(&Who::Admin(Role::Auditor))) {
        assert!(!changes.iter().any(|verb| row.id.contains(verb)), "{}", row.id);
    }
}

#[test]
fn a_permit_cannot_be_cloned_or_printed() {
    use super::{FleetPermit, Permit, actions};
    static_assertions::assert_not_impl_any!(Permit<actions::Wrap>: Clone, std::fmt::Debug);
    static_assertions::assert_not_impl_any!(FleetPermit<actions::ClusterCreate>: Clone, std::fmt::Debug);
}
