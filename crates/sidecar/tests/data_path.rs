//! kube-apiserver's calls through the real socket, links and mTLS to agents that
//! serve, freeze, refuse, die and come back.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "test code; clippy knows #[test] functions only"
)]

mod support;

use std::sync::atomic::Ordering;
use std::time::Duration;

use fleet_kms_proto::{v1beta1, v2};
use tokio::time::Instant;
use tonic::{Code, Request, Status};

use support::agent::{Agent, Brain, Mood, key_id};
use support::ca::Ca;
use support::node::Node;

const SHORT: Duration = Duration::from_millis(400);
const LONG: Duration = Duration::from_secs(10);

fn encrypt(plain: &[u8]) -> v1beta1::EncryptRequest {
    v1beta1::EncryptRequest { version: "v1beta1".to_owned(), plain: plain.to_vec() }
}

fn decrypt(cipher: Vec<u8>) -> v1beta1::DecryptRequest {
    v1beta1::DecryptRequest { version: "v1beta1".to_owned(), cipher }
}

fn within<T>(message: T, time: Duration) -> Request<T> {
    let mut request = Request::new(message);
    request.set_timeout(time);
    request
}

fn told(status: &Status, code: Code, text: &str) {
    assert_eq!((status.code(), status.message()), (code, text));
}

#[tokio::test]
async fn v1_encrypts_and_decrypts_through_an_agent() {
    let ca = Ca::new();
    let agent = Agent::start(&ca, "one", Brain::at_version(3));
    let node = Node::with_agents(&ca, LONG, &[&agent]).await;
    let mut client = node.v1().await;
    for plain in [&b"ping"[..], &[7; 32], &[7; 1_024]] {
        let cipher = client.encrypt(encrypt(plain)).await.unwrap().into_inner().cipher;
        assert_eq!(cipher.len(), plain.len() + 61);
        assert_eq!(client.decrypt(decrypt(cipher)).await.unwrap().into_inner().plain, plain);
    }
    let metrics = node.scrape();
    assert!(
        metrics.contains(
            "fleet_kms_sidecar_call_duration_seconds_count{operation=\"v1_encrypt\",outcome=\"ok\"} 3"
        ),
        "{metrics}"
    );
    assert_eq!(node.answers.readiness(), Ok(()));
}

#[tokio::test]
async fn v1_version_needs_neither_enrolment_nor_agent() {
    let node = Node::start(LONG);
    let began = Instant::now();
    let request = v1beta1::VersionRequest { version: "v1beta1".to_owned() };
    let answer = node.v1().await.version(request).await.unwrap().into_inner();
    assert_eq!(answer.version, "v1beta1");
    assert!(began.elapsed() < Duration::from_millis(100));
}

#[tokio::test]
async fn an_unenrolled_node_answers_at_once_and_says_so() {
    let node = Node::start(LONG);
    let error = node.v1().await.encrypt(encrypt(b"ping")).await.unwrap_err();
    told(
        &error,
        Code::Unavailable,
        "this node is not enrolled with a kms-agent; see kms-sidecar's log on this node",
    );
    let error = node.v2().await.status(v2::StatusRequest {}).await.unwrap_err();
    assert_eq!(error.code(), Code::Unavailable);
    assert!(node.answers.readiness().unwrap_err().contains("not enrolled"));
}

#[tokio::test]
async fn empty_and_long_plaintexts_are_refused_without_an_agent() {
    let node = Node::start(LONG);
    let (mut v1, mut v2) = (node.v1().await, node.v2().await);
    let empty = v1.encrypt(encrypt(b"")).await.unwrap_err();
    told(&empty, Code::InvalidArgument, "the plaintext is empty");
    let long = v1.encrypt(encrypt(&[0; 1_025])).await.unwrap_err();
    told(&long, Code::InvalidArgument, "the plaintext is longer than 1024 bytes");
    let request = |length| v2::EncryptRequest { plaintext: vec![0; length], uid: "u".to_owned() };
    let empty = v2.encrypt(request(0)).await.unwrap_err();
    told(&empty, Code::InvalidArgument, "the plaintext is empty");
    let long = v2.encrypt(request(964)).await.unwrap_err();
    told(&long, Code::InvalidArgument, "the plaintext is longer than 963 bytes");
}

