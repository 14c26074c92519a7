//! Errors as RFC 9457 problem details with a stable code and a remedy.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::open_enum::open_enum;

/// Media type of a problem.
pub const MEDIA_TYPE: &str = "application/problem+json";

open_enum! {
    /// Stable code of a problem; programs go by it, never by the texts.
    Code {
        /// The request's path, query, headers or body do not parse.
        InvalidRequest = "invalid_request",
        /// A field's value is not allowed.
        InvalidField = "invalid_field",
        /// The caller has no admin identity that may be used now.
        NotAuthenticated = "not_authenticated",
        /// The caller's role or scope does not allow this.
        Denied = "denied",
        /// No such route.
        NoSuchRoute = "no_such_route",
        /// No such cluster.
        ClusterNotFound = "cluster_not_found",
        /// No such key version.
        VersionNotFound = "version_not_found",
        /// No such node.
        NodeNotFound = "node_not_found",
        /// No such worker.
        WorkerNotFound = "worker_not_found",
        /// No such admin.
        AdminNotFound = "admin_not_found",
        /// No such join token.
        TokenNotFound = "token_not_found",
        /// The route exists, but not with this method.
        MethodNotAllowed = "method_not_allowed",
        /// The name is taken.
        AlreadyExists = "already_exists",
        /// The thing's state does not allow this.
        StateConflict = "state_conflict",
        /// A guard refuses this.
        Guarded = "guarded",
        /// The idempotency key came with another request before.
        IdempotencyKeyReused = "idempotency_key_reused",
        /// The record is no longer at the revision of `If-Match`.
        RevisionMismatch = "revision_mismatch",
        /// The body is too long.
        BodyTooLarge = "body_too_large",
        /// The body is not JSON.
        UnsupportedMediaType = "unsupported_media_type",
        /// The caller sends too many requests.
        TooManyRequests = "too_many_requests",
        /// The agent or its store cannot do this now.
        Unavailable = "unavailable",
        /// The store looks older than it was; changes wait for the operator.
        RecoveredUnconfirmed = "recovered_unconfirmed",
        /// The change may or may not have happened.
        OutcomeUnknown = "outcome_unknown",
        /// A fault of the agent.
        Internal = "internal",
    }
}

impl Code {
    /// HTTP status that goes with the code; 500 for one that is not known.
    pub fn status(&self) -> u16 {
        match self {
            Self::InvalidRequest | Self::InvalidField => 400,
            Self::NotAuthenticated => 401,
            Self::Denied => 403,
            Self::NoSuchRoute
            | Self::ClusterNotFound
            | Self::VersionNotFound
            | Self::NodeNotFound
            | Self::WorkerNotFound
            | Self::AdminNotFound
            | Self::TokenNotFound => 404,
            Self::MethodNotAllowed => 405,
            Self::AlreadyExists | Self::StateConflict | Self::Guarded | Self::IdempotencyKeyReused => 409,
            Self::RevisionMismatch => 412,
            Self::BodyTooLarge => 413,
            Self::UnsupportedMediaType => 415,
            Self::TooManyRequests => 429,
            Self::Unavailable | Self::RecoveredUnconfirmed | Self::OutcomeUnknown => 503,
            Self::Internal | Self::Other(_) => 500,
        }
    }

    /// Short, constant title of the code.
    pub fn title(&self) -> &'static str {
        match self {
            Self::InvalidRequest => "The request cannot be read",
            Self::InvalidField => "A field's value is not allowed",
            Self::NotAuthenticated => "No usable admin identity",
            Self::Denied => "Not allowed",
            Self::NoSuchRoute => "No such route",
            Self::ClusterNotFound => "No such cluster",
            Self::VersionNotFound => "No such key version",
            Self::NodeNotFound => "No such node",
            Self::WorkerNotFound => "No such worker",
            Self::AdminNotFound => "No such admin",
            Self::TokenNotFound => "No such join token",
            Self::MethodNotAllowed => "Method not allowed",
            Self::AlreadyExists => "The name is taken",
            Self::StateConflict => "The present state does not allow this",
            Self::Guarded => "A guard refuses this",
            Self::IdempotencyKeyReused => "The idempotency key was used before",
            Self::RevisionMismatch => "Changed in the meantime",
            Self::BodyTooLarge => "The body is too long",
            Self::UnsupportedMediaType => "The body is not JSON",
            Self::TooManyRequests => "Too many requests",
            Self::Unavailable => "Not available now",
            Self::RecoveredUnconfirmed => "The store was restored and not confirmed",
            Self::OutcomeUnknown => "The outcome is not known",
            Self::Internal => "A fault of the agent",
            Self::Other(_) => "Failed",
        }
    }
}

/// A problem, as RFC 9457 has it, with our `code`, `remedy` and `request_id`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Problem {
    /// `urn:fleet-kms:problem:<code>`.
    #[serde(rename = "type")]
    pub kind: String,
    /// Short title, the same for every problem of one code.
    pub title: String,
    /// HTTP status.
    pub status: u16,
    /// Stable code; programs go by it.
    pub code: Code,
    /// What is wrong this time.
    pub detail: String,
    /// What to do about it.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub remedy: String,
    /// Field of the request that is meant, if one is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub field: Option<String>,
    /// Id of the request, to be found in the agent's log.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub request_id: Option<String>,
}

impl Problem {
    /// Makes a problem of `code` with its title and status.
    pub fn new(code: Code, detail: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self {
            kind: format!("urn:fleet-kms:problem:{code}"),
            title: code.title().to_owned(),
            status: code.status(),
            detail: detail.into(),
            remedy: remedy.into(),
            field: None,
            request_id: None,
            code,
        }
    }

    /// Names the field that is meant.
    #[must_use]
    pub fn with_field(mut self, field: impl Into<String>) -> Self {
        self.field = Some(field.into());
        self
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_problem_has_the_members_of_rfc_9457_and_ours() {
        let problem = Problem::new(Code::ClusterNotFound, "no cluster `x`", "run `kmsctl cluster list`");
        let json = serde_json::to_value(&problem).unwrap();
        assert_eq!(json["type"], "urn:fleet-kms:problem:cluster_not_found");
        assert_eq!(json["status"], 404);
        assert_eq!(json["code"], "cluster_not_found");
        assert_eq!(json["title"], "No such cluster");
        assert_eq!(serde_json::from_value::<Problem>(json).unwrap(), problem);
    }

    #[test]
    fn every_known_code_has_a_status_and_a_title_of_its_own() {
        let mut titles = std::collections::HashSet::new();
        for text in Code::KNOWN {
            let code = Code::from(*text);
            assert!((400..=503).contains(&code.status()), "{text}");
            assert!(titles.insert(code.title()), "{text}");
        }
    }

    #[test]
    fn a_code_of_a_newer_release_is_kept() {
        let code: Code = serde_json::from_str("\"quota_reached\"").unwrap();
        assert_eq!(code.as_str(), "quota_reached");
    }
}
