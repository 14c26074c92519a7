//! The one writing thread.
//!
//! A commit that fails at its very end is the hard case. SQLite rolls it back in memory, but its frames,
//! commit mark included, may already be in the write-ahead log: after a crash, recovery would find and apply
//! them. The next transaction that is written and synced overwrites the first of these frames, and the
//! checksums of the rest no longer chain. So after such a failure the writer *settles*: it commits a tiny
//! transaction of its own. If that succeeds, the failed one is gone for ever and was `NotApplied`. If not, it
//! is `Unknown`, and until settling succeeds no read is answered and no commit is taken: an answer might be
//! undone by the next start.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use rusqlite::{Connection, ErrorCode, OptionalExtension};
use tokio::sync::{mpsc, oneshot};

use super::file;
use super::reader::revision_from;
use crate::changes::ChangeHub;
use crate::txn::TxnParts;
use crate::{BoxError, CommitError, Operation, Revision, RowName};

const SETTLE: &str = "UPDATE meta SET settled = settled + 1";

/// Work for the writing thread.
pub(super) enum WriterJob {
    /// Apply a transaction.
    Commit { parts: TxnParts, reply: oneshot::Sender<Result<Revision, CommitError>> },
    /// Make sure that a failed commit cannot come back.
    Settle { reply: oneshot::Sender<Result<(), BoxError>> },
}

pub(super) struct Writer {
    path: PathBuf,
    /// `None` after a failed rollback: closing the connection rolls back, the next job opens a new one.
    connection: Option<Connection>,
    hub: Arc<ChangeHub>,
    unsettled: Arc<AtomicBool>,
}

/// How far a transaction came.
enum Failure {
    Conflict,
    /// SQLite has not been asked to commit.
    Before(rusqlite::Error),
    /// SQLite has been asked to commit, and failed.
    AtCommit(rusqlite::Error),
}

impl Writer {
    pub(super) fn new(
        path: PathBuf,
        connection: Connection,
        hub: Arc<ChangeHub>,
        unsettled: Arc<AtomicBool>,
    ) -> Self {
        Self { path, connection: Some(connection), hub, unsettled }
    }

    pub(super) fn run(mut self, mut jobs: mpsc::Receiver<WriterJob>) {
        while let Some(job) = jobs.blocking_recv() {
            match job {
                WriterJob::Commit { parts, reply } => {
                    let result = self.commit(&parts);
                    let _ = reply.send(result);
                }
                WriterJob::Settle { reply } => {
                    let _ = reply.send(self.settle_if_needed());
                }
            }
        }
    }

    fn commit(&mut self, parts: &TxnParts) -> Result<Revision, CommitError> {
        self.settle_if_needed().map_err(CommitError::NotApplied)?;
        let connection = self.connection().map_err(CommitError::NotApplied)?;
        let failure = match transaction(connection, |connection| apply(connection, parts)) {
            Ok(revision) => {
                let names: Vec<RowName> = parts.operations.iter().map(|op| op.name().clone()).collect();
                self.hub.publish(&names);
                return Ok(revision);
            }
            Err(failure) => failure,
        };
        self.roll_back();
        match failure {
            Failure::Conflict => Err(CommitError::Conflict),
            Failure::Before(error) => Err(CommitError::NotApplied(error.into())),
            Failure::AtCommit(error) => Err(self.unclear(error)),
        }
    }

    /// Decides what a transaction was that failed while SQLite committed it.
    fn unclear(&mut self, error: rusqlite::Error) -> CommitError {
        // Set first: no read that begins from now on may be answered from the rolled back state.
        self.unsettled.store(true, Ordering::SeqCst);
        let settled = self.settle_if_needed().is_ok();
        // Out of space means that a frame could not be written, and the commit mark is in the last one.
        let incomplete = error.sqlite_error_code() == Some(ErrorCode::DiskFull);
        if settled || incomplete {
            self.unsettled.store(false, Ordering::SeqCst);
            return CommitError::NotApplied(error.into());
        }
        CommitError::Unknown(error.into())
    }

    fn settle_if_needed(&mut self) -> Result<(), BoxError> {
        if !self.unsettled.load(Ordering::SeqCst) {
            return Ok(());
        }
        let settled = transaction(self.connection()?, |connection| {
            connection.prepare_cached(SETTLE)?.execute([]).map(drop).map_err(Failure::from)
        });
        match settled {
            Ok(()) => {
                self.unsettled.store(false, Ordering::SeqCst);
                Ok(())
            }
            Err(Failure::Before(error) | Failure::AtCommit(error)) => {
                self.roll_back();
                Err(error.into())
            }
            Err(Failure::Conflict) => unreachable!("settling has no condition"),
        }
    }

    fn connection(&mut self) -> Result<&Connection, BoxError> {
        if self.connection.is_none() {
            self.connection = Some(file::open_writer(&self.path)?);
        }
        self.connection.as_ref().ok_or_else(|| "the store has no connection".into())
    }

    /// Leaves no transaction open, at the price of the connection if need be.
    fn roll_back(&mut self) {
        self.connection = self.connection.take().filter(|connection| {
            // SQLite has often rolled back by itself already, and then says so here.
            connection.is_autocommit() || connection.execute_batch("ROLLBACK").is_ok()
        });
    }
}

impl From<rusqlite::Error> for Failure {
    fn from(error: rusqlite::Error) -> Self {
        Self::Before(error)
    }
}

fn transaction<T>(
    connection: &Connection,
    work: impl FnOnce(&Connection) -> Result<T, Failure>,
) -> Result<T, Failure> {
    connection.prepare_cached("BEGIN IMMEDIATE")?.execute([])?;
    let result = work(connection)?;
    let mut commit = connection.prepare_cached("COMMIT")?;
    commit.execute([]).map_err(Failure::AtCommit)?;
    Ok(result)
}

fn apply(connection: &Connection, parts: &TxnParts) -> Result<Revision, Failure> {
    for (name, expected) in &parts.conditions {
        if revision_of(connection, name)? != *expected {
            return Err(Failure::Conflict);
        }
    }
    let revision = connection
        .prepare_cached("UPDATE meta SET revision = revision + 1 RETURNING revision")?
        .query_row([], |row| row.get::<_, i64>(0))?;
    for operation in &parts.operations {
        match operation {
            Operation::Put(name, bytes) => connection
                .prepare_cached(
                    "INSERT INTO rows VALUES (?1, ?2, ?3) \
                     ON CONFLICT (name) DO UPDATE SET revision = ?2, bytes = ?3",
                )?
                .execute((name.as_str(), revision, bytes))?,
            Operation::Delete(name) => {
                connection.prepare_cached("DELETE FROM rows WHERE name = ?1")?.execute([name.as_str()])?
            }
        };
    }
    Ok(revision_from(revision))
}

fn revision_of(connection: &Connection, name: &RowName) -> rusqlite::Result<Revision> {
    let found = connection
        .prepare_cached("SELECT revision FROM rows WHERE name = ?1")?
        .query_row([name.as_str()], |row| row.get(0).map(revision_from))
        .optional()?;
    Ok(found.unwrap_or(Revision::ABSENT))
}
