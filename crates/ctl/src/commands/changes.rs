//! What all changes share: the dry run, the question before a dangerous one,
//! and how the outcome is shown.

use std::fmt::Write as _;
use std::time::SystemTime;

use rand_core::{Rng as _, UnwrapErr};
use serde::Serialize;
use serde::de::DeserializeOwned;

use fleet_kms_admin_api::{AgentReach, Change, Operation};

use crate::cli::{ChangeArgs, DangerArgs};
use crate::client::ChangeOptions;
use crate::commands::Session;
use crate::console::{Emphasis, clean};
use crate::failure::Failure;

/// A change to ask for.
pub(super) struct Request<'a, B> {
    pub(super) operation: Operation,
    pub(super) path: &'a [&'a str],
    pub(super) body: Option<&'a B>,
}

impl<'a> Request<'a, ()> {
    /// A change whose path says everything.
    pub(super) fn bare(operation: Operation, path: &'a [&'a str]) -> Self {
        Self { operation, path, body: None }
    }
}

/// What is dangerous about a change, and the name that must be typed for it.
pub(super) struct Danger<'a> {
    /// The change in words, such as `disabling version 3 of demo`.
    pub(super) what: String,
    /// The name that the person must type.
    pub(super) name: &'a str,
}

/// Makes a harmless change.
pub(super) async fn apply<B: Serialize + Sync, T: DeserializeOwned>(
    session: &mut Session<'_>,
    request: &Request<'_, B>,
    args: &ChangeArgs,
) -> Result<Change<T>, Failure> {
    if args.if_revision.is_some() && !request.operation.has_revision() {
        return Err(Failure::Unclear {
            what: "--if-revision: this change has nothing that could be at a revision".to_owned(),
            remedy: "leave it out".to_owned(),
        });
    }
    let options = options(args);
    let client = session.client().await?;
    Ok(client.change(request.operation, request.path, request.body, &options).await?)
}

/// Makes a dangerous change: shows what it will do and asks for the name,
/// unless `--yes`; refuses where nobody can be asked.
pub(super) async fn apply_dangerous<B: Serialize + Sync, T: DeserializeOwned>(
    session: &mut Session<'_>,
    request: &Request<'_, B>,
    args: &DangerArgs,
    danger: &Danger<'_>,
) -> Result<Change<T>, Failure> {
    if !args.yes && !args.change.dry_run {
        if !session.console.can_ask() {
            return Err(Failure::Unconfirmed { what: danger.what.clone() });
        }
        let rehearsal = ChangeArgs { dry_run: true, ..args.change.clone() };
        let plan: Change<T> = apply(session, request, &rehearsal).await?;
        confirm(session, &plan.effects, &plan.warnings, danger)?;
    }
    apply(session, request, &args.change).await
}

fn confirm(
    session: &mut Session<'_>,
    effects: &[String],
    warnings: &[String],
    danger: &Danger<'_>,
) -> Result<(), Failure> {
    let console = &mut *session.console;
    let heading = console.emphasise(&format!("This is {}:", danger.what), Emphasis::Yellow);
    console.tell(&heading);
    for effect in effects {
        console.tell(&format!("  - {}", clean(effect)));
    }
    for warning in warnings {
        console.warn(warning);
    }
    let answer = console.ask(&format!("Type `{}` to go on:", danger.name))?;
    if answer.as_deref() == Some(danger.name) { Ok(()) } else { Err(Failure::Declined) }
}

/// Shows the outcome: effects or the thing itself for people, everything for programs.
pub(super) fn show<T: Serialize>(
    session: &mut Session<'_>,
    change: &Change<T>,
    table: impl FnOnce(&T, bool, SystemTime) -> String,
) -> Result<(), Failure> {
    if session.for_people() {
        for warning in &change.warnings {
            session.console.warn(warning);
        }
        tell_reach(session, &change.agents);
    }
    session.show(change, |wide, now| match (&change.result, change.effects.as_slice()) {
        (Some(result), []) if change.applied => table(result, wide, now),
        (_, effects) if change.applied => clean(&effects.join("\n")),
        (_, effects) => {
            let mut text = "dry run: nothing was changed".to_owned();
            for effect in effects {
                _ = write!(text, "\n  - {}", clean(effect));
            }
            text
        }
    })
}

/// Says which agents act on a change by now, and until when the others may not.
fn tell_reach(session: &mut Session<'_>, agents: &[AgentReach]) {
    let (have, lack): (Vec<_>, Vec<_>) = agents.iter().partition(|agent| agent.has_it);
    if !have.is_empty() {
        let names: Vec<_> = have.iter().map(|agent| clean(&agent.agent)).collect();
        let all = if lack.is_empty() { "every live agent: " } else { "" };
        session.console.tell(&format!("in effect on {all}{}", names.join(", ")));
    }
    for agent in lack {
        let until =
            agent.may_serve_until.map_or_else(|| "it hears of it".to_owned(), |time| time.to_string());
        let text = format!("agent {} has not heard of it and may go on serving until {until}", agent.agent);
        session.console.warn(&text);
    }
}

fn options(args: &ChangeArgs) -> ChangeOptions {
    ChangeOptions {
        reason: args.reason.clone(),
        dry_run: args.dry_run,
        if_revision: args.if_revision,
        idempotency_key: args.idempotency_key.clone().unwrap_or_else(random_key),
    }
}

fn random_key() -> String {
    let mut bytes = [0; 16];
    UnwrapErr(getrandom::SysRng).fill_bytes(&mut bytes);
    bytes.iter().fold(String::with_capacity(32), |mut text, byte| {
        _ = write!(text, "{byte:02x}");
        text
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_call_has_an_idempotency_key_of_its_own_unless_one_is_given() {
        let args = ChangeArgs::default();
        assert_ne!(options(&args).idempotency_key, options(&args).idempotency_key);
        let given = ChangeArgs { idempotency_key: Some("k".into()), ..args };
        assert_eq!(options(&given).idempotency_key, "k");
    }
}
