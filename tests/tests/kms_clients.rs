//! kube-apiserver's own clients against kms-sidecar, at the versions that send each form of `:authority`.

#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    reason = "a helper of a test fails by panicking, as the test does"
)]

use std::io::Write;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::time::Duration;

use data_encoding::BASE64;
use fleet_kms_tests::child::Child;
use fleet_kms_tests::fleet::{Fleet, Sidecar};
use fleet_kms_tests::kms_client::{Api, Failure, KmsClient, Outcome};
use fleet_kms_tests::peers::ClientVersion;
use fleet_kms_tests::wait;
use serde_json::{Value, json};

/// How long a client that runs beside a test may take to end.
const END_LIMIT: Duration = Duration::from_secs(60);

/// What most tests need: one agent, one cluster, one node.
struct OneNode {
    fleet: Fleet,
    sidecar: Sidecar,
    dir: tempfile::TempDir,
}

impl OneNode {
    fn start() -> Self {
        let fleet = Fleet::start().unwrap();
        let cluster = fleet.cluster("alpha").unwrap();
        let sidecar = fleet.sidecar(&cluster, "node-1").unwrap();
        Self { fleet, sidecar, dir: tempfile::tempdir().unwrap() }
    }

    /// A client of the newest version.
    fn client(&self, api: Api) -> KmsClient {
        KmsClient::new(ClientVersion::V0_37_2, api, &self.sidecar.socket).unwrap()
    }

    fn round_trip_works(&self) {
        self.client(Api::V1).call(&["round-trip"]).unwrap().ok().unwrap();
    }
}

/// Runs `check` with each version of the client and both APIs.
fn with_every_client(socket: &Path, check: impl Fn(&str, &KmsClient)) {
    for version in ClientVersion::ALL {
        for api in Api::ALL {
            check(&format!("{version:?} {api:?}"), &KmsClient::new(version, api, socket).unwrap());
        }
    }
}

#[test]
fn every_client_gets_back_what_it_encrypted() {
    let node = OneNode::start();
    with_every_client(&node.sidecar.socket, |name, client| {
        let results = client.call(&["round-trip", "-sizes", "1,4,32,963"]).unwrap().ok().unwrap();
        for result in &results {
            // v2 allows no more; v1 must not need more than v2, so that a fleet can change over.
            assert!(result["cipher_size"].as_u64().unwrap() <= 1024, "{name}: {result}");
        }
        client.call(&["envelope"]).unwrap().ok().unwrap();
    });
}

#[test]
fn status_names_one_key_id_to_every_v2_client() {
    let node = OneNode::start();
    let ids: Vec<Value> = ClientVersion::ALL
        .into_iter()
        .map(|version| {
            let client = KmsClient::new(version, Api::V2, &node.sidecar.socket).unwrap();
            client.call(&["status"]).unwrap().last().unwrap()["key_id"].clone()
        })
        .collect();
    assert!(ids.windows(2).all(|pair| pair[0] == pair[1]), "{ids:?}");
    let encrypted = node.client(Api::V2).call(&["encrypt"]).unwrap().last().unwrap();
    assert_eq!(encrypted["key_id"], ids[0]);
}

#[test]
fn a_hundred_goroutines_share_one_connection() {
    let node = OneNode::start();
    with_every_client(&node.sidecar.socket, |name, client| {
        let sum = client.call(&["concurrent", "-goroutines", "100", "-calls", "10"]).unwrap();
        assert_eq!(sum.last().unwrap()["calls"], json!(1000), "{name}");
    });
}

#[test]
fn clients_that_were_there_first_are_served_when_the_sidecar_comes() {
    let mut node = OneNode::start();
    node.sidecar.stop().unwrap();
    std::fs::remove_file(&node.sidecar.socket).unwrap();
    let mut early = start_every_client(&node, &["late-start", "-timeout", "30s"], "waiting");
    node.sidecar.start().unwrap();
    for (name, client) in &mut early {
        let status = client.wait_exit(END_LIMIT).unwrap();
        assert!(status.success(), "{name}: {}", client.stdout().unwrap());
    }
}

