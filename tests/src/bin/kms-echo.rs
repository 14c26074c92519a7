//! The floor of a two-hop call: unix socket, then mTLS, with our transport and
//! generated code and nothing else. It answers KMS v1 and wraps nothing: the
//! "agent" returns the bytes it is sent. Only `make bench` uses it.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use anyhow::Context as _;
use clap::Parser;
use fleet_kms_identity::KeyPair;
use fleet_kms_proto::agent::data_plane_client::DataPlaneClient;
use fleet_kms_proto::agent::data_plane_server::{DataPlane, DataPlaneServer};
use fleet_kms_proto::agent::unwrap_item::Outcome;
use fleet_kms_proto::agent::{
    RewrapRequest, RewrapResponse, StatusRequest, StatusResponse, UnwrapItem, UnwrapRequest, UnwrapResponse,
    WrapRequest, WrapResponse,
};
use fleet_kms_proto::v1beta1::key_management_service_server::{
    KeyManagementService, KeyManagementServiceServer,
};
use fleet_kms_proto::v1beta1::{
    DecryptRequest, DecryptResponse, EncryptRequest, EncryptResponse, VersionRequest, VersionResponse,
};
use fleet_kms_sidecar::authority::AuthorityRewrite;
use fleet_kms_transport::{
    ClientAuth, ClientTls, Clock, ConnectOptions, Connections, Drain, LinkService, LiveIdentity, Roots,
    ServeLimits, ServerTls, TlsPort, UnixPort, agent_client_tls, agent_tls, connect, serve,
};
use rcgen::{BasicConstraints, CertificateParams, ExtendedKeyUsagePurpose, IsCa, Issuer, SanType};
use rustls_pki_types::CertificateDer;
use tonic::{Request, Response, Status, async_trait};
use tower::ServiceExt as _;

const CLUSTER: &str = "00000000-0000-4000-8000-000000000001";
const DAY: Duration = Duration::from_secs(86_400);

#[derive(Parser)]
struct Cli {
    /// Where to serve KMS v1.
    #[arg(long)]
    socket: PathBuf,
}

fn main() -> anyhow::Result<()> {
    let Cli { socket } = Cli::parse();
    let (server, client) = tls()?;
    // The same runtimes as the real programs have: the agent's with a worker per core, the sidecar's with one thread.
    let agent = fleet_kms_process::runtime::multi_thread()?;
    let listener = std::net::TcpListener::bind("127.0.0.1:0")?;
    let address = listener.local_addr()?.to_string();
    agent.block_on(async {
        let port = TlsPort::from_std(listener, server)?;
        tokio::spawn(serve(
            port,
            body(DataPlaneServer::new(Echo)),
            limits(),
            Connections::new(),
            Drain::new(),
        ));
        anyhow::Ok(())
    })?;
    let sidecar = fleet_kms_process::runtime::current_thread(1)?;
    sidecar.block_on(async {
        let link = connect(&address, &client, ConnectOptions::default()).await?;
        tokio::spawn(link.driver);
        let service = Plugin(DataPlaneClient::new(link.service));
        let listener = std::os::unix::net::UnixListener::bind(&socket)?;
        let port = UnixPort::from_std(listener, AuthorityRewrite::new)?;
        let service = body(KeyManagementServiceServer::new(service));
        serve(port, service, limits(), Connections::new(), Drain::new()).await;
        anyhow::Ok(())
    })
}

fn limits() -> ServeLimits {
    ServeLimits::default()
}

/// A generated service over hyper's body.
fn body<S>(
    service: S,
) -> impl tower::Service<
    http::Request<hyper::body::Incoming>,
    Response = http::Response<tonic::body::Body>,
    Error = std::convert::Infallible,
    Future: Send + 'static,
> + Clone
+ Send
+ 'static
where
    S: tower::Service<
            http::Request<tonic::body::Body>,
            Response = http::Response<tonic::body::Body>,
            Error = std::convert::Infallible,
            Future: Send + 'static,
        > + Clone
        + Send
        + 'static,
{
    service.map_request(|request: http::Request<hyper::body::Incoming>| request.map(tonic::body::Body::new))
}

#[derive(Clone)]
struct Echo;

#[async_trait]
impl DataPlane for Echo {
    async fn wrap(&self, request: Request<WrapRequest>) -> Result<Response<WrapResponse>, Status> {
        let wrapped = request.into_inner().plaintext;
        Ok(Response::new(WrapResponse { wrapped, key_id: vec![0; 16], version: 1 }))
    }

