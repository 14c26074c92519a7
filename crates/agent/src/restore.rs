//! `kms-agent restore`: puts a backup in the store's place and makes it good.
//!
//! A command, never a file copy: it refuses while an agent runs, works on a
//! copy beside the store, and gives that its name only when it is finished. The
//! store that was there is moved aside, never deleted.

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use fleet_kms_audit::{ChangeLog, LogError};
use fleet_kms_process::exit;
use fleet_kms_seal::RootSlot;
use fleet_kms_store::{SqliteStore, Store};
use fleet_kms_transport::Clock;
use time::OffsetDateTime;

use crate::backup::{self, Unsound};
use crate::bans::{self, Bans, BansError};
use crate::changes::Changes;
use crate::clusters::{ClusterError, Clusters};
use crate::config::Config;
use crate::control_plane::ControlPlane;
use crate::identities::{IdentityError, LiveIdentities};
use crate::ledger::{Generator, LedgerError};
use crate::live_keyrings::{LiveKeyrings, LoadError};
use crate::recovery::{RecoverError, Recovered, Recovery};
use crate::storage::{self, Storage, StorageError};
use crate::witness::{Seen, Witness};

/// What `restore` is told on its command line.
pub struct Options {
    /// The backup.
    pub file: PathBuf,
    /// Audit directories of all agents that used the lost store.
    pub bans_from: Vec<PathBuf>,
    /// Goes on although no audit was found: all bans since the backup are lost.
    pub without_bans: bool,
    /// Opens the backup, and what it is called.
    pub root: (Box<dyn RootSlot>, String),
}

/// What `restore` did, for the operator to read.
#[derive(Debug)]
pub struct Done {
    store: PathBuf,
    aside: Option<PathBuf>,
    recovered: Recovered,
    bans: Bans,
}

impl fmt::Display for Done {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "restored        {}", self.store.display())?;
        if let Some(aside) = &self.aside {
            writeln!(f, "moved aside     {}", aside.display())?;
        }
        writeln!(f, "rotated fresh   {} clusters", self.recovered.rotated)?;
        writeln!(
            f,
            "banned          {} identities, from {} audit records",
            self.recovered.banned, self.bans.lines
        )?;
        for directory in &self.bans.broken {
            writeln!(f, "WARNING: the chain in {directory} does not hold: bans may be missing")?;
        }
        write!(f, "Start the agent, then make a backup: no backup holds the fresh versions yet.")
    }
}

