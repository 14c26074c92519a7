//! A member of a fleet in this process: a real identity that speaks to the agent's ports without a sidecar in between,
//! for tests that need many of them, or that show what no sidecar would.

use std::net::IpAddr;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, anyhow};
use fleet_kms_identity::{Certificate, JoinToken, KeyPair, TrustDomain, split_pem_chain};
use fleet_kms_process::clock;
use fleet_kms_proto::agent::data_plane_client::DataPlaneClient;
use fleet_kms_proto::agent::enrolment_client::EnrolmentClient;
use fleet_kms_proto::agent::unwrap_item::Outcome;
use fleet_kms_proto::agent::{
    CertificateResponse, EnrolRequest, RenewRequest, StatusRequest, UnwrapRequest, WrapRequest,
};
use fleet_kms_transport::{
    ClientTls, ConnectOptions, Driver, LinkEnd, LinkService, LiveIdentity, Roots, agent_client_tls, connect,
    first_contact_tls,
};
use rustls_pki_types::CertificateDer;
use tokio::task::JoinHandle;
use tokio_util::task::AbortOnDropHandle;
use tonic::Status;

use crate::fleet::{Ports, TRUST_DOMAIN};

/// A call may take so long on a machine that is busy with all other tests.
const PATIENCE: Duration = Duration::from_secs(60);

/// An identity: certificate chain, its key, and the roots to judge agents by.
pub struct Member {
    /// Leaf first, then issuing CAs.
    pub chain: Vec<CertificateDer<'static>>,
    /// The leaf's key.
    pub key: Arc<KeyPair>,
    /// The fleet's roots.
    pub roots: Vec<CertificateDer<'static>>,
}

/// A connection that the agent let in.
pub struct Connected<C> {
    /// Makes calls.
    pub client: C,
    /// Ends with the connection.
    pub ended: AbortOnDropHandle<LinkEnd>,
}

impl Member {
    /// Enrols with a token, for a new key.
    ///
    /// # Errors
    /// What the agent says.
    pub async fn enrol(ports: Ports, token: &str, node: &str) -> anyhow::Result<Self> {
        let key = KeyPair::generate()?;
        let answer = enrol_for(ports, token, node, key.csr_der()?).await?;
        Ok(Self::from_answer(answer, key))
    }

    /// Reads the identity of a node's directory.
    ///
    /// # Errors
    /// When a file is missing or broken.
    pub fn of_node(identity: &Path) -> anyhow::Result<Self> {
        let read = |name: &str| {
            let path = identity.join(name);
            std::fs::read(&path).with_context(|| path.display().to_string())
        };
        let stored = fleet_kms_identity::Directory::open(identity)?.load()?.context("an identity")?;
        let roots = split_pem_chain(&read("roots.pem")?)?;
        Ok(Self { chain: stored.chain, key: Arc::new(stored.key), roots })
    }

    fn from_answer(answer: CertificateResponse, key: KeyPair) -> Self {
        let ders = |ders: Vec<Vec<u8>>| ders.into_iter().map(CertificateDer::from).collect();
        Self { chain: ders(answer.chain), key: Arc::new(key), roots: ders(answer.roots) }
    }

    /// The leaf.
    ///
    /// # Errors
    /// When it is none of a fleet's.
    pub fn certificate(&self) -> anyhow::Result<Certificate> {
        Ok(Certificate::from_der(self.chain.first().context("a leaf")?)?)
    }

    /// How it speaks to agents.
    ///
    /// # Errors
    /// When chain and key do not belong together.
    pub fn tls(&self) -> anyhow::Result<ClientTls> {
        let live = LiveIdentity::new(self.chain.clone(), &self.key)?;
        let trust_domain: TrustDomain = TRUST_DOMAIN.parse()?;
        let roots = Arc::new(Roots::new(self.roots.clone())?);
        Ok(agent_client_tls(Some(Arc::new(live)), roots, Arc::new(clock::now), trust_domain))
    }

    /// Connects to the data port.
    ///
    /// # Errors
    /// When it is not let in.
    pub async fn data(&self, ports: Ports) -> anyhow::Result<Connected<DataPlaneClient<LinkService>>> {
        open(ports.data, &self.tls()?, DataPlaneClient::new).await
    }

    /// Asks for the next certificate, for a new key.
    ///
    /// # Errors
    /// What the agent says; a [`Status`] when it refuses.
    pub async fn renew(&self, ports: Ports) -> anyhow::Result<Self> {
        let key = KeyPair::generate()?;
        let csr = key.csr_der()?;
        Ok(Self::from_answer(self.renew_for(ports, csr).await?, key))
    }

    /// Asks for the next certificate with this request.
    ///
    /// # Errors
    /// As [`Member::renew`].
    pub async fn renew_for(&self, ports: Ports, csr: Vec<u8>) -> anyhow::Result<CertificateResponse> {
        let mut port = open(ports.enrolment, &self.tls()?, EnrolmentClient::new).await?;
        Ok(port.client.renew(RenewRequest { csr }).await?.into_inner())
    }
}

