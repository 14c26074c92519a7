//! kms-sidecar without what makes it work: the same handlers, links and upkeep on a plain unix socket, where HTTP/2
//! sees the `:authority` that kube-apiserver really sends. It shows that the tests with real clients can fail, and why.
//!
//! It must differ from the real program in nothing else that a call could notice.

use std::fs::File;
use std::io::Read as _;
use std::os::unix::net::UnixListener;
use std::path::PathBuf;

use clap::{Parser, Subcommand};
use fleet_kms_identity::Directory;
use fleet_kms_process::logging::Filter;
use fleet_kms_process::{config, logging, runtime};
use fleet_kms_sidecar::agent_link::LinkContext;
use fleet_kms_sidecar::answer::Answers;
use fleet_kms_sidecar::believed_time::BelievedTime;
use fleet_kms_sidecar::config::{Config, ENVIRONMENT, RawConfig};
use fleet_kms_sidecar::kms::Kms;
use fleet_kms_sidecar::links::Links;
use fleet_kms_sidecar::metrics::Metrics;
use fleet_kms_sidecar::node_status::NodeStatus;
use fleet_kms_sidecar::upkeep::{Moved, Upkeep};
use fleet_kms_transport::{Connections, Drain, ServeLimits, UnixPort, serve};
use prometheus_client::registry::Registry;

#[derive(Parser)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Serve.
    Run {
        /// The real sidecar's configuration file.
        #[arg(long)]
        config: PathBuf,
    },
}

fn main() -> anyhow::Result<()> {
    let Command::Run { config: file } = Cli::parse().command;
    let config: Config = config::load_as::<RawConfig, Config>(&file, ENVIRONMENT)?;
    let _log = logging::init(config.log_format, Filter::default())?;
    runtime::current_thread(1)?.block_on(run(config))
}

async fn run(config: Config) -> anyhow::Result<()> {
    let metrics = Metrics::register(&mut Registry::default());
    let links = Links::new(LinkContext::new(1), config.hold_for, metrics.clone());
    let node_status = NodeStatus::new(links.clone(), metrics.clone());
    let answers = Answers::new(metrics.clone(), 1);
    let upkeep = Upkeep {
        directory: Directory::open(&config.identity_directory)?,
        agents: config.agents,
        node: config.node,
        time: BelievedTime::default(),
        random,
    };
    let moved =
        Moved { links: links.clone(), node_status: node_status.clone(), answers: answers.clone(), metrics };
    tokio::spawn(upkeep.run(moved));
    let port = UnixPort::from_std(UnixListener::bind(&config.socket.path)?, |io| io)?;
    let service = Kms::service(links, node_status, answers);
    serve(port, service, ServeLimits::default(), Connections::new(), Drain::new()).await;
    Ok(())
}

fn random() -> [u8; 32] {
    let mut bytes = [0; 32];
    let read = File::open("/dev/urandom").and_then(|mut file| file.read_exact(&mut bytes));
    read.expect("Linux has /dev/urandom");
    bytes
}
