//! Listeners, bound before the process gives up its rights, as std types: the runtime comes later.
//!
//! Under systemd a socket unit may own a listener; it is taken by the name that the unit gives it
//! (`FileDescriptorName=`), never by its position.

use std::io;
use std::net::{SocketAddr, TcpListener};
use std::os::fd::{FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixListener;
use std::sync::atomic::{AtomicBool, Ordering};

/// The first descriptor that systemd passes (sd_listen_fds(3)).
const FIRST: RawFd = 3;
/// More than any unit of ours names.
const MAX_INHERITED: usize = 16;

/// Why a listener could not be had. A port in use is [`crate::exit::BUSY`].
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ListenError {
    /// Another process has the port.
    #[error("port {} is in use on {}; stop its owner (ss -ltnp shows it) or configure another port", .0.port(), .0.ip())]
    InUse(SocketAddr),
    /// The address is not one of this machine's.
    #[error("{} is no address of this machine; configure one that `ip address` shows, or 0.0.0.0", .0.ip())]
    NotHere(SocketAddr),
    /// Any other refusal.
    #[error("cannot listen on {address}")]
    Refused {
        /// What was to be bound.
        address: SocketAddr,
        /// What the system said.
        source: io::Error,
    },
    /// The environment that systemd set does not hold together.
    #[error("cannot use the sockets that systemd passed: {0}; start the program by its unit")]
    Environment(&'static str),
    /// The passed descriptor is not a listening socket of the wanted kind.
    #[error("the socket unit's `{name}` is not a listening {wanted} socket; correct its Listen… line")]
    WrongKind {
        /// The unit's name for it.
        name: String,
        /// TCP or unix.
        wanted: &'static str,
    },
}

/// Binds `address`. Port 0 takes a free one. The listener does not block, as a runtime needs it.
///
/// # Errors
/// See [`ListenError`].
pub fn tcp(address: SocketAddr) -> Result<TcpListener, ListenError> {
    // std sets SO_REUSEADDR, so that connections of the previous process in TIME_WAIT do not hold the port.
    let listener = TcpListener::bind(address).map_err(|source| match source.kind() {
        io::ErrorKind::AddrInUse => ListenError::InUse(address),
        io::ErrorKind::AddrNotAvailable => ListenError::NotHere(address),
        _ => ListenError::Refused { address, source },
    })?;
    listener.set_nonblocking(true).map_err(|source| ListenError::Refused { address, source })?;
    Ok(listener)
}

/// The listeners that systemd holds for this process.
#[derive(Debug, Default)]
pub struct Inherited(Vec<(String, OwnedFd)>);

impl Inherited {
    /// Takes them from `LISTEN_PID`, `LISTEN_FDS` and `LISTEN_FDNAMES`; none is no error. A second call gets
    /// none: each descriptor has one owner.
    ///
    /// # Errors
    /// When the variables contradict each other.
    pub fn take() -> Result<Self, ListenError> {
        static TAKEN: AtomicBool = AtomicBool::new(false);
        let variable = |name: &str| std::env::var(name).ok();
        let names = parse(
            variable("LISTEN_PID").as_deref(),
            variable("LISTEN_FDS").as_deref(),
            variable("LISTEN_FDNAMES").as_deref(),
            std::process::id(),
        )?;
        if names.is_empty() || TAKEN.swap(true, Ordering::AcqRel) {
            return Ok(Self::default());
        }
        names
            .into_iter()
            .zip(FIRST..)
            .map(|(name, fd)| Ok((name, own(fd)?)))
            .collect::<Result<_, _>>()
            .map(Self)
    }

    /// Hands out the unix listener that the unit calls `name`.
    ///
    /// # Errors
    /// When it is something else.
    pub fn unix(&mut self, name: &str) -> Result<Option<UnixListener>, ListenError> {
        let Some(fd) = self.remove(name) else { return Ok(None) };
        let wrong = || ListenError::WrongKind { name: name.to_owned(), wanted: "unix" };
        check(&fd, rustix::net::AddressFamily::UNIX).ok_or_else(wrong)?;
        let listener = UnixListener::from(fd);
        listener.set_nonblocking(true).map_err(|_| wrong())?;
        Ok(Some(listener))
    }

    /// Hands out the TCP listener that the unit calls `name`.
    ///
    /// # Errors
    /// When it is something else.
    pub fn tcp(&mut self, name: &str) -> Result<Option<TcpListener>, ListenError> {
        let Some(fd) = self.remove(name) else { return Ok(None) };
        let wrong = || ListenError::WrongKind { name: name.to_owned(), wanted: "TCP" };
        check(&fd, rustix::net::AddressFamily::INET)
            .or_else(|| check(&fd, rustix::net::AddressFamily::INET6))
            .ok_or_else(wrong)?;
        let listener = TcpListener::from(fd);
        listener.set_nonblocking(true).map_err(|_| wrong())?;
        Ok(Some(listener))
    }

    fn remove(&mut self, name: &str) -> Option<OwnedFd> {
        let at = self.0.iter().position(|(found, _)| found == name)?;
        Some(self.0.remove(at).1)
    }
}

/// Reads the variables: the names, in the order of the descriptors; none when they are for another process.
fn parse(
    pid: Option<&str>,
    count: Option<&str>,
    names: Option<&str>,
    own_pid: u32,
) -> Result<Vec<String>, ListenError> {
    let (Some(pid), Some(count)) = (pid, count) else { return Ok(Vec::new()) };
    if pid.parse() != Ok(own_pid) {
        return Ok(Vec::new());
    }
    let count: usize = count.parse().map_err(|_| ListenError::Environment("LISTEN_FDS is no number"))?;
    if count > MAX_INHERITED {
        return Err(ListenError::Environment("LISTEN_FDS is larger than 16"));
    }
    let names: Vec<String> = match names {
        Some(names) => names.split(':').map(str::to_owned).collect(),
        None => vec!["unknown".to_owned(); count],
    };
    if names.len() == count {
        Ok(names)
    } else {
        Err(ListenError::Environment("LISTEN_FDNAMES differs from LISTEN_FDS"))
    }
}

/// Becomes the owner of a descriptor that systemd passed.
#[expect(unsafe_code, reason = "a descriptor number from the environment has no safe constructor")]
fn own(fd: RawFd) -> Result<OwnedFd, ListenError> {
    // SAFETY: only read here; an fd that is not open makes fcntl fail.
    let borrowed = unsafe { rustix::fd::BorrowedFd::borrow_raw(fd) };
    rustix::io::fcntl_setfd(borrowed, rustix::io::FdFlags::CLOEXEC)
        .map_err(|_| ListenError::Environment("a descriptor is not open"))?;
    // SAFETY: the fd is open (just seen), systemd passed it to this process and to nobody else, and
    // `Inherited::take` hands each number out once.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

fn check(fd: &OwnedFd, family: rustix::net::AddressFamily) -> Option<()> {
    use rustix::net::sockopt;
    let stream = sockopt::socket_type(fd).ok()? == rustix::net::SocketType::STREAM;
    let listens = sockopt::socket_acceptconn(fd).ok()?;
    (stream && listens && sockopt::socket_domain(fd).ok()? == family).then_some(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_port_in_use_is_named_with_the_remedy() {
        let first = tcp("127.0.0.1:0".parse().unwrap()).unwrap();
        let taken = first.local_addr().unwrap();
        let error = tcp(taken).unwrap_err();
        assert!(matches!(error, ListenError::InUse(address) if address == taken));
        assert!(error.to_string().starts_with(&format!("port {} is in use on 127.0.0.1; ", taken.port())));
    }

    #[test]
    fn an_address_of_another_machine_is_named() {
        assert!(matches!(tcp("192.0.2.1:0".parse().unwrap()), Err(ListenError::NotHere(_))));
    }

    #[test]
    fn sockets_for_another_process_are_left_alone() {
        assert!(parse(Some("2"), Some("1"), Some("kms"), 1).unwrap().is_empty());
        assert!(parse(None, None, None, 1).unwrap().is_empty());
    }

    #[test]
    fn names_and_descriptors_must_match_in_number() {
        assert_eq!(parse(Some("1"), Some("2"), Some("kms:ops"), 1).unwrap(), ["kms", "ops"]);
        for (count, names) in [("2", "kms"), ("x", "kms"), ("17", "kms"), ("1", "kms:ops")] {
            assert!(matches!(
                parse(Some("1"), Some(count), Some(names), 1),
                Err(ListenError::Environment(_))
            ));
        }
    }

    #[test]
    fn an_inherited_listener_is_handed_out_once_and_only_as_what_it_is() {
        let dir = tempfile::tempdir().unwrap();
        let unix = UnixListener::bind(dir.path().join("s")).unwrap();
        let tcp = TcpListener::bind("127.0.0.1:0").unwrap();
        let mut inherited = Inherited(vec![
            ("kms".to_owned(), OwnedFd::from(unix)),
            ("ops".to_owned(), OwnedFd::from(tcp.try_clone().unwrap())),
            ("bad".to_owned(), OwnedFd::from(tcp)),
        ]);
        assert!(inherited.unix("kms").unwrap().is_some());
        assert!(inherited.unix("kms").unwrap().is_none());
        assert!(inherited.tcp("ops").unwrap().is_some());
        let error = inherited.unix("bad").unwrap_err().to_string();
        assert_eq!(error, "the socket unit's `bad` is not a listening unix socket; correct its Listen… line");
    }
}
