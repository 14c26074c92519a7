//! Random operations against the model: many short lives, each with a seed of
//! its own that a failure prints.

use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::time::Duration;

use fleet_kms_keyring::{ClusterId, Rotate, State};
use fleet_kms_store::contract::Fault;
use rand_chacha::ChaCha8Rng;
use rand_core::{Rng as _, SeedableRng as _};

use super::model::truth;
use super::operations::{Ended, World};
use super::rig::seed;
use crate::wraps;

/// Steps of one life; a longer one spends its time on long audits.
const STEPS: u64 = 500;
/// `make simulate` sets more.
const LIVES: u64 = 220;
const MOST_CLUSTERS: usize = 4;
const HOUR: u64 = 3_600;

/// Draws what happens next.
struct Dice(ChaCha8Rng);

impl Dice {
    fn new(number: u64) -> Self {
        let mut bytes = [7; 32];
        bytes[..8].copy_from_slice(&number.to_be_bytes());
        Self(ChaCha8Rng::from_seed(bytes))
    }

    fn below(&mut self, end: u64) -> u64 {
        self.0.next_u64() % end
    }

    fn index(&mut self, length: usize) -> usize {
        usize::try_from(self.below(length as u64)).unwrap()
    }

    fn one_in(&mut self, n: u64) -> bool {
        self.below(n) == 0
    }
}

async fn step(world: &mut World, dice: &mut Dice) {
    let by = dice.index(2);
    if world.model.clusters.is_empty() {
        world.create(by).await;
        return world.observe().await;
    }
    let cluster = world.model.clusters[dice.index(world.model.clusters.len())];
    match dice.below(1_000) {
        0..300 => wrap(world, dice, by, cluster),
        300..600 => unwrap(world, dice, by).await,
        600..740 => world.clocks.pass(Duration::from_secs(60 + dice.below(36 * HOUR))),
        740..750 => jump(world, dice),
        750..850 => world.look(by).await,
        850..985 => change(world, dice, by, cluster).await,
        985..990 => world.crash(by).await,
        990..993 => world.backup = Some(world.store.fork()),
        993 => world.restore().await,
        994..997 => {
            drop(wraps::flush(&world.processes[by].desk.keyrings, &world.processes[by].desk.changes).await)
        }
        _ => {
            world.processes[by].flaky.fail_reads(0);
            let desk = &world.processes[by].desk;
            desk.keyrings.catch_up(&desk.ledger).await.unwrap();
        }
    }
    world.processes[by].flaky.fail_reads(0);
    world.observe().await;
}

fn wrap(world: &mut World, dice: &mut Dice, by: usize, cluster: ClusterId) {
    let mut dek = [0; 32];
    dice.0.fill_bytes(&mut dek);
    let named = match world.model.acknowledged.last() {
        Some(last) if dice.one_in(5) && last.cluster == cluster => Some(last.header.key_id),
        _ => None,
    };
    world.wrap(by, cluster, named.as_ref(), dek);
}

async fn unwrap(world: &mut World, dice: &mut Dice, by: usize) {
    if !world.model.lost.is_empty() && dice.one_in(10) {
        let lost = world.model.lost[dice.index(world.model.lost.len())].clone();
        return world.unwrap_what_must_not(by, &lost, lost.cluster);
    }
    if world.model.acknowledged.is_empty() {
        return;
    }
    let acknowledged = world.model.acknowledged[dice.index(world.model.acknowledged.len())].clone();
    if dice.one_in(10) {
        let other = world.model.clusters[dice.index(world.model.clusters.len())];
        return world.unwrap_what_must_not(by, &acknowledged, other);
    }
    world.unwrap(by, &acknowledged).await;
}

/// Somebody sets the wall clock, by up to 60 days.
fn jump(world: &mut World, dice: &mut Dice) {
    let by = Duration::from_secs(dice.below(60 * 24 * HOUR));
    let now = world.clocks.wall();
    world.clocks.set_wall(if dice.one_in(2) { now + by } else { now - by });
}

