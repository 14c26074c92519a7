//! Audit records in hash-chained JSON lines: the writer in the agent and the verifier anywhere.
//!
//! Two chains stand in one directory, one directory per agent. *Changes* (rotate, disable, enrol, …) are
//! rare and each is on disk as an intent before it is done and as an outcome after; *data* (wrap, unwrap) is
//! counted in memory and written as sums, or written one by one. Files are numbered `<chain>-<number>.jsonl` from 1 on
//! without a gap, and a chain runs on from file to file. Old files may go behind a signed checkpoint.
//!
//! A record holds who, what, on which version, with what outcome and how long. It must never hold key
//! material, plaintext, ciphertext or tokens: this crate takes no bytes that could be one.
//!
//! # Architecture Invariant
//!
//! A record is durable before [`ChangeLog::intent`] and [`ChangeLog::outcome`] return. Without a chain head
//! kept elsewhere the verifier finds accidents only: whoever can write the files can write a new chain.

mod record;
mod chain;
mod checkpoint;
mod walk;
mod writer;
mod change_log;
mod data_log;
mod retention;
mod verify;
mod search;
mod done;

pub use chain::{Chain, Head, MAX_LINE};
pub use change_log::{ChangeLog, OpenIntent};
pub use checkpoint::{CHECKPOINT_CONTEXT, Checkpoint, SignedCheckpoint, message};
pub use data_log::{
    Call, CallRecord, Clocks, DataLog, DataMode, DataOptions, DataState, Denial, Done, MAX_DETAILS,
    MAX_DETAILS_EACH, MAX_IDENTITIES, MAX_UNSYNCED, NotRecorded, OnFull,
};
pub use done::{PastChange, PastChanges, past_changes};
pub use record::{ChangeId, ClusterRef, Event, Intent, InvalidChangeId, Outcome, Recorded};
pub use retention::{Removal, Retention};
pub use search::{Found, FoundPage, Range, search};
pub use verify::{Against, ChainReport, Report, Signer, verify, verify_against};
pub use walk::{Break, Torn, Why};
pub use writer::{LogError, MAX_FILE, Opened};
