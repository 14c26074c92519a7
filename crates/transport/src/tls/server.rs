//! The agent's side of TLS: who may open a connection to which port.
//!
//! The data and admin ports take nobody without a valid client certificate of the fleet. The enrolment port also takes
//! peers without one, and judges an expired chain by its signatures alone: such a peer stands `Expired`, and only
//! renewal has a use for that.

use std::{fmt, net::SocketAddr, sync::Arc};

use fleet_kms_identity::{Certificate, Standing};
use rustls::{
    DigitallySignedStruct, DistinguishedName, ServerConfig, ServerConnection, SignatureScheme,
    client::danger::HandshakeSignatureValid,
    crypto::{verify_tls12_signature, verify_tls13_signature},
    server::{
        NoServerSessionStorage,
        danger::{ClientCertVerified, ClientCertVerifier},
    },
};
use rustls_pki_types::{CertificateDer, UnixTime};

use super::{
    H2, HTTP1, LiveIdentity, Roots, TlsError,
    error::CertificateRefused,
    provider,
    verify::{Dates, judge_chain},
};
use crate::{
    clock::{Clock, RustlsClock, system_time, unix_time},
    peer::PeerInfo,
};

/// What a port asks of its clients.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ClientAuth {
    /// A valid certificate of the fleet: data and admin port.
    Required,
    /// None, or one of the fleet that may be expired: enrolment port.
    OptionalMayBeExpired,
}

/// The TLS settings of one port. Identity and roots in it are live.
#[derive(Clone)]
pub struct ServerTls {
    pub(crate) config: Arc<ServerConfig>,
    verifier: Arc<FleetClientVerifier>,
    clock: Clock,
}

/// Makes the TLS settings of a port of the agent; it speaks HTTP/2.
pub fn agent_tls(
    identity: Arc<LiveIdentity>,
    roots: Arc<Roots>,
    clock: Clock,
    auth: ClientAuth,
) -> ServerTls {
    let verifier = Arc::new(FleetClientVerifier { roots, auth });
    let mut config =
        ServerConfig::builder_with_details(provider(), Arc::new(RustlsClock(Arc::clone(&clock))))
            .with_protocol_versions(&[&rustls::version::TLS13])
            .expect("the provider has suites and groups of TLS 1.3")
            .with_client_cert_verifier(Arc::clone(&verifier) as Arc<dyn ClientCertVerifier>)
            .with_cert_resolver(identity);
    config.alpn_protocols = vec![H2.to_vec()];
    // A resumed session would skip new roots.
    config.session_storage = Arc::new(NoServerSessionStorage {});
    config.send_tls13_tickets = 0;
    ServerTls { config: Arc::new(config), verifier, clock }
}

impl ServerTls {
    /// Speaks HTTP/1.1 too: the admin port.
    #[must_use]
    pub fn with_http1(mut self) -> Self {
        Arc::make_mut(&mut self.config).alpn_protocols = vec![H2.to_vec(), HTTP1.to_vec()];
        self
    }

    /// Reads who the peer of a finished handshake is.
    pub(crate) fn peer(
        &self,
        connection: &ServerConnection,
        address: SocketAddr,
    ) -> Result<PeerInfo, TlsError> {
        let Some((leaf, issuers)) = connection.peer_certificates().and_then(<[_]>::split_first) else {
            return Ok(PeerInfo { certificate: None, standing: Standing::Valid, address });
        };
        let standing = match self.verifier.auth {
            // The handshake let nothing else pass.
            ClientAuth::Required => Standing::Valid,
            ClientAuth::OptionalMayBeExpired => {
                self.verifier.judge(leaf, issuers, unix_time((self.clock)()))?
            }
        };
        let certificate = Certificate::from_der(leaf).map_err(CertificateRefused::Form)?;
        Ok(PeerInfo { certificate: Some(certificate), standing, address })
    }
}

impl fmt::Debug for ServerTls {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ServerTls").field("auth", &self.verifier.auth).finish_non_exhaustive()
    }
}

#[derive(Debug)]
struct FleetClientVerifier {
    roots: Arc<Roots>,
    auth: ClientAuth,
}

impl FleetClientVerifier {
    fn judge(
        &self,
        leaf: &CertificateDer<'_>,
        issuers: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<Standing, rustls::Error> {
        let roots = self.roots.current();
        let dates = match self.auth {
            ClientAuth::Required => Dates::Judged,
            ClientAuth::OptionalMayBeExpired => Dates::Clamped,
        };
        let standing = judge_chain(leaf, issuers, system_time(now), dates, |moment| {
            roots.clients.verify_client_cert(leaf, issuers, unix_time(moment)).map(drop)
        })?;
        let certificate = Certificate::from_der(leaf).map_err(CertificateRefused::Form)?;
        // webpki takes a leaf without any extended key usage for one with all of them.
        if !certificate.has_client_auth() {
            return Err(CertificateRefused::NoClientAuth(certificate.id().clone()).into());
        }
        Ok(standing)
    }
}

impl ClientCertVerifier for FleetClientVerifier {
    fn client_auth_mandatory(&self) -> bool {
        self.auth == ClientAuth::Required
    }

    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        // Every client has one identity; hints would have to change with the roots.
        &[]
    }

    fn verify_client_cert(
        &self,
        leaf: &CertificateDer<'_>,
        issuers: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, rustls::Error> {
        self.judge(leaf, issuers, now).map(|_| ClientCertVerified::assertion())
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