    async fn unwrap(&self, request: Request<UnwrapRequest>) -> Result<Response<UnwrapResponse>, Status> {
        let items = request.into_inner().wrapped.into_iter();
        let items = items.map(|wrapped| UnwrapItem { outcome: Some(Outcome::Plain(wrapped.to_vec())) });
        Ok(Response::new(UnwrapResponse { items: items.collect() }))
    }

    async fn rewrap(&self, _: Request<RewrapRequest>) -> Result<Response<RewrapResponse>, Status> {
        Err(Status::unimplemented("the echo measures what a sidecar asks for"))
    }

    async fn status(&self, _: Request<StatusRequest>) -> Result<Response<StatusResponse>, Status> {
        Ok(Response::new(StatusResponse::default()))
    }
}

#[derive(Clone)]
struct Plugin(DataPlaneClient<LinkService>);

#[async_trait]
impl KeyManagementService for Plugin {
    async fn version(&self, _: Request<VersionRequest>) -> Result<Response<VersionResponse>, Status> {
        let version = "v1beta1".to_owned();
        Ok(Response::new(VersionResponse { version, ..VersionResponse::default() }))
    }

    async fn decrypt(&self, request: Request<DecryptRequest>) -> Result<Response<DecryptResponse>, Status> {
        let wrapped = vec![request.into_inner().cipher.into()];
        let answer = self.0.clone().unwrap(UnwrapRequest { wrapped }).await?.into_inner();
        match answer.items.into_iter().next().and_then(|item| item.outcome) {
            Some(Outcome::Plain(plain)) => Ok(Response::new(DecryptResponse { plain })),
            Some(Outcome::Refused(_)) | None => Err(Status::internal("the echo did not echo")),
        }
    }

    async fn encrypt(&self, request: Request<EncryptRequest>) -> Result<Response<EncryptResponse>, Status> {
        let plaintext = request.into_inner().plain;
        let wrap = WrapRequest { plaintext, key_id: Vec::new() };
        let cipher = self.0.clone().wrap(wrap).await?.into_inner().wrapped;
        Ok(Response::new(EncryptResponse { cipher }))
    }
}

/// Both sides of a fleet's TLS, with a CA made for this run.
fn tls() -> anyhow::Result<(ServerTls, ClientTls)> {
    let clock: Clock = Arc::new(fleet_kms_process::clock::now);
    let ca_key = rcgen::KeyPair::generate()?;
    let mut ca = CertificateParams::default();
    ca.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let root = ca.self_signed(&ca_key)?;
    let roots = || Roots::new(vec![root.der().clone()]).map(Arc::new);
    let ca = Issuer::new(ca, ca_key);
    let both = [ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
    let agent = identity(&ca, "spiffe://fleet.test/agent/echo", &both)?;
    let node = format!("spiffe://fleet.test/cluster/{CLUSTER}/node/echo");
    let node = identity(&ca, &node, &[ExtendedKeyUsagePurpose::ClientAuth])?;
    let server = agent_tls(agent, roots()?, Arc::clone(&clock), ClientAuth::Required);
    let domain = "fleet.test".parse().context("a trust domain")?;
    Ok((server, agent_client_tls(Some(node), roots()?, clock, domain)))
}

fn identity(
    ca: &Issuer<'_, rcgen::KeyPair>,
    id: &str,
    usages: &[ExtendedKeyUsagePurpose],
) -> anyhow::Result<Arc<LiveIdentity>> {
    let key = KeyPair::generate()?;
    let mut leaf = CertificateParams::default();
    leaf.subject_alt_names = vec![SanType::URI(id.try_into()?)];
    leaf.extended_key_usages = usages.to_vec();
    let now = fleet_kms_process::clock::now();
    leaf.not_before = date(now - DAY);
    leaf.not_after = date(now + DAY);
    leaf.serial_number = Some(vec![0, 0, 0, 0, 0, 0, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9].into());
    let spki = rcgen::SubjectPublicKeyInfo::from_der(&key.spki_der())?;
    let certificate: CertificateDer<'static> = leaf.signed_by(&spki, ca)?.der().clone();
    Ok(Arc::new(LiveIdentity::new(vec![certificate], &key)?))
}

fn date(time: SystemTime) -> time::OffsetDateTime {
    time.into()
}
