//! Crash trials on the agent as it is shipped: no failpoint in it, a disk under it that stops.
//!
//! A trial copies a prepared store, starts the agent over the shim (`tests/shim/disk.c`), drives one change over the
//! real ports, and lets the program be killed or the power be cut at one exact operation of the disk. Then the agent
//! starts again on a sound disk, and all that any caller was ever told must be true. A trial must never repair
//! anything, and never forgive what it does not understand: whatever is unexpected is a violation.

use std::fmt;
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};
use std::thread;

use anyhow::{Context, anyhow};

use crate::fleet::Ports;
use crate::ports::free_port;
use crate::wait;

pub mod shim;
pub mod node;
pub mod template;
pub mod evidence;
pub mod audit;
pub mod site;
pub mod operation;
pub mod trial;
pub mod split_writer;
pub mod stage;

use operation::Operation;
use shim::{DiskError, Fault};
use template::Template;
use trial::{Outcome, Plan};

/// Trials that run at the same time.
const WORKERS: usize = 2;
/// From an operation that fails to the power cut: far enough to acknowledge what must not be.
const LATER: u64 = 11;
/// Violations that a report spells out.
const SHOWN: usize = 10;

/// Sums over many trials.
#[derive(Debug, Default)]
pub struct Report {
    /// All trials.
    pub trials: usize,
    /// The program was killed or the power was cut before it came to its end.
    pub died: usize,
    /// Thereof while the write-ahead log held an unfinished transaction.
    pub in_transaction: usize,
    /// Thereof between a change's intent and its outcome in the audit.
    pub between_intent_and_outcome: usize,
    /// Thereof after the change was durable.
    pub done_but_unrecorded: usize,
    /// Changes of the disk that power cuts undid.
    pub undone: u64,
    /// Trials in which something did not hold, with what it was.
    pub violations: Vec<String>,
    /// How long all of it took.
    pub seconds: f64,
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { trials, died, in_transaction, between_intent_and_outcome, .. } = self;
        write!(
            f,
            "{trials} trials, {died} died, {in_transaction} inside a transaction, \
             {between_intent_and_outcome} between intent and outcome ({} of them after the commit), \
             {} unsynced changes undone, {} violations, {:.1} s",
            self.done_but_unrecorded,
            self.undone,
            self.violations.len(),
            self.seconds
        )?;
        self.violations.iter().take(SHOWN).try_for_each(|violation| write!(f, "\n  {violation}"))
    }
}

impl Report {
    fn add(&mut self, plan: &Plan, outcome: &Outcome) {
        self.trials += 1;
        if let Some(fired) = &outcome.fired {
            self.died += 1;
            self.in_transaction += usize::from(fired.in_transaction);
            self.between_intent_and_outcome += usize::from(outcome.between_intent_and_outcome);
            self.done_but_unrecorded += usize::from(outcome.done_but_unrecorded);
            self.undone += fired.undone;
        }
        if !outcome.violations.is_empty() {
            let (operation, fault) = (plan.operation.name(), plan.fault);
            let what = outcome.violations.join("; ");
            self.violations.push(format!("{operation}, {fault:?}, {:?}: {what}", outcome.fired));
        }
    }
}

/// The stores that trials start from, one for each operation; gone from the disk when dropped.
pub struct Templates(Vec<(Operation, Template)>);

impl Templates {
    /// Makes all of them.
    ///
    /// # Errors
    /// When the agent's library refuses.
    pub fn new() -> anyhow::Result<Self> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let make = |operation: Operation| Ok((operation, runtime.block_on(operation.template())?));
        Ok(Self(Operation::ALL.into_iter().map(make).collect::<anyhow::Result<_>>()?))
    }

    /// The store for an operation.
    pub fn of(&self, operation: Operation) -> &Template {
        let found = self.0.iter().find(|(own, _)| *own == operation);
        found.map(|(_, template)| template).expect("there is one for each operation")
    }
}

/// Counts the operations of the disk in one whole run of a plan without its fault: start, change, stop.
///
/// # Errors
/// When the run fails without any fault.
pub fn operations(plan: &Plan, templates: &Templates) -> anyhow::Result<u64> {
    let (scratch, plan) = (template::temporary()?, Plan { fault: Fault::None, ..plan.clone() });
    let template = templates.of(plan.operation);
    let outcome = run_one(&plan, template, &scratch.path().join("0"), ports()?)?;
    if outcome.violations.is_empty() {
        return Ok(outcome.operations);
    }
    Err(anyhow!("a run without any fault: {:?}", outcome.violations))
}

