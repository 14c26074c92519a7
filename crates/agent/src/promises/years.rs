//! Forty years: how many rotations, whether any was late, what memory and the
//! publishing of a snapshot cost at their end.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use fleet_kms_keyring::rotation::RotationPolicy;
use fleet_kms_keyring::{ClusterId, KeyId, Keyring, Rotate};
use fleet_kms_process::clock;
use fleet_kms_store::{MemoryStore, Revision, Store};

use super::rig::{Clocks, DAY, Desk, generator, initialise, permit, seed};
use crate::authz::{actions, internal};
use crate::live_keyrings::{LiveKeyrings, Snapshot};
use crate::rotation::{Due, Seen, carry_out};

const YEAR: Duration = Duration::from_secs(31_557_600);

/// The most and the fewest rotations of the default period in `years`: each
/// version is active for 95 % to 97.5 % of it.
fn bounds(years: u32) -> (u64, u64) {
    let period = RotationPolicy::default().period();
    let all = (YEAR * years).as_secs();
    (all / period.as_secs(), all / (period - period / 20).as_secs())
}

fn age(keyring: &Keyring, now: SystemTime) -> Duration {
    now.duration_since(keyring.active().activated.unwrap()).unwrap_or_default()
}

/// Through the control plane, with commits and audit; the agent is started
/// anew every year, and is away for 75 days every ten.
#[tokio::test]
async fn one_cluster_is_rotated_for_forty_years_and_never_late() {
    seed(40);
    let (store, clocks) = (Arc::new(MemoryStore::new()), Clocks::new());
    initialise(&*store).await;
    let audit = tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir()).unwrap();
    let open = async || Desk::open(Arc::clone(&store) as Arc<dyn Store>, audit.path(), &clocks).await;
    let mut desk = open().await;
    let cluster = desk.create("edge-1", None).await.unwrap();
    let first = desk.keyrings.wrap(&permit(cluster), None, &[1; 32], clocks.wall()).unwrap().bytes;
    let period = RotationPolicy::default().period();
    let (mut rotations, mut latest) = (0, Duration::ZERO);
    for year in 0_u32..40 {
        let (mut seen, end) = (Seen::default(), clocks.wall() + YEAR);
        while clocks.wall() < end {
            clocks.pass(Duration::from_secs(3_600));
            for (cluster, due) in seen.plan(&desk.keyrings.keyrings(), clocks.wall(), clocks.monotonic()).work
            {
                latest = latest.max(age(&desk.keyrings.keyring(&cluster).unwrap().keyring, clocks.wall()));
                assert!(carry_out(&desk.control_plane, cluster, due).await);
                rotations += 1;
            }
        }
        drop(desk);
        if year % 10 == 9 {
            assert!(latest <= period, "never late: {latest:?}");
            clocks.pass(75 * DAY);
        }
        desk = open().await;
        if year % 10 == 9 {
            let due = Seen::default().plan(&desk.keyrings.keyrings(), clocks.wall(), clocks.monotonic()).work;
            assert!(carry_out(&desk.control_plane, cluster, due[0].1).await, "missed periods: one rotation");
            rotations += 1;
        }
    }
    let keyring = &desk.keyrings.keyring(&cluster).unwrap().keyring;
    let (fewest, most) = bounds(40);
    assert!((fewest..=most + 4).contains(&rotations), "{rotations}");
    assert_eq!(keyring.versions().len() as u64, rotations + 2);
    let dek = desk.keyrings.unwrap(&permit(cluster), &first).unwrap().dek;
    assert_eq!(*dek, [1; 32], "what was wrapped first is unwrapped last");
    println!("1 cluster, 40 years: {rotations} rotations, oldest active version {latest:?} of {period:?}");
}

/// Without a store: what a fleet costs in memory, in numbers.
struct Fleet {
    clocks: Clocks,
    live: LiveKeyrings,
    seen: Seen,
    revision: u64,
    rotations: u64,
    latest: Duration,
    /// Time to make a snapshot and to publish it, of the last rotations.
    publishing: (Duration, u32),
}

impl Fleet {
    async fn new(clusters: usize) -> Self {
        seed(10_000);
        let clocks = Clocks::new();
        let store = Arc::new(MemoryStore::new());
        initialise(&*store).await;
        let audit = tempfile::tempdir().unwrap();
        let desk = Desk::open(store, audit.path(), &clocks).await;
        let Ok(live) = Arc::try_unwrap({
            let Desk { keyrings, changes, control_plane, .. } = desk;
            drop((changes, control_plane));
            keyrings
        }) else {
            panic!("nobody else holds the keyrings");
        };
        let (seen, publishing) = (Seen::default(), (Duration::ZERO, 0));
        let mut fleet =
            Self { clocks, live, seen, revision: 0, rotations: 0, latest: Duration::ZERO, publishing };
        (0..clusters).for_each(|_| fleet.add());
        fleet
    }

