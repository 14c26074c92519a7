//! A thread of its own for a port that must not keep the data port waiting.
//!
//! A page of a thousand clusters takes milliseconds of work in one piece. On the
//! workers that serve the data port, calls would wait behind it; on a thread of
//! lower priority the kernel lets the workers go first. Nothing that the data
//! path waits for may be held across a wait in here.

use std::io;
use std::thread;
use std::time::Duration;

use fleet_kms_process::runtime;
use tokio::sync::oneshot;

use crate::errors::chain;

/// How much the thread steps back: enough to be preempted at once, not so much
/// that a busy host stops it.
const NICE: i32 = 5;
/// Threads for its disk and store, which a change waits for.
const BLOCKING_THREADS: usize = 8;
/// How long what still runs at the end may take.
const SHUTDOWN_WITHIN: Duration = Duration::from_secs(1);

/// Runs what `start` makes, inside the thread's runtime, to its end; the
/// returned future ends with it.
///
/// # Errors
///
/// When there is no thread or runtime, or `start` fails.
pub fn run<F: Future<Output = ()> + Send + 'static>(
    name: &'static str,
    start: impl FnOnce() -> io::Result<F>,
) -> io::Result<impl Future<Output = ()> + Send + 'static> {
    let runtime = runtime::current_thread(BLOCKING_THREADS)?;
    let work = {
        let inside = runtime.enter();
        let work = start();
        drop(inside);
        match work {
            Ok(work) => work,
            Err(error) => {
                // Not dropped: this may be inside another runtime, where a runtime must not wait for its end.
                runtime.shutdown_background();
                return Err(error);
            }
        }
    };
    let (done, ended) = oneshot::channel::<()>();
    thread::Builder::new().name(name.to_owned()).spawn(move || {
        // To Linux a priority is a thread's. Who may not lower it serves as well.
        if let Err(error) = rustix::process::setpriority_process(None, NICE) {
            tracing::warn!(error = chain(&error), "the {name} port's thread keeps its priority");
        }
        runtime.block_on(work);
        runtime.shutdown_timeout(SHUTDOWN_WITHIN);
        drop(done);
    })?;
    Ok(async move {
        // Dropped, never sent: it only says that the thread is through.
        let _ = ended.await;
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn the_work_runs_on_its_own_thread_and_its_end_is_seen() {
        let (tell, told) = oneshot::channel();
        let ended = run("aside", || {
            Ok(async move {
                let name = thread::current().name().map(str::to_owned);
                let _ = tell.send((name, rustix::process::getpriority_process(None).ok()));
            })
        });
        ended.unwrap().await;
        let (name, nice) = told.await.unwrap();
        assert_eq!(name.as_deref(), Some("aside"));
        assert!(nice.is_some_and(|nice| nice >= NICE), "{nice:?}");
        assert!(rustix::process::getpriority_process(None).unwrap() < NICE, "this thread keeps its own");
    }

    #[tokio::test]
    async fn what_cannot_start_is_an_error() {
        let failed = run("aside", || Err::<std::future::Ready<()>, _>(io::Error::other("no")));
        assert!(failed.is_err());
    }
}
