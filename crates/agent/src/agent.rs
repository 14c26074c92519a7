//! The agent put together: what `run`, `check-store` and tests share.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

use arc_swap::ArcSwap;
use fleet_kms_audit::{ChangeLog, DataLog, LogError};
use fleet_kms_identity::{KeyPair, KeyPairError, Serial, SpiffeId, Subject, TrustDomain};
use fleet_kms_process::exit;
use fleet_kms_transport::{Clock, LiveIdentity, LiveIdentityError, Roots, RootsError};
use prometheus_client::registry::Registry;
use rustls_pki_types::CertificateDer;

use crate::answer::Answers;
use crate::authz::{Policy, internal};
use crate::backup::Backups;
use crate::bans::Bans;
use crate::bulletin::Bulletin;
use crate::ca::{self, Authorities, RolloverError, SignError};
use crate::changes::{ChangeError, Changes, Unconfirmed};
use crate::clusters::{ClusterError, Clusters};
use crate::config::Config;
use crate::control_plane::ControlPlane;
use crate::data_plane::DataPlaneService;
use crate::enrolment::issue::{Issuer, MAX_OFFLINE, agent_certificate_due};
use crate::errors::chain;
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
use crate::trail::Event;
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
    /// The fleet CA cannot be read.
    #[error(transparent)]
    Authorities(#[from] ca::LoadError),
    /// The issuing CA is due and cannot be replaced.
    #[error(transparent)]
    RenewAuthorities(#[from] RenewAuthoritiesError),
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
    /// The agent's own certificate cannot be made.
    #[error("cannot make the agent's own certificate")]
    OwnCertificate(#[from] OwnCertificateError),
}

/// Why the issuing CA was not replaced; the old one stays in use.
#[derive(Debug, thiserror::Error)]
pub enum RenewAuthoritiesError {
    /// The change was refused or failed.
    #[error("cannot make the next issuing CA")]
    Change(#[source] Box<ChangeError<RolloverError>>),
    /// The new one cannot be read.
    #[error(transparent)]
    Load(#[from] ca::LoadError),
}

/// Why the agent's own certificate cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum OwnCertificateError {
    /// No key.
    #[error(transparent)]
    Key(#[from] KeyPairError),
    /// No signature.
    #[error(transparent)]
    Sign(#[from] SignError),
    /// The CA made what TLS does not take.
    #[error(transparent)]
    Live(#[from] LiveIdentityError),
    /// The stored roots do not parse.
    #[error(transparent)]
    Roots(#[from] RootsError),
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
            Self::Authorities(_) | Self::RenewAuthorities(_) | Self::Ledger(_) | Self::Witness { .. } => {
                exit::DATA
            }
            Self::OwnCertificate(_) => exit::FAILURE,
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
    pub own: OwnCertificate,
    /// The roots that callers chain to.
    pub roots: Arc<Roots>,
    /// Makes backups.
    pub backups: Arc<Backups>,
    /// Raises the alarm when the store turns out to be an old copy.
    pub rolled_back: Arc<RolledBack>,
    /// Works on the root slots.
    pub slots: Arc<Slots>,
    /// The directory of the audit.
    pub audit: PathBuf,
    /// KEKs that do not open.
    pub damaged: usize,
    authorities: Arc<ArcSwap<Authorities>>,
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
        let (log, data_log) = open_audit(config, &clock)?;
        let witness = Witness::new(&config.audit);
        let (keyrings, damaged) = LiveKeyrings::load(&ledger, store_keys, generator).await?;
        let keyrings = Arc::new(keyrings);
        let identities = Arc::new(LiveIdentities::load(&ledger).await?);
        let clusters = Arc::new(Clusters::load(&ledger).await?);
        let changes =
            Changes::new(Arc::clone(&ledger), log, witness, unconfirmed, Arc::clone(&clock), generator);
        let changes = Arc::new(changes);
        changes.close_open_intents().await?;
        let trust_domain = &config.trust_domain;
        let mut authorities = load_authorities(&ledger, &keyrings, trust_domain).await?;
        if authorities.issuing_due(clock()) && unconfirmed.is_none() {
            authorities = renewed_authorities(&changes, &keyrings, trust_domain, generator).await?;
        }
        let roots =
            Arc::new(Roots::new(ders(authorities.trusted_roots())).map_err(OwnCertificateError::from)?);
        let own_id = Subject::Agent { name: config.name.clone() };
        let own_id = SpiffeId::new(config.trust_domain.clone(), own_id);
        let own = OwnCertificate::new(own_id, &authorities, &clock, generator)?;
        let bulletin = Bulletin::new(config.addresses.clone(), authorities.trusted_roots().to_vec());
        let authorities = Arc::new(ArcSwap::from_pointee(authorities));
        let issuer = Issuer::new(
            Arc::clone(&changes),
            Arc::clone(&authorities),
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
            issuer: Arc::new(issuer),
            data_log: Arc::new(data_log),
            bulletin: Arc::new(bulletin),
            metrics: Arc::new(Metrics::register(registry)),
            own,
            roots,
            damaged: damaged.len(),
            authorities,
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
            Turns::new(std::thread::available_parallelism().map_or(1, usize::from)),
            self.monotonic,
        )
    }

    /// Replaces the issuing CA when half its life is over, and the agent's own
    /// certificate when a third is. What fails is tried again a minute later.
    pub async fn renew_certificates(&self) {
        if self.issuer.authorities().issuing_due((self.clock)()) {
            match renewed_authorities(
                &self.changes,
                &self.keyrings,
                &self.own.id.trust_domain,
                self.generator,
            )
            .await
            {
                Ok(authorities) => {
                    self.authorities.store(Arc::new(authorities));
                    self.renew_own();
                }
                Err(error) => {
                    tracing::error!(error = chain(&error), "the issuing CA cannot be renewed");
                }
            }
        }
        if agent_certificate_due(self.own.live.certificate().not_after(), (self.clock)()) {
            self.renew_own();
        }
    }

    fn renew_own(&self) {
        match self.own.renew(&self.issuer.authorities(), &self.clock) {
            Ok(()) => tracing::info!("renewed the agent's own certificate"),
            Err(error) => {
                tracing::error!(error = chain(&error), "the agent's own certificate cannot be renewed");
            }
        }
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

/// The agent's own certificate: made by its own CA at each start, kept in
/// memory only, made again long before it ends. It needs no row in the store,
/// so that an agent comes back whatever happened to its clock or its disk.
pub struct OwnCertificate {
    id: SpiffeId,
    live: Arc<LiveIdentity>,
    generator: Generator,
}

impl OwnCertificate {
    fn new(
        id: SpiffeId,
        authorities: &Authorities,
        clock: &Clock,
        generator: Generator,
    ) -> Result<Self, OwnCertificateError> {
        let (chain, key) = own_chain(&id, authorities, clock, generator)?;
        Ok(Self { id, live: Arc::new(LiveIdentity::new(chain, &key)?), generator })
    }

    /// Returns what TLS serves with.
    pub fn live(&self) -> &Arc<LiveIdentity> {
        &self.live
    }

    /// Makes a new certificate with a new key.
    ///
    /// # Errors
    ///
    /// When the CA cannot sign; the old certificate stays.
    pub fn renew(&self, authorities: &Authorities, clock: &Clock) -> Result<(), OwnCertificateError> {
        let (chain, key) = own_chain(&self.id, authorities, clock, self.generator)?;
        Ok(self.live.replace(chain, &key)?)
    }
}

/// Makes a certificate for the agent; the root goes along, because a node that
/// enrols knows it by its fingerprint only.
fn own_chain(
    id: &SpiffeId,
    authorities: &Authorities,
    clock: &Clock,
    generator: Generator,
) -> Result<(Vec<CertificateDer<'static>>, KeyPair), OwnCertificateError> {
    let key = KeyPair::generate()?;
    let mut random = [0; 8];
    generator().fill_bytes(&mut random);
    // Issue number 0: no row of the store counts agents' certificates.
    let serial = Serial::new(0, random).expect("0 is an issue number");
    let leaf = authorities.issue(id, &serial, &key.spki_der(), clock())?;
    let mut chain = ders(&leaf.chain);
    chain.push(CertificateDer::from(authorities.root().to_vec()));
    Ok((chain, key))
}

async fn load_authorities(
    ledger: &Ledger,
    keyrings: &LiveKeyrings,
    trust_domain: &TrustDomain,
) -> Result<Authorities, ca::LoadError> {
    let open = |row: &_, bytes: &_| keyrings.open_ca_key(&internal::authority(), row, bytes);
    Authorities::load(ledger, trust_domain.clone(), open).await
}

/// Makes the next issuing CA, unless another agent was first, and loads what is
/// active then.
async fn renewed_authorities(
    changes: &Changes,
    keyrings: &LiveKeyrings,
    trust_domain: &TrustDomain,
    generator: Generator,
) -> Result<Authorities, RenewAuthoritiesError> {
    let permit = internal::authority();
    let open = |row: &_, bytes: &_| keyrings.open_ca_key(&permit, row, bytes);
    let seal = |row: &_, key: &_| keyrings.seal_ca_key(&permit, row, key);
    match ca::renew_issuing(changes, trust_domain, open, seal, generator).await {
        Ok(()) => tracing::info!("made the next issuing CA"),
        Err(ChangeError::Refused(RolloverError::NotDue)) => {}
        Err(error) => return Err(RenewAuthoritiesError::Change(Box::new(error))),
    }
    Ok(load_authorities(changes.ledger(), keyrings, trust_domain).await?)
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

fn open_audit(config: &Config, clock: &Clock) -> Result<(ChangeLog, DataLog), OpenError> {
    let failed = |source| OpenError::Audit { path: config.audit.display().to_string(), source };
    let changes = ChangeLog::open(&config.audit).map_err(failed)?;
    report(changes.opened());
    let data = DataLog::open(&config.audit, clock()).map_err(failed)?;
    report(data.opened());
    Ok((changes, data))
}

fn report(opened: &fleet_kms_audit::Opened) {
    if let Some(torn) = &opened.torn {
        tracing::warn!(?torn, "the audit's last line was cut off by a crash and has been removed");
    }
    if let Some(broken) = &opened.broken {
        tracing::error!(?broken, "the audit's chain does not hold; it goes on after the break");
    }
}

fn ders(certificates: &[Vec<u8>]) -> Vec<CertificateDer<'static>> {
    certificates.iter().map(|der| CertificateDer::from(der.clone())).collect()
}
