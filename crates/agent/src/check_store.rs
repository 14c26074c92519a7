//! `kms-agent check-store`: is the store as the agent left it, and if not, which
//! rows fail by themselves.
//!
//! The head tells whether anything is wrong; a row's own tag or seal tells
//! which. It changes nothing and repairs nothing.

use std::fmt;

use fleet_kms_process::exit;
use fleet_kms_store::{ReadError, RowName};

use crate::config::Config;
use crate::errors::chain;
use crate::ledger::{Generator, HeadError, Integrity, RowKind, kind_of};
use crate::live_keyrings::unopened_rows;
use crate::migration::{self, Outlook};
use crate::storage::{self, Storage, StorageError};

/// Rows that an error names; of a store that is gone altogether the first ones
/// say enough.
const MAX_NAMED: usize = 20;

/// A store that is as the last transaction left it.
#[derive(Debug)]
pub struct Intact {
    rows: usize,
    outlook: Option<Outlook>,
}

impl fmt::Display for Intact {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} rows, each as the last transaction left it", self.rows)?;
        self.outlook.map_or(Ok(()), |outlook| write!(f, "\n{outlook}"))
    }
}

/// Rows that do not authenticate.
#[derive(Debug)]
pub struct Altered(Vec<RowName>);

impl fmt::Display for Altered {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self(rows) = self;
        if rows.is_empty() {
            return write!(f, "each row that is left is authentic, so rows were deleted or replayed");
        }
        write!(f, "altered:")?;
        for row in rows.iter().take(MAX_NAMED) {
            write!(f, " {}", row.as_str())?;
        }
        match rows.len().saturating_sub(MAX_NAMED) {
            0 => Ok(()),
            more => write!(f, " and {more} more"),
        }
    }
}

/// Why the store could not be checked, or is not as it was left.
#[derive(Debug, thiserror::Error)]
pub enum CheckStoreError {
    /// The store cannot be opened.
    #[error(transparent)]
    Storage(#[from] StorageError),
    /// The head cannot be compared.
    #[error(transparent)]
    Head(#[from] HeadError),
    /// The rows cannot be read.
    #[error("the store cannot be read")]
    Read(#[from] ReadError),
    /// The store is not as it was left.
    #[error("{rows} rows are not what the last transaction left; {altered}; restore a backup")]
    Broken { rows: usize, altered: Altered },
}

impl CheckStoreError {
    /// Returns the exit status.
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::Storage(error) => error.exit_code(),
            Self::Head(_) | Self::Read(_) | Self::Broken { .. } => exit::DATA,
        }
    }
}

/// Opens the store and compares every row with its head.
///
/// # Errors
///
/// See [`CheckStoreError`].
pub async fn run(config: &Config, generator: Generator) -> Result<Intact, CheckStoreError> {
    let storage = storage::open(&config.store, &config.root, config.name.as_str(), generator).await?;
    match storage.ledger.check().await? {
        Integrity::Intact { rows } => {
            let outlook = migration::outlook(&**storage.ledger.store()).await?;
            Ok(Intact { rows, outlook })
        }
        Integrity::Broken { rows } => {
            Err(CheckStoreError::Broken { rows, altered: Altered(altered(&storage).await?) })
        }
    }
}

/// Says what `kms-agent run` will do with the store beyond opening it, for
/// `check-config`; nothing when there is none yet. Opens no key and changes
/// nothing.
pub async fn look(config: &Config) -> Option<String> {
    if !config.store.exists() {
        return None;
    }
    match storage::look(&config.store).await {
        Ok(outlook) => outlook.map(|outlook| outlook.to_string()),
        Err(error) => Some(format!("kms-agent run will not start: {}", chain(&error))),
    }
}

/// Names the rows that fail by themselves. `meta`, the slot in use and the head
/// have been opened by now.
async fn altered(storage: &Storage) -> Result<Vec<RowName>, ReadError> {
    let Storage { ledger, store_keys, .. } = storage;
    let mut altered = unopened_rows(ledger, store_keys).await?;
    for row in ledger.scan_rows("").await? {
        let name = row.name.as_str();
        if kind_of(name) == RowKind::Record && !ledger.codec().is_authentic(&row) {
            altered.push(row.name);
        }
    }
    altered.sort();
    Ok(altered)
}
