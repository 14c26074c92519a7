//! Why a TLS handshake failed, told apart so that an operator, a retry and the audit can act on it.

use std::{io, sync::Arc};

use fleet_kms_identity::{CertificateError, SpiffeId};
use rustls::{AlertDescription, OtherError};
use thiserror::Error;

/// Why a certificate that chains to our roots is refused all the same, or cannot chain at all.
#[derive(Clone, Debug, Error, PartialEq)]
pub enum CertificateRefused {
    /// The chain has more certificates than any of ours.
    #[error("the peer's certificate chain is too long")]
    ChainTooLong,
    /// No certificate in the chain has the pinned fingerprint.
    #[error("the agent does not show the root certificate that the join token names")]
    OtherRoot,
    /// No path to a trusted root, or a broken signature.
    #[error("the peer's certificate does not chain to a trusted root")]
    Chain(#[source] rustls::Error),
    /// The leaf is nobody's in a fleet.
    #[error("the peer's certificate is nobody's in a fleet")]
    Form(#[from] CertificateError),
    /// Anyone but an agent where an agent must be.
    #[error("the peer is {0}, not an agent")]
    NotAnAgent(SpiffeId),
    /// An agent of another fleet under the same root.
    #[error("the peer is {0}, of another trust domain")]
    OtherTrustDomain(SpiffeId),
    /// The leaf is not made for serving.
    #[error("the certificate of {0} does not carry serverAuth")]
    NoServerAuth(SpiffeId),
    /// The leaf is not made for clients.
    #[error("the certificate of {0} does not carry clientAuth")]
    NoClientAuth(SpiffeId),
}

impl From<CertificateRefused> for rustls::Error {
    fn from(refused: CertificateRefused) -> Self {
        rustls::CertificateError::Other(OtherError(Arc::new(refused))).into()
    }
}

/// Why a TLS handshake failed, seen from either side.
#[derive(Debug, Error)]
pub enum TlsError {
    /// The peer's chain is right but for its dates: one of the two clocks is wrong, or it has expired.
    #[error("the peer's certificate is not valid at this time")]
    CertificateDates(#[source] rustls::Error),
    /// The peer's certificate is refused.
    #[error("the peer's certificate is refused")]
    Certificate(#[from] CertificateRefused),
    /// The peer showed no certificate.
    #[error("the peer shows no certificate")]
    NoCertificate,
    /// The peer says that our certificate's dates are wrong.
    #[error("the peer finds this side's certificate expired")]
    OwnCertificateDates,
    /// The peer refuses us.
    #[error("the peer refuses the connection with the TLS alert {alert}")]
    RefusedByPeer {
        /// The alert's name.
        alert: String,
    },
    /// No common application protocol, or none at all named.
    #[error("the peer does not speak HTTP/2 over TLS")]
    Protocol,
    /// Not TLS 1.3, or broken.
    #[error("the peer does not speak TLS 1.3 as it must")]
    Tls(#[source] rustls::Error),
    /// The connection broke.
    #[error("the connection broke")]
    Io(#[source] io::Error),
}

impl CertificateRefused {
    /// Returns the closed label for metrics and audit.
    pub fn label(&self) -> &'static str {
        match self {
            Self::ChainTooLong => "chain_too_long",
            Self::OtherRoot => "other_root",
            // Of the chain, or of a handshake by another key than the certificate's.
            Self::Chain(rustls::Error::InvalidCertificate(rustls::CertificateError::BadSignature)) => {
                "bad_signature"
            }
            Self::Chain(rustls::Error::InvalidCertificate(
                rustls::CertificateError::InvalidPurpose
                | rustls::CertificateError::InvalidPurposeContext { .. },
            )) => "wrong_usage",
            Self::Chain(_) => "unknown_ca",
            Self::Form(_) => "not_a_fleet_certificate",
            Self::NotAnAgent(_) => "not_an_agent",
            Self::OtherTrustDomain(_) => "other_trust_domain",
            Self::NoServerAuth(_) => "no_server_auth",
            Self::NoClientAuth(_) => "no_client_auth",
        }
    }
}

impl TlsError {
    /// Returns the closed label for metrics and audit.
    pub fn label(&self) -> &'static str {
        match self {
            Self::CertificateDates(_) => "certificate_dates",
            Self::Certificate(refused) => refused.label(),
            Self::NoCertificate => "no_certificate",
            Self::OwnCertificateDates | Self::RefusedByPeer { .. } => "refused_by_peer",
            Self::Protocol => "no_alpn",
            Self::Tls(_) => "tls",
            Self::Io(_) => "broken",
        }
    }

    /// Tells whether this side refused the peer; otherwise the peer refused us, or the connection broke.
    pub fn is_denial(&self) -> bool {
        !matches!(self, Self::OwnCertificateDates | Self::RefusedByPeer { .. } | Self::Io(_))
    }
}

impl From<io::Error> for TlsError {
    fn from(error: io::Error) -> Self {
        match error.get_ref().and_then(|inner| inner.downcast_ref::<rustls::Error>()) {
            Some(tls) => Self::from(tls.clone()),
            None => Self::Io(error),
        }
    }
}

impl From<rustls::Error> for TlsError {
    fn from(error: rustls::Error) -> Self {
        match error {
            rustls::Error::InvalidCertificate(rustls::CertificateError::Other(ref other)) => {
                match other.0.downcast_ref::<CertificateRefused>() {
                    Some(refused) => Self::Certificate(refused.clone()),
                    None => Self::Certificate(CertificateRefused::Chain(error)),
                }
            }
            dates if is_about_dates(&dates) => Self::CertificateDates(dates),
            rustls::Error::InvalidCertificate(_) => Self::Certificate(CertificateRefused::Chain(error)),
            rustls::Error::NoCertificatesPresented => Self::NoCertificate,
            rustls::Error::AlertReceived(AlertDescription::CertificateExpired) => Self::OwnCertificateDates,
            rustls::Error::AlertReceived(AlertDescription::NoApplicationProtocol)
            | rustls::Error::NoApplicationProtocol => Self::Protocol,
            rustls::Error::AlertReceived(alert) => Self::RefusedByPeer { alert: alert_name(alert) },
            other => Self::Tls(other),
        }
    }
}

/// Tells whether a chain is refused for nothing but its dates.
pub(super) fn is_about_dates(error: &rustls::Error) -> bool {
    use rustls::CertificateError::{Expired, ExpiredContext, NotValidYet, NotValidYetContext};
    matches!(
        error,
        rustls::Error::InvalidCertificate(
            Expired | ExpiredContext { .. } | NotValidYet | NotValidYetContext { .. }
        )
    )
}

fn alert_name(alert: AlertDescription) -> String {
    alert.as_str().map_or_else(|| format!("{}", u8::from(alert)), str::to_owned)
}
