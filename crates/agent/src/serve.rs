//! `kms-agent run`: listeners, hardening, runtime, then serve until told to
//! stop.
//!
//! Order (`design`: capabilities and Landlock hold per thread): bind std
//! listeners, give up rights, and only then make threads.

use std::fs::DirBuilder;
use std::net::TcpListener;
use std::os::unix::fs::DirBuilderExt as _;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use fleet_kms_process::hardening::{self, Plan, Warning};
use fleet_kms_process::listen::{self, ListenError};
use fleet_kms_process::ops::register_log_drops;
use fleet_kms_process::{clock as clocks, exit, logging, runtime, signals};
use fleet_kms_proto::agent::data_plane_server::DataPlaneServer;
use fleet_kms_proto::agent::enrolment_server::EnrolmentServer;
use fleet_kms_transport::deadline::DeadlineLayer;
use fleet_kms_transport::{
    ClientAuth, Clock, Connections, Drain, Roots, ServeLimits, ServerTls, TlsPort, agent_tls,
};
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tower::util::MapResponseLayer;
use tower::{Layer, ServiceExt};

use crate::agent::{Agent, OpenError};
use crate::config::{Config, Listen};
use crate::enrolment::EnrolmentService;
use crate::errors::chain;
use crate::grpc_code::with_reason;
use crate::in_flight::InFlightLayer;
use crate::ledger::Generator;
use crate::metrics::PREFIX;
use crate::rotation::Schedule;
use crate::slots::reseal;
use crate::trail::upkeep;
use crate::turned_away::TurnedAway;
use crate::{admin, aside, backup, high_water, local, ops, wraps};

/// The largest request of the data port: 512 wrapped DEKs of 32 bytes are 49 KiB.
const MAX_DATA_REQUEST: usize = 64 << 10;
/// Calls at a time of one connection to the data port; `in_flight.rs` says how
/// many of them are worked on.
const DATA_STREAMS: u32 = 256;
/// Bytes of a connection to the data port that no handler has read yet: what an
/// identity may cost is this for each of its connections, and 8 requests.
const DATA_UNREAD: u32 = 256 << 10;
/// The largest request of the enrolment port: a CSR.
const MAX_ENROLMENT_REQUEST: usize = 16 << 10;
/// A connection to the enrolment port is for one call; a few more do no harm.
const ENROLMENT_STREAMS: u32 = 8;
/// The age of such a connection.
const ENROLMENT_AGE: Duration = Duration::from_secs(60);
/// Connections to the enrolment port from one source, which needs no certificate
/// there: a site behind one address that comes back, a tenth of the port.
const ENROLMENT_PER_SOURCE: usize = 1_000;
/// Connections of one admin: automation makes one for each command.
const ADMIN_PER_IDENTITY: usize = 64;
/// The agent looks at the fleet CA in the store so often,
const CA_EVERY: Duration = Duration::from_secs(60);
/// and at the dates of its own certificate and of the roots: no longer is it out
/// of service when its machine was suspended beyond them.
const DATES_EVERY: Duration = Duration::from_secs(5);
/// How long a stop waits for background work.
const WORK_GRACE: Duration = Duration::from_millis(500);

/// Why the agent stopped before it served, or could not go on.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// A port cannot be bound.
    #[error("cannot listen on the {port} port (listen.{port})")]
    Listen {
        port: &'static str,
        #[source]
        source: ListenError,
    },
    /// The audit's directory is missing, or is none.
    #[error("there is no audit directory {path} (audit.directory); create it for this process's user")]
    NoAudit { path: String },
    /// The runtime could not be made.
    #[error("cannot start")]
    Start(#[source] std::io::Error),
    /// Logging could not be started.
    #[error(transparent)]
    Log(#[from] logging::InitError),
    /// Store, keys or audit cannot be used.
    #[error(transparent)]
    Open(#[from] OpenError),
}

impl ServeError {
    /// Returns the exit status.
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::Listen { source: ListenError::InUse(_), .. } => exit::BUSY,
            Self::Listen { .. } | Self::NoAudit { .. } | Self::Start(_) | Self::Log(_) => exit::FAILURE,
            Self::Open(error) => error.exit_code(),
        }
    }
}

/// The agent's clock, for certificates and records.
pub fn clock() -> Clock {
    Arc::new(clocks::now)
}

