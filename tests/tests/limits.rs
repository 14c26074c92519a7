//! Limits of the agent's ports: what one caller may take, and what the others notice of it.
#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "tests: what is not there fails them")]

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use fleet_kms_process::{clock, runtime};
use fleet_kms_proto::agent::UnwrapRequest;
use fleet_kms_proto::agent::unwrap_item::Outcome;
use fleet_kms_tests::fleet::{Cluster, Fleet, Ports};
use fleet_kms_tests::member::{Member, reason_of};
use fleet_kms_tests::wait;
use tokio::task::JoinSet;

const SOON: Duration = Duration::from_secs(30);
/// The agent's limits (crates/agent/src/serve.rs, crates/transport/src/serve.rs).
const CONNECTIONS_PER_IDENTITY: usize = 16;
const BATCH: usize = 512;
/// Batches in flight on each of the noisy cluster's connections.
const NOISY_CALLS: usize = 8;
/// How much sooner than one of the flood's batches half of the quiet cluster's calls are answered, at least. Both share
/// two cores with the flood's own process and all other tests, so this is a ratio of one moment and loose.
const SOONER: f64 = 3.0;

/// A number that a longer run makes larger.
fn number(name: &str, default: usize) -> usize {
    std::env::var(name).map_or(default, |text| text.parse().unwrap())
}

fn node(fleet: &Fleet, cluster: &Cluster, name: &str) -> Member {
    let token = fleet.token(cluster, name).unwrap();
    block_on(Member::enrol(fleet.agent.ports, &token, "")).unwrap()
}

fn block_on<F: Future>(work: F) -> F::Output {
    runtime::multi_thread().unwrap().block_on(work)
}

#[test]
fn one_identity_has_sixteen_connections_and_its_own_further_ones_are_refused() {
    let mut fleet = Fleet::start().unwrap();
    let cluster = fleet.cluster("one").unwrap();
    let (greedy, modest) = (node(&fleet, &cluster, "greedy"), node(&fleet, &cluster, "modest"));
    let ports = fleet.agent.ports;
    block_on(async {
        let mut links = Vec::new();
        for _ in 0..CONNECTIONS_PER_IDENTITY {
            let mut link = greedy.data(ports).await.unwrap();
            link.status().await.unwrap();
            links.push(link);
        }
        assert!(greedy.data(ports).await.is_err(), "one more was let in");
        modest.data(ports).await.unwrap().status().await.unwrap();
        // The enrolment port has a count of its own: who floods the data port may still renew.
        greedy.renew(ports).await.unwrap();
        for link in &mut links {
            link.status().await.unwrap();
        }
        drop(links);
    });
    wait::until("a place for the next one", SOON, || {
        Ok(block_on(async { greedy.data(ports).await?.status().await.map_err(anyhow::Error::from) }).ok())
    })
    .unwrap();
    fleet.agent.stop().unwrap();
    let lines = fleet.agent.audit("data").unwrap();
    assert!(lines.iter().any(|line| line["outcome"] == "identity_full"), "{lines:?}");
}

#[test]
fn a_batch_that_is_too_large_is_refused_by_the_agent_itself() {
    let fleet = Fleet::start().unwrap();
    let cluster = fleet.cluster("one").unwrap();
    let node = node(&fleet, &cluster, "node-1");
    block_on(async {
        let mut link = node.data(fleet.agent.ports).await.unwrap();
        let wrapped = link.wrap(&[7; 32]).await.unwrap();
        let opened = link.unwrap_all(vec![wrapped.clone(); BATCH]).await.unwrap();
        assert!(opened.iter().all(|outcome| matches!(outcome, Outcome::Plain(plain) if *plain == [7; 32])));
        let too_many = link.unwrap_all(vec![wrapped; BATCH + 1]).await.unwrap_err();
        assert_eq!(reason_of(&too_many), "bad_request");
        let too_long = link.unwrap_all(vec![vec![1; 1_000]; 66]).await.unwrap_err();
        assert_eq!(reason_of(&too_long), "message_too_long");
        link.status().await.unwrap();
    });
}

