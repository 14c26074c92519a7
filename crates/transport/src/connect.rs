//! The client's side of a link: one connection to one agent, with errors that say what stands in the way.
//!
//! [`connect`] returns only when the agent has answered with HTTP/2, because in TLS 1.3 its refusal of our certificate
//! arrives after our side of the handshake is done: a link that is up has been let in. It retries nothing and keeps
//! nothing; backoff and choice of agent are the caller's.

mod error;
mod first_byte;
mod link;

use std::{net::SocketAddr, time::Duration};

use futures_util::future::FutureExt;
use hyper::client::conn::http2;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use rustls_pki_types::CertificateDer;
use tokio::{
    net::{TcpStream, lookup_host},
    time::{Instant, timeout_at},
};
use tokio_rustls::{TlsConnector, client::TlsStream};

pub use error::{ConnectError, Stage, Whose};
pub use link::{Driver, LinkEnd, LinkError, LinkService};

use crate::{
    peer::PeerInfo,
    tls::{ClientTls, H2, TlsError},
};
use first_byte::FirstByte;

/// Addresses of one name that are tried; the time is shared between them.
const MAX_ADDRESSES: usize = 8;

/// The time limits of a link.
#[derive(Clone, Copy, Debug)]
pub struct ConnectOptions {
    /// For the whole of [`connect`].
    pub timeout: Duration,
    /// How often the agent is pinged, calls or not.
    pub ping_interval: Duration,
    /// How long a ping may go unanswered before the link is down.
    pub ping_timeout: Duration,
}

impl Default for ConnectOptions {
    fn default() -> Self {
        Self {
            timeout: Duration::from_secs(5),
            ping_interval: Duration::from_secs(5),
            ping_timeout: Duration::from_secs(3),
        }
    }
}

/// A connection that the agent has let in.
pub struct Link {
    /// Sends calls; clones share the connection.
    pub service: LinkService,
    /// The agent: its certificate, and its address.
    pub peer: PeerInfo,
    /// The root that a first contact has verified and is to pin.
    pub learnt_root: Option<CertificateDer<'static>>,
    /// Moves the bytes; the link lives while it is polled, and it says why the link ended.
    pub driver: Driver,
}

/// Connects to the agent at `address`, a `host:port`.
///
/// # Errors
///
/// Each variant of [`ConnectError`] is another thing to repair.
pub async fn connect(address: &str, tls: &ClientTls, options: ConnectOptions) -> Result<Link, ConnectError> {
    let end = Instant::now() + options.timeout;
    let (stream, address) = dial(address, end).await?;
    let stream = in_time(end, Stage::Tls, async {
        TlsConnector::from(std::sync::Arc::clone(&tls.config))
            .connect(ClientTls::server_name(), stream)
            .await
            .map_err(|error| ConnectError::from(TlsError::from(error)))
    })
    .await?;
    let (_, session) = stream.get_ref();
    if session.alpn_protocol() != Some(H2) {
        return Err(TlsError::Protocol.into());
    }
    let (peer, learnt_root) = tls.agent(session, address)?;
    let (service, driver) = in_time(end, Stage::Admission, start_http2(stream, options)).await?;
    Ok(Link { service, peer, learnt_root, driver })
}

/// Resolves and opens TCP, one address after the other, each with its share of the time that is left.
async fn dial(address: &str, end: Instant) -> Result<(TcpStream, SocketAddr), ConnectError> {
    let addresses: Vec<SocketAddr> = match address.parse() {
        Ok(address) => vec![address],
        Err(_) => in_time(end, Stage::Dns, async { lookup_host(address).await.map_err(ConnectError::Dns) })
            .await?
            .take(MAX_ADDRESSES)
            .collect(),
    };
    let mut failed =
        ConnectError::Dns(std::io::Error::new(std::io::ErrorKind::NotFound, "the name has no address"));
    for (tried, candidate) in addresses.iter().enumerate() {
        let now = Instant::now();
        let left = u32::try_from(addresses.len() - tried).unwrap_or(u32::MAX);
        let share = now + end.saturating_duration_since(now) / left;
        let opened = in_time(share, Stage::Tcp, async {
            let stream = TcpStream::connect(candidate).await?;
            stream.set_nodelay(true)?;
            Ok(stream)
        });
        match opened.await {
            Ok(stream) => return Ok((stream, *candidate)),
            Err(error) => failed = error,
        }
    }
    Err(failed)
}

/// Waits for the agent's first byte, then begins HTTP/2.
///
/// Until then this side stays silent: bytes that the agent leaves unread when it refuses us would reset the connection,
/// and lose the alert that says why. An agent sends its SETTINGS without waiting (h2's server flushes them first).
async fn start_http2(
    stream: TlsStream<TcpStream>,
    options: ConnectOptions,
) -> Result<(LinkService, Driver), ConnectError> {
    let stream = FirstByte::wait(stream).await.map_err(|error| ConnectError::from(TlsError::from(error)))?;
    let (sender, connection) = http2::Builder::new(TokioExecutor::new())
        .timer(TokioTimer::new())
        .keep_alive_interval(options.ping_interval)
        .keep_alive_timeout(options.ping_timeout)
        .keep_alive_while_idle(true)
        .handshake(TokioIo::new(stream))
        .await
        .map_err(ConnectError::Http2)?;
    let driver = connection.map(|ended| LinkEnd::from(ended.err())).boxed();
    Ok((LinkService::new(sender), driver))
}

async fn in_time<T>(
    end: Instant,
    stage: Stage,
    work: impl Future<Output = Result<T, ConnectError>>,
) -> Result<T, ConnectError> {
    timeout_at(end, work).await.unwrap_or(Err(ConnectError::Timeout(stage)))
}