/// Serves until SIGTERM.
///
/// # Errors
///
/// See [`ServeError`].
pub fn run(mut config: Config, generator: Generator) -> Result<(), ServeError> {
    // Not made here: an audit that has gone is for a person to explain, and Landlock
    // could let nobody write below a directory that is not there yet.
    if !config.audit.is_dir() {
        return Err(ServeError::NoAudit { path: config.audit.display().to_string() });
    }
    // Backups that cannot be written are an alarm, no reason not to serve.
    let _ = config.backup.as_ref().map(|backup| DirBuilder::new().mode(0o700).create(&backup.directory));
    let listeners = Listeners::bind(config.listen)?;
    let warnings = hardening::apply(&plan(&config));
    let runtime = runtime::multi_thread().map_err(ServeError::Start)?;
    let log = logging::init(config.log_format, std::mem::take(&mut config.log_filter))?;
    let mut registry = Registry::default();
    let ours = registry.sub_registry_with_prefix(PREFIX);
    register_log_drops(ours, &log);
    let missing = Gauge::<i64>::default();
    missing.set(i64::try_from(warnings.len()).unwrap_or(i64::MAX));
    let help = "Protections that this machine refused at start; the log names them";
    ours.register("missing_protections", help, missing);
    let done = runtime.block_on(serve(&config, listeners, warnings, registry, generator));
    // What is still running holds nothing that must be finished.
    runtime.shutdown_timeout(Duration::from_secs(1));
    drop(log);
    done
}

struct Listeners {
    data: TcpListener,
    enrolment: TcpListener,
    admin: TcpListener,
    ops: TcpListener,
}

impl Listeners {
    fn bind(listen: Listen) -> Result<Self, ServeError> {
        let bind = |port, address| listen::tcp(address).map_err(|source| ServeError::Listen { port, source });
        Ok(Self {
            data: bind("data", listen.data)?,
            enrolment: bind("enrolment", listen.enrolment)?,
            admin: bind("admin", listen.admin)?,
            ops: bind("ops", listen.ops)?,
        })
    }
}

/// What the agent keeps: its store's directory, its audit, and its root key
/// file to read.
fn plan(config: &Config) -> Plan {
    let store = config.store.parent().map(PathBuf::from);
    let root = config.root.directory();
    let backups = config.backup.as_ref().map(|backup| backup.directory.clone());
    Plan {
        read: root.into_iter().collect(),
        write: store.into_iter().chain([config.audit.clone()]).chain(backups).collect(),
        ..Plan::default()
    }
}

async fn serve(
    config: &Config,
    listeners: Listeners,
    warnings: Vec<Warning>,
    mut registry: Registry,
    generator: Generator,
) -> Result<(), ServeError> {
    for warning in warnings {
        tracing::warn!(%warning, "a protection is missing on this machine");
    }
    let stop = signals::shutdown().map_err(ServeError::Start)?;
    let agent = Agent::open(config, &mut registry, clock(), clocks::monotonic, generator).await?;
    let agent = Arc::new(agent);
    let drain = Drain::new();
    let tasks = TaskTracker::new();
    let turned_away = TurnedAway::new(
        Arc::clone(&agent.metrics),
        Arc::clone(&agent.data_log),
        Arc::clone(agent.clock()),
        clocks::monotonic,
    );
    let connections = Connections::observed_by(turned_away.observer());
    spawn_ports(&tasks, &agent, listeners, &connections, &drain, registry)?;
    let work = TaskTracker::new();
    spawn_work(&work, &agent, config, &stop);
    match local::bind(&local::path_of(&config.store)) {
        Ok(local) => drop(tasks.spawn(local::serve(local, Arc::clone(&agent), drain.clone()))),
        // A full disk keeps commands on this host away, and nobody else.
        Err(error) => tracing::error!(%error, "the local socket cannot be made in the store's directory"),
    }
    if let Err(error) = agent.slots.note_in_use(&config.root.to_string()).await {
        tracing::warn!(error = chain(&error), "the root slot in use could not be noted");
    }
    tasks.close();
    work.close();
    tracing::info!(
        data = %config.listen.data, enrolment = %config.listen.enrolment, admin = %config.listen.admin,
        clusters = agent.keyrings.keyrings().len(), version = env!("CARGO_PKG_VERSION"), "serving"
    );
    stop.cancelled().await;
    drain.drain();
    tasks.wait().await;
    // Each of these survives a crash, so that cutting it off is safe; a restart must not wait for a backup.
    if tokio::time::timeout(WORK_GRACE, work.wait()).await.is_err() {
        tracing::info!("stopping in the middle of background work; it goes on at the next start");
    }
    upkeep::finish(&agent).await;
    if let Err(error) = wraps::flush(&agent.keyrings, &agent.changes).await {
        tracing::warn!(error = chain(&error), "the last counted wraps are lost");
    }
    tracing::info!("stopped");
    Ok(())
}

