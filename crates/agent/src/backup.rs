//! Backups: made while serving, verified at once, and only then counted.
//!
//! A backup is one SQLite file. Verified means: its pages are sound, its head
//! describes its rows, and every version in it opens. Only versions that a
//! verified backup holds lose their `unbacked` mark. Nothing here puts a backup
//! back: see [`crate::restore`].

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use fleet_kms_keyring::ClusterId;
use fleet_kms_store::SqliteStore;

use crate::authz::internal;
use crate::changes::Changes;
use crate::config;
use crate::ledger::{HeadError, Integrity, Ledger, LedgerError};
use crate::live_keyrings::{Held, LiveKeyrings, LoadError};
use crate::records::payload::BackupRecord;
use crate::records::rows;
use crate::times::from_ms;
use crate::trail::Event;

mod kept;
mod note;
mod schedule;

pub use kept::{Kept, slots_of};
pub use note::NoteError;
pub use schedule::run;

/// Why there is no new verified backup.
#[derive(Debug, thiserror::Error)]
pub enum BackupError {
    /// The store could not be copied.
    #[error("the store could not be copied to {file}")]
    Copy {
        file: String,
        #[source]
        source: fleet_kms_store::BackupError,
    },
    /// The store or its copy could not be opened.
    #[error("cannot open {file}")]
    Open {
        file: String,
        #[source]
        source: fleet_kms_store::OpenError,
    },
    /// The copy is not what was backed up.
    #[error("{file} is no good backup")]
    Unsound {
        file: String,
        #[source]
        source: Unsound,
    },
    /// Another backup took the place of this one before it was stored.
    #[error("another backup was begun meanwhile; run this one again")]
    Overtaken,
    /// The directory of the scheduled backups cannot be used.
    #[error("cannot use {file}")]
    Files {
        file: String,
        #[source]
        source: std::io::Error,
    },
    /// The backup is good, but the store could not note that.
    #[error("the backup is good, but the versions in it could not be marked as backed up")]
    Note(#[from] NoteError),
}

/// What is wrong with a backup.
#[derive(Debug, thiserror::Error)]
pub enum Unsound {
    /// The head cannot be used.
    #[error(transparent)]
    Head(#[from] HeadError),
    /// The keyrings cannot be read.
    #[error(transparent)]
    Keyrings(#[from] LoadError),
    /// Rows and head differ.
    #[error("its rows are not what the last transaction left")]
    Rows,
    /// A version does not open.
    #[error("{0} of its versions do not open; the agent's log names them")]
    Versions(usize),
}

/// A backup that was verified.
#[derive(Debug, Clone)]
pub struct Verified {
    /// When.
    pub at: SystemTime,
    /// The file.
    pub file: PathBuf,
    /// The clusters and versions in it.
    pub held: Held,
}

/// Makes backups and remembers the last verified one.
pub struct Backups {
    store: PathBuf,
    config: Option<config::Backup>,
    changes: Arc<Changes>,
    keyrings: Arc<LiveKeyrings>,
    last: Mutex<Option<(SystemTime, PathBuf)>>,
    /// A backup that was made for somebody on the host, who still has to store
    /// it.
    handed_over: Mutex<Option<(u64, Verified)>>,
    one_at_a_time: tokio::sync::Mutex<()>,
}

impl Backups {
    /// Makes the only maker of backups of the store at `store`, and removes what
    /// a crash left of a handed-over one: a copy of the store that nobody asked
    /// for would open with slots that are removed since.
    ///
    /// # Errors
    ///
    /// When the store cannot be read. A damaged record of the last backup counts
    /// as none.
    pub async fn load(
        store: PathBuf,
        config: Option<config::Backup>,
        changes: Arc<Changes>,
        keyrings: Arc<LiveKeyrings>,
    ) -> Result<Self, LedgerError> {
        remove_handovers(&store);
        let last = changes.ledger().read_sound::<BackupRecord>(&rows::fixed(rows::BACKUP)).await?;
        let last = last.map(|last| (from_ms(last.payload.verified_ms), PathBuf::from(last.payload.file)));
        Ok(Self {
            store,
            config,
            changes,
            keyrings,
            last: Mutex::new(last),
            handed_over: Mutex::default(),
            one_at_a_time: tokio::sync::Mutex::default(),
        })
    }

    /// Returns when the last backup was verified, and its file.
    pub fn last(&self) -> Option<(SystemTime, PathBuf)> {
        self.last.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Returns the age of the last verified backup.
    pub fn age(&self, now: SystemTime) -> Option<Duration> {
        self.last().map(|(at, _)| now.duration_since(at).unwrap_or_default())
    }

    /// Returns the scheduled backups that are kept.
    ///
    /// # Errors
    ///
    /// When their directory cannot be read.
    pub fn kept(&self) -> Result<Vec<Kept>, BackupError> {
        match &self.config {
            Some(config) => kept::list(&config.directory),
            None => Ok(Vec::new()),
        }
    }

    /// Makes and verifies a backup for somebody on the host, who copies it to
    /// where this process may not write, and then says so by
    /// [`Self::stored`] with the number returned.
    ///
    /// # Errors
    ///
    /// When the store cannot be copied or the copy is not sound.
    pub async fn hand_over(&self) -> Result<(u64, Verified), BackupError> {
        let verified = self.make(&handover_of(&self.store)).await?;
        let mut handed_over = self.handed_over.lock().unwrap_or_else(PoisonError::into_inner);
        let number = handed_over.as_ref().map_or(1, |(number, _)| number + 1);
        *handed_over = Some((number, verified.clone()));
        Ok((number, verified))
    }

    /// Notes that a handed-over backup is durable at `file`.
    ///
    /// # Errors
    ///
    /// When another one was handed over since, or the store says no.
    pub async fn stored(&self, number: u64, file: PathBuf) -> Result<Verified, BackupError> {
        let taken = {
            let mut handed_over = self.handed_over.lock().unwrap_or_else(PoisonError::into_inner);
            handed_over.take_if(|(known, _)| *known == number)
        };
        let (_, verified) = taken.ok_or(BackupError::Overtaken)?;
        // A leftover is replaced by the next one.
        let _ = std::fs::remove_file(&verified.file);
        let verified = Verified { file, ..verified };
        self.note(&verified).await?;
        Ok(verified)
    }

    /// Waits for a backup if the configuration asks that nothing new is used
    /// without one.
    ///
    /// # Errors
    ///
    /// When there is none.
    pub async fn wait_if_required(&self) -> Result<(), BackupError> {
        match &self.config {
            Some(config) if config.required => self.scheduled(config).await.map(drop),
            _ => Ok(()),
        }
    }

    /// Returns the unbacked versions of each cluster that has some.
    pub fn unbacked(&self) -> Vec<(ClusterId, usize)> {
        let keyrings = self.keyrings.keyrings().into_iter();
        let counted = keyrings.map(|(cluster, snapshot)| (cluster, snapshot.keyring.unbacked().count()));
        counted.filter(|(_, unbacked)| *unbacked > 0).collect()
    }

    /// Copies the store and verifies the copy, which is removed if it is not
    /// sound.
    async fn make(&self, to: &Path) -> Result<Verified, BackupError> {
        let _one = self.one_at_a_time.lock().await;
        let at = self.changes.now();
        let file = || to.display().to_string();
        let store = self.store.clone();
        let opened = blocking(move || SqliteStore::open_read_only(store)).await;
        let source = opened.map_err(|source| BackupError::Open { file: text(&self.store), source })?;
        source.backup(to).await.map_err(|source| BackupError::Copy { file: file(), source })?;
        blocking(move || drop(source)).await;
        match self.verify(to).await {
            Ok(held) => Ok(Verified { at, file: to.to_owned(), held }),
            Err(error) => {
                let _ = std::fs::remove_file(to);
                let event = Event::new("backup_failed", "backup").reason(Some(&crate::errors::chain(&error)));
                self.changes.event(event.target(file())).await;
                Err(error)
            }
        }
    }

    /// Opens every version of a copy with the keys of the live store.
    async fn verify(&self, file: &Path) -> Result<Held, BackupError> {
        let path = file.to_owned();
        let opened = blocking(move || SqliteStore::open_read_only(path)).await;
        let copy = opened.map_err(|source| BackupError::Open { file: text(file), source })?;
        let unsound = |source: Unsound| BackupError::Unsound { file: text(file), source };
        let copy = self.changes.ledger().of_copy(Arc::new(copy)).await;
        let copy = copy.map_err(|error| unsound(error.into()))?;
        look_into(&copy, &self.keyrings).await.map_err(unsound)
    }
}

/// Compares a copy's head with its rows and opens every version in it.
///
/// # Errors
///
/// Says what is wrong with it.
pub async fn look_into(copy: &Ledger, keyrings: &LiveKeyrings) -> Result<Held, Unsound> {
    if matches!(copy.check().await?, Integrity::Broken { .. }) {
        return Err(Unsound::Rows);
    }
    let (held, damaged) = keyrings.open_copy(&internal::backup(), copy).await?;
    if damaged.is_empty() { Ok(held) } else { Err(Unsound::Versions(damaged.len())) }
}

/// Removes what a crash left of a handed-over backup, SQLite's side files
/// included. What cannot be removed is replaced by the next one.
fn remove_handovers(store: &Path) {
    let handover = handover_of(store);
    let directory = store.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let Some(prefix) = handover.file_name().and_then(|name| name.to_str()) else { return };
    for entry in std::fs::read_dir(directory).into_iter().flatten().flatten() {
        if entry.file_name().to_str().is_some_and(|name| name.starts_with(prefix)) {
            let _ = std::fs::remove_file(entry.path());
        }
    }
}

/// Where a backup waits for whoever asked for it.
fn handover_of(store: &Path) -> PathBuf {
    store.with_added_extension("handover")
}

/// Runs what waits for the disk off the runtime's threads.
async fn blocking<T: Send + 'static>(operation: impl FnOnce() -> T + Send + 'static) -> T {
    tokio::task::spawn_blocking(operation).await.expect("nothing in here panics")
}

fn text(path: &Path) -> String {
    path.display().to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_crash_left_of_a_handed_over_backup_is_removed_and_nothing_else() {
        let directory = tempfile::tempdir().unwrap();
        let store = directory.path().join("store.db");
        let left = [".handover", ".handover-shm", ".handover.partial", ".handover.partial-journal"];
        let own = ["", "-wal", ".lock", ".partial"];
        let path = |suffix: &str| directory.path().join(format!("store.db{suffix}"));
        left.iter().chain(&own).for_each(|suffix| std::fs::write(path(suffix), "").unwrap());
        remove_handovers(&store);
        assert!(left.iter().all(|suffix| !path(suffix).exists()));
        assert!(own.iter().all(|suffix| path(suffix).exists()));
    }
}
