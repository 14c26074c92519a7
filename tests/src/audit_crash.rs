//! Crash trials of the audit: an agent that records each call, over a disk that stops while a node unwraps and the
//! schedule rotates.
//!
//! Afterwards every change that happened has its record with the right outcome and none that did not; an acknowledged
//! unwrap is in the files, or, after a power cut in `written`, among the last ones and those within a short time.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitStatus;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use anyhow::{Context, bail};
use fleet_kms_process::clock::monotonic;
use rustix::process::Signal;
use serde_json::Value;

use crate::child::{Child, Spec};
use crate::crash::audit::AuditView;
use crate::crash::evidence::StoreView;
use crate::crash::node::Node;
use crate::crash::operation::{Acknowledged, Left, Operation};
use crate::crash::shim::{Fault, Shim};
use crate::crash::site::Site;
use crate::crash::template::{self, Template};
use crate::crash::trial::keep;
use crate::fleet::Ports;
use crate::ports::free_port;

/// Trials that run at the same time.
const WORKERS: usize = 2;
/// Unwraps after the rotation was seen.
const AFTERWARDS: usize = 12;
/// More unwraps than any trial needs.
const MOST: usize = 4000;
/// What the agent declares, and room for a client that is not told at once on a busy machine.
const LOST_WITHIN: Duration = Duration::from_millis(50 + 450);
/// How long an agent may take to end once it has to.
const END_LIMIT: Duration = Duration::from_secs(30);

/// How calls are recorded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Each {
    /// Handed to the kernel before the answer.
    Written,
    /// Durable before the answer.
    Durable,
}

impl Each {
    fn word(self) -> &'static str {
        match self {
            Self::Written => "written",
            Self::Durable => "durable",
        }
    }
}

/// One trial.
#[derive(Clone, Copy, Debug)]
pub struct Trial {
    /// How calls are recorded.
    pub each: Each,
    /// What happens to the disk.
    pub fault: Fault,
    /// Syncs of the audit do nothing: a disk that lies, to see the trials turn red.
    pub lie: bool,
}

/// Sums over many trials.
#[derive(Debug, Default)]
pub struct Report {
    /// All trials.
    pub trials: usize,
    /// The program died before its end.
    pub died: usize,
    /// Thereof between a change's intent and its outcome.
    pub between_intent_and_outcome: usize,
    /// Thereof after the change's transaction was durable.
    pub done_but_unrecorded: usize,
    /// Unwraps that were acknowledged.
    pub acknowledged: usize,
    /// Thereof those whose record is missing.
    pub missing: usize,
    /// The longest time between the acknowledgements of missing ones in one trial.
    pub missing_within: Duration,
    /// What did not hold.
    pub violations: Vec<String>,
}

/// What came of one trial.
#[derive(Default)]
struct Outcome {
    operations: u64,
    died: bool,
    between: bool,
    done_but_unrecorded: bool,
    acknowledged: Vec<Duration>,
    missing: usize,
    violations: Vec<String>,
}

impl Report {
    fn add(&mut self, trial: &Trial, outcome: &Outcome) {
        self.trials += 1;
        self.died += usize::from(outcome.died);
        self.between_intent_and_outcome += usize::from(outcome.died && outcome.between);
        self.done_but_unrecorded += usize::from(outcome.died && outcome.done_but_unrecorded);
        self.acknowledged += outcome.acknowledged.len();
        self.missing += outcome.missing;
        self.missing_within = self.missing_within.max(outcome.missing_within());
        if !outcome.violations.is_empty() {
            self.violations.push(format!("{trial:?}: {}", outcome.violations.join("; ")));
        }
    }
}

impl Outcome {
    /// The time from the acknowledgement of the first missing one to that of the last.
    fn missing_within(&self) -> Duration {
        let missing = self.acknowledged.iter().rev().take(self.missing);
        let (first, last) = (missing.clone().min(), missing.max());
        last.zip(first).map_or(Duration::ZERO, |(last, first)| last.saturating_sub(*first))
    }
}

