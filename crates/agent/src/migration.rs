//! Brings the store of an older release to the formats of this one, before
//! anything is served from it.
//!
//! First a verified backup beside the store, then the `meta` row says the new
//! format, so that the older release refuses the store from there on, then
//! every record of an older format is written again, page by page, and the
//! `migration` row goes last. Each step is one transaction of the ledger; a
//! crash between two of them costs nothing, because a record says its format
//! and the next start goes on. Tools that only read never migrate.

use std::fmt;
use std::path::{Path, PathBuf};

use fleet_kms_store::{ReadError, Row, RowName, Store};

use crate::backup::{BackupError, Backups};
use crate::changes::{ChangeError, Changes};
use crate::ledger::{Changeset, LedgerError, PAGE, batches};
use crate::live_keyrings::{LiveKeyrings, LoadError};
use crate::records::kinds::{self, Kind};
use crate::records::payload::MigrationRecord;
use crate::records::{Codec, format_of, rows};
use crate::storage::{self, FORMAT};
use crate::times::to_ms;
use crate::trail::Intent;

/// What is between the store's name and the old format in its backup's name.
const BACKUP_SUFFIX: &str = ".format-";

/// What `kms-agent run` will do with a store of an older format.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outlook {
    /// Migrate it.
    Begins { from: u8 },
    /// Go on with a migration that a crash cut off.
    GoesOn,
}

impl fmt::Display for Outlook {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Begins { from } => write!(
                f,
                "the store has format {from}: kms-agent run first backs it up beside itself, then migrates it to format {FORMAT}, which older releases cannot open"
            ),
            Self::GoesOn => {
                write!(
                    f,
                    "a migration of the store to format {FORMAT} was cut off: kms-agent run goes on with it"
                )
            }
        }
    }
}

