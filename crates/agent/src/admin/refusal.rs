//! Errors of the admin API: each becomes a problem with a stable code and a
//! remedy. The only place that knows both the agent's errors and the codes.

use std::time::Duration;

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
use crate::clusters::ClusterError;
use crate::control_plane::{ClusterChangeError, CreateError, KeyChangeError, Stale};
use crate::enrolment::issue::{AdminChangeError, IssueFailure, MemberChangeError};
use crate::enrolment::tokens::{TermsError, TokenChangeError, TokenError};
use crate::errors::chain;
use crate::fleet_ca::RollError;
use crate::ledger::{LedgerError, WriteError};
use crate::live_keyrings::KeysError;
use crate::slots::SlotsError;

/// A request that is answered with a problem.
#[derive(Debug)]
pub(super) struct Refused {
    problem: Box<Problem>,
    label: Option<&'static str>,
    retry_after: Option<Duration>,
}

/// What came of a request, as a closed label for audit and metrics.
#[derive(Clone, Copy, Debug)]
pub(super) struct Label(pub(super) &'static str);

impl From<Problem> for Refused {
    fn from(problem: Problem) -> Self {
        Self { problem: Box::new(problem), label: None, retry_after: None }
    }
}

impl Refused {
    pub(super) fn new(code: Code, detail: impl Into<String>, remedy: impl Into<String>) -> Self {
        Problem::new(code, detail, remedy).into()
    }

    pub(super) fn field(field: &str, detail: impl Into<String>, remedy: impl Into<String>) -> Self {
        Problem::new(Code::InvalidField, detail, remedy).with_field(field).into()
    }

    /// Says when the caller may try again.
    pub(super) fn after(self, wait: Duration) -> Self {
        Self { retry_after: Some(wait), ..self }
    }

    /// What is wrong, in words.
    pub(super) fn detail(&self) -> &str {
        &self.problem.detail
    }

    fn label(&self) -> Label {
        let known = || Code::KNOWN.iter().find(|known| **known == self.problem.code.as_str());
        Label(self.label.unwrap_or_else(|| known().copied().unwrap_or("other")))
    }
}

impl IntoResponse for Refused {
    /// The body is written by [`write`], which knows the request's id.
    fn into_response(self) -> Response {
        let status = StatusCode::from_u16(self.problem.status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        let mut response = status.into_response();
        response.extensions_mut().insert(self.label());
        if let Some(wait) = self.retry_after {
            response.headers_mut().insert(header::RETRY_AFTER, HeaderValue::from(wait.as_secs().max(1)));
        }
        response.extensions_mut().insert(self.problem);
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
            | Denied::Superseded
            | Denied::ForeignKey => {
                (Code::NotAuthenticated, "on the agent's host, run `kms-agent admin issue NAME --role ROLE`")
            }
            Denied::WrongKind | Denied::ClusterRetired => (Code::Denied, "use an admin's certificate"),
            Denied::Role | Denied::Scope => (Code::Denied, "ask an admin who has the role and the scope"),
        };
        let problem = Box::new(Problem::new(code, denied.to_string(), remedy));
        Self { problem, label: Some(denied.label()), retry_after: None }
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
            CreateError::MaxOffline(_) => Self::field("max_offline", text, "use 7d to 730d, such as 180d"),
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
            TermsError::Worker(_) => ("worker", "use a-z, 0-9, '.' and '-', at most 63 characters"),
            TermsError::WorkerAndNode => ("worker", "give one of the two"),
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
            | IssueFailure::Cluster(_)
            | IssueFailure::Sign(_)
            | IssueFailure::NoIssueNumber
            | IssueFailure::IssueNumbers => internal(&text),
        }
    }
}

impl From<MemberChangeError> for Refused {
    fn from(error: MemberChangeError) -> Self {
        match error {
            MemberChangeError::Unknown => no_node(),
            MemberChangeError::Already(_) => {
                let remedy = "`kmsctl node list` and `kmsctl worker list` show its state";
                Self::new(Code::StateConflict, error.to_string(), remedy)
            }
            MemberChangeError::Stale(stale) => stale.into(),
            MemberChangeError::Failed(failure) => failure.into(),
        }
    }
}

impl From<AdminChangeError> for Refused {
    fn from(error: AdminChangeError) -> Self {
        let text = error.to_string();
        match error {
            AdminChangeError::Unknown => no_admin(),
            AdminChangeError::LastOperator => {
                let remedy = "make another first: on the agent's host, run `kms-agent admin issue NAME --role operator`";
                Self::new(Code::Guarded, text, remedy)
            }
            AdminChangeError::Grant(_) => {
                let remedy =
                    "ask an admin who has the role, or run `kms-agent admin issue` on the agent's host";
                Self::new(Code::Denied, text, remedy)
            }
            AdminChangeError::NoRole => {
                Self::field("roles", text, "give at least one role, or remove the admin")
            }
            AdminChangeError::EmptyScope => {
                Self::field("clusters", text, "give at least one cluster, or `all`")
            }
            AdminChangeError::Stale(stale) => stale.into(),
            AdminChangeError::Failed(failure) => failure.into(),
        }
    }
}

impl From<ClusterChangeError> for Refused {
    fn from(error: ClusterChangeError) -> Self {
        let text = error.to_string();
        match error {
            ClusterChangeError::Unknown => no_cluster(),
            ClusterChangeError::Cluster(ClusterError::Field { .. }) => internal(&text),
            ClusterChangeError::Cluster(ClusterError::Ledger(error)) => error.into(),
            ClusterChangeError::Name(_) => Self::field("name", text, "choose another name"),
            ClusterChangeError::Taken(_) => Self::new(Code::AlreadyExists, text, "choose another name"),
            ClusterChangeError::Retired => {
                Self::new(Code::StateConflict, text, "`kmsctl cluster restore` brings it back")
            }
            ClusterChangeError::Live => {
                Self::new(Code::StateConflict, text, "`kmsctl cluster list --retired` shows which are")
            }
            ClusterChangeError::Stale(stale) => stale.into(),
            ClusterChangeError::Ledger(error) => error.into(),
        }
    }
}

impl From<Stale> for Refused {
    fn from(stale: Stale) -> Self {
        let remedy = "look at it again, decide again, and send the revision that you saw";
        Self::new(Code::RevisionMismatch, stale.to_string(), remedy)
    }
}

impl From<SlotsError> for Refused {
    fn from(error: SlotsError) -> Self {
        let text = chain(&error);
        match error {
            SlotsError::Ledger(error) => error.into(),
            _ => internal(&text),
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
            TokenChangeError::Stale(stale) => stale.into(),
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

pub(super) fn no_worker() -> Refused {
    Refused::new(Code::WorkerNotFound, "the cluster has no such worker", "`kmsctl worker list` shows them")
}

pub(super) fn no_admin() -> Refused {
    Refused::new(Code::AdminNotFound, "there is no such admin", "`kmsctl admin list` shows them")
}

pub(super) fn no_token() -> Refused {
    Refused::new(Code::TokenNotFound, "the cluster has no such join token", "`kmsctl node tokens` shows them")
}

/// A fault of ours: the cause goes to the log, not to the caller.
pub(super) fn internal(cause: &str) -> Refused {
    tracing::error!(cause, "an admin request met a fault of the agent");
    Refused::new(Code::Internal, "the agent met a fault", "look at the agent's log for this request")
}
