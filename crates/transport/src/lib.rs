//! How fleet-kms talks: TLS that reloads, the one connection loop that serves every port, drain, deadlines, and the
//! connector of a link.
//!
//! This is the only crate of the workspace that names rustls. It proves who the peer is and hands that on; what the
//! peer may do is decided elsewhere, per call. It never trusts on first use, never resumes a TLS session (a resumed
//! session would skip new roots), and reads the wall clock only through the [`Clock`] that it is given.

mod clock;
mod peer;
mod tls;
mod listener;
mod drain;
mod serve;
pub mod deadline;
mod connect;

pub use clock::Clock;
pub use connect::{
    ConnectError, ConnectOptions, Driver, Link, LinkEnd, LinkError, LinkService, Stage, Whose, connect,
};
pub use drain::Drain;
pub use listener::{Accepted, Listener, TcpPort, TlsPort, UnixPort};
pub use peer::{Peer, PeerInfo, UnixPeer};
pub use serve::{ConnectionEvent, Connections, Observer, Protocol, Refusal, ServeLimits, serve};
pub use tls::{
    CertificateRefused, ClientAuth, ClientTls, LiveIdentity, LiveIdentityError, Roots, RootsError, ServerTls,
    TlsError, agent_client_tls, agent_tls, first_contact_tls,
};
