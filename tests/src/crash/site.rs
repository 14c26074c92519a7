//! Where a trial happens: one copy of a template, its agent's ports, and the commands on its host.

use std::cell::{Cell, RefCell};
use std::fs::{self, File};
use std::io::{Read as _, Seek as _, SeekFrom};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, bail, ensure};
use fleet_kms_agent::config::Config;
use fleet_kms_agent::local;

use super::shim::{Fault, Shim};
use super::template::{self, Template};
use crate::child::{Child, Spec};
use crate::fleet::Ports;
use crate::programs::Program;

/// Between two looks.
const POLL: Duration = Duration::from_millis(1);
/// How long an agent may take to do what it will do without being asked again.
const BY_ITSELF: Duration = Duration::from_secs(10);
/// How long a command may take once the agent has answered it, or is gone.
const COMMAND_LIMIT: Duration = Duration::from_secs(20);

/// What a command writes to.
#[derive(Clone, Copy)]
pub enum CommandsDisk<'a> {
    /// A disk that works.
    Sound,
    /// A disk that loses what the command has not synced when the command has ended, because the power goes with
    /// the agent; with the seed for [`Fault::PowerCut`].
    CutAtExit(u64),
    /// The command is the one that is interrupted.
    Shim(&'a Shim),
}

/// One copy of a template.
pub struct Site<'a> {
    /// What it is a copy of.
    pub template: &'a Template,
    /// Where its agent listens.
    pub ports: Ports,
    /// The agent's configuration.
    pub config: Config,
    /// Its file.
    pub config_file: PathBuf,
    /// Everything that the disk holds.
    pub disk: PathBuf,
    /// Where programs log.
    pub logs: &'a Path,
    /// A command under way. It stays when nobody waits for it any more: it outlives a dead agent.
    command: RefCell<Option<Child>>,
    log_from: Cell<u64>,
}

impl<'a> Site<'a> {
    /// Lays out a copy of a template below `directory`.
    ///
    /// # Errors
    /// When a file cannot be copied.
    pub fn new(template: &'a Template, directory: &'a Path, ports: Ports) -> anyhow::Result<Self> {
        let disk = directory.join("agent");
        let config_file = template.copy_to(&disk, ports)?;
        let config = template::load(&config_file)?;
        let (command, log_from) = (RefCell::new(None), Cell::new(0));
        Ok(Self { template, ports, config, config_file, disk, logs: directory, command, log_from })
    }

    /// The agent as it is shipped.
    ///
    /// # Errors
    /// When it is not built.
    pub fn agent(&self) -> anyhow::Result<Spec> {
        let program = Program::Agent.path()?;
        Ok(Spec::new("kms-agent", &program, self.logs).args(["run", "--config"]).arg(&self.config_file))
    }

    /// Forgets what the last agent of this site left lying about for commands, and what it logged.
    pub fn forget_agent(&self) {
        // Nobody listens on it. Left alone, a command could not tell that the next agent is not there yet.
        let _ = fs::remove_file(local::path_of(&self.config.store));
        self.log_from.set(self.log().map_or(0, |log| log.metadata().map_or(0, |about| about.len())));
    }

    /// Waits until this agent has logged a text.
    ///
    /// # Errors
    /// When it does not.
    pub async fn logged(&self, text: &str) -> anyhow::Result<()> {
        let found = || -> anyhow::Result<bool> {
            let (mut log, mut lines) = (self.log()?, String::new());
            log.seek(SeekFrom::Start(self.log_from.get()))?;
            log.read_to_string(&mut lines)?;
            Ok(lines.contains(text))
        };
        until(BY_ITSELF, text, found).await
    }

    fn log(&self) -> anyhow::Result<File> {
        Ok(File::open(self.logs.join("kms-agent.stderr"))?)
    }

    /// A command on the agent's host, once its agent takes commands.
    ///
    /// # Errors
    /// When the agent never does.
    pub async fn command(&self, args: &[&str]) -> anyhow::Result<Spec> {
        let socket = local::path_of(&self.config.store);
        until(BY_ITSELF, "the local socket", || Ok(socket.exists())).await?;
        let spec = Spec::new("command", &Program::Agent.path()?, self.logs);
        Ok(spec.arg("--config").arg(&self.config_file).args(args))
    }

    /// Runs a command to its end.
    ///
    /// # Errors
    /// When it does not succeed.
    pub async fn run(&self, args: &[&str], disk: CommandsDisk<'_>) -> anyhow::Result<()> {
        let spec = self.command(args).await?;
        let spec = match disk {
            CommandsDisk::Sound => spec,
            CommandsDisk::Shim(shim) => shim.preload(spec),
            CommandsDisk::CutAtExit(seed) => {
                let control = self.logs.join("control-of-command");
                Shim::new(&self.disk, &control, Fault::None)?.cutting_at_exit(seed).preload(spec)
            }
        };
        *self.command.borrow_mut() = Some(spec.start()?);
        until(COMMAND_LIMIT, "the command's end", || self.command_has_ended()).await?;
        ensure!(self.end_of_command().await? == Some(true), "{args:?}: {}", self.said()?);
        Ok(())
    }

    /// Waits for a command that nobody waits for any more; says whether it succeeded.
    ///
    /// # Errors
    /// When it does not end.
    pub async fn end_of_command(&self) -> anyhow::Result<Option<bool>> {
        until(COMMAND_LIMIT, "the command's end", || self.command_has_ended()).await?;
        let Some(mut command) = self.command.borrow_mut().take() else { return Ok(None) };
        Ok(Some(command.wait_exit(COMMAND_LIMIT)?.success()))
    }

    fn command_has_ended(&self) -> anyhow::Result<bool> {
        self.command.borrow_mut().as_mut().map_or(Ok(true), |command| Ok(!command.is_running()?))
    }

    fn said(&self) -> anyhow::Result<String> {
        fs::read_to_string(self.logs.join("command.stderr")).context("what the command said")
    }
}

async fn until(
    limit: Duration,
    what: &str,
    mut done: impl FnMut() -> anyhow::Result<bool>,
) -> anyhow::Result<()> {
    let wait = async {
        while !done()? {
            tokio::time::sleep(POLL).await;
        }
        anyhow::Ok(())
    };
    match tokio::time::timeout(limit, wait).await {
        Ok(done) => done,
        Err(_) => bail!("{what}: not in {limit:?}"),
    }
}
