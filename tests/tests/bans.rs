//! A ban closes the node's live connection and refuses its next call, at once.
#![allow(clippy::unwrap_used, reason = "tests: what is not there fails them")]

use std::time::{Duration, Instant};

use fleet_kms_process::{clock, runtime};
use fleet_kms_tests::fleet::Fleet;
use fleet_kms_tests::member::{Member, reason_of};
use tokio::sync::oneshot;

/// What the design promises from the answer of `kmsctl` on; most of it is over by then.
const EFFECT_WITHIN: Duration = Duration::from_secs(1);

/// A number that a longer run makes larger.
fn number(name: &str, default: usize) -> usize {
    std::env::var(name).map_or(default, |text| text.parse().unwrap())
}

/// When a node that calls again and again was refused, and when its connection was closed.
struct Seen {
    refused: Instant,
    closed: Instant,
}

#[test]
fn a_ban_refuses_the_next_call_and_closes_the_connection_within_a_second() {
    let fleet = Fleet::start().unwrap();
    fleet.cluster("one").unwrap();
    let bans = number("BANS", 25);
    let uses = (bans + 1).to_string();
    let token = fleet.kmsctl(&["node", "token", "--cluster", "one", "--uses", &uses]).unwrap();
    let (ports, runtime) = (fleet.agent.ports, runtime::multi_thread().unwrap());
    let enrol = |name: String| runtime.block_on(Member::enrol(ports, token.trim(), &name)).unwrap();
    let bystander = enrol("bystander".to_owned());
    let mut watched = runtime.block_on(bystander.data(ports)).unwrap();
    let (mut refusals, mut closings) = (Vec::new(), Vec::new());
    for ban in 0..bans {
        let name = format!("node-{ban}");
        let node = enrol(name.clone());
        let (is_up, up) = oneshot::channel();
        let seen = runtime.spawn(async move {
            let seen = watch(&node, ports, is_up).await;
            (node, seen)
        });
        runtime.block_on(up).unwrap();
        let asked = clock::monotonic();
        fleet.kmsctl(&["node", "ban", "--cluster", "one", &name, "--yes"]).unwrap();
        let answered = clock::monotonic();
        let (node, seen) = runtime.block_on(seen).unwrap();
        for (what, when) in [("refused", seen.refused), ("closed", seen.closed)] {
            let after = when.saturating_duration_since(answered);
            assert!(after < EFFECT_WITHIN, "{name} was {what} {after:?} after the ban");
        }
        refusals.push(seen.refused.duration_since(asked));
        closings.push(seen.closed.duration_since(asked));
        // It may connect again, and is told why it is not served.
        let refused = runtime.block_on(async { node.data(ports).await.unwrap().status().await.unwrap_err() });
        assert_eq!(reason_of(&refused), "banned");
    }
    runtime.block_on(watched.status()).unwrap();
    for (what, mut times) in [("next call refused", refusals), ("connection closed", closings)] {
        times.sort();
        let at = |percent: usize| times.get(times.len() * percent / 100).copied().unwrap();
        println!("{bans} bans, {what} after kmsctl's start: p50 {:?}, p99 {:?}", at(50), at(99));
    }
}

async fn watch(node: &Member, ports: fleet_kms_tests::fleet::Ports, is_up: oneshot::Sender<()>) -> Seen {
    let mut link = node.data(ports).await.unwrap();
    link.status().await.unwrap();
    is_up.send(()).unwrap();
    let mut client = link.client.clone();
    let refused = tokio::spawn(async move {
        // A refusal, or the connection that is no more: either way this call was not answered.
        while client.status(fleet_kms_proto::agent::StatusRequest::default()).await.is_ok() {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
        clock::monotonic()
    });
    let _ = (&mut link.ended).await;
    let closed = clock::monotonic();
    Seen { refused: refused.await.unwrap(), closed }
}
