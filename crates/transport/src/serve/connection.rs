//! HTTP on one connection, until its peer, its age or a drain ends it.

use std::{
    pin::pin,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use hyper::body::Incoming;
use hyper_util::{
    rt::{TokioExecutor, TokioIo, TokioTimer},
    server::conn::auto,
    service::TowerToHyperService,
};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    time::{sleep, timeout},
};
use tower_service::Service;

use super::{BoxError, Protocol, ServeLimits, prompt::Prompt};
use crate::{drain::Drain, peer::Peer};

/// When a connection ends.
pub(super) struct Life<'a> {
    pub(super) age: Duration,
    pub(super) grace: Duration,
    pub(super) first_bytes: Duration,
    pub(super) drain: &'a Drain,
}

/// hyper's settings, one set per protocol, shared by all connections of a port.
#[derive(Clone)]
pub(super) struct ConnectionHttp {
    http1: Arc<auto::Builder<TokioExecutor>>,
    http2: Arc<auto::Builder<TokioExecutor>>,
    auto: Arc<auto::Builder<TokioExecutor>>,
}

impl ConnectionHttp {
    pub(super) fn new(limits: &ServeLimits) -> Self {
        let builder = || {
            let mut builder = auto::Builder::new(TokioExecutor::new());
            builder.http1().timer(TokioTimer::new()).header_read_timeout(limits.handshake);
            builder
                .http2()
                .timer(TokioTimer::new())
                .max_concurrent_streams(limits.max_streams)
                .initial_stream_window_size(limits.stream_window)
                .initial_connection_window_size(limits.connection_window)
                .max_pending_accept_reset_streams(usize::try_from(limits.max_streams).ok())
                .keep_alive_interval(limits.ping_interval)
                .keep_alive_timeout(limits.ping_timeout);
            builder
        };
        Self {
            http1: Arc::new(builder().http1_only()),
            http2: Arc::new(builder().http2_only()),
            auto: Arc::new(builder()),
        }
    }

    /// Serves the connection to its end. Dropping the future closes it at once.
    pub(super) async fn run<Io, S, B>(
        &self,
        io: Io,
        protocol: Protocol,
        peer: Peer,
        service: S,
        life: Life<'_>,
    ) where
        Io: AsyncRead + AsyncWrite + Send + Unpin + 'static,
        S: Service<http::Request<Incoming>, Response = http::Response<B>> + Clone + Send + 'static,
        S::Future: Send + 'static,
        S::Error: Into<BoxError>,
        B: http_body::Body + Send + 'static,
        B::Data: Send,
        B::Error: Into<BoxError>,
    {
        let builder = match protocol {
            Protocol::Http1 => &self.http1,
            Protocol::Http2 => &self.http2,
            Protocol::Auto => &self.auto,
        };
        let service = TowerToHyperService::new(WithPeer { peer, inner: service });
        let io = TokioIo::new(Prompt::new(io, life.first_bytes));
        let mut connection = pin!(builder.serve_connection(io, service));
        let ended = tokio::select! {
            ended = connection.as_mut() => Some(ended),
            () = life.drain.drained() => None,
            () = sleep(life.age) => None,
        };
        let ended = match ended {
            Some(ended) => Ok(ended),
            None => {
                connection.as_mut().graceful_shutdown();
                timeout(life.grace, connection).await
            }
        };
        match ended {
            Ok(Ok(())) => {}
            Ok(Err(error)) => tracing::debug!(error, "a connection broke"),
            Err(_) => tracing::debug!("a connection outlived its grace and was closed"),
        }
    }
}

/// Puts the peer into the extensions of every request.
#[derive(Clone)]
struct WithPeer<S> {
    peer: Peer,
    inner: S,
}

impl<S, B> Service<http::Request<B>> for WithPeer<S>
where
    S: Service<http::Request<B>>,
{
    type Response = S::Response;
    type Error = S::Error;
    type Future = S::Future;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(context)
    }

    fn call(&mut self, mut request: http::Request<B>) -> S::Future {
        self.peer.insert_into(request.extensions_mut());
        self.inner.call(request)
    }
}
