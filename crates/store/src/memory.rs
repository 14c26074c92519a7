//! The store of simulations and tests: rows in memory, real transactions, no durability.

use std::collections::BTreeMap;
use std::ops::Bound;
use std::sync::{Mutex, MutexGuard, PoisonError};

use async_trait::async_trait;

use crate::changes::ChangeHub;
use crate::{Changes, CommitError, Operation, ReadError, Revision, Row, RowName, Store, Txn};

/// Rows in memory. It never fails but for conflicts and limits.
#[derive(Default)]
pub struct MemoryStore {
    state: Mutex<State>,
    hub: ChangeHub,
}

#[derive(Default)]
struct State {
    revision: u64,
    rows: BTreeMap<RowName, (Revision, Vec<u8>)>,
}

impl MemoryStore {
    /// Makes an empty store.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Copies rows and revision into a new store: a backup, or a copy of yesterday to come back to.
    #[must_use]
    pub fn fork(&self) -> Self {
        let state = self.state();
        let copy = State { revision: state.revision, rows: state.rows.clone() };
        Self { state: Mutex::new(copy), hub: ChangeHub::default() }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // A panic cannot leave the state half changed: `commit` checks everything before it writes.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn page<T>(
        &self,
        prefix: &str,
        after: Option<&RowName>,
        limit: usize,
        row: impl Fn(&RowName, &(Revision, Vec<u8>)) -> T,
    ) -> Result<Vec<T>, ReadError> {
        let limit = ReadError::page_limit(limit)?;
        let state = self.state();
        let start = match after {
            Some(after) if after.as_str() >= prefix => Bound::Excluded(after.as_str()),
            _ => Bound::Included(prefix),
        };
        Ok(state
            .rows
            .range::<str, _>((start, Bound::Unbounded))
            .take_while(|(name, _)| name.as_str().starts_with(prefix))
            .take(limit)
            .map(|(name, value)| row(name, value))
            .collect())
    }
}

#[async_trait]
impl Store for MemoryStore {
    async fn get(&self, name: &RowName) -> Result<Option<Row>, ReadError> {
        let state = self.state();
        Ok(state.rows.get(name).map(|(revision, bytes)| Row {
            name: name.clone(),
            revision: *revision,
            bytes: bytes.clone(),
        }))
    }

    async fn page_rows(
        &self,
        prefix: &str,
        after: Option<&RowName>,
        limit: usize,
    ) -> Result<Vec<Row>, ReadError> {
        self.page(prefix, after, limit, |name, (revision, bytes)| Row {
            name: name.clone(),
            revision: *revision,
            bytes: bytes.clone(),
        })
    }

    async fn page_revisions(
        &self,
        prefix: &str,
        after: Option<&RowName>,
        limit: usize,
    ) -> Result<Vec<(RowName, Revision)>, ReadError> {
        self.page(prefix, after, limit, |name, (revision, _)| (name.clone(), *revision))
    }

    async fn commit(&self, txn: Txn) -> Result<Revision, CommitError> {
        let parts = txn.into_parts()?;
        let mut state = self.state();
        for (name, expected) in &parts.conditions {
            let found = state.rows.get(name).map_or(Revision::ABSENT, |(revision, _)| *revision);
            if found != *expected {
                return Err(CommitError::Conflict);
            }
        }
        state.revision += 1;
        let revision = Revision(state.revision);
        let mut names = Vec::with_capacity(parts.operations.len());
        for operation in parts.operations {
            names.push(operation.name().clone());
            match operation {
                Operation::Put(name, bytes) => {
                    state.rows.insert(name, (revision, bytes));
                }
                Operation::Delete(name) => {
                    state.rows.remove(&name);
                }
            }
        }
        drop(state);
        self.hub.publish(&names);
        Ok(revision)
    }

    fn changes(&self, prefix: &str) -> Changes {
        self.hub.subscribe(prefix)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::contract;

    #[tokio::test]
    async fn the_memory_store_passes_the_contract() {
        contract::suite(async || Arc::new(MemoryStore::new()) as Arc<dyn Store>).await;
    }

    #[tokio::test]
    async fn a_fork_does_not_see_later_commits() {
        let store = MemoryStore::new();
        let name = RowName::try_from("a").unwrap();
        store.commit(Txn::new().put(name.clone(), vec![1])).await.unwrap();
        let fork = store.fork();
        store.commit(Txn::new().delete(name.clone())).await.unwrap();
        assert_eq!(fork.get(&name).await.unwrap().unwrap().bytes, [1]);
    }
}
