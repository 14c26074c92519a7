//! Signals as values: a token that is cancelled on SIGTERM or SIGINT, and a stream of SIGHUPs.

use std::io;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio_util::sync::CancellationToken;

/// Returns a token that is cancelled by the first SIGTERM or SIGINT. Call it inside the runtime, once.
///
/// # Errors
/// When a handler cannot be installed.
pub fn shutdown() -> io::Result<CancellationToken> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let token = CancellationToken::new();
    let cancelled = token.clone();
    tokio::spawn(async move {
        let name = tokio::select! {
            _ = terminate.recv() => "SIGTERM",
            _ = interrupt.recv() => "SIGINT",
        };
        tracing::info!(signal = name, "shutting down");
        cancelled.cancel();
    });
    Ok(token)
}

/// The SIGHUPs of this process. While it lives, SIGHUP does not end the process.
pub struct Hangups(Signal);

impl Hangups {
    /// Waits for the next one; several that arrive between two calls count as one.
    pub async fn next(&mut self) {
        if self.0.recv().await.is_none() {
            std::future::pending::<()>().await;
        }
    }
}

/// Starts to listen for SIGHUP. Call it inside the runtime.
///
/// # Errors
/// When the handler cannot be installed.
pub fn hangups() -> io::Result<Hangups> {
    signal(SignalKind::hangup()).map(Hangups)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sigterm_cancels_the_token_and_sighup_wakes_the_stream() {
        let runtime = crate::runtime::current_thread(1).unwrap();
        runtime.block_on(async {
            let token = shutdown().unwrap();
            let mut hangups = hangups().unwrap();
            let me = rustix::process::getpid();
            rustix::process::kill_process(me, rustix::process::Signal::HUP).unwrap();
            hangups.next().await;
            assert!(!token.is_cancelled());
            rustix::process::kill_process(me, rustix::process::Signal::TERM).unwrap();
            token.cancelled().await;
        });
    }
}
