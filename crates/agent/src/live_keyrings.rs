//! The keyrings in memory: immutable snapshots, one writer, no lock and no
//! store on the way of a call.
//!
//! This is the only module that holds the store key, and the only place where
//! data plane and control plane meet. Each function takes a permit and the
//! cluster from it, never as an argument. KEKs stay sealed in a snapshot; a
//! call opens the one it needs, uses it and wipes it.

use std::collections::{HashMap, HashSet};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::SystemTime;

use arc_swap::{ArcSwap, ArcSwapOption};
use fleet_kms_keyring::sealed::Kind;
use fleet_kms_keyring::wrapped_dek::{self, Header, WrapError as DekError, WrappedDek};
use fleet_kms_keyring::{ClusterId, Kek, KeyId, Keyring, State, UnwrapRefused, Version, WrapRefused};
use fleet_kms_store::{Revision, RowName};
use zeroize::Zeroizing;

use crate::authz::{Action, FleetPermit, Permit, actions};
use crate::ledger::Generator;
use crate::records::rows;

mod epochs;
mod load;
mod store_keys;
mod wraps;

pub use epochs::{NextEpoch, SlotSealError};
pub use load::{DamagedKek, Held, LoadError, Reloaded, unopened_rows};
pub use store_keys::StoreKeys;
pub use wraps::WrapCounts;
use wraps::Wraps;

/// A KEK as it is stored: sealed under the store key, bound to its row.
#[derive(Debug, Clone)]
pub struct SealedKek {
    /// The row that it is bound to.
    pub row: RowName,
    /// The sealed blob.
    pub bytes: Vec<u8>,
}

/// One cluster's keyring at one revision. Never changed, only replaced.
pub struct Snapshot {
    /// The keyring record's revision.
    pub revision: Revision,
    /// Versions and states.
    pub keyring: Keyring,
    /// The KEKs of every version that is not destroyed.
    pub keks: HashMap<Version, SealedKek>,
}

/// One cluster in memory.
pub struct LiveCluster {
    snapshot: ArcSwap<Snapshot>,
    reread: load::Reread,
    wraps: Wraps,
}

/// A DEK, wrapped.
#[derive(Debug)]
pub struct Wrapped {
    /// The wrapped DEK.
    pub bytes: Vec<u8>,
    /// Under which version.
    pub header: Header,
}

/// A DEK, unwrapped.
pub struct Unwrapped {
    /// The DEK.
    pub dek: Zeroizing<Vec<u8>>,
    /// Under which version it was wrapped.
    pub version: Version,
    /// It was wrapped under what this store thinks is still to come: the store
    /// is older than the data.
    pub under_next: bool,
}

