//! The right to one store file: a `flock` on `<path>.lock`, held for life, with the holder's pid inside.
//!
//! The lock file is never removed: removing it would let two processes hold two locks.

use std::fs::{File, OpenOptions, TryLockError};
use std::io::{Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::process;

use super::OpenError;

/// Held until dropped; the kernel lets go of it when the process dies.
pub(super) struct StoreLock(#[expect(dead_code, reason = "dropping the file lets go of the lock")] File);

impl StoreLock {
    pub(super) fn take(store: &Path) -> Result<Self, OpenError> {
        let path = path_of(store);
        let mut options = OpenOptions::new();
        options.read(true).write(true).create(true).truncate(false).mode(0o600);
        let mut file = options.open(&path).map_err(OpenError::Io)?;
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => return Err(OpenError::InUse { pid: pid_in(&mut file) }),
            Err(TryLockError::Error(error)) => return Err(OpenError::Io(error)),
        }
        // The pid only makes the other's error message good; nothing is decided by it, and a full disk is no
        // reason not to serve.
        let _ = file.set_len(0).and_then(|()| writeln!(file, "{}", process::id()));
        Ok(Self(file))
    }
}

fn path_of(store: &Path) -> PathBuf {
    super::file::with_suffix(store, ".lock")
}

fn pid_in(file: &mut File) -> Option<u32> {
    let mut text = String::new();
    file.take(32).read_to_string(&mut text).ok()?;
    text.trim().parse().ok()
}