fn spawn_ports(
    tasks: &TaskTracker,
    agent: &Arc<Agent>,
    listeners: Listeners,
    connections: &Connections,
    drain: &Drain,
    registry: Registry,
) -> Result<(), ServeError> {
    let tls = |roots: &Arc<Roots>, auth| -> ServerTls {
        agent_tls(Arc::clone(agent.own.live()), Arc::clone(roots), Arc::clone(agent.clock()), auth)
    };
    let roots = agent.ca.roots();
    let port = |listener, tls| TlsPort::from_std(listener, tls).map_err(ServeError::Start);
    let on = |port| connections.of_port(port);
    let own_answers = MapResponseLayer::new(with_reason);
    let body = |request: http::Request<hyper::body::Incoming>| request.map(tonic::body::Body::new);

    let data = DataPlaneServer::new(agent.data_plane()).max_decoding_message_size(MAX_DATA_REQUEST);
    let data = InFlightLayer::default().layer(data.map_request(body));
    let data = own_answers.layer(DeadlineLayer.layer(data));
    let listener = port(listeners.data, tls(&roots.data, ClientAuth::Required))?;
    let limits =
        ServeLimits { max_streams: DATA_STREAMS, connection_window: DATA_UNREAD, ..ServeLimits::default() };
    tasks.spawn(fleet_kms_transport::serve(listener, data, limits, on("data"), drain.clone()));

    let enrolment = EnrolmentService::new(
        Arc::clone(&agent.issuer),
        Arc::clone(&agent.policy),
        Arc::clone(&agent.bulletin),
        Arc::clone(agent.own.live()),
        Arc::clone(&agent.metrics),
        clocks::monotonic,
    );
    let enrolment = EnrolmentServer::new(enrolment).max_decoding_message_size(MAX_ENROLMENT_REQUEST);
    let enrolment = own_answers.layer(DeadlineLayer.layer(enrolment.map_request(body)));
    let listener = port(listeners.enrolment, tls(&roots.enrolment, ClientAuth::OptionalMayBeExpired))?;
    let limits = ServeLimits {
        max_connections_per_source: ENROLMENT_PER_SOURCE,
        max_streams: ENROLMENT_STREAMS,
        age: ENROLMENT_AGE,
        ..ServeLimits::default()
    };
    tasks.spawn(fleet_kms_transport::serve(listener, enrolment, limits, on("enrolment"), drain.clone()));

    let router = admin::router(Arc::clone(agent), connections.clone());
    let limits = ServeLimits { max_connections_per_identity: ADMIN_PER_IDENTITY, ..ServeLimits::default() };
    let (admin_tls, admin_connections) = (tls(&roots.admin, ClientAuth::Required).with_http1(), on("admin"));
    let (listener, admin_drain) = (listeners.admin, drain.clone());
    let served = aside::run("admin", move || {
        let listener = TlsPort::from_std(listener, admin_tls)?;
        Ok(fleet_kms_transport::serve(listener, router, limits, admin_connections, admin_drain))
    });
    tasks.spawn(served.map_err(ServeError::Start)?);

    ops::spawn(tasks, agent, connections, listeners.ops, registry, drain.clone()).map_err(ServeError::Start)
}

fn spawn_work(tasks: &TaskTracker, agent: &Arc<Agent>, config: &Config, stop: &CancellationToken) {
    let schedule = Schedule::new(
        Arc::clone(&agent.control_plane),
        Arc::clone(&agent.keyrings),
        Arc::clone(&agent.changes),
        (Arc::clone(agent.clock()), clocks::monotonic),
        config.pace,
    );
    tasks.spawn(schedule.run(stop.clone()));
    tasks.spawn(wraps::run(Arc::clone(&agent.keyrings), Arc::clone(&agent.changes), stop.clone()));
    tasks.spawn(reseal::run(Arc::clone(&agent.slots), stop.clone()));
    tasks.spawn(backup::run(Arc::clone(&agent.backups), stop.clone()));
    let ca = Arc::clone(&agent.ca);
    tasks.spawn(every(CA_EVERY, stop.clone(), move || {
        let ca = Arc::clone(&ca);
        async move { ca.renew().await }
    }));
    let ca = Arc::clone(&agent.ca);
    tasks.spawn(every(DATES_EVERY, stop.clone(), move || {
        ca.follow_dates();
        std::future::ready(())
    }));
    tasks.spawn(upkeep::run(Arc::clone(agent), config.audit_options, stop.clone()));
    let looking = Arc::clone(agent);
    tasks.spawn(every(high_water::LOOK_EVERY, stop.clone(), move || {
        let agent = Arc::clone(&looking);
        async move { agent.look_at_the_clock().await }
    }));
}

/// Does something again and again until `stop`.
async fn every<F: Future<Output = ()> + Send>(
    pause: Duration,
    stop: CancellationToken,
    act: impl Fn() -> F + Send,
) {
    loop {
        tokio::select! {
            () = stop.cancelled() => return,
            () = tokio::time::sleep(pause) => act().await,
        }
    }
}
