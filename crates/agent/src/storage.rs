//! The store of an agent on disk: made once by `init`, opened by every start.
//!
//! Opening needs a root slot that opens: from then on the store key, and what
//! is derived from it, is in locked memory.

use std::path::Path;
use std::sync::Arc;

use fleet_kms_keyring::{SlotId, StoreId};
use fleet_kms_process::exit;
use fleet_kms_seal::{
    FileSlot, MalformedSlotRecord, RootFileError, RootSlot, SlotError, SlotRecord, StoreKey, open_any,
};
use fleet_kms_store::{CommitError, OpenError, ReadError, SqliteStore, Store};

use crate::ledger::{Generator, HeadError, Ledger};
use crate::records::{Codec, rows};

/// The format of the `meta` row.
const META_FORMAT: u8 = 1;
/// The first epoch of a store key.
const FIRST_EPOCH: u32 = 1;
/// More root slots than any store has.
const MAX_SLOTS: usize = 64;

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
    #[error("{path} has format {format}, this release knows {META_FORMAT}; run the release that wrote it")]
    Newer { path: String, format: u8 },
    /// The root key file cannot be used.
    #[error(transparent)]
    RootFile(#[from] RootFileError),
    /// A slot row is damaged.
    #[error("root slot {row} is damaged; restore a backup")]
    Slot {
        row: String,
        #[source]
        source: MalformedSlotRecord,
    },
    /// The slot does not seal or open.
    #[error(
        "{file} does not open the store; use the root key file that `kms-agent init` made; if it is that one, the store was altered: restore a backup"
    )]
    NoSlotOpens {
        file: String,
        #[source]
        source: SlotError,
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
            Self::RootFile(_) => exit::CONFIG,
            _ => exit::DATA,
        }
    }
}

/// A store with its key open.
pub struct Storage {
    /// All access to the rows.
    pub ledger: Arc<Ledger>,
    /// The open store key; it goes to the live keyrings.
    pub store_key: StoreKey,
}

/// Makes a new store with one root slot.
///
/// # Errors
///
/// When a file is in the way or cannot be written.
pub async fn create(
    path: &Path,
    slot: &FileSlot,
    agent: &str,
    generator: Generator,
) -> Result<Storage, StorageError> {
    let opened = SqliteStore::create(path);
    let store = opened.map_err(|source| StorageError::Open { path: text(path), source })?;
    let mut rng = generator();
    let id = StoreId::generate(&mut *rng);
    let store_key = StoreKey::generate(id, FIRST_EPOCH, &mut *rng);
    let slot_id = SlotId::generate(&mut *rng);
    let record = slot
        .seal(&store_key, slot_id, &mut *rng)
        .map_err(|source| StorageError::NoSlotOpens { file: "the root key file".to_owned(), source })?;
    let codec = Codec::new(id, store_key.epoch(), store_key.mac_key());
    let rows = vec![(rows::fixed(rows::META), meta(id)), (rows::slot(&slot_id), record.encode())];
    Ledger::create(&store, &codec, &store_key.head_key(), rows, generator).await?;
    finish(Arc::new(store), codec, store_key, agent, generator).await
}

/// Opens a store with a root key file.
///
/// # Errors
///
/// When the database is damaged or newer, or no slot opens.
pub async fn open(
    path: &Path,
    root: &Path,
    agent: &str,
    generator: Generator,
) -> Result<Storage, StorageError> {
    let store = SqliteStore::open(path).map_err(|source| match source {
        OpenError::NotFound => StorageError::Missing { path: text(path) },
        source => StorageError::Open { path: text(path), source },
    })?;
    let id = read_meta(&store, path).await?;
    let slot = FileSlot::open(root)?;
    let store_key = open_store_key(&store, id, &slot, root).await?;
    let codec = Codec::new(id, store_key.epoch(), store_key.mac_key());
    finish(Arc::new(store), codec, store_key, agent, generator).await
}

async fn finish(
    store: Arc<dyn Store>,
    codec: Codec,
    store_key: StoreKey,
    agent: &str,
    generator: Generator,
) -> Result<Storage, StorageError> {
    let head_key = store_key.head_key();
    let ledger = Ledger::open(store, codec, head_key, agent.to_owned(), generator).await?;
    Ok(Storage { ledger: Arc::new(ledger), store_key })
}

async fn read_meta(store: &dyn Store, path: &Path) -> Result<StoreId, StorageError> {
    let row = store.get(&rows::fixed(rows::META)).await?;
    let row = row.ok_or_else(|| StorageError::NotInitialised { path: text(path) })?;
    match row.bytes.split_first() {
        Some((&META_FORMAT, id)) => {
            let id = id.try_into().map_err(|_| StorageError::NotInitialised { path: text(path) })?;
            Ok(StoreId::from_bytes(id))
        }
        Some((&format, _)) if format > META_FORMAT => Err(StorageError::Newer { path: text(path), format }),
        _ => Err(StorageError::NotInitialised { path: text(path) }),
    }
}

async fn open_store_key(
    store: &dyn Store,
    id: StoreId,
    slot: &FileSlot,
    root: &Path,
) -> Result<StoreKey, StorageError> {
    let mut records = Vec::new();
    for row in store.page_rows(rows::SLOTS, None, MAX_SLOTS).await? {
        let record = SlotRecord::parse(&row.bytes);
        let damaged = |source| StorageError::Slot { row: row.name.as_str().to_owned(), source };
        records.push(record.map_err(damaged)?);
    }
    let opened = open_any(slot, &records, id);
    let (_, store_key) = opened.map_err(|source| StorageError::NoSlotOpens { file: text(root), source })?;
    Ok(store_key)
}

fn meta(id: StoreId) -> Vec<u8> {
    let mut bytes = vec![META_FORMAT];
    bytes.extend_from_slice(id.as_bytes());
    bytes
}

fn text(path: &Path) -> String {
    path.display().to_string()
}
