//! The path that kube-apiserver dials: who may serve it, and how it gets there.
//!
//! The right to the path is a `flock` on `<path>.lock` (`socket/lock.rs`), never a
//! connect probe. A socket is bound under a temporary name and renamed over the
//! path, so that the path never lacks a listener and a stale socket of a killed
//! process is simply replaced.
//!
//! It must never unlink the path, not even on exit (grpc-go backs off for up to
//! two minutes when it is missing), and never make or replace the directory:
//! containers hold on to its inode.

mod account;
mod handover;
mod keep;
mod lock;

use std::ffi::OsString;
use std::fs::Metadata;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};

use rustix::fs::{Gid, Mode, Uid};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};

pub use self::account::{Account, UnknownAccount};
pub use self::handover::{Handover, HandoverError};
pub use self::keep::{SocketPort, keep_bound};
pub use self::lock::{LockError, PathLock};

/// The longest path, so that it and all names beside it fit `sun_path`.
pub const MAX_PATH: usize = 107 - ".handover.new".len();

/// The most connections that wait to be accepted.
const BACKLOG: i32 = 1_024;

/// Where the socket is and who may connect to it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SocketConfig {
    /// Absolute, at most [`MAX_PATH`] bytes.
    pub path: PathBuf,
    /// Permission bits; connecting needs write permission.
    pub mode: u32,
    /// The socket's owner, if not this process's user.
    pub owner: Option<Account>,
    /// The socket's group, if not this process's group.
    pub group: Option<Account>,
}

impl SocketConfig {
    fn beside(&self, suffix: &str) -> PathBuf {
        let mut name = OsString::from(&self.path);
        name.push(suffix);
        name.into()
    }

    pub(crate) fn lock_path(&self) -> PathBuf {
        self.beside(".lock")
    }

    fn handover_path(&self) -> PathBuf {
        self.beside(".handover")
    }
}

