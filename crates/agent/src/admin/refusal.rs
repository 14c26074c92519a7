//! Errors of the admin API: each becomes a problem with a stable code and a
//! remedy. The only place that knows both the agent's errors and the codes.

use axum::body::Body;
use axum::extract::Request;
use axum::http::{HeaderValue, StatusCode, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use fleet_kms_admin_api::change::REQUEST_ID;
use fleet_kms_admin_api::problem::MEDIA_TYPE;
use fleet_kms_admin_api::{Code, Problem};
use fleet_kms_keyring::TransitionError;

use crate::authz::Denied;
use crate::ca::RolloverError;
use crate::changes::ChangeError;
use crate::control_plane::{CreateError, KeyChangeError};
use crate::enrolment::issue::{IssueFailure, NodeChangeError};
use crate::enrolment::tokens::{TermsError, TokenChangeError, TokenError};
use crate::errors::chain;
use crate::fleet_ca::RollError;
use crate::ledger::{LedgerError, WriteError};
use crate::live_keyrings::KeysError;

/// A request that is answered with a problem.
#[derive(Debug)]
pub(super) struct Refused(Box<Problem>, Option<&'static str>);

/// What came of a request, as a closed label for audit and metrics.
#[derive(Clone, Copy, Debug)]
pub(super) struct Label(pub(super) &'static str);

impl From<Problem> for Refused {
    fn from(problem: Problem) -> Self {
        Self(Box::new(problem), None)
    }
}

impl Refused {
    pub(super) fn new(code: Code, detail: impl Into<String>, remedy: impl Into<String>) -> Self {
        Problem::new(code, detail, remedy).into()
    }

    pub(super) fn field(field: &str, detail: impl Into<String>, remedy: impl Into<String>) -> Self {
        Problem::new(Code::InvalidField, detail, remedy).with_field(field).into()
    }

    fn label(&self) -> Label {
        let known = || Code::KNOWN.iter().find(|known| **known == self.0.code.as_str());
        Label(self.1.unwrap_or_else(|| known().copied().unwrap_or("other")))
    }
}

impl IntoResponse for Refused {
    /// The body is written by [`write`], which knows the request's id.
    fn into_response(self) -> Response {
        let status = StatusCode::from_u16(self.0.status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        let mut response = status.into_response();
        response.extensions_mut().insert(self.label());
        if self.0.code == Code::TooManyRequests {
            response.headers_mut().insert(header::RETRY_AFTER, HeaderValue::from_static("1"));
        }
        response.extensions_mut().insert(self.0);
        response
    }
}

/// Writes problems, each with the id of its request.
pub(super) async fn write(request: Request, next: Next) -> Response {
    let id = request.headers().get(REQUEST_ID).and_then(|id| id.to_str().ok()).map(str::to_owned);
    let mut response = next.run(request).await;
    if let Some(mut problem) = response.extensions_mut().remove::<Box<Problem>>() {
        problem.request_id = id;
        let body = serde_json::to_vec(&problem).unwrap_or_default();
        response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static(MEDIA_TYPE));
        response.headers_mut().remove(header::CONTENT_LENGTH);
        *response.body_mut() = Body::from(body);
    }
    response
}

impl From<Denied> for Refused {
    fn from(denied: Denied) -> Self {
        let (code, remedy) = match denied {
            Denied::NoCertificate
            | Denied::Expired
            | Denied::UnknownIdentity
            | Denied::Banned
            | Denied::Superseded => {
                (Code::NotAuthenticated, "on the agent's host, run `kms-agent admin issue NAME --role ROLE`")
            }
            Denied::WrongKind => (Code::Denied, "use an admin's certificate"),
            Denied::Role | Denied::Scope => (Code::Denied, "ask an admin who has the role and the scope"),
        };
        Self(Box::new(Problem::new(code, denied.to_string(), remedy)), Some(denied.label()))
    }
}

impl<E: std::error::Error + Into<Refused> + 'static> From<ChangeError<E>> for Refused {
    fn from(error: ChangeError<E>) -> Self {
        let text = chain(&error);
        match error {
            ChangeError::Refused(refused) => refused.into(),
            ChangeError::Contended => Self::new(Code::Unavailable, text, "try again"),
            ChangeError::Write(error) => error.into(),
            ChangeError::Unconfirmed(_) => {
                let remedy = "on the agent's host, run `kms-agent restore --confirm`";
                Self::new(Code::RecoveredUnconfirmed, text, remedy)
            }
            ChangeError::Audit(_) => Self::new(Code::Unavailable, text, "look at the audit's disk"),
        }
    }
}

impl From<WriteError> for Refused {
    fn from(error: WriteError) -> Self {
        let text = chain(&error);
        match error {
            WriteError::Conflict => Self::new(Code::Unavailable, text, "try again"),
            WriteError::NotApplied(_) | WriteError::Head(_) => {
                Self::new(Code::Unavailable, text, "look at the store's disk and the agent's log")
            }
            WriteError::Unknown(_) => {
                Self::new(Code::OutcomeUnknown, text, "look whether the change was made before trying again")
            }
        }
    }
}

impl From<CreateError> for Refused {
    fn from(error: CreateError) -> Self {
        let text = error.to_string();
        match error {
            CreateError::Name(_) => Self::field("name", text, "choose another name"),
            CreateError::Period(_) => Self::field("period", text, "use 1h to 3650d, such as 30d"),
            CreateError::Exists(_) => Self::new(Code::AlreadyExists, text, "choose another name"),
            CreateError::Keys(error) => error.into(),
            CreateError::Ledger(error) => error.into(),
            CreateError::NoBackup(_) => {
                Self::new(Code::Unavailable, text, "make a backup: look at the agent's log")
            }
        }
    }
}

impl From<KeyChangeError> for Refused {
    fn from(error: KeyChangeError) -> Self {
        let text = chain(&error);
        match error {
            KeyChangeError::UnknownCluster => no_cluster(),
            KeyChangeError::Revision { .. } => Self::new(
                Code::RevisionMismatch,
                text,
                "look at the cluster again, decide again, and send the revision that you saw",
            ),
            KeyChangeError::Rotate(_) | KeyChangeError::NotDue => {
                Self::new(Code::StateConflict, text, "look at the versions")
            }
            KeyChangeError::Transition(error) => error.into(),
            KeyChangeError::Guarded { .. } => {
                Self::new(Code::Guarded, text, "`kmsctl key explain` shows every guard")
            }
            KeyChangeError::Keyring(_) => internal(&text),
            KeyChangeError::Keys(error) => error.into(),
            KeyChangeError::Ledger(error) => error.into(),
            KeyChangeError::NoBackup(_) => {
                Self::new(Code::Unavailable, text, "make a backup: look at the agent's log")
            }
        }
    }
}

impl From<TransitionError> for Refused {
    fn from(error: TransitionError) -> Self {
        match error {
            TransitionError::Unknown { .. } => no_version(),
            _ => Self::new(Code::StateConflict, error.to_string(), "look at the versions"),
        }
    }
}

impl From<KeysError> for Refused {
    fn from(error: KeysError) -> Self {
        let text = error.to_string();
        match error {
            KeysError::Locked => Self::new(Code::Unavailable, text, "restart the agent"),
            KeysError::UnknownCluster => no_cluster(),
            KeysError::Damaged => internal(&text),
        }
    }
}

impl From<LedgerError> for Refused {
    fn from(error: LedgerError) -> Self {
        let text = chain(&error);
        match error {
            LedgerError::Read(_) => Self::new(Code::Unavailable, text, "look at the store's disk"),
            LedgerError::Record(_) => internal(&text),
        }
    }
}

impl From<TermsError> for Refused {
    fn from(error: TermsError) -> Self {
        let text = chain(&error);
        let (field, remedy) = match error {
            TermsError::Node(_) => ("node", "use a-z, 0-9, '.' and '-', at most 63 characters"),
            TermsError::Pattern(_) => ("pattern", "use a node name with `*` for any text"),
            TermsError::NodeAndPattern => ("pattern", "give one of the two"),
            TermsError::Network(_) => ("cidr", "write it like 10.1.0.0/16"),
            TermsError::Uses => ("uses", "use 1 to 10,000"),
            TermsError::Life => ("ttl", "use 1m to 366d"),
        };
        Self::field(field, text, remedy)
    }
}

impl From<TokenError> for Refused {
    fn from(error: TokenError) -> Self {
        match error {
            TokenError::Cluster => no_cluster(),
            TokenError::Failed(failure) => failure.into(),
        }
    }
}

impl From<IssueFailure> for Refused {
    fn from(error: IssueFailure) -> Self {
        let text = chain(&error);
        match error {
            IssueFailure::Ledger(error) => error.into(),
            IssueFailure::Write(error) => error.into(),
            IssueFailure::Contended => Self::new(Code::Unavailable, text, "try again"),
            IssueFailure::Unconfirmed(_) => {
                let remedy = "on the agent's host, run `kms-agent restore --confirm`";
                Self::new(Code::RecoveredUnconfirmed, text, remedy)
            }
            IssueFailure::Audit(_) => Self::new(Code::Unavailable, text, "look at the audit's disk"),
            IssueFailure::Identity(_)
            | IssueFailure::Sign(_)
            | IssueFailure::NoIssueNumber
            | IssueFailure::IssueNumbers => internal(&text),
        }
    }
}

impl From<NodeChangeError> for Refused {
    fn from(error: NodeChangeError) -> Self {
        match error {
            NodeChangeError::Unknown => no_node(),
            NodeChangeError::Already(_) => {
                Self::new(Code::StateConflict, error.to_string(), "`kmsctl node list` shows its state")
            }
            NodeChangeError::Failed(failure) => failure.into(),
        }
    }
}

impl From<RollError> for Refused {
    fn from(error: RollError) -> Self {
        let text = chain(&error);
        match error {
            RollError::Change(error) => (*error).into(),
            RollError::Load(_) | RollError::Use(_) => internal(&text),
        }
    }
}

impl From<RolloverError> for Refused {
    fn from(error: RolloverError) -> Self {
        let text = chain(&error);
        match error {
            RolloverError::NotDue => Self::new(Code::StateConflict, text, "`kmsctl ca show` shows the dates"),
            RolloverError::Retiring => Self::new(
                Code::StateConflict,
                text,
                "wait until the oldest one is no longer trusted; `kmsctl ca show` says when",
            ),
            RolloverError::Load(_)
            | RolloverError::Sign(_)
            | RolloverError::Seal(_)
            | RolloverError::Generations => internal(&text),
        }
    }
}

impl From<TokenChangeError> for Refused {
    fn from(error: TokenChangeError) -> Self {
        match error {
            TokenChangeError::Unknown => no_token(),
            TokenChangeError::Ledger(error) => error.into(),
        }
    }
}

pub(super) fn no_cluster() -> Refused {
    Refused::new(Code::ClusterNotFound, "there is no such cluster", "`kmsctl cluster list` shows them")
}

pub(super) fn no_version() -> Refused {
    Refused::new(Code::VersionNotFound, "the cluster has no such version", "`kmsctl key versions` shows them")
}

pub(super) fn no_node() -> Refused {
    Refused::new(Code::NodeNotFound, "the cluster has no such node", "`kmsctl node list` shows them")
}

pub(super) fn no_token() -> Refused {
    Refused::new(Code::TokenNotFound, "the cluster has no such join token", "`kmsctl node tokens` shows them")
}

/// A fault of ours: the cause goes to the log, not to the caller.
pub(super) fn internal(cause: &str) -> Refused {
    tracing::error!(cause, "an admin request met a fault of the agent");
    Refused::new(Code::Internal, "the agent met a fault", "look at the agent's log for this request")
}
