//! The fleet CA as this agent uses it: which roots its ports trust, what nodes
//! are told, its own certificate, and when each of them is renewed.
//!
//! Whatever the store says becomes this agent's truth here and nowhere else, in
//! one order: first everybody may trust the new, then it is used. It must never
//! stop trying: what fails is logged and tried again.

use std::sync::Arc;
use std::time::SystemTime;

use arc_swap::ArcSwap;
use fleet_kms_identity::{KeyPair, KeyPairError, Serial, SpiffeId};
use fleet_kms_transport::{LiveIdentity, LiveIdentityError, Roots, RootsError};
use rustls_pki_types::CertificateDer;

use crate::authz::internal;
use crate::bulletin::Bulletin;
use crate::ca::{self, Authorities, LoadError, Port, Roll, RolloverError, SignError};
use crate::changes::{ChangeError, Changes};
use crate::enrolment::issue::agent_certificate_due;
use crate::errors::chain;
use crate::ledger::{Generator, LedgerError};
use crate::live_keyrings::LiveKeyrings;
use crate::trail::Intent;

/// Rollovers that may be due at once: a root is prepared, one is activated, an
/// issuing CA is made.
const STEPS: usize = 3;

/// Why a CA was not replaced; the old one stays in use.
#[derive(Debug, thiserror::Error)]
pub enum RollError {
    /// The change was refused or failed.
    #[error("cannot make the next generation of the fleet CA")]
    Change(#[source] Box<ChangeError<RolloverError>>),
    /// What the store has cannot be read.
    #[error(transparent)]
    Load(#[from] LoadError),
    /// What the store has cannot be put into use.
    #[error("the fleet CA of the store cannot be used")]
    Use(#[from] OwnCertificateError),
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

/// The roots that each port trusts.
pub struct PortRoots {
    /// Data: a leaf's life after a root was replaced.
    pub data: Arc<Roots>,
    /// Enrolment: as long as a node that was off may come back.
    pub enrolment: Arc<Roots>,
    /// Admin: an admin's certificate's life.
    pub admin: Arc<Roots>,
}

impl PortRoots {
    fn new(authorities: &Authorities, now: SystemTime) -> Result<Self, RootsError> {
        let roots = |port| Roots::new(ders(&authorities.trusted_roots(port, now))).map(Arc::new);
        Ok(Self { data: roots(Port::Data)?, enrolment: roots(Port::Enrolment)?, admin: roots(Port::Admin)? })
    }

    fn follow(&self, authorities: &Authorities, now: SystemTime) -> Result<(), RootsError> {
        let ports =
            [(&self.data, Port::Data), (&self.enrolment, Port::Enrolment), (&self.admin, Port::Admin)];
        for (roots, port) in ports {
            let wanted = ders(&authorities.trusted_roots(port, now));
            if roots.certificates() != wanted {
                roots.replace(wanted)?;
                tracing::info!(?port, "the roots that this port trusts have changed");
            }
        }
        Ok(())
    }
}

/// The fleet CA in use.
pub struct FleetCa {
    authorities: Arc<ArcSwap<Authorities>>,
    roots: PortRoots,
    bulletin: Arc<Bulletin>,
    own: Arc<OwnCertificate>,
    store: CaStore,
    /// One rollover of this agent at a time.
    turn: tokio::sync::Mutex<()>,
}

/// Where the CA is kept, and what opens and seals its keys.
#[derive(Clone)]
pub struct CaStore {
    /// Makes changes.
    pub changes: Arc<Changes>,
    /// Opens and seals keys.
    pub keyrings: Arc<LiveKeyrings>,
    /// Makes keys.
    pub generator: Generator,
}

impl FleetCa {
    /// Reads the CA, renews what is due (unless the store is unconfirmed), and
    /// makes the certificate of the agent `own_id`.
    ///
    /// # Errors
    ///
    /// When it cannot be read or used, or what is due cannot be renewed.
    pub async fn open(
        store: CaStore,
        own_id: SpiffeId,
        agents: Vec<fleet_kms_proto::agent::AgentAddress>,
    ) -> Result<Self, RollError> {
        let now = store.changes.now();
        let mut authorities = store.load(&own_id).await?;
        for _ in 0..STEPS {
            let Some(what) = authorities.due(now).filter(|_| store.changes.unconfirmed().is_none()) else {
                break;
            };
            authorities = store.roll(&own_id, what, by_itself(what)).await?;
        }
        let roots = PortRoots::new(&authorities, now).map_err(OwnCertificateError::from)?;
        let own = OwnCertificate::new(own_id, &authorities, now, store.generator)?;
        let bulletin = Bulletin::new(agents, authorities.trusted_roots(Port::Enrolment, now));
        Ok(Self {
            authorities: Arc::new(ArcSwap::from_pointee(authorities)),
            roots,
            bulletin: Arc::new(bulletin),
            own: Arc::new(own),
            store,
            turn: tokio::sync::Mutex::default(),
        })
    }

    /// Returns the CAs in use, for whoever issues.
    pub fn live(&self) -> &Arc<ArcSwap<Authorities>> {
        &self.authorities
    }

    /// Returns the roots that the ports trust.
    pub fn roots(&self) -> &PortRoots {
        &self.roots
    }

    /// Returns what nodes are told.
    pub fn bulletin(&self) -> &Arc<Bulletin> {
        &self.bulletin
    }

    /// Returns the agent's own certificate.
    pub fn own(&self) -> &Arc<OwnCertificate> {
        &self.own
    }

    /// Replaces CAs and puts the new ones into use.
    ///
    /// # Errors
    ///
    /// When store or audit say no, or a limit does; the old ones stay in use.
    pub async fn roll(&self, what: Roll, intent: Intent) -> Result<(), RollError> {
        let _turn = self.turn.lock().await;
        let authorities = self.store.roll(&self.own.id, what, intent).await?;
        self.adopt(authorities)
    }

    /// Does what is due, and follows what another agent did or what became of a
    /// change whose reply was lost.
    pub async fn renew(&self) {
        if let Err(error) = self.try_renew().await {
            tracing::error!(error = chain(&error), "the fleet CA cannot be renewed; it is tried again");
        }
    }

    async fn try_renew(&self) -> Result<(), RollError> {
        let _turn = self.turn.lock().await;
        let found = ca::revisions(self.store.changes.ledger()).await.map_err(LedgerError::from);
        if found.map_err(LoadError::from)? != *self.authorities.load().revisions() {
            self.adopt(self.store.load(&self.own.id).await?)?;
        }
        for _ in 0..STEPS {
            let Some(what) = self.authorities.load().due(self.store.changes.now()) else { return Ok(()) };
            let authorities = self.store.roll(&self.own.id, what, by_itself(what)).await?;
            self.adopt(authorities)?;
        }
        Ok(())
    }

    /// Follows the dates: which roots are still trusted, and whether the agent's
    /// own certificate is due. Reads no store.
    pub fn follow_dates(&self) {
        let (authorities, now) = (self.authorities.load_full(), self.store.changes.now());
        if let Err(error) = self.roots.follow(&authorities, now) {
            tracing::error!(error = chain(&error), "the trusted roots cannot be changed");
        }
        self.bulletin.set_roots(authorities.trusted_roots(Port::Enrolment, now));
        if !agent_certificate_due(self.own.live.certificate().not_after(), now) {
            return;
        }
        match self.own.renew(&authorities, now) {
            Ok(()) => tracing::info!("renewed the agent's own certificate"),
            Err(error) => {
                tracing::error!(error = chain(&error), "the agent's own certificate cannot be renewed");
            }
        }
    }

    fn adopt(&self, authorities: Authorities) -> Result<(), RollError> {
        let now = self.store.changes.now();
        self.roots.follow(&authorities, now).map_err(OwnCertificateError::from)?;
        self.bulletin.set_roots(authorities.trusted_roots(Port::Enrolment, now));
        let authorities = Arc::new(authorities);
        self.authorities.store(Arc::clone(&authorities));
        Ok(self.own.renew(&authorities, now)?)
    }
}

impl CaStore {
    async fn load(&self, own_id: &SpiffeId) -> Result<Authorities, LoadError> {
        let open = |row: &_, bytes: &_| self.keyrings.open_ca_key(&internal::authority(), row, bytes);
        Authorities::load(self.changes.ledger(), own_id.trust_domain.clone(), open).await
    }

    /// Makes the next generation, unless another agent was first, and loads what
    /// is active then.
    async fn roll(&self, own_id: &SpiffeId, what: Roll, intent: Intent) -> Result<Authorities, RollError> {
        let permit = internal::authority();
        let open = |row: &_, bytes: &_| self.keyrings.open_ca_key(&permit, row, bytes);
        let seal = |row: &_, key: &_| self.keyrings.seal_ca_key(&permit, row, key);
        let domain = &own_id.trust_domain;
        match ca::roll(&self.changes, domain, (what, intent), open, seal, self.generator).await {
            Ok(()) => tracing::info!(?what, "made the next generation of the fleet CA"),
            Err(ChangeError::Refused(RolloverError::NotDue)) => {}
            Err(error) => return Err(RollError::Change(Box::new(error))),
        }
        Ok(self.load(own_id).await?)
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
        now: SystemTime,
        generator: Generator,
    ) -> Result<Self, OwnCertificateError> {
        let (chain, key) = own_chain(&id, authorities, now, generator)?;
        Ok(Self { id, live: Arc::new(LiveIdentity::new(chain, &key)?), generator })
    }

    /// Returns what TLS serves with.
    pub fn live(&self) -> &Arc<LiveIdentity> {
        &self.live
    }

    /// Makes a new certificate with a new key; on an error the old one stays.
    fn renew(&self, authorities: &Authorities, now: SystemTime) -> Result<(), OwnCertificateError> {
        let (chain, key) = own_chain(&self.id, authorities, now, self.generator)?;
        Ok(self.live.replace(chain, &key)?)
    }
}

/// Makes a certificate for the agent; the roots go along, because a node that
/// enrols knows one by its fingerprint only.
fn own_chain(
    id: &SpiffeId,
    authorities: &Authorities,
    now: SystemTime,
    generator: Generator,
) -> Result<(Vec<CertificateDer<'static>>, KeyPair), OwnCertificateError> {
    let key = KeyPair::generate()?;
    let mut random = [0; 8];
    generator().fill_bytes(&mut random);
    // Issue number 0: no row of the store counts agents' certificates.
    let serial = Serial::new(0, random).expect("0 is an issue number");
    let leaf = authorities.issue(id, &serial, &key.spki_der(), now)?;
    let mut chain = ders(&leaf.chain);
    chain.extend(ders(&authorities.shown_roots(now)));
    Ok((chain, key))
}

/// What the audit says of a rollover that nobody asked for.
fn by_itself(what: Roll) -> Intent {
    Intent::new(what.action(), "agent")
}

fn ders(certificates: &[Vec<u8>]) -> Vec<CertificateDer<'static>> {
    certificates.iter().map(|der| CertificateDer::from(der.clone())).collect()
}
