//! A store that loses replies, for the suite and for every test of a caller's recovery.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex};

use async_trait::async_trait;

use crate::{Changes, CommitError, ReadError, Revision, Row, RowName, Store, Txn};

/// What goes wrong with a commit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// It reaches the store, the reply does not come back: [`CommitError::Unknown`].
    ReplyLost,
    /// It never reaches the store, which the caller cannot know: [`CommitError::Unknown`].
    RequestLost,
    /// It reaches the store only just before the next commit: [`CommitError::Unknown`].
    Late,
    /// The store says that it did not apply it: [`CommitError::NotApplied`].
    NotApplied,
}

/// Passes everything to another store but for the faults injected into it.
pub struct Flaky {
    inner: Arc<dyn Store>,
    commits: Mutex<VecDeque<Option<Fault>>>,
    failing_reads: Mutex<usize>,
    late: Mutex<Vec<Txn>>,
}

impl Flaky {
    /// Wraps a store.
    #[must_use]
    pub fn new(inner: Arc<dyn Store>) -> Self {
        Self { inner, commits: Mutex::default(), failing_reads: Mutex::default(), late: Mutex::default() }
    }

    /// Queues a fault for the next commit that has none queued; `None` lets that one through.
    pub fn inject(&self, fault: impl Into<Option<Fault>>) {
        self.commits.lock().unwrap().push_back(fault.into());
    }

    /// Makes the next `count` reads fail.
    pub fn fail_reads(&self, count: usize) {
        *self.failing_reads.lock().unwrap() = count;
    }

    fn before_read(&self) -> Result<(), ReadError> {
        let mut failing = self.failing_reads.lock().unwrap();
        match failing.checked_sub(1) {
            Some(left) => {
                *failing = left;
                Err(ReadError::Unavailable("injected".into()))
            }
            None => Ok(()),
        }
    }
}

#[async_trait]
impl Store for Flaky {
    async fn get(&self, name: &RowName) -> Result<Option<Row>, ReadError> {
        self.before_read()?;
        self.inner.get(name).await
    }

    async fn page_rows(
        &self,
        prefix: &str,
        after: Option<&RowName>,
        limit: usize,
    ) -> Result<Vec<Row>, ReadError> {
        self.before_read()?;
        self.inner.page_rows(prefix, after, limit).await
    }

    async fn page_revisions(
        &self,
        prefix: &str,
        after: Option<&RowName>,
        limit: usize,
    ) -> Result<Vec<(RowName, Revision)>, ReadError> {
        self.before_read()?;
        self.inner.page_revisions(prefix, after, limit).await
    }

    async fn commit(&self, txn: Txn) -> Result<Revision, CommitError> {
        txn.check()?;
        let late = std::mem::take(&mut *self.late.lock().unwrap());
        for txn in late {
            let _ = self.inner.commit(txn).await;
        }
        let fault = self.commits.lock().unwrap().pop_front().flatten();
        let unknown = || CommitError::Unknown("injected".into());
        match fault {
            None => self.inner.commit(txn).await,
            Some(Fault::ReplyLost) => {
                let _ = self.inner.commit(txn).await;
                Err(unknown())
            }
            Some(Fault::RequestLost) => Err(unknown()),
            Some(Fault::Late) => {
                self.late.lock().unwrap().push(txn);
                Err(unknown())
            }
            Some(Fault::NotApplied) => Err(CommitError::NotApplied("injected".into())),
        }
    }

    fn changes(&self, prefix: &str) -> Changes {
        self.inner.changes(prefix)
    }
}
