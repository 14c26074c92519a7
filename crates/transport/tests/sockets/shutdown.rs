//! How connections end: age, drain, ban.

use std::time::Duration;

use fleet_kms_transport::{LinkEnd, LinkError, ServeLimits};
use tokio::time::{Instant, sleep, timeout};

use crate::{
    ca::{CLIENT, NODE, TestCa, clock, live},
    harness::{Server, eventually, node_tls, trust_domain},
};

const SHORT: Duration = Duration::from_millis(300);

#[tokio::test]
async fn an_aged_connection_takes_no_new_call_and_finishes_those_in_flight() {
    let ca = TestCa::new("1");
    let server = Server::data_with(&ca, ServeLimits { age: SHORT, ..ServeLimits::default() }).await;
    let client = server.connect(&node_tls(&ca)).await.unwrap();
    let in_flight = tokio::spawn(client.call(900));
    sleep(SHORT * 2).await;
    assert!(matches!(client.call(0).await, Err(LinkError::Closed)), "not sent, so it may go elsewhere");
    assert!(client.service.is_closed() && !in_flight.is_finished());
    assert_eq!(in_flight.await.unwrap().unwrap(), format!("{NODE} Valid"));
    assert!(matches!(client.ended.await.unwrap(), LinkEnd::Closed));
    eventually("the connection is gone", || server.connections.count() == 0).await;
}

#[tokio::test]
async fn an_idle_connection_ends_in_order_at_its_age() {
    let ca = TestCa::new("1");
    let server = Server::data_with(&ca, ServeLimits { age: SHORT, ..ServeLimits::default() }).await;
    let start = Instant::now();
    let client = server.connect(&node_tls(&ca)).await.unwrap();
    assert!(matches!(client.ended.await.unwrap(), LinkEnd::Closed));
    assert!(start.elapsed() < SHORT * 3, "{:?}", start.elapsed());
    drop(client.service);
}

#[tokio::test]
async fn the_grace_ends_calls_that_never_end() {
    let ca = TestCa::new("1");
    let limits = ServeLimits { age: SHORT, grace: SHORT, ..ServeLimits::default() };
    let server = Server::data_with(&ca, limits).await;
    let client = server.connect(&node_tls(&ca)).await.unwrap();
    let outcome = timeout(Duration::from_secs(3), client.call(60_000)).await.unwrap();
    assert!(matches!(outcome, Err(LinkError::Broken(_))), "{outcome:?}");
}

#[tokio::test]
async fn a_drain_finishes_calls_in_flight_and_then_the_loop_returns() {
    let ca = TestCa::new("1");
    let server = Server::data(&ca).await;
    let client = server.connect(&node_tls(&ca)).await.unwrap();
    let in_flight = tokio::spawn(client.call(700));
    sleep(Duration::from_millis(100)).await;
    server.drain.drain();
    assert!(server.drain.is_draining());
    assert!(server.connect(&node_tls(&ca)).await.is_err());
    assert!(matches!(client.call(0).await, Err(LinkError::Closed)));
    assert!(!server.task.is_finished());
    in_flight.await.unwrap().unwrap();
    timeout(Duration::from_secs(1), server.task).await.unwrap().unwrap();
}

#[tokio::test]
async fn a_drain_has_an_end_even_if_a_call_has_none() {
    let ca = TestCa::new("1");
    let server = Server::data_with(&ca, ServeLimits { drain: SHORT, ..ServeLimits::default() }).await;
    let client = server.connect(&node_tls(&ca)).await.unwrap();
    let in_flight = tokio::spawn(client.call(60_000));
    sleep(Duration::from_millis(100)).await;
    server.drain.drain();
    timeout(Duration::from_secs(2), server.task).await.unwrap().unwrap();
    assert!(in_flight.await.unwrap().is_err());
    assert_eq!(server.connections.count(), 0);
}

#[tokio::test]
async fn a_ban_closes_the_banned_peers_connections_at_once_and_no_other() {
    let ca = TestCa::new("1");
    let server = Server::data(&ca).await;
    let other = NODE.replace("cp-1", "cp-2");
    let identity = live(ca.leaf(&[&other], &CLIENT));
    let tls = fleet_kms_transport::agent_client_tls(Some(identity), ca.roots(), clock(), trust_domain());
    let (banned, kept) = (server.connect(&node_tls(&ca)).await.unwrap(), server.connect(&tls).await.unwrap());
    let in_flight = tokio::spawn(banned.call(60_000));
    kept.call(50).await.unwrap();

    let start = Instant::now();
    let closed = server.connections.close_where(|peer| {
        peer.certificate.as_ref().is_some_and(|certificate| certificate.id().to_string() == NODE)
    });
    assert_eq!(closed, 1);
    assert!(in_flight.await.unwrap().is_err());
    assert!(start.elapsed() < Duration::from_millis(200), "{:?}", start.elapsed());
    assert!(banned.call(0).await.is_err());
    kept.call(0).await.unwrap();
    assert_eq!(server.connections.count(), 1);
}
