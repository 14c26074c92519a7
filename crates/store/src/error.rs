//! What a caller must tell apart when the store says no.

use crate::Refusal;

/// The cause of an error, as the backend names it.
pub type BoxError = Box<dyn std::error::Error + Send + Sync>;

/// Why a read gave no answer.
#[derive(Debug, thiserror::Error)]
pub enum ReadError {
    /// The backend could not read now.
    #[error("the store cannot be read")]
    Unavailable(#[source] BoxError),
    /// What the backend read cannot be right.
    #[error("the store holds what it cannot hold")]
    Corrupt(#[source] BoxError),
    /// A commit before this read ended without a known outcome, and the backend cannot settle it yet: any
    /// answer might be undone by a restart.
    #[error("the store cannot yet tell whether an earlier commit was applied")]
    Unsettled(#[source] BoxError),
    /// The page size is 0 or above [`crate::MAX_PAGE`].
    #[error("a page has 1 to {max} rows, not {0}", max = crate::MAX_PAGE)]
    PageLimit(usize),
}

/// Why a commit was not acknowledged.
#[derive(Debug, thiserror::Error)]
pub enum CommitError {
    /// A condition does not hold; nothing was applied. Read again, decide again.
    #[error("the store holds other revisions than the transaction expects")]
    Conflict,
    /// The transaction breaks a limit; nothing was applied and a retry is useless.
    #[error("the transaction cannot be taken")]
    Refused(#[from] Refusal),
    /// Nothing was applied, and nothing of it will ever show. A retry may succeed.
    #[error("the store did not apply the transaction")]
    NotApplied(#[source] BoxError),
    /// It may have been applied. Read again and recognise the own write by what is random in it.
    #[error("the store cannot tell whether it applied the transaction")]
    Unknown(#[source] BoxError),
}
