//! `kmsctl audit`: records searched and followed over the admin API, files verified without one.

use std::time::{Duration, SystemTime};

use fleet_kms_admin_api::{AuditHead, AuditQuery, AuditRecord, HumanDuration, Operation, Timestamp};
use serde_json::Value;

use crate::cli::{AuditVerb, ChainName, Format, SearchArgs, TailArgs};
use crate::commands::Session;
use crate::failure::Failure;
use crate::output::Table;
use crate::output::table::{column, or_dash, wide};

mod verify;

/// Records asked for on one page.
const PAGE: u32 = 500;
/// Between two looks of `tail -f`.
const FOLLOW_EVERY: Duration = Duration::from_secs(1);
/// A change that is younger and has no outcome yet is shown once it has one.
const MAY_END: Duration = Duration::from_secs(10);

pub(super) async fn run(session: &mut Session<'_>, verb: AuditVerb) -> Result<(), Failure> {
    match verb {
        AuditVerb::Verify(args) => verify::run(session, args).await,
        AuditVerb::Search(args) => search(session, args).await,
        AuditVerb::Tail(args) => tail(session, &args).await,
        AuditVerb::Heads => {
            let heads: Vec<AuditHead> = session.client().await?.list(Operation::ListAuditHeads, &[]).await?;
            session.show(&heads, |_, _| head_table(&heads))
        }
    }
}

async fn search(session: &mut Session<'_>, args: SearchArgs) -> Result<(), Failure> {
    let now = fleet_kms_process::clock::now();
    let wanted = args.limit as usize;
    let mut query = AuditQuery {
        limit: Some(args.limit.min(PAGE)),
        after: None,
        chain: Some(chain(args.chain).to_owned()),
        from: args.from.map(|text| time(&text, now)).transpose()?,
        to: args.to.map(|text| time(&text, now)).transpose()?,
        who: args.who,
        cluster: args.cluster,
        action: args.action,
        outcome: args.outcome,
    };
    let mut records: Vec<AuditRecord> = Vec::new();
    loop {
        let page = session.client().await?.search_audit(&query).await?;
        records.extend(page.items);
        query.after = page.next;
        if records.len() >= wanted || query.after.is_none() {
            break;
        }
    }
    records.truncate(wanted);
    session.show(&records, |all, _| record_table(&records, all))
}

async fn tail(session: &mut Session<'_>, args: &TailArgs) -> Result<(), Failure> {
    let mut shown = 0;
    let mut wanted = args.lines as usize;
    loop {
        let mut records = newer(session, args.chain, shown, wanted).await?;
        records.reverse();
        let now = fleet_kms_process::clock::now();
        for record in records {
            let may_end = record.outcome.as_deref() == Some("open") && record.time.age(now) < MAY_END;
            if args.follow && may_end {
                break;
            }
            shown = record.seq;
            let line = line(session.global.output, &record)?;
            session.console.print(&line)?;
        }
        if !args.follow {
            return Ok(());
        }
        wanted = usize::MAX;
        tokio::time::sleep(FOLLOW_EVERY).await;
    }
}

/// The newest records that were not shown yet, the newest first.
async fn newer(
    session: &mut Session<'_>,
    of: ChainName,
    shown: u64,
    wanted: usize,
) -> Result<Vec<AuditRecord>, Failure> {
    let limit = u32::try_from(wanted).unwrap_or(PAGE).min(PAGE);
    let mut query =
        AuditQuery { limit: Some(limit), chain: Some(chain(of).to_owned()), ..AuditQuery::default() };
    let mut records = Vec::new();
    loop {
        let page = session.client().await?.search_audit(&query).await?;
        let all_new = page.items.iter().all(|record| record.seq > shown);
        records.extend(page.items.into_iter().filter(|record| record.seq > shown));
        query.after = page.next;
        if records.len() >= wanted || !all_new || query.after.is_none() {
            records.truncate(wanted);
            return Ok(records);
        }
    }
}