/// Every `stride`th operation of one run in order: killed there, the power cut there in two ways, and failed there
/// with the power cut a little later. With a stride of more than one each kind of fault begins at another operation,
/// so that together they miss few.
pub fn in_order(operation: Operation, operations: u64, stride: u64) -> Vec<Plan> {
    let kinds: [fn(u64) -> Fault; 4] = [
        Fault::KillAt,
        |at| Fault::PowerCut { at, seed: 0 },
        |at| Fault::PowerCut { at, seed: at },
        |at| {
            let error = DiskError::Io;
            Fault::ErrorThenPowerCut { error, from: at, to: at, at: at + LATER, seed: 0 }
        },
    ];
    let faults = (1..=operations).flat_map(|at| {
        (0..).zip(kinds).filter(move |(kind, _)| (at + kind) % stride == 0).map(move |(_, fault)| fault(at))
    });
    faults.chain([Fault::KillAfter(operations)]).map(|fault| Plan::new(operation, fault)).collect()
}

/// `count` trials drawn from `seed`.
pub fn random(seed: u64, count: usize, operations: &[(Operation, u64)]) -> Vec<Plan> {
    let mut numbers = Numbers(seed);
    (0..count)
        .filter_map(|_| {
            let (operation, last) = *operations.get(numbers.below(operations.len() as u64) as usize)?;
            let at = 1 + numbers.below(last);
            let fault = match numbers.below(10) {
                0 | 1 => Fault::KillAt(at),
                2 => Fault::KillAfter(at),
                3 => Fault::PowerCut { at, seed: 0 },
                4..=7 => Fault::PowerCut { at, seed: 1 + numbers.below(u64::MAX - 1) },
                _ => numbers.error_then_power_cut(at, last),
            };
            Some(Plan::new(operation, fault))
        })
        .collect()
}

/// Runs trials, several at a time.
///
/// # Errors
/// When a trial cannot be run.
pub fn run(plans: &[Plan], templates: &Templates) -> anyhow::Result<Report> {
    let next = AtomicUsize::new(0);
    let report = Mutex::new(Report::default());
    let scratch = template::temporary()?;
    let worker = || -> anyhow::Result<()> {
        let ports = ports()?;
        loop {
            let number = next.fetch_add(1, Ordering::SeqCst);
            let Some(plan) = plans.get(number) else { return Ok(()) };
            let directory = scratch.path().join(number.to_string());
            let mut outcome = run_one(plan, templates.of(plan.operation), &directory, ports)
                .with_context(|| format!("trial {number}: {plan:?}"))?;
            if !outcome.violations.is_empty() && plan.lie.is_none() && plan.instead.is_none() {
                let kept = trial::keep(&directory, number)?;
                outcome.violations.push(format!("files in {}", kept.display()));
            }
            std::fs::remove_dir_all(&directory)?;
            report.lock().unwrap_or_else(PoisonError::into_inner).add(plan, &outcome);
        }
    };
    let (result, took) = wait::timed(|| {
        thread::scope(|scope| {
            let workers: Vec<_> = (0..WORKERS).map(|_| scope.spawn(worker)).collect();
            workers
                .into_iter()
                .map(|worker| worker.join().map_err(|_| anyhow!("a worker panicked"))?)
                .collect()
        })
    });
    let result: anyhow::Result<Vec<()>> = result;
    result?;
    let mut report = report.into_inner().unwrap_or_else(PoisonError::into_inner);
    report.seconds = took.as_secs_f64();
    Ok(report)
}

fn run_one(plan: &Plan, template: &Template, directory: &Path, ports: Ports) -> anyhow::Result<Outcome> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(plan.run(template, directory, ports))
}

fn ports() -> anyhow::Result<Ports> {
    Ok(Ports { data: free_port()?, enrolment: free_port()?, admin: free_port()?, ops: free_port()? })
}

/// Pseudo-random numbers that a seed repeats (SplitMix64).
struct Numbers(u64);

impl Numbers {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, limit: u64) -> u64 {
        self.next() % limit.max(1)
    }

    fn error_then_power_cut(&mut self, at: u64, last: u64) -> Fault {
        let error = if self.below(2) == 0 { DiskError::Full } else { DiskError::Io };
        let (from, length) = (1 + self.below(last), self.below(3));
        Fault::ErrorThenPowerCut {
            error,
            from,
            to: from + length,
            at: at.max(from + length + 1),
            seed: self.below(3),
        }
    }
}
