//! From an enrolment error to a gRPC status. To be part of `grpc_code.rs`, the
//! agent's only such map.

use tonic::{Code, Status};

use super::issue::{EnrolError, IssueFailure, RenewError, RenewRefused};
use super::limits::Limited;
use super::tokens::TokenRefused;
use crate::authz::Denied;
use crate::ca::SignError;
use crate::grpc_code::status;

/// Why a call on the enrolment port failed.
#[derive(Debug, thiserror::Error)]
pub enum EnrolmentError {
    /// A field of the request is bad.
    #[error("{field}: {problem}")]
    Request {
        /// Which one.
        field: &'static str,
        /// What is wrong with it.
        problem: &'static str,
    },
    /// The connection says nothing about its peer.
    #[error("this connection has no address")]
    NoPeer,
    /// The caller may not.
    #[error(transparent)]
    Denied(#[from] Denied),
    /// The node was not enrolled.
    #[error(transparent)]
    Enrol(#[from] EnrolError),
    /// The certificate was not renewed.
    #[error(transparent)]
    Renew(#[from] RenewError),
    /// The caller asks too often.
    #[error(transparent)]
    Limited(#[from] Limited),
    /// The time could not be signed.
    #[error(transparent)]
    Sign(#[from] SignError),
}

impl EnrolmentError {
    /// Returns the code and the closed label of this error: metric and reason
    /// trailer.
    pub fn code(&self) -> (Code, &'static str) {
        match self {
            Self::Request { .. } => (Code::InvalidArgument, "bad_request"),
            Self::NoPeer => (Code::Internal, "no_peer"),
            Self::Denied(Denied::NoCertificate) => (Code::Unauthenticated, "no_certificate"),
            Self::Denied(denied) => (Code::PermissionDenied, denied.label()),
            Self::Enrol(error) => (enrol_code(error), error.reason()),
            Self::Renew(error) => (renew_code(error), error.reason()),
            Self::Limited(_) => (Code::ResourceExhausted, "rate_limited"),
            Self::Sign(_) => (Code::Unavailable, "ca"),
        }
    }
}

impl From<EnrolmentError> for Status {
    fn from(error: EnrolmentError) -> Self {
        let (code, reason) = error.code();
        status(code, reason, error.to_string())
    }
}

fn enrol_code(error: &EnrolError) -> Code {
    match error {
        EnrolError::Csr(_) | EnrolError::Token(TokenRefused::NodeMissing | TokenRefused::NodeForm) => {
            Code::InvalidArgument
        }
        EnrolError::Token(TokenRefused::Unknown) => Code::Unauthenticated,
        EnrolError::Token(
            TokenRefused::Expired
            | TokenRefused::UsedUp
            | TokenRefused::Address
            | TokenRefused::Node
            | TokenRefused::Damaged,
        )
        | EnrolError::Banned => Code::PermissionDenied,
        EnrolError::Retired => Code::FailedPrecondition,
        EnrolError::NameTaken => Code::AlreadyExists,
        EnrolError::Limited(_) => Code::ResourceExhausted,
        EnrolError::Failed(failure) => failure_code(failure),
    }
}

fn renew_code(error: &RenewError) -> Code {
    match error {
        RenewError::Csr(_) | RenewError::Refused(RenewRefused::SameKey) => Code::InvalidArgument,
        RenewError::Refused(
            RenewRefused::Unknown
            | RenewRefused::Banned
            | RenewRefused::Superseded
            | RenewRefused::ForeignKey
            | RenewRefused::OffTooLong
            | RenewRefused::ExpiredKind,
        ) => Code::PermissionDenied,
        RenewError::Limited(_) => Code::ResourceExhausted,
        RenewError::Failed(failure) => failure_code(failure),
    }
}

fn failure_code(failure: &IssueFailure) -> Code {
    match failure {
        IssueFailure::Identity(_) | IssueFailure::Cluster(_) | IssueFailure::NoIssueNumber => Code::DataLoss,
        IssueFailure::Contended => Code::Aborted,
        IssueFailure::Ledger(_)
        | IssueFailure::Sign(_)
        | IssueFailure::IssueNumbers
        | IssueFailure::Write(_)
        | IssueFailure::Unconfirmed(_)
        | IssueFailure::Audit(_) => Code::Unavailable,
    }
}
