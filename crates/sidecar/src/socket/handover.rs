//! How a new process takes the path from the one that serves it.
//!
//! ```text
//! newcomer                                   holder
//!    connects to <path>.handover
//!    "lock\n"            ──────────────►
//!                        ◄──────────────    "lock\n" and two descriptors: the
//!                                           lock, the ops port's listener
//!    binds, renames over the path            (goes on accepting on its inode)
//!    "drain\n"           ──────────────►
//!                        ◄──────────────    "drain\n"; drains, ends
//! ```
//!
//! The descriptor carries the lock itself, so there is no moment without a
//! holder: a newcomer that dies half-way costs nothing, the old process still
//! has the lock and binds again. Requests are taken one at a time.

use std::fs::File;
use std::io::{self, IoSlice, IoSliceMut, Read, Write};
use std::mem::MaybeUninit;
use std::net::{SocketAddr, TcpListener};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags,
};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::PathLock;

/// How long either side waits for the other's next word before the newcomer
/// serves. A holder answers at once unless it hangs.
const ANSWER_WITHIN: Duration = Duration::from_secs(5);

/// How long the holder waits for a newcomer that has the lock to serve; then it
/// takes the path back.
const SERVE_WITHIN: Duration = Duration::from_secs(60);

const LOCK: &[u8; 5] = b"lock\n";
const DRAIN: &[u8; 6] = b"drain\n";

/// Why a handover failed, as the newcomer sees it.
#[derive(Debug, thiserror::Error)]
pub enum HandoverError {
    /// The holder has no handover socket, or hung up.
    #[error("cannot talk to the process that serves the path")]
    Talk(#[source] io::Error),
    /// The holder said something else.
    #[error("the process that serves the path gave an unexpected answer")]
    Answer,
    /// What it handed over is no lock of this path.
    #[error("the process that serves the path handed over no lock")]
    NoLock(#[source] io::Error),
}

/// The descriptors that go over.
const DESCRIPTORS: usize = 2;

/// A newcomer's talk with the holder, from the lock on.
#[derive(Debug)]
pub struct Handover {
    stream: UnixStream,
    ops: Option<TcpListener>,
}

impl Handover {
    /// Asks the holder for the lock. Blocks.
    pub(super) fn ask(handover: &Path, lock: &Path) -> Result<(Self, PathLock), HandoverError> {
        let mut stream = UnixStream::connect(handover).map_err(HandoverError::Talk)?;
        stream.set_read_timeout(Some(ANSWER_WITHIN)).map_err(HandoverError::Talk)?;
        stream.set_write_timeout(Some(ANSWER_WITHIN)).map_err(HandoverError::Talk)?;
        stream.write_all(LOCK).map_err(HandoverError::Talk)?;
        let (received, ops) = receive(&stream)?;
        let lock = PathLock::received(received, lock).map_err(HandoverError::NoLock)?;
        Ok((Self { stream, ops: Some(ops) }, lock))
    }

    /// The holder's ops port, if it is the one at `address`: both processes
    /// accept on it until the old one drains.
    pub fn take_ops(&mut self, address: SocketAddr) -> Option<TcpListener> {
        let is_the_one = |ops: &mut TcpListener| ops.local_addr().is_ok_and(|found| found == address);
        self.ops.take_if(is_the_one)
    }

    /// Asks the old process to drain, now that this one serves. Blocks.
    ///
    /// After an error the old process may have taken the path back: this one
    /// must end.
    pub fn finish(mut self) -> Result<(), HandoverError> {
        self.stream.write_all(DRAIN).map_err(HandoverError::Talk)?;
        let mut answer = [0; DRAIN.len()];
        self.stream.read_exact(&mut answer).map_err(HandoverError::Talk)?;
        if answer == *DRAIN { Ok(()) } else { Err(HandoverError::Answer) }
    }
}

fn receive(stream: &UnixStream) -> Result<(File, TcpListener), HandoverError> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(DESCRIPTORS))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut answer = [0; LOCK.len()];
    let received = rustix::net::recvmsg(
        stream,
        &mut [IoSliceMut::new(&mut answer)],
        &mut control,
        RecvFlags::CMSG_CLOEXEC,
    )
    .map_err(|error| HandoverError::Talk(error.into()))?;
    if received.bytes != LOCK.len() || answer != *LOCK {
        return Err(HandoverError::Answer);
    }
    let mut descriptors: Vec<OwnedFd> = Vec::new();
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(received) = message {
            descriptors.extend(received);
        }
    }
    let [lock, ops] = <[OwnedFd; DESCRIPTORS]>::try_from(descriptors).map_err(|_| HandoverError::Answer)?;
    Ok((lock.into(), ops.into()))
}

/// How a request ended, as the holder sees it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Request {
    /// The newcomer serves the path: drain.
    Taken,
    /// It left before that: go on, and see whether the path is still ours.
    Abandoned,
}

/// Answers one newcomer, whose user must be root or `own_uid`.
pub(super) async fn answer(
    stream: tokio::net::UnixStream,
    lock: &PathLock,
    ops: &TcpListener,
    own_uid: u32,
) -> Request {
    match stream.peer_cred() {
        Ok(peer) if [0, own_uid].contains(&peer.uid()) => {}
        Ok(_) | Err(_) => return Request::Abandoned,
    }
    match talk(stream, lock, ops).await {
        Ok(()) => Request::Taken,
        Err(error) => {
            tracing::warn!(error = %error, "a handover of the socket's path was abandoned");
            Request::Abandoned
        }
    }
}

async fn talk(mut stream: tokio::net::UnixStream, lock: &PathLock, ops: &TcpListener) -> io::Result<()> {
    expect(&mut stream, LOCK, ANSWER_WITHIN).await?;
    stream.writable().await?;
    stream.try_io(tokio::io::Interest::WRITABLE, || send(&stream, lock, ops))?;
    expect(&mut stream, DRAIN, SERVE_WITHIN).await?;
    // Whether this arrives or not, the newcomer serves.
    let _ = stream.write_all(DRAIN).await;
    Ok(())
}

async fn expect<const N: usize>(
    stream: &mut tokio::net::UnixStream,
    word: &[u8; N],
    within: Duration,
) -> io::Result<()> {
    let mut read = [0; N];
    tokio::time::timeout(within, stream.read_exact(&mut read)).await??;
    if read == *word { Ok(()) } else { Err(io::ErrorKind::InvalidData.into()) }
}

fn send(stream: &tokio::net::UnixStream, lock: &PathLock, ops: &TcpListener) -> io::Result<()> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(DESCRIPTORS))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    let descriptors: [_; DESCRIPTORS] = [lock.file().as_fd(), ops.as_fd()];
    if !control.push(SendAncillaryMessage::ScmRights(&descriptors)) {
        return Err(io::Error::other("no room for the descriptors"));
    }
    match rustix::net::sendmsg(stream, &[IoSlice::new(LOCK)], &mut control, SendFlags::NOSIGNAL)? {
        sent if sent == LOCK.len() => Ok(()),
        _ => Err(io::ErrorKind::WriteZero.into()),
    }
}
