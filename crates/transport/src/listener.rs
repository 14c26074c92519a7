//! The three kinds of ports, as the connection loop sees them: accept at once, finish the handshake elsewhere.
//!
//! Listeners are bound before the runtime exists (hardening comes between), hence `from_std`. Accepting never waits for
//! a peer: whatever needs the peer's bytes is in the handshake, which the loop runs under its limits.

use std::{
    future::Future, io, net::IpAddr, os::unix::net::UnixListener as StdUnixListener, sync::Arc,
    time::Duration,
};

use fleet_kms_identity::Standing;
use futures_util::future::{BoxFuture, FutureExt};
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt},
    net::{TcpListener, TcpStream, UnixListener, UnixStream},
    time::timeout,
};
use tokio_rustls::{TlsAcceptor, server::TlsStream};

use crate::{
    peer::{Peer, PeerInfo, UnixPeer},
    serve::Protocol,
    tls::{H2, HTTP1, ServerTls, TlsError},
};

/// How long a refused peer may take to read why.
const LINGER: Duration = Duration::from_millis(250);
/// What a refused peer may still have under way: the rest of its certificate flight.
const LINGER_BYTES: u64 = 64 * 1_024;

/// A connection that was accepted, with the handshake still to be done.
pub struct Accepted<Io> {
    /// Where it comes from; `None` for a local peer, which needs no share of the handshakes.
    pub source: Option<IpAddr>,
    /// Does the handshake when polled; dropping it closes the connection.
    pub handshake: BoxFuture<'static, Result<(Io, Peer, Protocol), TlsError>>,
}

/// A port that the connection loop can serve.
pub trait Listener: Send + 'static {
    /// What HTTP is spoken over.
    type Io: AsyncRead + AsyncWrite + Send + Unpin + 'static;

    /// Waits for the next connection. Must be cancel safe.
    ///
    /// # Errors
    ///
    /// What `accept` finds; the loop backs off and goes on.
    fn accept(&mut self) -> impl Future<Output = io::Result<Accepted<Self::Io>>> + Send;
}

/// A port without TLS, for loopback: HTTP/1.1 and HTTP/2.
#[derive(Debug)]
pub struct TcpPort(TcpListener);

impl TcpPort {
    /// Takes a bound listener; needs a runtime.
    ///
    /// # Errors
    ///
    /// When the runtime cannot watch it.
    pub fn from_std(listener: std::net::TcpListener) -> io::Result<Self> {
        listener.set_nonblocking(true)?;
        TcpListener::from_std(listener).map(Self)
    }
}

impl Listener for TcpPort {
    type Io = TcpStream;

    async fn accept(&mut self) -> io::Result<Accepted<TcpStream>> {
        let (stream, address) = self.0.accept().await?;
        let peer = PeerInfo { certificate: None, standing: Standing::Valid, address };
        let handshake = async move {
            stream.set_nodelay(true).map_err(TlsError::Io)?;
            Ok((stream, Peer::Network(Arc::new(peer)), Protocol::Auto))
        };
        Ok(Accepted { source: Some(address.ip()), handshake: handshake.boxed() })
    }
}

/// A unix socket that speaks HTTP/2; `wrap` puts whatever is needed between the socket and HTTP/2.
#[derive(Debug)]
pub struct UnixPort<F> {
    listener: UnixListener,
    wrap: F,
}

impl<F> UnixPort<F> {
    /// Takes a bound listener; needs a runtime.
    ///
    /// # Errors
    ///
    /// When the runtime cannot watch it.
    pub fn from_std(listener: StdUnixListener, wrap: F) -> io::Result<Self> {
        listener.set_nonblocking(true)?;
        Ok(Self { listener: UnixListener::from_std(listener)?, wrap })
    }
}

impl<F, Io> Listener for UnixPort<F>
where
    F: Fn(UnixStream) -> Io + Send + Sync + 'static,
    Io: AsyncRead + AsyncWrite + Send + Unpin + 'static,
{
    type Io = Io;

    async fn accept(&mut self) -> io::Result<Accepted<Io>> {
        let (stream, _) = self.listener.accept().await?;
        let peer = stream.peer_cred().map(UnixPeer::from);
        let io = (self.wrap)(stream);
        let handshake = async move { Ok((io, Peer::Unix(peer.map_err(TlsError::Io)?), Protocol::Http2)) };
        Ok(Accepted { source: None, handshake: handshake.boxed() })
    }
}

/// A port with TLS. Which HTTP it speaks is agreed by ALPN; a peer that names none is refused.
#[derive(Debug)]
pub struct TlsPort {
    listener: TcpListener,
    tls: ServerTls,
}

impl TlsPort {
    /// Takes a bound listener; needs a runtime.
    ///
    /// # Errors
    ///
    /// When the runtime cannot watch it.
    pub fn from_std(listener: std::net::TcpListener, tls: ServerTls) -> io::Result<Self> {
        listener.set_nonblocking(true)?;
        Ok(Self { listener: TcpListener::from_std(listener)?, tls })
    }
}

impl Listener for TlsPort {
    type Io = TlsStream<TcpStream>;

    async fn accept(&mut self) -> io::Result<Accepted<Self::Io>> {
        let (stream, address) = self.listener.accept().await?;
        let tls = self.tls.clone();
        let handshake = async move {
            stream.set_nodelay(true).map_err(TlsError::Io)?;
            let stream = match TlsAcceptor::from(Arc::clone(&tls.config)).accept(stream).into_fallible().await
            {
                Ok(stream) => stream,
                Err((error, stream)) => {
                    linger(stream).await;
                    return Err(TlsError::from(error));
                }
            };
            let (_, session) = stream.get_ref();
            let protocol = match session.alpn_protocol() {
                Some(H2) => Protocol::Http2,
                Some(HTTP1) => Protocol::Http1,
                _ => return Err(TlsError::Protocol),
            };
            let peer = tls.peer(session, address)?;
            Ok((stream, Peer::Network(Arc::new(peer)), protocol))
        };
        Ok(Accepted { source: Some(address.ip()), handshake: handshake.boxed() })
    }
}

/// Lets the peer read the alert: closing with its bytes unread would reset the connection, after which a lost alert is
/// not sent again, and some systems forget one that has arrived.
async fn linger(mut stream: TcpStream) {
    let read_out = async {
        stream.shutdown().await?;
        tokio::io::copy(&mut (&mut stream).take(LINGER_BYTES), &mut tokio::io::sink()).await
    };
    // The peer may be gone already; it is refused either way.
    let _ = timeout(LINGER, read_out).await;
}