#[test]
fn a_sidecar_that_is_restarted_during_calls_costs_none_of_them() {
    let mut node = OneNode::start();
    let mut looping = start_every_client(&node, &["loop", "-duration", "6s"], "started");
    node.sidecar.restart().unwrap();
    for (name, client) in &mut looping {
        client.wait_exit(END_LIMIT).unwrap();
        let sum = Outcome::parse(&client.stdout().unwrap()).unwrap().last().unwrap();
        assert_eq!(sum["failed"], json!(0), "{name}: {sum}");
    }
}

/// Starts a command of all clients side by side, and waits for a line of each.
fn start_every_client(node: &OneNode, args: &[&str], line: &str) -> Vec<(String, Child)> {
    let mut started = Vec::new();
    for version in ClientVersion::ALL {
        for api in Api::ALL {
            let name = format!("{version:?}-{api:?}");
            let client = KmsClient::new(version, api, &node.sidecar.socket).unwrap();
            started.push((name.clone(), client.start(args, &node.dir.path().join(name)).unwrap()));
        }
    }
    for (_, client) in &mut started {
        client.wait_for_line(line, wait::START_LIMIT).unwrap();
    }
    started
}

#[test]
fn a_sidecar_that_was_killed_serves_the_same_client_again() {
    let mut node = OneNode::start();
    let mut looping = node.client(Api::V1).start(&["loop", "-duration", "6s"], node.dir.path()).unwrap();
    looping.wait_for_line("started", wait::START_LIMIT).unwrap();
    node.sidecar.kill9().unwrap();
    // The socket file of the killed one is still there, and must not keep the next one from starting.
    assert!(node.sidecar.socket.exists());
    node.sidecar.start().unwrap();
    looping.wait_exit(END_LIMIT).unwrap();

    // Calls in flight are lost with the process, at most one of each of the four callers; all others wait and succeed.
    let outcome = Outcome::parse(&looping.stdout().unwrap()).unwrap();
    let sum = outcome.results().last().unwrap();
    assert!(sum["failed"].as_u64().unwrap() <= 4, "{sum}");
    node.round_trip_works();
}

#[test]
fn a_call_without_an_agent_ends_before_its_deadline_with_a_reason() {
    let mut node = OneNode::start();
    node.fleet.agent.stop().unwrap();
    with_every_client(&node.sidecar.socket, |name, client| {
        let result = client.call(&["timeout", "-timeout", "700ms"]).unwrap().last().unwrap();
        let error = result["error"].as_str().unwrap();
        // The client's own text would mean that the sidecar said nothing in time.
        assert!(error.contains("no kms-agent could be reached in time"), "{name}: {error}");
    });
}

/// The same calls as above against the same handlers: what makes them work is the rewrite, and nothing else.
#[test]
fn without_the_authority_rewrite_only_a_client_that_says_localhost_is_served() {
    let mut node = OneNode::start();
    node.sidecar.stop().unwrap();
    std::fs::remove_file(&node.sidecar.socket).unwrap();
    let program = Path::new(env!("CARGO_BIN_EXE_kms-sidecar-without-rewrite"));
    node.sidecar.respec(|spec| spec.program(program));
    node.sidecar.start().unwrap();
    with_every_client(&node.sidecar.socket, |name, client| {
        let outcome = client.call(&["round-trip"]).unwrap();
        if name == "V0_37_2 V2" {
            outcome.ok().unwrap();
        } else {
            let failure = outcome.refused().unwrap();
            assert!(failure.error.contains("PROTOCOL_ERROR"), "{name}: {failure:?}");
        }
    });
}

/// Says that the client itself keeps its promise, so that a test of the sidecar's deadline means the sidecar.
#[test]
fn a_client_lets_go_of_a_silent_server_at_its_timeout() {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("silent.sock");
    let _silent = UnixListener::bind(&socket).unwrap();
    with_every_client(&socket, |name, client| {
        let result = client.call(&["timeout", "-timeout", "300ms"]).unwrap().last().unwrap();
        assert!(result["elapsed_ms"].as_i64().unwrap() >= 300, "{name}: {result}");
    });
}

