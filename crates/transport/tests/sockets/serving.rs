//! The connection loop under load, abuse and errors.

use std::{
    io,
    net::{IpAddr, SocketAddr},
    os::unix::net::UnixListener as StdUnixListener,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use fleet_kms_transport::{
    Accepted, ClientAuth, ConnectError, ConnectOptions, Listener, ServeLimits, TcpPort, UnixPort, agent_tls,
    connect,
};
use http_body_util::BodyExt;
use hyper::client::conn::{http1, http2};
use hyper_util::rt::{TokioExecutor, TokioIo};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpSocket, TcpStream, UnixStream},
    task::JoinSet,
    time::{Instant, sleep, timeout},
};
use tower::ServiceExt;

use crate::{
    ca::{CLIENT, NODE, TestCa, clock},
    harness::{LOCALHOST, Server, eventually, node_tls, request},
    raw,
};

const ANYWHERE: &str = "127.0.0.1:1";

/// Opens TCP to `server` from another loopback address.
async fn dial_from(source: [u8; 4], server: SocketAddr) -> TcpStream {
    let socket = TcpSocket::new_v4().unwrap();
    socket.bind(SocketAddr::new(IpAddr::from(source), 0)).unwrap();
    socket.connect(server).await.unwrap()
}

#[tokio::test]
async fn handshakes_stalled_by_one_address_do_not_hold_up_another() {
    let ca = TestCa::new("1");
    let server = Server::data(&ca).await;
    let mut stalled = Vec::new();
    for _ in 0..300 {
        let mut stream = dial_from([127, 0, 0, 2], server.address).await;
        // The first bytes of a ClientHello, and no more.
        let _ = stream.write_all(&[22, 3, 1, 2, 0]).await;
        stalled.push(stream);
    }
    let start = Instant::now();
    for _ in 0..20 {
        server.connect(&node_tls(&ca)).await.unwrap().call(0).await.unwrap();
    }
    assert!(start.elapsed() < Duration::from_secs(3), "{:?}", start.elapsed());
    server.has_refused("the source has too many connections").await;
    server.has_refused("the handshake took too long").await;
}

#[tokio::test]
async fn a_fleet_behind_one_address_comes_back() {
    let ca = TestCa::new("1");
    let limits = ServeLimits { max_connections_per_identity: 50, ..ServeLimits::default() };
    let server = Arc::new(Server::data_with(&ca, limits).await);
    let tls = node_tls(&ca);
    let mut links = JoinSet::new();
    for _ in 0..50 {
        let (server, tls) = (Arc::clone(&server), tls.clone());
        links.spawn(async move { server.connect(&tls).await.unwrap().call(0).await.unwrap() });
    }
    assert_eq!(links.join_all().await.len(), 50);
}

#[tokio::test]
async fn a_full_port_closes_the_next_connection_at_once() {
    let ca = TestCa::new("1");
    let server = Server::data_with(&ca, ServeLimits { max_connections: 1, ..ServeLimits::default() }).await;
    let first = server.connect(&node_tls(&ca)).await.unwrap();
    let refused = timeout(Duration::from_secs(1), server.connect(&node_tls(&ca))).await.unwrap();
    assert!(matches!(refused, Err(ConnectError::Tls(_))));
    server.has_refused("the port is full").await;
    first.call(0).await.unwrap();
    drop(first);
    eventually("the place is free again", || server.connections.count() == 0).await;
    server.connect(&node_tls(&ca)).await.unwrap();
}

#[tokio::test]
async fn one_address_may_have_its_share_of_connections_only() {
    let ca = TestCa::new("1");
    let limits = ServeLimits { max_connections_per_source: 1, ..ServeLimits::default() };
    let server = Server::data_with(&ca, limits).await;
    let _first = server.connect(&node_tls(&ca)).await.unwrap();
    assert!(server.connect(&node_tls(&ca)).await.is_err());
    dial_from([127, 0, 0, 2], server.address).await;
    assert_eq!(server.events(), ["the source has too many connections"]);
}

