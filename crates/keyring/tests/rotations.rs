//! Rotation over time: what one step does, and 40 simulated years of a cluster. Time is a number here; no
//! test waits.

#![allow(clippy::unwrap_used, clippy::indexing_slicing, clippy::panic, reason = "a test fails by panicking")]

use std::collections::HashSet;
use std::time::{Duration, SystemTime};

use fleet_kms_keyring::rotation::{CLOCK_TOLERANCE, RotationPolicy, Step, may_rotate_on_schedule};
use fleet_kms_keyring::wrapped_dek::Header;
use fleet_kms_keyring::{ClusterId, KeyId, Keyring, RESTORE_JUMP, Rotate, RotateError, State, Version};

const MINUTE: Duration = Duration::from_secs(60);
const DAY: Duration = Duration::from_secs(24 * 60 * 60);
const PERIOD: Duration = Duration::from_secs(30 * 24 * 60 * 60);
const CLUSTER: ClusterId = ClusterId::from_bytes([0xc1; 16]);

fn start() -> SystemTime {
    SystemTime::UNIX_EPOCH + 20_000 * DAY
}

fn id(version: Version) -> KeyId {
    KeyId::from_bytes(u128::from(version.get()).to_be_bytes())
}

fn created() -> Keyring {
    Keyring::create(RotationPolicy::default(), start(), &mut id)
}

fn rotate(keyring: &mut Keyring, how: Rotate, now: SystemTime) -> Vec<Version> {
    keyring.rotate(how, now, &mut id).unwrap()
}

#[test]
fn a_new_cluster_has_version_1_active_and_version_2_next() {
    let keyring = created();
    assert_eq!(keyring.active().version, Version::FIRST);
    assert_eq!(keyring.active().activated, Some(start()));
    assert_eq!(keyring.next().version.get(), 2);
    assert_eq!(keyring.unbacked().map(|v| v.version.get()).collect::<Vec<_>>(), [1]);
}

#[test]
fn a_missed_year_is_caught_up_by_one_rotation() {
    let mut keyring = created();
    let now = start() + 365 * DAY;
    assert_eq!(keyring.next_step(&CLUSTER, now), Step::Rotate);
    rotate(&mut keyring, Rotate::Regular, now);
    assert_eq!(keyring.next_step(&CLUSTER, now), Step::Wait(keyring.due(&CLUSTER)));
    assert!(keyring.due(&CLUSTER) > now + PERIOD - PERIOD / 20);
    assert!(keyring.due(&CLUSTER) <= now + PERIOD);
}

#[test]
fn a_manual_rotation_resets_the_schedule() {
    let mut keyring = created();
    rotate(&mut keyring, Rotate::Regular, start() + 12 * DAY);
    assert!(keyring.due(&CLUSTER) > start() + 12 * DAY + PERIOD - PERIOD / 20);
}

#[test]
fn the_schedule_waits_until_the_very_moment_that_is_due() {
    let keyring = created();
    let due = keyring.due(&CLUSTER);
    assert_eq!(keyring.next_step(&CLUSTER, due - Duration::from_nanos(1)), Step::Wait(due));
    assert_eq!(keyring.next_step(&CLUSTER, due), Step::Rotate);
}

#[test]
fn an_activation_in_the_future_is_rewritten_to_now_without_rotating() {
    let mut keyring = created();
    let now = start() - CLOCK_TOLERANCE;
    assert!(matches!(keyring.next_step(&CLUSTER, now), Step::Wait(_)), "within the tolerance");
    assert!(!keyring.reanchor(now));

    let now = start() - 60 * DAY;
    assert_eq!(keyring.next_step(&CLUSTER, now), Step::Reanchor);
    let active = keyring.active().version;
    assert!(keyring.reanchor(now));
    assert_eq!((keyring.active().version, keyring.active().activated), (active, Some(now)));
    assert!(keyring.due(&CLUSTER) <= now + PERIOD);
    assert!(!keyring.reanchor(now));
}

#[test]
fn a_shorter_period_makes_an_old_version_due_at_once() {
    let mut keyring = created();
    keyring.set_policy(RotationPolicy::try_new(Duration::from_secs(60 * 60)).unwrap());
    assert_eq!(keyring.next_step(&CLUSTER, start() + DAY), Step::Rotate);
}

#[test]
fn after_a_restore_no_number_of_the_lost_store_is_given_again() {
    let mut lost = created();
    let mut restored = created();
    for n in 1..=RESTORE_JUMP {
        rotate(&mut lost, Rotate::Regular, start() + n * DAY);
    }
    let highest_lost = lost.next().version;
    let added = rotate(&mut restored, Rotate::AfterRestore, start());
    assert!(added.iter().all(|version| *version > highest_lost));
}

#[test]
fn a_rotation_without_numbers_or_with_a_taken_id_changes_nothing() {
    let mut keyring = created();
    let before = keyring.clone();
    let taken = id(Version::FIRST);
    let refused = keyring.rotate(Rotate::Regular, start(), &mut |_| taken);
    assert_eq!(refused, Err(RotateError::KeyIdTaken { key_id: taken }));
    let refused = keyring.rotate(Rotate::Fresh, start(), &mut |_| KeyId::from_bytes([9; 16]));
    assert_eq!(refused, Err(RotateError::KeyIdTaken { key_id: KeyId::from_bytes([9; 16]) }));
    assert_eq!(keyring, before);

    let mut parts = keyring.versions().to_vec();
    parts[1].version = Version::new(u32::MAX - 1).unwrap();
    let mut keyring = Keyring::from_parts(*keyring.policy(), parts).unwrap();
    let before = keyring.clone();
    for how in [Rotate::Fresh, Rotate::AfterRestore] {
        assert_eq!(keyring.rotate(how, start(), &mut id), Err(RotateError::NoVersionLeft));
    }
    assert_eq!(keyring, before);
    assert_eq!(rotate(&mut keyring, Rotate::Regular, start()), [Version::new(u32::MAX).unwrap()]);
}

