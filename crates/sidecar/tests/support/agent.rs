//! An agent that wraps by a toy formula and misbehaves on demand.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use fleet_kms_proto::agent::data_plane_server::{DataPlane, DataPlaneServer};
use fleet_kms_proto::agent::unwrap_item::Outcome;
use fleet_kms_proto::agent::{
    AgentAddress, Refusal, RewrapRequest, RewrapResponse, StatusRequest, StatusResponse, UnwrapItem,
    UnwrapRequest, UnwrapResponse, WrapRequest, WrapResponse,
};
use fleet_kms_transport::{ClientAuth, Connections, Drain, PeerInfo, ServeLimits, TlsPort, agent_tls, serve};
use futures_util::future::FutureExt;
use tonic::metadata::MetadataValue;
use tonic::{Code, Request, Response, Status};
use tower::ServiceExt;

use super::ca::{Ca, clock};

/// How an agent answers.
#[derive(Debug, Clone, Default)]
pub enum Mood {
    #[default]
    Serves,
    /// Never answers.
    Frozen,
    /// An error of its own.
    Refuses(Code, &'static str),
    /// An error of somebody in between.
    Broken(Code),
    /// Wrapped DEKs that are none.
    TalksNonsense,
}

/// What an agent knows and counts.
#[derive(Debug, Default)]
pub struct Brain {
    pub mood: Mutex<Mood>,
    pub version: AtomicU32,
    pub calls: AtomicU32,
    pub addresses: Mutex<Vec<AgentAddress>>,
    pub last_status: Mutex<Option<StatusRequest>>,
    pub last_named: Mutex<Vec<u8>>,
    /// Who called: SHA-256 of their keys.
    pub peers: Mutex<Vec<[u8; 32]>>,
}

pub fn key_id(version: u32) -> [u8; 16] {
    [u8::try_from(version).unwrap(); 16]
}

impl Brain {
    pub fn at_version(version: u32) -> Arc<Self> {
        Arc::new(Self { version: AtomicU32::new(version), ..Self::default() })
    }

    pub fn set(&self, mood: Mood) {
        *self.mood.lock().unwrap() = mood;
    }

    pub fn calls(&self) -> u32 {
        self.calls.load(Ordering::SeqCst)
    }

    async fn behave(&self) -> Result<(), Status> {
        self.calls.fetch_add(1, Ordering::SeqCst);
        let mood = self.mood.lock().unwrap().clone();
        match mood {
            Mood::Serves | Mood::TalksNonsense => Ok(()),
            Mood::Frozen => std::future::pending().await,
            Mood::Broken(code) => Err(Status::new(code, "10.0.0.7 says no")),
            Mood::Refuses(code, reason) => {
                let mut status = Status::new(code, "secret text of 10.0.0.7");
                status.metadata_mut().insert("fleet-kms-reason", MetadataValue::from_static(reason));
                Err(status)
            }
        }
    }
}

struct Plane(Arc<Brain>);

#[tonic::async_trait]
impl DataPlane for Plane {
    async fn wrap(&self, request: Request<WrapRequest>) -> Result<Response<WrapResponse>, Status> {
        self.0.behave().await?;
        let WrapRequest { plaintext, key_id: named } = request.into_inner();
        *self.0.last_named.lock().unwrap() = named.clone();
        let version = match named.first() {
            Some(version) => u32::from(*version),
            None => self.0.version.load(Ordering::SeqCst),
        };
        let mut wrapped = vec![1];
        wrapped.extend(version.to_be_bytes());
        wrapped.extend(key_id(version));
        wrapped.extend([9; 24]);
        wrapped.extend(plaintext.iter().map(|byte| byte ^ 0x55));
        wrapped.extend([8; 16]);
        if matches!(*self.0.mood.lock().unwrap(), Mood::TalksNonsense) {
            wrapped.clear();
        }
        Ok(Response::new(WrapResponse { wrapped, key_id: key_id(version).to_vec(), version }))
    }

