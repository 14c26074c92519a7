//! One trial: an agent on the shim until it dies, then an agent on a sound disk, then the evidence.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, bail};
use rustix::process::Signal;

use super::audit::AuditView;
use super::evidence::StoreView;
use super::node::Node;
use super::operation::{Acknowledged, Left, Operation, Victim};
use super::shim::{Fault, Fired, Shim};
use super::site::{CommandsDisk, Site};
use super::template::Template;
use crate::child::{Child, Spec};
use crate::fleet::Ports;
use crate::http;

/// How long an agent may take to end once it has to.
const END_LIMIT: Duration = Duration::from_secs(20);
/// How long a driver waits for an agent whose disk refuses things.
const PATIENCE_WITH_ERRORS: Duration = Duration::from_millis(600);
/// How long a driver waits for any other agent.
const PATIENCE: Duration = Duration::from_secs(30);
const POLL: Duration = Duration::from_millis(1);

/// What to do in one trial.
#[derive(Clone, Debug)]
pub struct Plan {
    /// The change that is interrupted.
    pub operation: Operation,
    /// How.
    pub fault: Fault,
    /// Syncs of paths with this text do nothing: a disk that lies, to see the trials turn red.
    pub lie: Option<String>,
    /// Another program than `kms-agent run`, by configuration and log directory, to see the trials turn red.
    pub instead: Option<fn(&Path, &Path) -> anyhow::Result<Spec>>,
}

/// What came of it.
#[derive(Debug, Default)]
pub struct Outcome {
    /// Where the program died; `None` if it came to its end.
    pub fired: Option<Fired>,
    /// The disk's operations in the whole run.
    pub operations: u64,
    /// An intent was without outcome when it died.
    pub between_intent_and_outcome: bool,
    /// That intent's transaction turned out to be durable.
    pub done_but_unrecorded: bool,
    /// What did not hold; empty if all is well.
    pub violations: Vec<String>,
}

impl Plan {
    /// A trial of the agent as it is shipped.
    pub fn new(operation: Operation, fault: Fault) -> Self {
        Self { operation, fault, lie: None, instead: None }
    }

    /// Runs the trial in a directory of its own, which must not exist.
    ///
    /// # Errors
    /// When the trial itself cannot be run; whatever the agent does wrong is in the outcome.
    pub async fn run(&self, template: &Template, directory: &Path, ports: Ports) -> anyhow::Result<Outcome> {
        let site = Site::new(template, directory, ports)?;
        Trial { plan: self, site: &site }.run().await
    }
}

struct Trial<'a> {
    plan: &'a Plan,
    site: &'a Site<'a>,
}