#[test]
fn a_plaintext_that_is_empty_or_too_long_is_refused_and_the_sidecar_lives_on() {
    let node = OneNode::start();
    with_every_client(&node.sidecar.socket, |name, client| {
        for size in ["0", "1025"] {
            let failure = client.call(&["encrypt", "-size", size]).unwrap().refused().unwrap();
            assert_eq!(failure.code, "InvalidArgument", "{name}, {size} bytes: {failure:?}");
        }
        let failure = client.call(&["encrypt", "-size", "10485760"]).unwrap().refused().unwrap();
        // The code of tonic, which refuses a message before any handler sees it.
        assert_eq!(failure.code, "OutOfRange", "{name}: {failure:?}");
    });
    node.round_trip_works();
}

#[test]
fn a_cipher_that_is_malformed_unknown_altered_or_foreign_is_refused_with_one_text() {
    let node = OneNode::start();
    let other = node.fleet.cluster("beta").unwrap();
    let other_sidecar = node.fleet.sidecar(&other, "node-2").unwrap();
    let foreign = KmsClient::new(ClientVersion::V0_37_2, Api::V1, &other_sidecar.socket).unwrap();
    let foreign = cipher_of(&foreign);

    let client = node.client(Api::V1);
    let own = cipher_of(&client);
    let mut unknown_format = own.clone();
    unknown_format[0] ^= 0xff;
    let mut unknown_key = own.clone();
    unknown_key[5] ^= 1;
    let mut altered = own.clone();
    *altered.last_mut().unwrap() ^= 1;
    let truncated = own[..own.len() - 1].to_vec();

    let cases = [
        ("unknown format", unknown_format),
        ("unknown key", unknown_key),
        ("altered", altered),
        ("truncated", truncated),
        ("one byte", own[..1].to_vec()),
        ("foreign", foreign),
    ];
    let refusals: Vec<(&str, Failure)> =
        cases.iter().map(|(name, cipher)| (*name, decrypt(&client, cipher).refused().unwrap())).collect();
    assert!(refusals.windows(2).all(|pair| pair[0].1 == pair[1].1), "{refusals:#?}");
    decrypt(&client, &own).ok().unwrap();
}

fn cipher_of(client: &KmsClient) -> Vec<u8> {
    let answer = client.call(&["encrypt"]).unwrap().last().unwrap();
    BASE64.decode(answer["cipher"].as_str().unwrap().as_bytes()).unwrap()
}

fn decrypt(client: &KmsClient, cipher: &[u8]) -> Outcome {
    let answer = json!({ "cipher": BASE64.encode(cipher) }).to_string();
    client.call(&["decrypt", "-answer", &answer]).unwrap()
}

#[test]
fn every_form_of_authority_is_served() {
    let node = OneNode::start();
    let client = node.client(Api::V1);
    for authority in
        ["/run/fleet-kms/kms.sock", "%2Frun%2Ffleet-kms%2Fkms.sock", "@kms.sock", "localhost", ""]
    {
        let answer = client.call(&["raw", "-authority", authority]).unwrap().last().unwrap();
        assert_eq!(answer["grpc_status"], json!("0"), "{authority:?}: {answer}");
    }
}

#[test]
fn a_deadline_that_has_passed_is_answered_and_the_sidecar_lives_on() {
    let node = OneNode::start();
    let encrypt = "/v1beta1.KeyManagementService/Encrypt";
    let client = node.client(Api::V1);
    let call = ["raw", "-method", encrypt, "-grpc-timeout", "1n", "-message", "CgYxYmV0YTESBHBpbmc="];
    let answer = client.call(&call).unwrap().last().unwrap();
    // 4 is DeadlineExceeded.
    assert_eq!(answer["grpc_status"], json!("4"), "{answer}");
    node.round_trip_works();
}

#[test]
fn garbage_on_the_socket_harms_nobody_else() {
    let node = OneNode::start();
    for garbage in [
        &b"GET / HTTP/1.1\r\n\r\n"[..],
        &[0xff; 70_000],
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\xff\xff\xff\xff\xff",
    ] {
        let mut stream = UnixStream::connect(&node.sidecar.socket).unwrap();
        // The sidecar may close before it has read all of it.
        let _ = stream.write_all(garbage);
    }
    node.round_trip_works();
}

#[test]
fn an_api_server_of_a_new_version_reads_what_an_old_one_wrote() {
    let node = OneNode::start();
    let old = KmsClient::new(ClientVersion::V0_28_3, Api::V1, &node.sidecar.socket).unwrap();
    decrypt(&node.client(Api::V1), &cipher_of(&old)).ok().unwrap();
}