#[tokio::test]
async fn v2_answers_with_the_key_id_that_its_status_named() {
    let ca = Ca::new();
    let agent = Agent::start(&ca, "one", Brain::at_version(2));
    let node = Node::with_agents(&ca, LONG, &[&agent]).await;
    let mut client = node.v2().await;
    let status = client.status(v2::StatusRequest {}).await.unwrap().into_inner();
    assert_eq!((status.version.as_str(), status.healthz.as_str()), ("v2", "ok"));
    assert_eq!(status.key_id, "02020202-0202-0202-0202-020202020202");

    agent.brain.version.store(3, Ordering::SeqCst);
    let request = || v2::EncryptRequest { plaintext: vec![7; 963], uid: "u".to_owned() };
    let sealed = client.encrypt(request()).await.unwrap().into_inner();
    assert_eq!(sealed.key_id, status.key_id);
    assert_eq!(sealed.ciphertext.len(), 1_024);
    assert_eq!(*agent.brain.last_named.lock().unwrap(), key_id(2));

    let status = client.status(v2::StatusRequest {}).await.unwrap().into_inner();
    assert_eq!(status.key_id, "03030303-0303-0303-0303-030303030303");
    assert_eq!(client.encrypt(request()).await.unwrap().into_inner().key_id, status.key_id);

    let decrypt = |key_id: &str| v2::DecryptRequest {
        ciphertext: sealed.ciphertext.clone(),
        uid: "u".to_owned(),
        key_id: key_id.to_owned(),
        annotations: Default::default(),
    };
    let plain = client.decrypt(decrypt(&sealed.key_id)).await.unwrap().into_inner().plaintext;
    assert_eq!(plain, vec![7; 963]);
    let error = client.decrypt(decrypt(&status.key_id)).await.unwrap_err();
    told(&error, Code::InvalidArgument, "the ciphertext was not made by this cluster's keys, or was altered");
}

#[tokio::test]
async fn v2_never_names_a_lower_version_than_before() {
    let ca = Ca::new();
    let agent = Agent::start(&ca, "one", Brain::at_version(5));
    let node = Node::with_agents(&ca, LONG, &[&agent]).await;
    let mut client = node.v2().await;
    let before = client.status(v2::StatusRequest {}).await.unwrap().into_inner();
    agent.brain.version.store(4, Ordering::SeqCst);
    let after = client.status(v2::StatusRequest {}).await.unwrap().into_inner();
    assert_eq!(before.key_id, after.key_id);
    let reported = agent.brain.last_status.lock().unwrap().clone().unwrap();
    assert_eq!(reported.highest_version, 5);
}

#[tokio::test]
async fn a_ciphertext_that_is_not_ours_gets_one_code_and_one_text() {
    let ca = Ca::new();
    let agent = Agent::start(&ca, "one", Brain::at_version(1));
    let node = Node::with_agents(&ca, LONG, &[&agent]).await;
    for cipher in [vec![], vec![1; 20], vec![2; 93]] {
        // The toy agent takes the last one for its own; v2 refuses its format.
        let v2_request = v2::DecryptRequest {
            ciphertext: cipher.clone(),
            uid: "u".to_owned(),
            key_id: "x".to_owned(),
            annotations: Default::default(),
        };
        let error = node.v2().await.decrypt(v2_request).await.unwrap_err();
        told(
            &error,
            Code::InvalidArgument,
            "the ciphertext was not made by this cluster's keys, or was altered",
        );
    }
    let error = node.v1().await.decrypt(decrypt(vec![1; 20])).await.unwrap_err();
    told(&error, Code::InvalidArgument, "the ciphertext was not made by this cluster's keys, or was altered");
}

#[tokio::test]
async fn an_agents_restart_costs_no_call_an_error() {
    let ca = Ca::new();
    let brain = Brain::at_version(1);
    let agent = Agent::start(&ca, "one", brain.clone());
    let node = Node::with_agents(&ca, LONG, &[&agent]).await;
    let mut client = node.v1().await;
    let address = agent.kill().await;
    let call =
        tokio::spawn(async move { client.encrypt(within(encrypt(b"ping"), Duration::from_secs(3))).await });
    tokio::time::sleep(Duration::from_millis(1_500)).await;
    assert!(!call.is_finished());
    let back = Instant::now();
    let _agent = Agent::start_at(&ca, "one", brain, address);
    call.await.unwrap().unwrap();
    assert!(back.elapsed() < Duration::from_millis(700), "{:?}", back.elapsed());
}

