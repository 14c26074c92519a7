//! Reading keyrings from the store: all at start, one when its caller names a
//! key id that is not in memory.

use std::collections::HashMap;
use std::sync::{Arc, RwLock};
use std::time::{Duration, Instant};

use arc_swap::{ArcSwap, ArcSwapOption};
use fleet_kms_keyring::sealed::Kind;
use fleet_kms_keyring::{ClusterId, Keyring, State, Version};
use fleet_kms_store::{ReadError, Row, RowName};

use super::{KeysError, LiveCluster, LiveKeyrings, SealedKek, Snapshot, StoreKeys, WrapCounts};
use crate::authz::{FleetPermit, Permit, actions};
use crate::ledger::{Generator, Ledger, LedgerError};
use crate::records::keyring::{self, KeyringError};
use crate::records::payload::{KeyringRecord, WrapsRecord};
use crate::records::{Record, rows};
use crate::wraps;

/// A cluster's keyring is read again at most this often for unknown key ids.
const REREAD_EVERY: Duration = Duration::from_secs(1);

/// Why keyrings could not be read.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// The store cannot be read, or a record is damaged.
    #[error(transparent)]
    Ledger(#[from] LedgerError),
    /// A keyring record contradicts itself.
    #[error(transparent)]
    Keyring(#[from] KeyringError),
    /// The keys cannot be used.
    #[error(transparent)]
    Keys(#[from] KeysError),
}

impl From<ReadError> for LoadError {
    fn from(error: ReadError) -> Self {
        Self::Ledger(error.into())
    }
}

/// What reading a cluster again did.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reloaded {
    /// Memory holds something newer now.
    Newer,
    /// Memory was up to date, or the last look was under a second ago.
    Unchanged,
}

/// When the cluster was last read again. Held while it is read: callers that
/// come meanwhile wait for what it finds.
#[derive(Default)]
pub(super) struct Reread(tokio::sync::Mutex<Option<Instant>>);

/// What a copy of the store holds.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Held {
    /// The highest version of each cluster.
    pub highest: Vec<(ClusterId, Version)>,
    /// How many versions that are not destroyed.
    pub versions: usize,
}

/// A KEK that did not open at start.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DamagedKek {
    /// Whose it is.
    pub cluster: ClusterId,
    /// Which version.
    pub version: Version,
}

impl LiveKeyrings {
    /// Reads every keyring and opens every KEK once. A KEK that does not open
    /// is read again; if it still does not, it is reported and the rest serves.
    /// So is a keyring record that is damaged.
    ///
    /// # Errors
    ///
    /// When the store cannot be read or a record has no meaning to this
    /// release.
    pub async fn load(
        ledger: &Ledger,
        store_keys: StoreKeys,
        generator: Generator,
    ) -> Result<(Self, Vec<DamagedKek>), LoadError> {
        let mut clusters = HashMap::new();
        let mut damaged = Vec::new();
        let mut wraps = scan_wraps(ledger).await?;
        for (id, mut snapshot) in read_all(ledger).await? {
            for version in unopened(&snapshot, &store_keys) {
                if !reread(ledger, &mut snapshot, &store_keys, id, version).await? {
                    damaged.push(DamagedKek { cluster: id, version });
                }
            }
            let wraps = wraps.remove(&rows::wraps(&id)).unwrap_or_default();
            clusters.insert(id, Arc::new(LiveCluster::new(Arc::new(snapshot), wraps)));
        }
        let owners = clusters.iter().flat_map(|(id, live): (&ClusterId, &Arc<LiveCluster>)| {
            let snapshot = live.snapshot.load_full();
            snapshot.keyring.versions().iter().map(|version| (version.key_id, *id)).collect::<Vec<_>>()
        });
        let owners = RwLock::new(owners.collect());
        let live = Self {
            store_keys: ArcSwapOption::from_pointee(store_keys),
            clusters: ArcSwap::from_pointee(clusters),
            owners,
            damaged: ledger.damaged().iter().filter_map(cluster_of_keyring).collect(),
            generator,
        };
        Ok((live, damaged))
    }

    /// Opens every version of a copy of this store.
    ///
    /// # Errors
    ///
    /// When the agent is locked, or the copy cannot be read.
    pub async fn open_copy(
        &self,
        _permit: &FleetPermit<actions::Backup>,
        copy: &Ledger,
    ) -> Result<(Held, Vec<DamagedKek>), LoadError> {
        let mut held = Held::default();
        let mut damaged = Vec::new();
        for (id, snapshot) in read_all(copy).await? {
            let store_keys = self.store_keys.load_full().ok_or(KeysError::Locked)?;
            note_damage(id, &snapshot, &store_keys, &mut damaged);
            held.versions += snapshot.keks.len();
            held.highest.push((id, snapshot.keyring.next().version));
        }
        Ok((held, damaged))
    }

