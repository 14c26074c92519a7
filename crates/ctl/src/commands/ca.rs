//! `kmsctl ca`: the fleet CA.
//!
//! After a rollover the context's own files follow: its roots, and after a
//! compromise its certificate, which the agent then refuses.

use std::time::SystemTime;

use fleet_kms_admin_api::{Ca, CaKind, CaState, Change, Operation, RotateCa, RotatedCa};

use crate::cli::{CaVerb, DangerArgs};
use crate::commands::Session;
use crate::commands::changes::{self, Danger, Request};
use crate::console::clean;
use crate::contexts::replace_file;
use crate::failure::Failure;
use crate::output::Table;
use crate::output::table::{column, or_dash, wide};
use crate::output::time::relative;

/// What must be typed before a compromised CA is replaced.
const COMPROMISED: &str = "compromised";

pub(super) async fn run(session: &mut Session<'_>, verb: CaVerb) -> Result<(), Failure> {
    match verb {
        CaVerb::Show => {
            let ca: Ca = session.client().await?.read(Operation::ShowCa, &[]).await?;
            session.show(&ca, |all, now| screen(&ca, all, now))
        }
        CaVerb::Rotate { root, compromised, change } => rotate(session, root, compromised, &change).await,
    }
}

async fn rotate(
    session: &mut Session<'_>,
    root: bool,
    compromised: bool,
    args: &DangerArgs,
) -> Result<(), Failure> {
    let rotated: Change<RotatedCa> = if compromised {
        let request = Request::bare(Operation::ReplaceCa, &[]);
        let danger = Danger { what: "replacing the fleet CA as compromised".to_owned(), name: COMPROMISED };
        changes::apply_dangerous(session, &request, args, &danger).await?
    } else {
        let body = RotateCa { root };
        let request =
            Request { operation: Operation::RotateCa, path: &[], body: Some(&body), revision: None };
        changes::apply(session, &request, &args.change).await?
    };
    let kept = rotated.result.as_ref().map_or(Ok(()), |result| keep(session, result));
    changes::show(session, &rotated, |rotated, all, now| screen(&rotated.ca, all, now))?;
    if let (true, Some(RotatedCa { ca, .. })) = (session.for_people(), &rotated.result) {
        for node in &ca.nodes_to_enrol {
            session.console.print(&clean(&format!("needs a join token: {node}")))?;
        }
    }
    kept
}

/// Puts the new roots, and the new certificate if there is one, into the files of
/// the context.
fn keep(session: &mut Session<'_>, rotated: &RotatedCa) -> Result<(), Failure> {
    let context = session.context()?;
    let files =
        [(&context.roots, Some(&rotated.roots)), (&context.certificate, rotated.certificate.as_ref())];
    for (path, text) in files {
        if let Some(text) = text {
            replace_file(path, text)?;
        }
    }
    if session.for_people() {
        let what = if rotated.certificate.is_some() { "roots and certificate" } else { "roots" };
        session.console.tell(&format!("this context has the new {what}"));
    }
    Ok(())
}

fn screen(ca: &Ca, all: bool, now: SystemTime) -> String {
    let columns = [
        column("CA"),
        column("GENERATION"),
        column("STATE"),
        column("ENDS"),
        column("NEXT"),
        column("SHA-256"),
        wide("BEGINS"),
        wide("SIGNED BY"),
    ];
    let mut table = Table::new(all, &columns);
    for one in ca.generations.iter().filter(|one| all || one.state != CaState::Retired) {
        let next = match (one.activates, one.trusted_until) {
            (Some(activates), _) => format!("active {}", relative(activates, now)),
            (None, Some(until)) if one.state == CaState::Retiring => {
                format!("trusted until {until} ({})", relative(until, now))
            }
            (None, _) => "-".to_owned(),
        };
        let sha256 = if all { one.sha256.clone() } else { one.sha256.chars().take(16).collect() };
        table.row([
            one.kind.to_string(),
            one.generation.to_string(),
            one.state.to_string(),
            relative(one.not_after, now),
            next,
            sha256,
            one.not_before.to_string(),
            or_dash(one.signed_by.filter(|_| one.kind == CaKind::Issuing).map(|root| format!("root {root}"))),
        ]);
    }
    let mut text = table.finish("no CA");
    if !ca.nodes_to_enrol.is_empty() {
        let count = ca.nodes_to_enrol.len();
        text.push_str(&format!("\n\nno trusted root vouches for {count} nodes; each needs a join token:"));
        for node in &ca.nodes_to_enrol {
            text.push_str(&format!("\n  {}", clean(node)));
        }
    }
    text
}