#[tokio::test]
async fn a_drained_agent_costs_no_call_an_error() {
    let ca = Ca::new();
    let brains = [Brain::at_version(1), Brain::at_version(1)];
    let one = Agent::start(&ca, "one", brains[0].clone());
    let two = Agent::start(&ca, "two", brains[1].clone());
    let node = Node::with_agents(&ca, LONG, &[&one, &two]).await;
    let mut client = node.v1().await;
    let calls = tokio::spawn(async move {
        for _ in 0..300 {
            client.encrypt(encrypt(b"ping")).await?;
        }
        Ok::<_, Status>(())
    });
    tokio::time::sleep(Duration::from_millis(50)).await;
    let address = one.drain().await;
    let _one = Agent::start_at(&ca, "one", brains[0].clone(), address);
    two.drain().await;
    calls.await.unwrap().unwrap();
}

#[tokio::test]
async fn an_old_outage_is_answered_at_once_and_ends_by_itself() {
    let ca = Ca::new();
    let brain = Brain::at_version(1);
    let agent = Agent::start(&ca, "one", brain.clone());
    let node = Node::with_agents(&ca, SHORT, &[&agent]).await;
    let mut client = node.v1().await;
    let address = agent.kill().await;
    let began = Instant::now();
    let error = client.encrypt(encrypt(b"ping")).await.unwrap_err();
    told(
        &error,
        Code::Unavailable,
        "no kms-agent could be reached for 1s; see kms-sidecar's log on this node",
    );
    assert!(began.elapsed() >= SHORT - Duration::from_millis(50), "{:?}", began.elapsed());
    let began = Instant::now();
    assert_eq!(client.encrypt(encrypt(b"ping")).await.unwrap_err().code(), Code::Unavailable);
    assert!(began.elapsed() < Duration::from_millis(100));
    assert!(node.answers.readiness().unwrap_err().contains("could be reached"));

    let _agent = Agent::start_at(&ca, "one", brain, address);
    node.links.up().await;
    client.encrypt(encrypt(b"ping")).await.unwrap();
    assert_eq!(node.answers.readiness(), Ok(()));
}

#[tokio::test]
async fn a_call_is_answered_before_its_deadline_and_says_why() {
    let ca = Ca::new();
    let agent = Agent::start(&ca, "one", Brain::at_version(1));
    let node = Node::with_agents(&ca, LONG, &[&agent]).await;
    let mut client = node.v1().await;
    agent.brain.set(Mood::Frozen);
    let began = Instant::now();
    let error = client.encrypt(within(encrypt(b"ping"), SHORT)).await.unwrap_err();
    assert!(began.elapsed() < SHORT, "{:?}", began.elapsed());
    told(&error, Code::DeadlineExceeded, "no kms-agent answered in time; see kms-sidecar's log on this node");
    let _address = agent.kill().await;
    let error = client.encrypt(within(encrypt(b"ping"), SHORT)).await.unwrap_err();
    assert_eq!(error.code(), Code::DeadlineExceeded);
    assert!(error.message().starts_with("no kms-agent could be reached in time"), "{error}");
}

#[tokio::test]
async fn a_frozen_agent_takes_half_the_time_and_another_answers() {
    let ca = Ca::new();
    let agents: Vec<_> =
        ["one", "two"].map(|name| Agent::start(&ca, name, Brain::at_version(1))).into_iter().collect();
    let node = Node::with_agents(&ca, LONG, &[&agents[0], &agents[1]]).await;
    tokio::time::sleep(Duration::from_millis(200)).await;
    let mut client = node.v1().await;
    client.encrypt(encrypt(b"ping")).await.unwrap();
    let first = agents.iter().find(|agent| agent.brain.calls() == 1).unwrap();
    first.brain.set(Mood::Frozen);
    let began = Instant::now();
    client.encrypt(within(encrypt(b"ping"), Duration::from_secs(2))).await.unwrap();
    assert!(began.elapsed() > Duration::from_millis(900) && began.elapsed() < Duration::from_millis(1_500));
    let began = Instant::now();
    client.encrypt(within(encrypt(b"ping"), Duration::from_secs(2))).await.unwrap();
    assert!(began.elapsed() < SHORT, "the frozen one is not asked first again");
}

#[tokio::test]
async fn an_agents_own_refusal_is_final_and_leaks_nothing() {
    let ca = Ca::new();
    let agents = ["one", "two"].map(|name| Agent::start(&ca, name, Brain::at_version(1)));
    for agent in &agents {
        agent.brain.set(Mood::Refuses(Code::PermissionDenied, "banned"));
    }
    let node = Node::with_agents(&ca, LONG, &[&agents[0], &agents[1]]).await;
    let error = node.v1().await.encrypt(encrypt(b"ping")).await.unwrap_err();
    told(
        &error,
        Code::PermissionDenied,
        "kms-agent does not serve this node; see kms-sidecar's log on this node",
    );
    assert_eq!(agents[0].brain.calls() + agents[1].brain.calls(), 1);
    assert!(node.answers.readiness().is_err());
}

