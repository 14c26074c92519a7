//! `kms-sidecar run`: bind, give up rights, then serve until told to stop.
//!
//! The order is fixed: capabilities and Landlock hold per thread, so everything
//! that needs rights comes before the first other thread.

use std::io;
use std::net::TcpListener;
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::time::Duration;

use fleet_kms_identity::{Directory, DirectoryError};
use fleet_kms_process::hardening::{self, Capability, Plan, Warning};
use fleet_kms_process::listen::{self, Inherited, ListenError};
use fleet_kms_process::ops::{self, OpsState};
use fleet_kms_process::{exit, logging, runtime, signals};
use fleet_kms_transport::{Connections, Drain, ServeLimits, serve};
use futures_util::future::{BoxFuture, FutureExt};
use prometheus_client::registry::Registry;
use tokio::net::UnixStream;
use tokio::time::timeout;
use tokio_util::task::AbortOnDropHandle;

use crate::agent_link::LinkContext;
use crate::answer::Answers;
use crate::authority::AuthorityRewrite;
use crate::believed_time::BelievedTime;
use crate::config::Config;
use crate::enrolment::Random;
use crate::errors::chain;
use crate::kms::Kms;
use crate::links::Links;
use crate::metrics::{self, Metrics};
use crate::node_status::NodeStatus;
use crate::socket::{Bound, ClaimError, Handover, HandoverError, SocketPath, SocketPort, keep_bound};
use crate::upkeep::{Moved, Upkeep};

/// The name of the socket unit's listener.
const INHERITED: &str = "kms";

/// Threads for files and names.
const BLOCKING_THREADS: usize = 2;

/// The most connections on the socket. kube-apiserver has one for each KMS
/// stanza.
const MAX_CONNECTIONS: usize = 256;

/// How long a successor waits for an agent before it lets the old process drain
/// anyway.
const HANDOVER_WITHIN: Duration = Duration::from_secs(5);

/// How long what still runs at the end may take.
const SHUTDOWN_WITHIN: Duration = Duration::from_secs(1);

