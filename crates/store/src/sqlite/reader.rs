//! Reading threads: each has a connection of its own and sees the newest commit when a statement begins.

use std::sync::{Mutex, PoisonError};

use rusqlite::types::Type;
use rusqlite::{Connection, ErrorCode, OptionalExtension};
use tokio::sync::mpsc;

use crate::{ReadError, Revision, Row, RowName};

/// Work for a reading thread; it sends its own answer.
pub(super) type ReadJob = Box<dyn FnOnce(&Connection) + Send>;

/// Sorts after every byte that a row name can have, so `prefix..prefix + LAST` is all names with the prefix.
const LAST: char = '\u{7f}';

pub(super) struct Reader(Connection);

impl Reader {
    pub(super) fn new(connection: Connection) -> Self {
        Self(connection)
    }

    pub(super) fn run(self, jobs: &Mutex<mpsc::Receiver<ReadJob>>) {
        loop {
            // The guard is dropped before the work, so that the other threads take their turn.
            let job = jobs.lock().unwrap_or_else(PoisonError::into_inner).blocking_recv();
            match job {
                Some(job) => job(&self.0),
                None => return,
            }
        }
    }
}

pub(super) fn get(connection: &Connection, name: &RowName) -> rusqlite::Result<Option<Row>> {
    connection
        .prepare_cached("SELECT name, revision, bytes FROM rows WHERE name = ?1")?
        .query_row([name.as_str()], row)
        .optional()
}

/// A page within its limits, ready to be asked for.
pub(super) struct Page {
    /// The operator and the bound from which it starts.
    start: (&'static str, String),
    end: String,
    limit: i64,
}

impl Page {
    pub(super) fn new(prefix: &str, after: Option<&RowName>, limit: usize) -> Result<Self, ReadError> {
        let limit = ReadError::page_limit(limit)?;
        let start = match after {
            Some(after) if after.as_str() >= prefix => (">", after.as_str().to_owned()),
            _ => (">=", prefix.to_owned()),
        };
        let limit = i64::try_from(limit).map_err(|_| ReadError::PageLimit(limit))?;
        Ok(Self { start, end: format!("{prefix}{LAST}"), limit })
    }

    pub(super) fn rows(&self, connection: &Connection) -> rusqlite::Result<Vec<Row>> {
        self.query(connection, "name, revision, bytes", row)
    }

    pub(super) fn revisions(&self, connection: &Connection) -> rusqlite::Result<Vec<(RowName, Revision)>> {
        self.query(connection, "name, revision", |row| Ok((name(row)?, revision(row)?)))
    }

    fn query<T>(
        &self,
        connection: &Connection,
        columns: &str,
        read: fn(&rusqlite::Row<'_>) -> rusqlite::Result<T>,
    ) -> rusqlite::Result<Vec<T>> {
        let (from, start) = &self.start;
        let sql =
            format!("SELECT {columns} FROM rows WHERE name {from} ?1 AND name < ?2 ORDER BY name LIMIT ?3");
        let mut statement = connection.prepare_cached(&sql)?;
        let rows = statement.query_map((start, &self.end, self.limit), read)?;
        rows.collect()
    }
}

pub(super) fn read_error(error: rusqlite::Error) -> ReadError {
    let corrupt = match &error {
        rusqlite::Error::FromSqlConversionFailure(..) | rusqlite::Error::IntegralValueOutOfRange(..) => true,
        other => {
            matches!(other.sqlite_error_code(), Some(ErrorCode::DatabaseCorrupt | ErrorCode::NotADatabase))
        }
    };
    if corrupt { ReadError::Corrupt(error.into()) } else { ReadError::Unavailable(error.into()) }
}

fn row(row: &rusqlite::Row<'_>) -> rusqlite::Result<Row> {
    Ok(Row { name: name(row)?, revision: revision(row)?, bytes: row.get(2)? })
}

fn name(row: &rusqlite::Row<'_>) -> rusqlite::Result<RowName> {
    RowName::try_from(row.get::<_, String>(0)?)
        .map_err(|error| rusqlite::Error::FromSqlConversionFailure(0, Type::Text, error.into()))
}

fn revision(row: &rusqlite::Row<'_>) -> rusqlite::Result<Revision> {
    row.get(1).map(revision_from)
}

/// SQLite's integers are signed; ours count up from 0 and get nowhere near the sign.
pub(super) fn revision_from(number: i64) -> Revision {
    Revision(number.unsigned_abs())
}
