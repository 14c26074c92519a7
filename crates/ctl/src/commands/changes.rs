//! What all changes share: the dry run, the question before a dangerous one,
//! and how the outcome is shown.

use std::fmt::Write as _;
use std::time::SystemTime;

use rand_core::{Rng as _, UnwrapErr};
use serde::Serialize;
use serde::de::DeserializeOwned;

use fleet_kms_admin_api::{Change, Operation};

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
    /// The revision that the cluster must be at; only keyrings have one.
    pub(super) revision: Option<u64>,
}

impl<'a> Request<'a, ()> {
    /// A change whose path says everything.
    pub(super) fn bare(operation: Operation, path: &'a [&'a str]) -> Self {
        Self { operation, path, body: None, revision: None }
    }

    /// The same, refused unless the cluster is at this revision.
    pub(super) fn at(self, revision: Option<u64>) -> Self {
        Self { revision, ..self }
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
    let options = options(args, request.revision);
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

fn options(args: &ChangeArgs, if_revision: Option<u64>) -> ChangeOptions {
    ChangeOptions {
        reason: args.reason.clone(),
        dry_run: args.dry_run,
        if_revision,
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
        assert_ne!(options(&args, None).idempotency_key, options(&args, None).idempotency_key);
        let given = ChangeArgs { idempotency_key: Some("k".into()), ..args };
        assert_eq!(options(&given, None).idempotency_key, "k");
    }
}
