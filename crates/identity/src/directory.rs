//! The directory that an identity lives in: key, certificate chain, pinned roots and the little state beside them.
//!
//! A power cut at any point leaves a key and a chain that belong together: the new key is on disk before anyone signs
//! it, a new pair is complete before the old one moves, and the old one is kept as `*.previous`. Reading looks at all
//! of them and takes the newest pair that matches. Writing needs the lock, which one process holds for its life.
//! The private key never leaves this directory. New files belong to the directory's owner, so that a repair run as
//! root leaves nothing that the service cannot read.

mod files;
mod lock;
mod state;

use std::{
    io,
    path::{Path, PathBuf},
};

use rustls_pki_types::CertificateDer;
use thiserror::Error;
use zeroize::Zeroizing;

pub use lock::{DirectoryLock, InstallError, LockError};
pub use state::{AgentAddress, State};

use crate::{
    certificate::{Certificate, CertificateError, split_pem_chain},
    key_pair::{KeyPair, KeyPairError},
};

const KEY: &str = "key.pem";
const CHAIN: &str = "chain.pem";
const ROOTS: &str = "roots.pem";
const STATE: &str = "state.json";
const TOKEN: &str = "token";
const LOCK: &str = "lock";
/// Made, and perhaps sent to be signed, but not in use yet.
const NEXT: &str = ".next";
/// In use before the pair that is in use now.
const PREVIOUS: &str = ".previous";
/// No file of ours comes near; a larger one is somebody's mistake.
const MAX_FILE: u64 = 256 * 1_024;

/// An identity directory, open for reading. [`Directory::lock`] opens it for writing.
#[derive(Clone, Debug)]
pub struct Directory {
    path: PathBuf,
}

/// A key and the chain that belongs to it.
pub struct StoredIdentity {
    /// The leaf, parsed.
    pub certificate: Certificate,
    /// The leaf's chain as the agent sent it, leaf first.
    pub chain: Vec<CertificateDer<'static>>,
    /// The leaf's key.
    pub key: KeyPair,
    /// Whether this is the pair before the one that should be in use: something has damaged the files.
    pub is_previous: bool,
}

impl Directory {
    /// Opens a directory that exists.
    ///
    /// # Errors
    ///
    /// Names the path when there is no directory.
    pub fn open(path: impl Into<PathBuf>) -> Result<Self, DirectoryError> {
        let path = path.into();
        match std::fs::metadata(&path) {
            Ok(metadata) if metadata.is_dir() => Ok(Self { path }),
            Ok(_) => Err(DirectoryError::new(&path, io::Error::from(io::ErrorKind::NotADirectory))),
            Err(error) => Err(DirectoryError::new(&path, error)),
        }
    }

    /// Returns the directory's path.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Takes the right to write, for as long as the returned value lives.
    ///
    /// # Errors
    ///
    /// `Held` names the process that has it.
    pub fn lock(&self) -> Result<DirectoryLock, LockError> {
        DirectoryLock::take(self.clone())
    }

    /// Reads the newest key and chain that belong together; `None` when this node was never enrolled.
    ///
    /// Dates are not judged: an expired identity can still be renewed.
    ///
    /// # Errors
    ///
    /// `NoPair` when there are chains but none of them with its key, `File` when a file cannot be read.
    pub fn load(&self) -> Result<Option<StoredIdentity>, LoadError> {
        let mut damaged = false;
        for chain_suffix in [NEXT, "", PREVIOUS] {
            let Some(text) = self.read(CHAIN, chain_suffix)? else { continue };
            let Ok((chain, certificate)) = parse_chain(text.as_bytes()) else {
                damaged = true;
                continue;
            };
            for key_suffix in [NEXT, "", PREVIOUS] {
                let Ok(Some(key)) = self.key(key_suffix) else { continue };
                if key.spki_sha256() == *certificate.spki_sha256() {
                    let is_previous = chain_suffix == PREVIOUS;
                    return Ok(Some(StoredIdentity { certificate, chain, key, is_previous }));
                }
            }
            damaged = true;
        }
        if damaged { Err(LoadError::NoPair { path: self.path.clone() }) } else { Ok(None) }
    }