/// Counts the operations of the disk in one whole run without a fault.
///
/// # Errors
/// When it fails without a fault.
pub fn operations(each: Each, lie: bool, template: &Template) -> anyhow::Result<u64> {
    let scratch = template::temporary()?;
    let trial = Trial { each, fault: Fault::None, lie };
    let outcome = run_one(&trial, template, &scratch.path().join("0"), ports()?)?;
    if !outcome.violations.is_empty() || outcome.missing > 0 {
        bail!("a run without any fault: {:?}, {} records missing", outcome.violations, outcome.missing);
    }
    Ok(outcome.operations)
}

/// Runs trials, several at a time.
///
/// # Errors
/// When a trial cannot be run.
pub fn run(trials: &[Trial], template: &Template) -> anyhow::Result<Report> {
    let next = AtomicUsize::new(0);
    let report = Mutex::new(Report::default());
    let scratch = template::temporary()?;
    let worker = || -> anyhow::Result<()> {
        let ports = ports()?;
        loop {
            let number = next.fetch_add(1, Ordering::SeqCst);
            let Some(trial) = trials.get(number) else { return Ok(()) };
            let directory = scratch.path().join(number.to_string());
            let mut outcome = run_one(trial, template, &directory, ports)
                .with_context(|| format!("trial {number}: {trial:?}"))?;
            if !outcome.violations.is_empty() && !trial.lie {
                outcome.violations.push(format!("files in {}", keep(&directory, number)?.display()));
            }
            fs::remove_dir_all(&directory)?;
            report.lock().unwrap_or_else(PoisonError::into_inner).add(trial, &outcome);
        }
    };
    thread::scope(|scope| {
        let workers: Vec<_> = (0..WORKERS).map(|_| scope.spawn(worker)).collect();
        let ended = workers.into_iter().map(|worker| match worker.join() {
            Ok(result) => result,
            Err(_) => bail!("a worker panicked"),
        });
        ended.collect::<anyhow::Result<Vec<()>>>()
    })?;
    Ok(report.into_inner().unwrap_or_else(PoisonError::into_inner))
}

fn run_one(trial: &Trial, template: &Template, directory: &Path, ports: Ports) -> anyhow::Result<Outcome> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(trial.run(template, directory, ports))
}

fn ports() -> anyhow::Result<Ports> {
    Ok(Ports { data: free_port()?, enrolment: free_port()?, admin: free_port()?, ops: free_port()? })
}

impl Trial {
    async fn run(&self, template: &Template, directory: &Path, ports: Ports) -> anyhow::Result<Outcome> {
        let site = Site::new(template, directory, ports)?;
        let mut outcome = Outcome::default();
        let mut shim = Shim::new(&site.disk, &directory.join("control"), self.fault)?;
        if self.lie {
            shim = shim.lying_about("/audit/data-");
        }
        let mut child = shim.preload(self.agent(&site)?).start()?;
        let driven = tokio::select! {
            driven = unwrap_until_rotated(template, ports, &mut outcome.acknowledged) => driven,
            // It died before it listened.
            ended = ended(&mut child) => ended,
        };
        if driven.is_ok() {
            // It may die at any moment, this one included.
            drop(child.signal(Signal::TERM));
        }
        let status = exit(&mut child).await?;
        outcome.died = shim.fired()?.is_some();
        outcome.operations = shim.operations()?;
        if !outcome.died && (driven.is_err() || !status.success()) {
            outcome.violations.push(format!("it lived, and {driven:?}, {status}"));
        }
        let at_death = AuditView::read(&site.config.audit)?;
        if let Err(error) = self.again(&site).await {
            outcome.violations.push(format!("after the restart: {error:#}"));
        }
        judge_changes(&site, &at_death, &mut outcome).await?;
        self.judge_calls(&site.config.audit, &mut outcome)?;
        Ok(outcome)
    }

    /// The same agent on a sound disk: it starts, finishes the rotation, and stops.
    async fn again(&self, site: &Site<'_>) -> anyhow::Result<()> {
        let mut child = self.agent(site)?.start()?;
        let finished = Operation::Rotation.finish(site, Left::default(), &mut Acknowledged::default()).await;
        finished.with_context(|| child.stderr().unwrap_or_default())?;
        child.signal(Signal::TERM)?;
        let status = exit(&mut child).await?;
        if !status.success() {
            bail!("it stopped with {status}");
        }
        Ok(())
    }

