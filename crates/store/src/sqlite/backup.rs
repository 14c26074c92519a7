//! Online backup: a consistent, checked, single-file copy while commits go on.
//!
//! It must never leave a name that looks like a backup and is not one: the copy is made under `<to>.partial`.

use std::io;
use std::path::{Path, PathBuf};

use rusqlite::Connection;
use rusqlite::backup::{Backup, StepResult};
use tokio::sync::oneshot;

use super::file;
use super::reader::revision_from;
use crate::{OpenError, Revision};

/// What a finished backup holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BackupReport {
    /// The last commit in it.
    pub revision: Revision,
}

/// Why there is no new backup.
#[derive(Debug, thiserror::Error)]
pub enum BackupError {
    /// The target is the store itself or one of its side files.
    #[error("the backup would overwrite the store")]
    IsTheStore,
    /// The file system refused.
    #[error("the backup's file cannot be used: {step} failed")]
    Io {
        /// What was tried.
        step: &'static str,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
    /// SQLite could not copy.
    #[error("sqlite could not copy the store")]
    Copy(#[source] rusqlite::Error),
    /// The copy did not pass its check.
    #[error("the copy is not sound")]
    Check(#[source] OpenError),
}

/// Runs blocking work on a thread of its own: long work must not hold up reads.
pub(super) async fn on_own_thread<T: Send + 'static>(
    name: &str,
    work: impl FnOnce() -> T + Send + 'static,
) -> io::Result<T> {
    let (reply, answer) = oneshot::channel();
    let thread = std::thread::Builder::new().name(name.to_owned());
    thread.spawn(move || drop(reply.send(work())))?;
    answer.await.map_err(|_| io::Error::other("the thread ended without an answer"))
}

/// Copies the store in `from` to `to`. Blocks for as long as it takes.
pub(super) fn write(from: &Path, to: &Path) -> Result<BackupReport, BackupError> {
    let to = file::settle_path(to).map_err(|error| match error {
        OpenError::Io(source) => BackupError::Io { step: "finding its directory", source },
        other => BackupError::Check(other),
    })?;
    if is_part_of(&to, from) {
        return Err(BackupError::IsTheStore);
    }
    let partial = file::with_suffix(&to, ".partial");
    file::new_private_file(&partial).map_err(|source| BackupError::Io { step: "creating it", source })?;
    let result = copy(from, &partial).and_then(|report| {
        file::put_in_place(&partial, &to)
            .map_err(|source| BackupError::Io { step: "putting it in place", source })?;
        Ok(report)
    });
    if result.is_err() {
        // A full disk is made no fuller; what is left here is no backup and goes with the next attempt.
        let _ = std::fs::remove_file(&partial);
    }
    result
}

fn copy(from: &Path, partial: &Path) -> Result<BackupReport, BackupError> {
    let source = file::open_reader(from).map_err(BackupError::Check)?;
    let mut target = Connection::open(partial).map_err(BackupError::Copy)?;
    // All pages in one step: stepwise copies begin again with every commit, and a busy store never ends.
    let step = Backup::new(&source, &mut target).and_then(|backup| backup.step(-1));
    match step.map_err(BackupError::Copy)? {
        StepResult::Done => {}
        _ => return Err(BackupError::Copy(rusqlite::Error::QueryReturnedNoRows)),
    }
    drop(source);
    // Out of WAL mode, so that the backup is one file that opens from a read-only medium.
    // SQLite says so by the mode that it answers with, never by an error, when the disk refuses that.
    let mode = target.pragma_update_and_check(None, "journal_mode", "DELETE", |row| row.get::<_, String>(0));
    let mode = mode.map_err(BackupError::Copy)?;
    if mode != "delete" {
        return Err(BackupError::Check(OpenError::Damaged(format!("journal mode stays {mode}"))));
    }
    target.close().map_err(|(_, error)| BackupError::Copy(error))?;
    let copy = file::open_reader(partial).map_err(BackupError::Check)?;
    file::full_check(&copy).map_err(BackupError::Check)?;
    let revision = copy
        .query_row("SELECT revision FROM meta", [], |row| row.get(0).map(revision_from))
        .map_err(BackupError::Copy)?;
    Ok(BackupReport { revision })
}

fn is_part_of(to: &Path, store: &Path) -> bool {
    let side_file = |suffix| file::with_suffix(store, suffix);
    let parts: [PathBuf; 4] = [store.to_owned(), side_file("-wal"), side_file("-shm"), side_file(".lock")];
    parts.iter().any(|part| part == to)
}