    async fn unwrap(&self, request: Request<UnwrapRequest>) -> Result<Response<UnwrapResponse>, Status> {
        self.0.behave().await?;
        let item = |wrapped: &[u8]| {
            let outcome = match wrapped.get(45..wrapped.len().saturating_sub(16)) {
                Some(dek) if !dek.is_empty() => Outcome::Plain(dek.iter().map(|byte| byte ^ 0x55).collect()),
                _ => Outcome::Refused(Refusal::NotOurs.into()),
            };
            UnwrapItem { outcome: Some(outcome) }
        };
        let items = request.into_inner().wrapped.iter().map(|wrapped| item(wrapped)).collect();
        Ok(Response::new(UnwrapResponse { items }))
    }

    async fn rewrap(&self, _: Request<RewrapRequest>) -> Result<Response<RewrapResponse>, Status> {
        Err(Status::unimplemented("no sidecar asks for this"))
    }

    async fn status(&self, request: Request<StatusRequest>) -> Result<Response<StatusResponse>, Status> {
        let peer = request.extensions().get::<Arc<PeerInfo>>().unwrap();
        self.0.peers.lock().unwrap().push(*peer.certificate.as_ref().unwrap().spki_sha256());
        self.0.behave().await?;
        *self.0.last_status.lock().unwrap() = Some(request.into_inner());
        let version = self.0.version.load(Ordering::SeqCst);
        let agents = self.0.addresses.lock().unwrap().clone();
        Ok(Response::new(StatusResponse {
            key_id: key_id(version).to_vec(),
            version,
            agents,
            roots: Vec::new(),
        }))
    }
}

/// A running agent; dropping it cuts all its connections.
pub struct Agent {
    pub address: String,
    pub brain: Arc<Brain>,
    drain: Drain,
    task: tokio::task::JoinHandle<()>,
}

impl Agent {
    pub fn start(ca: &Ca, name: &str, brain: Arc<Brain>) -> Self {
        Self::start_at(ca, name, brain, SocketAddr::from(([127, 0, 0, 1], 0)))
    }

    /// Starts at an address that an agent had before.
    pub fn start_at(ca: &Ca, name: &str, brain: Arc<Brain>, address: SocketAddr) -> Self {
        Self::serve(ca.agent(name), ca, brain, address)
    }

    pub fn serve(
        identity: Arc<fleet_kms_transport::LiveIdentity>,
        ca: &Ca,
        brain: Arc<Brain>,
        address: SocketAddr,
    ) -> Self {
        let socket = listener(address);
        let address = socket.local_addr().unwrap().to_string();
        let tls = agent_tls(identity, ca.roots(), clock(), ClientAuth::Required);
        let port = TlsPort::from_std(socket, tls).unwrap();
        let service = DataPlaneServer::new(Plane(Arc::clone(&brain)))
            .map_request(|request: http::Request<hyper::body::Incoming>| request.map(tonic::body::Body::new));
        let drain = Drain::new();
        let serving = serve(port, service, ServeLimits::default(), Connections::new(), drain.clone());
        Self { address, brain, drain, task: tokio::spawn(serving.map(drop)) }
    }

    pub fn peers(&self) -> Vec<[u8; 32]> {
        self.brain.peers.lock().unwrap().clone()
    }

    pub fn address(&self) -> SocketAddr {
        self.address.parse().unwrap()
    }

    /// Ends in order, as a restart does.
    pub async fn drain(self) -> SocketAddr {
        self.drain.drain();
        let address = self.address();
        tokio::time::timeout(Duration::from_secs(5), self.task).await.unwrap().unwrap();
        address
    }

    /// Ends at once, as `kill -9` does.
    pub async fn kill(self) -> SocketAddr {
        let address = self.address();
        self.task.abort();
        let _ = self.task.await;
        address
    }
}

/// std sets SO_REUSEADDR, so that a port can be had again at once.
fn listener(address: SocketAddr) -> std::net::TcpListener {
    std::net::TcpListener::bind(address).unwrap()
}
