//! A node: the sidecar's handlers on a socket, and kube-apiserver's clients.

use std::time::Duration;

use fleet_kms_proto::v1beta1::key_management_service_client::KeyManagementServiceClient as V1;
use fleet_kms_proto::v2::key_management_service_client::KeyManagementServiceClient as V2;
use fleet_kms_sidecar::agent_link::LinkContext;
use fleet_kms_sidecar::answer::Answers;
use fleet_kms_sidecar::authority::AuthorityRewrite;
use fleet_kms_sidecar::kms::Kms;
use fleet_kms_sidecar::links::Links;
use fleet_kms_sidecar::metrics::Metrics;
use fleet_kms_sidecar::node_status::NodeStatus;
use fleet_kms_sidecar::socket::{SocketConfig, SocketPath, keep_bound};
use fleet_kms_transport::{Connections, Drain, ServeLimits, serve};
use hyper::client::conn::http2::{SendRequest, handshake};
use hyper_util::rt::{TokioExecutor, TokioIo};
use prometheus_client::registry::Registry;
use tokio::net::UnixStream;
use tonic::body::Body;

use super::agent::Agent;
use super::ca::Ca;

pub struct Node {
    pub links: Links,
    pub node_status: NodeStatus,
    pub answers: Answers,
    pub metrics: Metrics,
    pub registry: Registry,
    pub drain: Drain,
    pub serving: tokio::task::JoinHandle<()>,
    directory: tempfile::TempDir,
}

impl Node {
    /// A node that is not enrolled.
    pub fn start(hold_for: Duration) -> Self {
        let mut registry = Registry::default();
        let metrics = Metrics::register(&mut registry);
        let links = Links::new(LinkContext::new(1), hold_for, metrics.clone());
        let node_status = NodeStatus::new(links.clone(), metrics.clone());
        let answers = Answers::new(metrics.clone(), 1);
        let directory = tempfile::tempdir().unwrap();
        let config =
            SocketConfig { path: directory.path().join("kms.sock"), mode: 0o600, owner: None, group: None };
        let (path, bound) = SocketPath::claim(config, 1).unwrap();
        let ops = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let (port, handed_over) = keep_bound(path, bound, ops, AuthorityRewrite::new).unwrap();
        tokio::spawn(handed_over);
        let service = Kms::service(links.clone(), node_status.clone(), answers.clone());
        let drain = Drain::new();
        let serving =
            tokio::spawn(serve(port, service, ServeLimits::default(), Connections::new(), drain.clone()));
        Self { links, node_status, answers, metrics, registry, drain, serving, directory }
    }

    /// An enrolled node with these agents, connected.
    pub async fn with_agents(ca: &Ca, hold_for: Duration, agents: &[&Agent]) -> Self {
        let node = Self::start(hold_for);
        node.enrol(ca, agents);
        node.links.up().await;
        node
    }

    pub fn enrol(&self, ca: &Ca, agents: &[&Agent]) {
        let tls = ca.client_tls(ca.node("cp-1"));
        self.links.set_agents(&tls, agents.iter().map(|agent| agent.address.as_str()));
    }

    pub async fn v1(&self) -> V1<Connection> {
        V1::new(self.dial().await)
    }

    pub async fn v2(&self) -> V2<Connection> {
        V2::new(self.dial().await)
    }

    pub async fn stream(&self) -> UnixStream {
        UnixStream::connect(self.directory.path().join("kms.sock")).await.unwrap()
    }

    async fn dial(&self) -> Connection {
        let (sender, connection) =
            handshake(TokioExecutor::new(), TokioIo::new(self.stream().await)).await.unwrap();
        tokio::spawn(connection);
        Connection(sender)
    }

    pub fn scrape(&self) -> String {
        let mut text = String::new();
        prometheus_client::encoding::text::encode(&mut text, &self.registry).unwrap();
        text
    }
}

#[derive(Clone)]
pub struct Connection(SendRequest<Body>);

impl tower_service::Service<http::Request<Body>> for Connection {
    type Response = http::Response<hyper::body::Incoming>;
    type Error = hyper::Error;
    type Future = futures_util::future::BoxFuture<'static, Result<Self::Response, hyper::Error>>;

    fn poll_ready(&mut self, cx: &mut std::task::Context<'_>) -> std::task::Poll<Result<(), hyper::Error>> {
        self.0.poll_ready(cx)
    }

    fn call(&mut self, mut request: http::Request<Body>) -> Self::Future {
        let path = request.uri().path().to_owned();
        *request.uri_mut() = format!("http://localhost{path}").parse().unwrap();
        Box::pin(self.0.send_request(request))
    }
}
