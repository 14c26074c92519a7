//! The store of an agent on disk: made once by `init`, opened by every start.
//!
//! Opening needs a root slot that opens: from then on the store key, and what
//! is derived from it, is in locked memory.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use fleet_kms_keyring::sealed;
use fleet_kms_keyring::{SlotId, StoreId};
use fleet_kms_process::exit;
use fleet_kms_seal::{MalformedSlotRecord, RootSlot, SlotError, SlotKind, SlotRecord, StoreKey, open_any};
use fleet_kms_store::{CommitError, OpenError, ReadError, SqliteStore, Store};

use crate::ledger::{Generator, HeadError, Ledger};
use crate::live_keyrings::StoreKeys;
use crate::migration::{self, Outlook};
use crate::records::{Codec, rows};
use crate::root::{Root, RootError};

/// The format of the database, which its `meta` row says: no record in it is
/// older than this format asks for. It rises with the format of any record.
pub const FORMAT: u8 = 2;
/// The oldest one that this release opens and migrates.
const OLDEST_FORMAT: u8 = 1;
/// The first epoch of a store key.
const FIRST_EPOCH: u32 = 1;
/// More root slots than any store has.
pub(crate) const MAX_SLOTS: usize = 64;
/// Guessing passphrases shall take longer than the key derivation alone.
const WRONG_PASSPHRASE_DELAY: Duration = Duration::from_secs(1);

/// Why a store could not be made or opened.
#[derive(Debug, thiserror::Error)]
pub enum StorageError {
    /// The database cannot be used.
    #[error("cannot use the store {path}")]
    Open {
        path: String,
        #[source]
        source: OpenError,
    },
    /// A row could not be read.
    #[error(transparent)]
    Read(#[from] ReadError),
    /// The first transaction failed.
    #[error("the new store could not be written")]
    Write(#[from] CommitError),
    /// There is no such file.
    #[error("there is no store {path} (store.path); run kms-agent init, or restore a backup")]
    Missing { path: String },
    /// The `meta` row is missing or not of this format.
    #[error("{path} is not an initialised store; run kms-agent init, or restore a backup")]
    NotInitialised { path: String },
    /// The `meta` row was written by a later release.
    #[error(
        "{path} has format {format}, this release knows up to {FORMAT}; run the release that wrote it, or restore a backup that was made before the upgrade"
    )]
    Newer { path: String, format: u8 },
    /// The root key file cannot be used.
    #[error(transparent)]
    Root(#[from] RootError),
    /// A slot row is damaged.
    #[error("root slot {row} is damaged; restore a backup")]
    Slot {
        row: String,
        #[source]
        source: MalformedSlotRecord,
    },
    /// The slot does not seal or open.
    #[error(
        "{root} does not open the store; use a root key or passphrase of one of its slots; if it is one, the store was altered: restore a backup"
    )]
    NoSlotOpens {
        root: String,
        #[source]
        source: SlotError,
    },
    /// The key of the epoch before a store-key rotation does not open.
    #[error("row {row} does not open: the store is damaged; restore a backup")]
    OlderKey {
        row: String,
        #[source]
        source: sealed::OpenError,
    },
    /// The head cannot be used.
    #[error(transparent)]
    Head(#[from] HeadError),
}

impl StorageError {
    /// Returns the exit status.
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::Open { source: OpenError::InUse { .. }, .. } => exit::BUSY,
            Self::Root(_) => exit::CONFIG,
            _ => exit::DATA,
        }
    }
}

/// A store with its key open.
pub struct Storage {
    /// All access to the rows.
    pub ledger: Arc<Ledger>,
    /// The open store key; it goes to the live keyrings.
    pub store_keys: StoreKeys,
    /// The slot that opened it.
    pub slot: SlotId,
}

/// Makes a new store with its root slots, one at least.
///
/// # Errors
///
/// When a file is in the way or cannot be written.
pub async fn create(
    path: &Path,
    slots: &[&dyn RootSlot],
    agent: &str,
    generator: Generator,
) -> Result<Storage, StorageError> {
    let opened = SqliteStore::create(path);
    let store = opened.map_err(|source| StorageError::Open { path: text(path), source })?;
    let mut rng = generator();
    let id = StoreId::generate(&mut *rng);
    let store_key = StoreKey::generate(id, FIRST_EPOCH, &mut *rng);
    let mut rows = vec![(rows::fixed(rows::META), meta(id))];
    let mut first = None;
    for slot in slots {
        let slot_id = SlotId::generate(&mut *rng);
        let record = slot
            .seal(&store_key, slot_id, &mut *rng)
            .map_err(|source| StorageError::NoSlotOpens { root: slot.kind().to_string(), source })?;
        rows.push((rows::slot(&slot_id), record.encode()));
        first.get_or_insert(slot_id);
    }
    drop(rng);
    let codec = Codec::new(id, store_key.epoch(), store_key.mac_key());
    Ledger::create(&store, codec, store_key.head_key(), rows, generator).await?;
    let slot = first.expect("a store has a root slot");
    finish(Arc::new(store), slot, store_key, agent, generator).await
}

