//! Crash trials: how many, where they hit, and that nothing acknowledged is ever lost. `make crash N=10000` for more.
//!
//! The trials are worth what they can find: two of these tests break a promise on purpose and must see it.
#![allow(clippy::unwrap_used, reason = "a test")]

use std::sync::{Mutex, MutexGuard, PoisonError};

use fleet_kms_tests::crash::operation::{Operation, Victim};
use fleet_kms_tests::crash::shim::Fault;
use fleet_kms_tests::crash::trial::Plan;
use fleet_kms_tests::crash::{self, Templates, split_writer};

/// How many random trials; every operation in order comes on top. Without it few, and only some operations of the
/// long changes.
const TRIALS: &str = "FLEET_KMS_CRASH_TRIALS";
/// What the random trials are drawn from.
const SEED: &str = "FLEET_KMS_CRASH_SEED";
const FEW: u64 = 100;
/// A change is long if its run has more operations.
const LONG: u64 = 120;
/// Of a long change as many operations are taken for each kind of fault, evenly spread.
const SAMPLE: u64 = 40;
/// Takes one change by the start of its name instead of all.
const ONLY: &str = "FLEET_KMS_CRASH_ONLY";

fn number(variable: &str, default: u64) -> u64 {
    std::env::var(variable).map_or(default, |text| text.parse().unwrap())
}

/// Each test keeps both cores busy by itself; two at once only run into each other's time limits and ports.
fn alone() -> MutexGuard<'static, ()> {
    static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());
    ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner)
}

#[test]
fn every_operation_of_the_disk_may_be_the_last_one() {
    let _alone = alone();
    let templates = Templates::new().unwrap();
    let only = std::env::var(ONLY).unwrap_or_default();
    for operation in Operation::ALL.into_iter().filter(|operation| operation.name().starts_with(&only)) {
        let operations = crash::operations(&Plan::new(operation, Fault::None), &templates).unwrap();
        let is_sampled = operations > LONG && std::env::var_os(TRIALS).is_none();
        let stride = if is_sampled { operations.div_ceil(SAMPLE) } else { 1 };
        let report = crash::run(&crash::in_order(operation, operations, stride), &templates).unwrap();
        println!("{}, {operations} operations, every {stride}th in order: {report}", operation.name());
        assert!(report.violations.is_empty(), "{report}");
        // The command writes no transaction.
        let is_the_agent = operation.victim() == Victim::Agent;
        let has_hit = report.in_transaction > 0 && report.done_but_unrecorded > 0;
        assert!(report.died > 0 && has_hit == is_the_agent, "{report}");
    }
}

#[test]
fn random_crashes_lose_nothing_that_was_acknowledged() {
    let _alone = alone();
    let (count, seed) = (number(TRIALS, FEW), number(SEED, 1));
    let templates = Templates::new().unwrap();
    let operations = Operation::ALL.map(|operation| {
        let plan = Plan::new(operation, Fault::None);
        (operation, crash::operations(&plan, &templates).unwrap())
    });
    let plans = crash::random(seed, usize::try_from(count).unwrap(), &operations);
    let report = crash::run(&plans, &templates).unwrap();
    println!("random from seed {seed}: {report}");
    assert!(report.violations.is_empty(), "{report}");
}

#[test]
fn a_disk_that_lies_about_syncing_the_store_is_found_out() {
    let _alone = alone();
    let templates = Templates::new().unwrap();
    let lying = Plan { lie: Some("store.db".to_owned()), ..Plan::new(Operation::Rotation, Fault::None) };
    let operations = crash::operations(&lying, &templates).unwrap();
    let cut = |at| Plan { fault: Fault::PowerCut { at, seed: 0 }, ..lying.clone() };
    let plans: Vec<_> = (1..=operations).step_by(6).map(cut).collect();
    let report = crash::run(&plans, &templates).unwrap();
    println!("a disk that lies: {report}");
    assert!(report.violations.iter().any(|found| found.contains("recovered-unconfirmed")), "{report}");
}

#[test]
fn a_rotation_in_two_transactions_is_found_out() {
    let _alone = alone();
    let templates = Templates::new().unwrap();
    let split = Plan { instead: Some(split_writer::process), ..Plan::new(Operation::Rotation, Fault::None) };
    let operations = crash::operations(&split, &templates).unwrap();
    let kill = |at| Plan { fault: Fault::KillAt(at), ..split.clone() };
    let plans: Vec<_> = (1..=operations).map(kill).collect();
    let report = crash::run(&plans, &templates).unwrap();
    println!("a rotation in two transactions: {report}");
    assert!(
        report.violations.iter().any(|found| found.contains("not what the last transaction left")),
        "{report}"
    );
}

/// Not a test: the process of [`a_rotation_in_two_transactions_is_found_out`].
#[tokio::test]
#[ignore = "the child of another test"]
async fn split_writer() {
    split_writer::rotate().await.unwrap();
}
