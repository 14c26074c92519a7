//! Calls over a link, as the tower service that tonic's generated clients take.

use std::{
    fmt,
    task::{Context, Poll},
};

use futures_util::future::{BoxFuture, FutureExt};
use http::uri::{Authority, Scheme, Uri};
use hyper::{body::Incoming, client::conn::http2::SendRequest};
use thiserror::Error;
use tower_service::Service;

/// Moves a link's bytes until it ends.
pub type Driver = BoxFuture<'static, LinkEnd>;

/// Sends calls over one link. An error of it is the transport's, never the agent's.
#[derive(Clone)]
pub struct LinkService {
    sender: SendRequest<tonic::body::Body>,
}

impl LinkService {
    pub(super) fn new(sender: SendRequest<tonic::body::Body>) -> Self {
        Self { sender }
    }

    /// Tells whether the link takes no more calls.
    ///
    /// After a GOAWAY with calls still in flight hyper notices at the next call only: that one fails with
    /// [`LinkError::Closed`], unsent.
    pub fn is_closed(&self) -> bool {
        self.sender.is_closed()
    }
}

impl Service<http::Request<tonic::body::Body>> for LinkService {
    type Response = http::Response<Incoming>;
    type Error = LinkError;
    type Future = BoxFuture<'static, Result<http::Response<Incoming>, LinkError>>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), LinkError>> {
        self.sender.poll_ready(context).map_err(LinkError::from)
    }

    fn call(&mut self, mut request: http::Request<tonic::body::Body>) -> Self::Future {
        *request.uri_mut() = absolute(std::mem::take(request.uri_mut()));
        *request.version_mut() = http::Version::HTTP_2;
        self.sender.send_request(request).map(|sent| sent.map_err(LinkError::from)).boxed()
    }
}

impl fmt::Debug for LinkService {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LinkService").field("is_closed", &self.is_closed()).finish()
    }
}

/// Completes what a generated client leaves out. The authority is fixed: an agent is known by its SPIFFE ID.
fn absolute(uri: Uri) -> Uri {
    let mut parts = uri.into_parts();
    parts.scheme = Some(Scheme::HTTPS);
    parts.authority.get_or_insert_with(|| Authority::from_static("agent"));
    parts.path_and_query.get_or_insert_with(|| http::uri::PathAndQuery::from_static("/"));
    Uri::from_parts(parts).expect("scheme, authority and path are all there")
}

/// Why a call over a link got no answer.
#[derive(Debug, Error)]
pub enum LinkError {
    /// The call was not sent: the link is down or draining.
    #[error("the link to the agent is closed")]
    Closed,
    /// The link broke, or the agent reset the call, while it was under way; the agent may have done the work.
    #[error("the link to the agent broke during the call")]
    Broken(#[source] hyper::Error),
}

impl From<hyper::Error> for LinkError {
    fn from(error: hyper::Error) -> Self {
        if error.is_canceled() || error.is_closed() { Self::Closed } else { Self::Broken(error) }
    }
}

/// Why a link ended.
#[derive(Debug, Error)]
pub enum LinkEnd {
    /// The agent drained it, or this side dropped it.
    #[error("the link was closed in order")]
    Closed,
    /// The agent answers no ping: frozen, or cut off.
    #[error("the agent does not answer pings")]
    PingTimeout,
    /// The connection broke.
    #[error("the link broke")]
    Broken(#[source] hyper::Error),
}

impl From<Option<hyper::Error>> for LinkEnd {
    fn from(error: Option<hyper::Error>) -> Self {
        match error {
            None => Self::Closed,
            Some(error) if error.is_timeout() => Self::PingTimeout,
            Some(error) => Self::Broken(error),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Generated clients take whatever is this.
    fn taken_by_generated_clients<S>()
    where
        S: tonic::client::GrpcService<tonic::body::Body> + Clone + Send,
        S::Future: Send,
        S::ResponseBody: http_body::Body<Data = bytes::Bytes> + Send + 'static,
        <S::ResponseBody as http_body::Body>::Error: Into<tonic::codegen::StdError> + Send,
    {
    }

    #[test]
    fn generated_clients_take_a_link() {
        taken_by_generated_clients::<LinkService>();
    }

    #[test]
    fn a_request_is_completed_and_its_authority_kept() {
        let uri = |text: &str| absolute(text.parse().unwrap()).to_string();
        assert_eq!(uri("/fleet_kms.agent.v1.Data/Wrap"), "https://agent/fleet_kms.agent.v1.Data/Wrap");
        assert_eq!(uri("http://localhost/x?y"), "https://localhost/x?y");
        assert_eq!(uri("agent:443"), "https://agent:443/");
    }
}
