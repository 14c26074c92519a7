//! The program `kms-sidecar`.

use std::io::Read;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, Subcommand};
use fleet_kms_identity::Directory;
use fleet_kms_process::{exit, runtime};
use fleet_kms_sidecar::believed_time::BelievedTime;
use fleet_kms_sidecar::config::{Config, ENVIRONMENT, RawConfig};
use fleet_kms_sidecar::doctor;
use fleet_kms_sidecar::enrolment::TOKEN_USED_UP;
use fleet_kms_sidecar::errors::chain;
use fleet_kms_sidecar::run;
use fleet_kms_sidecar::upkeep::{EnrolError, Upkeep};
use rand_core::Rng;
use zeroize::Zeroizing;

/// The most bytes of a token's file; a token has about a hundred.
const MAX_TOKEN_FILE: u64 = 4_096;

/// Stands beside kube-apiserver and answers its KMS calls through an agent.
#[derive(Debug, Parser)]
#[command(name = "kms-sidecar", version, arg_required_else_help = true)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Serve.
    Run {
        #[command(flatten)]
        config: ConfigFile,
        /// Take the socket over from the process that serves it, without a gap.
        #[arg(long)]
        replace: bool,
    },
    /// Exchange a join token for this node's certificate. The token is read from a file or from standard input.
    Enrol {
        #[command(flatten)]
        config: ConfigFile,
        /// The file that holds the token; standard input if it is left out.
        #[arg(long)]
        token_file: Option<PathBuf>,
    },
    /// Say what is wrong on this node, and what to do about it. Changes nothing. Ends with 1 if anything fails.
    Doctor {
        #[command(flatten)]
        config: ConfigFile,
        /// How the report is printed.
        #[arg(short, long, value_enum, default_value_t = Output::Text)]
        output: Output,
        /// kube-apiserver's static pod [default: where kubeadm puts it; else the running process].
        #[arg(long)]
        apiserver_manifest: Option<PathBuf>,
    },
    /// Read the configuration, say what is wrong with it, do nothing else.
    CheckConfig {
        #[command(flatten)]
        config: ConfigFile,
    },
    /// Print the version.
    Version,
}

#[derive(Debug, Clone, Copy, clap::ValueEnum)]
enum Output {
    /// For people.
    Text,
    /// For programs.
    Json,
}

#[derive(Debug, clap::Args)]
struct ConfigFile {
    /// The configuration file.
    #[arg(long = "config", default_value = "/etc/fleet-kms/sidecar.toml")]
    file: PathBuf,
}

impl ConfigFile {
    fn load(&self) -> Result<Config, Failure> {
        let config = fleet_kms_process::config::load_as::<RawConfig, Config>(&self.file, ENVIRONMENT);
        config.map_err(|error| Failure { code: exit::CONFIG, text: chain(&error) })
    }
}

/// How a command failed: exit status and what the operator reads.
struct Failure {
    code: u8,
    text: String,
}

impl Failure {
    fn new(error: &dyn std::error::Error) -> Self {
        Self { code: exit::FAILURE, text: chain(error) }
    }
}

fn main() -> ExitCode {
    match command(Cli::parse().command) {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            eprintln!("kms-sidecar: {}", failure.text);
            ExitCode::from(failure.code)
        }
    }
}

fn command(command: Command) -> Result<(), Failure> {
    match command {
        Command::Run { config, replace } => run::run(config.load()?, replace, random)
            .map_err(|error| Failure { code: error.exit_code(), text: chain(&error) }),
        Command::Enrol { config, token_file } => enrol(config.load()?, token_file),
        Command::Doctor { config, output, apiserver_manifest } => {
            doctor(&config.load()?, output, apiserver_manifest)
        }
        Command::CheckConfig { config } => {
            config.load()?;
            println!("the configuration is good");
            Ok(())
        }
        Command::Version => {
            println!("kms-sidecar {}", env!("CARGO_PKG_VERSION"));
            Ok(())
        }
    }
}

fn doctor(config: &Config, output: Output, manifest: Option<PathBuf>) -> Result<(), Failure> {
    let runtime = runtime::current_thread(2).map_err(|error| Failure::new(&error))?;
    let report = runtime.block_on(doctor::examine(config, manifest, random));
    // A name server that does not answer must not keep this command.
    runtime.shutdown_background();
    match output {
        Output::Text => println!("{report}"),
        Output::Json => println!("{}", report.to_json()),
    }
    match report.count(doctor::Status::Fail) {
        0 => Ok(()),
        failed => Err(Failure { code: exit::FAILURE, text: format!("{failed} checks failed") }),
    }
}

fn enrol(config: Config, token_file: Option<PathBuf>) -> Result<(), Failure> {
    let token = token(token_file).map_err(|error| Failure {
        code: exit::FAILURE,
        text: format!("cannot read the join token: {error}"),
    })?;
    let directory = Directory::open(&config.identity_directory).map_err(|error| Failure::new(&error))?;
    let upkeep = Upkeep {
        directory: directory.clone(),
        agents: config.agents,
        node: config.node,
        time: BelievedTime::default(),
        random,
    };
    let runtime = runtime::current_thread(1).map_err(|error| Failure::new(&error))?;
    runtime.block_on(upkeep.enrol(&token)).map_err(|error| match error {
        EnrolError::Token(_) => Failure { code: exit::DATA, text: chain(&error) },
        EnrolError::Call(ref call) if call.reason() == Some(TOKEN_USED_UP) => {
            Failure { code: exit::FAILURE, text: used_up(&error, &directory) }
        }
        EnrolError::Call(_) | EnrolError::Identity(_) => Failure::new(&error),
    })?;
    let stored = directory.load().map_err(|error| Failure::new(&error))?;
    if let Some(stored) = stored {
        println!("enrolled as {}", stored.certificate.id());
    }
    Ok(())
}

/// Who runs the command again after it was cut off at its very end has what it was for.
fn used_up(error: &EnrolError, directory: &Directory) -> String {
    let text = chain(error);
    match directory.load() {
        Ok(Some(stored)) => format!(
            "{text}; this node has an identity already, {}: `kms-sidecar doctor` says whether it works",
            stored.certificate.id()
        ),
        _ => text,
    }
}

/// Never an argument: those can be read by every user of the machine.
fn token(file: Option<PathBuf>) -> std::io::Result<Zeroizing<String>> {
    let mut token = Zeroizing::new(String::new());
    match file {
        Some(file) => std::fs::File::open(file)?.take(MAX_TOKEN_FILE).read_to_string(&mut token)?,
        None => std::io::stdin().take(MAX_TOKEN_FILE).read_to_string(&mut token)?,
    };
    Ok(token)
}

/// The one generator of this program: the kernel's.
fn random() -> [u8; 32] {
    let mut bytes = [0; 32];
    rand_core::UnwrapErr(getrandom::SysRng).fill_bytes(&mut bytes);
    bytes
}
