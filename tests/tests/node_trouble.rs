//! Trouble on the node: a socket that is served already, an identity that is damaged, an agent that is not there.
#![allow(clippy::unwrap_used, reason = "tests: what is not there fails them")]

use std::fs::{self, OpenOptions};
use std::time::Duration;

use fleet_kms_tests::child::Spec;
use fleet_kms_tests::fleet::{Fleet, Sidecar};
use fleet_kms_tests::kms_client::{Api, KmsClient};
use fleet_kms_tests::peers::ClientVersion;
use fleet_kms_tests::programs::Program;
use fleet_kms_tests::refusal::refusal;
use fleet_kms_tests::wait::{self, START_LIMIT};

const FAILURE: i32 = 1;
const BUSY: i32 = 69;

fn client(sidecar: &Sidecar, api: Api) -> KmsClient {
    KmsClient::new(ClientVersion::V0_37_2, api, &sidecar.socket).unwrap()
}

#[test]
fn a_second_sidecar_is_refused_and_names_the_first_and_replace_takes_over_without_an_error() {
    let fleet = Fleet::start().unwrap();
    let mut first = fleet.sidecar(&fleet.cluster("handover").unwrap(), "node-1").unwrap();
    let holder = first.running().unwrap().pid();
    let config = first.config.to_str().unwrap().to_owned();
    let held = format!(
        "{} is served by process {holder}; stop that one, or start with --replace",
        first.socket.display()
    );
    refusal(Program::Sidecar, ["run", "--config", &config], &[]).unwrap().must_be(BUSY, &[&held]);

    let logs = tempfile::tempdir().unwrap();
    let mut callers = Vec::new();
    for api in Api::ALL {
        let directory = logs.path().join(format!("{api:?}"));
        let mut caller = client(&first, api).start(&["loop", "-duration", "6s"], &directory).unwrap();
        caller.wait_for_line("started", START_LIMIT).unwrap();
        callers.push(caller);
    }
    let program = Program::Sidecar.path().unwrap();
    let successor =
        Spec::new("successor", &program, logs.path()).args(["run", "--config", &config, "--replace"]);
    let mut second = successor.start().unwrap();
    second.wait_for_line("the process before this one drains", START_LIMIT).unwrap();
    assert!(first.running().unwrap().wait_exit(START_LIMIT).unwrap().success());
    for mut caller in callers {
        let ended = caller.wait_exit(START_LIMIT).unwrap();
        assert!(ended.success(), "{}", caller.stdout().unwrap());
    }
    let held = format!("is served by process {}; stop that one", second.pid());
    refusal(Program::Sidecar, ["run", "--config", &config], &[]).unwrap().must_be(BUSY, &[&held]);
    assert!(second.stop().unwrap().success());
}

#[test]
fn a_damaged_identity_is_named_while_the_socket_is_served_and_a_token_repairs_it() {
    let fleet = Fleet::start().unwrap();
    let cluster = fleet.cluster("damaged").unwrap();
    let mut sidecar = fleet.sidecar(&cluster, "node-1").unwrap();
    sidecar.stop().unwrap();
    let cut = |name: &str, length| {
        let file = OpenOptions::new().write(true).open(sidecar.identity.join(name)).unwrap();
        file.set_len(length).unwrap();
    };
    cut("key.pem", 100);
    cut("chain.pem", 0);
    cut("roots.pem", 50);
    cut("state.json", 20);
    sidecar.start().unwrap();
    let named = format!(
        "{} holds no certificate together with its key: enrol this node again",
        sidecar.identity.display()
    );
    sidecar.running().unwrap().wait_for_line(&named, START_LIMIT).unwrap();
    let refused = client(&sidecar, Api::V1).call(&["encrypt"]).unwrap().refused().unwrap();
    assert_eq!(refused.code, "Unavailable");
    assert!(refused.error.contains("this node is not enrolled with a kms-agent"), "{}", refused.error);
    let readiness = sidecar.ops("/readyz").unwrap();
    assert_eq!(readiness.status, 503, "{}", readiness.body);
    assert!(readiness.body.contains("not enrolled"), "{}", readiness.body);

    let token = fleet.token(&cluster, "node-1").unwrap();
    fs::write(sidecar.identity.join("token"), token).unwrap();
    sidecar.wait_ready().unwrap();
    client(&sidecar, Api::V2).call(&["round-trip", "-sizes", "32"]).unwrap().ok().unwrap();
    assert!(!sidecar.identity.join("token").exists());
}

