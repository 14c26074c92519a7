//! Transactions and their limits. The limits are checked here and nowhere else: a backend only gets at the
//! parts of a [`Txn`] through [`Txn::into_parts`].

use std::collections::BTreeSet;

use crate::{ReadError, Revision, RowName};

/// Most operations in one transaction (etcd refuses more than 128 unless told otherwise).
pub const MAX_OPERATIONS: usize = 100;
/// Most conditions in one transaction; etcd's limit counts them like operations.
pub const MAX_CONDITIONS: usize = 100;
/// Most bytes in one transaction, names included (etcd refuses a request above 1.5 MiB).
pub const MAX_BYTES: usize = 1024 * 1024;
/// Most rows in one page.
pub const MAX_PAGE: usize = 1000;

/// One change of one row.
#[derive(Clone, PartialEq, Eq)]
pub enum Operation {
    /// Writes the row, whether it exists or not.
    Put(RowName, Vec<u8>),
    /// Removes the row; nothing happens if it does not exist.
    Delete(RowName),
}

impl Operation {
    /// Returns the row that is changed.
    #[must_use]
    pub fn name(&self) -> &RowName {
        match self {
            Self::Put(name, _) | Self::Delete(name) => name,
        }
    }

    fn bytes(&self) -> usize {
        match self {
            Self::Put(name, bytes) => name.as_bytes().len().saturating_add(bytes.len()),
            Self::Delete(name) => name.as_bytes().len(),
        }
    }
}

/// Conditions and operations that are applied together or not at all.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct Txn {
    conditions: Vec<(RowName, Revision)>,
    operations: Vec<Operation>,
}

/// A transaction within its limits, taken apart for a backend.
pub struct TxnParts {
    /// Each row must have this revision, [`Revision::ABSENT`] meaning "must not exist".
    pub conditions: Vec<(RowName, Revision)>,
    /// What to do, at least one and at most one for each row.
    pub operations: Vec<Operation>,
}

impl Txn {
    /// Starts an empty transaction.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a condition: the row must have this revision; [`Revision::ABSENT`] means "must not exist".
    #[must_use]
    pub fn expect(mut self, name: RowName, revision: Revision) -> Self {
        self.conditions.push((name, revision));
        self
    }

    /// Adds a write of a row.
    #[must_use]
    pub fn put(mut self, name: RowName, bytes: Vec<u8>) -> Self {
        self.operations.push(Operation::Put(name, bytes));
        self
    }

    /// Adds the removal of a row.
    #[must_use]
    pub fn delete(mut self, name: RowName) -> Self {
        self.operations.push(Operation::Delete(name));
        self
    }

    /// Returns the conditions so far.
    #[must_use]
    pub fn conditions(&self) -> &[(RowName, Revision)] {
        &self.conditions
    }

    /// Returns the operations so far.
    #[must_use]
    pub fn operations(&self) -> &[Operation] {
        &self.operations
    }

    /// Says whether every backend would take this transaction.
    ///
    /// # Errors
    /// Names the limit that it breaks.
    pub fn check(&self) -> Result<(), Refusal> {
        if self.operations.is_empty() {
            return Err(Refusal::Empty);
        }
        if self.operations.len() > MAX_OPERATIONS {
            return Err(Refusal::TooManyOperations(self.operations.len()));
        }
        if self.conditions.len() > MAX_CONDITIONS {
            return Err(Refusal::TooManyConditions(self.conditions.len()));
        }
        let mut names = BTreeSet::new();
        if let Some(twice) = self.operations.iter().map(Operation::name).find(|name| !names.insert(*name)) {
            return Err(Refusal::NamedTwice(twice.clone()));
        }
        let conditions = self.conditions.iter().map(|(name, _)| name.as_bytes().len());
        let bytes: usize = self.operations.iter().map(Operation::bytes).chain(conditions).sum();
        if bytes > MAX_BYTES {
            return Err(Refusal::TooManyBytes(bytes));
        }
        Ok(())
    }

    /// Checks the limits and takes the transaction apart: the way into every backend.
    ///
    /// # Errors
    /// As [`Txn::check`].
    pub fn into_parts(self) -> Result<TxnParts, Refusal> {
        self.check()?;
        Ok(TxnParts { conditions: self.conditions, operations: self.operations })
    }
}

/// Why no backend takes a transaction, whatever the store holds.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// It does nothing.
    #[error("the transaction has no operation")]
    Empty,
    /// It has more than [`MAX_OPERATIONS`] operations.
    #[error("the transaction has {0} operations, and {max} are allowed", max = MAX_OPERATIONS)]
    TooManyOperations(usize),
    /// It has more than [`MAX_CONDITIONS`] conditions.
    #[error("the transaction has {0} conditions, and {max} are allowed", max = MAX_CONDITIONS)]
    TooManyConditions(usize),
    /// It has more than [`MAX_BYTES`] bytes.
    #[error("the transaction has {0} bytes, and {max} are allowed", max = MAX_BYTES)]
    TooManyBytes(usize),
    /// It changes a row twice, so what the row holds afterwards would depend on the backend.
    #[error("the transaction changes row {0} twice")]
    NamedTwice(RowName),
}

impl ReadError {
    /// Refuses a page size outside 1..=[`MAX_PAGE`]: a shortened page would look like the last one.
    ///
    /// # Errors
    /// [`ReadError::PageLimit`].
    pub fn page_limit(limit: usize) -> Result<usize, Self> {
        if (1..=MAX_PAGE).contains(&limit) { Ok(limit) } else { Err(Self::PageLimit(limit)) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn name(text: &str) -> RowName {
        RowName::try_from(text).unwrap()
    }

    #[test]
    fn a_transaction_at_its_limits_is_taken_and_one_above_is_not() {
        let rows = |count: usize, mut txn: Txn| {
            for number in 0..count {
                txn = txn.put(name(&format!("row/{number}")), vec![]);
            }
            txn
        };
        assert_eq!(rows(100, Txn::new()).check(), Ok(()));
        assert_eq!(rows(101, Txn::new()).check(), Err(Refusal::TooManyOperations(101)));
        let conditions =
            |count: u64| (0..count).fold(rows(1, Txn::new()), |txn, n| txn.expect(name("c"), Revision(n)));
        assert_eq!(conditions(100).check(), Ok(()));
        assert_eq!(conditions(101).check(), Err(Refusal::TooManyConditions(101)));
        let bytes = |length: usize| Txn::new().put(name("r"), vec![0; length]).expect(name("r"), Revision(1));
        assert_eq!(bytes(MAX_BYTES - 2).check(), Ok(()));
        assert_eq!(bytes(MAX_BYTES - 1).check(), Err(Refusal::TooManyBytes(MAX_BYTES + 1)));
    }

    #[test]
    fn an_empty_transaction_and_one_that_names_a_row_twice_are_refused() {
        assert_eq!(Txn::new().expect(name("a"), Revision(1)).check(), Err(Refusal::Empty));
        let twice = Txn::new().put(name("a"), vec![]).delete(name("a"));
        assert_eq!(twice.check(), Err(Refusal::NamedTwice(name("a"))));
    }
}
