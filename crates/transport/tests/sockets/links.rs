//! What `connect` says when there is no agent, or one that has stopped.

use std::time::Duration;

use fleet_kms_transport::{ConnectError, ConnectOptions, LinkEnd, Stage, connect};
use tokio::{
    io::AsyncWriteExt,
    net::TcpListener,
    time::{Instant, timeout},
};

use crate::{
    ca::{AGENT, SERVER, TestCa},
    harness::{Client, chain, node_tls},
    raw,
};

const SHORT: ConnectOptions = ConnectOptions {
    timeout: Duration::from_millis(500),
    ping_interval: Duration::from_millis(200),
    ping_timeout: Duration::from_millis(200),
};

async fn refused(address: &str, ca: &TestCa) -> ConnectError {
    connect(address, &node_tls(ca), SHORT).await.err().unwrap()
}

#[tokio::test]
async fn a_name_that_does_not_exist_is_a_dns_error() {
    let ca = TestCa::new("1");
    for address in ["agent.invalid:7443", "no port", ""] {
        let options = ConnectOptions { timeout: Duration::from_secs(20), ..SHORT };
        let error = connect(address, &node_tls(&ca), options).await.err().unwrap();
        assert!(matches!(error, ConnectError::Dns(_)), "{address:?}: {error:?}");
    }
}

#[tokio::test]
async fn a_closed_port_is_a_tcp_error() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    drop(listener);
    let error = refused(&address, &TestCa::new("1")).await;
    assert!(matches!(error, ConnectError::Tcp(_)), "{error:?}");
    assert!(!chain(&error).contains(&address), "error texts name no host: {}", chain(&error));
}

#[tokio::test]
async fn a_name_with_several_addresses_is_tried_through() {
    let ca = TestCa::new("1");
    let port = raw::silent_server(ca.leaf(&[AGENT], &SERVER), true).await.port();
    // On most hosts ::1 comes first, where nobody listens.
    connect(&format!("localhost:{port}"), &node_tls(&ca), ConnectOptions::default()).await.unwrap();
}

#[tokio::test]
async fn a_peer_that_says_nothing_runs_out_of_time_and_the_stage_is_named() {
    let ca = TestCa::new("1");
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let error = refused(&listener.local_addr().unwrap().to_string(), &ca).await;
    assert!(matches!(error, ConnectError::Timeout(Stage::Tls)), "{error:?}");

    let address = raw::silent_server(ca.leaf(&[AGENT], &SERVER), false).await;
    let error = refused(&address.to_string(), &ca).await;
    assert!(matches!(error, ConnectError::Timeout(Stage::Admission)), "{error:?}");
}

#[tokio::test]
async fn a_peer_that_speaks_no_tls_is_a_tls_error() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    tokio::spawn(async move {
        let (mut stream, _) = listener.accept().await.unwrap();
        stream.write_all(b"HTTP/1.1 400 Bad Request\r\n\r\n").await.unwrap();
        std::future::pending::<()>().await;
    });
    let error = refused(&address, &TestCa::new("1")).await;
    assert!(matches!(error, ConnectError::Tls(_)), "{error:?}");
}

#[tokio::test]
async fn a_frozen_agent_is_noticed_by_ping() {
    let ca = TestCa::new("1");
    let address = raw::silent_server(ca.leaf(&[AGENT], &SERVER), true).await;
    let client = Client::run(connect(&address.to_string(), &node_tls(&ca), SHORT).await.unwrap());
    let start = Instant::now();
    let in_flight = tokio::spawn(client.call(0));
    let ended = timeout(Duration::from_secs(3), client.ended).await.unwrap().unwrap();
    assert!(matches!(ended, LinkEnd::PingTimeout), "{ended:?}");
    assert!(start.elapsed() < Duration::from_secs(1), "{:?}", start.elapsed());
    assert!(in_flight.await.unwrap().is_err());
}
