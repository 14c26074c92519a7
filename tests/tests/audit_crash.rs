//! The audit over crashes: `make audit-crash` for 2,000 trials.
#![allow(clippy::unwrap_used, reason = "a test")]

use fleet_kms_tests::audit_crash::{Each, Report, Trial, operations, run};
use fleet_kms_tests::crash::operation::Operation;
use fleet_kms_tests::crash::shim::Fault;
use fleet_kms_tests::crash::template::Template;

/// How many trials.
const TRIALS: &str = "FLEET_KMS_AUDIT_CRASH_TRIALS";
const FEW: usize = 24;

fn template() -> Template {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(Operation::Rotation.template()).unwrap()
}

/// Kills and power cuts, spread over all operations of a run.
fn spread(each: Each, lie: bool, count: usize, last: u64, fault: impl Fn(usize, u64) -> Fault) -> Vec<Trial> {
    let at = |number: usize| 1 + (number as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15) % last;
    (0..count).map(|number| Trial { each, fault: fault(number, at(number)), lie }).collect()
}

fn print(what: &str, report: &Report) {
    println!(
        "{what}: {} trials, {} died, {} between intent and outcome, {} of them after the commit; {} unwraps \
         acknowledged, {} without a record, those of one trial within {:?}; {} violations",
        report.trials,
        report.died,
        report.between_intent_and_outcome,
        report.done_but_unrecorded,
        report.acknowledged,
        report.missing,
        report.missing_within,
        report.violations.len()
    );
    report.violations.iter().take(10).for_each(|violation| println!("  {violation}"));
}

#[test]
fn what_was_acknowledged_is_recorded_whenever_the_agent_dies() {
    let count = std::env::var(TRIALS).map_or(FEW, |text| text.parse().unwrap());
    let template = template();
    let mut died_unrecorded = 0;
    for each in [Each::Written, Each::Durable] {
        let last = operations(each, false, &template).unwrap();
        let fault = |number: usize, at| match number % 4 {
            0 => Fault::KillAt(at),
            1 => Fault::KillAfter(at),
            2 => Fault::PowerCut { at, seed: 0 },
            _ => Fault::PowerCut { at, seed: 1 + number as u64 },
        };
        let report = run(&spread(each, false, count / 2, last, fault), &template).unwrap();
        print(&format!("{each:?}, {last} operations"), &report);
        assert!(report.violations.is_empty(), "{:?}", report.violations);
        assert!(report.died > 0 && report.acknowledged > 0);
        died_unrecorded += report.between_intent_and_outcome;
    }
    assert!(count <= FEW || died_unrecorded > 0, "no trial hit a change between intent and outcome");
}

#[test]
fn a_disk_that_lies_about_syncing_the_audit_is_found_out() {
    let template = template();
    let last = operations(Each::Durable, true, &template).unwrap();
    let fault = |number: usize, _| Fault::PowerCut { at: last * (6 + number as u64) / 10, seed: 0 };
    let report = run(&spread(Each::Durable, true, 4, last, fault), &template).unwrap();
    print("a disk that lies", &report);
    assert!(report.violations.iter().any(|found| found.contains("have no record")), "{report:?}");
}
