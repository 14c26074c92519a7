//! `kmsctl status`: the fleet on one screen.

use std::time::SystemTime;

use fleet_kms_admin_api::Status;

use crate::cli::StatusArgs;
use crate::commands::Session;
use crate::console::{Console, Emphasis, clean};
use crate::failure::Failure;
use crate::output::table::{Table, column, pairs};
use crate::output::time::{both, relative};

/// Rows of each list, so that everything fits one screen.
const ROWS: usize = 5;

pub(super) async fn run(session: &mut Session<'_>, args: &StatusArgs) -> Result<(), Failure> {
    look(session, false).await?;
    if !args.watch {
        return Ok(());
    }
    loop {
        tokio::time::sleep(args.every.as_duration()).await;
        if let Err(failure) = look(session, true).await {
            if matches!(failure, Failure::Output(_)) {
                return Err(failure);
            }
            // The agent may come back: say it, and look again over a new link.
            session.client = None;
            failure.report(session.console);
        }
    }
}

async fn look(session: &mut Session<'_>, again: bool) -> Result<(), Failure> {
    let status = session.client().await?.status().await?;
    if again {
        session.console.clear()?;
    }
    if !session.for_people() {
        return session.show(&status, |_, _| String::new());
    }
    let text = screen(session.console, &status, fleet_kms_process::clock::now());
    session.console.print(&text)?;
    Ok(())
}

fn screen(console: &Console, status: &Status, now: SystemTime) -> String {
    let store = match (status.store.ok, &status.store.detail) {
        (true, None) => console.emphasise("ok", Emphasis::Green),
        (true, Some(detail)) => clean(detail),
        (false, detail) => {
            let why = clean(detail.as_deref().unwrap_or("not usable"));
            console.emphasise(&format!("NOT OK: {why}"), Emphasis::Red)
        }
    };
    let heading = format!("agent {}  {}  {}", clean(&status.agent), clean(&status.version), status.time);
    let (clusters, nodes) = (&status.clusters, &status.nodes);
    let backup = status.last_verified_backup.map_or_else(|| "none".to_owned(), |time| both(time, now));
    let counts = pairs(&[
        (
            "clusters",
            counts(
                clusters.total,
                &[
                    (clusters.overdue, "overdue"),
                    (clusters.unbacked, "unbacked"),
                    (clusters.retired, "more retired"),
                ],
            ),
        ),
        ("nodes", counts(nodes.total, &[(nodes.banned, "banned")])),
        ("verified backup", backup),
    ]);
    let heading = console.emphasise(&heading, Emphasis::Bold);
    let mut parts = vec![format!("{heading}\nstore: {store}\n{counts}")];
    parts.extend(rotations(console, status, now));
    parts.extend(certificates(console, status, now));
    parts.push(warnings(console, status));
    parts.join("\n\n")
}

fn counts(total: u32, of_them: &[(u32, &str)]) -> String {
    let marked: Vec<String> = of_them
        .iter()
        .filter(|(count, _)| *count > 0)
        .map(|(count, what)| format!("{count} {what}"))
        .collect();
    if marked.is_empty() { total.to_string() } else { format!("{total} ({})", marked.join(", ")) }
}

fn rotations(console: &Console, status: &Status, now: SystemTime) -> Option<String> {
    let mut table = Table::new(false, &[column("CLUSTER"), column("DUE")]);
    for rotation in status.next_rotations.iter().take(ROWS) {
        table.row([rotation.cluster.clone(), relative(rotation.due, now)]);
    }
    section(console, "Next rotations", table, status.next_rotations.len())
}

fn certificates(console: &Console, status: &Status, now: SystemTime) -> Option<String> {
    let mut table = Table::new(false, &[column("IDENTITY"), column("ENDS")]);
    for certificate in status.expiring_certificates.iter().take(ROWS) {
        table.row([certificate.id.clone(), relative(certificate.not_after, now)]);
    }
    section(console, "Certificates about to end", table, status.expiring_certificates.len())
}

fn section(console: &Console, heading: &str, table: Table, total: usize) -> Option<String> {
    if total == 0 {
        return None;
    }
    let heading = console.emphasise(heading, Emphasis::Bold);
    let more = if total > ROWS { format!("\n… and {} more", total - ROWS) } else { String::new() };
    Some(format!("{heading}\n{}{more}", table.finish("")))
}

fn warnings(console: &Console, status: &Status) -> String {
    if status.warnings.is_empty() {
        return console.emphasise("nothing to do", Emphasis::Green);
    }
    let lines = status.warnings.iter().take(ROWS).map(|warning| {
        let text = console.emphasise(&clean(&warning.text), Emphasis::Yellow);
        format!("! {text} ({})\n  remedy: {}", clean(&warning.code), clean(&warning.remedy))
    });
    let mut lines: Vec<String> = lines.collect();
    if status.warnings.len() > ROWS {
        lines.push(format!("… and {} more; `-o json` has all", status.warnings.len() - ROWS));
    }
    lines.join("\n")
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, UNIX_EPOCH};

    use fleet_kms_admin_api::Timestamp;
    use fleet_kms_admin_api::status::{ClusterCounts, DueRotation, NodeCounts, StoreStatus, Warning};

    use super::*;

    #[test]
    fn the_status_of_a_large_troubled_fleet_fits_one_screen() {
        let now = UNIX_EPOCH + Duration::from_secs(1_800_000_000);
        let status = Status {
            agent: "agent-1".into(),
            version: "0.1.0".into(),
            time: Timestamp::from(now),
            store: StoreStatus { ok: false, detail: Some("disk full".into()) },
            clusters: ClusterCounts { total: 900, overdue: 2, unbacked: 1, retired: 0 },
            nodes: NodeCounts { total: 2_700, banned: 0 },
            next_rotations: (0..20)
                .map(|i| DueRotation { cluster: format!("c{i}"), due: Timestamp::from(now) })
                .collect(),
            expiring_certificates: Vec::new(),
            last_verified_backup: None,
            warnings: (0..20)
                .map(|i| Warning { code: format!("w{i}"), text: "t".into(), remedy: "r".into() })
                .collect(),
        };
        let console = Console::new(Box::new(std::io::sink()), Box::new(std::io::sink()), None);
        let text = screen(&console, &status, now);
        assert!(text.lines().count() <= 32, "{text}");
        for piece in
            ["NOT OK: disk full", "900 (2 overdue, 1 unbacked)", "2700\n", "and 15 more", "remedy: r"]
        {
            assert!(text.contains(piece), "{piece} is missing in\n{text}");
        }
    }
}