/// Why the path could not be claimed.
#[derive(Debug, thiserror::Error)]
pub enum ClaimError {
    /// The directory does not exist. It is not made here.
    #[error("the socket's directory {} does not exist; create it for this process's user", .0.display())]
    NoDirectory(PathBuf),
    /// Another process serves the path.
    #[error("{} is served by process {holder}; stop that one, or start with --replace", path.display())]
    Held {
        /// The socket's path.
        path: PathBuf,
        /// What the lock file says.
        holder: String,
    },
    /// The lock file cannot be used.
    #[error("cannot lock the socket's path")]
    Lock(#[source] io::Error),
    /// The holder did not hand the path over.
    #[error("process {holder} does not hand {} over; stop that process", path.display())]
    Handover {
        /// The socket's path.
        path: PathBuf,
        /// What the lock file says.
        holder: String,
        /// What went wrong.
        source: HandoverError,
    },
    /// The owner or group is not known on this machine.
    #[error(transparent)]
    Account(#[from] UnknownAccount),
    /// Binding, owning or renaming failed.
    #[error("cannot bind {}", path.display())]
    Bind {
        /// The socket's path or one beside it.
        path: PathBuf,
        /// What the system says.
        source: io::Error,
    },
}

/// The right to the path, and what was bound to it.
#[derive(Debug)]
pub struct SocketPath {
    config: SocketConfig,
    owner: Option<Uid>,
    group: Option<Gid>,
    lock: PathLock,
    bound: FileId,
    pid: u32,
}

/// The two sockets of one path.
#[derive(Debug)]
pub struct Bound {
    /// kube-apiserver's calls.
    pub calls: UnixListener,
    /// A successor's request for the path.
    pub handover: UnixListener,
}

impl SocketPath {
    /// Claims the path for the process `pid` and binds it.
    pub fn claim(config: SocketConfig, pid: u32) -> Result<(Self, Bound), ClaimError> {
        let lock = PathLock::take(&config.lock_path()).map_err(|error| refused(&config, error))?;
        Self::bind_first(config, lock, pid)
    }

    /// As [`Self::claim`]; a process that holds the path is asked to hand it
    /// over. It goes on serving until [`Handover::finish`].
    pub fn replace(config: SocketConfig, pid: u32) -> Result<(Self, Bound, Option<Handover>), ClaimError> {
        let holder = match PathLock::take(&config.lock_path()) {
            Ok(lock) => return Self::bind_first(config, lock, pid).map(|(path, bound)| (path, bound, None)),
            Err(LockError::Held { holder }) => holder,
            Err(error) => return Err(refused(&config, error)),
        };
        let (handover, lock) = Handover::ask(&config.handover_path(), &config.lock_path())
            .map_err(|source| ClaimError::Handover { path: config.path.clone(), holder, source })?;
        let (path, bound) = Self::bind_first(config, lock, pid)?;
        Ok((path, bound, Some(handover)))
    }

    fn bind_first(config: SocketConfig, lock: PathLock, pid: u32) -> Result<(Self, Bound), ClaimError> {
        let owner = config.owner.as_ref().map(Account::uid).transpose()?;
        let group = config.group.as_ref().map(Account::gid).transpose()?;
        let mut path = Self { config, owner, group, lock, bound: FileId::default(), pid };
        let bound = path.bind()?;
        Ok((path, bound))
    }

    /// Binds again if the path is no longer ours, as after its directory was
    /// made anew. `None` if all is as it should be.
    pub fn check(&mut self) -> Result<Option<Bound>, ClaimError> {
        let lock_path = self.config.lock_path();
        let lock_is_ours = FileId::of(&lock_path) == Some(self.lock.file_id());
        if lock_is_ours && FileId::of(&self.config.path) == Some(self.bound) {
            return Ok(None);
        }
        if !lock_is_ours {
            self.lock = PathLock::take(&lock_path).map_err(|error| refused(&self.config, error))?;
        }
        self.bind().map(Some)
    }

    /// Writes this process's id into the lock file again.
    fn note_holder(&self) {
        if let Err(error) = self.lock.write_holder(self.pid) {
            tracing::warn!(error = %error, "cannot write this process's id into the lock file");
        }
    }

    fn bind(&mut self) -> Result<Bound, ClaimError> {
        self.lock.write_holder(self.pid).map_err(ClaimError::Lock)?;
        let private = Mode::RUSR | Mode::WUSR;
        let handover = bind_over(&self.config.handover_path(), private, None, None)?;
        let mode = Mode::from_raw_mode(self.config.mode);
        let calls = bind_over(&self.config.path, mode, self.owner, self.group)?;
        // Nobody else renames over the path while this process has the lock.
        self.bound = FileId::of(&self.config.path).unwrap_or_default();
        Ok(Bound { calls, handover })
    }
}

fn refused(config: &SocketConfig, error: LockError) -> ClaimError {
    match error {
        LockError::Held { holder } => ClaimError::Held { path: config.path.clone(), holder },
        LockError::Io(source) if source.kind() == io::ErrorKind::NotFound => {
            ClaimError::NoDirectory(config.path.parent().unwrap_or(&config.path).to_owned())
        }
        LockError::Io(source) => ClaimError::Lock(source),
    }
}

/// Listens under a temporary name, which the lock makes this process's own, and
/// renames it over `path`.
fn bind_over(
    path: &Path,
    mode: Mode,
    owner: Option<Uid>,
    group: Option<Gid>,
) -> Result<UnixListener, ClaimError> {
    let mut temporary = OsString::from(path);
    temporary.push(".new");
    let temporary = PathBuf::from(temporary);
    let bind = || -> io::Result<OwnedFd> {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
        // Linux makes the file with the socket's own mode: it is never wider than asked for.
        rustix::fs::fchmod(&socket, mode)?;
        match std::fs::remove_file(&temporary) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => rustix::net::bind(&socket, &SocketAddrUnix::new(&temporary)?)?,
        }
        rustix::fs::chmod(&temporary, mode)?;
        if owner.is_some() || group.is_some() {
            rustix::fs::chown(&temporary, owner, group)?;
        }
        rustix::net::listen(&socket, BACKLOG)?;
        std::fs::rename(&temporary, path)?;
        Ok(socket)
    };
    match bind() {
        Ok(socket) => Ok(UnixListener::from(socket)),
        Err(source) => Err(ClaimError::Bind { path: path.to_owned(), source }),
    }
}

/// One file, whatever its name is by now. While a descriptor is open on it, no
/// other file gets its inode.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
struct FileId {
    device: u64,
    inode: u64,
}

impl FileId {
    fn of(path: &Path) -> Option<Self> {
        std::fs::symlink_metadata(path).ok().map(|metadata| Self::new(&metadata))
    }

