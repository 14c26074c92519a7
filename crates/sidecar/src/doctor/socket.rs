//! The path that kube-apiserver dials, looked at from outside.

use std::fs::Metadata;
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::Path;

use tokio::net::UnixStream;

use super::report::{Check, CheckId};
use crate::errors::chain;
use crate::socket::{Account, PathLock, SocketConfig};

/// Whoever listens on the socket.
#[derive(Debug)]
pub(super) struct Listener {
    /// As which user it bound the socket.
    pub(super) uid: u32,
    /// Its process, if it can be seen from here, and that one's name.
    process: Option<(i32, String)>,
}

impl Listener {
    /// Whether systemd's socket unit decides about path, mode and owner.
    pub(super) fn is_systemd(&self) -> bool {
        self.process.as_ref().is_some_and(|(_, name)| name == "systemd")
    }

    fn name(&self) -> String {
        match &self.process {
            Some((pid, name)) => format!("process {pid} ({name})"),
            None => "a process of another container".to_owned(),
        }
    }
}

/// Looks at the socket, and says who listens on it.
pub(super) async fn examine(config: &SocketConfig) -> (Vec<Check>, Option<Listener>) {
    let directory = directory(config.path.parent().unwrap_or(Path::new("/")));
    let path = path(&config.path);
    let mut checks = vec![directory, path];
    let Ok(metadata) = config.path.symlink_metadata() else { return (checks, None) };
    if !metadata.file_type().is_socket() {
        return (checks, None);
    }
    let (accepting, listener) = listener(&config.path).await;
    checks.push(accepting);
    checks.push(lock(config, listener.as_ref()));
    checks.push(access(config, &metadata, listener.as_ref()));
    (checks, listener)
}

fn directory(directory: &Path) -> Check {
    let (id, subject) = (CheckId::SocketDirectory, directory.display());
    match directory.metadata() {
        Ok(metadata) if !metadata.is_dir() => {
            Check::fail(id, subject, "is no directory", "correct socket.path")
        }
        Ok(metadata) if metadata.mode() & 0o1002 == 0o002 => {
            let message = format!("mode {:04o}: everyone can put another socket there", mode(&metadata));
            Check::fail(id, &subject, message, format!("chmod o-w {subject}"))
        }
        Ok(metadata) => Check::ok(id, subject, format!("mode {:04o}", mode(&metadata))),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            let remedy = "create it for the sidecar's user (/run is empty after each boot: install \
                          deploy/tmpfiles.d/fleet-kms.conf, then systemd-tmpfiles --create)";
            Check::fail(id, subject, "does not exist", remedy)
        }
        Err(error) => Check::warn(id, subject, chain(&error), super::AS_ROOT),
    }
}

fn path(path: &Path) -> Check {
    let (id, subject) = (CheckId::SocketPath, path.display());
    match path.symlink_metadata() {
        Ok(metadata) if metadata.file_type().is_socket() => Check::ok(id, subject, "is a socket"),
        Ok(metadata) if metadata.is_dir() => {
            let remedy = "share the directory above it with kube-apiserver's pod, never the socket itself; remove this \
                          directory, then start kms-sidecar";
            Check::fail(
                id,
                subject,
                "is a directory: kubelet makes one where a mounted file is missing",
                remedy,
            )
        }
        Ok(_) => Check::fail(id, subject, "is no socket", "remove it, then start kms-sidecar"),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            Check::fail(id, subject, "does not exist", "start kms-sidecar, or correct socket.path")
        }
        Err(error) => Check::warn(id, subject, chain(&error), super::AS_ROOT),
    }
}

/// Connects, and closes again.
async fn listener(path: &Path) -> (Check, Option<Listener>) {
    let (id, subject) = (CheckId::SocketListener, path.display());
    let credentials = match UnixStream::connect(path).await {
        Ok(stream) => stream.peer_cred(),
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
            return (Check::fail(id, subject, "nobody listens", "start kms-sidecar"), None);
        }
        Err(error) => return (Check::warn(id, subject, chain(&error), super::AS_ROOT), None),
    };
    match credentials {
        Ok(credentials) => {
            let process = credentials.pid().filter(|pid| *pid > 0).map(|pid| (pid, process_name(pid)));
            let listener = Listener { uid: credentials.uid(), process };
            let message = format!("{} accepts, as user {}", listener.name(), listener.uid);
            (Check::ok(id, subject, message), Some(listener))
        }
        Err(error) => (Check::warn(id, subject, chain(&error), super::AS_ROOT), None),
    }
}

fn process_name(pid: i32) -> String {
    let name = std::fs::read_to_string(format!("/proc/{pid}/comm"));
    name.map_or_else(|_| "unknown".to_owned(), |name| name.trim_end().to_owned())
}

fn lock(config: &SocketConfig, listener: Option<&Listener>) -> Check {
    let lock_path = config.lock_path();
    let (id, subject) = (CheckId::SocketLock, lock_path.display());
    match PathLock::holder(&lock_path) {
        Ok(Some(holder)) => {
            let message = format!("held; the holder calls itself process {holder} (in its own container)");
            Check::ok(id, subject, message)
        }
        Ok(None) => match listener {
            Some(listener) if listener.is_systemd() => {
                Check::ok(id, subject, "held by nobody: systemd's socket unit owns the path")
            }
            Some(listener) => {
                let message = format!("held by nobody, yet {} answers on the socket", listener.name());
                let remedy =
                    "stop that process if it is no kms-sidecar; else restart it: its lock file was removed";
                Check::warn(id, subject, message, remedy)
            }
            None => Check::fail(id, subject, "held by nobody", "start kms-sidecar"),
        },
        Err(error) => Check::warn(id, subject, chain(&error), super::AS_ROOT),
    }
}

