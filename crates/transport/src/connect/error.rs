//! Why a link does not come up, one variant per thing to repair.

use std::{fmt, io};

use thiserror::Error;

use crate::tls::{CertificateRefused, TlsError};

/// Why there is no link to an agent.
#[derive(Debug, Error)]
pub enum ConnectError {
    /// The name could not be resolved.
    #[error("the agent's name cannot be resolved")]
    Dns(#[source] io::Error),
    /// No TCP connection.
    #[error("the agent cannot be reached")]
    Tcp(#[from] io::Error),
    /// Something took too long.
    #[error("the agent does not answer in time: {0}")]
    Timeout(Stage),
    /// A certificate is right but for its dates: ask for the time, then renew.
    #[error("{whose} certificate is not valid at this time")]
    CertificateDates {
        /// Whose certificate it is.
        whose: Whose,
    },
    /// The agent is none of ours.
    #[error("the agent's certificate is refused")]
    AgentRefused(#[source] CertificateRefused),
    /// The agent does not take us.
    #[error("the agent refuses this side's certificate with the TLS alert {alert}")]
    RefusedByAgent {
        /// The alert's name.
        alert: String,
    },
    /// Something that is no agent answers, or the connection broke.
    #[error("the TLS handshake failed")]
    Tls(#[source] TlsError),
    /// The agent does not speak HTTP/2 as it must.
    #[error("the HTTP/2 connection cannot be made")]
    Http2(#[source] hyper::Error),
}

impl From<TlsError> for ConnectError {
    fn from(error: TlsError) -> Self {
        match error {
            TlsError::CertificateDates(_) => Self::CertificateDates { whose: Whose::Agents },
            TlsError::OwnCertificateDates => Self::CertificateDates { whose: Whose::Own },
            TlsError::Certificate(refused) => Self::AgentRefused(refused),
            TlsError::RefusedByPeer { alert } => Self::RefusedByAgent { alert },
            TlsError::NoCertificate | TlsError::Protocol | TlsError::Tls(_) | TlsError::Io(_) => {
                Self::Tls(error)
            }
        }
    }
}

/// Whose certificate an error is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Whose {
    /// This side's.
    Own,
    /// The agent's.
    Agents,
}

impl fmt::Display for Whose {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Own => "this side's",
            Self::Agents => "the agent's",
        })
    }
}

/// What [`connect`](super::connect) was waiting for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    /// The name server.
    Dns,
    /// The TCP connection.
    Tcp,
    /// The TLS handshake.
    Tls,
    /// The agent's first HTTP/2 frame, by which it lets us in.
    Admission,
}

impl fmt::Display for Stage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Dns => "DNS",
            Self::Tcp => "TCP",
            Self::Tls => "TLS",
            Self::Admission => "HTTP/2",
        })
    }
}
