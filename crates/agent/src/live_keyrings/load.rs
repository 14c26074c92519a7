//! Reading keyrings from the store: all at start, one when its caller names a
//! key id that is not in memory, and once a minute those whose revision says
//! that memory is behind.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use arc_swap::{ArcSwap, ArcSwapOption};
use fleet_kms_keyring::sealed::{self, Kind};
use fleet_kms_keyring::{ClusterId, Keyring, State, Version};
use fleet_kms_seal::StoreKey;
use fleet_kms_store::{ReadError, Row, RowName};

use super::{LiveCluster, LiveKeyrings, SealedKek, Snapshot, WrapCounts, context, open_kek};
use crate::authz::{Permit, actions};
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

/// When the cluster was last read again.
#[derive(Default)]
pub(super) struct Reread(Mutex<Option<Instant>>);

impl Reread {
    /// Says whether it is time, and if so notes it.
    fn due(&self, now: Instant) -> bool {
        let mut last = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let due = last.is_none_or(|last| now.saturating_duration_since(last) >= REREAD_EVERY);
        if due {
            *last = Some(now);
        }
        due
    }
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
    ///
    /// # Errors
    ///
    /// When the store cannot be read or a record is damaged.
    pub async fn load(
        ledger: &Ledger,
        store_key: StoreKey,
        generator: Generator,
    ) -> Result<(Self, Vec<DamagedKek>), LoadError> {
        let mut clusters = HashMap::new();
        let mut damaged = Vec::new();
        // Keyrings first: whatever another agent adds meanwhile, each of them has its KEKs then.
        let records = ledger.scan::<KeyringRecord>(rows::KEYRINGS).await?;
        let mut wraps = scan_wraps(ledger).await?;
        let mut keks = by_name(ledger.scan_rows(rows::KEKS).await?);
        for record in records {
            let id = keyring::cluster_of(&record)?;
            let mut snapshot = assemble(&record, id, &mut |name| keks.remove(name))?;
            for version in unopened(&snapshot, &store_key) {
                if !reread(ledger, &mut snapshot, &store_key, id, version).await? {
                    damaged.push(DamagedKek { cluster: id, version });
                }
            }
            let wraps = wraps.remove(&rows::wraps(&id)).unwrap_or_default();
            clusters.insert(id, Arc::new(LiveCluster::new(snapshot, wraps)));
        }
        let live = Self {
            store_key: ArcSwapOption::from_pointee(store_key),
            clusters: ArcSwap::from_pointee(clusters),
            generator,
        };
        Ok((live, damaged))
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
        if known.as_ref().is_some_and(|live| !live.reread.due(now)) {
            return Ok(Reloaded::Unchanged);
        }
        let Some(record) = ledger.read::<KeyringRecord>(&rows::keyring(&cluster)).await? else {
            return Ok(Reloaded::Unchanged);
        };
        if known.is_some_and(|live| live.snapshot.load().revision >= record.revision) {
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
            let id = row.as_str().strip_prefix(rows::KEYRINGS).and_then(|id| id.parse().ok());
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
            Some(_) | None => {
                let mut keks = by_name(ledger.scan_rows(&rows::keks(&cluster)).await?);
                Ok(sealed_keks(keyring, cluster, &mut |name| keks.remove(name)))
            }
        }
    }
}

fn by_name(rows: Vec<Row>) -> HashMap<RowName, Row> {
    rows.into_iter().map(|row| (row.name.clone(), row)).collect()
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
    store_key: &StoreKey,
    cluster: ClusterId,
    version: Version,
) -> Result<bool, LoadError> {
    let row = rows::kek(&cluster, version);
    if let Some(found) = ledger.read_row(&row).await? {
        let kek = SealedKek { row: found.name, bytes: found.bytes };
        if open_kek(store_key, &kek).is_ok() {
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
    let mut keks = by_name(ledger.scan_rows(&rows::keks(&cluster)).await?);
    assemble(record, cluster, &mut |name| keks.remove(name))
}

fn assemble(
    record: &Record<KeyringRecord>,
    cluster: ClusterId,
    take: &mut dyn FnMut(&RowName) -> Option<Row>,
) -> Result<Snapshot, LoadError> {
    let keyring = keyring::parse(record)?;
    let keks = sealed_keks(&keyring, cluster, take);
    Ok(Snapshot { revision: record.revision, keyring, keks })
}

fn sealed_keks(
    keyring: &Keyring,
    cluster: ClusterId,
    take: &mut dyn FnMut(&RowName) -> Option<Row>,
) -> HashMap<Version, SealedKek> {
    let versions = keyring.versions().iter();
    versions
        .filter_map(|version| {
            let row = take(&rows::kek(&cluster, version.version))?;
            Some((version.version, SealedKek { row: row.name, bytes: row.bytes }))
        })
        .collect()
}

/// Names the rows of sealed keys that do not open, for `check-store`. Nothing
/// of what opens is kept.
///
/// # Errors
///
/// When the store cannot be read.
pub async fn unopened_rows(ledger: &Ledger, store_key: &StoreKey) -> Result<Vec<RowName>, ReadError> {
    let mut unopened = Vec::new();
    for (prefix, kind) in [(rows::KEKS, Kind::Kek), (rows::AUTHORITY_KEYS, Kind::CaKey)] {
        for row in ledger.scan_rows(prefix).await? {
            let opens = sealed::epoch_of(&row.bytes).is_ok_and(|epoch| {
                let context = context(store_key, &row.name, kind, epoch);
                sealed::open(&store_key.seal_key(), &context, &row.bytes).is_ok()
            });
            if !opens {
                unopened.push(row.name);
            }
        }
    }
    Ok(unopened)
}

/// The versions whose KEK is missing or does not open.
fn unopened(snapshot: &Snapshot, store_key: &StoreKey) -> Vec<Version> {
    let kept = snapshot.keyring.versions().iter().filter(|version| version.state != State::Destroyed);
    kept.map(|version| version.version)
        .filter(|version| snapshot.keks.get(version).is_none_or(|kek| open_kek(store_key, kek).is_err()))
        .collect()
}