    fn agent(&self, site: &Site<'_>) -> anyhow::Result<Spec> {
        let spec = site.agent()?;
        let each = self.each.word();
        Ok(spec.env("FLEET_KMS_AGENT__AUDIT__DATA", "each").env("FLEET_KMS_AGENT__AUDIT__EACH", each))
    }

    /// One node unwraps, one call at a time: the first records are the first calls', and those missing are the last.
    fn judge_calls(&self, audit: &Path, outcome: &mut Outcome) -> anyhow::Result<()> {
        let recorded = recorded_unwraps(audit)?;
        outcome.missing = outcome.acknowledged.len().saturating_sub(recorded);
        if outcome.missing == 0 {
            return Ok(());
        }
        let power_cut = matches!(self.fault, Fault::PowerCut { .. });
        let within = outcome.missing_within();
        if self.each == Each::Durable || !power_cut || within > LOST_WITHIN {
            outcome.violations.push(format!(
                "{} of {} acknowledged unwraps have no record, acknowledged within {within:?}",
                outcome.missing,
                outcome.acknowledged.len()
            ));
        }
        Ok(())
    }
}

/// Waits for the program to end. The runtime goes on meanwhile: a connection of this side that does not answer the
/// program's goodbye would hold it for as long as it waits for one.
async fn exit(child: &mut Child) -> anyhow::Result<ExitStatus> {
    let began = monotonic();
    while child.is_running()? && monotonic().saturating_duration_since(began) < END_LIMIT {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    child.wait_exit(Duration::ZERO)
}

/// Waits for the program to end, and says so.
async fn ended(child: &mut Child) -> anyhow::Result<()> {
    while child.is_running()? {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    bail!("it has ended")
}

/// Unwraps one DEK after the other until the due rotation was seen, and some more.
async fn unwrap_until_rotated(
    template: &Template,
    ports: Ports,
    acknowledged: &mut Vec<Duration>,
) -> anyhow::Result<()> {
    let mut node = Node::connect(ports.data, &template.node).await?;
    let one = template.wrapped.get(..1).context("a wrapped DEK")?;
    let began = monotonic();
    let mut left = MOST;
    let mut rotated = false;
    while left > 0 {
        let bad = node.unreadable(one).await?;
        if !bad.is_empty() {
            bail!("{bad:?}");
        }
        acknowledged.push(monotonic().saturating_duration_since(began));
        if !rotated && node.version().await? > 1 {
            (rotated, left) = (true, AFTERWARDS);
        }
        left -= 1;
    }
    if rotated { Ok(()) } else { bail!("the rotation never came") }
}

async fn judge_changes(site: &Site<'_>, at_death: &AuditView, outcome: &mut Outcome) -> anyhow::Result<()> {
    let config = &site.config;
    let view = AuditView::read(&config.audit)?;
    let open = at_death.open();
    outcome.between = !open.is_empty();
    outcome.done_but_unrecorded = open.iter().any(|change| view.is_done(change));
    outcome.violations.extend(view.violations(&config.audit)?);
    let store = StoreView::read(&config.store, &config.root).await?;
    outcome.violations.extend(store.violations(&site.template.before));
    outcome.violations.extend(Operation::Rotation.violations(site, &store, &view).await?);
    Ok(())
}

/// How many unwraps the data chain has records of.
fn recorded_unwraps(audit: &Path) -> anyhow::Result<usize> {
    let mut files: Vec<PathBuf> =
        fs::read_dir(audit)?.map(|entry| Ok(entry?.path())).collect::<anyhow::Result<_>>()?;
    // What was set aside of a torn end is no record.
    let is_data = |name: &str| name.starts_with("data-0") && name.ends_with(".jsonl");
    files.retain(|file| file.file_name().is_some_and(|name| is_data(&name.to_string_lossy())));
    files.sort();
    let mut count = 0;
    for file in files {
        for line in fs::read_to_string(file)?.lines() {
            let line: Value = serde_json::from_str(line)?;
            let is = |field: &str, value: &str| line.get(field).and_then(Value::as_str) == Some(value);
            count += usize::from(is("kind", "call") && is("operation", "unwrap") && is("outcome", "ok"));
        }
    }
    Ok(count)
}
