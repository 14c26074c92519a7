//! Admins: roles and scopes in the store, and the two rules about them.

use std::time::Duration;

use serde_json::{Value, json};

use fleet_kms_admin_api::Operation;
use fleet_kms_agent::authz::{Role, Scope};

use crate::rig::{Answer, Ask, Rig};

fn set_roles(admin: &str, roles: &[&str]) -> Ask {
    Ask::new(Operation::SetAdminRoles, &[admin]).json(&json!({ "roles": roles }))
}

fn set_scope(admin: &str, body: &Value) -> Ask {
    Ask::new(Operation::SetAdminScope, &[admin]).json(body)
}

fn refused(answer: &Answer) -> (u16, &str) {
    (answer.status.as_u16(), answer.code())
}

#[tokio::test]
async fn a_demotion_holds_from_the_next_call_on_and_stands_in_the_audit() {
    let rig = Rig::new().await;
    rig.create_cluster("north").await;
    let eve = rig.admin("eve", &[Role::Operator], &Scope::All).await;
    let rotate = || Ask::new(Operation::RotateKey, &["north"]);
    assert_eq!(rig.ask_as(&eve, rotate()).await.status, 200);

    let dry = rig.ask(set_roles("eve", &["auditor"]).query("dry_run=true")).await;
    assert_eq!(dry.body["applied"], false, "{}", dry.body);
    assert_eq!(rig.ask_as(&eve, rotate()).await.status, 200);
    let set = rig.ask(set_roles("eve", &["auditor", "enroller"]).query("reason=left%20the%20team")).await;
    assert_eq!(set.body["result"]["roles"], json!(["auditor", "enroller"]), "{}", set.body);
    assert_eq!(set.body["agents"], json!([{"agent": "agent-1", "has_it": true}]));
    assert_eq!(refused(&rig.ask_as(&eve, rotate()).await), (403, "denied"));
    assert_eq!(rig.ask_as(&eve, Ask::new(Operation::ListClusters, &[])).await.status, 200);
    let audit = rig.audit();
    assert!(audit.contains(r#""action":"admin_set_role""#) && audit.contains("left the team"), "{audit}");

    assert_eq!(rig.ask(Ask::new(Operation::RemoveAdmin, &["eve"])).await.status, 200);
    assert_eq!(
        refused(&rig.ask_as(&eve, Ask::new(Operation::ShowStatus, &[])).await),
        (401, "not_authenticated")
    );
    assert_eq!(rig.ask(Ask::new(Operation::ShowAdmin, &["eve"])).await.code(), "admin_not_found");
}

#[tokio::test]
async fn the_last_operator_is_neither_removed_nor_demoted_nor_narrowed() {
    let rig = Rig::new().await;
    rig.create_cluster("north").await;
    let some = json!({"clusters": ["north"]});
    // An operator of some clusters cannot take over, nor one whose certificate has ended.
    let north = rig.agent.clusters.find("north").unwrap().id;
    rig.admin("local", &[Role::Operator], &Scope::Clusters(vec![north])).await;
    let attempts = || {
        [
            set_roles("first", &["auditor", "key-officer"]),
            set_scope("first", &some),
            Ask::new(Operation::RemoveAdmin, &["first"]),
        ]
    };
    for query in ["dry_run=true", "dry_run=false"] {
        for ask in attempts() {
            let answer = rig.ask(ask.query(query)).await;
            assert_eq!(refused(&answer), (409, "guarded"), "{}", answer.body);
        }
    }
    rig.admin("stale", &[Role::Operator], &Scope::All).await;
    rig.pass(Duration::from_secs(31 * 86_400));
    let now = rig.admin("first", &[Role::Operator, Role::KeyOfficer], &Scope::All).await;
    for ask in attempts() {
        assert_eq!(refused(&rig.ask_as(&now, ask).await), (409, "guarded"));
    }
    rig.admin("second", &[Role::Operator], &Scope::All).await;
    assert_eq!(rig.ask_as(&now, set_roles("first", &["auditor"])).await.status, 200);
    assert_eq!(refused(&rig.ask_as(&now, set_roles("second", &["auditor"])).await), (403, "denied"));
}

#[tokio::test]
async fn nobody_makes_an_admin_what_they_are_not() {
    let rig = Rig::new().await;
    rig.create_cluster("north").await;
    let operator = rig.admin("operator", &[Role::Operator], &Scope::All).await;
    let north = rig.agent.clusters.find("north").unwrap().id;
    rig.admin("officer", &[Role::KeyOfficer], &Scope::Clusters(vec![north])).await;
    for ask in [
        set_roles("operator", &["operator", "key-officer"]),
        set_roles("officer", &["key-officer", "operator"]),
        set_scope("officer", &json!({"all": true})),
    ] {
        let answer = rig.ask_as(&operator, ask).await;
        // The second one keeps what the officer has, and adds what the operator may give.
        let may = answer.body["result"]["roles"] == json!(["operator", "key-officer"]);
        assert!(may || refused(&answer) == (403, "denied"), "{}", answer.body);
    }
    let officer = rig.ask(Ask::new(Operation::ShowAdmin, &["officer"])).await.body;
    assert_eq!(officer["scope"], json!({"all": false, "clusters": ["north"]}));
    let own = rig.ask(Ask::new(Operation::ShowAdmin, &["operator"])).await.body;
    assert_eq!(own["roles"], json!(["operator"]));
    // The first admin is both.
    assert_eq!(rig.ask(set_scope("officer", &json!({"all": true}))).await.status, 200);
}

#[tokio::test]
async fn a_scope_is_set_by_name_and_what_makes_none_is_refused() {
    let rig = Rig::new().await;
    rig.create_cluster("north").await;
    rig.create_cluster("south").await;
    let eve = rig.admin("eve", &[Role::Auditor], &Scope::All).await;
    let set = rig.ask(set_scope("eve", &json!({"clusters": ["south", "north", "south"]}))).await;
    assert_eq!(set.body["result"]["scope"]["clusters"].as_array().unwrap().len(), 2, "{}", set.body);
    assert_eq!(rig.ask(set_scope("eve", &json!({"clusters": ["south"]}))).await.status, 200);
    let list = rig.ask_as(&eve, Ask::new(Operation::ListClusters, &[])).await;
    assert_eq!(list.body["items"].as_array().unwrap().len(), 1);
    for body in [json!({}), json!({"all": true, "clusters": ["north"]}), json!({"clusters": []})] {
        assert_eq!(refused(&rig.ask(set_scope("eve", &body)).await), (400, "invalid_field"), "{body}");
    }
    assert_eq!(rig.ask(set_scope("eve", &json!({"clusters": ["x"]}))).await.code(), "cluster_not_found");
    assert_eq!(rig.ask(set_roles("eve", &[])).await.code(), "invalid_field");
    assert_eq!(rig.ask(set_roles("eve", &["king"])).await.code(), "invalid_field");

    let shown = rig.ask(Ask::new(Operation::ShowAdmin, &["eve"])).await.body;
    let stale = set_roles("eve", &["enroller"]).header("if-match", "\"1\"");
    assert_eq!(refused(&rig.ask(stale).await), (412, "revision_mismatch"));
    let seen = set_roles("eve", &["enroller"]).header("if-match", &format!("\"{}\"", shown["revision"]));
    assert_eq!(rig.ask(seen).await.status, 200);
    let names: Vec<Value> = rig.ask(Ask::new(Operation::ListAdmins, &[])).await.body["items"]
        .as_array()
        .unwrap()
        .iter()
        .map(|admin| admin["name"].clone())
        .collect();
    assert_eq!(names, ["eve", "first"]);
}

#[tokio::test]
async fn root_slots_are_seen_by_who_is_for_all_clusters() {
    let rig = Rig::new().await;
    rig.create_cluster("north").await;
    rig.agent.slots.note_in_use("the file /root.key").await.unwrap();
    let slots = rig.ask(Ask::new(Operation::ListSlots, &[])).await.body;
    let slot = &slots["items"][0];
    assert_eq!((&slot["kind"], &slot["in_use"]), (&json!("file"), &json!(true)), "{slots}");
    assert_eq!(slot["verified"], "2027-01-15T08:00:00Z");
    assert_eq!(slots["items"].as_array().unwrap().len(), 1);
}
