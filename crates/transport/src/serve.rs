//! The one connection loop: every port of every program is served by [`serve`].
//!
//! Each connection holds a place in the limits for its whole life, from `accept` on, and ends by its age (GOAWAY, then
//! grace), by a drain, by its peer, or at once by [`Connections::close_where`]. The loop itself never waits for a peer
//! and never gives up: an accept error costs 50 ms. It is not `tonic::transport::Server`, which cuts live calls at the
//! age, spins on accept errors and has no handle to close a banned peer.

mod places;
mod connections;
mod connection;
mod prompt;

use std::{error::Error as StdError, net::IpAddr, sync::Arc, time::Duration};

use hyper::body::Incoming;
use thiserror::Error;
use tokio::time::{sleep, timeout};
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tower_service::Service;

pub use connections::{ConnectionEvent, Connections, Observer};

use crate::{
    drain::Drain,
    listener::{Accepted, Listener},
    tls::TlsError,
};
use connection::ConnectionHttp;
use places::{Place, Places};

/// How long the loop rests after an accept error: EMFILE stays until something else closes a file.
const ACCEPT_BACKOFF: Duration = Duration::from_millis(50);

/// Any error, as hyper takes it.
type BoxError = Box<dyn StdError + Send + Sync>;

/// Which HTTP a connection speaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Protocol {
    /// HTTP/2 from the first byte.
    Http2,
    /// HTTP/1.1.
    Http1,
    /// What the first bytes say: ports without ALPN.
    Auto,
}

/// The limits of one port.
#[derive(Clone, Debug)]
pub struct ServeLimits {
    /// Connections at a time, handshakes included; one more is closed at once, so that its peer can go elsewhere.
    pub max_connections: usize,
    /// Connections at a time of one source, an IPv4 address or an IPv6 /64.
    pub max_connections_per_source: usize,
    /// Connections at a time of one identity on this port. A node has one link to each agent, and during a change of
    /// its certificate two; what is cut off without a word is noticed by the pings.
    pub max_connections_per_identity: usize,
    /// The age at which a connection gets GOAWAY, give or take a tenth.
    pub age: Duration,
    /// How long calls in flight may take after GOAWAY.
    pub grace: Duration,
    /// How long a drain may take in all.
    pub drain: Duration,
    /// Streams at a time of one connection. Also how many of them the peer may reset before they are accepted: with
    /// h2's 20, a client that cancels its calls after a pause loses its connection.
    pub max_streams: u32,
    /// Bytes that the peer may send on one stream before a handler reads them.
    pub stream_window: u32,
    /// Bytes that the peer may send on all streams together before handlers read them: what a connection whose calls
    /// wait may cost in memory.
    pub connection_window: u32,
    /// How long a handshake, the wait for its turn, and the first bytes after it may take, each.
    pub handshake: Duration,
    /// Handshakes at a time.
    pub handshakes: usize,
    /// Handshakes at a time of one source.
    pub handshakes_per_source: usize,
    /// How often a silent peer is pinged.
    pub ping_interval: Duration,
    /// How long a ping may go unanswered.
    pub ping_timeout: Duration,
}

impl Default for ServeLimits {
    fn default() -> Self {
        Self {
            // 3,000 nodes with two links each, and room.
            max_connections: 10_000,
            max_connections_per_source: 10_000,
            max_connections_per_identity: 16,
            age: Duration::from_secs(60 * 60),
            // The longest deadline of a call.
            grace: crate::deadline::LONGEST,
            drain: Duration::from_secs(10),
            max_streams: 1_024,
            // The smallest of HTTP/2 for a stream (RFC 9113, 6.5.2), and 16 of them.
            stream_window: 65_535,
            connection_window: 1 << 20,
            handshake: Duration::from_secs(5),
            handshakes: 512,
            handshakes_per_source: 8,
            ping_interval: Duration::from_secs(30),
            ping_timeout: Duration::from_secs(10),
        }
    }
}

/// Why a connection came to no call.
#[derive(Debug, Error)]
pub enum Refusal {
    /// The port has as many connections as it may.
    #[error("the port is full")]
    Full,
    /// The source has as many connections, or waiting handshakes, as it may.
    #[error("the source has too many connections")]
    SourceFull,
    /// The identity has as many connections to this port as it may.
    #[error("the identity has too many connections")]
    IdentityFull,
    /// The handshake, or its turn, did not come in time.
    #[error("the handshake took too long")]
    Timeout,
    /// The handshake failed.
    #[error("the handshake failed")]
    Handshake(#[source] TlsError),
}

impl Refusal {
    /// Returns the closed label for metrics and audit.
    pub fn label(&self) -> &'static str {
        match self {
            Self::Full => "port_full",
            Self::SourceFull => "source_full",
            Self::IdentityFull => "identity_full",
            Self::Timeout => "timeout",
            Self::Handshake(error) => error.label(),
        }
    }