/// One record on one line: for a person in columns, for a program as JSON.
fn line(format: Format, record: &AuditRecord) -> Result<String, Failure> {
    if matches!(format, Format::Json | Format::Yaml) {
        let json = serde_json::to_string(record);
        return json.map_err(|source| Failure::Form { form: "JSON", source: source.into() });
    }
    let cells = [
        record.time.to_string(),
        or_dash(record.who.as_ref()),
        or_dash(record.action.as_ref().or(Some(&record.kind))),
        or_dash(record.cluster.as_ref()),
        or_dash(record.target.as_ref()),
        or_dash(record.outcome.as_ref()),
        detail(record),
    ];
    Ok(crate::console::clean(&cells.join("  ").replace('\n', " ")).trim_end().to_owned())
}

fn record_table(records: &[AuditRecord], all: bool) -> String {
    let columns = [
        column("TIME"),
        wide("SEQ"),
        column("WHO"),
        column("ACTION"),
        column("CLUSTER"),
        column("TARGET"),
        column("OUTCOME"),
        column("DETAIL"),
    ];
    let mut table = Table::new(all, &columns);
    for record in records {
        table.row([
            record.time.to_string(),
            record.seq.to_string(),
            or_dash(record.who.as_ref()),
            or_dash(record.action.as_ref().or(Some(&record.kind))),
            or_dash(record.cluster.as_ref()),
            or_dash(record.target.as_ref()),
            or_dash(record.outcome.as_ref()),
            detail(record),
        ]);
    }
    table.finish("no such records")
}

fn head_table(heads: &[AuditHead]) -> String {
    let columns = [column("AGENT"), column("CHAIN"), column("SEQ"), column("STORED"), column("HASH")];
    let mut table = Table::new(false, &columns);
    for head in heads {
        let seq = head.seq.to_string();
        table.row([
            head.agent.clone(),
            head.chain.to_string(),
            seq,
            head.stored.to_string(),
            head.hash.clone(),
        ]);
    }
    table.finish("the store has no heads yet")
}

/// What else a person wants to see of a record: the reason, or how many calls.
fn detail(record: &AuditRecord) -> String {
    let text = |field: &str| {
        record.record.get(field).map(|value| match value {
            Value::String(text) => text.clone(),
            other => other.to_string(),
        })
    };
    match record.kind.as_str() {
        "calls" | "gap" => text("calls").map_or_else(String::new, |calls| format!("{calls} calls")),
        "call" => text("items").map_or_else(String::new, |items| format!("{items} items")),
        _ => text("reason").unwrap_or_default(),
    }
}

fn chain(name: ChainName) -> &'static str {
    match name {
        ChainName::Changes => "changes",
        ChainName::Data => "data",
    }
}

/// Reads a time, or how long ago it was.
fn time(text: &str, now: SystemTime) -> Result<Timestamp, Failure> {
    if let Ok(ago) = text.parse::<HumanDuration>() {
        return Ok(now.checked_sub(ago.as_duration()).unwrap_or(SystemTime::UNIX_EPOCH).into());
    }
    serde_json::from_value(Value::String(text.to_owned())).map_err(|_| Failure::Unclear {
        what: format!("`{text}` is no time"),
        remedy: "write one like 2026-01-31T08:00:00Z, or how long ago, like 2h".to_owned(),
    })
}

#[cfg(test)]
mod tests {
    use std::time::UNIX_EPOCH;

    use super::*;

    #[test]
    fn a_time_is_a_date_or_how_long_ago() {
        let now = UNIX_EPOCH + Duration::from_secs(1_800_000_000);
        assert_eq!(time("1h", now).unwrap().age(now), Duration::from_secs(3600));
        assert_eq!(time("2027-01-15T08:00:00Z", now).unwrap(), Timestamp::from(now));
        assert!(time("yesterday", now).is_err());
    }
}
