//! What the tests of CA and enrolment stand on: a store in memory, a real CA in
//! it, a real audit beside it, and a clock that they set.

use std::net::IpAddr;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, SystemTime};

use arc_swap::ArcSwap;
use fleet_kms_audit::ChangeLog;
use fleet_kms_identity::{Certificate, Csr, JoinToken, KeyPair, Serial, SpiffeId, Standing};
use fleet_kms_keyring::sealed::{self, Kind, SealContext, SealKey};
use fleet_kms_keyring::{ClusterId, StoreId};
use fleet_kms_seal::LockedKey;
use fleet_kms_store::contract::Flaky;
use fleet_kms_store::{MemoryStore, Revision, RowName, Store};
use fleet_kms_transport::{Clock, PeerInfo};
use tempfile::TempDir;
use zeroize::Zeroizing;

use super::issue::{Certified, EnrolError, Issuer, Join, MAX_OFFLINE, RenewError};
use super::tokens::{self, DEFAULT_LIFE, TokenTerms};
use crate::authz::{Denied, Permit, Policy, Scope, actions};
use crate::ca::{self, Authorities};
use crate::caller::Caller;
use crate::changes::{Changes, Unconfirmed};
use crate::identities::{Issued, LiveIdentities, LiveIdentity};
use crate::ledger::Ledger;
use crate::records::payload::{ClusterRecord, IdentityRecord};
use crate::records::{Codec, Payload, rows};
use crate::times::{from_ms, to_ms};
use crate::trail::Intent;
use crate::witness::Witness;

pub(crate) const CLUSTER: ClusterId = ClusterId::from_bytes([7; 16]);
const STORE: StoreId = StoreId::from_bytes([5; 16]);
const EPOCH: u32 = 1;
const START: u64 = 1_800_000_000_000;
pub(crate) const DAY: Duration = Duration::from_secs(86_400);

pub(crate) struct Rig {
    directory: TempDir,
    clock: Arc<AtomicU64>,
    pub(crate) store: Arc<Flaky>,
    pub(crate) changes: Arc<Changes>,
    pub(crate) authorities: Arc<ArcSwap<Authorities>>,
    pub(crate) identities: Arc<LiveIdentities>,
    pub(crate) issuer: Arc<Issuer>,
    pub(crate) policy: Arc<Policy>,
}

pub(crate) fn generator() -> Box<dyn rand_core::CryptoRng + Send> {
    Box::new(rand_core::UnwrapErr(getrandom::SysRng))
}

fn locked(byte: u8) -> LockedKey {
    LockedKey::from_zeroizing(Zeroizing::new([byte; 32]))
}

fn context(row: &RowName) -> SealContext<'_> {
    SealContext { store: STORE, row: row.as_bytes(), kind: Kind::CaKey, epoch: EPOCH }
}

pub(crate) fn seal(row: &RowName, key: &[u8]) -> Result<Vec<u8>, std::convert::Infallible> {
    Ok(sealed::seal(&SealKey::from_bytes(&mut [9; 32]), &context(row), key, &mut *generator()))
}

pub(crate) fn open(row: &RowName, bytes: &[u8]) -> Result<Zeroizing<Vec<u8>>, sealed::OpenError> {
    sealed::open(&SealKey::from_bytes(&mut [9; 32]), &context(row), bytes)
}

impl Rig {
    pub(crate) async fn new() -> Self {
        let directory = TempDir::new().unwrap();
        let clock = Arc::new(AtomicU64::new(START));
        let store = Arc::new(Flaky::new(Arc::new(MemoryStore::new())));
        let changes = Arc::new(changes(directory.path(), &store, &clock).await);
        let made = ca::create(&"fleet.test".parse().unwrap(), changes.now(), &mut *generator()).unwrap();
        let prepare = || async {
            let mut changeset = changes.ledger().changeset();
            made.write_to(&mut changeset, seal)?;
            let cluster = ClusterRecord {
                id: CLUSTER.as_bytes().to_vec(),
                name: "edge-1".to_owned(),
                created_ms: START,
                retired_ms: 0,
            };
            changeset.insert(rows::cluster(&CLUSTER), &cluster);
            Ok::<_, std::convert::Infallible>((changeset, ()))
        };
        changes.run(Intent::new("init", "init"), prepare).await.unwrap();
        let authorities = load(changes.ledger()).await.unwrap();
        Self::over(directory, clock, store, changes, authorities)
    }

