//! The side that talks to an agent: sidecar, `kmsctl`, another agent.
//!
//! An agent is whoever chains to the pinned root, has exactly one URI name `…/agent/*` of our trust domain and carries
//! serverAuth. DNS and IP names are never looked at. Attacks: rustls' own verifier would demand host names, or let any
//! certificate of the fleet pose as the agent; trust on first use would take whoever answers first.

use std::{fmt, net::SocketAddr, sync::Arc};

use fleet_kms_identity::{Certificate, Standing, TrustDomain, fingerprint};
use rustls::{
    ClientConfig, ClientConnection, DigitallySignedStruct, RootCertStore, SignatureScheme,
    client::{
        Resumption, WantsClientCert,
        danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
        verify_server_cert_signed_by_trust_anchor,
    },
    crypto::{verify_tls12_signature, verify_tls13_signature},
    server::ParsedCertificate,
};
use rustls_pki_types::{CertificateDer, ServerName, UnixTime};

use super::{
    H2, LiveIdentity, Roots, TlsError,
    error::CertificateRefused,
    provider,
    verify::{Dates, judge_chain},
};
use crate::{
    clock::{Clock, RustlsClock, system_time, unix_time},
    peer::PeerInfo,
};

/// How a client speaks TLS to an agent. Identity and roots in it are live.
#[derive(Clone)]
pub struct ClientTls {
    pub(crate) config: Arc<ClientConfig>,
    identity: Option<Arc<LiveIdentity>>,
    verifier: Arc<AgentVerifier>,
    clock: Clock,
}

/// Talks to the agents of `trust_domain` that chain to `roots`, showing `identity` if there is one.
pub fn agent_client_tls(
    identity: Option<Arc<LiveIdentity>>,
    roots: Arc<Roots>,
    clock: Clock,
    trust_domain: TrustDomain,
) -> ClientTls {
    let trust = Trust::Pinned { roots, trust_domain };
    ClientTls::new(identity, AgentVerifier { trust, dates: Dates::Judged }, clock)
}

/// Talks to an agent of which nothing is known but the SHA-256 of its root certificate, from a join token.
///
/// The agent shows its root in its chain, and the whole chain must verify up to it; the link then names the root to pin.
pub fn first_contact_tls(root_sha256: [u8; 32], clock: Clock) -> ClientTls {
    let trust = Trust::Fingerprint(root_sha256);
    ClientTls::new(None, AgentVerifier { trust, dates: Dates::Judged }, clock)
}

impl ClientTls {
    /// Forgives the dates of the agent's chain, and nothing else. Only for asking the time: the answer proves itself.
    #[must_use]
    pub fn ignoring_dates(self) -> Self {
        let verifier = AgentVerifier { trust: self.verifier.trust.clone(), dates: Dates::Clamped };
        Self::new(self.identity, verifier, self.clock)
    }

    fn new(identity: Option<Arc<LiveIdentity>>, verifier: AgentVerifier, clock: Clock) -> Self {
        let verifier = Arc::new(verifier);
        let builder: rustls::ConfigBuilder<ClientConfig, WantsClientCert> =
            ClientConfig::builder_with_details(provider(), Arc::new(RustlsClock(Arc::clone(&clock))))
                .with_protocol_versions(&[&rustls::version::TLS13])
                .expect("the provider has suites and groups of TLS 1.3")
                .dangerous()
                .with_custom_certificate_verifier(Arc::clone(&verifier) as Arc<dyn ServerCertVerifier>);
        let mut config = match &identity {
            Some(identity) => builder.with_client_cert_resolver(Arc::clone(identity) as _),
            None => builder.with_no_client_auth(),
        };
        config.alpn_protocols = vec![H2.to_vec()];
        config.resumption = Resumption::disabled();
        config.enable_sni = false;
        Self { config: Arc::new(config), identity, verifier, clock }
    }

