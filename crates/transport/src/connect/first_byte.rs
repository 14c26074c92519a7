//! A stream that has been read one byte ahead, to learn whether the peer talks to us at all.

use std::{
    io,
    pin::Pin,
    task::{Context, Poll},
};

use pin_project_lite::pin_project;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, ReadBuf};

pin_project! {
    pub(super) struct FirstByte<Io> {
        #[pin]
        io: Io,
        byte: Option<u8>,
    }
}

impl<Io: AsyncRead + Unpin> FirstByte<Io> {
    /// Waits for the peer's first byte and keeps it for the reader.
    pub(super) async fn wait(mut io: Io) -> io::Result<Self> {
        let byte = io.read_u8().await?;
        Ok(Self { io, byte: Some(byte) })
    }
}

impl<Io: AsyncRead> AsyncRead for FirstByte<Io> {
    fn poll_read(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = self.project();
        if buffer.remaining() > 0
            && let Some(byte) = this.byte.take()
        {
            buffer.put_slice(&[byte]);
            return Poll::Ready(Ok(()));
        }
        this.io.poll_read(context, buffer)
    }
}

impl<Io: AsyncWrite> AsyncWrite for FirstByte<Io> {
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
