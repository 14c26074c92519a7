//! The program `kms-agent`.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, Subcommand};
use fleet_kms_agent::config::{self, Config, RawConfig};
use fleet_kms_agent::errors::chain;
use fleet_kms_agent::host::{self, HostCommand, HostError};
use fleet_kms_agent::{check_store, init, serve};
use fleet_kms_identity::Name;
use fleet_kms_process::{exit, runtime};

/// Owns the KEKs of many clusters and rotates them.
#[derive(Debug, Parser)]
#[command(name = "kms-agent", version, arg_required_else_help = true)]
struct Cli {
    #[command(flatten)]
    config: ConfigFile,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Make the root key file, the store, the fleet CA and the first admin.
    Init {
        /// The first admin's name.
        #[arg(long, default_value = "first")]
        admin: Name,
        /// The directory that gets the admin's key, certificate and kmsctl context.
        #[arg(long, default_value = "/etc/fleet-kms/admin")]
        admin_directory: PathBuf,
        /// Make no second root slot with a recovery passphrase.
        #[arg(long)]
        single_slot: bool,
    },
    /// Serve.
    Run,
    /// Read the configuration, say what is wrong with it, do nothing else.
    CheckConfig,
    /// Open the store and compare every row with its head.
    CheckStore,
    #[command(flatten)]
    Host(HostCommand),
}

#[derive(Debug, clap::Args)]
struct ConfigFile {
    /// The configuration file.
    #[arg(id = "config_file", long = "config", global = true, default_value = "/etc/fleet-kms/agent.toml")]
    file: PathBuf,
}

impl ConfigFile {
    fn load(&self) -> Result<Config, Failure> {
        let config = fleet_kms_process::config::load_as::<RawConfig, Config>(&self.file, config::PREFIX);
        config.map_err(|error| Failure { code: exit::CONFIG, text: chain(&error) })
    }
}

/// How a command failed: exit status and what the operator reads.
struct Failure {
    code: u8,
    text: String,
}

fn main() -> ExitCode {
    match run(Cli::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            eprintln!("kms-agent: {}", failure.text);
            ExitCode::from(failure.code)
        }
    }
}

fn run(cli: Cli) -> Result<(), Failure> {
    let config = cli.config;
    match cli.command {
        Command::Init { admin, admin_directory, single_slot } => {
            let config = config.load()?;
            let options = init::Options { admin, admin_directory, single_slot };
            let done = block_on(init::run(&config, &options, serve::clock(), generator))?;
            let done = done.map_err(|error| Failure { code: error.exit_code(), text: chain(&error) })?;
            println!("{done}");
            Ok(())
        }
        Command::Run => serve::run(config.load()?, generator)
            .map_err(|error| Failure { code: error.exit_code(), text: chain(&error) }),
        Command::CheckConfig => {
            let config = config.load()?;
            println!("the configuration is good");
            if let Some(text) = block_on(check_store::look(&config))? {
                println!("{text}");
            }
            Ok(())
        }
        Command::Host(command) => {
            let config = config.load()?;
            let text = block_on(host::run(&config, command, generator))?
                .map_err(|HostError { code, text }| Failure { code, text })?;
            println!("{text}");
            Ok(())
        }
        Command::CheckStore => {
            let config = config.load()?;
            let report = block_on(check_store::run(&config, generator))?
                .map_err(|error| Failure { code: error.exit_code(), text: chain(&error) })?;
            println!("{report}");
            Ok(())
        }
    }
}

fn block_on<T>(future: impl Future<Output = T>) -> Result<T, Failure> {
    let runtime = runtime::multi_thread()
        .map_err(|error| Failure { code: exit::FAILURE, text: format!("cannot start: {error}") })?;
    Ok(runtime.block_on(future))
}

/// The one generator of this program: the kernel's.
fn generator() -> Box<dyn rand_core::CryptoRng + Send> {
    Box::new(rand_core::UnwrapErr(getrandom::SysRng))
}
