//! `kmsctl`, the real program, against a fake agent behind the real transport.

#![expect(clippy::unwrap_used, reason = "a test of a whole program may stop at any of them")]

mod fake;

use std::fs;
use std::io;
use std::net::TcpListener;
use std::os::unix::fs::PermissionsExt as _;
use std::sync::{Arc, Mutex};
use std::time::{Duration, UNIX_EPOCH};

use axum::http::Method;
use clap::Parser as _;
use serde_json::{Value, json};

use fake::{Fake, run};
use fleet_kms_admin_api::status::{ClusterCounts, NodeCounts, StoreStatus, Warning};
use fleet_kms_admin_api::{
    Change, Cluster, Code, HumanDuration, IssuedToken, Operation, Page, Status, Timestamp, Token, Version,
    VersionState,
};
use fleet_kms_ctl::cli::Cli;
use fleet_kms_ctl::commands;
use fleet_kms_ctl::console::Console;
use fleet_kms_process::{clock, runtime};

fn time() -> Timestamp {
    Timestamp::from(UNIX_EPOCH + Duration::from_secs(1_800_000_000))
}

fn cluster(name: &str) -> Cluster {
    Cluster {
        id: "0b5e1a52-7c1f-4f0e-9a36-5d0c3a1f2e44".into(),
        name: name.into(),
        revision: 12,
        created: time(),
        active_version: 2,
        key_id: "aa5e1a52-7c1f-4f0e-9a36-5d0c3a1f2e44".into(),
        activated: time(),
        age_seconds: 270_000,
        period: HumanDuration::from(Duration::from_secs(30 * 86_400)),
        max_offline: Some(HumanDuration::from(Duration::from_secs(180 * 86_400))),
        next_rotation: Timestamp::from(clock::now() + Duration::from_secs(7_300)),
        overdue: false,
        versions: 3,
        nodes: 4,
        unbacked: vec![3],
    }
}

fn done<T>(result: T) -> Change<T> {
    Change { applied: true, effects: Vec::new(), warnings: Vec::new(), result: Some(result) }
}

fn token() -> IssuedToken {
    let details = Token {
        id: "t1".into(),
        cluster_id: cluster("north").id,
        cluster: "north".into(),
        node: Some("cp-1".into()),
        pattern: None,
        cidr: None,
        uses: 1,
        used: 0,
        created: time(),
        created_by: None,
        expires: time(),
    };
    IssuedToken { token: "fkjt1.c2VjcmV0".into(), details }
}

#[test]
fn a_list_is_shown_whole_although_it_comes_in_pages() {
    let fake = Fake::start();
    let first = Page { items: vec![cluster("a"), cluster("b")], next: Some("b c".into()) };
    let last = Page { items: vec![cluster("z")], next: None };
    let target = |query: &str| format!("/v1/clusters?limit=500{query}");
    let (first, last) = (serde_json::to_string(&first).unwrap(), serde_json::to_string(&last).unwrap());
    fake.answer_target(Method::GET, target(""), 200, first, Duration::ZERO);
    fake.answer_target(Method::GET, target("&after=b%20c"), 200, last, Duration::ZERO);

    let ran = fake.kmsctl(&["cluster", "list"]);
    assert_eq!((ran.code, ran.err.as_str()), (0, ""));
    let lines: Vec<&str> = ran.out.lines().collect();
    assert_eq!(lines[0].split_whitespace().collect::<Vec<_>>()[..3], ["NAME", "NODES", "KEY"]);
    assert_eq!(lines.len(), 4);
    assert!(lines[3].contains("3d3h") && lines[3].contains("in 2h"), "{}", ran.out);

    let json: Value = serde_json::from_str(&fake.kmsctl(&["key", "list", "-o", "json"]).out).unwrap();
    assert_eq!(json.as_array().unwrap().len(), 3);
    let yaml = fake.kmsctl(&["cluster", "list", "-o", "yaml"]).out;
    assert!(yaml.contains("name: a\n") && yaml.contains("overdue: false"), "{yaml}");
}

