//! Putting another file in a store's place: what a restore ends with.
//!
//! The store's lock is held from the first look to the end, so that no agent runs meanwhile. The file that was
//! there is moved aside, never deleted. A crash between the steps leaves no store under the name, which refuses
//! to start, and never one file with another's log beside it, which SQLite would play into it.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

use super::lock::StoreLock;
use super::{backup, file};
use crate::{BackupError, OpenError, SqliteStore};

/// SQLite's own files beside a database.
const SIDE_FILES: [&str; 2] = ["-wal", "-shm"];

/// The right to put another store in the place of one.
pub struct Replacement {
    path: PathBuf,
    _lock: StoreLock,
}

impl SqliteStore {
    /// Takes the place of the store at `path`, which may be absent. Blocks on the disk.
    ///
    /// # Errors
    /// When another process has the store open.
    pub fn replace(path: impl AsRef<Path>) -> Result<Replacement, OpenError> {
        let path = file::settle_path(path.as_ref())?;
        let lock = StoreLock::take(&path)?;
        Ok(Replacement { path, _lock: lock })
    }
}

impl Replacement {
    /// Where the new store is made ready; only [`Self::finish`] gives it its name.
    #[must_use]
    pub fn unfinished(&self) -> PathBuf {
        file::with_suffix(&self.path, ".restoring")
    }

    /// Checks a backup and copies it to [`Self::unfinished`], in place of what an interrupted restore left.
    /// Blocks on the disk.
    ///
    /// # Errors
    /// When the backup is not sound or the copy cannot be written.
    pub fn copy(&self, backup: &Path) -> Result<PathBuf, BackupError> {
        let unfinished = self.unfinished();
        for suffix in SIDE_FILES {
            remove(&file::with_suffix(&unfinished, suffix))
                .map_err(|source| BackupError::Io { step: "removing an unfinished restore", source })?;
        }
        let backup = file::settle_path(backup).map_err(BackupError::Check)?;
        file::must_exist(&backup).map_err(BackupError::Check)?;
        backup::write(&backup, &unfinished)?;
        Ok(unfinished)
    }

    /// Moves the store that is there aside, to its name with `suffix`, and puts the finished one, which nobody
    /// has open any more, in its place. Durable on return. Blocks on the disk.
    ///
    /// # Errors
    /// When the file system refuses; a restore can then simply be run again.
    pub fn finish(self, suffix: &str) -> io::Result<Option<PathBuf>> {
        let aside = file::with_suffix(&self.path, suffix);
        let moved = rename(&self.path, &aside)?;
        for side in SIDE_FILES {
            rename(&file::with_suffix(&self.path, side), &file::with_suffix(&aside, side))?;
        }
        let directory = self.path.parent().unwrap_or(Path::new("/"));
        File::open(directory)?.sync_all()?;
        file::put_in_place(&self.unfinished(), &self.path)?;
        remove(&file::with_suffix(&self.unfinished(), ".lock"))?;
        Ok(moved.then_some(aside))
    }
}

fn rename(from: &Path, to: &Path) -> io::Result<bool> {
    match fs::rename(from, to) {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(error),
    }
}

fn remove(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{RowName, Store, Txn};

    async fn put(store: &SqliteStore, value: &[u8]) {
        let row = RowName::try_from("row").unwrap();
        store.commit(Txn::new().put(row, value.to_vec())).await.unwrap();
    }

    async fn value(store: &SqliteStore) -> Vec<u8> {
        store.get(&RowName::try_from("row").unwrap()).await.unwrap().unwrap().bytes
    }

    #[tokio::test]
    async fn a_backup_takes_the_place_of_a_store_that_is_moved_aside() {
        let directory = tempfile::tempdir().unwrap();
        let (path, backup) = (directory.path().join("store.db"), directory.path().join("backup.db"));
        let store = SqliteStore::create(&path).unwrap();
        put(&store, b"old").await;
        store.backup(&backup).await.unwrap();
        put(&store, b"new").await;
        assert!(matches!(SqliteStore::replace(&path), Err(OpenError::InUse { .. })));
        drop(store);

        let replacement = SqliteStore::replace(&path).unwrap();
        assert!(matches!(SqliteStore::open(&path), Err(OpenError::InUse { .. })));
        let unfinished = replacement.copy(&backup).unwrap();
        drop(SqliteStore::open(&unfinished).unwrap());
        let aside = replacement.finish(".replaced").unwrap().unwrap();
        assert_eq!(value(&SqliteStore::open(&path).unwrap()).await, b"old");
        assert_eq!(value(&SqliteStore::open(&aside).unwrap()).await, b"new");
    }

    #[tokio::test]
    async fn a_log_without_its_store_is_moved_aside_too() {
        let directory = tempfile::tempdir().unwrap();
        let (path, backup) = (directory.path().join("store.db"), directory.path().join("backup.db"));
        let store = SqliteStore::create(&path).unwrap();
        put(&store, b"old").await;
        store.backup(&backup).await.unwrap();
        drop(store);
        fs::remove_file(&path).unwrap();
        fs::write(directory.path().join("store.db-wal"), b"of a store that is gone").unwrap();

        let replacement = SqliteStore::replace(&path).unwrap();
        replacement.copy(&backup).unwrap();
        assert_eq!(replacement.finish(".replaced").unwrap(), None);
        assert_eq!(value(&SqliteStore::open(&path).unwrap()).await, b"old");
    }

    #[test]
    fn what_is_no_backup_changes_nothing() {
        let directory = tempfile::tempdir().unwrap();
        let (path, backup) = (directory.path().join("store.db"), directory.path().join("backup.db"));
        fs::write(&backup, [7; 200]).unwrap();
        let replacement = SqliteStore::replace(&path).unwrap();
        assert!(replacement.copy(&backup).is_err());
        assert!(!replacement.unfinished().exists() && !path.exists());
    }
}