    /// Tells whether this side turned the peer away; otherwise the peer went, or the network failed.
    pub fn is_denial(&self) -> bool {
        match self {
            Self::Full | Self::SourceFull | Self::IdentityFull | Self::Timeout => true,
            Self::Handshake(error) => error.is_denial(),
        }
    }
}

/// Serves `listener` until `drain`, and returns when the last connection has ended, at most `limits.drain` after it.
///
/// Every connection gets a clone of `service`; requests carry their peer ([`PeerInfo`](crate::PeerInfo) in an `Arc`, or
/// [`UnixPeer`](crate::UnixPeer)) in their extensions. Several loops may share one `connections`. Dropping the future
/// closes everything at once.
pub async fn serve<L, S, B>(
    mut listener: L,
    service: S,
    limits: ServeLimits,
    connections: Connections,
    drain: Drain,
) where
    L: Listener,
    S: Service<http::Request<Incoming>, Response = http::Response<B>> + Clone + Send + 'static,
    S::Future: Send + 'static,
    S::Error: Into<BoxError>,
    B: http_body::Body + Send + 'static,
    B::Data: Send,
    B::Error: Into<BoxError>,
{
    let close_all = CancellationToken::new();
    let _closes_when_dropped = close_all.clone().drop_guard();
    let tasks = TaskTracker::new();
    let port = Port {
        http: ConnectionHttp::new(&limits),
        places: Places::new(&limits),
        close_all: close_all.clone(),
        limits: Arc::new(limits),
        connections,
        drain,
    };
    loop {
        let accepted = tokio::select! {
            biased;
            () = port.drain.drained() => break,
            accepted = listener.accept() => accepted,
        };
        match accepted {
            Ok(Accepted { source, handshake }) => match port.places.take(source) {
                Ok(place) => drop(tasks.spawn(port.clone().run(place, source, handshake, service.clone()))),
                Err(refusal) => port.connections.refused(source, &refusal),
            },
            Err(error) => {
                port.connections.report(&ConnectionEvent::AcceptFailed(&error));
                sleep(ACCEPT_BACKOFF).await;
            }
        }
    }
    drop(listener);
    tasks.close();
    if timeout(port.limits.drain, tasks.wait()).await.is_err() {
        close_all.cancel();
        tasks.wait().await;
    }
}

/// What all connections of one port share.
#[derive(Clone)]
struct Port {
    limits: Arc<ServeLimits>,
    http: ConnectionHttp,
    places: Places,
    connections: Connections,
    drain: Drain,
    close_all: CancellationToken,
}

impl Port {
    /// Runs one connection from its handshake to its end.
    async fn run<Io, S, B>(
        self,
        mut place: Place,
        source: Option<IpAddr>,
        handshake: Handshake<Io>,
        service: S,
    ) where
        Io: tokio::io::AsyncRead + tokio::io::AsyncWrite + Send + Unpin + 'static,
        S: Service<http::Request<Incoming>, Response = http::Response<B>> + Clone + Send + 'static,
        S::Future: Send + 'static,
        S::Error: Into<BoxError>,
        B: http_body::Body + Send + 'static,
        B::Data: Send,
        B::Error: Into<BoxError>,
    {
        let established = tokio::select! {
            biased;
            () = self.close_all.cancelled() => return,
            // Who has not got in yet is not worth waiting for.
            () = self.drain.drained() => return,
            established = place.handshake(self.limits.handshake, handshake) => established,
        };
        let (io, peer, protocol) = match established {
            Ok(established) => established,
            Err(refusal) => return self.connections.refused(source, &refusal),
        };
        let entry = match self.connections.enter(peer, self.limits.max_connections_per_identity) {
            Ok(entry) => entry,
            Err(refusal) => return self.connections.refused(source, &refusal),
        };
        let life = connection::Life {
            age: jittered(self.limits.age, entry.number()),
            grace: self.limits.grace,
            first_bytes: self.limits.handshake,
            drain: &self.drain,
        };
        tokio::select! {
            biased;
            () = self.close_all.cancelled() => {}
            () = entry.closed() => {}
            () = self.http.run(io, protocol, entry.peer(), service, life) => {}
        }
    }
}

type Handshake<Io> =
    futures_util::future::BoxFuture<'static, Result<(Io, crate::peer::Peer, Protocol), TlsError>>;

/// Spreads ages over nine to eleven tenths, so that connections that began together do not all come back together.
///
/// The golden ratio's multiples spread evenly over any run of numbers; no generator is needed.
fn jittered(age: Duration, number: u64) -> Duration {
    let part = number.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 32;
    let fifth = age / 5;
    let nanos = (fifth.as_nanos() * u128::from(part)) >> 32;
    (age - age / 10).saturating_add(Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ages_are_spread_over_a_tenth_either_way() {
        let age = Duration::from_secs(3_600);
        let ages: Vec<_> = (0..100).map(|number| jittered(age, number)).collect();
        let (least, most) = (ages.iter().min().unwrap(), ages.iter().max().unwrap());
        assert!(*least >= age - age / 10 && *most <= age + age / 10);
        assert!(*most - *least > age / 6, "{least:?}..{most:?}");
    }
}