/// Why the sidecar did not serve, or stopped.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    /// The socket's path is another's, or cannot be bound.
    #[error(transparent)]
    Claim(#[from] ClaimError),
    /// systemd's socket cannot be used.
    #[error(transparent)]
    Inherited(ListenError),
    /// The ops port cannot be bound.
    #[error("cannot listen on the ops port (ops.address)")]
    Ops(#[source] ListenError),
    /// The identity directory does not exist.
    #[error("the identity directory is missing (identity.directory); create it for this process's user")]
    Identity(#[from] DirectoryError),
    /// The runtime could not be made.
    #[error("cannot start")]
    Start(#[source] io::Error),
    /// Logging could not be started.
    #[error(transparent)]
    Log(#[from] logging::InitError),
    /// The process before this one took the path back.
    #[error("the process that served the path before went on")]
    Handover(#[from] HandoverError),
}

impl RunError {
    /// Returns the exit status.
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::Claim(ClaimError::Held { .. } | ClaimError::Handover { .. })
            | Self::Ops(ListenError::InUse(_)) => exit::BUSY,
            _ => exit::FAILURE,
        }
    }
}

/// Serves until SIGTERM, or until a successor has taken over.
///
/// # Errors
///
/// See [`RunError`].
pub fn run(config: Config, replace: bool, random: Random) -> Result<(), RunError> {
    let directory = Directory::open(&config.identity_directory)?;
    let listeners = Listeners::bind(&config, replace)?;
    let warnings = hardening::apply(&plan(&config));
    let log = logging::init(config.log_format, config.log_filter)?;
    let runtime = runtime::current_thread(BLOCKING_THREADS).map_err(RunError::Start)?;
    let upkeep =
        Upkeep { directory, agents: config.agents, node: config.node, time: BelievedTime::default(), random };
    let mut registry = Registry::default();
    ops::register_log_drops(registry.sub_registry_with_prefix(metrics::PREFIX), &log);
    let done = runtime.block_on(start(listeners, warnings, upkeep, config.hold_for, registry));
    runtime.shutdown_timeout(SHUTDOWN_WITHIN);
    drop(log);
    done
}

/// What was bound before rights were given up.
struct Listeners {
    socket: Socket,
    ops: TcpListener,
}

enum Socket {
    /// systemd's socket unit owns the path.
    Inherited(UnixListener),
    Own(Box<SocketPath>, Bound, Option<Handover>),
}

impl Listeners {
    fn bind(config: &Config, replace: bool) -> Result<Self, RunError> {
        let inherited = Inherited::take()
            .and_then(|mut inherited| inherited.unix(INHERITED))
            .map_err(RunError::Inherited)?;
        if let Some(listener) = inherited {
            let ops = listen::tcp(config.ops_address).map_err(RunError::Ops)?;
            return Ok(Self { socket: Socket::Inherited(listener), ops });
        }
        let pid = std::process::id();
        let (path, bound, mut handover) = match replace {
            true => SocketPath::replace(config.socket.clone(), pid)?,
            false => {
                SocketPath::claim(config.socket.clone(), pid).map(|(path, bound)| (path, bound, None))?
            }
        };
        let handed_over = handover.as_mut().and_then(|handover| handover.take_ops(config.ops_address));
        let ops = handed_over.map_or_else(|| listen::tcp(config.ops_address), Ok).map_err(RunError::Ops)?;
        Ok(Self { socket: Socket::Own(Box::new(path), bound, handover), ops })
    }
}

/// What this process may still do: write its two directories.
///
/// The socket's directory may be made anew, and Landlock knows directories by
/// inode: so the one above it is named, unless that is the root.
fn plan(config: &Config) -> Plan {
    let directory = config.socket.path.parent().unwrap_or(Path::new("/"));
    let above = directory.parent().filter(|above| above.parent().is_some()).unwrap_or(directory);
    let write = vec![above.to_owned(), config.identity_directory.clone()];
    let own = rustix::process::geteuid().as_raw();
    let is_anothers = |path: &PathBuf| path.metadata().is_ok_and(|metadata| metadata.uid() != own);
    let gives_away = config.socket.owner.is_some()
        || config.socket.group.is_some()
        || is_anothers(&directory.to_owned())
        || is_anothers(&config.identity_directory);
    let capabilities = match gives_away {
        true => vec![Capability::CAP_CHOWN, Capability::CAP_DAC_OVERRIDE, Capability::CAP_FOWNER],
        false => Vec::new(),
    };
    Plan { write, capabilities, ..Plan::default() }
}

async fn start(
    listeners: Listeners,
    warnings: Vec<Warning>,
    upkeep: Upkeep,
    hold_for: Duration,
    mut registry: Registry,
) -> Result<(), RunError> {
    let missing = warnings.len();
    for warning in warnings {
        tracing::warn!(%warning, "a protection is missing on this machine");
    }
    let stop = signals::shutdown().map_err(RunError::Start)?;
    let metrics = Metrics::register(&mut registry);
    metrics.set_missing_protections(missing);
    let links = Links::new(LinkContext::new(seed(upkeep.random)), hold_for, metrics.clone());
    let node_status = NodeStatus::new(links.clone(), metrics.clone());
    let answers = Answers::new(metrics.clone(), seed(upkeep.random));
    let connections = Connections::observed_by(metrics.observer());
    let service = Kms::service(links.clone(), node_status.clone(), answers.clone());
    let moved = Moved { links: links.clone(), node_status, answers: answers.clone(), metrics };

    let drain = Drain::new();
    let (port, replaced, handover) = listeners.socket.open(&listeners.ops).map_err(RunError::Start)?;
    let ops_state = OpsState::new(registry, move || answers.readiness());
    let ops = tokio::spawn(ops::serve(listeners.ops, ops_state, Connections::new(), drain.clone()));
    let limits = ServeLimits { max_connections: MAX_CONNECTIONS, ..ServeLimits::default() };
    let serving = tokio::spawn(serve(port, service, limits, connections, drain.clone()));
    let _upkeep = AbortOnDropHandle::new(tokio::spawn(upkeep.run(moved)));
    tracing::info!("serving kube-apiserver");

    let done = tokio::select! {
        () = stop.cancelled() => Ok(()),
        () = replaced => Ok(()),
        failed = take_over(handover, links) => Err(failed),
    };
    drain.drain();
    for ended in [serving.await.map(Ok), ops.await] {
        match ended {
            Ok(Ok(())) => {}
            Ok(Err(error)) => tracing::warn!(error = chain(&error), "the ops port has failed"),
            Err(error) => tracing::warn!(error = chain(&error), "a port ended in disorder"),
        }
    }
    tracing::info!("drained");
    done
}

type Replaced = BoxFuture<'static, ()>;
type Port = SocketPort<fn(UnixStream) -> AuthorityRewrite<UnixStream>>;

impl Socket {
    /// Returns kube-apiserver's port, when a successor has replaced this
    /// process, and the talk with the process before.
    fn open(self, ops: &TcpListener) -> io::Result<(Port, Replaced, Option<Handover>)> {
        let wrap: fn(UnixStream) -> AuthorityRewrite<UnixStream> = AuthorityRewrite::new;
        match self {
            Self::Inherited(listener) => {
                Ok((SocketPort::fixed(listener, wrap)?, std::future::pending().boxed(), None))
            }
            Self::Own(path, bound, handover) => {
                let (port, replaced) = keep_bound(*path, bound, ops.try_clone()?, wrap)?;
                Ok((port, tokio::spawn(replaced).map(drop).boxed(), handover))
            }
        }
    }
}

/// Lets the process before drain, once this one can answer. Ends only when that
/// fails.
async fn take_over(handover: Option<Handover>, links: Links) -> RunError {
    if let Some(handover) = handover {
        // An agent that is away keeps nobody from being replaced.
        let _ = timeout(HANDOVER_WITHIN, links.up()).await;
        match tokio::task::spawn_blocking(|| handover.finish()).await {
            Ok(Ok(())) => tracing::info!("the process before this one drains"),
            Ok(Err(error)) => return error.into(),
            Err(error) => return RunError::Start(io::Error::other(error)),
        }
    }
    std::future::pending().await
}

/// Spreads this node among the fleet's.
fn seed(random: Random) -> u64 {
    random().first_chunk().map_or(0, |seed| u64::from_le_bytes(*seed))
}
