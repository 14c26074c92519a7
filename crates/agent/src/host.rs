//! Commands on the agent's host: backup, restore, root slots, lock, admins.
//!
//! They reach the running agent over the local socket; where none runs they
//! open the store themselves, whose lock lets only one do so. Files are read
//! and written here, because the agent is confined to its own.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use clap::{Args, Subcommand};
use fleet_kms_identity::Name;
use fleet_kms_process::{clock as clocks, exit};
use prometheus_client::registry::Registry;
use zeroize::Zeroizing;

use crate::agent::Agent;
use crate::config::Config;
use crate::errors::chain;
use crate::ledger::Generator;
use crate::local::protocol::{Reply, Request, Secret};
use crate::local::{self, client};
use crate::restore::{self, Options};
use crate::serve;

pub mod execute;
mod files;
mod secrets;
mod slots;
mod verify;

use files::{replace_durably, write_private};
use secrets::Given;

/// A command on the agent's host.
#[derive(Debug, Subcommand)]
pub enum HostCommand {
    /// Back the store up while the agent serves, and verify the backup.
    #[command(args_conflicts_with_subcommands = true, subcommand_negates_reqs = true)]
    Backup {
        #[command(subcommand)]
        command: Option<BackupCommand>,
        /// The file to write; it is replaced if it exists.
        #[arg(required = true)]
        file: Option<PathBuf>,
    },
    /// Put a backup in the store's place, or confirm a store that was found to be an old copy.
    Restore {
        /// The backup.
        #[arg(required_unless_present = "confirm")]
        file: Option<PathBuf>,
        /// The store that is there is right: leave recovered-unconfirmed.
        #[arg(long, conflicts_with_all = ["file", "without_bans"])]
        confirm: bool,
        /// Audit directories of all agents that used the store: bans are read from them.
        #[arg(long, num_args = 1..)]
        bans_from: Vec<PathBuf>,
        /// Accept that every ban since the backup is lost.
        #[arg(long)]
        without_bans: bool,
        #[command(flatten)]
        given: Given,
    },
    /// Root slots: the ways to open the store.
    Slot {
        #[command(subcommand)]
        command: slots::SlotCommand,
    },
    /// Wipe all keys from the agent's memory and stop serving them; a restart unlocks.
    Lock,
    /// Admins.
    Admin {
        #[command(subcommand)]
        command: AdminCommand,
    },
}

/// `kms-agent backup …`
#[derive(Debug, Subcommand)]
pub enum BackupCommand {
    /// Open every version in a backup, and say which slots open it.
    Verify {
        /// The backup.
        file: PathBuf,
        #[command(flatten)]
        given: Given,
    },
}

/// `kms-agent admin …`
#[derive(Debug, Subcommand)]
pub enum AdminCommand {
    /// Make a key and a certificate for an admin. Always possible on the agent's host, always in the audit.
    Issue(Issue),
}

/// `kms-agent admin issue …`
#[derive(Debug, Args)]
pub struct Issue {
    /// The admin's name.
    name: Name,
    /// A role: operator, key-officer, auditor, enroller. May be given more than once.
    #[arg(long = "role", required = true)]
    roles: Vec<String>,
    /// A cluster that the admin may act on. May be given more than once; all without it.
    #[arg(long = "cluster")]
    clusters: Vec<String>,
    /// The directory that gets key, certificate and kmsctl context.
    #[arg(long, default_value = "/etc/fleet-kms/admin")]
    directory: PathBuf,
}

/// Why a command failed: exit status and what the operator reads.
#[derive(Debug)]
pub struct HostError {
    /// The exit status.
    pub code: u8,
    /// The text.
    pub text: String,
}

impl HostError {
    fn new(code: u8, text: impl Into<String>) -> Self {
        Self { code, text: text.into() }
    }

    fn failed(error: &dyn std::error::Error) -> Self {
        Self::new(exit::FAILURE, chain(error))
    }
}

/// Carries a command out; returns what the operator reads.
///
/// # Errors
///
/// When it was not done.
pub async fn run(config: &Config, command: HostCommand, generator: Generator) -> Result<String, HostError> {
    let host = Host { config, generator };
    match command {
        HostCommand::Backup { command: Some(BackupCommand::Verify { file, given }), .. } => {
            verify::run(config, &file, &given, generator).await
        }
        HostCommand::Backup { file: Some(file), .. } => host.backup(&file).await,
        HostCommand::Backup { .. } => Err(HostError::new(exit::CONFIG, "name the file to write")),
        HostCommand::Restore { confirm: true, bans_from, .. } => host.confirm(&bans_from).await,
        HostCommand::Restore { file, bans_from, without_bans, given, .. } => {
            let root = given.root(config).map_err(|error| HostError::new(exit::CONFIG, error))?;
            let file = file.ok_or_else(|| HostError::new(exit::CONFIG, "name the backup"))?;
            let options = Options { file, bans_from, without_bans, root };
            let done = restore::run(config, &options, serve::clock(), generator).await;
            let owners = restore::settle_owners(config);
            let done = done.map_err(|error| HostError::new(error.exit_code(), chain(&error)))?;
            owners.map_err(|error| HostError::failed(&error))?;
            Ok(done.to_string())
        }
        HostCommand::Slot { command } => slots::run(&host, command).await,
        HostCommand::Lock => match host.ask_running(&Request::Lock, &[])? {
            Some(_) => Ok("locked: no key can be used until the agent is restarted".to_owned()),
            None => Err(HostError::new(exit::FAILURE, "no agent runs here: there is nothing to lock")),
        },
        HostCommand::Admin { command: AdminCommand::Issue(issue) } => host.issue(issue).await,
    }
}

