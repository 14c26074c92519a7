//! The renewals of a fleet while its API servers call: no call fails.
#![allow(clippy::unwrap_used, reason = "tests: what is not there fails them")]

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use fleet_kms_process::{clock, runtime};
use fleet_kms_tests::fleet::{Fleet, Ports};
use fleet_kms_tests::member::{Member, reason};
use tokio::sync::Semaphore;
use tokio::task::JoinSet;

/// Callers of the data port, each with a connection, and as many renewals at a time.
const AT_A_TIME: usize = 16;
/// How long the machine is saturated to learn what it can do.
const SATURATED_FOR: Duration = Duration::from_secs(2);

/// A number that a longer run makes larger.
fn number(name: &str, default: usize) -> usize {
    std::env::var(name).map_or(default, |text| text.parse().unwrap())
}

#[test]
fn a_fleet_renews_while_data_calls_run_at_half_of_what_saturates_the_machine() {
    let fleet = Fleet::start().unwrap();
    fleet.cluster("one").unwrap();
    let (identities, ports) = (number("IDENTITIES", 120), fleet.agent.ports);
    let uses = (identities + AT_A_TIME).to_string();
    let token = fleet.kmsctl(&["node", "token", "--cluster", "one", "--uses", &uses]).unwrap();
    runtime::multi_thread().unwrap().block_on(async {
        let callers = enrolled(ports, token.trim(), "caller", AT_A_TIME).await;
        let nodes = enrolled(ports, token.trim(), "node", identities).await;
        let (calls, failed) = drive(&callers, ports, None, tokio::time::sleep(SATURATED_FOR)).await;
        assert_eq!(failed, 0);
        let saturated = calls as f64 / SATURATED_FOR.as_secs_f64();
        // Of each caller, between the beginnings of two calls.
        let pace = Duration::from_secs_f64(AT_A_TIME as f64 / (saturated / 2.0));
        let started = clock::monotonic();
        let renewed = Arc::new(AtomicU64::new(0));
        let (calls, failed) = drive(&callers, ports, Some(pace), renew(nodes, ports, Arc::clone(&renewed))).await;
        let took = started.elapsed();
        let rate = calls as f64 / took.as_secs_f64();
        let renewed = renewed.load(Ordering::SeqCst);
        println!(
            "{renewed} identities renewed in {took:?} beside {calls} data calls, {rate:.0}/s of {saturated:.0}/s: {failed} calls failed"
        );
        assert_eq!((failed, renewed), (0, identities as u64));
        assert!(calls > 0, "nobody called meanwhile");
    });
}

/// Enrols nodes, a few at a time; who comes too fast waits, as a sidecar would.
async fn enrolled(ports: Ports, token: &str, prefix: &str, count: usize) -> Vec<Member> {
    let turns = Arc::new(Semaphore::new(AT_A_TIME));
    let mut tasks = JoinSet::new();
    for n in 0..count {
        let (turns, token, name) = (Arc::clone(&turns), token.to_owned(), format!("{prefix}-{n}"));
        tasks.spawn(async move {
            let _turn = turns.acquire().await.unwrap();
            loop {
                match Member::enrol(ports, &token, &name).await {
                    Ok(member) => return member,
                    Err(error) => assert_eq!(reason(&error), "rate_limited"),
                }
                tokio::time::sleep(Duration::from_millis(500)).await;
            }
        });
    }
    tasks.join_all().await
}

/// Renews each identity for a new key and uses the new certificate.
async fn renew(nodes: Vec<Member>, ports: Ports, renewed: Arc<AtomicU64>) {
    let turns = Arc::new(Semaphore::new(AT_A_TIME));
    let mut tasks = JoinSet::new();
    for node in nodes {
        let (turns, renewed) = (Arc::clone(&turns), Arc::clone(&renewed));
        tasks.spawn(async move {
            let _turn = turns.acquire().await.unwrap();
            let next = loop {
                match node.renew(ports).await {
                    Ok(next) => break next,
                    Err(error) => assert_eq!(reason(&error), "rate_limited"),
                }
                tokio::time::sleep(Duration::from_millis(500)).await;
            };
            next.data(ports).await.unwrap().status().await.unwrap();
            renewed.fetch_add(1, Ordering::SeqCst);
        });
    }
    tasks.join_all().await;
}

/// Wraps and unwraps until `until`; returns how many calls were made and how many failed.
async fn drive(
    callers: &[Member],
    ports: Ports,
    pace: Option<Duration>,
    until: impl Future<Output = ()>,
) -> (u64, u64) {
    let stop = Arc::new(AtomicBool::new(false));
    let (made, failed) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicU64::new(0)));
    let mut tasks = JoinSet::new();
    for caller in callers {
        let mut link = caller.data(ports).await.unwrap();
        let (stop, made, failed) = (Arc::clone(&stop), Arc::clone(&made), Arc::clone(&failed));
        tasks.spawn(async move {
            let mut wrapped = link.wrap(&[7; 32]).await.unwrap();
            let mut pace = pace.map(tokio::time::interval);
            for call in 0_u64.. {
                if stop.load(Ordering::Relaxed) {
                    return;
                }
                if let Some(pace) = &mut pace {
                    pace.tick().await;
                }
                let answer = match call % 2 {
                    0 => link.wrap(&[7; 32]).await.map(|new| wrapped = new),
                    _ => link.unwrap(&wrapped).await.map(drop),
                };
                made.fetch_add(1, Ordering::Relaxed);
                if let Err(status) = answer {
                    println!("a call failed: {status}");
                    failed.fetch_add(1, Ordering::Relaxed);
                }
            }
        });
    }
    until.await;
    stop.store(true, Ordering::Relaxed);
    tasks.join_all().await;
    (made.load(Ordering::Relaxed), failed.load(Ordering::Relaxed))
}