/// Why the backup was not restored. The store is as it was.
#[derive(Debug, thiserror::Error)]
pub enum RestoreError {
    /// An agent runs, or the store's directory cannot be used.
    #[error("cannot take the place of {store}; stop the agent first")]
    Place {
        store: String,
        #[source]
        source: fleet_kms_store::OpenError,
    },
    /// The audit cannot be read.
    #[error(transparent)]
    Bans(#[from] BansError),
    /// Nothing says who was banned.
    #[error(
        "no audit record was found in {0}; name the audit directories of all agents with --bans-from, or accept with --without-bans that every ban since the backup is lost"
    )]
    NoAudit(String),
    /// The backup cannot be copied.
    #[error("cannot copy {file}")]
    Copy {
        file: String,
        #[source]
        source: fleet_kms_store::BackupError,
    },
    /// The copy cannot be opened.
    #[error("cannot open the copy of the backup")]
    Open(#[source] fleet_kms_store::OpenError),
    /// No slot opens it.
    #[error(transparent)]
    Storage(#[from] StorageError),
    /// It is not what was backed up.
    #[error("{file} is no good backup; try an older one")]
    Unsound {
        file: String,
        #[source]
        source: Unsound,
    },
    /// Its keyrings cannot be read.
    #[error(transparent)]
    Keyrings(#[from] LoadError),
    /// Its clusters cannot be read.
    #[error(transparent)]
    Clusters(#[from] ClusterError),
    /// Its identities cannot be read.
    #[error(transparent)]
    Identities(#[from] IdentityError),
    /// An open intent cannot be looked up.
    #[error(transparent)]
    Ledger(#[from] LedgerError),
    /// The audit cannot be written.
    #[error("cannot use the audit in {path}")]
    Audit {
        path: String,
        #[source]
        source: LogError,
    },
    /// It could not be made good.
    #[error("the restored store could not be made good; run the command again")]
    Recover(#[from] RecoverError),
    /// The finished store could not be put in place.
    #[error("cannot put the restored store in place; run the command again")]
    Finish(#[source] io::Error),
}

impl RestoreError {
    /// Returns the exit status.
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::Place { .. } => exit::BUSY,
            Self::NoAudit(_) => exit::CONFIG,
            Self::Storage(error) => error.exit_code(),
            _ => exit::DATA,
        }
    }
}

/// Restores a backup.
///
/// # Errors
///
/// See [`RestoreError`]; the store is then as it was.
pub async fn run(
    config: &Config,
    options: &Options,
    clock: Clock,
    generator: Generator,
) -> Result<Done, RestoreError> {
    let (store, file) = (&config.store, options.file.display().to_string());
    let place = |source| RestoreError::Place { store: store.display().to_string(), source };
    let replacement = SqliteStore::replace(store).map_err(place)?;
    let directories = audits(config, &options.bans_from);
    let bans = bans::read(&directories)?;
    if bans.lines == 0 && !options.without_bans {
        let names: Vec<_> = directories.iter().map(|path| path.display().to_string()).collect();
        return Err(RestoreError::NoAudit(names.join(", ")));
    }
    let copied = replacement.copy(&options.file);
    let copy = copied.map_err(|source| RestoreError::Copy { file: file.clone(), source })?;
    let opened: Arc<dyn Store> = Arc::new(SqliteStore::open(&copy).map_err(RestoreError::Open)?);
    let (slot, root) = &options.root;
    let storage =
        storage::open_with((opened, &copy), (&**slot, root), config.name.as_str(), generator).await?;
    let id = storage.ledger.codec().store();
    let seen = directories.iter().filter_map(|directory| Witness::new(directory).read().ok().flatten());
    let count = seen.filter(|seen| seen.store == id).map(|seen| seen.count).max().unwrap_or(0);
    // Everything over the copy is dropped in here, so that its file is closed.
    let recovered = make_good(config, &file, storage, (&bans, count), (&clock, generator)).await?;
    let aside = replacement.finish(&suffix(&clock)).map_err(RestoreError::Finish)?;
    let seen = Seen { store: id, count: recovered.count };
    Witness::new(&config.audit).write(seen).map_err(RestoreError::Finish)?;
    Ok(Done { store: store.clone(), aside, recovered, bans })
}

/// Verifies the copy, and does to it what the lost days ask for.
async fn make_good(
    config: &Config,
    file: &str,
    storage: Storage,
    (bans, count): (&Bans, u64),
    (clock, generator): (&Clock, Generator),
) -> Result<Recovered, RestoreError> {
    let Storage { ledger, store_keys, .. } = storage;
    let (keyrings, _) = LiveKeyrings::load(&ledger, store_keys, generator).await?;
    let keyrings = Arc::new(keyrings);
    let unsound = |source| RestoreError::Unsound { file: file.to_owned(), source };
    backup::look_into(&ledger, &keyrings).await.map_err(unsound)?;
    let audit = |source| RestoreError::Audit { path: config.audit.display().to_string(), source };
    let log = ChangeLog::open(&config.audit).map_err(audit)?;
    // The real witness learns of the copy only once that is in place.
    let changes =
        Changes::new(Arc::clone(&ledger), log, Witness::nowhere(), None, Arc::clone(clock), generator);
    let changes = Arc::new(changes);
    changes.close_lost_intents().await?;
    let clusters = Arc::new(Clusters::load(&ledger).await?);
    let control_plane =
        ControlPlane::new(Arc::clone(&changes), Arc::clone(&keyrings), clusters, config.rotation, generator);
    let identities = Arc::new(LiveIdentities::load(&ledger).await?);
    let recovery = Recovery {
        changes: &changes,
        keyrings: &keyrings,
        control_plane: &control_plane,
        identities: &identities,
    };
    Ok(recovery.run(bans, count).await?)
}

/// The audits that were named, and the agent's own if it is there.
pub(crate) fn audits(config: &Config, bans_from: &[PathBuf]) -> Vec<PathBuf> {
    let own = config.audit.is_dir().then(|| config.audit.clone());
    let mut directories: Vec<PathBuf> = bans_from.iter().cloned().chain(own).collect();
    directories.sort();
    directories.dedup();
    directories
}

/// What the store that was there is called from now on.
fn suffix(clock: &Clock) -> String {
    let now = OffsetDateTime::from(clock());
    let (hour, minute, second) = now.to_hms();
    let (year, month, day) = (now.year(), u8::from(now.month()), now.day());
    format!(".replaced-{year:04}{month:02}{day:02}T{hour:02}{minute:02}{second:02}Z")
}

/// Gives what root made in the agent's directories to their owners, so that the
/// agent's user can use it.
///
/// # Errors
///
/// When a directory cannot be read or an owner not be set.
pub fn settle_owners(config: &Config) -> io::Result<()> {
    if !rustix::process::geteuid().is_root() {
        return Ok(());
    }
    for directory in [config.store.parent(), Some(&*config.audit)].into_iter().flatten() {
        settle(directory)?;
    }
    Ok(())
}

fn settle(directory: &Path) -> io::Result<()> {
    use std::os::unix::fs::{MetadataExt as _, lchown};
    let owner = directory.metadata()?;
    if owner.uid() == 0 {
        return Ok(());
    }
    for entry in directory.read_dir()? {
        let entry = entry?;
        let found = entry.metadata()?;
        if found.is_file() && found.uid() == 0 {
            lchown(entry.path(), Some(owner.uid()), Some(owner.gid()))?;
        }
    }
    Ok(())
}