/// What commands share.
struct Host<'a> {
    config: &'a Config,
    generator: Generator,
}

impl Host<'_> {
    /// Asks the running agent; `None` when none runs.
    fn ask_running(&self, request: &Request, secrets: &[Secret]) -> Result<Option<Reply>, HostError> {
        client::ask(&local::path_of(&self.config.store), request, secrets)
            .map_err(|error| HostError::failed(&error))
    }

    /// Asks the running agent, or does it here when none runs.
    async fn ask(&self, request: Request, secrets: Vec<Secret>) -> Result<Reply, HostError> {
        if let Some(reply) = self.ask_running(&request, &secrets)? {
            return Ok(reply);
        }
        let agent = self.open().await?;
        let done = execute::execute(&agent, request, secrets).await;
        agent.slots.finish().await.map_err(|error| HostError::failed(&error))?;
        drop(agent);
        restore::settle_owners(self.config).map_err(|error| HostError::failed(&error))?;
        done.map_err(|error| HostError::new(exit::FAILURE, error))
    }

    async fn open(&self) -> Result<Agent, HostError> {
        let mut registry = Registry::default();
        let agent =
            Agent::open(self.config, &mut registry, serve::clock(), clocks::monotonic, self.generator);
        agent.await.map_err(|error| {
            let text = chain(&error);
            HostError::new(error.exit_code(), text)
        })
    }

    async fn backup(&self, file: &Path) -> Result<String, HostError> {
        let failed = |error: io::Error| HostError::new(exit::FAILURE, format!("{}: {error}", file.display()));
        let file = std::path::absolute(file).map_err(failed)?;
        let running = self.ask_running(&Request::Backup, &[])?;
        // Offline this process does both steps, so that the second finds the first.
        let agent = if running.is_some() { None } else { Some(self.open().await?) };
        let reply = match (running, &agent) {
            (None, Some(agent)) => self.execute(agent, Request::Backup).await?,
            (reply, _) => reply.ok_or_else(odd)?,
        };
        let Reply::Backup { number, file: made, clusters, versions } = reply else { return Err(odd()) };
        replace_durably(&made, &file).map_err(failed)?;
        let stored = Request::BackupStored { number, file: file.clone() };
        match &agent {
            Some(agent) => drop(self.execute(agent, stored).await?),
            None => drop(self.ask_running(&stored, &[])?),
        }
        drop(agent);
        restore::settle_owners(self.config).map_err(failed)?;
        Ok(format!("{}: {versions} versions of {clusters} clusters, each opened", file.display()))
    }

    async fn execute(&self, agent: &Agent, request: Request) -> Result<Reply, HostError> {
        let done = execute::execute(agent, request, Vec::new()).await;
        done.map_err(|error| HostError::new(exit::FAILURE, error))
    }

    async fn confirm(&self, bans_from: &[PathBuf]) -> Result<String, HostError> {
        // All at once: of what several audits say of one identity, the latest counts.
        let directories = restore::audits(self.config, bans_from);
        let bans = crate::bans::read(&directories).map_err(|error| HostError::failed(&error))?;
        let bans = bans.states.iter().map(|(id, banned)| (id.to_string(), *banned)).collect();
        let Reply::Confirmed { rotated, banned } = self.ask(Request::Confirm { bans }, Vec::new()).await?
        else {
            return Err(odd());
        };
        Ok(format!(
            "confirmed: {rotated} clusters have a fresh version, {banned} identities are banned\nMake a backup now: none holds the fresh versions."
        ))
    }

    async fn issue(&self, issue: Issue) -> Result<String, HostError> {
        let Issue { name, roles, clusters, directory } = issue;
        let request = Request::AdminIssue { name: name.to_string(), roles, clusters };
        let Reply::Admin { key, chain, roots } = self.ask(request, Vec::new()).await? else {
            return Err(odd());
        };
        let key = Zeroizing::new(key);
        let context = crate::init::context(self.config, &name);
        let write = || {
            fs::DirBuilder::new().recursive(true).create(&directory)?;
            write_private(&directory.join(format!("{name}.key")), key.as_bytes())?;
            write_private(&directory.join(format!("{name}.crt")), chain.as_bytes())?;
            write_private(&directory.join("roots.crt"), roots.as_bytes())?;
            let path = directory.join("kmsctl.toml");
            // A context of another admin stays: this one is named after the admin.
            let path = if path.exists() { directory.join(format!("{name}.toml")) } else { path };
            write_private(&path, context.as_bytes())?;
            Ok(path)
        };
        let path = write().map_err(|error: io::Error| HostError::failed(&error))?;
        Ok(format!("admin          {name}\nkmsctl context {} (use it with KMSCTL_CONFIG)", path.display()))
    }
}

/// An answer to another question.
fn odd() -> HostError {
    HostError::new(exit::FAILURE, "the agent is of another release; run the command of its release")
}