async fn change(world: &mut World, dice: &mut Dice, by: usize, cluster: ClusterId) {
    if dice.one_in(4) {
        let faults = [Fault::ReplyLost, Fault::RequestLost, Fault::Late, Fault::NotApplied];
        let reads = if dice.one_in(3) { dice.index(12) } else { 0 };
        world.inject(by, faults[dice.index(4)], reads);
    }
    let before = truth(&world.store, &cluster).await.unwrap();
    let ended = match dice.below(10) {
        0 if world.model.clusters.len() < MOST_CLUSTERS => return world.create(by).await,
        1 => return world.rotate_and_leave(by, cluster, dice.below(40)).await,
        2..4 => {
            let versions = before.keyring.versions();
            let version = &versions[dice.index(versions.len())];
            let (state, version) = (version.state, version.version);
            match state {
                State::Next | State::Active | State::Destroyed => return,
                State::DestroyScheduled { .. } => world.end(by, cluster, version, dice.one_in(3)).await,
                State::Disabled if dice.one_in(2) => world.end(by, cluster, version, false).await,
                State::DecryptOnly | State::Disabled => world.toggle(by, cluster, version).await,
            }
        }
        4 => world.rotate(by, cluster, Rotate::Fresh).await,
        5 => return both_look(world).await,
        _ => world.rotate(by, cluster, Rotate::Regular).await,
    };
    let after = truth(&world.store, &cluster).await.unwrap();
    match ended {
        Ended::Done => assert_ne!(before.revision, after.revision, "what is acknowledged is in the store"),
        // A transaction whose reply an earlier caller lost may arrive with the next one.
        Ended::NotDone | Ended::Unknown => {}
    }
}

/// Both schedules look one after the other, with no time in between.
async fn both_look(world: &mut World) {
    world.look(0).await;
    world.look(1).await;
}

/// What came of some lives.
#[derive(Default)]
struct Sums {
    steps: u64,
    rotations: u64,
    rollbacks: u64,
    destroyed: u64,
    wrapped: usize,
}

impl Sums {
    fn add(&mut self, other: &Self) {
        self.steps += other.steps;
        self.rotations += other.rotations;
        self.rollbacks += other.rollbacks;
        self.destroyed += other.destroyed;
        self.wrapped += other.wrapped;
    }
}

fn live(number: u64, steps: u64) -> Sums {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        seed(number);
        let (mut world, mut dice) = (World::new().await, Dice::new(number));
        for _ in 0..steps {
            step(&mut world, &mut dice).await;
        }
        world.settle().await;
        let World { rotations, rollbacks, destroyed, ref model, .. } = world;
        Sums { steps, rotations, rollbacks, destroyed, wrapped: model.acknowledged.len() + model.lost.len() }
    })
}

#[test]
fn whatever_happens_what_was_wrapped_can_be_unwrapped() {
    let number = |name, default| std::env::var(name).map_or(default, |text| text.parse().unwrap());
    let (first, lives) = (number("SEED", 1), number("LIVES", LIVES));
    let run = |half: u64| {
        let mut sums = Sums::default();
        for number in (first..first + lives).filter(|number| number % 2 == half) {
            let result = catch_unwind(AssertUnwindSafe(|| live(number, STEPS)));
            sums.add(&result.unwrap_or_else(|panic| {
                eprintln!("this life began with SEED={number} LIVES=1");
                resume_unwind(panic)
            }));
        }
        sums
    };
    let (mut sums, other) = std::thread::scope(|scope| {
        let other = scope.spawn(|| run(1));
        (run(0), other.join().unwrap_or_else(|panic| resume_unwind(panic)))
    });
    sums.add(&other);
    let Sums { steps, rotations, rollbacks, destroyed, wrapped } = sums;
    println!(
        "{lives} lives, {steps} steps, {wrapped} DEKs wrapped, {rotations} rotations on schedule, {rollbacks} old \
         copies confirmed, {destroyed} versions destroyed, 0 violations"
    );
    let has_seen_all = steps >= 100_000 && rollbacks > 0 && destroyed > 0;
    assert!(has_seen_all || lives != LIVES);
}