#[tokio::test]
async fn one_identity_may_have_its_share_of_connections_only() {
    let ca = TestCa::new("1");
    let limits = ServeLimits { max_connections_per_identity: 2, ..ServeLimits::default() };
    let server = Server::data_with(&ca, limits).await;
    let first = server.connect(&node_tls(&ca)).await.unwrap();
    let second = server.connect(&node_tls(&ca)).await.unwrap();
    assert!(matches!(server.connect(&node_tls(&ca)).await, Err(ConnectError::Tls(_))));
    server.has_refused("the identity has too many connections").await;
    second.call(0).await.unwrap();
    drop(first);
    eventually("a place is free again", || server.connections.count() == 1).await;
    server.connect(&node_tls(&ca)).await.unwrap().call(0).await.unwrap();
}

#[tokio::test]
async fn hundreds_of_cancelled_calls_do_not_end_the_connection() {
    let (_directory, path, _server, _) = unix_port(ServeLimits::default());
    let mut stream = UnixStream::connect(path).await.unwrap();
    // All in one write, so that the server finds calls and resets together, as after a pause of either side.
    let mut bytes = raw::preface();
    let ids = (1..).step_by(2).take(301).collect::<Vec<u32>>();
    let (last, cancelled) = ids.split_last().unwrap();
    for id in cancelled {
        bytes.extend(raw::call(*id));
        bytes.extend(raw::cancel(*id));
    }
    bytes.extend(raw::call(*last));
    stream.write_all(&bytes).await.unwrap();
    let answered = timeout(Duration::from_secs(5), raw::answer(&mut stream, *last)).await.unwrap();
    answered.expect("no GOAWAY and no end");
}

#[tokio::test]
async fn a_call_is_answered_before_its_clients_deadline() {
    let ca = TestCa::new("1");
    let server = Server::data(&ca).await;
    let client = server.connect(&node_tls(&ca)).await.unwrap();
    client.call(0).await.unwrap();
    let mut late = request(10_000);
    late.headers_mut().insert("grpc-timeout", "300m".parse().unwrap());
    let start = Instant::now();
    let response = client.service.clone().oneshot(late).await.unwrap();
    let took = start.elapsed();
    assert_eq!(response.headers()["grpc-status"], "4");
    assert!(response.headers().contains_key("grpc-message"));
    assert!(took >= Duration::from_millis(270) && took < Duration::from_millis(300), "{took:?}");
    assert!(response.into_body().collect().await.unwrap().to_bytes().is_empty());
}

/// A port whose process has no file descriptors left for a while.
struct OutOfFiles {
    errors_left: usize,
    accepts: Arc<AtomicUsize>,
    inner: TcpPort,
}

impl Listener for OutOfFiles {
    type Io = TcpStream;

    async fn accept(&mut self) -> io::Result<Accepted<TcpStream>> {
        self.accepts.fetch_add(1, Ordering::Relaxed);
        if self.errors_left > 0 {
            self.errors_left -= 1;
            return Err(io::Error::from_raw_os_error(24));
        }
        self.inner.accept().await
    }
}

#[tokio::test]
async fn accept_errors_cost_a_rest_each_and_end_nothing() {
    let listener = std::net::TcpListener::bind(LOCALHOST).unwrap();
    let address = listener.local_addr().unwrap();
    let accepts = Arc::new(AtomicUsize::new(0));
    let inner = TcpPort::from_std(listener).unwrap();
    let port = OutOfFiles { errors_left: 10, accepts: Arc::clone(&accepts), inner };
    let server = Server::start(port, address, ServeLimits::default());
    sleep(Duration::from_millis(220)).await;
    assert!(accepts.load(Ordering::Relaxed) <= 5, "{accepts:?} in 220 ms");
    assert_eq!(get(address).await, "nobody", "served once there are files again");
    assert_eq!(server.events().iter().filter(|event| event.contains("accept")).count(), 10);
}

/// A plain HTTP/1.1 request.
async fn get(address: SocketAddr) -> String {
    let stream = TcpStream::connect(address).await.unwrap();
    let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await.unwrap();
    tokio::spawn(connection);
    let request =
        http::Request::builder().uri("/0").header("host", "a").body(tonic::body::Body::empty()).unwrap();
    let body = sender.send_request(request).await.unwrap().into_body().collect().await.unwrap().to_bytes();
    String::from_utf8(body.to_vec()).unwrap()
}

