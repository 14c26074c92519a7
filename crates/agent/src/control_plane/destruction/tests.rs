use std::time::UNIX_EPOCH;

use fleet_kms_keyring::rotation::{RotationPolicy, Step};
use fleet_kms_keyring::{KeyId, Keyring, Rotate};

use super::*;
use crate::control_plane::{KeyChangeError, VersionChange};

const DAY: Duration = Duration::from_secs(86_400);
const FIRST: Version = Version::FIRST;

fn start() -> SystemTime {
    UNIX_EPOCH + Duration::from_secs(1_800_000_000)
}

fn keyring() -> Keyring {
    let mut key_id = |version: Version| KeyId::from_bytes(u128::from(version.get()).to_be_bytes());
    let mut keyring = Keyring::create(RotationPolicy::default(), start(), &mut key_id);
    keyring.rotate(Rotate::Regular, start(), &mut key_id).unwrap();
    keyring
}

/// All that an agent can know today speaks for it.
fn evidence(now: SystemTime) -> Evidence {
    Evidence {
        now,
        latest: now,
        settling: None,
        watched: 60 * DAY,
        last_use: LastUse::default(),
        last_backup: Some(now - DAY),
    }
}

fn said(keyring: &Keyring, evidence: &Evidence, name: &str) -> (bool, String) {
    let guards = guards(keyring.by_version(FIRST).unwrap(), evidence);
    let guard = guards.into_iter().find(|guard| guard.name == name).unwrap();
    (guard.ok, guard.why)
}

#[test]
fn a_destruction_waits_for_a_census_and_the_state_speaks_first() {
    let (mut keyring, evidence) = (keyring(), evidence(start()));
    let schedule = VersionChange::ScheduleDestruction;
    let refused = schedule.apply(&mut keyring, FIRST, &evidence).unwrap_err();
    assert!(matches!(refused, KeyChangeError::Transition(_)), "{refused}");
    VersionChange::Disable.apply(&mut keyring, FIRST, &evidence).unwrap();
    let before = keyring.clone();
    let refused = schedule.apply(&mut keyring, FIRST, &evidence).unwrap_err();
    assert_eq!(refused.to_string(), "version 1 may not be destroyed: no census");
    assert_eq!(keyring, before);
    VersionChange::Enable.apply(&mut keyring, FIRST, &evidence).unwrap();
}

#[test]
fn each_guard_agrees_on_its_own_evidence_and_not_without_it() {
    let mut keyring = keyring();
    let (now, fresh) = (start() + 40 * DAY, evidence(start() + 40 * DAY));
    assert!(!said(&keyring, &fresh, "disabled").0 && !said(&keyring, &fresh, "no_hit").0);
    keyring.disable(FIRST, start() + DAY).unwrap();
    assert_eq!(said(&keyring, &fresh, "disabled"), (true, "it is disabled".to_owned()));
    assert!(said(&keyring, &fresh, "unused").0 && said(&keyring, &fresh, "no_hit").0);

    let used = LastUse { unwrapped: Some(2 * DAY), refused: Some(DAY) };
    let used = Evidence { last_use: used, ..fresh };
    assert_eq!(said(&keyring, &used, "unused"), (false, "it unwrapped 2d ago".to_owned()));
    assert_eq!(
        said(&keyring, &used, "no_hit"),
        (false, "somebody asked for what it wrapped 1d ago".to_owned())
    );
    let young = Evidence { watched: 2 * DAY, ..fresh };
    for name in ["unused", "no_hit"] {
        let (ok, why) = said(&keyring, &young, name);
        assert!(!ok && why.starts_with("unknown: ") && why.contains("started 2d ago"), "{name}: {why}");
    }
    let early = Evidence { now: start() + 20 * DAY, ..fresh };
    let (ok, why) = said(&keyring, &early, "no_hit");
    assert!(!ok && why == "it has been disabled for 19d, not 30d", "{why}");

    assert!(!said(&keyring, &fresh, "backup").0, "it is unbacked");
    keyring.mark_backed(keyring.next().version);
    assert!(said(&keyring, &fresh, "backup").0);
    assert!(!said(&keyring, &Evidence { last_backup: None, ..fresh }, "backup").0);
    let (ok, why) = said(&keyring, &fresh, "etcd_backups");
    assert!(!ok && why.starts_with("unknown: "), "{why}");
    let names: Vec<_> = guards(keyring.by_version(FIRST).unwrap(), &fresh).iter().map(|it| it.name).collect();
    assert_eq!(names, ["disabled", "census", "unused", "no_hit", "etcd_backups", "backup", "waiting"]);
    let (ok, why) = said(&keyring, &fresh, "waiting");
    assert!(!ok && why == "30d from the order on, and nobody has given it", "{why}");
    keyring.schedule_destruction(FIRST, now - 31 * DAY, DESTRUCTION_WAIT).unwrap();
    assert!(said(&keyring, &fresh, "waiting").0);
}