    fn over(
        directory: TempDir,
        clock: Arc<AtomicU64>,
        store: Arc<Flaky>,
        changes: Arc<Changes>,
        authorities: Authorities,
    ) -> Self {
        let authorities = Arc::new(ArcSwap::from_pointee(authorities));
        let identities = Arc::new(LiveIdentities::default());
        let issuer = Issuer::new(
            Arc::clone(&changes),
            Arc::clone(&authorities),
            Arc::clone(&identities),
            generator,
            MAX_OFFLINE,
        );
        let policy = Arc::new(Policy::new(Arc::clone(&identities)));
        Self { directory, clock, store, changes, authorities, identities, issuer: Arc::new(issuer), policy }
    }

    pub(crate) fn now(&self) -> SystemTime {
        from_ms(self.clock.load(Ordering::SeqCst))
    }

    pub(crate) fn pass(&self, time: Duration) {
        self.set(self.now() + time);
    }

    pub(crate) fn set(&self, now: SystemTime) {
        self.clock.store(to_ms(now), Ordering::SeqCst);
    }

    /// All lines of the chain of changes.
    pub(crate) fn audit(&self) -> String {
        let files = std::fs::read_dir(self.directory.path()).unwrap().map(|file| file.unwrap().path());
        let lines = files.filter(|path| path.extension().is_some_and(|extension| extension == "jsonl"));
        lines.map(|path| std::fs::read_to_string(path).unwrap()).collect()
    }

    pub(crate) async fn read<P: Payload>(&self, row: RowName) -> Option<P> {
        self.changes.ledger().read::<P>(&row).await.unwrap().map(|record| record.payload)
    }

    /// Rewrites a record behind everybody's back, as another agent would.
    pub(crate) async fn edit<P: Payload + Sync + Send>(
        &self,
        row: RowName,
        edit: impl Fn(&mut P) + Sync + Send,
    ) {
        let prepare = || async {
            let mut changeset = self.changes.ledger().changeset();
            let record = self.changes.ledger().read::<P>(&row).await?.unwrap();
            let mut payload = record.payload.clone();
            edit(&mut payload);
            changeset.update(&record, &payload);
            Ok::<_, crate::ledger::LedgerError>((changeset, ()))
        };
        self.changes.run(Intent::new("edit", "test"), prepare).await.unwrap();
    }

    /// Makes this agent's memory lose an identity, as if another agent had
    /// issued it.
    pub(crate) fn forget(&self, id: &SpiffeId) {
        let known = self.identities.find(id).unwrap();
        self.identities.remove(id, known.revision);
    }

    pub(crate) async fn identity(&self, id: &SpiffeId) -> IdentityRecord {
        self.read(rows::identity(id)).await.unwrap()
    }

    pub(crate) async fn ban(&self, id: &SpiffeId) {
        self.edit(rows::identity(id), |record: &mut IdentityRecord| record.banned_ms = START).await;
        self.issuer.refresh(id).await.unwrap();
    }

    pub(crate) async fn token_with(&self, terms: TokenTerms) -> JoinToken {
        let authorities = self.authorities.load_full();
        tokens::create(&self.changes, &authorities, &terms, ("admin", None), &mut *generator())
            .await
            .unwrap()
            .token
    }

    /// A token for one use, bound to `node` or, when that is empty, to none.
    pub(crate) async fn token(&self, node: &str) -> JoinToken {
        let node = (!node.is_empty()).then_some(node);
        self.token_with(TokenTerms::new(CLUSTER, node, None, None, 1, DEFAULT_LIFE).unwrap()).await
    }

    pub(crate) fn join(token: &JoinToken, key: &KeyPair, node: &str) -> Join {
        Self::join_from(token, key, node, "192.0.2.1")
    }

    pub(crate) fn join_from(token: &JoinToken, key: &KeyPair, node: &str, address: &str) -> Join {
        let address: IpAddr = address.parse().unwrap();
        Join::parse(&secret(token), &key.csr_der().unwrap(), node.to_owned(), address).unwrap()
    }

