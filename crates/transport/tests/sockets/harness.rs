//! A server over the connection loop, and clients over links.

use std::{
    convert::Infallible,
    net::SocketAddr,
    sync::{Arc, Mutex},
    time::Duration,
};

use bytes::Bytes;
use fleet_kms_identity::TrustDomain;
use fleet_kms_transport::{
    ClientAuth, ClientTls, ConnectError, ConnectOptions, ConnectionEvent, Connections, Drain, Link, LinkEnd,
    LinkError, LinkService, Listener, PeerInfo, ServeLimits, ServerTls, TlsPort, UnixPeer, agent_client_tls,
    agent_tls, connect, deadline::DeadlineLayer, serve,
};
use http::{Request, Response};
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use tokio::task::JoinHandle;
use tower::{ServiceBuilder, ServiceExt, service_fn};

use crate::ca::{TestCa, clock};

pub(crate) const LOCALHOST: &str = "127.0.0.1:0";

/// A server that tells callers who they are, after as many milliseconds as the path says.
pub(crate) struct Server {
    pub(crate) address: SocketAddr,
    pub(crate) connections: Connections,
    pub(crate) drain: Drain,
    pub(crate) task: JoinHandle<()>,
    events: Arc<Mutex<Vec<String>>>,
}

impl Server {
    pub(crate) async fn tls(tls: ServerTls, limits: ServeLimits) -> Self {
        let listener = std::net::TcpListener::bind(LOCALHOST).unwrap();
        let address = listener.local_addr().unwrap();
        Self::start(TlsPort::from_std(listener, tls).unwrap(), address, limits)
    }

    /// A data port of `ca` with the usual limits.
    pub(crate) async fn data(ca: &TestCa) -> Self {
        Self::data_with(ca, ServeLimits::default()).await
    }

    pub(crate) async fn data_with(ca: &TestCa, limits: ServeLimits) -> Self {
        Self::tls(agent_tls(ca.agent(), ca.roots(), clock(), ClientAuth::Required), limits).await
    }

    pub(crate) fn start(port: impl Listener, address: SocketAddr, limits: ServeLimits) -> Self {
        let events = Arc::new(Mutex::new(Vec::new()));
        let heard = Arc::clone(&events);
        let connections = Connections::observed_by(Arc::new(move |event| {
            heard.lock().unwrap().push(match event {
                ConnectionEvent::Refused { refusal, .. } => chain(refusal),
                ConnectionEvent::AcceptFailed(error) => format!("accept: {error}"),
            });
        }));
        let drain = Drain::new();
        let service = ServiceBuilder::new().layer(DeadlineLayer).service(service_fn(answer));
        let task = tokio::spawn(serve(port, service, limits, connections.clone(), drain.clone()));
        Self { address, connections, drain, task, events }
    }

    pub(crate) async fn connect(&self, tls: &ClientTls) -> Result<Client, ConnectError> {
        connect(&self.address.to_string(), tls, ConnectOptions::default()).await.map(Client::run)
    }

    /// Waits until the server has refused somebody for a reason that contains `text`.
    pub(crate) async fn has_refused(&self, text: &str) {
        eventually(&format!("a refusal with {text:?} among {:?}", self.events), || {
            self.events.lock().unwrap().iter().any(|event| event.contains(text))
        })
        .await;
    }

    /// Waits until the server has refused somebody so many times.
    pub(crate) async fn has_refused_times(&self, times: usize) {
        eventually("the last refusal", || self.events.lock().unwrap().len() == times).await;
    }

    pub(crate) fn events(&self) -> Vec<String> {
        self.events.lock().unwrap().clone()
    }
}

async fn answer(request: Request<Incoming>) -> Result<Response<Full<Bytes>>, Infallible> {
    let delay = request.uri().path().trim_start_matches('/').parse().unwrap_or(0);
    let peer = match (request.extensions().get::<Arc<PeerInfo>>(), request.extensions().get::<UnixPeer>()) {
        (Some(peer), None) => match &peer.certificate {
            Some(certificate) => format!("{} {:?}", certificate.id(), peer.standing),
            None => "nobody".to_owned(),
        },
        (None, Some(peer)) => format!("uid {} pid {:?}", peer.uid, peer.pid),
        other => panic!("not one peer: {other:?}"),
    };
    tokio::time::sleep(Duration::from_millis(delay)).await;
    Ok(Response::new(Full::new(Bytes::from(peer))))
}

/// A link whose driver runs.
pub(crate) struct Client {
    pub(crate) service: LinkService,
    pub(crate) peer: PeerInfo,
    pub(crate) learnt_root: Option<rustls_pki_types::CertificateDer<'static>>,
    pub(crate) ended: JoinHandle<LinkEnd>,
}

impl Client {
    pub(crate) fn run(link: Link) -> Self {
        let Link { service, peer, learnt_root, driver } = link;
        Self { service, peer, learnt_root, ended: tokio::spawn(driver) }
    }

    /// Calls the server and returns its answer, which comes after `delay` milliseconds.
    pub(crate) fn call(&self, delay: u64) -> impl Future<Output = Result<String, LinkError>> + Send + use<> {
        let service = self.service.clone();
        async move {
            let response = service.oneshot(request(delay)).await?;
            let body = response.into_body().collect().await.unwrap().to_bytes();
            Ok(String::from_utf8(body.to_vec()).unwrap())
        }
    }
}

pub(crate) fn request(delay: u64) -> Request<tonic::body::Body> {
    Request::builder().uri(format!("/{delay}")).body(tonic::body::Body::empty()).unwrap()
}

pub(crate) fn trust_domain() -> TrustDomain {
    "fleet.example".parse().unwrap()
}

/// The TLS of a node of `ca`.
pub(crate) fn node_tls(ca: &TestCa) -> ClientTls {
    agent_client_tls(Some(ca.node()), ca.roots(), clock(), trust_domain())
}

/// An error and its causes as one text.
pub(crate) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text.push_str(": ");
        text.push_str(&cause.to_string());
        source = cause.source();
    }
    text
}

pub(crate) async fn eventually(what: &str, is_so: impl Fn() -> bool) {
    for _ in 0..500 {
        if is_so() {
            return;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    panic!("did not happen: {what}");
}
