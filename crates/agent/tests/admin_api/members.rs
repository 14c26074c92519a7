//! Nodes and workers: seen, banned at a revision, and what a worker may do.

use std::time::Duration;

use serde_json::{Value, json};
use tonic::Request;

use fleet_kms_admin_api::Operation;
use fleet_kms_agent::authz::{Denied, actions};
use fleet_kms_identity::{Certificate, Standing};
use fleet_kms_proto::agent::data_plane_server::DataPlane as _;
use fleet_kms_proto::agent::rewrap_item::Outcome as Rewrapped;
use fleet_kms_proto::agent::unwrap_item::Outcome;
use fleet_kms_proto::agent::{Refusal, RewrapRequest, UnwrapRequest, WrapRequest};

use crate::rig::{Ask, Rig, caller, peer};

const DAY: Duration = Duration::from_secs(86_400);

async fn enrol(rig: &Rig, cluster: &str, wish: &Value) -> Certificate {
    let issued = rig.ask(Ask::new(Operation::CreateToken, &[cluster]).json(wish)).await;
    assert_eq!(issued.status, 201, "{}", issued.body);
    rig.enrol(issued.body["result"]["token"].as_str().unwrap()).await
}

fn call<T>(certificate: &Certificate, message: T) -> Request<T> {
    let mut request = Request::new(message);
    request.extensions_mut().insert(peer(certificate, Standing::Valid));
    request
}

#[tokio::test]
async fn nodes_that_nobody_has_heard_of_are_listed() {
    let rig = Rig::new().await;
    rig.create_cluster("north").await;
    let cp = enrol(&rig, "north", &json!({"node": "cp-1"})).await;
    let unseen = async |query: &str| {
        let list = rig.ask(Ask::new(Operation::ListNodes, &[]).query(query)).await;
        assert_eq!(list.status, 200, "{}", list.body);
        list.body["items"].as_array().unwrap().len()
    };
    rig.pass(DAY * 20);
    // No call since this agent's start: its certificate says when it was last there.
    let node = rig.ask(Ask::new(Operation::ListClusterNodes, &["north"])).await.body["items"][0].clone();
    assert_eq!(node["last_seen"], "2027-01-15T08:00:00Z", "{node}");
    assert_eq!((unseen("unseen=19d").await, unseen("unseen=21d").await), (1, 0));
    let report = fleet_kms_proto::agent::StatusRequest { build: "1.2.3".into(), ..Default::default() };
    rig.agent.nodes.report(cp.id(), report, (rig.agent.clock())());
    assert_eq!((unseen("unseen=19d").await, unseen("limit=9").await), (0, 1));
    let bad = rig.ask(Ask::new(Operation::ListNodes, &[]).query("unseen=soon")).await;
    assert_eq!(bad.code(), "invalid_request");
}

#[tokio::test]
async fn a_stale_revision_refuses_a_ban_a_removal_and_a_revocation() {
    let rig = Rig::new().await;
    rig.create_cluster("north").await;
    enrol(&rig, "north", &json!({"node": "cp-1"})).await;
    enrol(&rig, "north", &json!({"worker": "census"})).await;
    let token = rig.ask(Ask::new(Operation::CreateToken, &["north"]).json(&json!({"worker": "w2"}))).await;
    let token = token.body["result"]["details"].clone();
    assert_eq!((&token["worker"], &token["node"]), (&json!("w2"), &Value::Null));
    let item = async |operation| {
        let list = rig.ask(Ask::new(operation, &["north"])).await.body["items"].clone();
        assert_eq!(list.as_array().unwrap().len(), 1);
        list[0]["revision"].clone()
    };
    let cases = [
        (
            Operation::ListClusterNodes,
            [Operation::BanNode, Operation::UnbanNode, Operation::RemoveNode],
            "cp-1",
        ),
        (
            Operation::ListWorkers,
            [Operation::BanWorker, Operation::UnbanWorker, Operation::RemoveWorker],
            "census",
        ),
    ];
    for (list, changes, name) in cases {
        for operation in changes {
            let at = |revision: &Value| {
                Ask::new(operation, &["north", name]).header("if-match", &format!("\"{revision}\""))
            };
            assert_eq!(rig.ask(at(&json!(1))).await.code(), "revision_mismatch", "{operation}");
            let dry = rig.ask(at(&json!(1)).query("dry_run=true")).await;
            assert_eq!((dry.status.as_u16(), dry.code()), (412, "revision_mismatch"), "{operation}");
            let done = rig.ask(at(&item(list).await)).await;
            assert_eq!(done.status, 200, "{operation}: {}", done.body);
            assert_eq!(done.body["agents"], json!([{"agent": "agent-1", "has_it": true}]), "{operation}");
        }
    }
    let revoke = |revision: &Value| {
        Ask::new(Operation::RevokeToken, &["north", token["id"].as_str().unwrap()])
            .header("if-match", &format!("\"{revision}\""))
    };
    assert_eq!(rig.ask(revoke(&json!(1))).await.code(), "revision_mismatch");
    assert_eq!(rig.ask(revoke(&token["revision"])).await.status, 200);
}

