//! A caller that keeps its connection, as no command line does: an admin between two calls, a worker at work.

use std::path::Path;
use std::sync::Arc;

use anyhow::Context;
use fleet_kms_identity::{Certificate, JoinToken, KeyPair, TrustDomain, split_pem_chain};
use fleet_kms_process::clock;
use fleet_kms_proto::agent::data_plane_client::DataPlaneClient;
use fleet_kms_proto::agent::enrolment_client::EnrolmentClient;
use fleet_kms_proto::agent::{CertificateResponse, EnrolRequest, RewrapRequest, RewrapResponse, WrapRequest};
use fleet_kms_transport::{
    ClientTls, ConnectOptions, LinkService, LiveIdentity, Roots, agent_client_tls, connect, first_contact_tls,
};
use rustls_pki_types::CertificateDer;
use tokio::runtime::Runtime;
use tonic::Status;
use tower::{Service as _, ServiceExt as _};

use crate::fleet::TRUST_DOMAIN;

/// What a caller proves who it is with.
pub struct Identity {
    /// The certificate.
    pub certificate: Certificate,
    chain: Vec<CertificateDer<'static>>,
    key: KeyPair,
    roots: Vec<CertificateDer<'static>>,
}

/// A caller and its open connection.
pub struct Peer {
    runtime: Runtime,
    service: LinkService,
}

impl Identity {
    /// Reads an admin's files, as `kms-agent` wrote them.
    ///
    /// # Errors
    /// When one is missing or is none.
    pub fn admin(directory: &Path, name: &str) -> anyhow::Result<Self> {
        let read = |file: &str| std::fs::read(directory.join(file)).with_context(|| file.to_owned());
        let chain = split_pem_chain(&read(&format!("{name}.crt"))?)?;
        let key = KeyPair::from_pem(std::str::from_utf8(&read(&format!("{name}.key"))?)?)?;
        Self::new(chain, key, split_pem_chain(&read("roots.crt")?)?)
    }

    /// Reads what `kmsctl worker enrol` has put into a directory.
    ///
    /// # Errors
    /// When a file is missing or is none.
    pub fn directory(directory: &Path) -> anyhow::Result<Self> {
        let read = |file: &str| std::fs::read(directory.join(file)).with_context(|| file.to_owned());
        let key = KeyPair::from_pem(std::str::from_utf8(&read("key.pem")?)?)?;
        Self::new(split_pem_chain(&read("chain.pem")?)?, key, split_pem_chain(&read("roots.pem")?)?)
    }

    /// Exchanges a join token for a certificate.
    ///
    /// # Errors
    /// When the agent refuses.
    pub fn enrol(port: u16, token: &str) -> anyhow::Result<Self> {
        let token: JoinToken = token.trim().parse()?;
        let key = KeyPair::generate()?;
        let request =
            EnrolRequest { token: token.expose_secret().to_vec(), csr: key.csr_der()?, node: String::new() };
        let tls = first_contact_tls(*token.root_sha256(), Arc::new(clock::now));
        let peer = Peer::connect(port, &tls)?;
        let mut client = EnrolmentClient::new(peer.service.clone());
        let answer = peer.runtime.block_on(client.enrol(request))?.into_inner();
        Self::from_answer(answer, key)
    }

    /// Connects to a port of the agent.
    ///
    /// # Errors
    /// When the agent does not let it in.
    pub fn connect(&self, port: u16) -> anyhow::Result<Peer> {
        let live = LiveIdentity::new(self.chain.clone(), &self.key)?;
        let roots = Roots::new(self.roots.clone())?;
        let trust_domain: TrustDomain = TRUST_DOMAIN.parse()?;
        let tls = agent_client_tls(Some(Arc::new(live)), Arc::new(roots), Arc::new(clock::now), trust_domain);
        Peer::connect(port, &tls)
    }

    fn from_answer(answer: CertificateResponse, key: KeyPair) -> anyhow::Result<Self> {
        let ders = |ders: Vec<Vec<u8>>| ders.into_iter().map(CertificateDer::from).collect();
        Self::new(ders(answer.chain), key, ders(answer.roots))
    }

    fn new(
        chain: Vec<CertificateDer<'static>>,
        key: KeyPair,
        roots: Vec<CertificateDer<'static>>,
    ) -> anyhow::Result<Self> {
        let certificate = Certificate::from_der(chain.first().context("a chain without a leaf")?)?;
        Ok(Self { certificate, chain, key, roots })
    }
}

impl Peer {
    fn connect(port: u16, tls: &ClientTls) -> anyhow::Result<Self> {
        let runtime = fleet_kms_process::runtime::multi_thread()?;
        let address = format!("127.0.0.1:{port}");
        let link = runtime.block_on(connect(&address, tls, ConnectOptions::default()))?;
        runtime.spawn(link.driver);
        Ok(Self { runtime, service: link.service })
    }

    /// Asks the admin API for something, and returns the HTTP status.
    ///
    /// # Errors
    /// When the connection is closed.
    pub fn get(&mut self, path: &str) -> anyhow::Result<u16> {
        let request = http::Request::get(format!("https://agent{path}")).body(tonic::body::Body::empty())?;
        let service = &mut self.service;
        let answer = self.runtime.block_on(async { service.ready().await?.call(request).await })?;
        Ok(answer.status().as_u16())
    }

    /// Wraps wrapped DEKs anew.
    ///
    /// # Errors
    /// What the agent answers.
    pub fn rewrap(&self, wrapped: Vec<Vec<u8>>) -> Result<RewrapResponse, Status> {
        let mut client = DataPlaneClient::new(self.service.clone());
        Ok(self.runtime.block_on(client.rewrap(RewrapRequest { wrapped }))?.into_inner())
    }

    /// Wraps a DEK, and returns it wrapped.
    ///
    /// # Errors
    /// What the agent answers.
    pub fn wrap(&self, dek: &[u8]) -> Result<Vec<u8>, Status> {
        let mut client = DataPlaneClient::new(self.service.clone());
        let request = WrapRequest { plaintext: dek.to_vec(), key_id: Vec::new() };
        Ok(self.runtime.block_on(client.wrap(request))?.into_inner().wrapped)
    }

    /// Whether the agent has closed the connection.
    pub fn is_closed(&self) -> bool {
        self.service.is_closed()
    }
}
