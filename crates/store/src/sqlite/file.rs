//! The SQLite file itself: how it is made, opened, recognised and checked.
//!
//! A file is ours by its `application_id`; its `user_version` is the database format. A newer format is
//! refused, so that no old program drops what it does not understand.

use std::ffi::OsString;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use rusqlite::{Connection, ErrorCode, OpenFlags};

/// "fkms" in the SQLite header, so that `file` and we can tell our stores from other databases.
const APPLICATION_ID: i64 = 0x666b_6d73;
/// The database format; every change of the schema raises it.
const FORMAT: i64 = 1;
/// The length of SQLite's file header.
const HEADER: u64 = 100;
/// How long a connection waits for a lock that another program (`sqlite3`, a backup tool) holds.
const BUSY_TIMEOUT: Duration = Duration::from_secs(5);
/// What is left of the write-ahead log's file after a checkpoint.
const WAL_KEPT: i64 = 16 * 1024 * 1024;

/// `meta.settled` is what an attempt to settle an unclear commit writes; see `writer.rs`.
const SCHEMA: &str = "
CREATE TABLE rows (
    name TEXT NOT NULL PRIMARY KEY,
    revision INTEGER NOT NULL,
    bytes BLOB NOT NULL
) STRICT, WITHOUT ROWID;
CREATE TABLE meta (
    id INTEGER PRIMARY KEY CHECK (id = 1),
    revision INTEGER NOT NULL,
    settled INTEGER NOT NULL
) STRICT;
INSERT INTO meta VALUES (1, 0, 0);
";

/// Why a store could not be opened or created.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// No file has this name.
    #[error("there is no store at this path; create one first")]
    NotFound,
    /// A file to be created is there already.
    #[error("a file is in the way of the new store")]
    Exists,
    /// Another process has it open.
    #[error(
        "the store is in use by {}; stop that one first",
        .pid.map_or("another process".to_owned(), |pid| format!("process {pid}"))
    )]
    InUse {
        /// The other process, when its lock file says so.
        pid: Option<u32>,
    },
    /// It is something else, or cut off so early that nothing can be recognised.
    #[error("the file is no sqlite database; restore the store from a backup")]
    NotADatabase,
    /// It is a SQLite database of another program, or an empty one.
    #[error("the file is a sqlite database but no fleet-kms store; name the right file, or restore a backup")]
    Foreign,
    /// A newer program wrote it.
    #[error(
        "the store has format {found} and this program knows up to {known}; \
         install the newer program again or restore a backup made before the upgrade"
    )]
    NewerFormat {
        /// The format in the file.
        found: i64,
        /// The newest format that this program knows.
        known: i64,
    },
    /// Its structure is broken.
    #[error("the store is damaged and must be restored from a backup: {0}")]
    Damaged(String),
    /// SQLite could not work with it.
    #[error("sqlite cannot use the store")]
    Sqlite(#[source] rusqlite::Error),
    /// The file system refused.
    #[error("the store's file cannot be used")]
    Io(#[source] io::Error),
}

impl From<rusqlite::Error> for OpenError {
    fn from(error: rusqlite::Error) -> Self {
        match error.sqlite_error_code() {
            Some(ErrorCode::NotADatabase) => Self::NotADatabase,
            Some(ErrorCode::DatabaseCorrupt) => Self::Damaged(error.to_string()),
            _ => Self::Sqlite(error),
        }
    }
}

/// Resolves links, so that one file has one lock whatever it is called by.
pub(super) fn settle_path(path: &Path) -> Result<PathBuf, OpenError> {
    match fs::canonicalize(path) {
        Ok(path) => Ok(path),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            let directory = fs::canonicalize(directory_of(path)).map_err(OpenError::Io)?;
            let name = path.file_name().ok_or(OpenError::NotFound)?;
            Ok(directory.join(name))
        }
        Err(error) => Err(OpenError::Io(error)),
    }
}