#[test]
fn a_quiet_cluster_hardly_notices_a_noisy_one() {
    let fleet = Fleet::start().unwrap();
    let (loud, quiet) = (fleet.cluster("loud").unwrap(), fleet.cluster("quiet").unwrap());
    let noisy: Vec<_> = (0..3).map(|n| node(&fleet, &loud, &format!("node-{n}"))).collect();
    let quiet = node(&fleet, &quiet, "node-1");
    let ports = fleet.agent.ports;
    let (alone, beside, batches) = block_on(async {
        let (quiet, alone) = apart(quiet, ports).await;
        let flood = Flood::start(&noisy, ports, number("NOISY_CONNECTIONS", 2)).await;
        flood.wait_for(10).await;
        let (_, beside) = apart(quiet, ports).await;
        (alone, beside, flood.end().await)
    });
    let [alone, beside] = [alone, beside].map(|times| [at(&times, 50), at(&times, 99)]);
    let ratio = |of: Duration, to: Duration| of.as_secs_f64() / to.as_secs_f64();
    println!(
        "the quiet cluster's calls (p50, p99): alone {alone:?}, beside {} batches of {BATCH} {beside:?}: {:.1} times as long in the p99; one batch {:?}",
        batches.len(),
        ratio(beside[1], alone[1]),
        at(&batches, 50),
    );
    let sooner = ratio(at(&batches, 50), beside[0]);
    assert!(sooner > SOONER, "a call takes as long as 1/{sooner:.1} of the flood's batches");
}

/// Nodes that ask for more than there is.
struct Flood {
    stop: Arc<AtomicBool>,
    times: Arc<Mutex<Vec<Duration>>>,
    tasks: JoinSet<()>,
}

impl Flood {
    async fn start(nodes: &[Member], ports: Ports, connections: usize) -> Self {
        let (stop, times) = (Arc::<AtomicBool>::default(), Arc::<Mutex<Vec<Duration>>>::default());
        let mut tasks = JoinSet::new();
        for node in nodes {
            for _ in 0..connections {
                let mut link = node.data(ports).await.unwrap();
                let wrapped = link.wrap(&[7; 32]).await.unwrap();
                for _ in 0..NOISY_CALLS {
                    let (mut client, wrapped) = (link.client.clone(), wrapped.clone());
                    let (stop, times) = (Arc::clone(&stop), Arc::clone(&times));
                    tasks.spawn(async move {
                        while !stop.load(Ordering::Relaxed) {
                            let request = UnwrapRequest { wrapped: vec![wrapped.clone().into(); BATCH] };
                            let started = clock::monotonic();
                            // Some of its own calls may be too late.
                            if client.unwrap(request).await.is_ok() {
                                times.lock().unwrap().push(started.elapsed());
                            }
                        }
                    });
                }
                // The connection lives as long as the flood.
                tasks.spawn(async move { drop(link.ended.await) });
            }
        }
        Self { stop, times, tasks }
    }

    async fn wait_for(&self, batches: usize) {
        while self.times.lock().unwrap().len() < batches {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    /// Returns how long the batches took, sorted.
    async fn end(mut self) -> Vec<Duration> {
        self.stop.store(true, Ordering::Relaxed);
        self.tasks.shutdown().await;
        let mut times = self.times.lock().unwrap().clone();
        times.sort();
        times
    }
}

/// Makes the quiet cluster's calls on a thread of their own: what is measured is the agent, not this process's flood.
async fn apart(node: Member, ports: Ports) -> (Member, Vec<Duration>) {
    let (done, times) = tokio::sync::oneshot::channel();
    std::thread::spawn(move || {
        let runtime = runtime::current_thread(1).unwrap();
        let times = runtime.block_on(calls(&node, ports));
        let _ = done.send((node, times));
    });
    times.await.unwrap()
}

/// Wraps and unwraps, one call after the other; each must succeed. Returns how long each took, sorted.
async fn calls(node: &Member, ports: Ports) -> Vec<Duration> {
    let mut link = node.data(ports).await.unwrap();
    let mut times = Vec::new();
    let mut wrapped = link.wrap(&[7; 32]).await.unwrap();
    for call in 0..number("QUIET_CALLS", 100) {
        let started = clock::monotonic();
        if call % 2 == 0 {
            wrapped = link.wrap(&[7; 32]).await.unwrap();
        } else {
            assert!(matches!(link.unwrap(&wrapped).await.unwrap(), Outcome::Plain(_)));
        }
        times.push(started.elapsed());
    }
    times.sort();
    times
}

fn at(sorted: &[Duration], percent: usize) -> Duration {
    sorted[sorted.len() * percent / 100]
}