    /// Reads a cluster's keyring again because a caller named a key id that is
    /// not in memory. Shared, at most once a second per cluster.
    ///
    /// # Errors
    ///
    /// When the store cannot be read or a record is damaged.
    pub async fn refresh(
        &self,
        permit: &Permit<actions::Load>,
        ledger: &Ledger,
        now: Instant,
    ) -> Result<Reloaded, LoadError> {
        let cluster = permit.cluster();
        let known = self.clusters.load().get(&cluster).cloned();
        let mut last = match &known {
            Some(known) => Some(known.reread.0.lock().await),
            None => None,
        };
        if let Some(last) = &mut last {
            if last.is_some_and(|last| now.saturating_duration_since(last) < REREAD_EVERY) {
                return Ok(Reloaded::Unchanged);
            }
            **last = Some(now);
        }
        let Some(record) = ledger.read::<KeyringRecord>(&rows::keyring(&cluster)).await? else {
            return Ok(Reloaded::Unchanged);
        };
        if known.as_ref().is_some_and(|known| known.snapshot.load().revision >= record.revision) {
            return Ok(Reloaded::Unchanged);
        }
        self.publish(cluster, read_snapshot(ledger, &record, cluster).await?);
        Ok(Reloaded::Newer)
    }

    /// Reads every keyring again that is newer in the store than in memory:
    /// another agent changed it, or this one did and lost the reply, or was not
    /// waited for by whoever asked. Returns how many there were.
    ///
    /// # Errors
    ///
    /// When the store cannot be read or a record is damaged.
    pub async fn catch_up(&self, ledger: &Ledger) -> Result<usize, LoadError> {
        let mut caught_up = 0;
        for (row, revision) in ledger.scan_revisions(rows::KEYRINGS).await? {
            let id = cluster_of_keyring(&row);
            if id.is_some_and(|id| self.damaged.contains(&id)) {
                continue;
            }
            let known = id.and_then(|id| self.keyring(&id));
            if known.is_some_and(|known| known.revision >= revision) {
                continue;
            }
            if let Some(record) = ledger.read::<KeyringRecord>(&row).await? {
                let id = keyring::cluster_of(&record)?;
                self.publish(id, read_snapshot(ledger, &record, id).await?);
                caught_up += 1;
            }
        }
        Ok(caught_up)
    }

    /// Returns the KEKs that belong to a keyring record: those in memory, or
    /// those of the store when memory is behind it.
    ///
    /// # Errors
    ///
    /// When the store cannot be read.
    pub async fn keks_of(
        &self,
        permit: &Permit<actions::Load>,
        ledger: &Ledger,
        record: &Record<KeyringRecord>,
        keyring: &Keyring,
    ) -> Result<HashMap<Version, SealedKek>, LedgerError> {
        let cluster = permit.cluster();
        match self.keyring(&cluster) {
            Some(live) if live.revision == record.revision => Ok(live.keks.clone()),
            Some(_) | None => stored_keks(ledger, cluster, keyring).await,
        }
    }
}

/// Reads every keyring with its KEKs.
async fn read_all(ledger: &Ledger) -> Result<Vec<(ClusterId, Snapshot)>, LoadError> {
    // Keyrings first: whatever another agent adds meanwhile, each of them has its KEKs then.
    let records = ledger.scan_sound::<KeyringRecord>(rows::KEYRINGS).await?;
    let keks = ledger.scan_rows(rows::KEKS).await?.into_iter();
    let mut keks: HashMap<String, Row> = keks.map(|row| (row.name.as_str().to_owned(), row)).collect();
    let mut snapshots = Vec::new();
    for record in records {
        let id = keyring::cluster_of(&record)?;
        snapshots.push((id, assemble(&record, id, &mut |name| keks.remove(name))?));
    }
    Ok(snapshots)
}

fn cluster_of_keyring(row: &RowName) -> Option<ClusterId> {
    row.as_str().strip_prefix(rows::KEYRINGS).and_then(|id| id.parse().ok())
}

fn note_damage(id: ClusterId, snapshot: &Snapshot, store_keys: &StoreKeys, damaged: &mut Vec<DamagedKek>) {
    for version in unopened(snapshot, store_keys) {
        let row = rows::kek(&id, version);
        tracing::error!(cluster = %id, %version, row = row.as_str(), "a stored key does not open");
        damaged.push(DamagedKek { cluster: id, version });
    }
}

