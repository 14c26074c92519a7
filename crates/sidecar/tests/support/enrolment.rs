//! An agent's enrolment port that knows one token.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime};

use fleet_kms_identity::{JoinToken, fingerprint};
use fleet_kms_proto::agent::enrolment_server::{Enrolment, EnrolmentServer};
use fleet_kms_proto::agent::{CertificateResponse, EnrolRequest, RenewRequest, TimeRequest, TimeResponse};
use fleet_kms_transport::{
    ClientAuth, Connections, Drain, LiveIdentity, ServeLimits, TlsPort, agent_tls, serve,
};
use futures_util::future::FutureExt;
use tonic::metadata::MetadataValue;
use tonic::{Request, Response, Status};
use tower::ServiceExt;

use super::ca::{Ca, clock};

pub struct Desk {
    pub ca: Ca,
    pub token: JoinToken,
    pub life: Mutex<Duration>,
    /// Enrolments whose answers get lost.
    pub lose: AtomicU32,
    /// Times that the agent tells after it has renewed its certificate, so that they name another key than the
    /// connection's.
    pub renew_first: AtomicU32,
    pub enrolments: AtomicU32,
    pub renewals: AtomicU32,
    pub keys: Mutex<Vec<Vec<u8>>>,
    /// How far the agent's clock is before the machine's.
    pub ahead: Duration,
    identity: Arc<LiveIdentity>,
}

impl Desk {
    pub fn new(ca: Ca, life: Duration, ahead: Duration) -> Arc<Self> {
        let mut rng = rand_core::UnwrapErr(getrandom::SysRng);
        let token = JoinToken::generate(fingerprint(&ca.root_der()), SystemTime::now(), &mut rng);
        Arc::new(Self {
            identity: ca.enrolment_agent("one"),
            ca,
            token,
            life: Mutex::new(life),
            lose: AtomicU32::new(0),
            renew_first: AtomicU32::new(0),
            enrolments: AtomicU32::new(0),
            renewals: AtomicU32::new(0),
            keys: Mutex::default(),
            ahead,
        })
    }

    /// Opens the port; returns its address.
    pub fn open(self: &Arc<Self>) -> String {
        let listener = std::net::TcpListener::bind(SocketAddr::from(([127, 0, 0, 1], 0))).unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let (identity, roots) = (Arc::clone(&self.identity), self.ca.roots());
        let tls = agent_tls(identity, roots, clock(), ClientAuth::OptionalMayBeExpired);
        let port = TlsPort::from_std(listener, tls).unwrap();
        let service = EnrolmentServer::new(Port(Arc::clone(self)))
            .map_request(|request: http::Request<hyper::body::Incoming>| request.map(tonic::body::Body::new));
        let serving = serve(port, service, ServeLimits::default(), Connections::new(), Drain::new());
        tokio::spawn(serving.map(drop));
        address
    }

    fn certificate(&self, csr: &[u8]) -> CertificateResponse {
        self.keys.lock().unwrap().push(fleet_kms_identity::Csr::from_der(csr).unwrap().spki_der().to_vec());
        let life = *self.life.lock().unwrap();
        CertificateResponse {
            chain: self.ca.certify(csr, "cp-1", life),
            roots: vec![self.ca.root_der()],
            agents: Vec::new(),
        }
    }
}

struct Port(Arc<Desk>);

#[tonic::async_trait]
impl Enrolment for Port {
    async fn enrol(&self, request: Request<EnrolRequest>) -> Result<Response<CertificateResponse>, Status> {
        let desk = &self.0;
        desk.enrolments.fetch_add(1, Ordering::SeqCst);
        let request = request.into_inner();
        if request.token != desk.token.expose_secret() {
            return Err(refused("token_unknown"));
        }
        if request.node.is_empty() {
            return Err(refused("token_node_missing"));
        }
        let answer = desk.certificate(&request.csr);
        let is_lost = |left: u32| left.checked_sub(1);
        if desk.lose.fetch_update(Ordering::SeqCst, Ordering::SeqCst, is_lost).is_ok() {
            return Err(Status::unavailable("lost on the way"));
        }
        Ok(Response::new(answer))
    }

    async fn renew(&self, request: Request<RenewRequest>) -> Result<Response<CertificateResponse>, Status> {
        let peer = request.extensions().get::<Arc<fleet_kms_transport::PeerInfo>>().unwrap();
        if peer.certificate.is_none() {
            return Err(refused("no_certificate"));
        }
        self.0.renewals.fetch_add(1, Ordering::SeqCst);
        Ok(Response::new(self.0.certificate(&request.into_inner().csr)))
    }

    async fn time(&self, request: Request<TimeRequest>) -> Result<Response<TimeResponse>, Status> {
        let desk = &self.0;
        let is_left = |left: u32| left.checked_sub(1);
        if desk.renew_first.fetch_update(Ordering::SeqCst, Ordering::SeqCst, is_left).is_ok() {
            desk.ca.renew_enrolment_agent(&desk.identity, "one");
        }
        let now = SystemTime::now() + desk.ahead;
        let since = now.duration_since(SystemTime::UNIX_EPOCH).unwrap();
        let unix_ms = u64::try_from(since.as_millis()).unwrap();
        let live = desk.identity.live_key_sha256();
        let nonce = request.into_inner().nonce;
        let signed =
            [b"fleet-kms/time/1", nonce.as_slice(), &unix_ms.to_be_bytes(), live.as_slice()].concat();
        Ok(Response::new(TimeResponse {
            unix_ms,
            live_key_sha256: live.to_vec(),
            signature: desk.ca.sign(&signed),
            issuers: vec![desk.ca.issuing_der()],
        }))
    }
}

fn refused(reason: &'static str) -> Status {
    let mut status = Status::permission_denied("no");
    status.metadata_mut().insert("fleet-kms-reason", MetadataValue::from_static(reason));
    status
}
