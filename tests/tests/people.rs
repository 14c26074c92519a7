//! Who may administer and who may work on a cluster: changes hold at once, on connections that are open.
#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "tests: what is not there fails them")]

use std::process::{Command, Output};

use fleet_kms_proto::agent::Refusal;
use fleet_kms_proto::agent::rewrap_item::Outcome;
use fleet_kms_tests::child::Spec;
use fleet_kms_tests::faketime::FakeClock;
use fleet_kms_tests::fleet::{Fleet, until_true};
use fleet_kms_tests::peer::Identity;
use fleet_kms_tests::programs::Program;
use fleet_kms_tests::wait::START_LIMIT;
use serde_json::Value;

/// Makes an admin on the agent's host; returns its directory.
fn issue(fleet: &Fleet, name: &str, args: &[&str]) -> std::path::PathBuf {
    let directory = fleet.path().join(format!("admin-{name}"));
    let mut all = vec!["admin", "issue", name, "--directory", directory.to_str().unwrap()];
    all.extend(args);
    fleet.host(&all).unwrap();
    directory
}

fn kmsctl_as(directory: &std::path::Path, args: &[&str]) -> Output {
    let mut command = Command::new(Program::Ctl.path().unwrap());
    command.args(args).env("KMSCTL_CONFIG", directory.join("kmsctl.toml")).output().unwrap()
}

fn warnings(fleet: &Fleet) -> Vec<String> {
    let status = fleet.kmsctl_json(&["status"]).unwrap();
    let codes =
        status["warnings"].as_array().unwrap().iter().map(|warning| warning["code"].as_str().unwrap());
    codes.map(str::to_owned).collect()
}

#[test]
fn a_demotion_and_a_removal_reach_an_admin_in_the_middle_of_its_work() {
    let fleet = Fleet::start().unwrap();
    fleet.cluster("north").unwrap();
    fleet.cluster("south").unwrap();
    assert!(warnings(&fleet).contains(&"single_admin".to_owned()));
    let refused = fleet.kmsctl_output(&["admin", "set-role", "first", "--role", "auditor"]).unwrap();
    assert_eq!(refused.status.code(), Some(4), "{}", String::from_utf8_lossy(&refused.stderr));
    let directory = issue(&fleet, "eve", &["--role", "operator"]);
    assert!(!warnings(&fleet).contains(&"single_admin".to_owned()));

    let mut eve = Identity::admin(&directory, "eve").unwrap().connect(fleet.agent.ports.admin).unwrap();
    assert_eq!(eve.get("/v1/admins").unwrap(), 200);
    fleet.kmsctl(&["admin", "set-scope", "eve", "--cluster", "north"]).unwrap();
    assert_eq!(eve.get("/v1/admins").unwrap(), 403, "not for all clusters any more");
    assert_eq!((eve.get("/v1/clusters/north").unwrap(), eve.get("/v1/clusters/south").unwrap()), (200, 403));
    fleet.kmsctl(&["admin", "set-role", "eve", "--role", "enroller"]).unwrap();
    assert_eq!(
        (eve.get("/v1/clusters/north").unwrap(), eve.get("/v1/clusters/north/versions").unwrap()),
        (200, 403)
    );
    let rotate = kmsctl_as(&directory, &["key", "rotate", "north"]);
    assert_eq!(rotate.status.code(), Some(3), "{}", String::from_utf8_lossy(&rotate.stderr));

    let shown = fleet.kmsctl(&["admin", "show", "eve"]).unwrap();
    assert!(shown.contains("enroller") && shown.contains("north"), "{shown}");
    let removed = fleet.kmsctl_command(&["admin", "remove", "eve", "--yes"]).unwrap().output().unwrap();
    assert!(removed.status.success());
    let told = String::from_utf8_lossy(&removed.stderr).into_owned();
    assert!(told.contains("in effect on every live agent: agent-1"), "{told}");
    until_true("the end of the connection", START_LIMIT, || Ok(eve.is_closed())).unwrap();
    assert_eq!(kmsctl_as(&directory, &["status"]).status.code(), Some(3));
    assert!(warnings(&fleet).contains(&"single_admin".to_owned()));
}

