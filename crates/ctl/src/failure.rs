//! How a command ends: the exit code, what went wrong, what to do about it.
//!
//! Exit codes are stable: scripts go by them.

use std::io;

use fleet_kms_admin_api::Problem;

use crate::client::ClientError;
use crate::client::link::LinkError;
use crate::console::Console;
use crate::contexts::ContextError;

/// Exit code of a command.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Exit {
    /// Done.
    Ok = 0,
    /// Failed in a way that no other code names.
    Failed = 1,
    /// Wrong usage or input.
    Usage = 2,
    /// Denied.
    Denied = 3,
    /// Conflict with the present state.
    Conflict = 4,
    /// Unavailable now; worth another try.
    Unavailable = 5,
    /// Not found.
    NotFound = 6,
}

/// Why a command failed.
#[derive(Debug, thiserror::Error)]
pub enum Failure {
    /// There is no context to use.
    #[error(transparent)]
    Context(#[from] ContextError),
    /// The agent did not answer, or answered a problem.
    #[error(transparent)]
    Client(#[from] ClientError),
    /// A dangerous change that nobody confirmed.
    #[error("{what} needs a confirmation, and there is no terminal to ask on")]
    Unconfirmed {
        /// The change.
        what: String,
    },
    /// The person said no.
    #[error("the name does not match; nothing was changed")]
    Declined,
    /// A file of an audit, of heads or of roots cannot be read.
    #[error("cannot read {}", path.display())]
    Unreadable {
        /// The file or directory.
        path: std::path::PathBuf,
        /// Why.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// What was given does not say what is meant.
    #[error("{what}")]
    Unclear {
        /// What is wrong.
        what: String,
        /// What to do.
        remedy: String,
    },
    /// The audit's files do not hold.
    #[error("the audit does not hold: {place}")]
    AuditBroken {
        /// Where, and what is wrong there.
        place: String,
    },
    /// The output cannot be written, or the terminal not read.
    #[error("cannot write the output")]
    Output(#[from] io::Error),
    /// The answer cannot be written in the wanted form.
    #[error("cannot write the answer as {form}")]
    Form {
        /// JSON or YAML.
        form: &'static str,
        /// Why.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
}

impl From<LinkError> for Failure {
    fn from(error: LinkError) -> Self {
        Self::Client(error.into())
    }
}

impl Failure {
    /// The exit code.
    pub fn exit(&self) -> Exit {
        match self {
            Self::Context(ContextError::Unknown { .. }) => Exit::NotFound,
            Self::Context(_) | Self::Unconfirmed { .. } | Self::Client(ClientError::Request(_)) => {
                Exit::Usage
            }
            Self::Client(ClientError::Link(error)) => error.exit(),
            Self::Client(ClientError::Problem(problem)) => exit_of_status(problem.status),
            Self::Client(ClientError::Strange { status, .. }) => match exit_of_status(status.as_u16()) {
                Exit::Unavailable => Exit::Unavailable,
                _ => Exit::Failed,
            },
            Self::Declined | Self::Unreadable { .. } | Self::Unclear { .. } => Exit::Usage,
            Self::AuditBroken { .. } => Exit::Failed,
            Self::Client(ClientError::Endless) | Self::Output(_) | Self::Form { .. } => Exit::Failed,
        }
    }

    /// What to do about it; empty when there is nothing to say.
    pub fn remedy(&self) -> String {
        match self {
            Self::Context(error) => error.remedy(),
            Self::Client(ClientError::Link(error)) => error.remedy(),
            Self::Client(ClientError::Problem(problem)) => problem.remedy.clone(),
            Self::Client(ClientError::Strange { .. }) => {
                "check that the context's server is the agent's admin port (7445)".into()
            }
            Self::Unclear { remedy, .. } => remedy.clone(),
            Self::AuditBroken { .. } => {
                "keep the files as they are and compare them with a shipped copy; see docs/audit.md".into()
            }
            Self::Unconfirmed { .. } => "look at --dry-run, then give --yes".into(),
            _ => String::new(),
        }
    }

    /// Tells the whole chain once, with the remedy and the request's id.
    pub fn report(&self, console: &mut Console) {
        let mut text = self.to_string();
        let mut cause = std::error::Error::source(self);
        while let Some(error) = cause {
            let more = error.to_string();
            // Transparent layers repeat the text of what they wrap.
            if !text.ends_with(&more) {
                text.push_str(": ");
                text.push_str(&more);
            }
            cause = error.source();
        }
        let problem = self.problem();
        if let Some(problem) = problem {
            text.push_str(&format!(" ({})", problem.code));
        }
        console.complain(&text);
        let remedy = self.remedy();
        if !remedy.is_empty() {
            console.tell(&format!("  remedy: {}", crate::console::clean(&remedy)));
        }
        if let Some(id) = problem.and_then(|problem| problem.request_id.as_deref()) {
            console.tell(&format!("  request: {}", crate::console::clean(id)));
        }
    }

    fn problem(&self) -> Option<&Problem> {
        match self {
            Self::Client(ClientError::Problem(problem)) => Some(problem),
            _ => None,
        }
    }
}

/// The exit code that goes with an HTTP status of a problem.
fn exit_of_status(status: u16) -> Exit {
    match status {
        400 | 405 | 413 | 415 | 422 => Exit::Usage,
        401 | 403 => Exit::Denied,
        404 => Exit::NotFound,
        409 | 412 => Exit::Conflict,
        408 | 429 | 502..=504 => Exit::Unavailable,
        _ => Exit::Failed,
    }
}

#[cfg(test)]
mod tests {
    use fleet_kms_admin_api::Code;

    use super::*;

    #[test]
    fn every_problem_code_has_its_exit_code() {
        let cases = [
            (Code::InvalidRequest, Exit::Usage),
            (Code::InvalidField, Exit::Usage),
            (Code::NotAuthenticated, Exit::Denied),
            (Code::Denied, Exit::Denied),
            (Code::ClusterNotFound, Exit::NotFound),
            (Code::AlreadyExists, Exit::Conflict),
            (Code::Guarded, Exit::Conflict),
            (Code::RevisionMismatch, Exit::Conflict),
            (Code::TooManyRequests, Exit::Unavailable),
            (Code::RecoveredUnconfirmed, Exit::Unavailable),
            (Code::Internal, Exit::Failed),
        ];
        for (code, exit) in cases {
            let problem = Box::new(Problem::new(code.clone(), "d", "r"));
            assert_eq!(Failure::Client(ClientError::Problem(problem)).exit(), exit, "{code}");
        }
    }
}
