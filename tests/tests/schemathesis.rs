//! The admin API of a running agent, tried by schemathesis from the agent's own document: every operation, no server
//! error, no answer that the document does not describe.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "tests: what is not there fails them"
)]

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::process::{Command, Output};

use fleet_kms_admin_api::Operation;
use fleet_kms_tests::fleet::Fleet;
use fleet_kms_tests::tools::{said, schemathesis};
use serde_json::Value;

/// Test cases of an operation in each of the two runs; more by FLEET_KMS_SCHEMATHESIS_EXAMPLES.
const EXAMPLES: &str = "8";
/// Not checked: that a request which the document allows is never refused. What is compared with the state (a revision,
/// a name that is taken) or with another field (a node or a pattern) no schema can say.
const EXCLUDED: &str = "positive_data_acceptance";
/// Below the 50 requests a second that one caller may make: an answer of the gate tries nothing behind it.
const RATE: &str = "45/s";

#[test]
fn every_operation_answers_as_the_document_says() {
    let fleet = Fleet::start().unwrap();
    let cluster = fleet.cluster("tried").unwrap();
    fleet.sidecar(&cluster, "node-1").unwrap();
    let admin = fleet.agent.directory.join("admin");
    let directory = tempfile::tempdir().unwrap();
    // Anything at all, then what reaches behind the names: this cluster and its node.
    let known = "[parameters]\n\"path.cluster\" = \"tried\"\n\"path.node\" = \"node-1\"\n";
    for (run, phases, config) in [("anything", "examples,coverage", ""), ("known", "fuzzing,stateful", known)]
    {
        let config_file = directory.path().join(format!("{run}.toml"));
        fs::write(&config_file, config).unwrap();
        let report = directory.path().join(format!("{run}.ndjson"));
        let output = tried(&fleet, &admin, (&config_file, phases), &report);
        println!("{}", said(&output));
        assert!(output.status.success(), "schemathesis found something in the run `{run}`");
        let tried = operations(&report);
        // It fetched the document itself, and leaves that address alone.
        let all = Operation::ALL.iter().filter(|operation| **operation != Operation::ShowOpenapi);
        let all: BTreeSet<String> = all.map(|operation| label(*operation)).collect();
        let left_out: Vec<_> = all.difference(&tried).collect();
        assert!(left_out.is_empty(), "{run} tried nothing of {left_out:?}");
    }
    assert_eq!(fleet.agent.ops("/readyz").unwrap().status, 200);
    let log = fleet.agent.log().unwrap();
    assert!(!log.contains("ERROR") && !log.contains("panicked"), "{log}");
}

fn tried(fleet: &Fleet, admin: &Path, (config, phases): (&Path, &str), report: &Path) -> Output {
    let examples = std::env::var("FLEET_KMS_SCHEMATHESIS_EXAMPLES").unwrap_or_else(|_| EXAMPLES.to_owned());
    let mut command = Command::new(schemathesis().unwrap());
    command
        .arg("--config-file")
        .arg(config)
        .arg("run")
        .arg(format!("https://127.0.0.1:{}/openapi.json", fleet.agent.ports.admin))
        // An agent is known by its SPIFFE ID, which no HTTP library looks at; who is tried here is the server.
        .args(["--tls-verify", "false", "--no-color", "--generation-database", "none"])
        .args(["--rate-limit", RATE, "--max-examples", &examples, "--seed", "1", "--continue-on-failure"])
        .args(["--phases", phases, "--exclude-checks", EXCLUDED])
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

/// The operations that a run sent requests for.
fn operations(report: &Path) -> BTreeSet<String> {
    let text = fs::read_to_string(report).unwrap();
    let events = text.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
    let finished = events.filter_map(|event| event.get("ScenarioFinished").cloned());
    finished.filter_map(|event| Some(event.pointer("/recorder/label")?.as_str()?.to_owned())).collect()
}