/// Opens a store with the root key that the configuration names.
///
/// # Errors
///
/// When the database is damaged or newer, or no slot opens.
pub async fn open(
    path: &Path,
    root: &Root,
    agent: &str,
    generator: Generator,
) -> Result<Storage, StorageError> {
    let store = SqliteStore::open(path).map_err(|source| match source {
        OpenError::NotFound => StorageError::Missing { path: text(path) },
        source => StorageError::Open { path: text(path), source },
    })?;
    open_with((Arc::new(store), path), (&*root.slot()?, &root.to_string()), agent, generator).await
}

/// Opens a store file that is open already with a root slot; the text says to
/// the operator which.
///
/// # Errors
///
/// As [`open`].
pub async fn open_with(
    (store, path): (Arc<dyn Store>, &Path),
    (slot, root): (&dyn RootSlot, &str),
    agent: &str,
    generator: Generator,
) -> Result<Storage, StorageError> {
    let id = read_meta(&*store, path).await?;
    let records = slots(&*store).await?;
    let (slot_id, store_key) = match open_any(slot, &records, id) {
        Ok(opened) => opened,
        Err(source) => {
            if slot.kind() == SlotKind::Passphrase {
                tokio::time::sleep(WRONG_PASSPHRASE_DELAY).await;
            }
            return Err(StorageError::NoSlotOpens { root: root.to_owned(), source });
        }
    };
    finish(store, slot_id, store_key, agent, generator).await
}

/// Looks at the format of a store that may be in use, without a key: what
/// `kms-agent run` will do with it.
///
/// # Errors
///
/// When the file is no store, or a later release's.
pub async fn look(path: &Path) -> Result<Option<Outlook>, StorageError> {
    let open = |source| StorageError::Open { path: text(path), source };
    let store = SqliteStore::open_read_only(path).map_err(open)?;
    read_meta(&store, path).await?;
    Ok(migration::outlook(&store).await?)
}

/// Reads the root slots of a store, without a key.
///
/// # Errors
///
/// When the store cannot be read or a slot is damaged.
pub async fn slots(store: &dyn Store) -> Result<Vec<SlotRecord>, StorageError> {
    let mut records = Vec::new();
    for row in store.page_rows(rows::SLOTS, None, MAX_SLOTS).await? {
        let record = SlotRecord::parse(&row.bytes);
        let damaged = |source| StorageError::Slot { row: row.name.as_str().to_owned(), source };
        records.push(record.map_err(damaged)?);
    }
    Ok(records)
}

/// Opens the ledger; if a store-key rotation is under way, with both keys.
async fn finish(
    store: Arc<dyn Store>,
    slot: SlotId,
    store_key: StoreKey,
    agent: &str,
    generator: Generator,
) -> Result<Storage, StorageError> {
    let agent = agent.to_owned();
    let older = older_key(&*store, &store_key).await?;
    let (ledger, store_keys) = match older {
        None => {
            let codec = Codec::new(store_key.store(), store_key.epoch(), store_key.mac_key());
            let ledger = Ledger::open(store, codec, store_key.head_key(), agent, generator).await?;
            (ledger, StoreKeys::new(store_key))
        }
        Some(older) => {
            let ledger = Ledger::open_between(store, &older, &store_key, agent, generator).await?;
            (ledger, StoreKeys::between(older, store_key))
        }
    };
    Ok(Storage { ledger: Arc::new(ledger), store_keys, slot })
}

async fn older_key(store: &dyn Store, newer: &StoreKey) -> Result<Option<StoreKey>, StorageError> {
    let Some(row) = store.page_rows(rows::OLDER_STORE_KEYS, None, 1).await?.pop() else { return Ok(None) };
    let epoch = newer.epoch().saturating_sub(1);
    let opened = newer.open_older(epoch, row.name.as_bytes(), &row.bytes);
    let damaged = |source| StorageError::OlderKey { row: row.name.as_str().to_owned(), source };
    opened.map(Some).map_err(damaged)
}

async fn read_meta(store: &dyn Store, path: &Path) -> Result<StoreId, StorageError> {
    let row = store.get(&rows::fixed(rows::META)).await?;
    let row = row.ok_or_else(|| StorageError::NotInitialised { path: text(path) })?;
    match row.bytes.split_first() {
        Some((OLDEST_FORMAT..=FORMAT, id)) => {
            let id = id.try_into().map_err(|_| StorageError::NotInitialised { path: text(path) })?;
            Ok(StoreId::from_bytes(id))
        }
        Some((&format, _)) if format > FORMAT => Err(StorageError::Newer { path: text(path), format }),
        _ => Err(StorageError::NotInitialised { path: text(path) }),
    }
}

/// The bytes of the `meta` row of a store that is of this release's format.
pub(crate) fn meta(id: StoreId) -> Vec<u8> {
    let mut bytes = vec![FORMAT];
    bytes.extend_from_slice(id.as_bytes());
    bytes
}

fn text(path: &Path) -> String {
    path.display().to_string()
}
