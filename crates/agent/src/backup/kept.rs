//! The files of scheduled backups: named by their time, the oldest go first.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use fleet_kms_keyring::SlotId;
use fleet_kms_store::SqliteStore;

use super::{BackupError, blocking, text};
use crate::storage;
use crate::times::stamp;

const BEFORE: &str = "store-";
const AFTER: &str = ".db";
/// `20261124T084603Z`.
const TIME: usize = 16;

/// A scheduled backup on disk.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Kept {
    /// The file's name: sorts by time.
    pub name: String,
    /// The file.
    pub path: PathBuf,
}

/// Returns the name of a backup made at `now`.
pub(super) fn name_at(now: SystemTime) -> String {
    format!("{BEFORE}{}{AFTER}", stamp(now))
}

/// Lists the backups in a directory, oldest first; no other file is one.
pub(super) fn list(directory: &Path) -> Result<Vec<Kept>, BackupError> {
    let failed = |source| BackupError::Files { file: text(directory), source };
    let mut kept = Vec::new();
    for entry in fs::read_dir(directory).map_err(failed)? {
        let path = entry.map_err(failed)?.path();
        let name = path.file_name().and_then(|name| name.to_str()).filter(|name| is_name(name));
        if let Some(name) = name.map(str::to_owned) {
            kept.push(Kept { name, path });
        }
    }
    kept.sort();
    Ok(kept)
}

/// Removes the oldest backups beyond `keep`, never `newest`. What calls itself
/// later than that was made while the clock was wrong and counts as the oldest.
pub(super) fn prune(directory: &Path, keep: usize, newest: &Path) -> Result<(), BackupError> {
    let (mut kept, from_the_future): (Vec<_>, Vec<_>) =
        list(directory)?.into_iter().partition(|kept| kept.path.as_path() <= newest);
    kept.splice(..0, from_the_future);
    let excess = kept.len().saturating_sub(keep.max(1));
    for old in kept.iter().take(excess).filter(|kept| kept.path != newest) {
        fs::remove_file(&old.path)
            .or_else(|error| if error.kind() == io::ErrorKind::NotFound { Ok(()) } else { Err(error) })
            .map_err(|source| BackupError::Files { file: text(&old.path), source })?;
    }
    Ok(())
}

/// Returns the root slots that open a backup, without opening it.
///
/// # Errors
///
/// When the file is no store.
pub async fn slots_of(file: &Path) -> Result<Vec<SlotId>, BackupError> {
    let path = file.to_owned();
    let store = blocking(move || SqliteStore::open_read_only(path)).await;
    let store = store.map_err(|source| BackupError::Open { file: text(file), source })?;
    let slots = storage::slots(&store).await;
    let slots =
        slots.map_err(|error| BackupError::Files { file: text(file), source: io::Error::other(error) })?;
    Ok(slots.iter().map(|slot| slot.slot()).collect())
}

fn is_name(name: &str) -> bool {
    let time = name.strip_prefix(BEFORE).and_then(|rest| rest.strip_suffix(AFTER));
    time.is_some_and(|time| {
        time.len() == TIME && time.bytes().all(|byte| byte.is_ascii_digit() || matches!(byte, b'T' | b'Z'))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::times::from_ms;

    #[test]
    fn the_oldest_backups_go_and_nothing_else_does() {
        let directory = tempfile::tempdir().unwrap();
        let day = |n: u64| name_at(from_ms(1_795_000_000_000 + n * 86_400_000));
        assert_eq!(day(0), "store-20261118T110640Z.db");
        let others = ["store.db", "store-20261118T110640Z.db.partial", "store-of-mine.db"];
        for name in (0..5).map(day).chain(others.map(str::to_owned)) {
            fs::write(directory.path().join(name), "").unwrap();
        }
        prune(directory.path(), 2, &directory.path().join(day(4))).unwrap();
        let kept: Vec<_> = list(directory.path()).unwrap().into_iter().map(|kept| kept.name).collect();
        assert_eq!(kept, [day(3), day(4)]);
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 5);
    }

    #[test]
    fn backups_from_a_clock_that_was_ahead_go_first_and_the_newest_never() {
        let directory = tempfile::tempdir().unwrap();
        let day = |n: u64| name_at(from_ms(1_795_000_000_000 + n * 86_400_000));
        for name in [day(0), day(1), day(9_000), day(9_001)] {
            fs::write(directory.path().join(name), "").unwrap();
        }
        prune(directory.path(), 2, &directory.path().join(day(1))).unwrap();
        let kept: Vec<_> = list(directory.path()).unwrap().into_iter().map(|kept| kept.name).collect();
        assert_eq!(kept, [day(0), day(1)]);
    }
}