    fn add(&mut self) {
        let cluster = ClusterId::generate(&mut *generator());
        let mut key_id = |_| KeyId::generate(&mut *generator());
        let keyring = Keyring::create(RotationPolicy::default(), self.clocks.wall(), &mut key_id);
        let permit = permit::<actions::ClusterCreate>(cluster);
        let made = |version| (version, self.live.make_kek(&permit, version).unwrap());
        let keks: HashMap<_, _> = keyring.versions().iter().map(|version| made(version.version)).collect();
        self.revision += 1;
        self.live.publish(cluster, Snapshot { revision: Revision(self.revision), keyring, keks });
    }

    fn look(&mut self) {
        let now = self.clocks.wall();
        for (cluster, due) in self.seen.plan(&self.live.keyrings(), now, self.clocks.monotonic()).work {
            assert!(matches!(due, Due::Rotate { .. }), "no clock was set");
            self.rotate(cluster, now);
        }
    }

    /// As the control plane does between store and data path.
    fn rotate(&mut self, cluster: ClusterId, now: SystemTime) {
        let live = self.live.keyring(&cluster).unwrap();
        self.latest = self.latest.max(age(&live.keyring, now));
        let mut keyring = live.keyring.clone();
        let made = keyring.rotate(Rotate::Regular, now, &mut |_| KeyId::generate(&mut *generator())).unwrap();
        let kek = self.live.make_kek(&internal::schedule(cluster), made[0]).unwrap();
        self.revision += 1;
        self.rotations += 1;
        let started = clock::monotonic();
        let mut keks = live.keks.clone();
        keks.insert(made[0], kek);
        drop(live);
        self.live.publish(cluster, Snapshot { revision: Revision(self.revision), keyring, keks });
        self.publishing = (self.publishing.0 + started.elapsed(), self.publishing.1 + 1);
    }
}

fn resident_mib() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with("VmRSS:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() / 1024
}

async fn simulate(clusters: usize, years: u32) {
    let before = resident_mib();
    let (mut fleet, started) = (Fleet::new(clusters).await, clock::monotonic());
    let end = fleet.clocks.wall() + YEAR * years;
    while fleet.clocks.wall() < end {
        // Coarser than the schedule looks, finer than the 18 hours that the jitter is early at least.
        fleet.clocks.pass(Duration::from_secs(12 * 3_600));
        if fleet.clocks.wall() + YEAR > end && fleet.publishing.1 > 1_000 {
            fleet.publishing = (Duration::ZERO, 0);
        }
        fleet.look();
    }
    let period = RotationPolicy::default().period();
    assert!(fleet.latest <= period, "never late: {:?}", fleet.latest);
    let (fewest, most) = bounds(years);
    let count = clusters as u64;
    assert!((fewest * count..=most * count).contains(&fleet.rotations), "{}", fleet.rotations);
    assert_eq!(fleet.seen.len(), clusters);
    let keyrings = fleet.live.keyrings();
    let versions: usize = keyrings.iter().map(|(_, snapshot)| snapshot.keyring.versions().len()).sum();
    let looked = time_of(|| drop(fleet.seen.plan(&keyrings, fleet.clocks.wall(), fleet.clocks.monotonic())));
    println!(
        "{clusters} clusters, {years} years: {} rotations, {versions} versions ({} each), oldest active version \
         {:.1} of 30 days, {} MiB more in memory, {:?} to publish a snapshot, {looked:?} for a look, took {:?}",
        fleet.rotations,
        versions / clusters,
        fleet.latest.as_secs_f64() / 86_400.0,
        resident_mib().saturating_sub(before),
        fleet.publishing.0 / fleet.publishing.1.max(1),
        started.elapsed(),
    );
}

fn time_of(act: impl FnOnce()) -> Duration {
    let started: Instant = clock::monotonic();
    act();
    started.elapsed()
}

#[tokio::test]
async fn a_fleet_is_rotated_for_forty_years_and_never_late() {
    simulate(25, 40).await;
}

#[tokio::test]
#[ignore = "minutes of time and gigabytes of memory: make simulate"]
async fn ten_thousand_clusters_are_rotated_for_forty_years_and_never_late() {
    simulate(10_000, 40).await;
}