#[test]
fn a_token_goes_alone_to_standard_output_and_whole_into_json() {
    let fake = Fake::start();
    fake.answer(Operation::CreateToken, &["north"], 201, &done(token()));

    let ran = fake.kmsctl(&["node", "token", "--cluster", "north", "--node", "cp-1", "--ttl", "1h"]);
    assert_eq!((ran.code, ran.out.as_str()), (0, "fkjt1.c2VjcmV0\n"));
    assert!(ran.err.contains("for cp-1 of cluster north") && !ran.err.contains("fkjt1"), "{}", ran.err);
    let asked = fake.asked();
    assert_eq!(asked[0].body, r#"{"node":"cp-1","ttl":"1h"}"#);

    let ran = fake.kmsctl(&["node", "token", "--cluster", "north", "-o", "json"]);
    let json: Value = serde_json::from_str(&ran.out).unwrap();
    assert_eq!(json["result"]["token"], "fkjt1.c2VjcmV0");
    assert_eq!(json["result"]["details"]["node"], "cp-1");
    assert_eq!(ran.err, "");
}

#[test]
fn a_change_carries_its_reason_revision_and_an_idempotency_key() {
    let fake = Fake::start();
    let rotated = Change { effects: vec!["version 3 becomes active".into()], ..done(cluster("north")) };
    fake.answer(Operation::RotateKey, &["north"], 200, &rotated);

    let ran = fake.kmsctl(&["key", "rotate", "north", "--reason", "drill & more", "--if-revision", "12"]);
    assert_eq!((ran.code, ran.out.as_str()), (0, "version 3 becomes active\n"));
    let again = fake.kmsctl(&["key", "rotate", "north"]);
    assert_eq!(again.code, 0);

    let asked = fake.asked();
    assert_eq!(asked[0].uri.to_string(), "https://agent/v1/clusters/north/rotate?reason=drill%20%26%20more");
    assert_eq!(asked[0].header("if-match"), "\"12\"");
    assert_eq!(asked[0].body, r#"{"fresh":false}"#);
    assert_eq!(asked[0].header("idempotency-key").len(), 32);
    assert_ne!(asked[0].header("idempotency-key"), asked[1].header("idempotency-key"));
}

#[test]
fn a_dry_run_says_what_would_happen() {
    let fake = Fake::start();
    let plan: Change<Cluster> = Change {
        applied: false,
        effects: vec!["version 3 becomes active".into()],
        warnings: vec!["version 4 is in no verified backup".into()],
        result: None,
    };
    let target = "/v1/clusters/north/rotate?dry_run=true".to_owned();
    fake.answer_target(Method::POST, target, 200, serde_json::to_string(&plan).unwrap(), Duration::ZERO);

    let ran = fake.kmsctl(&["key", "rotate", "north", "--fresh", "--dry-run"]);
    assert_eq!(ran.code, 0, "a dry run needs no confirmation: {}", ran.err);
    assert_eq!(ran.out, "dry run: nothing was changed\n  - version 3 becomes active\n");
    assert_eq!(ran.err, "warning: version 4 is in no verified backup\n");
}

#[test]
fn dangerous_verbs_refuse_without_a_terminal_before_anything_is_sent() {
    let fake = Fake::start();
    for args in [
        &["key", "rotate", "north", "--fresh"][..],
        &["key", "disable", "north", "1"],
        &["key", "destroy", "north", "1"],
        &["node", "ban", "--cluster", "north", "cp-1"],
        &["node", "remove", "--cluster", "north", "cp-1"],
    ] {
        let ran = fake.kmsctl(args);
        assert_eq!(ran.code, 2, "{args:?}");
        assert!(ran.err.contains("remedy: look at --dry-run, then give --yes"), "{}", ran.err);
    }
    assert!(fake.asked().is_empty());
}

#[test]
fn yes_makes_a_dangerous_change_without_asking() {
    let fake = Fake::start();
    let version = Version {
        version: 1,
        key_id: "k".into(),
        state: VersionState::Disabled,
        created: time(),
        activated: None,
        deactivated: None,
        disabled: Some(time()),
        destroy_not_before: None,
        wraps: 7,
        unbacked: false,
    };
    fake.answer(Operation::DisableVersion, &["north", "1"], 200, &done(version));
    let ran = fake.kmsctl(&["key", "disable", "north", "1", "--yes"]);
    assert_eq!(ran.code, 0, "{}", ran.err);
    assert!(ran.out.contains("disabled"), "{}", ran.out);
    assert_eq!(fake.asked().len(), 1);
}

/// Runs in this process with a person who answers `answer`.
fn with_a_person(fake: &Fake, args: &[&str], answer: &'static str) -> (u8, String) {
    #[derive(Clone, Default)]
    struct Shared(Arc<Mutex<Vec<u8>>>);
    impl io::Write for Shared {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().extend_from_slice(bytes);
            Ok(bytes.len())
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }
    let config = fake.config();
    let mut all = vec!["kmsctl", "--config", config.to_str().unwrap()];
    all.extend(args);
    let seen = Shared::default();
    let ask = Box::new(move || Ok(format!("{answer}\n")));
    let mut console = Console::new(Box::new(seen.clone()), Box::new(seen.clone()), Some(ask));
    let cli = Cli::parse_from(all);
    let code = runtime::current_thread(1).unwrap().block_on(commands::run(cli, &mut console));
    let text = String::from_utf8(seen.0.lock().unwrap().clone()).unwrap();
    (code, text)
}

#[test]
fn a_person_sees_what_will_happen_and_must_type_the_name() {
    let fake = Fake::start();
    let node = json!({"id": "spiffe://f/cluster/c/node/cp-1", "name": "cp-1", "cluster_id": "c",
        "cluster": "north", "state": "banned"});
    let plan = json!({"applied": false, "effects": ["cp-1 can no longer unwrap"]});
    let target = "/v1/clusters/north/nodes/cp-1/ban";
    fake.answer(Operation::BanNode, &["north", "cp-1"], 200, &json!({"applied": true, "result": node}));
    fake.answer_target(Method::POST, format!("{target}?dry_run=true"), 200, plan.to_string(), Duration::ZERO);
    let args = ["node", "ban", "--cluster", "north", "cp-1"];

    let (code, text) = with_a_person(&fake, &args, "cp-2");
    assert_eq!(code, 2);
    assert!(
        text.contains("banning node cp-1 of north") && text.contains("cp-1 can no longer unwrap"),
        "{text}"
    );
    assert!(text.contains("nothing was changed"), "{text}");
    assert_eq!(fake.asked().len(), 1, "only the dry run was sent");

    let (code, text) = with_a_person(&fake, &args, "cp-1");
    assert_eq!(code, 0, "{text}");
    assert_eq!(fake.asked().len(), 3);
    assert_eq!(fake.asked()[2].uri.path_and_query().unwrap().as_str(), target);
}

#[test]
fn each_kind_of_problem_has_its_exit_code_and_says_what_to_do() {
    let fake = Fake::start();
    let cases = [
        (Code::InvalidField, 2),
        (Code::Denied, 3),
        (Code::StateConflict, 4),
        (Code::TooManyRequests, 5),
        (Code::ClusterNotFound, 6),
        (Code::Internal, 1),
    ];
    for (code, exit) in cases {
        fake.refuse(Operation::ShowCluster, &["x"], code.clone());
        let ran = fake.kmsctl(&["cluster", "show", "x"]);
        assert_eq!((ran.code, ran.out.as_str()), (exit, ""), "{code}");
        let expected =
            format!("kmsctl: it went wrong ({code})\n  remedy: do something else\n  request: r-17\n");
        assert_eq!(ran.err, expected);
    }
}

#[test]
fn an_answer_of_a_newer_agent_is_still_read() {
    let fake = Fake::start();
    let page = json!({"items": [{"version": 1, "key_id": "k", "state": "archived", "created": "2027-01-15T08:00:00Z",
        "wraps": 0, "unbacked": false, "origin": "imported"}], "total": 1});
    fake.answer(Operation::ListVersions, &["north"], 200, &page);
    let ran = fake.kmsctl(&["key", "versions", "north"]);
    assert_eq!(ran.code, 0, "{}", ran.err);
    assert!(ran.out.contains("archived"), "{}", ran.out);
}

#[test]
fn the_status_is_shown_with_its_warnings() {
    let fake = Fake::start();
    let status = Status {
        agent: "one".into(),
        version: "0.1.0".into(),
        time: time(),
        store: StoreStatus { ok: true, detail: None },
        clusters: ClusterCounts { total: 2, overdue: 1, unbacked: 0 },
        nodes: NodeCounts { total: 3, banned: 0 },
        next_rotations: Vec::new(),
        expiring_certificates: Vec::new(),
        last_verified_backup: None,
        warnings: vec![Warning {
            code: "no_backup".into(),
            text: "no backup".into(),
            remedy: "make one".into(),
        }],
    };
    fake.answer(Operation::ShowStatus, &[], 200, &status);
    let ran = fake.kmsctl(&["status"]);
    assert_eq!(ran.code, 0, "{}", ran.err);
    for piece in ["agent one", "store: ok", "2 (1 overdue)", "! no backup (no_backup)\n  remedy: make one"] {
        assert!(ran.out.contains(piece), "{}", ran.out);
    }
}

#[test]
fn an_agent_that_is_away_slow_or_no_agent_is_unavailable() {
    let fake = Fake::start();
    fake.answer_late(Operation::ShowStatus, &[], 200, &json!({}), Duration::from_secs(30));
    let slow = fake.kmsctl(&["status", "--timeout", "1s"]);
    assert_eq!(slow.code, 5);
    assert!(slow.err.contains("did not answer within 1 s"), "{}", slow.err);

    fake.answer_target(
        Method::GET,
        "/v1/status".into(),
        502,
        "<html>bad gateway</html>".into(),
        Duration::ZERO,
    );
    let proxy = fake.kmsctl(&["status"]);
    assert_eq!(proxy.code, 5);
    assert!(proxy.err.contains("not as the admin API does"), "{}", proxy.err);

    let closed = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let text = fs::read_to_string(fake.config()).unwrap();
    fs::write(fake.config(), text.replace(&fake.address.to_string(), &closed.to_string())).unwrap();
    let away = fake.kmsctl(&["status"]);
    assert_eq!(away.code, 5);
    assert!(away.err.contains("remedy: check that the agent runs"), "{}", away.err);
}

#[test]
fn a_certificate_that_may_not_be_used_now_is_denied_with_the_cure() {
    let fake = Fake::start_with(clock::now() - Duration::from_secs(3 * 86_400));
    let ran = fake.kmsctl(&["status"]);
    assert_eq!(ran.code, 3);
    assert!(ran.err.contains("spiffe://fleet.example/admin/first expired 3d"), "{}", ran.err);
    assert!(ran.err.contains("kms-agent admin issue"), "{}", ran.err);
}

#[test]
fn an_agent_of_another_fleet_is_refused() {
    let fake = Fake::start();
    fs::write(fake.file("roots.crt"), fake::authority().pem()).unwrap();
    let ran = fake.kmsctl(&["status"]);
    assert_eq!(ran.code, 5);
    assert!(ran.err.contains("the agent's certificate is refused"), "{}", ran.err);
    assert!(fake.asked().is_empty());
}

#[test]
fn bad_files_are_named_with_the_cure() {
    let fake = Fake::start();
    let missing = run(&fake.file("none.toml"), &["status"]);
    assert_eq!(missing.code, 2);
    assert!(missing.err.contains("none.toml") && missing.err.contains("kms-agent init"), "{}", missing.err);

    fs::set_permissions(fake.file("first.key"), fs::Permissions::from_mode(0o644)).unwrap();
    let open = fake.kmsctl(&["status"]);
    assert_eq!(open.code, 2);
    assert!(open.err.contains("mode 0644") && open.err.contains("chmod 0600"), "{}", open.err);

    fs::remove_file(fake.file("first.key")).unwrap();
    let gone = fake.kmsctl(&["status"]);
    assert_eq!(gone.code, 2);
    assert!(gone.err.contains("first.key: No such file"), "{}", gone.err);
}

#[test]
fn wrong_usage_ends_with_2() {
    let fake = Fake::start();
    for args in [
        &["cluster", "create"][..],
        &["cluster", "create", "a", "--period", "soon"],
        &["key", "disable", "a", "first"],
        &["node", "token", "--cluster", "a", "--uses", "0"],
        &["cluster", "show", "a", "-o", "xml"],
        &["unknown"],
    ] {
        assert_eq!(fake.kmsctl(args).code, 2, "{args:?}");
    }
    assert!(fake.asked().is_empty());
}

#[test]
fn contexts_are_listed_shown_and_chosen_without_an_agent() {
    let fake = Fake::start();
    let list = fake.kmsctl(&["context", "list", "-o", "json"]);
    let json: Value = serde_json::from_str(&list.out).unwrap();
    assert_eq!(json[0]["name"], "first");
    assert_eq!(json[0]["current"], true);
    assert_eq!(json[0]["identity"]["id"], "spiffe://fleet.example/admin/first");
    assert_eq!(fake.kmsctl(&["context", "use", "first"]).code, 0);
    assert!(fs::read_to_string(fake.config()).unwrap().starts_with("current = \"first\""));
    assert_eq!(fake.kmsctl(&["context", "use", "second"]).code, 6);
    assert!(fake.kmsctl(&["context", "show"]).out.contains("certificate ends"));
    assert!(fake.asked().is_empty());
}

#[test]
fn completions_and_manual_pages_are_made_for_every_verb() {
    let fake = Fake::start();
    for shell in ["bash", "zsh", "fish", "powershell"] {
        let ran = fake.kmsctl(&["completions", shell]);
        assert!(ran.code == 0 && ran.out.contains("cancel-destroy"), "{shell}");
    }
    let folder = fake.file("man");
    fs::create_dir(&folder).unwrap();
    assert_eq!(fake.kmsctl(&["man", folder.to_str().unwrap()]).code, 0);
    assert!(folder.join("kmsctl-key-rotate.1").exists());
}