#[test]
fn a_worker_rewraps_for_its_cluster_renews_and_is_cut_off_by_its_ban() {
    let mut fleet = Fleet::start().unwrap();
    for name in ["north", "south"] {
        fleet.cluster(name).unwrap();
    }
    let (enrolment, data) = (fleet.agent.ports.enrolment, fleet.agent.ports.data);
    let node = Identity::enrol(enrolment, &fleet.token_for("north", "cp-1").unwrap())
        .unwrap()
        .connect(data)
        .unwrap();
    let other = Identity::enrol(enrolment, &fleet.token_for("south", "cp-1").unwrap())
        .unwrap()
        .connect(data)
        .unwrap();
    let (old, foreign) = (node.wrap(&[7; 32]).unwrap(), other.wrap(&[7; 32]).unwrap());
    fleet.kmsctl(&["key", "rotate", "north"]).unwrap();

    let token = fleet.kmsctl(&["worker", "token", "--cluster", "north", "--name", "census"]).unwrap();
    assert!(fleet.kmsctl(&["node", "tokens", "--cluster", "north"]).unwrap().contains("worker census"));
    let (directory, port) = (fleet.path().join("census"), format!("127.0.0.1:{enrolment}"));
    let on_host = |args: &[&str], ahead: i64, input: &str| {
        let clock = FakeClock::new(fleet.path()).unwrap();
        clock.set(ahead).unwrap();
        let file = fleet.path().join("input");
        std::fs::write(&file, input).unwrap();
        let mut all = vec!["worker"];
        all.extend(args);
        all.extend(["--directory", directory.to_str().unwrap()]);
        if args[0] == "enrol" {
            all.extend(["--token-file", file.to_str().unwrap()]);
        }
        let spec = Spec::new("kmsctl", &Program::Ctl.path().unwrap(), fleet.path()).args(all);
        let mut child = clock.apply(spec).unwrap().start().unwrap();
        let status = child.wait_exit(START_LIMIT).unwrap();
        (status.code(), child.stdout().unwrap() + &child.stderr().unwrap())
    };
    let (code, said) = on_host(&["enrol", "--agent", &port], 0, &token);
    assert!(code == Some(0) && said.contains("/worker/census, until "), "{code:?} {said}");
    assert_eq!(on_host(&["enrol", "--agent", &port], 0, "fkjt1.nonsense").0, Some(2));
    let (code, said) = on_host(&["enrol", "--agent", &port], 0, &token);
    assert!(code == Some(3) && said.contains("used up"), "another key now: {code:?} {said}");
    let worker = Identity::directory(&directory).unwrap();
    assert!(worker.certificate.id().to_string().ends_with("/worker/census"));
    let at_work = worker.connect(data).unwrap();
    let answer = at_work.rewrap(vec![old.clone(), foreign.clone()]).unwrap();
    assert_eq!(answer.version, 2);
    let outcomes: Vec<_> = answer.items.into_iter().map(|item| item.outcome.unwrap()).collect();
    assert!(matches!(&outcomes[0], Outcome::Wrapped(new) if *new != old), "{outcomes:?}");
    assert_eq!(outcomes[1], Outcome::Refused(Refusal::NotOurs.into()));
    assert_eq!(at_work.wrap(&[7; 32]).unwrap_err().code(), tonic::Code::PermissionDenied);
    assert_eq!(node.rewrap(vec![old.clone()]).unwrap_err().code(), tonic::Code::PermissionDenied);

    // The next certificate works, and the one before it until then.
    let (code, said) = on_host(&["renew"], 0, "");
    assert!(code == Some(0) && said.contains("not due: "), "{code:?} {said}");
    let (code, said) = on_host(&["renew"], 3 * 86_400, "");
    assert!(code == Some(0) && said.contains("/worker/census, until "), "{code:?} {said}");
    let renewed = Identity::directory(&directory).unwrap();
    assert_ne!(renewed.certificate.serial(), worker.certificate.serial());
    assert_eq!(renewed.certificate.id(), worker.certificate.id());
    let next = renewed.connect(data).unwrap();
    next.rewrap(vec![old.clone()]).unwrap();
    until_true("the promotion of the next certificate", START_LIMIT, || {
        Ok(at_work.rewrap(vec![old.clone()]).is_err())
    })
    .unwrap();

    let listed = fleet.kmsctl_json(&["worker", "list", "--cluster", "north"]).unwrap();
    let revision = listed[0]["revision"].to_string();
    let ban = |at: &str| {
        let ban = ["worker", "ban", "--cluster", "north", "census", "--yes", "--if-revision", at];
        fleet.kmsctl_output(&ban).unwrap().status.code()
    };
    assert_eq!((ban("1"), ban(&revision)), (Some(4), Some(0)));
    until_true("the end of the connection", START_LIMIT, || Ok(next.is_closed())).unwrap();
    let refused = renewed.connect(data).unwrap().rewrap(vec![old]).unwrap_err();
    assert_eq!(refused.metadata().get("fleet-kms-reason").unwrap(), "banned", "{refused}");
    fleet.kmsctl(&["worker", "remove", "--cluster", "north", "census", "--yes"]).unwrap();
    assert!(fleet.kmsctl(&["worker", "list", "--cluster", "north"]).unwrap().starts_with("no workers"));

    fleet.agent.stop().unwrap();
    let lines = fleet.agent.audit("data").unwrap();
    let rewraps = |outcome: &str| {
        let of = lines.iter().filter(|line| line["operation"] == "rewrap" && line["outcome"] == outcome);
        of.map(|line| line["items"].as_u64().unwrap()).sum::<u64>()
    };
    assert!(rewraps("ok") >= 2 && rewraps("foreign_cluster") == 1 && rewraps("banned") == 1, "{lines:?}");
}

