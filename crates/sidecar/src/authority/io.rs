//! The rewrite around a connection: what the client sends goes through a
//! [`Framer`], what the server sends goes out untouched.
//!
//! It must never report an end of the stream before all bytes that came before
//! it were read.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use super::{FrameError, Framer};

/// How many bytes are read from the client at once; also about the most that
/// wait here for `h2`, beside one header block.
const READ_SIZE: usize = 8_192;

/// A connection from kube-apiserver whose `:authority` values are rewritten on
/// the way to `h2`.
#[derive(Debug)]
pub struct AuthorityRewrite<S> {
    io: S,
    framer: Framer,
    input: Box<[u8]>,
    /// Rewritten bytes; those before `handed_on` were read already.
    output: Vec<u8>,
    handed_on: usize,
    failure: Option<FrameError>,
}

impl<S> AuthorityRewrite<S> {
    /// Wraps a connection before its first byte was read.
    pub fn new(io: S) -> Self {
        Self {
            io,
            framer: Framer::new(),
            input: vec![0; READ_SIZE].into_boxed_slice(),
            output: Vec::with_capacity(READ_SIZE),
            handed_on: 0,
            failure: None,
        }
    }

    /// The connection itself, for questions about the peer.
    pub fn get_ref(&self) -> &S {
        &self.io
    }

    /// Moves waiting bytes into `buf`; false if none wait.
    fn hand_on(&mut self, buf: &mut ReadBuf<'_>) -> bool {
        let waiting = self.output.get(self.handed_on..).unwrap_or_default();
        if waiting.is_empty() {
            return false;
        }
        let (now, _) = waiting.split_at(waiting.len().min(buf.remaining()));
        buf.put_slice(now);
        self.handed_on += now.len();
        if self.handed_on == self.output.len() {
            self.output.clear();
            self.handed_on = 0;
        }
        true
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for AuthorityRewrite<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = &mut *self;
        loop {
            if this.hand_on(buf) {
                return Poll::Ready(Ok(()));
            }
            if let Some(failure) = this.failure {
                return Poll::Ready(Err(io::Error::new(io::ErrorKind::InvalidData, failure)));
            }
            let mut input = ReadBuf::new(&mut this.input);
            ready!(Pin::new(&mut this.io).poll_read(cx, &mut input))?;
            if input.filled().is_empty() {
                return Poll::Ready(Ok(()));
            }
            this.failure = this.framer.push(input.filled(), &mut this.output).err();
        }
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for AuthorityRewrite<S> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.io).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_shutdown(cx)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.io).poll_write_vectored(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        self.io.is_write_vectored()
    }
}
