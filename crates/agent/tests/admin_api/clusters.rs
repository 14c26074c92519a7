//! Clusters retired, restored and renamed: labels change, keys stay.

use std::sync::Arc;
use std::time::Duration;

use serde_json::{Value, json};
use tokio_util::sync::CancellationToken;

use fleet_kms_admin_api::Operation;
use fleet_kms_agent::authz::{Denied, actions};
use fleet_kms_agent::rotation::{Pace, Schedule};
use fleet_kms_identity::{Certificate, Standing};

use crate::rig::{Ask, Rig, caller};

const DAY: Duration = Duration::from_secs(86_400);

async fn node(rig: &Rig, cluster: &str, node: &str) -> Certificate {
    let issued = rig.ask(Ask::new(Operation::CreateToken, &[cluster]).json(&json!({ "node": node }))).await;
    assert_eq!(issued.status, 201, "{}", issued.body);
    rig.enrol(issued.body["result"]["token"].as_str().unwrap()).await
}

async fn names(rig: &Rig, query: &str) -> Vec<Value> {
    let list = rig.ask(Ask::new(Operation::ListClusters, &[]).query(query)).await;
    list.body["items"].as_array().unwrap().iter().map(|cluster| cluster["name"].clone()).collect()
}

fn wrap(rig: &Rig, certificate: &Certificate) -> Result<(), Denied> {
    rig.agent.policy.permit::<actions::Wrap>(&caller(certificate, Standing::Valid)).map(drop)
}

