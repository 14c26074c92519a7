//! What every change has in common: its options in, its envelope out.
//!
//! `reason` and `dry_run` are query parameters of every change, whatever its
//! method, so that bodies hold the resource and nothing else.

use std::borrow::Cow;

use serde::{Deserialize, Serialize};
use utoipa::openapi::schema::{ArrayBuilder, ObjectBuilder, Type};
use utoipa::openapi::{Ref, RefOr, Schema};
use utoipa::{PartialSchema, ToSchema};

use crate::scalars::Timestamp;

/// Header that makes a repeated change harmless: the same key with the same
/// request gets the first one's answer.
pub const IDEMPOTENCY_KEY: &str = "idempotency-key";

/// Header that carries the request's id, on every answer.
pub const REQUEST_ID: &str = "x-request-id";

/// The longest idempotency key.
pub const MAX_IDEMPOTENCY_KEY: usize = 64;

/// The longest reason, in bytes.
pub const MAX_REASON: usize = 512;

/// Query of every change.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ChangeQuery {
    /// Why; stands in the audit record.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// Check and describe the change, but do nothing.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub dry_run: bool,
}

/// Answer to a change.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Change<T> {
    /// Whether it was done; false on a dry run.
    pub applied: bool,
    /// What it does, one sentence each.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub effects: Vec<String>,
    /// What the operator should know or do next, one sentence each.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub warnings: Vec<String>,
    /// Which agents act on it by now, where that matters: a ban holds where it has arrived.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub agents: Vec<AgentReach>,
    /// The thing after the change; absent on a dry run.
    #[serde(default = "nothing", skip_serializing_if = "Option::is_none")]
    pub result: Option<T>,
}

/// Whether a live agent acts on a change.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct AgentReach {
    /// Name of the agent.
    pub agent: String,
    /// Whether it does.
    pub has_it: bool,
    /// Until when it may go on serving without it; absent when it has it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub may_serve_until: Option<Timestamp>,
}

impl<T> Change<T> {
    /// What a dry run answers.
    pub fn plan(effects: Vec<String>, warnings: Vec<String>) -> Self {
        Self { applied: false, effects, warnings, agents: Vec::new(), result: None }
    }

    /// What a change that was made answers.
    pub fn done(effects: Vec<String>, warnings: Vec<String>, result: Option<T>) -> Self {
        Self { applied: true, effects, warnings, agents: Vec::new(), result }
    }
}

fn nothing<T>() -> Option<T> {
    None
}

impl<T: ToSchema> PartialSchema for Change<T> {
    fn schema() -> RefOr<Schema> {
        let sentences = |description: &str| {
            ArrayBuilder::new()
                .items(ObjectBuilder::new().schema_type(Type::String))
                .description(Some(description))
        };
        ObjectBuilder::new()
            .description(Some("Answer to a change."))
            .property(
                "applied",
                ObjectBuilder::new()
                    .schema_type(Type::Boolean)
                    .description(Some("Whether it was done; false on a dry run.")),
            )
            .required("applied")
            .property("effects", sentences("What it does, one sentence each."))
            .property("warnings", sentences("What the operator should know or do next, one sentence each."))
            .property(
                "agents",
                ArrayBuilder::new().items(Ref::from_schema_name(AgentReach::name())).description(Some(
                    "Which agents act on it by now, where that matters: a ban holds where it has arrived.",
                )),
            )
            .property("result", Ref::from_schema_name(T::name()))
            .into()
    }
}

impl<T: ToSchema> ToSchema for Change<T> {
    fn name() -> Cow<'static, str> {
        format!("{}Change", T::name()).into()
    }

    fn schemas(schemas: &mut Vec<(String, RefOr<Schema>)>) {
        schemas.push((T::name().into(), T::schema()));
        schemas.push((AgentReach::name().into(), AgentReach::schema()));
        T::schemas(schemas);
        AgentReach::schemas(schemas);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_dry_run_answers_without_a_result() {
        let plan: Change<u32> = serde_json::from_str(r#"{"applied":false,"effects":["x"]}"#).unwrap();
        assert!(!plan.applied && plan.result.is_none());
        assert_eq!(serde_json::to_string(&plan).unwrap(), r#"{"applied":false,"effects":["x"]}"#);
    }

    #[test]
    fn a_misspelt_option_is_refused() {
        assert!(serde_json::from_str::<ChangeQuery>(r#"{"dryrun":true}"#).is_err());
    }
}
