//! One HTTP/2 connection to one agent's admin port, one exchange at a time.
//!
//! Nothing is retried here: what a caller may send again is the caller's to know.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use http::{Request, Response};
use http_body_util::{BodyExt as _, Full, Limited};
use tokio::task::JoinHandle;
use tokio::time::timeout;
use tower_service::Service as _;

use fleet_kms_process::clock;
use fleet_kms_transport::{
    ConnectError, ConnectOptions, LinkEnd, LinkError as CallError, LinkService, Whose, agent_client_tls,
    connect,
};

use crate::client::credentials::{Credentials, CredentialsError};
use crate::contexts::Context;
use crate::failure::Exit;

/// The longest answer that is read: 1,000 items of 4 KiB, and room.
const MAX_ANSWER: usize = 16 << 20;

/// An open connection to an agent.
pub struct Link {
    service: LinkService,
    driver: JoinHandle<LinkEnd>,
    server: String,
}

/// Why there is no link, or why it broke.
#[derive(Debug, thiserror::Error)]
pub enum LinkError {
    /// The files of the context cannot be used.
    #[error(transparent)]
    Credentials(#[from] CredentialsError),
    /// The agent cannot be reached, or one side refuses the other.
    #[error("no link to {server}")]
    Connect {
        /// The agent's address.
        server: String,
        /// Why.
        source: ConnectError,
    },
    /// The connection broke before the answer was complete.
    #[error("the link to {server} broke before the answer was complete")]
    Broken {
        /// The agent's address.
        server: String,
        /// Why.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// The answer did not come in time.
    #[error("{server} did not answer within {} s", .after.as_secs())]
    Late {
        /// The agent's address.
        server: String,
        /// How long it had.
        after: Duration,
    },
}

impl LinkError {
    /// The exit code.
    pub fn exit(&self) -> Exit {
        match self {
            Self::Credentials(CredentialsError::NoAdmin { .. } | CredentialsError::Dates { .. })
            | Self::Connect {
                source:
                    ConnectError::RefusedByAgent { .. } | ConnectError::CertificateDates { whose: Whose::Own },
                ..
            } => Exit::Denied,
            Self::Credentials(_) => Exit::Usage,
            Self::Connect { .. } | Self::Broken { .. } | Self::Late { .. } => Exit::Unavailable,
        }
    }

    /// What to do about it.
    pub fn remedy(&self) -> String {
        match self {
            Self::Credentials(error) => error.remedy(),
            Self::Connect { source, .. } => match source {
                ConnectError::RefusedByAgent { .. }
                | ConnectError::CertificateDates { whose: Whose::Own } => {
                    "on the agent's host, run `kms-agent admin issue NAME --role ROLE`"
                }
                ConnectError::AgentRefused(_) => {
                    "check that the context's server is an agent of this fleet, and its roots the fleet's"
                }
                ConnectError::CertificateDates { whose: Whose::Agents } => {
                    "compare this host's clock with the agent's"
                }
                _ => "check that the agent runs and that the context's server is its admin port (7445)",
            }
            .into(),
            Self::Broken { .. } | Self::Late { .. } => {
                "look whether the change was made, or repeat it with the same --idempotency-key".into()
            }
        }
    }
}

impl Link {
    /// Opens a link as `context` says.
    ///
    /// # Errors
    /// When a file cannot be used, the certificate may not be used now, or the
    /// agent cannot be reached.
    pub async fn open(context: &Context, timeout: Duration, now: SystemTime) -> Result<Self, LinkError> {
        let credentials = Credentials::read(context, now)?;
        let tls = agent_client_tls(
            Some(Arc::new(credentials.identity)),
            Arc::new(credentials.roots),
            Arc::new(clock::now),
            credentials.id.trust_domain,
        );
        let options = ConnectOptions { timeout, ..ConnectOptions::default() };
        let server = context.server.clone();
        let link = connect(&server, &tls, options).await;
        let link = link.map_err(|source| LinkError::Connect { server: server.clone(), source })?;
        Ok(Self { service: link.service, driver: tokio::spawn(link.driver), server })
    }

    /// Sends a request and reads its answer.
    ///
    /// # Errors
    /// When the link breaks or the time is over.
    pub async fn exchange(
        &mut self,
        request: Request<Bytes>,
        after: Duration,
    ) -> Result<Response<Bytes>, LinkError> {
        let request = request.map(|body| tonic::body::Body::new(Full::new(body)));
        let exchange = async {
            std::future::poll_fn(|context| self.service.poll_ready(context)).await.map_err(broken_call)?;
            let (head, body) = self.service.call(request).await.map_err(broken_call)?.into_parts();
            let body = Limited::new(body, MAX_ANSWER).collect().await?.to_bytes();
            Ok(Response::from_parts(head, body))
        };
        let answered = timeout(after, exchange).await;
        let server = || self.server.clone();
        match answered {
            Ok(Ok(response)) => Ok(response),
            Ok(Err(source)) => Err(LinkError::Broken { server: server(), source }),
            Err(_) => Err(LinkError::Late { server: server(), after }),
        }
    }
}

fn broken_call(error: CallError) -> Box<dyn std::error::Error + Send + Sync> {
    error.into()
}

impl Drop for Link {
    fn drop(&mut self) {
        self.driver.abort();
    }
}