impl Connected<DataPlaneClient<LinkService>> {
    /// Asks for the active version.
    ///
    /// # Errors
    /// What the agent says.
    pub async fn status(&mut self) -> Result<u32, Status> {
        self.client.status(StatusRequest::default()).await.map(|answer| answer.into_inner().version)
    }

    /// Has a DEK wrapped.
    ///
    /// # Errors
    /// What the agent says.
    pub async fn wrap(&mut self, plaintext: &[u8]) -> Result<Vec<u8>, Status> {
        let request = WrapRequest { plaintext: plaintext.to_vec(), key_id: Vec::new() };
        self.client.wrap(request).await.map(|answer| answer.into_inner().wrapped)
    }

    /// Has one wrapped DEK unwrapped.
    ///
    /// # Errors
    /// What the agent says.
    pub async fn unwrap(&mut self, wrapped: &[u8]) -> Result<Outcome, Status> {
        let mut items = self.unwrap_all(vec![wrapped.to_vec()]).await?;
        items.pop().ok_or_else(|| Status::internal("no item"))
    }

    /// Has wrapped DEKs unwrapped.
    ///
    /// # Errors
    /// What the agent says.
    pub async fn unwrap_all(&mut self, wrapped: Vec<Vec<u8>>) -> Result<Vec<Outcome>, Status> {
        let request = UnwrapRequest { wrapped: wrapped.into_iter().map(Into::into).collect() };
        let items = self.client.unwrap(request).await?.into_inner().items;
        items.into_iter().map(|item| item.outcome.ok_or_else(|| Status::internal("no outcome"))).collect()
    }
}

/// Enrols with a token and this request.
///
/// # Errors
/// What the agent says; a [`Status`] when it refuses.
pub async fn enrol_for(
    ports: Ports,
    token: &str,
    node: &str,
    csr: Vec<u8>,
) -> anyhow::Result<CertificateResponse> {
    let token: JoinToken = token.parse()?;
    let mut port = first_contact(ports, &token).await?;
    let request = EnrolRequest { token: token.expose_secret().to_vec(), csr, node: node.to_owned() };
    Ok(port.client.enrol(request).await?.into_inner())
}

async fn first_contact(
    ports: Ports,
    token: &JoinToken,
) -> anyhow::Result<Connected<EnrolmentClient<LinkService>>> {
    let tls = first_contact_tls(*token.root_sha256(), Arc::new(clock::now));
    open(ports.enrolment, &tls, EnrolmentClient::new).await
}

/// Somebody who tries secrets.
pub struct Guesser {
    port: Connected<EnrolmentClient<LinkService>>,
    csr: Vec<u8>,
}

impl Guesser {
    /// Connects; a good token says which root the agent must show.
    ///
    /// # Errors
    /// When there is no connection.
    pub async fn connect(ports: Ports, good: &str) -> anyhow::Result<Self> {
        let csr = KeyPair::generate()?.csr_der()?;
        Ok(Self { port: first_contact(ports, &good.parse()?).await?, csr })
    }

    /// Tries a secret, and returns the refusal.
    ///
    /// # Errors
    /// When the secret was one.
    pub async fn guess(&mut self, guess: u64) -> anyhow::Result<Status> {
        let token = [guess.to_be_bytes(), [7; 8], [8; 8], [9; 8]].concat();
        let request = EnrolRequest { token, csr: self.csr.clone(), node: String::new() };
        match self.port.client.enrol(request).await {
            Err(refused) => Ok(refused),
            Ok(_) => Err(anyhow!("{guess} was a token")),
        }
    }
}

/// Connects to a port of 127.0.0.1.
///
/// # Errors
/// When this side is not let in.
pub async fn open<C>(
    port: u16,
    tls: &ClientTls,
    client: impl FnOnce(LinkService) -> C,
) -> anyhow::Result<Connected<C>> {
    let options = ConnectOptions { timeout: PATIENCE, ..ConnectOptions::default() };
    let link = connect(&format!("127.0.0.1:{port}"), tls, options).await?;
    Ok(Connected { client: client(link.service), ended: AbortOnDropHandle::new(run(link.driver)) })
}

fn run(driver: Driver) -> JoinHandle<LinkEnd> {
    tokio::spawn(driver)
}

/// The agent's reason in an error of [`Member`], or else the whole error.
pub fn reason(error: &anyhow::Error) -> String {
    match error.downcast_ref::<Status>() {
        Some(status) => reason_of(status),
        None => format!("{error:#}"),
    }
}

/// The agent's reason in a refusal, or else the whole status.
pub fn reason_of(status: &Status) -> String {
    let reason = status.metadata().get("fleet-kms-reason").and_then(|reason| reason.to_str().ok());
    reason.map_or_else(|| format!("{status}"), str::to_owned)
}

/// A loopback address that is not the usual one: another source.
pub const ELSEWHERE: IpAddr = IpAddr::V4(std::net::Ipv4Addr::new(127, 0, 0, 2));
