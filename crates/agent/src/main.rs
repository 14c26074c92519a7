//! The program `kms-agent`.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, Subcommand};
use fleet_kms_agent::config::{self, Config, RawConfig};
use fleet_kms_agent::errors::chain;
use fleet_kms_agent::{check_store, init, serve};
use fleet_kms_identity::Name;
use fleet_kms_process::{exit, runtime};

/// Owns the KEKs of many clusters and rotates them.
#[derive(Debug, Parser)]
#[command(name = "kms-agent", version, arg_required_else_help = true)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Make the root key file, the store, the fleet CA and the first admin.
    Init {
        #[command(flatten)]
        config: ConfigFile,
        /// The first admin's name.
        #[arg(long, default_value = "first")]
        admin: Name,
        /// The directory that gets the admin's key, certificate and kmsctl context.
        #[arg(long, default_value = "/etc/fleet-kms/admin")]
        admin_directory: PathBuf,
    },
    /// Serve.
    Run {
        #[command(flatten)]
        config: ConfigFile,
    },
    /// Read the configuration, say what is wrong with it, do nothing else.
    CheckConfig {
        #[command(flatten)]
        config: ConfigFile,
    },
    /// Open the store and compare every row with its head.
    CheckStore {
        #[command(flatten)]
        config: ConfigFile,
    },
}

#[derive(Debug, clap::Args)]
struct ConfigFile {
    /// The configuration file.
    #[arg(long = "config", default_value = "/etc/fleet-kms/agent.toml")]
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
    match run(Cli::parse().command) {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            eprintln!("kms-agent: {}", failure.text);
            ExitCode::from(failure.code)
        }
    }
}

fn run(command: Command) -> Result<(), Failure> {
    match command {
        Command::Init { config, admin, admin_directory } => {
            let config = config.load()?;
            let options = init::Options { admin, admin_directory };
            let done = block_on(init::run(&config, &options, serve::clock(), generator))?;
            let done = done.map_err(|error| Failure { code: error.exit_code(), text: chain(&error) })?;
            println!("{done}");
            Ok(())
        }
        Command::Run { config } => serve::run(config.load()?, generator)
            .map_err(|error| Failure { code: error.exit_code(), text: chain(&error) }),
        Command::CheckConfig { config } => {
            config.load()?;
            println!("the configuration is good");
            Ok(())
        }
        Command::CheckStore { config } => {
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
