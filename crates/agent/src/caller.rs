//! Who is calling: read from the connection, never from the request.

use std::net::SocketAddr;
use std::sync::Arc;

use fleet_kms_identity::{Certificate, SpiffeId, Standing};
use fleet_kms_transport::PeerInfo;

/// A caller with a certificate of this fleet's CA, as TLS verified it.
///
/// Whether the certificate may still be used is for [`crate::authz::Policy`].
#[derive(Debug, Clone)]
pub struct Caller {
    peer: Arc<PeerInfo>,
}

/// The connection showed no certificate.
#[derive(Debug, thiserror::Error)]
#[error("the connection showed no client certificate")]
pub struct NoCertificate;

impl Caller {
    /// Reads the caller off a request's connection.
    ///
    /// # Errors
    ///
    /// When the connection showed no certificate.
    pub fn from_connection(extensions: &http::Extensions) -> Result<Self, NoCertificate> {
        let peer = extensions.get::<Arc<PeerInfo>>().ok_or(NoCertificate)?;
        Self::from_peer(peer)
    }

    /// Reads the caller off a connection's peer.
    ///
    /// # Errors
    ///
    /// When the connection showed no certificate.
    pub fn from_peer(peer: &Arc<PeerInfo>) -> Result<Self, NoCertificate> {
        peer.certificate.as_ref().ok_or(NoCertificate)?;
        Ok(Self { peer: Arc::clone(peer) })
    }

    /// Returns the SPIFFE ID of the certificate.
    pub fn id(&self) -> &SpiffeId {
        self.certificate().id()
    }

    /// Returns the certificate.
    pub fn certificate(&self) -> &Certificate {
        self.peer.certificate.as_ref().expect("from_peer refuses a peer without one")
    }

    /// Says whether the certificate was valid when the connection was made.
    pub fn standing(&self) -> &Standing {
        &self.peer.standing
    }

    /// Returns the address the connection came from.
    pub fn address(&self) -> SocketAddr {
        self.peer.address
    }
}
