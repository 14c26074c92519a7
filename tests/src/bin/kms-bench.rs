//! `make bench`: what a Decrypt through both hops costs over the floor of a
//! two-hop echo on the same transport, in one run of interleaved rounds.
//!
//! kube-apiserver's own client calls; both sides are release builds. Absolute
//! figures of a shared machine mean little; the ratio is the figure.

use std::path::Path;

use anyhow::{Context, ensure};
use fleet_kms_tests::child::{Spec, run};
use fleet_kms_tests::fleet::Fleet;
use fleet_kms_tests::peers::{ClientVersion, kms_client};
use fleet_kms_tests::wait::START_LIMIT;
use serde_json::Value;

const ROUNDS: usize = 15;
const CALLS: &str = "2000";
const WARM_UP: &str = "500";

/// One round's quantiles, in microseconds.
#[derive(Clone, Copy)]
struct Round {
    p50: f64,
    p99: f64,
    per_second: f64,
}

fn main() -> anyhow::Result<()> {
    let fleet = Fleet::start()?;
    let cluster = fleet.cluster("bench")?;
    let sidecar = fleet.sidecar(&cluster, "node-1")?;
    let echo_socket = fleet.path().join("echo.sock");
    let program = std::env::current_exe()?.with_file_name("kms-echo");
    let mut echo = Spec::new("kms-echo", &program, fleet.path()).arg("--socket").arg(&echo_socket).start()?;
    echo.wait_ready("its socket", START_LIMIT, || echo_socket.exists().then_some(()))?;
    let client = kms_client(ClientVersion::V0_37_2)?;

    println!(
        "Decrypt of one 32-byte DEK, KMS v1, kube-apiserver's own client; {ROUNDS} interleaved rounds of {CALLS} calls"
    );
    for callers in ["1", "16", "64"] {
        let (mut ours, mut floor) = (Vec::new(), Vec::new());
        for _ in 0..ROUNDS {
            floor.push(round(&client, &echo_socket, callers)?);
            ours.push(round(&client, &sidecar.socket, callers)?);
        }
        table(callers, &ours, &floor);
    }
    Ok(())
}

fn round(client: &Path, socket: &Path, callers: &str) -> anyhow::Result<Round> {
    let mut command = std::process::Command::new(client);
    command.args(["bench", "-socket"]).arg(socket);
    command.args(["-calls", CALLS, "-warmup", WARM_UP, "-callers", callers]);
    let line: Value = serde_json::from_str(run(&mut command)?.trim())?;
    let field =
        |name: &str| line.get(name).and_then(Value::as_f64).with_context(|| format!("{name} in {line}"));
    let round = Round { p50: field("p50_us")?, p99: field("p99_us")?, per_second: field("per_second")? };
    ensure!(round.p50 > 0.0, "a call took no time: {line}");
    Ok(round)
}

fn table(callers: &str, ours: &[Round], floor: &[Round]) {
    let ratio = |pick: fn(&Round) -> f64| median(ours.iter().zip(floor).map(|(a, b)| pick(a) / pick(b)));
    let of = |rounds: &[Round], pick: fn(&Round) -> f64| median(rounds.iter().map(pick));
    println!("\n{callers:>2} callers     {:>10} {:>10} {:>12}", "p50 µs", "p99 µs", "calls/s");
    for (name, rounds) in [("both hops", ours), ("echo floor", floor)] {
        let (p50, p99, rate) = (of(rounds, |r| r.p50), of(rounds, |r| r.p99), of(rounds, |r| r.per_second));
        println!("  {name:<12} {p50:>10.0} {p99:>10.0} {rate:>12.0}");
    }
    let (p50, p99, rate) = (ratio(|r| r.p50), ratio(|r| r.p99), ratio(|r| r.per_second));
    println!("  {:<12} {p50:>10.2} {p99:>10.2} {rate:>12.2}", "ratio");
}

fn median(values: impl Iterator<Item = f64>) -> f64 {
    let mut values: Vec<f64> = values.collect();
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}