#[tokio::test]
async fn a_port_without_tls_speaks_both_versions_of_http() {
    let listener = std::net::TcpListener::bind(LOCALHOST).unwrap();
    let address = listener.local_addr().unwrap();
    let _server = Server::start(TcpPort::from_std(listener).unwrap(), address, ServeLimits::default());
    assert_eq!(get(address).await, "nobody");
    let stream = TcpStream::connect(address).await.unwrap();
    let (mut sender, connection) =
        http2::handshake(TokioExecutor::new(), TokioIo::new(stream)).await.unwrap();
    tokio::spawn(connection);
    let mut request = request(0);
    *request.uri_mut() = "http://a/0".parse().unwrap();
    assert_eq!(sender.send_request(request).await.unwrap().status(), 200);
}

#[tokio::test]
async fn an_admin_port_speaks_http_1_1_over_tls_too() {
    let ca = TestCa::new("1");
    let tls = agent_tls(ca.agent(), ca.roots(), clock(), ClientAuth::Required).with_http1();
    let server = Server::tls(tls, ServeLimits::default()).await;
    server.connect(&node_tls(&ca)).await.unwrap().call(0).await.unwrap();

    let config = raw::client_config(Some(ca.leaf(&[NODE], &CLIENT)), &[b"http/1.1"]);
    let stream = TcpStream::connect(server.address).await.unwrap();
    let name = "any.invalid".try_into().unwrap();
    let mut stream = tokio_rustls::TlsConnector::from(Arc::new(config)).connect(name, stream).await.unwrap();
    stream.write_all(b"GET /0 HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n").await.unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.unwrap();
    assert!(answer.starts_with("HTTP/1.1 200") && answer.contains(NODE), "{answer}");
}

/// A unix port in a directory of its own.
fn unix_port(limits: ServeLimits) -> (tempfile::TempDir, std::path::PathBuf, Server, Arc<AtomicUsize>) {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("kms.sock");
    let wrapped = Arc::new(AtomicUsize::new(0));
    let count = Arc::clone(&wrapped);
    let wrap = move |stream: UnixStream| {
        count.fetch_add(1, Ordering::Relaxed);
        tokio::io::BufReader::new(stream)
    };
    let port = UnixPort::from_std(StdUnixListener::bind(&path).unwrap(), wrap).unwrap();
    let server = Server::start(port, ANYWHERE.parse().unwrap(), limits);
    (directory, path, server, wrapped)
}

#[tokio::test]
async fn a_unix_port_knows_its_peer_and_wraps_its_stream() {
    let (_directory, path, _server, wrapped) = unix_port(ServeLimits::default());
    let stream = UnixStream::connect(path).await.unwrap();
    let (mut sender, connection) =
        http2::handshake(TokioExecutor::new(), TokioIo::new(stream)).await.unwrap();
    tokio::spawn(connection);
    let mut request = request(0);
    *request.uri_mut() = "http://a/0".parse().unwrap();
    let body = sender.send_request(request).await.unwrap().into_body().collect().await.unwrap().to_bytes();
    let body = String::from_utf8(body.to_vec()).unwrap();
    assert!(body.ends_with(&format!("pid Some({})", std::process::id())), "{body}");
    assert_eq!(wrapped.load(Ordering::Relaxed), 1);
}

#[tokio::test]
async fn a_silent_connection_does_not_keep_its_place() {
    let limits = ServeLimits { handshake: Duration::from_millis(200), ..ServeLimits::default() };
    let (_directory, path, server, _) = unix_port(limits);
    let mut silent = UnixStream::connect(path).await.unwrap();
    eventually("the connection is in", || server.connections.count() == 1).await;
    let mut settings = Vec::new();
    timeout(Duration::from_secs(2), silent.read_to_end(&mut settings)).await.unwrap().unwrap();
    eventually("the connection is gone", || server.connections.count() == 0).await;
}

#[tokio::test]
async fn a_dropped_loop_closes_everything() {
    let ca = TestCa::new("1");
    let server = Server::data(&ca).await;
    let client = server.connect(&node_tls(&ca)).await.unwrap();
    let call = tokio::spawn(client.call(60_000));
    sleep(Duration::from_millis(50)).await;
    server.task.abort();
    assert!(timeout(Duration::from_secs(1), call).await.unwrap().unwrap().is_err());
    let again = connect(&server.address.to_string(), &node_tls(&ca), ConnectOptions::default()).await;
    assert!(matches!(again, Err(ConnectError::Tcp(_))));
}