#[test]
fn roots_that_are_lost_are_named_and_lost_state_is_learnt_again() {
    let fleet = Fleet::start().unwrap();
    let mut sidecar = fleet.sidecar(&fleet.cluster("roots").unwrap(), "node-1").unwrap();
    sidecar.stop().unwrap();
    let state = sidecar.identity.join("state.json");
    fs::write(&state, "{\"agents\": [").unwrap();
    sidecar.start().unwrap();
    sidecar.wait_ready().unwrap();
    assert!(sidecar.log().unwrap().contains("the state beside the identity is lost; it is learnt again"));
    wait::until("the state to be written again", START_LIMIT, || {
        Ok(serde_json::from_slice::<serde_json::Value>(&fs::read(&state)?).is_ok().then_some(()))
    })
    .unwrap();

    sidecar.stop().unwrap();
    let roots = sidecar.identity.join("roots.pem");
    fs::write(&roots, "-----BEGIN CERTIFICATE-----\nMIIB").unwrap();
    sidecar.start().unwrap();
    let named = format!("{} cannot be used; enrol this node again", roots.display());
    sidecar.running().unwrap().wait_for_line(&named, START_LIMIT).unwrap();
    assert!(sidecar.running().unwrap().is_running().unwrap());
}

#[test]
fn an_agent_that_cannot_be_reached_is_named_to_the_operator_and_not_to_the_api_server() {
    let mut fleet = Fleet::start().unwrap();
    let cluster = fleet.cluster("alone").unwrap();
    let token = fleet.token(&cluster, "node-2").unwrap();
    let mut sidecar = fleet.sidecar(&cluster, "node-1").unwrap();
    let data = format!("127.0.0.1:{}", fleet.agent.ports.data);
    let enrolment = format!("127.0.0.1:{}", fleet.agent.ports.enrolment);
    fleet.agent.stop().unwrap();

    let other = fleet.unenrolled_sidecar(&cluster, "node-2").unwrap();
    let refused = other.enrol_output(&token).unwrap();
    let text = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert_eq!(refused.status.code(), Some(FAILURE), "{text}");
    let named = format!(
        "cannot connect to the agent at {enrolment}: the agent cannot be reached: Connection refused"
    );
    assert!(text.contains(&named), "{text}");

    let (refused, waited) = wait::timed(|| client(&sidecar, Api::V1).call(&["encrypt", "-timeout", "1s"]));
    let refused = refused.unwrap().refused().unwrap();
    assert!(refused.error.contains("no kms-agent could be reached"), "{}", refused.error);
    assert!(refused.error.contains("see kms-sidecar's log on this node"), "{}", refused.error);
    assert!(!refused.error.contains("127.0.0.1"), "{}", refused.error);
    assert!(waited < Duration::from_secs(10), "{waited:?}");
    let log = sidecar.log().unwrap();
    assert!(log.contains("cannot connect") && log.contains(&data), "{log}");
    assert_eq!(sidecar.ops("/livez").unwrap().status, 200);
    assert_eq!(sidecar.ops("/readyz").unwrap().status, 503);

    let unreachable = fleet.kmsctl_output(&["status"]).unwrap();
    let text = String::from_utf8_lossy(&unreachable.stderr).into_owned();
    assert_eq!(unreachable.status.code(), Some(5), "{text}");
    assert!(text.contains("remedy: "), "{text}");

    // Nobody calls meanwhile: it notices by itself.
    fleet.agent.start().unwrap();
    let (ready, waited) = wait::timed(|| sidecar.wait_ready());
    ready.unwrap();
    assert!(waited < Duration::from_secs(30), "{waited:?}");
    client(&sidecar, Api::V1).call(&["round-trip", "-sizes", "32"]).unwrap().ok().unwrap();
}