#[test]
fn nodes_are_listed_by_how_long_nobody_heard_of_them_and_a_ban_says_who_has_it() {
    let mut fleet = Fleet::start().unwrap();
    let cluster = fleet.cluster("north").unwrap();
    let sidecar = fleet.sidecar(&cluster, "cp-1").unwrap();
    let seen = || -> Vec<Value> {
        fleet.kmsctl_json(&["node", "list", "--unseen", "0s"]).unwrap().as_array().unwrap().clone()
    };
    until_true("a word of the node", START_LIMIT, || Ok(!seen()[0]["build"].is_null())).unwrap();
    assert_eq!(fleet.kmsctl_json(&["node", "list", "--unseen", "30d"]).unwrap(), Value::Array(Vec::new()));
    let table = fleet.kmsctl(&["node", "list", "--cluster", "north"]).unwrap();
    for column in ["LAST SEEN", "CERTIFICATE ENDS", "HIGHEST VERSION", "BUILD"] {
        assert!(table.contains(column), "{table}");
    }
    drop(sidecar);
    // A new process has heard of nobody; the certificate still says when the node was last there.
    fleet.agent.restart_after(std::time::Duration::ZERO).unwrap();
    let node = fleet.kmsctl_json(&["node", "list", "--cluster", "north"]).unwrap()[0].clone();
    assert!(node["last_seen"].is_string() && node["build"].is_null(), "{node}");

    let stale =
        fleet.kmsctl_output(&["node", "ban", "--cluster", "north", "cp-1", "--yes", "--if-revision", "1"]);
    assert_eq!(stale.unwrap().status.code(), Some(4));
    let ban = ["node", "ban", "--cluster", "north", "cp-1", "--yes", "-o", "json"];
    let banned: Value = serde_json::from_str(&fleet.kmsctl(&ban).unwrap()).unwrap();
    assert_eq!(banned["agents"], serde_json::json!([{"agent": "agent-1", "has_it": true}]));

    let slots = fleet.kmsctl_json(&["slot", "list"]).unwrap();
    assert_eq!((&slots[0]["kind"], &slots[0]["in_use"]), (&"file".into(), &true.into()), "{slots}");
    let local = issue(&fleet, "local", &["--role", "operator", "--cluster", "north"]);
    for args in
        [&["slot", "list"][..], &["admin", "list"], &["cluster", "create", "x"], &["cluster", "show", "x"]]
    {
        assert_eq!(kmsctl_as(&local, args).status.code(), Some(3), "{args:?}");
    }
    assert!(kmsctl_as(&local, &["cluster", "list"]).status.success());
}