#[tokio::test]
async fn a_worker_renews_while_it_is_valid_and_never_after() {
    let rig = Rig::new().await;
    rig.create_cluster("north").await;
    let worker = enrol(&rig, "north", &json!({"worker": "census"})).await;
    assert!(worker.id().to_string().ends_with("/worker/census"), "{}", worker.id());
    let permit = |standing| rig.agent.policy.permit::<actions::Renew>(&caller(&worker, standing)).map(drop);
    assert_eq!(permit(Standing::Valid), Ok(()));
    assert_eq!(permit(Standing::Expired { by: DAY }), Err(Denied::Expired));
    let policy = &rig.agent.policy;
    let valid = caller(&worker, Standing::Valid);
    assert_eq!(policy.permit::<actions::Wrap>(&valid).map(drop), Err(Denied::WrongKind));
    assert_eq!(policy.permit::<actions::Unwrap>(&valid).map(drop), Err(Denied::WrongKind));
    assert_eq!(policy.permit::<actions::Status>(&valid).map(drop), Err(Denied::WrongKind));
    let on = |operation| Ask::new(operation, &["north", "census"]);
    assert_eq!(rig.ask(on(Operation::BanWorker)).await.body["result"]["state"], "banned");
    assert_eq!(permit(Standing::Valid), Err(Denied::Banned));
    let node = rig.ask(on(Operation::UnbanNode)).await;
    assert_eq!(node.code(), "node_not_found", "a worker is no node");
    assert_eq!(rig.ask(on(Operation::UnbanWorker)).await.status, 200);
    assert_eq!(permit(Standing::Valid), Ok(()));
    assert_eq!(rig.ask(on(Operation::RemoveWorker)).await.status, 200);
    assert_eq!(permit(Standing::Valid), Err(Denied::UnknownIdentity));
    assert_eq!(rig.ask(on(Operation::RemoveWorker)).await.code(), "worker_not_found");
    for wish in [json!({"worker": "a", "node": "b"}), json!({"worker": "A"}), json!({"worker": "a/b"})] {
        let refused = rig.ask(Ask::new(Operation::CreateToken, &["north"]).json(&wish)).await;
        assert_eq!((refused.code(), &refused.body["field"]), ("invalid_field", &json!("worker")), "{wish}");
    }
}

#[tokio::test]
async fn a_worker_rewraps_its_clusters_values_and_sees_no_dek() {
    let rig = Rig::new().await;
    for name in ["north", "south"] {
        rig.create_cluster(name).await;
    }
    let plane = rig.agent.data_plane();
    let node = enrol(&rig, "north", &json!({"node": "cp-1"})).await;
    let other = enrol(&rig, "south", &json!({"node": "cp-1"})).await;
    let worker = enrol(&rig, "north", &json!({"worker": "census"})).await;
    let dek = vec![7; 32];
    let wrap = async |by: &Certificate| {
        let request = WrapRequest { plaintext: dek.clone(), ..Default::default() };
        plane.wrap(call(by, request)).await.unwrap().into_inner()
    };
    let (old, foreign) = (wrap(&node).await, wrap(&other).await);
    assert_eq!(rig.ask(Ask::new(Operation::RotateKey, &["north"])).await.status, 200);

    let batch = vec![old.wrapped.clone(), foreign.wrapped, vec![1, 2, 3]];
    let answer = plane.rewrap(call(&worker, RewrapRequest { wrapped: batch })).await.unwrap().into_inner();
    assert_eq!((answer.version, old.version), (2, 1));
    let outcomes: Vec<_> = answer.items.into_iter().map(|item| item.outcome.unwrap()).collect();
    let Rewrapped::Wrapped(new) = outcomes[0].clone() else { panic!("{outcomes:?}") };
    assert_ne!(new, old.wrapped);
    for outcome in &outcomes[1..] {
        assert_eq!(*outcome, Rewrapped::Refused(Refusal::NotOurs.into()));
    }
    let request = UnwrapRequest { wrapped: vec![new.into()] };
    let read = plane.unwrap(call(&node, request)).await.unwrap().into_inner();
    assert_eq!(read.items[0].outcome, Some(Outcome::Plain(dek)));

    let request = || RewrapRequest { wrapped: vec![old.wrapped.clone()] };
    for certificate in [&node, &rig.first_admin()] {
        let refused = plane.rewrap(call(certificate, request())).await.unwrap_err();
        assert_eq!(refused.code(), tonic::Code::PermissionDenied);
    }
    let empty = plane.rewrap(call(&worker, RewrapRequest::default())).await.unwrap_err();
    assert_eq!(empty.code(), tonic::Code::InvalidArgument);
    // What a disabled version wrapped cannot be had by wrapping it anew.
    assert_eq!(rig.ask(Ask::new(Operation::DisableVersion, &["north", "1"])).await.status, 200);
    let answer = plane.rewrap(call(&worker, request())).await.unwrap().into_inner();
    let refused = Rewrapped::Refused(Refusal::VersionDisabled.into());
    assert_eq!(answer.items[0].outcome, Some(refused));
}
