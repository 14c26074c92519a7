//! The sidecar's only map from its errors to gRPC codes and to the texts that
//! kube-apiserver hands on to its users.
//!
//! A text must never name a host, a path or key material, and must make sense
//! to a person who reads it in the answer to `kubectl`.

use std::time::Duration;

use tonic::{Code, Status};

use crate::links::LinksError;

/// Why a call of kube-apiserver fails.
#[derive(Debug, thiserror::Error)]
pub enum CallError {
    /// Nothing to encrypt.
    #[error("the plaintext is empty")]
    EmptyPlaintext,
    /// More to encrypt than this API version can store.
    #[error("the plaintext is longer than {limit} bytes")]
    LongPlaintext {
        /// The most bytes.
        limit: usize,
    },
    /// Malformed, unknown, foreign, altered, or not of the key id that came
    /// with it. Which of these, only the agent's audit says.
    #[error("the ciphertext was not made by this cluster's keys, or was altered")]
    NotOurs,
    /// An operator has disabled the version.
    #[error("the key version that encrypted this is disabled")]
    VersionDisabled,
    /// The version is destroyed.
    #[error("the key version that encrypted this is destroyed")]
    VersionDestroyed,
    /// The version that the last Status named may no longer wrap.
    #[error("the key was rotated; the next Status call tells the new key id")]
    KeyRotated,
    /// No answer from any agent, or a refusal of this node.
    #[error(transparent)]
    Links(#[from] LinksError),
    /// An agent's answer breaks the protocol.
    #[error("kms-agent gave an answer that makes no sense: {0}")]
    BadAnswer(&'static str),
}

/// What is appended where only this node's log can say more.
const SEE_LOG: &str = "see kms-sidecar's log on this node";

/// The reason of an agent that an operator told to serve this cluster no more.
const CLUSTER_RETIRED: &str = "cluster_retired";

impl CallError {
    /// The gRPC code.
    pub fn code(&self) -> Code {
        match self {
            Self::EmptyPlaintext | Self::LongPlaintext { .. } | Self::NotOurs => Code::InvalidArgument,
            Self::VersionDisabled | Self::VersionDestroyed | Self::KeyRotated => Code::FailedPrecondition,
            Self::BadAnswer(_) => Code::Internal,
            Self::Links(LinksError::NotEnrolled | LinksError::Unreachable { .. }) => Code::Unavailable,
            Self::Links(LinksError::OutOfTime { .. }) => Code::DeadlineExceeded,
            Self::Links(LinksError::Refused(refusal)) => match refusal.code {
                Code::Unauthenticated | Code::PermissionDenied => Code::PermissionDenied,
                Code::Unavailable => Code::Unavailable,
                _ => Code::FailedPrecondition,
            },
        }
    }

    /// The closed label of this error in metrics and logs.
    pub fn outcome(&self) -> &'static str {
        match self {
            Self::EmptyPlaintext => "empty_plaintext",
            Self::LongPlaintext { .. } => "long_plaintext",
            Self::NotOurs => "not_ours",
            Self::VersionDisabled => "version_disabled",
            Self::VersionDestroyed => "version_destroyed",
            Self::KeyRotated => "key_rotated",
            Self::BadAnswer(_) => "bad_answer",
            Self::Links(LinksError::NotEnrolled) => "not_enrolled",
            Self::Links(LinksError::Unreachable { .. }) => "unreachable",
            Self::Links(LinksError::OutOfTime { .. }) => "out_of_time",
            Self::Links(LinksError::Refused(_)) => "refused",
        }
    }

    /// Whether the call says something about this node's health, rather than
    /// about what was asked.
    pub fn is_node_failure(&self) -> bool {
        matches!(self, Self::Links(_) | Self::BadAnswer(_))
    }

    /// The text for kube-apiserver.
    pub fn text(&self) -> String {
        match self {
            Self::EmptyPlaintext
            | Self::LongPlaintext { .. }
            | Self::NotOurs
            | Self::VersionDisabled
            | Self::VersionDestroyed
            | Self::KeyRotated => self.to_string(),
            Self::BadAnswer(_) => format!("kms-agent gave an answer that makes no sense; {SEE_LOG}"),
            Self::Links(LinksError::NotEnrolled) => {
                format!("this node is not enrolled with a kms-agent; {SEE_LOG}")
            }
            Self::Links(LinksError::Unreachable { outage }) => {
                format!("no kms-agent could be reached for {}; {SEE_LOG}", seconds(*outage))
            }
            Self::Links(LinksError::OutOfTime { outage: Some(outage) }) => {
                format!("no kms-agent could be reached in time, for {} now; {SEE_LOG}", seconds(*outage))
            }
            Self::Links(LinksError::OutOfTime { outage: None }) => {
                format!("no kms-agent answered in time; {SEE_LOG}")
            }
            Self::Links(LinksError::Refused(refusal)) => {
                let why = match refusal.code {
                    // A person's decision, and another person's to undo: worth more than "refused".
                    _ if refusal.reason == CLUSTER_RETIRED => {
                        "this cluster is retired in kms-agent, whose operator can restore it"
                    }
                    Code::Unauthenticated | Code::PermissionDenied => "kms-agent does not serve this node",
                    Code::Unavailable => "kms-agent cannot use its keys now",
                    _ => "kms-agent refused the call",
                };
                format!("{why}; {SEE_LOG}")
            }
        }
    }
}

impl From<CallError> for Status {
    fn from(error: CallError) -> Self {
        Self::new(error.code(), error.text())
    }
}

/// Whole seconds, at least one: nobody plans by less.
fn seconds(duration: Duration) -> String {
    format!("{}s", duration.as_secs().max(1))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::links::Refusal;

    #[test]
    fn an_outage_is_told_with_its_length_and_where_to_look() {
        let error = CallError::from(LinksError::Unreachable { outage: Duration::from_millis(61_900) });
        assert_eq!(error.text(), "no kms-agent could be reached for 61s; see kms-sidecar's log on this node");
        assert_eq!(error.code(), Code::Unavailable);
    }

    #[test]
    fn an_agents_own_words_go_no_further() {
        let refusal = Refusal {
            code: Code::PermissionDenied,
            reason: "banned".to_owned(),
            text: "node spiffe://prod/cluster/x is banned on 10.0.0.7:7443".to_owned(),
        };
        let status = Status::from(CallError::from(LinksError::Refused(refusal)));
        assert_eq!(status.code(), Code::PermissionDenied);
        assert_eq!(
            status.message(),
            "kms-agent does not serve this node; see kms-sidecar's log on this node"
        );
    }

    #[test]
    fn a_retired_cluster_is_called_so() {
        let refusal = Refusal {
            code: Code::FailedPrecondition,
            reason: CLUSTER_RETIRED.to_owned(),
            text: "this cluster is retired".to_owned(),
        };
        let status = Status::from(CallError::from(LinksError::Refused(refusal)));
        assert_eq!(status.code(), Code::FailedPrecondition);
        assert!(status.message().starts_with("this cluster is retired in kms-agent"), "{status}");
    }

    #[test]
    fn everything_about_a_ciphertext_that_is_not_ours_reads_the_same() {
        let status = Status::from(CallError::NotOurs);
        assert_eq!(status.code(), Code::InvalidArgument);
        assert_eq!(status.message(), "the ciphertext was not made by this cluster's keys, or was altered");
    }
}