/// Why the store was not migrated; the next start tries again or goes on.
#[derive(Debug, thiserror::Error)]
pub enum MigrateError {
    /// The disk has no room for the backup.
    #[error(
        "the store must be migrated to format {FORMAT}, which takes {needed} bytes in {directory}, and {free} are free: free some space there, or start the older release again"
    )]
    NoRoom { directory: String, needed: u64, free: u64 },
    /// The disk does not say how much room it has.
    #[error("the free space of {directory} cannot be found out")]
    Room {
        directory: String,
        #[source]
        source: std::io::Error,
    },
    /// There is no verified backup, and nothing is migrated without one.
    #[error(
        "the store must be migrated to format {FORMAT}, and no backup of it could be made first: remove the cause, or start the older release again"
    )]
    Backup(#[from] BackupError),
    /// The store cannot be read.
    #[error(transparent)]
    Ledger(#[from] LedgerError),
    /// A step was not made.
    #[error("the store's migration to format {FORMAT} stopped; the next start goes on with it")]
    Change(#[source] Box<ChangeError<LedgerError>>),
    /// The keyrings cannot be read afterwards.
    #[error(transparent)]
    Keyrings(#[from] LoadError),
}

impl From<ReadError> for MigrateError {
    fn from(error: ReadError) -> Self {
        Self::Ledger(error.into())
    }
}

impl From<ChangeError<LedgerError>> for MigrateError {
    fn from(error: ChangeError<LedgerError>) -> Self {
        Self::Change(Box::new(error))
    }
}

/// Says what `kms-agent run` will do with a store, if it is of an older format.
///
/// # Errors
///
/// When the store cannot be read.
pub async fn outlook(store: &dyn Store) -> Result<Option<Outlook>, ReadError> {
    let meta = store.get(&rows::fixed(rows::META)).await?;
    let format = meta.and_then(|meta| format_of(&meta.bytes));
    if let Some(from) = format.filter(|format| *format < FORMAT) {
        return Ok(Some(Outlook::Begins { from }));
    }
    let under_way = store.get(&rows::fixed(rows::MIGRATION)).await?;
    Ok(under_way.map(|_| Outlook::GoesOn))
}

/// What a migration works on.
pub(crate) struct Migration<'a> {
    /// Makes the changes.
    pub(crate) changes: &'a Changes,
    /// Opens the keys in the backup.
    pub(crate) keyrings: &'a LiveKeyrings,
    /// Makes the backup.
    pub(crate) backups: &'a Backups,
    /// Stored keys that do not open, and will not in the backup either.
    pub(crate) damaged: usize,
}

impl Migration<'_> {
    /// Migrates the store if it is of an older format.
    ///
    /// # Errors
    ///
    /// See [`MigrateError`].
    pub(crate) async fn run(&self) -> Result<(), MigrateError> {
        match outlook(&**self.changes.ledger().store()).await? {
            None => return Ok(()),
            Some(Outlook::Begins { from }) => self.begin(from).await?,
            Some(Outlook::GoesOn) => tracing::info!(to = FORMAT, "going on with the store's migration"),
        }
        let rewritten = self.rewrite_all().await?;
        self.end(rewritten).await?;
        self.keyrings.catch_up(self.changes.ledger()).await?;
        tracing::info!(rewritten, format = FORMAT, "the store is migrated");
        Ok(())
    }

    /// Backs the store up and says in it that it is being migrated.
    async fn begin(&self, from: u8) -> Result<(), MigrateError> {
        let store = self.backups.store();
        let backup = with_suffix(store, &format!("{BACKUP_SUFFIX}{from}"));
        tracing::warn!(from, to = FORMAT, backup = %backup.display(), "the store is of an older release: backing it up, then migrating it");
        ensure_room(store)?;
        self.backups.make_aside(&backup, self.damaged).await?;
        let intent = Intent::new("store_migrate", "agent")
            .target(backup.display().to_string())
            .detail("from", from.to_string())
            .detail("to", FORMAT.to_string());
        let prepare = || self.prepare_begin(from, &backup);
        Ok(self.changes.run(intent, prepare).await?)
    }

    async fn prepare_begin(&self, from: u8, backup: &Path) -> Result<(Changeset, ()), LedgerError> {
        let ledger = self.changes.ledger();
        let mut changeset = ledger.changeset();
        if let Some(meta) = ledger.read_row(&rows::fixed(rows::META)).await? {
            changeset.replace_sealed(&meta, storage::meta(ledger.codec().store()));
        }
        let begun = MigrationRecord {
            from: from.into(),
            to: FORMAT.into(),
            begun_ms: to_ms(self.changes.now()),
            backup: backup.display().to_string(),
        };
        let row = rows::fixed(rows::MIGRATION);
        match ledger.read::<MigrationRecord>(&row).await? {
            Some(record) => changeset.update(&record, &begun),
            None => changeset.insert(row, &begun),
        }
        Ok((changeset, ()))
    }

    /// Writes every record of an older format again; returns how many.
    async fn rewrite_all(&self) -> Result<usize, MigrateError> {
        let mut rewritten = 0;
        for kind in kinds::all().iter().filter(|kind| kind.format > 1 && kind.rows != rows::CHANGES) {
            let of_kind = self.changes.ledger().scan_revisions(kind.rows).await?.len();
            let before = rewritten;
            let mut after: Option<RowName> = None;
            loop {
                let page = self.changes.ledger().store().page_rows(kind.rows, after.as_ref(), PAGE).await?;
                let full = page.len() == PAGE;
                after = page.last().map(|row| row.name.clone());
                let old = page.into_iter().filter(|row| is_older(row, kind));
                for batch in batches(old.collect()) {
                    rewritten += self.rewrite(kind, &batch).await?;
                    tracing::info!(
                        done = rewritten - before,
                        of = of_kind,
                        kind = kind.what,
                        "migrating the store"
                    );
                }
                if !full {
                    break;
                }
            }
        }
        Ok(rewritten)
    }

    async fn rewrite(&self, kind: &Kind, names: &[RowName]) -> Result<usize, MigrateError> {
        let intent = Intent::new("store_migrate_rows", "agent")
            .target(kind.rows)
            .detail("rows", names.len().to_string());
        let prepare = || async {
            let ledger = self.changes.ledger();
            let mut changeset = ledger.changeset();
            for name in names {
                let row = ledger.read_row(name).await?.filter(|row| is_older(row, kind));
                if let Some(row) = row.filter(|row| is_genuine(&ledger.codec(), row)) {
                    let bytes = kind.rewrite(&ledger.codec(), row.clone())?;
                    changeset.replace_sealed(&row, bytes);
                }
            }
            Ok::<_, LedgerError>((changeset, names.len()))
        };
        Ok(self.changes.run(intent, prepare).await?)
    }

    /// Says in the store that nothing in it is older any more.
    async fn end(&self, rewritten: usize) -> Result<(), MigrateError> {
        let intent = Intent::new("store_migrated", "agent")
            .detail("to", FORMAT.to_string())
            .detail("rows", rewritten.to_string());
        let prepare = || async {
            let ledger = self.changes.ledger();
            let mut changeset = ledger.changeset();
            if let Some(record) = ledger.read::<MigrationRecord>(&rows::fixed(rows::MIGRATION)).await? {
                changeset.delete(&record);
            }
            Ok::<_, LedgerError>((changeset, ()))
        };
        Ok(self.changes.run(intent, prepare).await?)
    }
}

fn is_older(row: &Row, kind: &Kind) -> bool {
    format_of(&row.bytes).is_some_and(|format| format < kind.format)
}

/// A damaged record costs what it says, and no migration.
fn is_genuine(codec: &Codec, row: &Row) -> bool {
    let genuine = codec.is_genuine(row);
    if !genuine {
        tracing::error!(row = row.name.as_str(), "a record is damaged and is not migrated");
    }
    genuine
}

/// Asks for room for the backup, and as much again for what is written anew.
fn ensure_room(store: &Path) -> Result<(), MigrateError> {
    let directory = store.parent().unwrap_or(Path::new("/"));
    let name = || directory.display().to_string();
    let size = |path: &Path| std::fs::metadata(path).map_or(0, |found| found.len());
    let needed = 2 * (size(store) + size(&with_suffix(store, "-wal")));
    let disk = rustix::fs::statvfs(directory)
        .map_err(|error| MigrateError::Room { directory: name(), source: error.into() })?;
    let free = disk.f_bavail.saturating_mul(disk.f_frsize);
    if free < needed {
        return Err(MigrateError::NoRoom { directory: name(), needed, free });
    }
    Ok(())
}

fn with_suffix(path: &Path, suffix: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(suffix);
    name.into()
}

#[cfg(test)]
mod tests;
