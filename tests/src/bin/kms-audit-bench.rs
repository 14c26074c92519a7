//! `make audit-bench`: what recording each data call costs, in one run of interleaved rounds, and how much room it takes.
//!
//! Four agents with the same configuration but for `[audit]`; kube-apiserver's own client calls through the sidecar.
//! Absolute figures of a shared machine mean little; the ratios to `summary` are the figures.

use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, ensure};
use fleet_kms_tests::child::run;
use fleet_kms_tests::fleet::{Fleet, Sidecar};
use fleet_kms_tests::peers::{ClientVersion, kms_client};
use serde_json::Value;

const ROUNDS: usize = 9;
const CALLS: &str = "3000";
const WARM_UP: &str = "300";
const CALLERS: [&str; 3] = ["1", "16", "64"];

struct Mode {
    name: &'static str,
    extra: &'static str,
}

const MODES: [Mode; 3] = [
    Mode { name: "summary", extra: "data = \"summary\"" },
    Mode { name: "each/written", extra: "data = \"each\"\neach = \"written\"" },
    Mode { name: "each/durable", extra: "data = \"each\"\neach = \"durable\"" },
];

/// One round of one mode.
#[derive(Clone, Copy)]
struct Round {
    p50: f64,
    p99: f64,
    per_second: f64,
}

fn main() -> anyhow::Result<()> {
    let client = kms_client(ClientVersion::V0_37_2)?;
    let mut fleets: Vec<(Fleet, Sidecar)> = Vec::new();
    for mode in &MODES {
        let fleet = Fleet::start_with(mode.extra)?;
        let cluster = fleet.cluster("bench")?;
        let sidecar = fleet.sidecar(&cluster, "node-1")?;
        fleets.push((fleet, sidecar));
    }
    println!("Decrypt of one 32-byte DEK through both hops; {ROUNDS} interleaved rounds of {CALLS} calls");
    for callers in CALLERS {
        let mut rounds = vec![Vec::new(); MODES.len()];
        for _ in 0..ROUNDS {
            for ((_, sidecar), rounds) in fleets.iter().zip(&mut rounds) {
                rounds.push(round(&client, &sidecar.socket, callers)?);
            }
        }
        table(callers, &rounds);
    }
    size(&fleets)
}

fn round(client: &Path, socket: &Path, callers: &str) -> anyhow::Result<Round> {
    let mut command = Command::new(client);
    command.args(["bench", "-socket"]).arg(socket);
    command.args(["-calls", CALLS, "-warmup", WARM_UP, "-callers", callers]);
    let line: Value = serde_json::from_str(run(&mut command)?.trim())?;
    let field =
        |name: &str| line.get(name).and_then(Value::as_f64).with_context(|| format!("{name} in {line}"));
    let round = Round { p50: field("p50_us")?, p99: field("p99_us")?, per_second: field("per_second")? };
    ensure!(round.per_second > 0.0, "no calls: {line}");
    Ok(round)
}

fn table(callers: &str, rounds: &[Vec<Round>]) {
    println!(
        "\n{callers:>2} callers     {:>10} {:>10} {:>12} {:>22}",
        "p50 µs", "p99 µs", "calls/s", "calls/s to summary"
    );
    let base = rounds.first().cloned().unwrap_or_default();
    for (mode, rounds) in MODES.iter().zip(rounds) {
        let of = |pick: fn(&Round) -> f64| median(rounds.iter().map(pick));
        let ratio = median(rounds.iter().zip(&base).map(|(own, base)| own.per_second / base.per_second));
        let (p50, p99, rate) = (of(|r| r.p50), of(|r| r.p99), of(|r| r.per_second));
        println!("  {:<12} {p50:>10.0} {p99:>10.0} {rate:>12.0} {ratio:>22.3}", mode.name);
    }
}

/// The room that records take: as measured here, and for a fleet's day of probes.
fn size(fleets: &[(Fleet, Sidecar)]) -> anyhow::Result<()> {
    println!("\nroom in the data chain:");
    for (mode, (fleet, _)) in MODES.iter().zip(fleets) {
        let (mut bytes, mut records) = (0, 0);
        for entry in fs::read_dir(fleet.agent.directory.join("audit"))? {
            let path = entry?.path();
            if path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("data-0")) {
                let content = fs::read(&path)?;
                bytes += content.len();
                records += content.iter().filter(|byte| **byte == b'\n').count();
            }
        }
        ensure!(records > 0, "{} has recorded nothing", mode.name);
        let each = bytes as f64 / records as f64;
        // A node's Encrypt, Decrypt and Status each make a record in each period of sums.
        let day = |every: f64| 1000.0 * 3.0 * 3.0 * 86_400.0 / every * each / 1e9;
        println!(
            "  {:<12} {records:>8} records, {each:.0} bytes each; 1,000 clusters x 3 nodes, 3 records each period: \
             {:.1} GB a day every 10 s, {:.1} GB every 5 min",
            mode.name,
            day(10.0),
            day(300.0)
        );
    }
    Ok(())
}

fn median(values: impl Iterator<Item = f64>) -> f64 {
    let mut values: Vec<f64> = values.collect();
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}
