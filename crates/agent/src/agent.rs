//! The agent put together: what `run`, `check-store` and tests share.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

use fleet_kms_audit::{ChangeLog, Clocks, DataLog, Head, LogError};
use fleet_kms_identity::{SpiffeId, Subject};
use fleet_kms_process::exit;
use fleet_kms_transport::Clock;
use prometheus_client::registry::Registry;

use crate::answer::Answers;
use crate::authz::Policy;
use crate::backup::Backups;
use crate::bans::Bans;
use crate::bulletin::Bulletin;
use crate::changes::{Changes, Unconfirmed};
use crate::clusters::{ClusterError, Clusters};
use crate::config::Config;
use crate::control_plane::ControlPlane;
use crate::data_plane::DataPlaneService;
use crate::enrolment::issue::{Issuer, MAX_OFFLINE};
use crate::fleet_ca::{CaStore, FleetCa, OwnCertificate, RollError};
use crate::identities::{IdentityError, LiveIdentities};
use crate::ledger::{Generator, HeadError, Integrity, Ledger, LedgerError};
use crate::live_keyrings::{LiveKeyrings, LoadError};
use crate::metrics::Metrics;
use crate::nodes::Nodes;
use crate::recovery::{RecoverError, Recovered, Recovery};
use crate::rolled_back::RolledBack;
use crate::sightings::Sightings;
use crate::slots::Slots;
use crate::storage::{self, Storage, StorageError};
use crate::trail::{Event, heads};
use crate::turns::Turns;
use crate::witness::Witness;

