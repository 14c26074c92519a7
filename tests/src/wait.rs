//! Waiting with a limit. No test may sleep for a fixed time and hope.

use std::thread;
use std::time::{Duration, Instant};

use anyhow::bail;

/// How long a peer may take to start on a loaded machine with two cores.
pub const START_LIMIT: Duration = Duration::from_secs(90);

/// How long one look should rest before the next.
const POLL: Duration = Duration::from_millis(50);

/// Looks again and again until `look` gives a value.
///
/// # Errors
/// At once when `look` fails, and after `limit` with the text of `what`.
pub fn until<T>(
    what: &str,
    limit: Duration,
    mut look: impl FnMut() -> anyhow::Result<Option<T>>,
) -> anyhow::Result<T> {
    let end = now() + limit;
    loop {
        if let Some(found) = look()? {
            return Ok(found);
        }
        if now() >= end {
            bail!("waited {limit:?} for {what}");
        }
        thread::sleep(POLL);
    }
}

/// Calls `act` until `duration` has passed, at least once.
///
/// # Errors
/// The first error of `act`.
pub fn keep_doing(duration: Duration, mut act: impl FnMut() -> anyhow::Result<()>) -> anyhow::Result<()> {
    let end = now() + duration;
    loop {
        act()?;
        if now() >= end {
            return Ok(());
        }
    }
}

/// How long `act` took, with what it returned.
pub fn timed<T>(act: impl FnOnce() -> T) -> (T, Duration) {
    let started = now();
    let result = act();
    (result, started.elapsed())
}

#[allow(clippy::disallowed_methods, reason = "the harness waits for real programs")]
fn now() -> Instant {
    Instant::now()
}