/// The clocks of an agent, looked at once a minute.
struct Clocks {
    mark: HighWater,
    wall: SystemTime,
    monotonic: Instant,
}

impl Clocks {
    async fn new() -> Self {
        let store = fleet_kms_store::MemoryStore::new();
        crate::promises::rig::initialise(&store).await;
        let audit = tempfile::tempdir().unwrap();
        let clocks = crate::promises::rig::Clocks::new();
        let desk = crate::promises::rig::Desk::open(Arc::new(store), audit.path(), &clocks).await;
        let mark = HighWater::load(&desk.ledger).await.unwrap();
        let mut new = Self { mark, wall: start(), monotonic: fleet_kms_process::clock::monotonic() };
        new.pass(2 * DAY);
        new
    }

    fn pass(&mut self, time: Duration) {
        let minute = Duration::from_secs(60);
        for _ in 0..time.as_secs() / 60 {
            (self.wall, self.monotonic) = (self.wall + minute, self.monotonic + minute);
            self.mark.look(self.wall, self.monotonic);
        }
    }

    fn evidence(&self) -> Evidence {
        let (latest, settling) = (self.mark.latest(self.wall), self.mark.settling(self.monotonic));
        Evidence { latest, settling, ..evidence(self.wall) }
    }
}

#[tokio::test]
async fn a_clock_that_is_ten_years_ahead_and_back_makes_nothing_due_early_and_no_rotation_late() {
    const YEARS: Duration = Duration::from_secs(10 * 365 * 86_400);
    let mut clocks = Clocks::new().await;
    let mut keyring = keyring();
    let rotation = keyring.next_step(&ClusterId::from_bytes([7; 16]), clocks.wall);
    keyring.disable(FIRST, clocks.wall).unwrap();
    keyring.schedule_destruction(FIRST, clocks.evidence().latest, DESTRUCTION_WAIT).unwrap();
    let ordered = clocks.wall;

    clocks.wall += YEARS;
    clocks.pass(Duration::from_secs(5 * 60));
    let (ok, why) = said(&keyring, &clocks.evidence(), "waiting");
    assert!(!ok && why.contains("the clock jumped ahead"), "{why}");
    clocks.wall -= YEARS;
    clocks.pass(DAY);
    let (ok, why) = said(&keyring, &clocks.evidence(), "waiting");
    assert!(!ok && why.starts_with("it waits until"), "{why}");
    assert!(keyring.clone().destroy(FIRST, clocks.wall).is_err());
    // What is ordered from now on waits from the latest time that was seen.
    let mut later = keyring.clone();
    later.cancel_destruction(FIRST).unwrap();
    later.schedule_destruction(FIRST, clocks.evidence().latest, DESTRUCTION_WAIT).unwrap();
    let State::DestroyScheduled { not_before } = later.by_version(FIRST).unwrap().state else { panic!() };
    assert!(not_before > ordered + YEARS);
    // Rotation goes by the wall clock alone.
    let step = keyring.next_step(&ClusterId::from_bytes([7; 16]), clocks.wall);
    assert!(matches!((rotation, step), (Step::Wait(before), Step::Wait(after)) if before == after));
    clocks.pass(29 * DAY);
    assert!(matches!(keyring.next_step(&ClusterId::from_bytes([7; 16]), clocks.wall), Step::Rotate));
    clocks.pass(DAY);
    assert!(said(&keyring, &clocks.evidence(), "waiting").0, "and after its time it is due");
}

#[tokio::test]
async fn an_order_that_is_given_while_the_clock_is_behind_waits_from_the_latest_time() {
    let mut clocks = Clocks::new().await;
    let right = clocks.wall;
    let mut keyring = keyring();
    clocks.wall -= 60 * DAY;
    clocks.pass(Duration::from_secs(60));
    keyring.disable(FIRST, clocks.wall).unwrap();
    keyring.schedule_destruction(FIRST, clocks.evidence().latest, DESTRUCTION_WAIT).unwrap();
    clocks.wall += 60 * DAY;
    clocks.pass(2 * DAY);
    let (ok, why) = said(&keyring, &clocks.evidence(), "waiting");
    assert!(!ok && why.starts_with("it waits until"), "{why}");
    let State::DestroyScheduled { not_before } = keyring.by_version(FIRST).unwrap().state else { panic!() };
    assert_eq!(not_before, right + DESTRUCTION_WAIT);
}
