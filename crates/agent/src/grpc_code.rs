//! The agent's only map from its errors to gRPC codes, and the reason that
//! tells a caller that the answer is an agent's own.

use fleet_kms_audit::NotRecorded;
use fleet_kms_keyring::WrapRefused;
use fleet_kms_keyring::wrapped_dek::WrapError as DekError;
use tonic::metadata::MetadataValue;
use tonic::{Code, Status};

use crate::authz::Denied;
use crate::live_keyrings::{KeysError, WrapError};

/// The trailer that carries the reason. An error without it is not an agent's.
pub const REASON: &str = "fleet-kms-reason";

/// Why a data call failed.
#[derive(Debug, thiserror::Error)]
pub enum DataError {
    /// The caller may not.
    #[error(transparent)]
    Denied(#[from] Denied),
    /// A field of the request is bad.
    #[error("{field}: {problem}")]
    Request { field: &'static str, problem: &'static str },
    /// The DEK was not wrapped.
    #[error(transparent)]
    Wrap(#[from] WrapError),
    /// The keys cannot be used.
    #[error(transparent)]
    Keys(#[from] KeysError),
    /// The call cannot be recorded, and the configuration says to refuse it then.
    #[error(transparent)]
    Audit(#[from] NotRecorded),
}

impl DataError {
    /// Returns the code and the closed label of this error: metric, audit and
    /// reason trailer.
    pub fn code(&self) -> (Code, &'static str) {
        match self {
            Self::Denied(Denied::NoCertificate) => (Code::Unauthenticated, "no_certificate"),
            Self::Denied(denied) => (denied_code(*denied), denied.label()),
            Self::Request { .. } => (Code::InvalidArgument, "bad_request"),
            Self::Wrap(WrapError::Dek(DekError::Empty)) => (Code::InvalidArgument, "empty_plaintext"),
            Self::Wrap(WrapError::Dek(DekError::TooLong { .. })) => (Code::InvalidArgument, "long_plaintext"),
            Self::Wrap(WrapError::Version(refused)) => (
                Code::FailedPrecondition,
                match refused {
                    WrapRefused::UnknownKeyId => "key_id_not_ours",
                    WrapRefused::NotYetActive { .. } => "key_id_not_yet_active",
                    WrapRefused::Retired { .. } => "key_id_retired",
                    WrapRefused::Disabled { .. } => "version_disabled",
                    WrapRefused::Destroyed { .. } => "version_destroyed",
                },
            ),
            Self::Wrap(WrapError::Keys(keys)) | Self::Keys(keys) => keys_code(*keys),
            Self::Audit(NotRecorded) => (Code::Unavailable, "audit_full"),
        }
    }
}

/// Returns the code of a denial of a caller that showed a certificate.
pub fn denied_code(denied: Denied) -> Code {
    match denied {
        Denied::ClusterRetired => Code::FailedPrecondition,
        Denied::NoCertificate
        | Denied::Expired
        | Denied::UnknownIdentity
        | Denied::Banned
        | Denied::Superseded
        | Denied::ForeignKey
        | Denied::WrongKind
        | Denied::Role
        | Denied::Scope => Code::PermissionDenied,
    }
}

/// Returns the code and label of a keys error.
pub fn keys_code(error: KeysError) -> (Code, &'static str) {
    match error {
        KeysError::Locked => (Code::Unavailable, "locked"),
        KeysError::UnknownCluster => (Code::NotFound, "unknown_cluster"),
        KeysError::Damaged => (Code::DataLoss, "damaged"),
    }
}

/// Makes the status of an error, with its reason.
pub fn status(code: Code, reason: &'static str, text: impl Into<String>) -> Status {
    let mut status = Status::new(code, text);
    status.metadata_mut().insert(REASON, MetadataValue::from_static(reason));
    status
}

/// Adds the reason to a refusal that tonic made before any handler ran: what it
/// cannot read would be the same to every agent. What another agent may answer
/// otherwise (a deadline, an RPC that is not here yet) stays without one.
pub fn with_reason<B>(mut response: http::Response<B>) -> http::Response<B> {
    let headers = response.headers_mut();
    let code = headers.get(Status::GRPC_STATUS).map(|code| Code::from_bytes(code.as_bytes()));
    let reason = match code {
        Some(Code::OutOfRange) => "message_too_long",
        Some(Code::Internal | Code::InvalidArgument) => "unreadable",
        _ => return response,
    };
    if !headers.contains_key(REASON) {
        headers.insert(REASON, http::HeaderValue::from_static(reason));
    }
    response
}

impl From<DataError> for Status {
    fn from(error: DataError) -> Self {
        let (code, reason) = error.code();
        status(code, reason, error.to_string())
    }
}

#[cfg(test)]
mod tests;