#[test]
fn a_backup_clears_the_mark_of_what_it_holds() {
    let mut keyring = created();
    // A verified backup of today holds Active and Next: the next scheduled rotation needs no other.
    keyring.mark_backed(keyring.next().version);
    rotate(&mut keyring, Rotate::Regular, start() + PERIOD);
    assert_eq!(keyring.unbacked().count(), 0);
    // A second rotation in one backup's time, or a fresh one, does.
    rotate(&mut keyring, Rotate::Regular, start() + PERIOD);
    assert_eq!(keyring.unbacked().map(|v| v.version.get()).collect::<Vec<_>>(), [3]);
}

/// A scheduler as the agent has it: looks once a minute or when told, acts on the step, guarded by its own
/// monotonic time.
struct Scheduler {
    keyring: Keyring,
    changed: Option<Duration>,
    rotations: Vec<SystemTime>,
    reanchored: u32,
}

impl Scheduler {
    fn new() -> Self {
        Self { keyring: created(), changed: None, rotations: Vec::new(), reanchored: 0 }
    }

    fn look(&mut self, wall: SystemTime, monotonic: Duration) {
        match self.keyring.next_step(&CLUSTER, wall) {
            Step::Rotate if may_rotate_on_schedule(PERIOD, self.changed.map(|then| monotonic - then)) => {
                rotate(&mut self.keyring, Rotate::Regular, wall);
                self.changed = Some(monotonic);
                self.rotations.push(wall);
            }
            Step::Reanchor => {
                assert!(self.keyring.reanchor(wall));
                self.reanchored += 1;
            }
            Step::Rotate | Step::Wait(_) => {}
        }
    }
}

#[test]
fn forty_years_rotate_some_500_times_never_late_and_every_wrap_still_opens() {
    let mut scheduler = Scheduler::new();
    let mut wrapped_under: HashSet<Header> = HashSet::new();
    let years_40 = 14_610 * DAY;
    let mut passed = Duration::ZERO;
    while passed < years_40 {
        let now = start() + passed;
        scheduler.look(now, passed);
        let active = scheduler.keyring.for_wrap(None, now).unwrap();
        let age = now.duration_since(active.activated.unwrap()).unwrap();
        assert!(age <= PERIOD, "version {} is {age:?} old", active.version);
        assert_eq!(scheduler.keyring.versions().iter().filter(|v| v.state == State::Active).count(), 1);
        wrapped_under.insert(Header { version: active.version, key_id: active.key_id });
        // Once an hour is enough to watch; towards the due time the real pace, once a minute.
        let left = scheduler.keyring.due(&CLUSTER).duration_since(now).unwrap_or_default();
        passed += left.clamp(MINUTE, 60 * MINUTE);
    }
    let rotations = scheduler.rotations.len();
    assert!((499..=513).contains(&rotations), "{rotations} rotations: 487 full periods, 2.5 % to 5 % early");
    assert_eq!(scheduler.keyring.versions().len(), rotations + 2);
    assert_eq!(wrapped_under.len(), rotations + 1);
    assert!(wrapped_under.iter().all(|header| scheduler.keyring.for_unwrap(header).is_ok()));
    for pair in scheduler.rotations.windows(2) {
        let apart = pair[1].duration_since(pair[0]).unwrap();
        assert!(apart < PERIOD && apart >= PERIOD - PERIOD / 20, "{apart:?}");
    }
    let restored = Keyring::from_parts(RotationPolicy::default(), scheduler.keyring.versions().to_vec());
    assert_eq!(restored, Ok(scheduler.keyring));
}

#[test]
fn a_backup_one_rotation_old_reads_all_that_is_written_until_the_next() {
    let mut keyring = created();
    for n in 1..100_u32 {
        let backup = keyring.clone();
        rotate(&mut keyring, Rotate::Regular, start() + n * PERIOD);
        let active = keyring.for_wrap(None, start() + n * PERIOD).unwrap();
        let header = Header { version: active.version, key_id: active.key_id };
        assert_eq!(backup.for_unwrap(&header).unwrap().state, State::Next, "and it shows that it is behind");
    }
}

#[test]
fn a_jump_of_ten_years_and_back_costs_one_early_rotation_and_its_repair_none() {
    let mut scheduler = Scheduler::new();
    let jump = |passed: Duration| if passed < 5 * MINUTE { 3_650 * DAY } else { Duration::ZERO };
    let mut passed = Duration::ZERO;
    while passed < 90 * DAY {
        scheduler.look(start() + DAY + passed + jump(passed), passed);
        passed += MINUTE;
    }
    assert_eq!(scheduler.reanchored, 1);
    assert_eq!(scheduler.rotations.len(), 1 + 3, "the early one, then one per period");
}

#[test]
fn a_clock_that_flaps_hourly_by_40_days_rotates_at_most_twice_a_period() {
    let mut scheduler = Scheduler::new();
    let mut passed = Duration::ZERO;
    while passed < 300 * DAY {
        let ahead = if passed.as_secs() / 3_600 % 2 == 1 { 40 * DAY } else { Duration::ZERO };
        scheduler.look(start() + passed + ahead, passed);
        passed += MINUTE;
    }
    let rotations = scheduler.rotations.len();
    assert!((10..=20).contains(&rotations), "{rotations} rotations in ten periods");
}