/// Refuses a file that is absent, or shorter than a header: SQLite would take it for a new database.
///
/// It looks from outside: closing a second handle on a database drops this process's locks on it.
pub(super) fn must_exist(path: &Path) -> Result<(), OpenError> {
    match fs::metadata(path) {
        Ok(metadata) if metadata.len() < HEADER => Err(OpenError::NotADatabase),
        Ok(_) => Ok(()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Err(OpenError::NotFound),
        Err(error) => Err(OpenError::Io(error)),
    }
}

/// Makes an empty store under another name and renames it: a crash leaves no half-made store.
pub(super) fn create(path: &Path) -> Result<(), OpenError> {
    if path.try_exists().map_err(OpenError::Io)? {
        return Err(OpenError::Exists);
    }
    let new = with_suffix(path, ".new");
    new_private_file(&new).map_err(OpenError::Io)?;
    let connection = open(&new, OpenFlags::SQLITE_OPEN_READ_WRITE)?;
    connection.execute_batch(&format!("BEGIN IMMEDIATE;{SCHEMA}COMMIT;"))?;
    connection.pragma_update(None, "application_id", APPLICATION_ID)?;
    connection.pragma_update(None, "user_version", FORMAT)?;
    connection.close().map_err(|(_, error)| error)?;
    put_in_place(&new, path).map_err(OpenError::Io)
}

/// Opens the one connection that writes, after every check that a start owes the operator.
pub(super) fn open_writer(path: &Path) -> Result<Connection, OpenError> {
    sync_log(path).map_err(OpenError::Io)?;
    let connection = open(path, OpenFlags::SQLITE_OPEN_READ_WRITE)?;
    recognise(&connection)?;
    // A file copied back by hand often comes with the copier's umask; SQLite gives its side files our mode.
    fs::set_permissions(path, fs::Permissions::from_mode(0o600)).map_err(OpenError::Io)?;
    connection.pragma_update(None, "journal_mode", "WAL")?;
    let mode: String = connection.pragma_query_value(None, "journal_mode", |row| row.get(0))?;
    if mode != "wal" {
        return Err(OpenError::Damaged(format!("journal mode stays {mode}")));
    }
    connection.pragma_update(None, "synchronous", "FULL")?;
    connection.pragma_update(None, "journal_size_limit", WAL_KEPT)?;
    // A destroyed key's sealed bytes shall not stay in free pages.
    connection.pragma_update(None, "secure_delete", "ON")?;
    check(&connection, "quick_check")?;
    fold_log(&connection, path)?;
    // SQLite has made the log by now. It syncs its directory with the first commit, but does not look whether
    // that failed: a log without a durable name is a log that a power cut takes away, commits and all.
    File::open(directory_of(path)).and_then(|directory| directory.sync_all()).map_err(OpenError::Io)?;
    Ok(connection)
}

/// Opens a connection that reads.
pub(super) fn open_reader(path: &Path) -> Result<Connection, OpenError> {
    let connection = open(path, OpenFlags::SQLITE_OPEN_READ_ONLY)?;
    recognise(&connection)?;
    Ok(connection)
}

/// Checks every page and index.
pub(super) fn full_check(connection: &Connection) -> Result<(), OpenError> {
    check(connection, "integrity_check")
}

fn open(path: &Path, access: OpenFlags) -> Result<Connection, OpenError> {
    let flags = access | OpenFlags::SQLITE_OPEN_NO_MUTEX | OpenFlags::SQLITE_OPEN_EXRESCODE;
    let connection = Connection::open_with_flags(path, flags)?;
    connection.busy_timeout(BUSY_TIMEOUT)?;
    connection.pragma_update(None, "trusted_schema", "OFF")?;
    connection.pragma_update(None, "temp_store", "MEMORY")?;
    Ok(connection)
}

fn recognise(connection: &Connection) -> Result<(), OpenError> {
    let number = |pragma| connection.pragma_query_value(None, pragma, |row| row.get::<_, i64>(0));
    if number("application_id")? != APPLICATION_ID {
        return Err(OpenError::Foreign);
    }
    match number("user_version")? {
        FORMAT => Ok(()),
        found if found > FORMAT => Err(OpenError::NewerFormat { found, known: FORMAT }),
        found => Err(OpenError::Damaged(format!("format {found} was never written"))),
    }
}

fn check(connection: &Connection, pragma: &str) -> Result<(), OpenError> {
    let found: String = connection.pragma_query_value(None, pragma, |row| row.get(0))?;
    if found == "ok" { Ok(()) } else { Err(OpenError::Damaged(found)) }
}

/// Makes durable what a killed process had written to the log but not synced: we are about to show it.
fn sync_log(path: &Path) -> io::Result<()> {
    match File::open(with_suffix(path, "-wal")) {
        Ok(log) => log.sync_all(),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(error),
    }
}

/// Folds the log into the database if it can, and then finds a last page that is cut short: SQLite reads
/// zeros there, and zeros may be what the page's end holds.
fn fold_log(connection: &Connection, path: &Path) -> Result<(), OpenError> {
    let folded = connection.query_row("PRAGMA wal_checkpoint(TRUNCATE)", [], |row| row.get::<_, i64>(0));
    if folded.ok() != Some(0) {
        // Pages may still live in the log only: a full disk is no damage.
        return Ok(());
    }
    let number = |pragma| connection.pragma_query_value(None, pragma, |row| row.get::<_, i64>(0));
    let expected = number("page_count")?.saturating_mul(number("page_size")?).unsigned_abs();
    let found = fs::metadata(path).map_err(OpenError::Io)?.len();
    if found < expected {
        return Err(OpenError::Damaged(format!("the file has {found} of {expected} bytes")));
    }
    Ok(())
}

/// Makes an empty file with mode 0600 in place of a leftover of an earlier crash.
pub(super) fn new_private_file(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    OpenOptions::new().write(true).create_new(true).mode(0o600).open(path).map(drop)
}

/// Gives a finished file its name, durably.
pub(super) fn put_in_place(from: &Path, to: &Path) -> io::Result<()> {
    File::open(from)?.sync_all()?;
    fs::rename(from, to)?;
    File::open(directory_of(to))?.sync_all()
}

/// Appends to a path's last part.
pub(super) fn with_suffix(path: &Path, suffix: &str) -> PathBuf {
    let mut path = OsString::from(path);
    path.push(suffix);
    path.into()
}

fn directory_of(path: &Path) -> &Path {
    match path.parent() {
        Some(directory) if !directory.as_os_str().is_empty() => directory,
        _ => Path::new("."),
    }
}
