//! Who may do what over the real router, generated from the authorization table.

use serde_json::json;

use fleet_kms_admin_api::Operation;
use fleet_kms_admin_api::operations::Kind;
use fleet_kms_agent::authz::{FLEET_WIDE, Role, Scope, TABLE, Who};

use crate::rig::{Ask, Rig};

/// A valid request of each operation, on a cluster; of the rest nothing needs to exist.
fn sample(operation: Operation, cluster: &str) -> Ask {
    let path: Vec<&str> = operation
        .parameters()
        .map(|name| match name {
            "cluster" => cluster,
            "version" => "1",
            "node" | "worker" => "cp-1",
            "admin" => "spare",
            _ => "0000000000000000",
        })
        .collect();
    let ask = Ask::new(operation, &path);
    let ask = match operation {
        Operation::CreateCluster => ask.json(&json!({"name": "west"})),
        Operation::RenameCluster => ask.json(&json!({"name": "east"})),
        Operation::SetRotation => ask.json(&json!({"period": "7d"})),
        Operation::SetMaxOffline => ask.json(&json!({"max_offline": "90d"})),
        Operation::SetAdminRoles => ask.json(&json!({"roles": ["auditor"]})),
        Operation::SetAdminScope => ask.json(&json!({"all": true})),
        _ => ask,
    };
    if operation.kind() == Kind::Change { ask.query("dry_run=true") } else { ask }
}

fn may(roles: &[Role], operation: Operation) -> bool {
    let row = TABLE.iter().find(|row| row.id == operation.id()).unwrap();
    roles.iter().any(|role| row.who.contains(&Who::Admin(*role)))
}

async fn rig() -> Rig {
    let rig = Rig::new().await;
    rig.create_cluster("north").await;
    rig.create_cluster("south").await;
    rig.admin("spare", &[Role::Auditor], &Scope::All).await;
    rig
}

#[tokio::test]
async fn each_set_of_roles_may_do_what_the_table_says_and_nothing_else() {
    let rig = rig().await;
    for set in 1..1_u8 << Role::ALL.len() {
        let roles: Vec<Role> =
            Role::ALL.into_iter().enumerate().filter(|(n, _)| set & (1 << n) != 0).map(|(_, r)| r).collect();
        let admin = rig.admin(&format!("a{set}"), &roles, &Scope::All).await;
        for operation in Operation::ALL {
            let answer = rig.ask_as(&admin, sample(*operation, "north")).await;
            assert_eq!(
                answer.status == 403,
                !may(&roles, *operation),
                "{roles:?} {operation}: {}",
                answer.body
            );
            assert!(answer.status.as_u16() < 429, "{roles:?} {operation}: {}", answer.body);
        }
    }
}

#[tokio::test]
async fn a_scope_is_respected_by_every_operation_and_what_is_outside_is_like_what_is_not() {
    let rig = rig().await;
    let north = rig.agent.clusters.find("north").unwrap().id;
    for role in Role::ALL {
        let admin = rig.admin(role.name(), &[role], &Scope::Clusters(vec![north])).await;
        for operation in Operation::ALL {
            let may = may(&[role], *operation) && !FLEET_WIDE.contains(&operation.id());
            let inside = rig.ask_as(&admin, sample(*operation, "north")).await;
            assert_eq!(inside.status == 403, !may, "{role:?} {operation}: {}", inside.body);
            if operation.parameters().all(|name| name != "cluster") {
                continue;
            }
            let outside = rig.ask_as(&admin, sample(*operation, "south")).await;
            let nowhere = rig.ask_as(&admin, sample(*operation, "nowhere")).await;
            assert_eq!(outside.status, 403, "{role:?} {operation}: {}", outside.body);
            let told = |answer: &crate::rig::Answer| (answer.status, answer.body["detail"].clone());
            assert_eq!(told(&outside), told(&nowhere), "{role:?} {operation}");
        }
    }
}

#[tokio::test]
async fn who_is_no_admin_gets_no_further_than_the_gate() {
    let rig = rig().await;
    let mut others = Vec::new();
    for wish in [json!({"node": "cp-1"}), json!({"worker": "census"})] {
        let issued = rig.ask(Ask::new(Operation::CreateToken, &["north"]).json(&wish)).await;
        others.push(rig.enrol(issued.body["result"]["token"].as_str().unwrap()).await);
    }
    let removed = rig.admin("removed", &[Role::Operator], &Scope::All).await;
    let rotate = || Ask::new(Operation::RotateKey, &["north"]).header("idempotency-key", "k1");
    assert_eq!(rig.ask_as(&removed, rotate()).await.status, 200);
    assert_eq!(rig.ask(Ask::new(Operation::RemoveAdmin, &["removed"])).await.status, 200);
    let again = rig.ask_as(&removed, rotate()).await;
    assert_eq!(
        (again.status.as_u16(), again.code()),
        (401, "not_authenticated"),
        "its answer is not replayed"
    );
    for certificate in &others {
        for operation in Operation::ALL {
            // A key of no form is refused by the replay, which none of them reaches.
            let ask = sample(*operation, "north").header("idempotency-key", "no key");
            let answer = rig.ask_as(certificate, ask).await;
            assert_eq!((answer.status.as_u16(), answer.code()), (403, "denied"), "{operation}");
        }
    }
    assert!(rig.agent.clusters.find("north").is_some());
}
