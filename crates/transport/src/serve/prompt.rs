//! A stream whose peer must say something soon: a connection that is opened and left silent holds its place no longer
//! than a handshake may take. HTTP's own limits begin only with its first bytes.

use std::{
    io,
    pin::Pin,
    task::{Context, Poll},
    time::Duration,
};

use pin_project_lite::pin_project;
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    time::{Sleep, sleep},
};

/// The length of HTTP/2's connection preface; no HTTP/1.1 request that means anything is shorter.
const FIRST_BYTES: usize = 24;

pin_project! {
    pub(super) struct Prompt<Io> {
        #[pin]
        io: Io,
        // Boxed so that a connection does not carry a timer for life.
        sleep: Option<Pin<Box<Sleep>>>,
        seen: usize,
    }
}

impl<Io> Prompt<Io> {
    pub(super) fn new(io: Io, limit: Duration) -> Self {
        Self { io, sleep: Some(Box::pin(sleep(limit))), seen: 0 }
    }
}

impl<Io: AsyncRead> AsyncRead for Prompt<Io> {
    fn poll_read(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = self.project();
        let before = buffer.filled().len();
        let read = this.io.poll_read(context, buffer);
        if let Some(sleep) = this.sleep {
            *this.seen += buffer.filled().len() - before;
            if *this.seen >= FIRST_BYTES {
                *this.sleep = None;
            } else if read.is_pending() && sleep.as_mut().poll(context).is_ready() {
                return Poll::Ready(Err(io::Error::new(io::ErrorKind::TimedOut, "the peer says nothing")));
            }
        }
        read
    }
}

impl<Io: AsyncWrite> AsyncWrite for Prompt<Io> {
    fn poll_write(self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        self.project().io.poll_write(context, bytes)
    }

    fn poll_flush(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.project().io.poll_flush(context)
    }

    fn poll_shutdown(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.project().io.poll_shutdown(context)
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        self.project().io.poll_write_vectored(context, slices)
    }

    fn is_write_vectored(&self) -> bool {
        self.io.is_write_vectored()
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt, duplex};

    use super::*;

    const LIMIT: Duration = Duration::from_secs(5);

    #[tokio::test(start_paused = true)]
    async fn a_silent_peer_is_given_up() {
        let (near, mut far) = duplex(64);
        far.write_all(b"PRI * HTTP/2.0\r\n").await.unwrap();
        let mut io = Prompt::new(near, LIMIT);
        io.read_exact(&mut [0; 16]).await.unwrap();
        let error = io.read_u8().await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
    }

    #[tokio::test(start_paused = true)]
    async fn a_peer_that_has_begun_may_be_silent() {
        let (near, mut far) = duplex(64);
        far.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n").await.unwrap();
        let mut io = Prompt::new(near, LIMIT);
        io.read_exact(&mut [0; 24]).await.unwrap();
        assert!(tokio::time::timeout(LIMIT * 2, io.read_u8()).await.is_err());
    }
}
