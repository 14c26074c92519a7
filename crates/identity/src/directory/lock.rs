//! The right to write into an identity directory, and the writing.

use std::{
    fs::{self, File, OpenOptions, TryLockError},
    io::{self, Read, Seek, Write},
    ops::Deref,
    os::unix::fs::OpenOptionsExt,
};

use thiserror::Error;

use super::{
    CHAIN, Directory, DirectoryError, KEY, LOCK, LoadError, NEXT, PREVIOUS, ROOTS, STATE, State,
    StoredIdentity, TOKEN, files, parse_chain,
};
use crate::{certificate::CertificateError, key_pair::KeyPair};

const PRIVATE: u32 = 0o600;
const PUBLIC: u32 = 0o644;

/// An identity directory that this process alone may write, until this value is dropped.
#[derive(Debug)]
pub struct DirectoryLock {
    directory: Directory,
    _file: File,
}

impl DirectoryLock {
    pub(super) fn take(directory: Directory) -> Result<Self, LockError> {
        let path = directory.path.join(LOCK);
        let unusable = |source| LockError::Unusable(DirectoryError { path: path.clone(), source });
        let mut options = OpenOptions::new();
        let mut file = options
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(PRIVATE)
            .open(&path)
            .map_err(unusable)?;
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                let mut holder = String::new();
                // Only for the message: who cannot be read is still the holder.
                let _ = file.take(32).read_to_string(&mut holder);
                return Err(LockError::Held { path, pid: holder.trim().parse().ok() });
            }
            Err(TryLockError::Error(source)) => return Err(unusable(source)),
        }
        files::give_to_owner(&file, &directory.path).map_err(unusable)?;
        file.set_len(0).and_then(|()| file.rewind()).map_err(unusable)?;
        writeln!(file, "{}", std::process::id()).map_err(unusable)?;
        Ok(Self { directory, _file: file })
    }

    /// Makes a new key durable before its request is sent, so that a lost answer can be asked for again.
    ///
    /// # Errors
    ///
    /// Names the file that could not be written.
    pub fn stage_key(&self, key: &KeyPair) -> Result<(), DirectoryError> {
        self.write(KEY, NEXT, key.to_pem().as_bytes(), PRIVATE)
    }

    /// Puts a new chain into use, together with the staged key (or the current one) that it belongs to.
    ///
    /// # Errors
    ///
    /// `OtherKey` when neither key belongs to the chain; then nothing has changed.
    pub fn install(&self, chain_pem: &str) -> Result<StoredIdentity, InstallError> {
        let (chain, certificate) = parse_chain(chain_pem.as_bytes())?;
        let belongs = |key: &KeyPair| key.spki_sha256() == *certificate.spki_sha256();
        // A damaged key is as good as none: what counts is whether one belongs.
        let staged = self.key(NEXT).ok().flatten().filter(belongs);
        let is_staged = staged.is_some();
        let key =
            staged.or_else(|| self.key("").ok().flatten().filter(belongs)).ok_or(InstallError::OtherKey)?;

        // From here on the new pair is complete, and whatever happens next, `load` finds it.
        self.write(CHAIN, NEXT, chain_pem.as_bytes(), PUBLIC)?;
        for (name, mode) in [(KEY, PRIVATE), (CHAIN, PUBLIC)] {
            if let Some(text) = self.read(name, "")? {
                self.write(name, PREVIOUS, text.as_bytes(), mode)?;
            }
        }
        if is_staged {
            self.promote(KEY)?;
        }
        self.promote(CHAIN)?;
        Ok(StoredIdentity { certificate, chain, key, is_previous: false })
    }

    /// Replaces the pinned roots.
    ///
    /// # Errors
    ///
    /// Names the file that could not be written.
    pub fn save_roots(&self, pem: &str) -> Result<(), DirectoryError> {
        self.write(ROOTS, "", pem.as_bytes(), PUBLIC)
    }

    /// Replaces the state beside the identity.
    ///
    /// # Errors
    ///
    /// Names the file that could not be written.
    pub fn save_state(&self, state: &State) -> Result<(), DirectoryError> {
        let json = serde_json::to_vec_pretty(state).expect("a state has only strings and numbers");
        self.write(STATE, "", &json, PUBLIC)
    }

    /// Deletes the join token; no error when there is none.
    ///
    /// # Errors
    ///
    /// Names the file when it could not be deleted.
    pub fn delete_token(&self) -> Result<(), DirectoryError> {
        let path = self.path.join(TOKEN);
        match fs::remove_file(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            Err(source) => Err(DirectoryError { path, source }),
            Ok(()) => files::sync_directory(&self.path).map_err(|source| DirectoryError { path, source }),
        }
    }

    fn write(&self, name: &str, suffix: &str, bytes: &[u8], mode: u32) -> Result<(), DirectoryError> {
        files::replace(&self.path, &format!("{name}{suffix}"), bytes, mode)
            .map_err(|source| DirectoryError { path: self.file(name, suffix), source })
    }

    fn promote(&self, name: &str) -> Result<(), DirectoryError> {
        let path = self.file(name, "");
        fs::rename(self.file(name, NEXT), &path)
            .and_then(|()| files::sync_directory(&self.path))
            .map_err(|source| DirectoryError { path, source })
    }
}

impl Deref for DirectoryLock {
    type Target = Directory;

    fn deref(&self) -> &Directory {
        &self.directory
    }
}

/// Why the right to write was not given.
#[derive(Debug, Error)]
pub enum LockError {
    /// Another process has it.
    #[error("{} is in use by process {}", path.display(), pid.map_or_else(|| "unknown".to_owned(), |pid| pid.to_string()))]
    Held {
        /// The lock file.
        path: std::path::PathBuf,
        /// The holder, as it wrote itself into the file.
        pid: Option<u32>,
    },
    /// The lock file cannot be used.
    #[error(transparent)]
    Unusable(DirectoryError),
}

/// Why a chain was not put into use.
#[derive(Debug, Error)]
pub enum InstallError {
    /// The chain does not parse, or its leaf is nobody's in a fleet.
    #[error("the certificate chain cannot be used")]
    Chain(#[from] CertificateError),
    /// The chain is for a key that is not here.
    #[error("the certificate belongs to another key than this node's")]
    OtherKey,
    /// A file could not be read or written.
    #[error(transparent)]
    File(#[from] DirectoryError),
    /// A file beside it could not be read.
    #[error(transparent)]
    Load(#[from] LoadError),
}
