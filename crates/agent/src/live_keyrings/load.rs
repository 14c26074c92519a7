//! Reading keyrings from the store: all at start, one when its caller names a
//! key id that is not in memory.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use arc_swap::{ArcSwap, ArcSwapOption};
use fleet_kms_keyring::sealed::{self, Kind};
use fleet_kms_keyring::{ClusterId, State, Version};
use fleet_kms_seal::StoreKey;
use fleet_kms_store::{ReadError, Row, RowName};

use super::{LiveCluster, LiveKeyrings, SealedKek, Snapshot, context, open_kek};
use crate::authz::{Permit, actions};
use crate::ledger::{Generator, Ledger, LedgerError};
use crate::records::keyring::{self, KeyringError};
use crate::records::payload::KeyringRecord;
use crate::records::{Record, rows};

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
        let mut keks: HashMap<String, Row> = ledger
            .scan_rows(rows::KEKS)
            .await?
            .into_iter()
            .map(|row| (row.name.as_str().to_owned(), row))
            .collect();
        for record in ledger.scan::<KeyringRecord>(rows::KEYRINGS).await? {
            let id = keyring::cluster_of(&record)?;
            let snapshot = assemble(&record, id, &mut |name| keks.remove(name))?;
            for version in unopened(&snapshot, &store_key) {
                let row = rows::kek(&id, version);
                tracing::error!(cluster = %id, %version, row = row.as_str(), "a stored key does not open");
                damaged.push(DamagedKek { cluster: id, version });
            }
            clusters.insert(id, Arc::new(LiveCluster::new(snapshot)));
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
}

/// Reads the KEKs that belong to a keyring record.
async fn read_snapshot(
    ledger: &Ledger,
    record: &Record<KeyringRecord>,
    cluster: ClusterId,
) -> Result<Snapshot, LoadError> {
    let rows = ledger.scan_rows(&rows::keks(&cluster)).await?;
    let mut keks: HashMap<String, Row> =
        rows.into_iter().map(|row| (row.name.as_str().to_owned(), row)).collect();
    assemble(record, cluster, &mut |name| keks.remove(name))
}

fn assemble(
    record: &Record<KeyringRecord>,
    cluster: ClusterId,
    take: &mut dyn FnMut(&str) -> Option<Row>,
) -> Result<Snapshot, LoadError> {
    let keyring = keyring::parse(record)?;
    let keks = keyring
        .versions()
        .iter()
        .filter_map(|version| {
            let row = take(rows::kek(&cluster, version.version).as_str())?;
            Some((version.version, SealedKek { row: row.name, bytes: row.bytes }))
        })
        .collect();
    Ok(Snapshot { revision: record.revision, keyring, keks })
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
