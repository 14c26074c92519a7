//! What a wrong clock costs: the real agent under libfaketime, its wall clock set while it runs, monotonic time real.
//!
//! Each scenario asks the same: how many rotations, and does the next one come within a period. They run side by side,
//! because the agent may take a minute to look.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]

use std::collections::HashMap;
use std::thread;
use std::time::Duration;

use fleet_kms_process::{clock, runtime};
use fleet_kms_tests::big_store::{Fill, fill, load_config};
use fleet_kms_tests::faketime::FakeClock;
use fleet_kms_tests::fleet::{Agent, until_true};
use serde_json::Value;
use tempfile::TempDir;

const DAY: i64 = 86_400;
const YEAR: i64 = 31_557_600;
const CLUSTERS: usize = 3;
/// The agent looks at least once a minute; the rest is for a busy machine.
const A_LOOK: Duration = Duration::from_secs(60);
const SLACK: Duration = Duration::from_secs(60);

struct Scenario {
    name: &'static str,
    agent: Agent,
    clock: FakeClock,
    _directory: TempDir,
}

impl Scenario {
    /// An agent whose clusters were made just now, and whose clock goes right.
    fn new(name: &'static str) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let mut agent = Agent::init(directory.path(), "").unwrap();
        let config = load_config(&agent.config).unwrap();
        let clusters = Fill { clusters: CLUSTERS, versions: 2, activated: clock::now() };
        runtime::multi_thread().unwrap().block_on(fill(&config, clusters)).unwrap();
        let clock = FakeClock::new(directory.path()).unwrap();
        agent.respec(|spec| clock.apply(spec).unwrap());
        Self { name, agent, clock, _directory: directory }
    }

    fn start_at(&mut self, ahead: i64) {
        self.clock.set(ahead).unwrap();
        self.agent.start().unwrap();
    }

    fn restart_at(&mut self, ahead: i64) {
        self.agent.stop().unwrap();
        self.start_at(ahead);
    }

    /// Changes of one kind that are done, over all clusters.
    fn done(&self, action: &str) -> usize {
        let lines = self.agent.audit("changes").unwrap();
        let text = |line: &Value, field: &str| line.get(field).and_then(Value::as_str).map(str::to_owned);
        let mut actions = HashMap::new();
        let mut done = 0;
        for line in &lines {
            let change = text(line, "change");
            match text(line, "kind").as_deref() {
                Some("intent") => drop(actions.insert(change, text(line, "action"))),
                Some("outcome") if text(line, "outcome").as_deref() == Some("done") => {
                    done += usize::from(actions.get(&change).cloned().flatten().as_deref() == Some(action));
                }
                _ => {}
            }
        }
        done
    }

    /// Rotations and re-anchorings of each cluster; all clusters have the same.
    fn counts(&self) -> (usize, usize) {
        let (rotated, reanchored) = (self.done("key_rotate_scheduled"), self.done("clock_reanchor"));
        (rotated.div_ceil(CLUSTERS), reanchored.div_ceil(CLUSTERS))
    }

    /// Waits until each cluster was rotated and re-anchored so often, and not more often.
    fn expect(&self, rotated: usize, reanchored: usize) {
        let (rotations, reanchors) = (rotated * CLUSTERS, reanchored * CLUSTERS);
        let what = format!("{}: {rotated} rotations and {reanchored} re-anchorings", self.name);
        until_true(&what, A_LOOK + SLACK, || {
            let done = (self.done("key_rotate_scheduled"), self.done("clock_reanchor"));
            assert!(done.0 <= rotations && done.1 <= reanchors, "{what}: {done:?}");
            Ok(done == (rotations, reanchors))
        })
        .unwrap();
    }

    /// Gives the agent time to look, and to do what it must not.
    fn expect_no_more(&self, rotated: usize, reanchored: usize) {
        thread::sleep(A_LOOK + Duration::from_secs(5));
        assert_eq!(self.counts(), (rotated, reanchored), "{}", self.name);
    }

    /// A period later by the clock that the agent has now, each cluster has been rotated once more.
    fn expect_the_next_one(mut self, ahead: i64) {
        let (rotated, reanchored) = self.counts();
        self.restart_at(ahead + 30 * DAY);
        self.expect(rotated + 1, reanchored);
        self.agent.stop().unwrap();
        println!(
            "{}: {rotated} rotations, {reanchored} re-anchorings, the next one within a period",
            self.name
        );
    }
}

fn a_month_ahead_while_running() {
    let mut scenario = Scenario::new("+31 d while running");
    scenario.start_at(0);
    scenario.clock.set(31 * DAY).unwrap();
    scenario.expect(1, 0);
    scenario.expect_the_next_one(31 * DAY);
}

fn off_for_75_days() {
    let mut scenario = Scenario::new("75 d off");
    scenario.start_at(0);
    scenario.restart_at(75 * DAY);
    scenario.expect(1, 0);
    scenario.expect_the_next_one(75 * DAY);
}

fn two_months_back() {
    let mut scenario = Scenario::new("-60 d while running");
    scenario.start_at(0);
    scenario.clock.set(-60 * DAY).unwrap();
    scenario.expect(0, 1);
    scenario.expect_the_next_one(-60 * DAY);
}

fn ten_years_ahead_for_minutes() {
    let mut scenario = Scenario::new("+10 y for minutes and back");
    scenario.start_at(0);
    scenario.clock.set(10 * YEAR).unwrap();
    scenario.expect(1, 0);
    scenario.clock.set(0).unwrap();
    scenario.expect(1, 1);
    scenario.expect_the_next_one(0);
}

fn flapping_by_40_days() {
    let mut scenario = Scenario::new("flapping by 40 d");
    let flaps = std::env::var("FLAPS").map_or(1, |text| text.parse::<usize>().unwrap());
    scenario.start_at(40 * DAY);
    scenario.expect(1, 0);
    scenario.clock.set(0).unwrap();
    scenario.expect(1, 1);
    for _ in 0..flaps {
        // Ahead again: the version looks 40 days old, but this process saw it change minutes ago.
        scenario.clock.set(40 * DAY).unwrap();
        scenario.expect_no_more(1, 1);
        scenario.clock.set(0).unwrap();
    }
    scenario.expect_the_next_one(0);
}

#[test]
fn a_wrong_clock_costs_one_early_rotation_at_most_and_its_repair_nothing() {
    let scenarios = [
        a_month_ahead_while_running,
        off_for_75_days,
        two_months_back,
        ten_years_ahead_for_minutes,
        flapping_by_40_days,
    ];
    thread::scope(|scope| scenarios.into_iter().for_each(|scenario| drop(scope.spawn(scenario))));
}