/// Why an agent cannot start.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// The store cannot be used.
    #[error(transparent)]
    Storage(#[from] StorageError),
    /// The head cannot be compared with the rows.
    #[error(transparent)]
    Head(#[from] HeadError),
    /// The keyrings cannot be read.
    #[error(transparent)]
    Keyrings(#[from] LoadError),
    /// The identities cannot be read.
    #[error(transparent)]
    Identities(#[from] IdentityError),
    /// The clusters cannot be read.
    #[error(transparent)]
    Clusters(#[from] ClusterError),
    /// The fleet CA cannot be read or used, or is due and cannot be replaced.
    #[error(transparent)]
    Authorities(#[from] RollError),
    /// An open intent cannot be looked up.
    #[error(transparent)]
    Ledger(#[from] LedgerError),
    /// The audit cannot be used.
    #[error("cannot use the audit in {path} (audit.directory); it must be writable for this process's user")]
    Audit {
        path: String,
        #[source]
        source: LogError,
    },
    /// The witness cannot be read.
    #[error(
        "cannot read the witness in {path}; if it is damaged, look at the audit for what happened, then remove it"
    )]
    Witness {
        path: String,
        #[source]
        source: std::io::Error,
    },
}

impl OpenError {
    /// Returns the exit status.
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::Audit { source: LogError::InUse(_), .. } => exit::BUSY,
            Self::Audit { source: LogError::Io(_), .. } => exit::FAILURE,
            Self::Audit { .. } => exit::DATA,
            Self::Storage(error) => error.exit_code(),
            Self::Head(_) | Self::Keyrings(_) | Self::Identities(_) | Self::Clusters(_) => exit::DATA,
            Self::Authorities(RollError::Use(_)) => exit::FAILURE,
            Self::Authorities(_) | Self::Ledger(_) | Self::Witness { .. } => exit::DATA,
        }
    }
}

/// An agent, ready to serve.
pub struct Agent {
    /// Who may do what.
    pub policy: Arc<Policy>,
    /// The keys.
    pub keyrings: Arc<LiveKeyrings>,
    /// Who may connect.
    pub identities: Arc<LiveIdentities>,
    /// Clusters by name.
    pub clusters: Arc<Clusters>,
    /// What nodes said of themselves.
    pub nodes: Arc<Nodes>,
    /// Makes changes.
    pub changes: Arc<Changes>,
    /// Changes clusters and keyrings.
    pub control_plane: Arc<ControlPlane>,
    /// Issues certificates.
    pub issuer: Arc<Issuer>,
    /// The data plane's audit.
    pub data_log: Arc<DataLog>,
    /// What nodes are told.
    pub bulletin: Arc<Bulletin>,
    /// Counted as things happen.
    pub metrics: Arc<Metrics>,
    /// The agent's own certificate.
    pub own: Arc<OwnCertificate>,
    /// The fleet CA.
    pub ca: Arc<FleetCa>,
    /// Makes backups.
    pub backups: Arc<Backups>,
    /// Raises the alarm when the store turns out to be an old copy.
    pub rolled_back: Arc<RolledBack>,
    /// Works on the root slots.
    pub slots: Arc<Slots>,
    /// The directory of the audit.
    pub audit: PathBuf,
    /// Chains of the audit that were cut or begun anew since the store saw them.
    pub audit_cut: usize,
    /// KEKs that do not open.
    pub damaged: usize,
    ledger: Arc<Ledger>,
    clock: Clock,
    monotonic: fn() -> Instant,
    generator: Generator,
}

impl Agent {
    /// Opens store, audit and keys.
    ///
    /// # Errors
    ///
    /// See [`OpenError`]; nothing was changed.
    pub async fn open(
        config: &Config,
        registry: &mut Registry,
        clock: Clock,
        monotonic: fn() -> Instant,
        generator: Generator,
    ) -> Result<Self, OpenError> {
        let name = config.name.as_str();
        let storage = storage::open(&config.store, &config.root, name, generator).await?;
        Self::over(storage, config, registry, (clock, monotonic), generator).await
    }

    /// As [`Self::open`], over a store that is open already.
    ///
    /// # Errors
    ///
    /// As [`Self::open`].
    pub async fn over(
        storage: Storage,
        config: &Config,
        registry: &mut Registry,
        (clock, monotonic): (Clock, fn() -> Instant),
        generator: Generator,
    ) -> Result<Self, OpenError> {
        let Storage { ledger, store_keys, slot } = storage;
        let unconfirmed = find_out_if_confirmed(&ledger, config).await?;
        let (log, data_log) = open_audit(config, &clock, monotonic)?;
        let cut = heads::cut(&ledger, config.name.as_str(), &log, &data_log).await?;
        let witness = Witness::new(&config.audit);
        let (keyrings, damaged) = LiveKeyrings::load(&ledger, store_keys, generator).await?;
        let keyrings = Arc::new(keyrings);
        let identities = Arc::new(LiveIdentities::load(&ledger).await?);
        let clusters = Arc::new(Clusters::load(&ledger).await?);
        let changes =
            Changes::new(Arc::clone(&ledger), log, witness, unconfirmed, Arc::clone(&clock), generator);
        let changes = Arc::new(changes);
        for (chain, kept, found) in &cut {
            tracing::error!(%chain, kept = kept.seq, found = found.seq, "the audit ends before its stored head");
            changes.event(audit_cut(*chain, kept, found)).await;
        }
        changes.close_open_intents().await?;
        let own_id = Subject::Agent { name: config.name.clone() };
        let own_id = SpiffeId::new(config.trust_domain.clone(), own_id);
        let store = CaStore { changes: Arc::clone(&changes), keyrings: Arc::clone(&keyrings), generator };
        let ca = FleetCa::open(store, own_id, config.addresses.clone()).await?;
        let issuer = Issuer::new(
            Arc::clone(&changes),
            Arc::clone(ca.live()),
            Arc::clone(&identities),
            generator,
            MAX_OFFLINE,
        );
        let backups = Backups::load(
            config.store.clone(),
            config.backup.clone(),
            Arc::clone(&changes),
            Arc::clone(&keyrings),
        )
        .await?;
        let backups = Arc::new(backups);
        let control_plane = ControlPlane::new(
            Arc::clone(&changes),
            Arc::clone(&keyrings),
            Arc::clone(&clusters),
            config.rotation,
            generator,
        );
        let control_plane = Arc::new(control_plane.with_backups(Arc::clone(&backups)));
        let slots =
            Slots::new(Arc::clone(&changes), Arc::clone(&keyrings), Arc::clone(&backups), slot, generator);
        let rolled_back =
            RolledBack::new(Arc::clone(&changes), Arc::clone(&control_plane), Arc::clone(&clusters));
        Ok(Self {
            policy: Arc::new(Policy::new(Arc::clone(&identities))),
            keyrings,
            identities,
            clusters,
            nodes: Arc::default(),
            changes,
            control_plane,
            backups,
            rolled_back: Arc::new(rolled_back),
            slots: Arc::new(slots),
            audit: config.audit.clone(),
            audit_cut: cut.len(),
            issuer: Arc::new(issuer),
            data_log: Arc::new(data_log),
            bulletin: Arc::clone(ca.bulletin()),
            metrics: Arc::new(Metrics::register(registry)),
            own: Arc::clone(ca.own()),
            ca: Arc::new(ca),
            damaged: damaged.len(),
            ledger,
            clock,
            monotonic,
            generator,
        })
    }

    /// Makes the service of the data port.
    pub fn data_plane(&self) -> DataPlaneService {
        let sightings = Arc::new(Sightings::new(
            Arc::clone(&self.identities),
            Arc::clone(&self.issuer),
            Arc::clone(&self.changes),
        ));
        let answers = Answers::new(
            (Arc::clone(&self.policy), Arc::clone(&self.issuer)),
            Arc::clone(&self.data_log),
            Arc::clone(&self.metrics),
            Arc::clone(&sightings),
            Arc::clone(&self.clock),
            self.monotonic,
        );
        DataPlaneService::new(
            answers,
            Arc::clone(&self.keyrings),
            Arc::clone(&self.ledger),
            Arc::clone(&self.nodes),
            Arc::clone(&self.bulletin),
            (Arc::clone(&self.rolled_back), sightings),
            (Turns::new(std::thread::available_parallelism().map_or(1, usize::from)), self.monotonic),
        )
    }

    /// Returns the agent's name.
    pub fn name(&self) -> String {
        self.own.live().certificate().id().subject.name().to_string()
    }

    /// Counts the records that were left out because they are damaged.
    pub fn damaged_records(&self) -> usize {
        self.ledger.damaged().len()
    }

    /// Returns the agent's generator.
    pub fn generator(&self) -> Generator {
        self.generator
    }

    /// Wipes the store key, what is derived from it and the CA's key, and stops
    /// serving keys. A restart with a root slot unlocks.
    pub async fn lock(&self) {
        self.keyrings.lock();
        self.issuer.authorities().lock();
        self.changes.event(Event::new("lock", "host")).await;
        self.changes.lock().await;
        tracing::warn!("the agent is locked: no key can be used until it is restarted");
    }

    /// Makes the store good after an operator's word, bans included.
    ///
    /// # Errors
    ///
    /// When a step fails; the store is then as unconfirmed as before.
    pub async fn confirm(&self, bans: &Bans) -> Result<Recovered, RecoverError> {
        let recovery = Recovery {
            changes: &self.changes,
            keyrings: &self.keyrings,
            control_plane: &self.control_plane,
            identities: &self.identities,
        };
        recovery.run(bans, 0).await
    }

    /// Returns the agent's clock.
    pub fn clock(&self) -> &Clock {
        &self.clock
    }
}

/// Compares head and rows, and head and witness.
async fn find_out_if_confirmed(ledger: &Ledger, config: &Config) -> Result<Option<Unconfirmed>, OpenError> {
    if let Integrity::Broken { rows } = ledger.check().await? {
        tracing::error!(rows, "rows of the store were edited, replayed or deleted behind the agent's back");
        return Ok(Some(Unconfirmed::Edited));
    }
    let seen = Witness::new(&config.audit)
        .read()
        .map_err(|source| OpenError::Witness { path: config.audit.display().to_string(), source })?;
    let store = ledger.head_count().await;
    match seen {
        Some(seen) if seen.store == ledger.codec().store() && seen.count > store => {
            tracing::error!(store, witness = seen.count, "the store is older than its witness");
            Ok(Some(Unconfirmed::Older { store, witness: seen.count }))
        }
        _ => Ok(None),
    }
}

fn open_audit(
    config: &Config,
    clock: &Clock,
    monotonic: fn() -> Instant,
) -> Result<(ChangeLog, DataLog), OpenError> {
    let failed = |source| OpenError::Audit { path: config.audit.display().to_string(), source };
    let options = config.audit_options.data;
    let changes = ChangeLog::open_with(&config.audit, options.max_file).map_err(failed)?;
    report(changes.opened());
    let clocks = Clocks { wall: Arc::clone(clock), monotonic };
    let data = DataLog::open(&config.audit, options, clocks).map_err(failed)?;
    report(data.opened());
    Ok((changes, data))
}

fn audit_cut(chain: fleet_kms_audit::Chain, kept: &Head, found: &Head) -> Event {
    let hash = data_encoding::HEXLOWER.encode(&kept.hash);
    Event::new("audit_cut", "agent")
        .target(chain.name())
        .detail("stored_seq", kept.seq.to_string())
        .detail("stored_hash", hash)
        .detail("found_seq", found.seq.to_string())
}

fn report(opened: &fleet_kms_audit::Opened) {
    if let Some(torn) = &opened.torn {
        tracing::warn!(?torn, "the audit's last line was cut off by a crash and has been removed");
    }
    if let Some(broken) = &opened.broken {
        tracing::error!(?broken, "the audit's chain does not hold; it goes on after the break");
    }
}