    /// Reads the key that was made for a request whose answer never arrived.
    ///
    /// Asking again with the same key gets the same certificate.
    ///
    /// # Errors
    ///
    /// `File` when it cannot be read, `Key` when it is no key of ours.
    pub fn staged_key(&self) -> Result<Option<KeyPair>, LoadError> {
        self.key(NEXT)
    }

    /// Reads the pinned roots; `None` when this node was never enrolled.
    ///
    /// # Errors
    ///
    /// `File` when they cannot be read, `Certificate` when they are no certificates.
    pub fn roots(&self) -> Result<Option<Vec<CertificateDer<'static>>>, LoadError> {
        let Some(text) = self.read(ROOTS, "")? else { return Ok(None) };
        let path = self.path.join(ROOTS);
        split_pem_chain(text.as_bytes()).map(Some).map_err(|source| LoadError::Certificate { path, source })
    }

    /// Reads the state beside the identity; the default when there is none.
    ///
    /// # Errors
    ///
    /// `File` when it cannot be read, `State` when it is not its JSON.
    pub fn state(&self) -> Result<State, LoadError> {
        let Some(text) = self.read(STATE, "")? else { return Ok(State::default()) };
        let path = self.path.join(STATE);
        serde_json::from_str(&text).map_err(|source| LoadError::State { path, source })
    }

    /// Reads the text of a join token that somebody has put here.
    ///
    /// # Errors
    ///
    /// `File` when it is there and cannot be read.
    pub fn token(&self) -> Result<Option<Zeroizing<String>>, DirectoryError> {
        self.read(TOKEN, "")
    }

    fn key(&self, suffix: &str) -> Result<Option<KeyPair>, LoadError> {
        let Some(text) = self.read(KEY, suffix)? else { return Ok(None) };
        let path = self.file(KEY, suffix);
        KeyPair::from_pem(&text).map(Some).map_err(|source| LoadError::Key { path, source })
    }

    fn read(&self, name: &str, suffix: &str) -> Result<Option<Zeroizing<String>>, DirectoryError> {
        let path = self.file(name, suffix);
        files::read(&path, MAX_FILE).map_err(|source| DirectoryError { path, source })
    }

    fn file(&self, name: &str, suffix: &str) -> PathBuf {
        self.path.join(format!("{name}{suffix}"))
    }
}

/// Parses a PEM chain and its leaf.
fn parse_chain(pem: &[u8]) -> Result<(Vec<CertificateDer<'static>>, Certificate), CertificateError> {
    let chain = split_pem_chain(pem)?;
    let certificate = Certificate::from_der(chain.first().ok_or(CertificateError::Empty)?)?;
    Ok((chain, certificate))
}

/// A file or directory that could not be used.
#[derive(Debug, Error)]
#[error("cannot use {}", path.display())]
pub struct DirectoryError {
    /// What could not be used.
    pub path: PathBuf,
    /// Why.
    #[source]
    pub source: io::Error,
}

impl DirectoryError {
    fn new(path: &Path, source: io::Error) -> Self {
        Self { path: path.to_owned(), source }
    }
}

/// Why an identity directory could not be read.
#[derive(Debug, Error)]
pub enum LoadError {
    /// A file could not be read.
    #[error(transparent)]
    File(#[from] DirectoryError),
    /// There are certificates, but no key that belongs to one of them.
    #[error("{} holds no certificate together with its key: enrol this node again", path.display())]
    NoPair {
        /// The directory.
        path: PathBuf,
    },
    /// A key file holds no key of ours.
    #[error("{} cannot be used", path.display())]
    Key {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: KeyPairError,
    },
    /// A certificate file holds no certificates.
    #[error("{} cannot be used; enrol this node again", path.display())]
    Certificate {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: CertificateError,
    },
    /// The state file is not its JSON.
    #[error("{} cannot be used: it can be deleted, it is learnt again from the agent", path.display())]
    State {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: serde_json::Error,
    },
}

#[cfg(test)]
mod tests;
