//! Durable bytes under row names.
//!
//! One small trait, [`Store`], several backends and one contract suite that all of them pass. A row is a
//! name, the revision of the commit that wrote it, and bytes. What the bytes mean (records, sealed keys,
//! their authentication) is the agent's business: this crate must never know a key, never look into a row
//! and never decide anything from the clock.
//!
//! # Architecture Invariant
//!
//! A commit is durable before its reply, and it is whole or not there. Whoever is told
//! [`CommitError::NotApplied`] may rely on it for ever; whoever is told [`CommitError::Unknown`] reads again.

use async_trait::async_trait;

mod row;
mod txn;
mod error;
mod changes;
mod memory;
mod sqlite;
#[cfg(any(test, feature = "contract"))]
pub mod contract;

pub use changes::Changes;
pub use error::{BoxError, CommitError, ReadError};
pub use memory::MemoryStore;
pub use row::{InvalidRowName, Revision, Row, RowName};
pub use sqlite::{BackupError, BackupReport, OpenError, Replacement, SqliteStore};
pub use txn::{MAX_BYTES, MAX_CONDITIONS, MAX_OPERATIONS, MAX_PAGE, Operation, Refusal, Txn, TxnParts};

/// Durable rows, changed by whole transactions under conditions on revisions.
///
/// # Limits
///
/// A transaction holds at most [`MAX_OPERATIONS`] operations and [`MAX_BYTES`] bytes, a page at most
/// [`MAX_PAGE`] rows; every backend enforces them through [`Txn::into_parts`] and [`ReadError::page_limit`].
#[async_trait]
pub trait Store: Send + Sync + 'static {
    /// Reads one row, linearizably: it shows every commit that was answered before this call began.
    ///
    /// # Errors
    /// When the store cannot answer truthfully now; never for an absent row.
    async fn get(&self, name: &RowName) -> Result<Option<Row>, ReadError>;

    /// Reads up to `limit` rows whose name starts with `prefix` and comes after `after`, ascending by name.
    ///
    /// A page is consistent in itself, two pages are not with each other. Only a page shorter than `limit`
    /// is the last one.
    ///
    /// # Errors
    /// When `limit` is 0 or above [`MAX_PAGE`], or the store cannot answer truthfully now.
    async fn page_rows(
        &self,
        prefix: &str,
        after: Option<&RowName>,
        limit: usize,
    ) -> Result<Vec<Row>, ReadError>;

    /// Does what [`Store::page_rows`] does, without the bytes.
    ///
    /// # Errors
    /// As [`Store::page_rows`].
    async fn page_revisions(
        &self,
        prefix: &str,
        after: Option<&RowName>,
        limit: usize,
    ) -> Result<Vec<(RowName, Revision)>, ReadError>;

    /// Applies the whole transaction if all its conditions hold, and returns the revision that every row it
    /// put has now.
    ///
    /// Revisions of commits that change something rise strictly over the life of the store. A caller that
    /// drops the future does not know whether the commit happened: as after [`CommitError::Unknown`].
    ///
    /// # Errors
    /// See [`CommitError`].
    async fn commit(&self, txn: Txn) -> Result<Revision, CommitError>;

    /// Subscribes to "look again" for rows whose name starts with `prefix`.
    ///
    /// It is a hint: it may come late, for nothing, or once for many commits. Subscribe first, read then.
    fn changes(&self, prefix: &str) -> Changes;
}
