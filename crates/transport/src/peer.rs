//! Who is at the other end of a connection, as every request on it carries it in its extensions.

use std::{net::SocketAddr, sync::Arc};

use fleet_kms_identity::{Certificate, Standing};
use tokio::net::unix::UCred;

/// The peer of a TCP or TLS connection; requests carry it as `Arc<PeerInfo>`.
#[derive(Clone, Debug)]
pub struct PeerInfo {
    /// The certificate that the peer proved to hold; `None` when it showed none (which only some ports allow).
    pub certificate: Option<Certificate>,
    /// How the dates of the certificate and its chain stood at the handshake; only the enrolment port lets anything but
    /// `Valid` in, and it says nothing without a certificate.
    pub standing: Standing,
    /// The peer's address.
    pub address: SocketAddr,
}

/// The process at the other end of a unix socket; requests carry it as it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct UnixPeer {
    /// The user that connected.
    pub uid: u32,
    /// The process that connected, where the kernel tells.
    pub pid: Option<i32>,
}

impl From<UCred> for UnixPeer {
    fn from(credentials: UCred) -> Self {
        Self { uid: credentials.uid(), pid: credentials.pid() }
    }
}

/// The peer of any connection.
#[derive(Clone, Debug)]
pub enum Peer {
    /// Over TCP, with or without TLS.
    Network(Arc<PeerInfo>),
    /// Over a unix socket.
    Unix(UnixPeer),
}

impl Peer {
    /// Puts the peer where handlers look for it.
    pub(crate) fn insert_into(&self, extensions: &mut http::Extensions) {
        match self {
            Self::Network(peer) => drop(extensions.insert(Arc::clone(peer))),
            Self::Unix(peer) => drop(extensions.insert(*peer)),
        }
    }

    /// Returns the peer of a network connection.
    pub(crate) fn network(&self) -> Option<&PeerInfo> {
        match self {
            Self::Network(peer) => Some(peer),
            Self::Unix(_) => None,
        }
    }
}