/// Reads all counted wraps. They are only a hint: what is damaged counts from
/// zero, and the head tells of it.
async fn scan_wraps(ledger: &Ledger) -> Result<HashMap<RowName, WrapCounts>, LoadError> {
    let mut found = HashMap::new();
    for row in ledger.scan_rows(rows::WRAPS).await? {
        match ledger.codec().decode::<WrapsRecord>(row) {
            Ok(record) => drop(found.insert(record.row, wraps::parse(&record.payload))),
            Err(error) => tracing::error!(%error, "the wraps of a cluster are counted from zero"),
        }
    }
    Ok(found)
}

/// Reads a KEK that did not open once more; says whether it opens now.
async fn reread(
    ledger: &Ledger,
    snapshot: &mut Snapshot,
    store_keys: &StoreKeys,
    cluster: ClusterId,
    version: Version,
) -> Result<bool, LoadError> {
    let row = rows::kek(&cluster, version);
    if let Some(found) = ledger.read_row(&row).await? {
        let kek = SealedKek { row: found.name, bytes: found.bytes };
        if store_keys.open_kek(&kek).is_ok() {
            snapshot.keks.insert(version, kek);
            return Ok(true);
        }
    }
    tracing::error!(%cluster, %version, row = row.as_str(), "a stored key does not open");
    Ok(false)
}

/// Reads the KEKs that belong to a keyring record.
async fn read_snapshot(
    ledger: &Ledger,
    record: &Record<KeyringRecord>,
    cluster: ClusterId,
) -> Result<Snapshot, LoadError> {
    let keyring = keyring::parse(record)?;
    let keks = stored_keks(ledger, cluster, &keyring).await.map_err(LoadError::Ledger)?;
    Ok(Snapshot { revision: record.revision, keyring, keks })
}

/// Reads the KEKs of a keyring from the store. Read them after the record: a
/// version is never in a record before its KEK is in its row.
///
/// # Errors
///
/// When the store cannot be read.
async fn stored_keks(
    ledger: &Ledger,
    cluster: ClusterId,
    keyring: &Keyring,
) -> Result<HashMap<Version, SealedKek>, LedgerError> {
    let rows = ledger.scan_rows(&rows::keks(&cluster)).await?;
    let mut keks: HashMap<String, Row> =
        rows.into_iter().map(|row| (row.name.as_str().to_owned(), row)).collect();
    Ok(pick(keyring, cluster, &mut |name| keks.remove(name)))
}

fn assemble(
    record: &Record<KeyringRecord>,
    cluster: ClusterId,
    take: &mut dyn FnMut(&str) -> Option<Row>,
) -> Result<Snapshot, LoadError> {
    let keyring = keyring::parse(record)?;
    let keks = pick(&keyring, cluster, take);
    Ok(Snapshot { revision: record.revision, keyring, keks })
}

/// Picks the rows of a keyring's versions; a tombstone has none.
fn pick(
    keyring: &Keyring,
    cluster: ClusterId,
    take: &mut dyn FnMut(&str) -> Option<Row>,
) -> HashMap<Version, SealedKek> {
    let versions = keyring.versions().iter();
    let kek = |version: Version| {
        let row = take(rows::kek(&cluster, version).as_str())?;
        Some((version, SealedKek { row: row.name, bytes: row.bytes }))
    };
    versions.map(|version| version.version).filter_map(kek).collect()
}

/// Names the rows of sealed keys that do not open, for `check-store`. Nothing
/// of what opens is kept.
///
/// # Errors
///
/// When the store cannot be read.
pub async fn unopened_rows(ledger: &Ledger, store_keys: &StoreKeys) -> Result<Vec<RowName>, ReadError> {
    let mut unopened = Vec::new();
    for (prefix, kind) in [(rows::KEKS, Kind::Kek), (rows::AUTHORITY_KEYS, Kind::CaKey)] {
        for row in ledger.scan_rows(prefix).await? {
            if store_keys.open(&row.name, kind, &row.bytes).is_err() {
                unopened.push(row.name);
            }
        }
    }
    Ok(unopened)
}

/// The versions whose KEK is missing or does not open.
pub(super) fn unopened(snapshot: &Snapshot, store_keys: &StoreKeys) -> Vec<Version> {
    let kept = snapshot.keyring.versions().iter().filter(|version| version.state != State::Destroyed);
    kept.map(|version| version.version)
        .filter(|version| snapshot.keks.get(version).is_none_or(|kek| store_keys.open_kek(kek).is_err()))
        .collect()
}
