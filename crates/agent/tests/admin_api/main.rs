//! The admin API on a whole agent, without sockets.

#![expect(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    reason = "a test of a whole agent may stop at any of them"
)]

mod admins;
mod clusters;
mod members;
mod rig;
mod table;

use std::time::Duration;

use serde_json::{Value, json};

use fleet_kms_admin_api::{Cluster, Operation, Page};
use fleet_kms_agent::authz::{Role, Scope, internal};
use fleet_kms_agent::ca::{self, Roll};
use fleet_kms_agent::trail::Intent;

use rig::{Ask, Rig};

#[tokio::test]
async fn a_cluster_is_made_shown_listed_and_rotated() {
    let rig = Rig::new().await;
    let made = rig.create_cluster("north").await;
    assert_eq!(made["active_version"], 1);
    assert_eq!(made["period"], "30d");
    assert_eq!(made["unbacked"], json!([1]));
    let id = made["id"].as_str().unwrap();

    let by_id = rig.ask(Ask::new(Operation::ShowCluster, &[id])).await;
    assert_eq!(by_id.body["name"], "north");

    let rotate = |query: &str| Ask::new(Operation::RotateKey, &["north"]).query(query);
    let dry = rig.ask(rotate("dry_run=true")).await;
    assert_eq!(dry.body["applied"], false);
    assert_eq!(dry.body["effects"][1], "version 2 becomes active");
    let unchanged = rig.ask(Ask::new(Operation::ShowCluster, &["north"])).await;
    assert_eq!(unchanged.body, by_id.body, "a dry run changes nothing");

    let rotated = rig.ask(rotate("reason=drill")).await;
    assert_eq!(rotated.status, 200, "{}", rotated.body);
    assert_eq!(rotated.body["result"]["active_version"], 2);
    assert_eq!(rotated.body["effects"], dry.body["effects"], "the dry run told the truth");
    assert!(rig.audit().contains(r#""reason":"drill""#));

    let fresh = rig.ask(Ask::new(Operation::RotateKey, &[id]).json(&json!({"fresh": true}))).await;
    assert_eq!(fresh.body["result"]["active_version"], 4);
    let versions = rig.ask(Ask::new(Operation::ListVersions, &["north"])).await;
    let states: Vec<&str> =
        versions.body["items"].as_array().unwrap().iter().map(|v| v["state"].as_str().unwrap()).collect();
    assert_eq!(states, ["decrypt_only", "decrypt_only", "decrypt_only", "active", "next"]);
}

#[tokio::test]
async fn lists_come_in_pages_in_a_fixed_order() {
    let rig = Rig::new().await;
    for name in ["c", "a", "e", "b", "d"] {
        rig.create_cluster(name).await;
    }
    let mut names = Vec::new();
    let mut query = "limit=2".to_owned();
    loop {
        let answer = rig.ask(Ask::new(Operation::ListClusters, &[]).query(&query)).await;
        let page: Page<Cluster> = serde_json::from_value(answer.body).unwrap();
        assert!(page.items.len() <= 2);
        names.extend(page.items.into_iter().map(|cluster| cluster.name));
        let Some(next) = page.next else { break };
        query = format!("limit=2&after={next}");
    }
    assert_eq!(names, ["a", "b", "c", "d", "e"]);
}

#[tokio::test]
async fn a_stale_revision_refuses_a_change() {
    let rig = Rig::new().await;
    let revision = rig.create_cluster("north").await["revision"].to_string();
    let at = |revision: &str| {
        Ask::new(Operation::RotateKey, &["north"]).header("if-match", &format!("\"{revision}\""))
    };
    assert_eq!(rig.ask(at(&revision)).await.status, 200);
    let stale = rig.ask(at(&revision)).await;
    assert_eq!((stale.status.as_u16(), stale.code()), (412, "revision_mismatch"));
    assert_eq!(rig.ask(at(&revision).query("dry_run=true")).await.status, 412);
    assert_eq!(rig.ask(at("x")).await.code(), "invalid_request");
}

#[tokio::test]
async fn a_revision_of_what_has_none_is_refused() {
    let rig = Rig::new().await;
    rig.create_cluster("north").await;
    let create = Ask::new(Operation::CreateCluster, &[]).json(&json!({ "name": "south" }));
    let token = Ask::new(Operation::CreateToken, &["north"]);
    let (rotate, replace) = (Ask::new(Operation::RotateCa, &[]), Ask::new(Operation::ReplaceCa, &[]));
    for ask in [create, token, rotate, replace] {
        let answer = rig.ask(ask.header("if-match", "\"1\"")).await;
        assert_eq!((answer.status.as_u16(), answer.code()), (400, "invalid_request"));
    }
    assert_eq!(rig.ask(Ask::new(Operation::ShowCluster, &["south"])).await.status, 404);
}

#[tokio::test]
async fn a_repeated_idempotency_key_makes_no_second_change() {
    let rig = Rig::new().await;
    rig.create_cluster("north").await;
    let rotate = || Ask::new(Operation::RotateKey, &["north"]).header("idempotency-key", "k1");
    let first = rig.ask(rotate()).await;
    let again = rig.ask(rotate()).await;
    assert_eq!(first.body, again.body);
    let shown = rig.ask(Ask::new(Operation::ShowCluster, &["north"])).await;
    assert_eq!(shown.body["active_version"], 2);
    let other = rig.ask(rotate().query("reason=x")).await;
    assert_eq!((other.status.as_u16(), other.code()), (409, "idempotency_key_reused"));
    assert_eq!(rig.ask(rotate().header("if-match", "\"1\"")).await.code(), "idempotency_key_reused");

    for method in ["PATCH", "TRACE"] {
        let none = Ask::target(method, "/v1/clusters/north/rotate").header("idempotency-key", "k1");
        assert_eq!(rig.ask(none).await.code(), "method_not_allowed", "what is no change has no key");
    }

    let token = || Ask::new(Operation::CreateToken, &["north"]).header("idempotency-key", "k2");
    assert_eq!(rig.ask(token()).await.status, 201);
    let again = rig.ask(token()).await;
    assert_eq!(again.code(), "idempotency_key_reused", "a secret is shown once");
    let tokens = rig.ask(Ask::new(Operation::ListTokens, &["north"])).await;
    assert_eq!(tokens.body["items"].as_array().unwrap().len(), 1);
}

#[tokio::test]
async fn a_token_makes_a_node_that_is_banned_unbanned_and_removed() {
    let rig = Rig::new().await;
    rig.create_cluster("north").await;
    let wish = json!({"node": "cp-1", "ttl": "1h", "uses": 2});
    let issued = rig.ask(Ask::new(Operation::CreateToken, &["north"]).json(&wish)).await;
    assert_eq!(issued.status, 201, "{}", issued.body);
    let text = issued.body["result"]["token"].as_str().unwrap();
    let id = issued.body["result"]["details"]["id"].as_str().unwrap();
    assert_eq!(issued.body["result"]["details"]["expires"], "2027-01-15T09:00:00Z");
    assert!(!rig.audit().contains(&text[6..]), "the audit never has a token");
    let node = rig.enrol(text).await;

    let listed = rig.ask(Ask::new(Operation::ListClusterNodes, &["north"])).await;
    assert_eq!(listed.body["items"][0]["name"], "cp-1");
    assert_eq!(listed.body["items"][0]["state"], "active");
    assert_eq!(rig.ask(Ask::new(Operation::ListNodes, &[])).await.body, listed.body);

    let on = |operation| Ask::new(operation, &["north", "cp-1"]);
    let dry = rig.ask(on(Operation::BanNode).query("dry_run=true")).await;
    assert_eq!(dry.body["applied"], false);
    let banned = rig.ask(on(Operation::BanNode)).await;
    assert_eq!(banned.body["result"]["state"], "banned", "{}", banned.body);
    assert!(rig.agent.identities.find(node.id()).unwrap().banned);
    assert_eq!(rig.ask(on(Operation::BanNode)).await.code(), "state_conflict");
    assert_eq!(rig.ask(on(Operation::UnbanNode)).await.body["result"]["state"], "active");
    assert_eq!(rig.ask(on(Operation::RemoveNode)).await.status, 200);
    assert!(rig.agent.identities.find(node.id()).is_none());
    assert_eq!(rig.ask(on(Operation::BanNode)).await.code(), "node_not_found");

    let revoke = || Ask::new(Operation::RevokeToken, &["north", id]);
    assert_eq!(rig.ask(revoke()).await.body["result"]["used"], 1);
    assert_eq!(rig.ask(revoke()).await.code(), "token_not_found");
}

#[tokio::test]
async fn a_version_is_disabled_enabled_and_not_destroyed_without_a_census() {
    let rig = Rig::new().await;
    rig.create_cluster("north").await;
    rig.ask(Ask::new(Operation::RotateKey, &["north"])).await;
    let on = |operation, version: &str| Ask::new(operation, &["north", version]);

    let active = rig.ask(on(Operation::DisableVersion, "2")).await;
    assert_eq!((active.status.as_u16(), active.code()), (409, "state_conflict"));
    assert!(active.body["detail"].as_str().unwrap().contains("rotate first"), "{}", active.body);
    let disabled = rig.ask(on(Operation::DisableVersion, "1")).await;
    assert_eq!(disabled.body["result"]["state"], "disabled");
    for query in ["dry_run=true", ""] {
        let refused = rig.ask(on(Operation::DestroyVersion, "1").query(query)).await;
        assert_eq!((refused.status.as_u16(), refused.code()), (409, "guarded"));
        assert!(refused.body["detail"].as_str().unwrap().ends_with("no census"), "{}", refused.body);
    }
    let explained = rig.ask(on(Operation::ExplainVersion, "1")).await;
    assert_eq!(explained.body["destroyable"], false);
    assert_eq!(explained.body["guards"][0], json!({"name": "disabled", "ok": true, "why": "it is disabled"}));
    assert_eq!(explained.body["guards"][1], json!({"name": "census", "ok": false, "why": "no census"}));
    assert_eq!(rig.ask(on(Operation::CancelDestroyVersion, "1")).await.code(), "state_conflict");
    assert_eq!(rig.ask(on(Operation::EnableVersion, "1")).await.body["result"]["state"], "decrypt_only");
    for version in ["9", "0"] {
        assert_eq!(rig.ask(on(Operation::EnableVersion, version)).await.code(), "version_not_found");
    }
}

#[tokio::test]
async fn the_period_is_changed_within_its_bounds() {
    let rig = Rig::new().await;
    rig.create_cluster("north").await;
    let set = |period: &str| Ask::new(Operation::SetRotation, &["north"]).json(&json!({"period": period}));
    let changed = rig.ask(set("7d")).await;
    assert_eq!(changed.body["result"]["period"], "7d", "{}", changed.body);
    assert_eq!(changed.body["effects"], json!(["the key is rotated every 7d"]));
    let short = rig.ask(set("59m")).await;
    assert_eq!((short.code(), short.body["field"].as_str()), ("invalid_field", Some("period")));
}

#[tokio::test]
async fn an_admin_of_some_clusters_sees_and_changes_no_other() {
    let rig = Rig::new().await;
    rig.create_cluster("north").await;
    rig.create_cluster("south").await;
    let north = rig.agent.clusters.find("north").unwrap().id;
    let admin = rig.admin("local", &[Role::Operator], &Scope::Clusters(vec![north])).await;
    let list = rig.ask_as(&admin, Ask::new(Operation::ListClusters, &[])).await;
    assert_eq!(list.body["items"].as_array().unwrap().len(), 1);
    assert_eq!(rig.ask_as(&admin, Ask::new(Operation::RotateKey, &["north"])).await.status, 200);
    let other = rig.ask_as(&admin, Ask::new(Operation::RotateKey, &["south"])).await;
    assert_eq!((other.status.as_u16(), other.code()), (403, "denied"));
    let status = rig.ask_as(&admin, Ask::new(Operation::ShowStatus, &[])).await;
    assert_eq!(status.body["clusters"]["total"], 1);
}

#[tokio::test]
async fn bad_requests_are_problems_with_a_code_a_remedy_and_an_id() {
    let rig = Rig::new().await;
    rig.create_cluster("north").await;
    let create = || Ask::new(Operation::CreateCluster, &[]);
    let json = |text: &str| create().header("content-type", "application/json").raw(text);
    let list = || Ask::new(Operation::ListClusters, &[]);
    let long = "a".repeat(64);
    let cases = [
        (create().json(&json!({"name": "north"})), 409, "already_exists"),
        (create().json(&json!({"name": long})), 400, "invalid_field"),
        (create().json(&json!({"name": "0b5e1a52-7c1f-4f0e-9a36-5d0c3a1f2e44"})), 400, "invalid_field"),
        (create().json(&json!({"name": "x", "period": "1m"})), 400, "invalid_field"),
        (create().json(&json!({"name": "x", "owner": "me"})), 400, "invalid_request"),
        (json("{"), 400, "invalid_request"),
        (json(""), 400, "invalid_request"),
        (create().raw("name=x"), 415, "unsupported_media_type"),
        (json(&format!("{{\"name\":\"{}\"}}", "a".repeat(70_000))), 413, "body_too_large"),
        (create().query("dryrun=true").json(&json!({"name": "x"})), 400, "invalid_request"),
        (create().query("reason=a%00b").json(&json!({"name": "x"})), 400, "invalid_field"),
        (create().header("idempotency-key", "a b").json(&json!({"name": "x"})), 400, "invalid_request"),
        (list().query("limit=1001"), 400, "invalid_field"),
        (list().query("limit=0"), 400, "invalid_field"),
        (list().query("limit=many"), 400, "invalid_request"),
        (Ask::new(Operation::ShowCluster, &["nowhere"]), 404, "cluster_not_found"),
        (Ask::target("GET", "/v1/clusters/%FF"), 400, "invalid_request"),
        (Ask::target("GET", "/v1/clusters/north/versions/one/explain"), 400, "invalid_request"),
        (Ask::target("GET", "/v2/clusters"), 404, "no_such_route"),
        (Ask::target("PATCH", "/v1/clusters"), 405, "method_not_allowed"),
        (Ask::new(Operation::CreateToken, &["north"]).json(&json!({"ttl": "1s"})), 400, "invalid_field"),
        (Ask::new(Operation::CreateToken, &["north"]).json(&json!({"cidr": "x"})), 400, "invalid_field"),
    ];
    for (ask, status, code) in cases {
        let answer = rig.ask(ask.header("x-request-id", "trace-7")).await;
        assert_eq!((answer.status.as_u16(), answer.code()), (status, code), "{}", answer.body);
        assert_eq!(answer.headers["content-type"], "application/problem+json");
        assert_eq!(answer.headers["x-request-id"], "trace-7");
        assert_eq!(answer.body["request_id"], "trace-7");
        assert!(!answer.body["remedy"].as_str().unwrap_or_default().is_empty(), "{}", answer.body);
    }
    let clusters = rig.ask(list()).await;
    assert_eq!(clusters.body["items"].as_array().unwrap().len(), 1);
}

#[tokio::test]
async fn the_status_and_the_document_are_served() {
    let rig = Rig::new().await;
    rig.create_cluster("north").await;
    let status = rig.ask(Ask::new(Operation::ShowStatus, &[])).await.body;
    assert_eq!(status["agent"], "agent-1");
    assert_eq!(status["time"], "2027-01-15T08:00:00Z");
    assert_eq!(status["clusters"], json!({"total": 1, "retired": 0, "overdue": 0, "unbacked": 1}));
    assert_eq!(status["next_rotations"][0]["cluster"], "north");
    let codes: Vec<_> =
        status["warnings"].as_array().unwrap().iter().map(|warning| &warning["code"]).collect();
    assert_eq!(codes, ["unbacked", "single_admin"]);
    rig.admin("second", &[Role::Auditor], &Scope::All).await;
    let second = rig.ask(Ask::new(Operation::ShowStatus, &[])).await.body;
    assert_eq!(second["warnings"].as_array().unwrap().len(), 1, "{second}");
    let due: fleet_kms_admin_api::Timestamp =
        serde_json::from_value(status["next_rotations"][0]["due"].clone()).unwrap();
    let ahead = due.as_system_time().duration_since(rig::now()).unwrap();
    assert!(ahead <= Duration::from_secs(30 * 86_400) && ahead > Duration::from_secs(28 * 86_400));

    let document = rig.ask(Ask::new(Operation::ShowOpenapi, &[])).await;
    assert_eq!(document.body["openapi"], "3.1.0");
    let tree: Value = serde_json::from_str(include_str!("../../../../docs/openapi.json")).unwrap();
    assert_eq!(document.body, tree);
}

#[tokio::test]
async fn who_asks_too_much_is_slowed_down_and_nobody_else() {
    let rig = Rig::new().await;
    let greedy = rig.admin("greedy", &[Role::Auditor], &Scope::All).await;
    let mut refused = None;
    for _ in 0..200 {
        let answer = rig.ask_as(&greedy, Ask::new(Operation::ListClusters, &[])).await;
        if answer.status != 200 {
            refused = Some(answer);
            break;
        }
    }
    let refused = refused.expect("200 requests at once are too many");
    assert_eq!((refused.status.as_u16(), refused.code()), (429, "too_many_requests"));
    assert_eq!(refused.headers["retry-after"], "1");
    assert_eq!(rig.ask(Ask::new(Operation::ListClusters, &[])).await.status, 200);
}

#[tokio::test]
async fn what_another_agent_or_a_lost_reply_did_to_the_ca_is_followed() {
    let rig = Rig::new().await;
    let agent = &rig.agent;
    let (before, own) = (agent.ca.live().load_full(), agent.own.live().certificate());
    let permit = internal::authority();
    let open = |row: &_, bytes: &_| agent.keyrings.open_ca_key(&permit, row, bytes);
    let seal = |row: &_, key: &_| agent.keyrings.seal_ca_key(&permit, row, key);
    let step = (Roll::Root, Intent::new("ca_root_renew", "another"));
    ca::roll(&agent.changes, before.trust_domain(), step, open, seal, agent.generator()).await.unwrap();
    assert_eq!(agent.bulletin.roots(), [before.root()], "nobody has told this agent");

    agent.ca.renew().await;
    let after = agent.ca.live().load_full();
    assert_ne!(after.root(), before.root());
    assert_eq!(agent.bulletin.roots(), [after.root(), before.root()]);
    assert_eq!(agent.ca.roots().data.certificates().len(), 2);
    assert_ne!(agent.own.live().certificate().serial(), own.serial());
    agent.ca.renew().await;
    assert_eq!(agent.ca.live().load().root(), after.root(), "once is enough");
}

#[tokio::test]
async fn a_replaced_ca_lists_the_nodes_that_it_lost_and_gives_its_caller_the_next_certificate() {
    let rig = Rig::new().await;
    rig.create_cluster("north").await;
    let token = rig.ask(Ask::new(Operation::CreateToken, &["north"]).json(&json!({"node": "cp-1"}))).await;
    let node = rig.enrol(token.body["result"]["token"].as_str().unwrap()).await;
    let shown = rig.ask(Ask::new(Operation::ShowCa, &[])).await.body;
    assert!(shown.get("nodes_to_enrol").is_none(), "{shown}");

    let admin = rig.first_admin();
    let replaced = rig.ask(Ask::new(Operation::ReplaceCa, &[])).await;
    assert_eq!(replaced.status, 200, "{}", replaced.body);
    let result = &replaced.body["result"];
    assert_eq!(result["ca"]["nodes_to_enrol"], json!([node.id().to_string()]));
    let chain =
        fleet_kms_identity::split_pem_chain(result["certificate"].as_str().unwrap().as_bytes()).unwrap();
    let again = fleet_kms_identity::Certificate::from_der(&chain[0]).unwrap();
    assert_eq!((again.id(), again.spki_sha256()), (admin.id(), admin.spki_sha256()));
    assert_eq!(rig.ask(Ask::new(Operation::ShowCa, &[])).await.code(), "not_authenticated", "superseded");
    let shown = rig.ask_as(&again, Ask::new(Operation::ShowCa, &[])).await.body;
    assert_eq!(shown["nodes_to_enrol"].as_array().unwrap().len(), 1);
    assert_eq!(shown["generations"].as_array().unwrap().len(), 2);
}

#[tokio::test]
async fn a_body_that_does_not_come_gives_its_place_back() {
    let rig = Rig::new().await;
    let slow = rig.admin("slow", &[Role::Operator], &Scope::All).await;
    let create =
        || Ask::new(Operation::CreateCluster, &[]).header("content-type", "application/json").endless();
    let (bare, with_key) = tokio::join!(
        rig.ask_as(&slow, create()),
        rig.ask_as(&slow, create().header("idempotency-key", "k1")),
    );
    assert_eq!(bare.code(), "invalid_request", "{}", bare.body);
    assert_eq!(with_key.code(), "body_too_large", "{}", with_key.body);
}
