//! The admin API of a running agent, tried by schemathesis from the agent's own document: every operation, no server
//! error, no answer that the document does not describe.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "tests: what is not there fails them"
)]

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;
use std::process::{Command, Output};

use fleet_kms_admin_api::Operation;
use fleet_kms_tests::fleet::Fleet;
use fleet_kms_tests::peer::Identity;
use fleet_kms_tests::tools::{said, schemathesis};
use serde_json::Value;

/// Test cases of an operation in each run; more by FLEET_KMS_SCHEMATHESIS_EXAMPLES.
const EXAMPLES: &str = "8";
/// Not checked: that a request which the document allows is never refused. What is compared with the state (a revision,
/// a name that is taken) or with another field (a node or a pattern) no schema can say.
const EXCLUDED: &str = "positive_data_acceptance";
/// What gives each request an idempotency key of its own.
const HOOKS: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tools/schemathesis_hooks.py");
/// Below the 50 requests a second that one caller may make: an answer of the gate tries nothing behind it.
const RATE: &str = "45/s";

/// Operations, and the statuses they were answered with.
type Answers = BTreeMap<String, BTreeSet<u64>>;

/// One run: what is tried, how, and what stands in its configuration.
struct Run {
    name: &'static str,
    phases: &'static str,
    which: [&'static str; 2],
    config: String,
}

/// It would shut out who tries the rest, so it is tried by itself and as a dry run.
const REPLACE: Operation = Operation::ReplaceCa;

#[test]
fn every_operation_answers_as_the_document_says() {
    let fleet = Fleet::start().unwrap();
    let known = known(&fleet);
    let but_replace = ["--exclude-operation-id", REPLACE.id()];
    let dry = "[parameters]\n\"query.dry_run\" = \"true\"\n".to_owned();
    let ca = || fleet.kmsctl_json(&["ca", "show"]).unwrap()["generations"].clone();
    // It fetched the document itself, and leaves that address alone.
    let all = Operation::ALL.iter().filter(|it| ![Operation::ShowOpenapi, REPLACE].contains(it));
    let all: BTreeSet<String> = all.map(|operation| label(*operation)).collect();
    // Anything at all, then what reaches behind the names.
    let runs = [("anything", "examples,coverage", String::new()), ("known", "fuzzing,stateful", known)];
    for (name, phases, config) in runs {
        let tried = tried(&fleet, &Run { name, phases, which: but_replace, config });
        let left_out: Vec<_> = all.iter().filter(|operation| !tried.contains_key(*operation)).collect();
        assert!(left_out.is_empty(), "{name} tried nothing of {left_out:?}");
    }
    let before = ca();
    let replace = ["--include-operation-id", REPLACE.id()];
    let run = Run { name: "replace", phases: "coverage,fuzzing", which: replace, config: dry };
    let answers = tried(&fleet, &run);
    assert!(answers[&label(REPLACE)].contains(&200), "no dry run was answered: {answers:?}");
    assert_eq!(ca(), before, "the CA was replaced in a dry run");
    assert_eq!(fleet.agent.ops("/readyz").unwrap().status, 200);
    let log = fleet.agent.log().unwrap();
    assert!(!log.contains("ERROR") && !log.contains("panicked"), "{log}");
}

/// Makes what the run `known` is about, and names it: what goes away has others than what is looked at.
fn known(fleet: &Fleet) -> String {
    let cluster = fleet.cluster("tried").unwrap();
    fleet.sidecar(&cluster, "node-1").unwrap();
    let [leaving, renamed, gone] = ["leaving", "renamed", "gone"].map(|name| fleet.cluster(name).unwrap().id);
    fleet.kmsctl(&["cluster", "retire", "gone", "--yes"]).unwrap();
    let enrol = |token: &str| Identity::enrol(fleet.agent.ports.enrolment, token.trim()).map(drop).unwrap();
    enrol(&fleet.token_for("tried", "node-2").unwrap());
    for worker in ["census-1", "census-2"] {
        enrol(&fleet.kmsctl(&["worker", "token", "--cluster", "tried", "--name", worker]).unwrap());
    }
    for admin in ["admin-1", "admin-2"] {
        let directory = fleet.path().join(admin).display().to_string();
        fleet.host(&["admin", "issue", admin, "--role", "auditor", "--directory", &directory]).unwrap();
    }
    let mut config = "[parameters]\n\"path.cluster\" = \"tried\"\n\"path.node\" = \"node-1\"\n\
                      \"path.worker\" = \"census-1\"\n\"path.admin\" = \"admin-1\"\n"
        .to_owned();
    for (operation, parameter, value) in [
        (Operation::RetireCluster, "cluster", leaving.as_str()),
        (Operation::RestoreCluster, "cluster", &gone),
        (Operation::RenameCluster, "cluster", &renamed),
        (Operation::RemoveNode, "node", "node-2"),
        (Operation::RemoveWorker, "worker", "census-2"),
        (Operation::RemoveAdmin, "admin", "admin-2"),
    ] {
        config.push_str(&format!(
            "[[operations]]\ninclude-operation-id = \"{}\"\nparameters = {{ \"path.{parameter}\" = \"{value}\" }}\n",
            operation.id()
        ));
    }
    config
}

/// Tries it, and returns what requests were sent for, each with how it was answered.
fn tried(fleet: &Fleet, run: &Run) -> Answers {
    let directory = tempfile::tempdir().unwrap();
    let config = directory.path().join("schemathesis.toml");
    fs::write(&config, &run.config).unwrap();
    let report = directory.path().join("report.ndjson");
    let output = run_schemathesis(fleet, run, &config, &report);
    println!("{}", said(&output));
    let log = fleet.agent.log().unwrap();
    assert!(output.status.success(), "schemathesis found something in the run `{}`: {log}", run.name);
    operations(&report)
}

fn run_schemathesis(fleet: &Fleet, run: &Run, config: &Path, report: &Path) -> Output {
    let admin = fleet.agent.directory.join("admin");
    let examples = std::env::var("FLEET_KMS_SCHEMATHESIS_EXAMPLES").unwrap_or_else(|_| EXAMPLES.to_owned());
    let mut command = Command::new(schemathesis().unwrap());
    command.env("SCHEMATHESIS_HOOKS", HOOKS);
    command
        .arg("--config-file")
        .arg(config)
        .arg("run")
        .arg(format!("https://127.0.0.1:{}/openapi.json", fleet.agent.ports.admin))
        // An agent is known by its SPIFFE ID, which no HTTP library looks at; who is tried here is the server.
        .args(["--tls-verify", "false", "--no-color", "--generation-database", "none"])
        .args(["--rate-limit", RATE, "--max-examples", &examples, "--seed", "1", "--continue-on-failure"])
        .args(["--phases", run.phases, "--exclude-checks", EXCLUDED])
        .args(run.which)
        .args(["--report", "ndjson", "--report-ndjson-path"])
        .arg(report)
        .arg("--request-cert")
        .arg(admin.join("first.crt"))
        .arg("--request-cert-key")
        .arg(admin.join("first.key"));
    command.current_dir(config.parent().unwrap()).output().unwrap()
}

fn label(operation: Operation) -> String {
    format!("{} {}", operation.method().as_str(), operation.path())
}

/// The operations that a run sent requests for, and the answers.
fn operations(report: &Path) -> Answers {
    let text = fs::read_to_string(report).unwrap();
    let events = text.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
    let mut answers = Answers::new();
    for event in events.filter_map(|mut event| event.get_mut("ScenarioFinished").map(Value::take)) {
        let Some(label) = event.pointer("/recorder/label").and_then(Value::as_str) else { continue };
        let answered = answers.entry(label.to_owned()).or_default();
        let sent = event.pointer("/recorder/interactions").and_then(Value::as_object);
        let statuses =
            sent.into_iter().flatten().filter_map(|(_, it)| it.pointer("/response/status_code")?.as_u64());
        answered.extend(statuses);
    }
    answers
}