    /// The name that rustls wants to be told; it is neither sent nor checked.
    pub(crate) fn server_name() -> ServerName<'static> {
        ServerName::try_from("agent.invalid").expect("a DNS name")
    }

    /// Reads who the agent of a finished handshake is, and the root that the first contact learnt.
    pub(crate) fn agent(
        &self,
        connection: &ClientConnection,
        address: SocketAddr,
    ) -> Result<(PeerInfo, Option<CertificateDer<'static>>), TlsError> {
        let (leaf, issuers) =
            connection.peer_certificates().and_then(<[_]>::split_first).ok_or(TlsError::NoCertificate)?;
        let (certificate, standing) = match self.verifier.dates {
            Dates::Judged => {
                (Certificate::from_der(leaf).map_err(CertificateRefused::Form)?, Standing::Valid)
            }
            Dates::Clamped => self.verifier.judge(leaf, issuers, unix_time((self.clock)()))?,
        };
        let root = match &self.verifier.trust {
            Trust::Fingerprint(sha256) => {
                root_with(*sha256, issuers).cloned().map(CertificateDer::into_owned)
            }
            Trust::Pinned { .. } => None,
        };
        Ok((PeerInfo { certificate: Some(certificate), standing, address }, root))
    }
}

impl fmt::Debug for ClientTls {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ClientTls").field("verifier", &self.verifier).finish_non_exhaustive()
    }
}

#[derive(Clone, Debug)]
enum Trust {
    Pinned { roots: Arc<Roots>, trust_domain: TrustDomain },
    Fingerprint([u8; 32]),
}

#[derive(Debug)]
struct AgentVerifier {
    trust: Trust,
    dates: Dates,
}

impl AgentVerifier {
    fn judge(
        &self,
        leaf: &CertificateDer<'_>,
        issuers: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<(Certificate, Standing), rustls::Error> {
        let anchors = self.anchors(issuers)?;
        let parsed = ParsedCertificate::try_from(leaf)?;
        let algorithms = provider().signature_verification_algorithms.all;
        let standing = judge_chain(leaf, issuers, system_time(now), self.dates, |moment| {
            verify_server_cert_signed_by_trust_anchor(
                &parsed,
                &anchors,
                issuers,
                unix_time(moment),
                algorithms,
            )
        })?;
        let certificate = Certificate::from_der(leaf).map_err(CertificateRefused::Form)?;
        self.must_be_agent(&certificate)?;
        Ok((certificate, standing))
    }

    fn anchors(&self, issuers: &[CertificateDer<'_>]) -> Result<Arc<RootCertStore>, rustls::Error> {
        match &self.trust {
            Trust::Pinned { roots, .. } => Ok(Arc::clone(&roots.current().anchors)),
            Trust::Fingerprint(sha256) => {
                let root = root_with(*sha256, issuers).ok_or(CertificateRefused::OtherRoot)?;
                let mut anchors = RootCertStore::empty();
                anchors.add(root.clone().into_owned())?;
                Ok(Arc::new(anchors))
            }
        }
    }

    fn must_be_agent(&self, certificate: &Certificate) -> Result<(), CertificateRefused> {
        let id = certificate.id();
        if !id.subject.is_agent() {
            return Err(CertificateRefused::NotAnAgent(id.clone()));
        }
        if let Trust::Pinned { trust_domain, .. } = &self.trust
            && *trust_domain != id.trust_domain
        {
            return Err(CertificateRefused::OtherTrustDomain(id.clone()));
        }
        // webpki takes a leaf without any extended key usage for one with all of them.
        if !certificate.has_server_auth() {
            return Err(CertificateRefused::NoServerAuth(id.clone()));
        }
        Ok(())
    }
}

impl ServerCertVerifier for AgentVerifier {
    fn verify_server_cert(
        &self,
        leaf: &CertificateDer<'_>,
        issuers: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        self.judge(leaf, issuers, now).map(|_| ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls12_signature(message, certificate, signature, &provider().signature_verification_algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(message, certificate, signature, &provider().signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        provider().signature_verification_algorithms.supported_schemes()
    }
}

/// Returns the certificate of the chain that has the pinned fingerprint.
fn root_with<'a, 'b>(sha256: [u8; 32], issuers: &'b [CertificateDer<'a>]) -> Option<&'b CertificateDer<'a>> {
    issuers.iter().find(|issuer| fingerprint(issuer) == sha256)
}