/// Why a DEK was not wrapped.
#[derive(Debug, thiserror::Error)]
pub enum WrapError {
    /// Empty, or longer than [`wrapped_dek::MAX_DEK`].
    #[error(transparent)]
    Dek(#[from] DekError),
    /// The version cannot be used.
    #[error(transparent)]
    Version(#[from] WrapRefused),
    /// The keys cannot be used at all.
    #[error(transparent)]
    Keys(#[from] KeysError),
}

/// Why the keys of a cluster cannot be used.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum KeysError {
    /// `kms-agent lock` wiped the store key.
    #[error("the agent is locked; unlock it by a restart")]
    Locked,
    /// The cluster was removed, or this agent has not seen it yet.
    #[error("the cluster is not known to this agent")]
    UnknownCluster,
    /// A stored KEK does not open, or the cluster's keyring is damaged.
    #[error("a stored key does not open: the store is damaged; see the agent's log")]
    Damaged,
}

/// Why a wrapped DEK was not unwrapped. Told apart in the audit; the caller
/// reads one text for all but the last three.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum UnwrapError {
    /// Not a wrapped DEK of a known format.
    #[error("malformed")]
    Malformed,
    /// No version of the caller's cluster has this key id.
    #[error("unknown key id")]
    UnknownKey,
    /// Another cluster of this fleet has this key id.
    #[error("another cluster's key id")]
    Foreign,
    /// The header is ours, the rest does not open.
    #[error("altered")]
    Altered,
    /// An operator disabled the version.
    #[error("version disabled")]
    Disabled,
    /// The version is destroyed.
    #[error("version destroyed")]
    Destroyed,
    /// The keys cannot be used at all.
    #[error(transparent)]
    Keys(#[from] KeysError),
}

/// Actions that make KEKs.
pub trait MakesKeks: Action {}
impl MakesKeks for actions::ClusterCreate {}
impl MakesKeks for actions::KeyRotate {}
impl MakesKeks for actions::ScheduledRotation {}
impl MakesKeks for actions::Recovery {}

/// All keyrings of the store.
pub struct LiveKeyrings {
    store_keys: ArcSwapOption<StoreKeys>,
    clusters: ArcSwap<HashMap<ClusterId, Arc<LiveCluster>>>,
    /// Whose each key id is, to tell a foreign one from one that nobody has
    /// without a look at every cluster. Only refusals read it; nothing leaves it.
    owners: RwLock<HashMap<KeyId, ClusterId>>,
    /// Clusters whose keyring record is damaged.
    damaged: HashSet<ClusterId>,
    generator: Generator,
}

impl LiveKeyrings {
    /// Wraps a DEK under the cluster's active version, or under the named one
    /// if it was active within the last five minutes.
    ///
    /// # Errors
    ///
    /// See [`WrapError`].
    pub fn wrap(
        &self,
        permit: &Permit<actions::Wrap>,
        named: Option<&KeyId>,
        dek: &[u8],
        now: SystemTime,
    ) -> Result<Wrapped, WrapError> {
        let live = self.live(permit.cluster())?;
        let snapshot = live.snapshot.load_full();
        let version = snapshot.keyring.for_wrap(named, now)?;
        let header = Header { version: version.version, key_id: version.key_id };
        let kek = self.open(&snapshot, header.version)?;
        let bytes = wrapped_dek::wrap(&kek, header, &permit.cluster(), dek, &mut *(self.generator)())?;
        live.wraps.count(header.version, 1);
        Ok(Wrapped { bytes, header })
    }

    /// Unwraps a DEK.
    ///
    /// # Errors
    ///
    /// See [`UnwrapError`]. After `UnknownKey` the caller reads the store
    /// again by [`Self::refresh`] and tries once more.
    pub fn unwrap(&self, permit: &Permit<actions::Unwrap>, wrapped: &[u8]) -> Result<Unwrapped, UnwrapError> {
        let snapshot = self.snapshot(permit.cluster())?;
        let wrapped = WrappedDek::parse(wrapped).map_err(|_| UnwrapError::Malformed)?;
        let version = snapshot.keyring.for_unwrap(&wrapped.header()).map_err(|refused| match refused {
            UnwrapRefused::UnknownKeyId => self.unknown(&permit.cluster(), &wrapped.header().key_id),
            UnwrapRefused::VersionMismatch => UnwrapError::Altered,
            UnwrapRefused::Disabled { .. } => UnwrapError::Disabled,
            UnwrapRefused::Destroyed { .. } => UnwrapError::Destroyed,
        })?;
        let kek = self.open(&snapshot, version.version)?;
        let dek = wrapped_dek::unwrap(&kek, &permit.cluster(), &wrapped).map_err(|_| UnwrapError::Altered)?;
        Ok(Unwrapped { dek, version: version.version, under_next: version.state == State::Next })
    }

    /// Returns the active version.
    ///
    /// # Errors
    ///
    /// When the cluster is unknown.
    pub fn active(&self, permit: &Permit<actions::Status>) -> Result<Header, KeysError> {
        let snapshot = self.snapshot(permit.cluster())?;
        let active = snapshot.keyring.active();
        Ok(Header { version: active.version, key_id: active.key_id })
    }

    /// Makes the KEK of a version and seals it; the caller stores it. It is
    /// used by nobody before [`Self::publish`].
    ///
    /// # Errors
    ///
    /// When the agent is locked.
    pub fn make_kek<A: MakesKeks>(
        &self,
        permit: &Permit<A>,
        version: Version,
    ) -> Result<SealedKek, KeysError> {
        let keys = self.store_keys()?;
        let row = rows::kek(&permit.cluster(), version);
        let mut rng = (self.generator)();
        let kek = Kek::generate(&mut *rng);
        let bytes = keys.seal_kek(&row, &kek, &mut *rng);
        Ok(SealedKek { row, bytes })
    }

    /// Makes a committed snapshot visible to the next call. Called only after
    /// the transaction is durable.
    pub fn publish(&self, cluster: ClusterId, snapshot: Snapshot) {
        let snapshot = Arc::new(snapshot);
        if self.clusters.load().get(&cluster).is_none() {
            let new = Arc::new(LiveCluster::new(Arc::clone(&snapshot), WrapCounts::default()));
            self.clusters.rcu(|clusters| {
                let mut clusters = HashMap::clone(clusters);
                clusters.entry(cluster).or_insert_with(|| Arc::clone(&new));
                clusters
            });
        }
        // Also after an insert: another snapshot of the same cluster may have got in first.
        if let Some(live) = self.clusters.load().get(&cluster) {
            live.replace(Arc::clone(&snapshot));
        }
        // Last of all: before, a caller's own new key id would be taken for another's.
        let mut owners = self.owners.write().unwrap_or_else(PoisonError::into_inner);
        owners.extend(snapshot.keyring.versions().iter().map(|version| (version.key_id, cluster)));
    }

    /// Opens a CA's private key.
    ///
    /// # Errors
    ///
    /// When the agent is locked or the row is damaged.
    pub fn open_ca_key(
        &self,
        _permit: &FleetPermit<actions::Authority>,
        row: &RowName,
        bytes: &[u8],
    ) -> Result<Zeroizing<Vec<u8>>, KeysError> {
        self.store_keys()?.open(row, Kind::CaKey, bytes)
    }

    /// Seals a CA's private key for its row.
    ///
    /// # Errors
    ///
    /// When the agent is locked.
    pub fn seal_ca_key(
        &self,
        _permit: &FleetPermit<actions::Authority>,
        row: &RowName,
        key: &[u8],
    ) -> Result<Vec<u8>, KeysError> {
        Ok(self.store_keys()?.seal(row, Kind::CaKey, key, &mut *(self.generator)()))
    }

    /// Wipes the store key. No key is usable from the next call on.
    pub fn lock(&self) {
        self.store_keys.store(None);
    }

    /// Says whether the store key was wiped.
    pub fn is_locked(&self) -> bool {
        self.store_keys.load().is_none()
    }

    /// Returns every cluster's keyring: versions and states, no key.
    pub fn keyrings(&self) -> Vec<(ClusterId, Arc<Snapshot>)> {
        self.clusters.load().iter().map(|(id, live)| (*id, live.snapshot.load_full())).collect()
    }

    /// Returns one cluster's keyring: versions and states, no key.
    pub fn keyring(&self, cluster: &ClusterId) -> Option<Arc<Snapshot>> {
        self.clusters.load().get(cluster).map(|live| live.snapshot.load_full())
    }

    fn snapshot(&self, cluster: ClusterId) -> Result<Arc<Snapshot>, KeysError> {
        self.keyring(&cluster).ok_or_else(|| self.missing(&cluster))
    }

    fn live(&self, cluster: ClusterId) -> Result<Arc<LiveCluster>, KeysError> {
        self.clusters.load().get(&cluster).cloned().ok_or_else(|| self.missing(&cluster))
    }

    fn missing(&self, cluster: &ClusterId) -> KeysError {
        if self.damaged.contains(cluster) { KeysError::Damaged } else { KeysError::UnknownCluster }
    }

    fn open(&self, snapshot: &Snapshot, version: Version) -> Result<Kek, KeysError> {
        let keys = self.store_keys.load();
        let keys = keys.as_deref().ok_or(KeysError::Locked)?;
        let kek = snapshot.keks.get(&version).ok_or(KeysError::Damaged)?;
        keys.open_kek(kek)
    }

    fn store_keys(&self) -> Result<Arc<StoreKeys>, KeysError> {
        self.store_keys.load_full().ok_or(KeysError::Locked)
    }

    /// Tells another cluster's key id from one that nobody has, for the audit.
    fn unknown(&self, caller: &ClusterId, key_id: &KeyId) -> UnwrapError {
        let owners = self.owners.read().unwrap_or_else(PoisonError::into_inner);
        let foreign = owners.get(key_id).is_some_and(|owner| owner != caller);
        if foreign { UnwrapError::Foreign } else { UnwrapError::UnknownKey }
    }
}

impl LiveCluster {
    fn new(snapshot: Arc<Snapshot>, wraps: WrapCounts) -> Self {
        Self {
            snapshot: ArcSwap::new(snapshot),
            reread: load::Reread::default(),
            wraps: Wraps::from_flushed(wraps),
        }
    }

    /// Takes a snapshot unless it is older than the one there.
    fn replace(&self, snapshot: Arc<Snapshot>) {
        self.snapshot.rcu(|current| {
            Arc::clone(if current.revision < snapshot.revision { &snapshot } else { current })
        });
    }
}
