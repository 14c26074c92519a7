//! The right to a path: a lock on a file beside it, held for life.
//!
//! The kernel drops it with the process, however that ends. The file itself is
//! never removed: who would lock a new one beside an old holder?

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;

use rustix::fs::{FlockOperation, OFlags, flock};
use rustix::io::Errno;

use super::FileId;

/// The most bytes of a lock file that are shown.
const HOLDER_LENGTH: usize = 20;

/// Why the lock was not taken.
#[derive(Debug, thiserror::Error)]
pub enum LockError {
    /// Another process has it.
    #[error("held by process {holder}")]
    Held {
        /// What that process wrote into the file.
        holder: String,
    },
    /// The file cannot be opened or locked.
    #[error("cannot lock the file")]
    Io(#[from] io::Error),
}

/// A held lock. Copies of its descriptor, in whatever process, hold it too.
#[derive(Debug)]
pub struct PathLock {
    file: File,
}

impl PathLock {
    /// Takes the lock at once or not at all; makes the file if it is missing.
    pub fn take(path: &Path) -> Result<Self, LockError> {
        loop {
            let file = OpenOptions::new()
                .read(true)
                .write(true)
                .create(true)
                .truncate(false)
                .mode(0o600)
                .custom_flags(OFlags::NOFOLLOW.bits().cast_signed())
                .open(path)?;
            match flock(&file, FlockOperation::NonBlockingLockExclusive) {
                Ok(()) => {}
                Err(Errno::WOULDBLOCK) => return Err(LockError::Held { holder: holder(&file) }),
                Err(error) => return Err(LockError::Io(error.into())),
            }
            // A lock on a file that was removed in between is worth nothing.
            let lock = Self { file };
            if FileId::of(path) == Some(lock.file_id()) {
                return Ok(lock);
            }
        }
    }

    /// Says what the holder of the lock wrote into the file; `None` if nobody
    /// holds it. Makes no file. While it looks, for microseconds, nobody can
    /// take the lock.
    pub(crate) fn holder(path: &Path) -> io::Result<Option<String>> {
        let flags = OFlags::NOFOLLOW.bits().cast_signed();
        let file = match OpenOptions::new().read(true).custom_flags(flags).open(path) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error),
        };
        match flock(&file, FlockOperation::NonBlockingLockShared) {
            Ok(()) => Ok(None),
            Err(Errno::WOULDBLOCK) => Ok(Some(holder(&file))),
            Err(error) => Err(error.into()),
        }
    }

    /// Takes a lock that another process handed over as a descriptor, if it is
    /// the lock of `path`.
    pub(super) fn received(file: File, path: &Path) -> io::Result<Self> {
        let lock = Self { file };
        // On a descriptor that has the lock this changes nothing.
        flock(&lock.file, FlockOperation::NonBlockingLockExclusive)?;
        match FileId::of(path) == Some(lock.file_id()) {
            true => Ok(lock),
            false => Err(io::Error::other("the holder's lock is not the one at this path")),
        }
    }

    /// Notes who holds the lock, for people to read.
    pub(super) fn write_holder(&self, pid: u32) -> io::Result<()> {
        self.file.set_len(0)?;
        self.file.write_all_at(format!("{pid}\n").as_bytes(), 0)
    }

    pub(super) fn file(&self) -> &File {
        &self.file
    }

    pub(super) fn file_id(&self) -> FileId {
        self.file.metadata().map(|metadata| FileId::new(&metadata)).unwrap_or_default()
    }
}

/// What the holder wrote, as far as it can be printed.
fn holder(file: &File) -> String {
    let mut bytes = [0; HOLDER_LENGTH];
    let length = file.read_at(&mut bytes, 0).unwrap_or(0);
    let digits: String =
        bytes.iter().take(length).map(|byte| char::from(*byte)).take_while(char::is_ascii_digit).collect();
    if digits.is_empty() { "(unknown)".to_owned() } else { digits }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_one_has_the_lock_and_it_ends_with_its_last_copy() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("lock");
        let lock = PathLock::take(&path).unwrap();
        assert!(matches!(PathLock::take(&path), Err(LockError::Held { holder }) if holder == "(unknown)"));
        let copy = PathLock::received(lock.file().try_clone().unwrap(), &path).unwrap();
        drop(lock);
        assert!(matches!(PathLock::take(&path), Err(LockError::Held { .. })));
        drop(copy);
        assert!(PathLock::take(&path).is_ok());
    }

    #[test]
    fn a_symbolic_link_is_not_followed() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("lock");
        std::os::unix::fs::symlink(directory.path().join("other"), &path).unwrap();
        assert!(matches!(PathLock::take(&path), Err(LockError::Io(_))));
        assert!(!directory.path().join("other").exists());
    }

    #[test]
    fn a_foreign_lock_file_is_not_received() {
        let directory = tempfile::tempdir().unwrap();
        let other = PathLock::take(&directory.path().join("other")).unwrap();
        let path = directory.path().join("lock");
        drop(PathLock::take(&path).unwrap());
        assert!(PathLock::received(other.file().try_clone().unwrap(), &path).is_err());
    }
}