    /// Enrols `node` with a token of its own.
    pub(crate) async fn enrol(&self, node: &str, key: &KeyPair) -> Result<Certificate, EnrolError> {
        let token = self.token(node).await;
        self.issuer.enrol(&Self::join(&token, key, "")).await.map(|certified| leaf(&certified))
    }

    /// The certificate that an agent makes for itself.
    pub(crate) fn agent_chain(&self, name: &str, key: &KeyPair) -> Vec<Vec<u8>> {
        let id = format!("spiffe://fleet.test/agent/{name}").parse().unwrap();
        let serial = Serial::new(0, [1; 8]).unwrap();
        self.authorities.load().issue(&id, &serial, &key.spki_der(), self.now()).unwrap().chain
    }

    /// What the connection that shows this certificate is permitted to renew.
    pub(crate) fn permit(&self, shown: &Certificate) -> Result<Permit<actions::Renew>, Denied> {
        self.policy.permit(&self.caller(shown))
    }

    pub(crate) fn caller(&self, shown: &Certificate) -> Caller {
        Caller::from_peer(&Arc::new(self.peer(Some(shown)))).unwrap()
    }

    pub(crate) fn peer(&self, shown: Option<&Certificate>) -> PeerInfo {
        PeerInfo {
            certificate: shown.cloned(),
            standing: shown.map_or(Standing::Valid, |shown| shown.judge(self.now())),
            address: "192.0.2.1:40000".parse().unwrap(),
        }
    }

    /// Renews by the store alone: the permit is taken as given by an agent
    /// whose memory knows nothing of what happened since.
    pub(crate) async fn renew(&self, shown: &Certificate, key: &KeyPair) -> Result<Certificate, RenewError> {
        let csr = Csr::from_der(&key.csr_der().unwrap()).unwrap();
        let stale = LiveIdentities::default();
        stale.publish(LiveIdentity {
            readopted: None,
            id: shown.id().clone(),
            revision: Revision::ABSENT,
            current: Some(Issued {
                serial: shown.serial(),
                spki_sha256: *shown.spki_sha256(),
                not_after: shown.not_after(),
            }),
            next: None,
            banned: false,
            roles: Vec::new(),
            scope: Scope::All,
        });
        let permit = Policy::new(Arc::new(stale)).permit(&self.caller(shown)).unwrap();
        self.issuer.renew(&permit, shown, &csr).await.map(|certified| leaf(&certified))
    }
}

/// What a node sends of a token: the first 32 bytes behind its prefix.
pub(crate) fn secret(token: &JoinToken) -> Vec<u8> {
    let text = token.to_text();
    let bytes = data_encoding::BASE64URL_NOPAD.decode(text.split_once('.').unwrap().1.as_bytes());
    bytes.unwrap()[..32].to_vec()
}

/// The certificate that a node reads off a chain.
pub(crate) fn leaf(certified: &Certified) -> Certificate {
    Certificate::from_der(&certified.chain[0]).unwrap()
}

pub(crate) async fn load(ledger: &Ledger) -> Result<Authorities, ca::LoadError> {
    Authorities::load(ledger, "fleet.test".parse().unwrap(), open).await
}

async fn changes(directory: &Path, store: &Arc<Flaky>, clock: &Arc<AtomicU64>) -> Changes {
    let clock = Arc::clone(clock);
    let clock = Arc::new(move || from_ms(clock.load(Ordering::SeqCst)));
    changes_over(directory, Arc::<Flaky>::clone(store), clock, None).await
}

/// Changes over a store that no operator has confirmed.
pub(crate) async fn unconfirmed_changes(directory: &Path, store: Arc<dyn Store>) -> Changes {
    changes_over(directory, store, Arc::new(|| from_ms(START)), Some(Unconfirmed::Edited)).await
}

async fn changes_over(
    directory: &Path,
    shared: Arc<dyn Store>,
    clock: Clock,
    unconfirmed: Option<Unconfirmed>,
) -> Changes {
    let codec = || Codec::new(STORE, EPOCH, locked(1));
    Ledger::create(&*shared, codec(), locked(2), Vec::new(), generator).await.unwrap();
    let ledger = Ledger::open(shared, codec(), locked(2), "agent-1".to_owned(), generator).await.unwrap();
    let log = ChangeLog::open(directory).unwrap();
    Changes::new(Arc::new(ledger), log, Witness::new(directory), unconfirmed, clock, generator)
}