    fn new(metadata: &Metadata) -> Self {
        Self { device: metadata.dev(), inode: metadata.ino() }
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::os::unix::fs::PermissionsExt;
    use std::os::unix::net::UnixStream;

    use super::*;

    fn config(directory: &Path) -> SocketConfig {
        SocketConfig { path: directory.join("kms.sock"), mode: 0o600, owner: None, group: None }
    }

    fn accepts(bound: &Bound, path: &Path) -> bool {
        UnixStream::connect(path).is_ok() && bound.calls.accept().is_ok()
    }

    #[test]
    fn the_path_has_its_mode_and_a_listener() {
        let directory = tempfile::tempdir().unwrap();
        let config = SocketConfig { mode: 0o660, ..config(directory.path()) };
        let (_path, bound) = SocketPath::claim(config.clone(), 7).unwrap();
        assert!(accepts(&bound, &config.path));
        assert_eq!(std::fs::metadata(&config.path).unwrap().permissions().mode() & 0o7777, 0o660);
        assert_eq!(std::fs::read_to_string(config.lock_path()).unwrap(), "7\n");
    }

    #[test]
    fn a_second_start_is_refused_and_names_the_holder() {
        let directory = tempfile::tempdir().unwrap();
        let (_path, bound) = SocketPath::claim(config(directory.path()), 4_711).unwrap();
        let error = SocketPath::claim(config(directory.path()), 4_712).unwrap_err().to_string();
        assert!(error.contains("is served by process 4711"), "{error}");
        assert!(accepts(&bound, &config(directory.path()).path));
    }

    #[test]
    fn what_a_killed_process_left_is_replaced() {
        let directory = tempfile::tempdir().unwrap();
        let config = config(directory.path());
        // A process that is gone has no lock; its files are still there.
        drop(SocketPath::claim(config.clone(), 1).unwrap());
        std::fs::write(directory.path().join("kms.sock.new"), "half-way").unwrap();
        assert!(config.path.exists() && UnixStream::connect(&config.path).is_err());
        let (_path, bound) = SocketPath::claim(config.clone(), 2).unwrap();
        assert!(accepts(&bound, &config.path));
    }

    #[test]
    fn a_missing_directory_is_named_and_not_made() {
        let directory = tempfile::tempdir().unwrap();
        let missing = directory.path().join("run");
        let error = SocketPath::claim(config(&missing), 1).unwrap_err();
        assert!(matches!(&error, ClaimError::NoDirectory(path) if *path == missing), "{error}");
        assert!(!missing.exists());
    }

    #[test]
    fn a_directory_made_anew_gets_the_socket_again() {
        let root = tempfile::tempdir().unwrap();
        let run = root.path().join("run");
        std::fs::create_dir(&run).unwrap();
        let (mut path, _old) = SocketPath::claim(config(&run), 1).unwrap();
        assert!(path.check().unwrap().is_none());
        std::fs::remove_dir_all(&run).unwrap();
        assert!(matches!(path.check(), Err(ClaimError::NoDirectory(_))));
        std::fs::create_dir(&run).unwrap();
        let bound = path.check().unwrap().expect("bound again");
        assert!(accepts(&bound, &config(&run).path));
        assert!(matches!(SocketPath::claim(config(&run), 2), Err(ClaimError::Held { .. })));
        assert!(path.check().unwrap().is_none());
    }

    #[test]
    fn a_removed_socket_is_bound_again_and_a_stolen_lock_is_not_fought_over() {
        let directory = tempfile::tempdir().unwrap();
        let (mut path, _old) = SocketPath::claim(config(directory.path()), 1).unwrap();
        std::fs::remove_file(&path.config.path).unwrap();
        let bound = path.check().unwrap().expect("bound again");
        assert!(accepts(&bound, &path.config.path));
        std::fs::remove_file(path.config.lock_path()).unwrap();
        let (_thief, _bound) = SocketPath::claim(config(directory.path()), 2).unwrap();
        assert!(matches!(path.check(), Err(ClaimError::Held { holder, .. }) if holder == "2"));
    }

    #[test]
    fn a_connection_survives_the_directory() {
        let root = tempfile::tempdir().unwrap();
        let run = root.path().join("run");
        std::fs::create_dir(&run).unwrap();
        let (_path, bound) = SocketPath::claim(config(&run), 1).unwrap();
        let client = UnixStream::connect(config(&run).path).unwrap();
        let (mut served, _) = bound.calls.accept().unwrap();
        std::fs::remove_dir_all(&run).unwrap();
        (&client).write_all(b"x").unwrap();
        served.read_exact(&mut [0]).unwrap();
    }
}