#[tokio::test]
async fn a_retired_cluster_is_refused_hidden_and_comes_back_with_its_keys() {
    let rig = Rig::new().await;
    let made = rig.create_cluster("north").await;
    let id = made["id"].as_str().unwrap();
    let cp = node(&rig, "north", "cp-1").await;
    let spare = rig.ask(Ask::new(Operation::CreateToken, &["north"]).json(&json!({"node": "cp-2"}))).await;
    assert_eq!(wrap(&rig, &cp), Ok(()));

    let on = |operation| Ask::new(operation, &["north"]);
    let dry = rig.ask(on(Operation::RetireCluster).query("dry_run=true")).await;
    assert!(dry.body["effects"][1].as_str().unwrap().starts_with("1 node"), "{}", dry.body);
    assert_eq!(wrap(&rig, &cp), Ok(()));
    let retired = rig.ask(on(Operation::RetireCluster).query("reason=sold")).await;
    assert_eq!(retired.status, 200, "{}", retired.body);
    assert_eq!(retired.body["effects"], dry.body["effects"], "the dry run told the truth");
    assert_eq!(retired.body["result"]["state"], "retired");
    assert_eq!(retired.body["result"]["keys_kept_until"], "2027-02-14T08:00:00Z");

    assert_eq!(wrap(&rig, &cp), Err(Denied::ClusterRetired));
    let renew = rig.agent.policy.permit::<actions::Renew>(&caller(&cp, Standing::Valid));
    assert_eq!(renew.map(drop), Err(Denied::ClusterRetired));
    assert!(rig.agent.identities.find(cp.id()).is_none(), "its nodes are removed");
    let audit = rig.audit();
    assert!(audit.contains(r#""action":"cluster_retire""#) && audit.contains(r#""action":"node_remove""#));

    assert!(names(&rig, "limit=9").await.is_empty());
    assert_eq!(names(&rig, "retired=true").await, ["north"]);
    let status = rig.ask(Ask::new(Operation::ShowStatus, &[])).await.body;
    assert_eq!((&status["clusters"]["total"], &status["clusters"]["retired"]), (&json!(0), &json!(1)));
    assert_eq!(rig.ask(on(Operation::ShowCluster)).await.code(), "cluster_not_found");
    assert_eq!(rig.ask(Ask::new(Operation::ShowCluster, &[id])).await.body["key_id"], made["key_id"]);
    for operation in [Operation::RotateKey, Operation::RetireCluster, Operation::CreateToken] {
        let answer = rig.ask(Ask::new(operation, &[id])).await;
        assert_eq!((answer.status.as_u16(), answer.code()), (409, "state_conflict"), "{operation}");
    }

    // The name is free; so the old one has to come back under another.
    let second = rig.create_cluster("north").await;
    assert_ne!(second["id"], made["id"]);
    assert_eq!(rig.ask(Ask::new(Operation::RestoreCluster, &[id])).await.code(), "already_exists");
    let wish = json!({"name": "north-old"});
    let restored = rig.ask(on(Operation::RestoreCluster).json(&wish)).await;
    assert_eq!(restored.status, 200, "{}", restored.body);
    for (field, value) in [("name", json!("north-old")), ("state", json!("live")), ("nodes", json!(0))] {
        assert_eq!(restored.body["result"][field], value);
    }
    assert_eq!(restored.body["result"]["key_id"], made["key_id"]);
    assert_eq!(wrap(&rig, &cp), Err(Denied::UnknownIdentity), "its nodes need join tokens");
    let tokens = rig.ask(Ask::new(Operation::ListTokens, &["north-old"])).await;
    assert!(tokens.body["items"].as_array().unwrap().is_empty(), "no token of before is good");
    assert_eq!(spare.status, 201);
    let again = node(&rig, "north-old", "cp-1").await;
    assert_eq!((wrap(&rig, &again), wrap(&rig, &cp)), (Ok(()), Err(Denied::Superseded)));
    let not_retired = rig.ask(Ask::new(Operation::RestoreCluster, &["north-old"])).await;
    assert_eq!((not_retired.status.as_u16(), not_retired.code()), (409, "state_conflict"));
}

#[tokio::test]
async fn two_retired_clusters_of_one_name_are_told_apart_by_their_ids() {
    let rig = Rig::new().await;
    let mut ids = Vec::new();
    for _ in 0..2 {
        ids.push(rig.create_cluster("north").await["id"].as_str().unwrap().to_owned());
        assert_eq!(rig.ask(Ask::new(Operation::RetireCluster, &["north"])).await.status, 200);
    }
    assert_eq!(names(&rig, "retired=true").await, ["north", "north"]);
    let first = rig.ask(Ask::new(Operation::ListClusters, &[]).query("retired=true&limit=1")).await.body;
    let next = format!("retired=true&limit=1&after={}", first["next"].as_str().unwrap());
    let second = rig.ask(Ask::new(Operation::ListClusters, &[]).query(&next)).await.body;
    assert_ne!(first["items"][0]["id"], second["items"][0]["id"]);
    assert!(second["next"].is_null());
    assert_eq!(rig.ask(Ask::new(Operation::RestoreCluster, &["north"])).await.code(), "state_conflict");
    assert_eq!(rig.ask(Ask::new(Operation::RestoreCluster, &[&ids[1]])).await.status, 200);
    assert_eq!(rig.agent.clusters.find("north").unwrap().id.to_string(), ids[1]);
}

#[tokio::test]
async fn a_rename_changes_the_label_and_nothing_else() {
    let rig = Rig::new().await;
    let made = rig.create_cluster("north").await;
    rig.create_cluster("south").await;
    let cp = node(&rig, "north", "cp-1").await;
    let rename = |to: &str| Ask::new(Operation::RenameCluster, &["north"]).json(&json!({ "name": to }));
    assert_eq!(rig.ask(rename("south")).await.code(), "already_exists");
    assert_eq!(rig.ask(rename("North")).await.code(), "invalid_field");
    let stale = rename("west").header("if-match", "\"1\"");
    assert_eq!(rig.ask(stale).await.code(), "revision_mismatch");
    let seen = rename("west").header("if-match", &format!("\"{}\"", made["revision"]));
    let renamed = rig.ask(seen).await.body["result"].clone();
    for field in ["id", "key_id", "created", "active_version", "period", "activated"] {
        assert_eq!(renamed[field], made[field], "{field}");
    }
    assert_eq!((&renamed["name"], &renamed["nodes"]), (&json!("west"), &json!(1)));
    assert_eq!(wrap(&rig, &cp), Ok(()));
    assert_eq!(rig.ask(Ask::new(Operation::ShowCluster, &["north"])).await.status, 404);
    assert_eq!(names(&rig, "limit=9").await, ["south", "west"]);

    // The cluster has moved on for its key too, and knows it after a restart.
    let rotate =
        |at: &Value| Ask::new(Operation::RotateKey, &["west"]).header("if-match", &format!("\"{at}\""));
    assert_eq!(rig.ask(rotate(&made["revision"])).await.code(), "revision_mismatch");
    assert_eq!(rig.ask(rotate(&made["revision"]).query("dry_run=true")).await.code(), "revision_mismatch");
    assert_eq!(rig.ask(rotate(&renamed["revision"])).await.status, 200);
    rig.create_cluster("north").await;
}

#[tokio::test]
async fn a_retired_cluster_is_not_rotated_on_schedule_and_a_restored_one_is() {
    let rig = Rig::new().await;
    for name in ["north", "south"] {
        rig.create_cluster(name).await;
    }
    let north = rig.agent.clusters.find("north").unwrap().id;
    assert_eq!(rig.ask(Ask::new(Operation::RetireCluster, &["north"])).await.status, 200);
    rig.pass(DAY * 31);
    let agent = &rig.agent;
    let schedule = || {
        let clocks = (Arc::clone(agent.clock()), fleet_kms_process::clock::monotonic as fn() -> _);
        let (control_plane, keyrings) = (Arc::clone(&agent.control_plane), Arc::clone(&agent.keyrings));
        Schedule::new(control_plane, keyrings, Arc::clone(&agent.changes), clocks, Pace::default())
    };
    let active = |id| agent.keyrings.keyring(id).unwrap().keyring.active().version.get();
    let south = agent.clusters.find("south").unwrap().id;
    let runs_until_due_are_done = async |id| {
        let stop = CancellationToken::new();
        let run = tokio::spawn(schedule().run(stop.clone()));
        let waits = async {
            while active(id) == 1 {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        };
        tokio::time::timeout(Duration::from_secs(30), waits).await.unwrap();
        stop.cancel();
        run.await.unwrap();
    };
    runs_until_due_are_done(&south).await;
    assert_eq!((active(&north), active(&south)), (1, 2));
    let first =
        rig.admin("first", &fleet_kms_agent::authz::Role::ALL, &fleet_kms_agent::authz::Scope::All).await;
    let restored = rig.ask_as(&first, Ask::new(Operation::RestoreCluster, &["north"])).await;
    assert_eq!(restored.status, 200, "{}", restored.body);
    runs_until_due_are_done(&north).await;
    assert_eq!(active(&north), 2);
}