#[tokio::test]
async fn what_is_not_an_agents_own_error_goes_to_another_agent() {
    let ca = Ca::new();
    let agents = ["one", "two"].map(|name| Agent::start(&ca, name, Brain::at_version(1)));
    let node = Node::with_agents(&ca, LONG, &[&agents[0], &agents[1]]).await;
    tokio::time::sleep(Duration::from_millis(200)).await;
    let mut client = node.v1().await;
    for mood in [
        Mood::Broken(Code::Unknown),
        Mood::Broken(Code::PermissionDenied),
        Mood::Refuses(Code::Unavailable, "locked"),
    ] {
        for broken in [0, 1] {
            agents[broken].brain.set(mood.clone());
            agents[1 - broken].brain.set(Mood::Serves);
            client.encrypt(encrypt(b"ping")).await.unwrap();
        }
    }
    agents[0].brain.set(Mood::Refuses(Code::Unavailable, "locked"));
    agents[1].brain.set(Mood::Refuses(Code::Unavailable, "locked"));
    let error = client.encrypt(encrypt(b"ping")).await.unwrap_err();
    told(&error, Code::Unavailable, "kms-agent cannot use its keys now; see kms-sidecar's log on this node");
}

#[tokio::test]
async fn an_answer_that_is_no_wrapped_dek_never_reaches_etcd() {
    let ca = Ca::new();
    let agent = Agent::start(&ca, "one", Brain::at_version(1));
    agent.brain.set(Mood::TalksNonsense);
    let node = Node::with_agents(&ca, LONG, &[&agent]).await;
    let error = node.v1().await.encrypt(encrypt(b"ping")).await.unwrap_err();
    assert_eq!(error.code(), Code::Internal);
}

#[tokio::test]
async fn only_an_agent_of_our_root_is_an_agent() {
    let (ca, other) = (Ca::new(), Ca::new());
    let any = std::net::SocketAddr::from(([127, 0, 0, 1], 0));
    let foreign = Agent::serve(other.agent("one"), &ca, Brain::at_version(1), any);
    let node_as_agent = Agent::serve(ca.node("cp-9"), &ca, Brain::at_version(1), any);
    let node = Node::start(SHORT);
    node.enrol(&ca, &[&foreign, &node_as_agent]);
    let error = node.v1().await.encrypt(encrypt(b"ping")).await.unwrap_err();
    assert_eq!(error.code(), Code::Unavailable);
    assert_eq!(foreign.brain.calls() + node_as_agent.brain.calls(), 0);
}

#[tokio::test]
async fn six_hundred_calls_at_once_on_one_connection_are_answered() {
    let ca = Ca::new();
    let agent = Agent::start(&ca, "one", Brain::at_version(1));
    let node = Node::with_agents(&ca, LONG, &[&agent]).await;
    let client = node.v1().await;
    let calls: Vec<_> = (0..600)
        .map(|_| {
            let mut client = client.clone();
            tokio::spawn(
                async move { client.encrypt(within(encrypt(b"ping"), Duration::from_secs(9))).await },
            )
        })
        .collect();
    for call in calls {
        call.await.unwrap().unwrap();
    }
}

#[tokio::test]
async fn garbage_on_the_socket_ends_its_connection_and_nothing_else() {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let node = Node::start(LONG);
    for garbage in [
        &b"GET / HTTP/1.1\r\nhost: x\r\n\r\n"[..],
        &[0xff; 4_096],
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\xff\xff\xff\x01\x04\0\0\0\x01",
    ] {
        let mut stream = node.stream().await;
        // It may be closed while we write.
        let _ = stream.write_all(garbage).await;
        let mut rest = Vec::new();
        let _ = tokio::time::timeout(Duration::from_secs(7), stream.read_to_end(&mut rest))
            .await
            .expect("closed");
    }
    let request = v1beta1::VersionRequest { version: "v1beta1".to_owned() };
    node.v1().await.version(request).await.unwrap();
}

#[tokio::test]
async fn a_huge_message_is_refused_and_the_connection_lives_on() {
    let node = Node::start(LONG);
    let mut client = node.v1().await;
    let error = client.encrypt(encrypt(&vec![0; 10 << 20])).await.unwrap_err();
    assert_eq!(error.code(), Code::OutOfRange);
    client.version(v1beta1::VersionRequest { version: "v1beta1".to_owned() }).await.unwrap();
}