fn access(config: &SocketConfig, metadata: &Metadata, listener: Option<&Listener>) -> Check {
    let (id, subject) = (CheckId::SocketAccess, config.path.display());
    let found = format!("mode {:04o}, owner {}:{}", mode(metadata), metadata.uid(), metadata.gid());
    if listener.is_some_and(Listener::is_systemd) {
        return Check::ok(id, subject, format!("{found}, as systemd's socket unit has it"));
    }
    let (owner, group) = match (
        config.owner.as_ref().map(Account::uid).transpose(),
        config.group.as_ref().map(Account::gid).transpose(),
    ) {
        (Ok(owner), Ok(group)) => (owner, group),
        (Err(error), _) | (_, Err(error)) => {
            return Check::fail(id, subject, error.to_string(), "correct socket.owner or socket.group");
        }
    };
    let owner = owner.map(|owner| owner.as_raw()).or(listener.map(|listener| listener.uid));
    let group = group.map(|group| group.as_raw());
    let mut wrong = Vec::new();
    if mode(metadata) != config.mode {
        wrong.push(format!("mode {:04o} (socket.mode)", config.mode));
    }
    if let Some(owner) = owner.filter(|owner| *owner != metadata.uid()) {
        wrong.push(format!("owner {owner} (socket.owner, or the sidecar's user)"));
    }
    if let Some(group) = group.filter(|group| *group != metadata.gid()) {
        wrong.push(format!("group {group} (socket.group)"));
    }
    if wrong.is_empty() {
        return Check::ok(id, subject, found);
    }
    let message = format!("{found}; wanted: {}", wrong.join(", "));
    let remedy = "restart kms-sidecar, which makes the socket as configured; kube-apiserver needs write permission on it, \
                  and nobody else should have it";
    Check::fail(id, subject, message, remedy)
}

pub(super) fn mode(metadata: &Metadata) -> u32 {
    metadata.mode() & 0o7777
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;
    use std::path::PathBuf;

    use super::super::report::Status;
    use super::*;
    use crate::socket::SocketPath;

    fn config(path: PathBuf) -> SocketConfig {
        SocketConfig { path, mode: 0o600, owner: None, group: None }
    }

    fn statuses(checks: &[Check]) -> Vec<(&'static str, Status)> {
        checks.iter().map(|check| (check.id.as_str(), check.status)).collect()
    }

    #[tokio::test]
    async fn a_socket_that_is_served_is_ok_and_a_look_takes_nothing_away() {
        let directory = tempfile::tempdir().unwrap();
        let config = config(directory.path().join("kms.sock"));
        let (_path, _bound) = SocketPath::claim(config.clone(), 7).unwrap();
        let (checks, listener) = examine(&config).await;
        assert!(checks.iter().all(|check| check.status == Status::Ok), "{checks:?}");
        assert!(checks.iter().any(|check| check.message.contains("calls itself process 7")), "{checks:?}");
        assert_eq!(listener.unwrap().uid, rustix::process::geteuid().as_raw());
        assert!(SocketPath::claim(config, 8).unwrap_err().to_string().contains("process 7"));
    }

    #[tokio::test]
    async fn what_a_killed_process_left_is_told_apart_from_nothing() {
        let directory = tempfile::tempdir().unwrap();
        let config = config(directory.path().join("kms.sock"));
        let (checks, _) = examine(&config).await;
        assert_eq!(statuses(&checks), [("socket_directory", Status::Ok), ("socket_path", Status::Fail)]);
        assert!(!config.lock_path().exists(), "a look leaves no file");

        drop(SocketPath::claim(config.clone(), 7).unwrap());
        let (checks, _) = examine(&config).await;
        let wanted = [("socket_listener", Status::Fail), ("socket_lock", Status::Fail)];
        assert_eq!(statuses(&checks)[2..4], wanted);
        assert!(SocketPath::claim(config, 8).is_ok(), "the look let the lock go");
    }

    #[tokio::test]
    async fn another_mode_and_an_unknown_owner_fail() {
        let directory = tempfile::tempdir().unwrap();
        let mut config = config(directory.path().join("kms.sock"));
        let (_path, _bound) = SocketPath::claim(config.clone(), 7).unwrap();
        std::fs::set_permissions(&config.path, std::fs::Permissions::from_mode(0o666)).unwrap();
        let (checks, _) = examine(&config).await;
        let last = checks.last().unwrap();
        assert_eq!((last.id, last.status), (CheckId::SocketAccess, Status::Fail));
        assert!(last.message.contains("mode 0666") && last.message.contains("mode 0600"), "{last:?}");
        config.owner = Some(Account::Name("no-such-user".to_owned()));
        let (checks, _) = examine(&config).await;
        assert!(checks.last().unwrap().message.contains("no-such-user"));
    }

    #[tokio::test]
    async fn a_directory_in_the_sockets_place_is_explained() {
        let directory = tempfile::tempdir().unwrap();
        let (checks, _) = examine(&config(directory.path().to_owned())).await;
        assert!(checks.last().unwrap().remedy.as_ref().unwrap().contains("never the socket itself"));
    }
}