impl Trial<'_> {
    async fn run(&self) -> anyhow::Result<Outcome> {
        let mut outcome = Outcome::default();
        let mut acknowledged = Acknowledged::default();
        let mut shim = Shim::new(&self.site.disk, &self.site.logs.join("control"), self.plan.fault)?;
        if let Some(text) = &self.plan.lie {
            shim = shim.lying_about(text);
        }
        let interrupted = match self.plan.operation.victim() {
            Victim::Agent => self.agent_interrupted(&shim, &mut acknowledged).await,
            Victim::Command => self.command_interrupted(&shim, &mut acknowledged).await,
        };
        if let Err(error) = interrupted {
            outcome.violations.push(format!("while it was interrupted: {error:#}"));
        }
        outcome.fired = shim.fired()?;
        outcome.operations = shim.operations()?;
        let at_death = AuditView::read(&self.site.config.audit)?;
        if let Err(error) = self.again(&mut acknowledged, &mut outcome).await {
            outcome.violations.push(format!("after the restart: {error:#}"));
        }
        if let Err(error) = self.judge(&at_death, &mut outcome).await {
            outcome.violations.push(format!("the evidence cannot be read: {error:#}"));
        }
        outcome.violations.extend(acknowledged.violations());
        outcome.violations.append(&mut acknowledged.violations);
        Ok(outcome)
    }

    /// Runs the agent on the shim until it dies or the change is done and it was told to stop.
    async fn agent_interrupted(&self, shim: &Shim, acknowledged: &mut Acknowledged) -> anyhow::Result<()> {
        let spec = match self.plan.instead {
            Some(instead) => instead(&self.site.config_file, self.site.logs)?,
            None => self.site.agent()?,
        };
        let mut child = shim.preload(spec).start()?;
        if self.plan.instead.is_none() {
            self.drive(&mut child, acknowledged).await?;
        }
        if !ended_within(&mut child, END_LIMIT).await? {
            bail!("it does not end");
        }
        let status = child.wait_exit(END_LIMIT)?;
        // A command outlives the agent: it may go on with what it was given.
        if self.site.end_of_command().await? == Some(true) {
            acknowledged.command = true;
        }
        let may_give_up = self.plan.fault.has_errors() || shim.fired()?.is_some();
        if !status.success() && !may_give_up {
            bail!("it ended with {status}: {}", child.stderr()?);
        }
        Ok(())
    }

    async fn drive(&self, child: &mut Child, acknowledged: &mut Acknowledged) -> anyhow::Result<()> {
        let has_errors = self.plan.fault.has_errors();
        let patience = if has_errors { PATIENCE_WITH_ERRORS } else { PATIENCE };
        // Calls that an agent never answers because it died end at once: the kernel resets their connections.
        let disk = self.plan.fault.power_cut().map_or(CommandsDisk::Sound, CommandsDisk::CutAtExit);
        let drive = self.plan.operation.drive(self.site, disk, acknowledged);
        let driven = tokio::select! {
            driven = tokio::time::timeout(patience, drive) => driven,
            ended = ended_within(child, patience) => { ended?; Ok(Ok(())) }
        };
        let is_done = matches!(driven, Ok(Ok(())));
        if ended_within(child, if is_done { POLL } else { Duration::from_millis(200) }).await? {
            return Ok(());
        }
        match driven {
            Ok(Ok(())) => {}
            _ if has_errors => {}
            Ok(Err(error)) => return Err(error.context("it lives and yet did not do it")),
            Err(_) => bail!("it lives and yet did not do it in {patience:?}"),
        }
        child.signal(Signal::TERM)
    }

    /// Runs a command on the shim until it ends or dies, and with it the agent, if it is the power that goes.
    async fn command_interrupted(&self, shim: &Shim, acknowledged: &mut Acknowledged) -> anyhow::Result<()> {
        let agent = self.site.agent()?.start()?;
        let done = self.plan.operation.drive(self.site, CommandsDisk::Shim(shim), acknowledged).await;
        let fired = shim.fired()?.is_some();
        if fired && self.plan.fault.power_cut().is_some() {
            agent.kill9()?;
        } else {
            stop(agent).await.context("the agent of the command")?;
        }
        match done {
            Err(error) if !fired && !self.plan.fault.has_errors() => Err(error),
            _ => Ok(()),
        }
    }

    /// Starts the shipped agent on a sound disk: all that was acknowledged holds, and it can go on.
    async fn again(&self, acknowledged: &mut Acknowledged, outcome: &mut Outcome) -> anyhow::Result<()> {
        let left = self.plan.operation.look(self.site, acknowledged).await?;
        self.site.forget_agent();
        let child = self.site.agent()?.start()?;
        let result = self.hold_to_account(left, acknowledged, outcome).await;
        if let Err(error) = result {
            // An agent that cannot start has said why.
            let log = child.stderr()?;
            let tail: Vec<&str> = log.lines().rev().take(5).collect();
            return Err(error.context(tail.into_iter().rev().collect::<Vec<_>>().join(" | ")));
        }
        stop(child).await
    }

    async fn hold_to_account(
        &self,
        left: Left,
        acknowledged: &mut Acknowledged,
        outcome: &mut Outcome,
    ) -> anyhow::Result<()> {
        let (site, template) = (self.site, self.site.template);
        let mut node = Node::connect(site.ports.data, &template.node).await?;
        outcome.violations.extend(node.unreadable(&template.wrapped).await?);
        outcome.violations.extend(node.unreadable(&acknowledged.wrapped).await?);
        let version = node.version().await?;
        if version < acknowledged.version {
            outcome
                .violations
                .push(format!("version {} was acknowledged, now {version}", acknowledged.version));
        }
        let metrics = http::get(site.ports.ops, "/metrics")?.ok()?;
        for (name, what) in [
            ("fleet_kms_agent_damaged_keys", "keys do not open"),
            ("fleet_kms_agent_store_unconfirmed", "it is recovered-unconfirmed"),
        ] {
            let line = metrics.lines().find(|line| line.starts_with(name));
            if line.and_then(|line| line.split(' ').nth(1)) != Some("0") {
                // It will not finish anything, and to wait for it shows nothing more.
                bail!("{what}: {line:?}");
            }
        }
        self.plan.operation.finish(site, left, acknowledged).await?;
        outcome.violations.extend(node.unreadable(&acknowledged.wrapped).await?);
        Ok(())
    }

    async fn judge(&self, at_death: &AuditView, outcome: &mut Outcome) -> anyhow::Result<()> {
        let config = &self.site.config;
        let audit = AuditView::read(&config.audit)?;
        let open = at_death.open();
        outcome.between_intent_and_outcome = !open.is_empty();
        outcome.done_but_unrecorded = open.iter().any(|change| audit.is_done(change));
        outcome.violations.extend(audit.violations(&config.audit)?);
        let store = StoreView::read(&config.store, &config.root).await?;
        outcome.violations.extend(store.violations(&self.site.template.before));
        outcome.violations.extend(self.plan.operation.violations(self.site, &store, &audit).await?);
        Ok(())
    }
}

/// Stops an agent as an operator would.
pub(super) async fn stop(mut child: Child) -> anyhow::Result<()> {
    child.signal(Signal::TERM)?;
    if !ended_within(&mut child, END_LIMIT).await? {
        bail!("it does not stop");
    }
    let status = child.wait_exit(END_LIMIT)?;
    if !status.success() {
        bail!("it stopped with {status}");
    }
    Ok(())
}

/// Waits for a program to end; says whether it did.
async fn ended_within(child: &mut Child, limit: Duration) -> anyhow::Result<bool> {
    let wait = async {
        while child.is_running()? {
            tokio::time::sleep(POLL).await;
        }
        anyhow::Ok(())
    };
    match tokio::time::timeout(limit, wait).await {
        Ok(ended) => ended.map(|()| true),
        Err(_) => Ok(false),
    }
}

/// Keeps the files of a trial for whoever looks into it.
///
/// # Errors
/// When they cannot be moved.
pub fn keep(directory: &Path, number: usize) -> anyhow::Result<PathBuf> {
    let test = std::env::current_exe()?;
    let target =
        test.parent().and_then(Path::parent).context("a test program lives in target/<profile>/deps")?;
    let to = target.join("crash-trials").join(format!("{}-{number}", std::process::id()));
    fs::create_dir_all(&to)?;
    crate::child::run(std::process::Command::new("cp").arg("-a").arg(directory.join(".")).arg(&to))?;
    Ok(to)
}
