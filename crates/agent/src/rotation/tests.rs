use std::path::Path;

use fleet_kms_keyring::rotation::MIN_PERIOD;
use fleet_kms_store::contract::{Fault, Flaky};
use fleet_kms_store::{MemoryStore, Store};

use super::*;
use crate::promises::rig::{Clocks, DAY, Desk, initialise, seed};

const PERIOD: Duration = Duration::from_secs(30 * 86_400);

async fn desk(store: Arc<dyn Store>, audit: &Path, clocks: &Clocks) -> Desk {
    seed(1);
    Desk::open(store, audit, clocks).await
}

struct Bench {
    _audit: tempfile::TempDir,
    clocks: Clocks,
    flaky: Arc<Flaky>,
    desk: Desk,
    seen: Seen,
}

impl Bench {
    async fn new(clusters: &[Duration]) -> Self {
        let store = Arc::new(MemoryStore::new());
        initialise(&*store).await;
        let (audit, clocks) = (tempfile::tempdir().unwrap(), Clocks::new());
        let flaky = Arc::new(Flaky::new(store));
        let desk = desk(Arc::clone(&flaky) as Arc<dyn Store>, audit.path(), &clocks).await;
        for (number, period) in clusters.iter().enumerate() {
            desk.create(&format!("edge-{number}"), Some(*period)).await.unwrap();
        }
        Self { _audit: audit, clocks, flaky, desk, seen: Seen::default() }
    }

    fn plan(&mut self) -> Plan {
        self.seen.plan(&self.desk.keyrings.keyrings(), self.clocks.wall(), self.clocks.monotonic())
    }

    /// Does all that is due; returns how much was done.
    async fn look(&mut self) -> usize {
        let mut done = 0;
        for (cluster, due) in self.plan().work {
            let settled = carry_out(&self.desk.control_plane, cluster, due).await;
            self.seen.note_outcome(&cluster, settled);
            done += usize::from(settled);
        }
        done
    }

    fn versions(&self) -> Vec<usize> {
        let keyrings = self.desk.keyrings.keyrings();
        keyrings.iter().map(|(_, snapshot)| snapshot.keyring.versions().len()).collect()
    }
}

#[tokio::test]
async fn a_store_that_fails_leaves_the_schedule_armed() {
    let mut bench = Bench::new(&[PERIOD]).await;
    bench.clocks.pass(PERIOD);
    for fault in [Fault::NotApplied, Fault::RequestLost] {
        bench.flaky.inject(fault);
        assert_eq!(bench.look().await, 0);
        assert_eq!(bench.versions(), [2]);
    }
    bench.flaky.inject(Fault::ReplyLost);
    assert_eq!(bench.look().await, 1, "a lost reply is cleared up");
    assert_eq!(bench.versions(), [3]);
    assert_eq!(bench.look().await, 0);
}

#[tokio::test]
async fn the_most_urgent_comes_first_and_what_failed_comes_last() {
    let mut bench = Bench::new(&[PERIOD, MIN_PERIOD, PERIOD / 2]).await;
    bench.clocks.pass(PERIOD);
    let order: Vec<_> = bench.plan().work.into_iter().map(|(cluster, _)| cluster).collect();
    let period =
        |cluster: &ClusterId| bench.desk.keyrings.keyring(cluster).unwrap().keyring.policy().period();
    assert_eq!(order.iter().map(period).collect::<Vec<_>>(), [MIN_PERIOD, PERIOD / 2, PERIOD]);
    let first = order[0];
    bench.seen.note_outcome(&first, false);
    assert_eq!(bench.plan().work.last().unwrap().0, first, "a cluster that fails holds nobody up");
}

#[tokio::test]
async fn a_manual_rotation_between_decision_and_commit_is_the_only_one() {
    let mut bench = Bench::new(&[PERIOD]).await;
    bench.clocks.pass(PERIOD);
    let (cluster, due) = bench.plan().work[0];
    let permit = crate::promises::rig::permit(cluster);
    let by_hand = fleet_kms_keyring::Rotate::Regular;
    bench.desk.control_plane.rotate(&permit, by_hand, crate::control_plane::Wish::default()).await.unwrap();
    // Even if the clock makes the new version look a month old by then.
    bench.clocks.set_wall(bench.clocks.wall() + 40 * DAY);
    assert!(carry_out(&bench.desk.control_plane, cluster, due).await, "that is settled");
    assert_eq!(bench.versions(), [3]);
}

#[tokio::test]
async fn a_flapping_clock_costs_one_rotation_in_half_a_period() {
    let mut bench = Bench::new(&[PERIOD]).await;
    bench.plan();
    let start = bench.clocks.wall();
    let mut rotations = 0;
    // Hourly by 40 days, for 29 days of monotonic time.
    for hour in 0..29 * 24_u32 {
        bench.clocks.pass(Duration::from_secs(3_600));
        let right = start + Duration::from_secs(3_600) * (hour + 1);
        bench.clocks.set_wall(if hour % 2 == 0 { right + 40 * DAY } else { right });
        let before = bench.versions();
        bench.look().await;
        rotations += bench.versions()[0] - before[0];
    }
    assert_eq!(rotations, 2, "at the first jump, and half a period later");
    bench.clocks.set_wall(start + 29 * DAY);
    bench.look().await;
    bench.clocks.pass(PERIOD);
    assert_eq!(bench.look().await, 1, "the next one comes within a period");
}

#[tokio::test]
async fn an_activation_in_the_future_is_rewritten_once() {
    let mut bench = Bench::new(&[PERIOD]).await;
    bench.clocks.set_wall(bench.clocks.wall() - 60 * DAY);
    let (cluster, due) = bench.plan().work[0];
    assert_eq!(due, Due::Reanchor);
    assert!(carry_out(&bench.desk.control_plane, cluster, due).await);
    let revision = bench.desk.keyrings.keyring(&cluster).unwrap().revision;
    assert!(carry_out(&bench.desk.control_plane, cluster, due).await, "another agent was first");
    assert_eq!(bench.desk.keyrings.keyring(&cluster).unwrap().revision, revision, "nothing was written");
    assert_eq!(bench.plan().work, []);
    assert_eq!(bench.versions(), [2]);
}

#[tokio::test]
async fn what_the_schedule_remembers_is_bounded_by_the_clusters() {
    let mut bench = Bench::new(&[PERIOD; 5]).await;
    let mut keyrings = bench.desk.keyrings.keyrings();
    bench.plan();
    keyrings.truncate(2);
    bench.seen.plan(&keyrings, bench.clocks.wall(), bench.clocks.monotonic());
    assert_eq!(bench.seen.len(), 2);
}

#[test]
fn a_pace_has_bounds() {
    assert_eq!(Pace::default(), Pace::per_second(50).unwrap());
    assert_eq!((Pace::per_second(0), Pace::per_second(Pace::MAX + 1)), (None, None));
}
