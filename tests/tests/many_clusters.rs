//! An agent with many clusters: how fast it starts, and how fast it rotates them all when they are due at once.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]

use std::sync::Arc;
use std::time::Duration;

use fleet_kms_agent::clusters::Clusters;
use fleet_kms_agent::control_plane::ControlPlane;
use fleet_kms_agent::rotation::{Pace, Schedule};
use fleet_kms_keyring::rotation::RotationPolicy;
use fleet_kms_process::{clock, runtime};
use fleet_kms_tests::big_store::{DAY, Fill, Opened, fill, generator, load_config, open};
use fleet_kms_tests::fleet::Agent;
use fleet_kms_tests::wait::timed;
use tokio_util::sync::CancellationToken;

/// An agent may be away for so long before its API servers notice (design: promises).
const RESTART_LIMIT: Duration = Duration::from_secs(2);
/// What a debug build may take longer than a release build.
const DEBUG_FACTOR: u32 = if cfg!(debug_assertions) { 5 } else { 1 };

fn number(name: &str, default: usize) -> usize {
    std::env::var(name).map_or(default, |text| text.parse().unwrap())
}

#[test]
fn an_agent_with_a_thousand_clusters_restarts_within_two_seconds() {
    let directory = tempfile::tempdir().unwrap();
    let mut agent = Agent::init(directory.path(), "").unwrap();
    let config = load_config(&agent.config).unwrap();
    let clusters = number("CLUSTERS", 1_000);
    let activated = clock::now() - DAY;
    let runtime = runtime::multi_thread().unwrap();
    let filled = timed(|| runtime.block_on(fill(&config, Fill { clusters, versions: 12, activated })));
    filled.0.unwrap();
    let bytes = std::fs::metadata(&config.store).unwrap().len();
    println!("{clusters} clusters of 12 versions made in {:?}, {} MiB", filled.1, bytes >> 20);
    for round in 1..=3 {
        let (started, took) = timed(|| agent.start());
        started.unwrap();
        println!("start {round}: ready after {took:?}");
        assert!(took < RESTART_LIMIT * DEBUG_FACTOR || clusters > 1_000, "{took:?}");
        agent.stop().unwrap();
    }
}

#[test]
fn clusters_that_are_due_at_once_are_rotated_at_the_pace() {
    let directory = tempfile::tempdir().unwrap();
    let agent = Agent::init(directory.path(), "").unwrap();
    let config = load_config(&agent.config).unwrap();
    let clusters = number("DUE", 500);
    let pace = u32::try_from(number("PER_SECOND", 1_000)).unwrap();
    let activated = clock::now() - 40 * DAY;
    runtime::multi_thread().unwrap().block_on(async {
        fill(&config, Fill { clusters, versions: 12, activated }).await.unwrap();
        let opened = open(&config).await.unwrap();
        let stop = CancellationToken::new();
        let schedule = schedule(&opened, Pace::per_second(pace).unwrap()).await;
        let started = clock::monotonic();
        let running = tokio::spawn(schedule.run(stop.clone()));
        // 18 hours lie between the earliest possible rotation and the end of the period.
        let limit = Duration::from_secs(18 * 3_600);
        while due(&opened) > 0 && started.elapsed() < limit {
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
        let took = started.elapsed();
        stop.cancel();
        running.await.unwrap();
        assert_eq!(due(&opened), 0);
        for (_, snapshot) in opened.keyrings.keyrings() {
            assert_eq!(snapshot.keyring.versions().len(), 13, "each was rotated once");
        }
        let rate = clusters as f64 / took.as_secs_f64();
        println!("{clusters} clusters due at once: rotated in {took:?}, {rate:.0}/s (pace {pace}/s)");
    });
}

/// Clusters whose rotation is due now.
fn due(opened: &Opened) -> usize {
    let now = clock::now();
    let keyrings = opened.keyrings.keyrings();
    keyrings.iter().filter(|(cluster, snapshot)| snapshot.keyring.due(cluster) <= now).count()
}

async fn schedule(opened: &Opened, pace: Pace) -> Schedule {
    let clusters = Arc::new(Clusters::load(&opened.ledger).await.unwrap());
    let (changes, keyrings) = (Arc::clone(&opened.changes), Arc::clone(&opened.keyrings));
    let policy = RotationPolicy::default();
    let control_plane =
        ControlPlane::new(Arc::clone(&changes), Arc::clone(&keyrings), clusters, policy, generator);
    let clocks = (Arc::new(clock::now) as _, clock::monotonic as _);
    Schedule::new(Arc::new(control_plane), keyrings, changes, clocks, pace)
}
