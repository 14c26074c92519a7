//! `kms-agent init`: root key file, store, fleet CA and the first admin.
//!
//! The store is made beside its place and renamed there at the end, so that an
//! interrupted init leaves nothing that looks like a store; running it again is
//! the remedy.

use std::fs::{self, OpenOptions};
use std::io::{self, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::SystemTime;

use fleet_kms_audit::{ChangeLog, Intent};
use fleet_kms_identity::{KeyPair, KeyPairError, Name, Serial, SpiffeId, Subject};
use fleet_kms_seal::{FileSlot, FileSlotError};
use fleet_kms_transport::Clock;

use crate::authz::{Role, internal};
use crate::ca::{self, Leaf, SignError};
use crate::changes::{ChangeError, Changes};
use crate::config::Config;
use crate::enrolment::admins;
use crate::ledger::{Changeset, Generator, LedgerError};
use crate::live_keyrings::{KeysError, LiveKeyrings};
use crate::storage::{self, StorageError};

/// What `init` is told on its command line.
#[derive(Debug)]
pub struct Options {
    /// The first admin's name.
    pub admin: Name,
    /// The directory that gets the admin's key, certificate and context.
    pub admin_directory: PathBuf,
}

/// Why `init` did not finish. Nothing is half-done: run it again.
#[derive(Debug, thiserror::Error)]
pub enum InitError {
    /// A store is there already.
    #[error("{path} exists: this agent is initialised; remove it only if the keys in it may be lost")]
    Exists { path: String },
    /// A file or directory could not be made.
    #[error("cannot make {path}")]
    File {
        path: String,
        #[source]
        source: io::Error,
    },
    /// The root key file cannot be used.
    #[error(transparent)]
    Root(#[from] FileSlotError),
    /// The store could not be made.
    #[error(transparent)]
    Storage(#[from] StorageError),
    /// The keys could not be made.
    #[error(transparent)]
    Keys(#[from] KeysError),
    /// The fleet CA could not be made.
    #[error("cannot make the fleet CA")]
    Authority(#[from] SignError),
    /// The admin's key could not be made.
    #[error("cannot make the admin's key")]
    Key(#[from] KeyPairError),
    /// The audit cannot be used.
    #[error("cannot use the audit in {path}")]
    Audit {
        path: String,
        #[source]
        source: fleet_kms_audit::OpenError,
    },
    /// The first rows could not be written.
    #[error("cannot write the first rows")]
    Change(#[source] Box<ChangeError<LedgerError>>),
}
