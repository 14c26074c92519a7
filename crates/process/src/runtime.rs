//! The two shapes of async runtime that the programs use.
//!
//! Build one only after [`crate::hardening::apply`]: its threads inherit what the first thread gave up.

use std::io;
use tokio::runtime::{Builder, Runtime};

/// Blocking work of a server: reads of a store, name resolution. tokio's own 512 would each cost a stack.
const MULTI_THREAD_BLOCKING: usize = 32;

/// Tasks that a worker runs before it looks for new events and for tasks of other workers. tokio's 61 are made for tasks
/// of microseconds; with batches of keys among them, a call would wait tens of milliseconds until it is noticed.
const LOOK_EVERY: u32 = 4;

/// Builds a runtime that runs everything on the calling thread, with at most `blocking_threads` more for
/// blocking work such as name resolution.
///
/// # Errors
/// When the kernel refuses an epoll instance or a thread.
pub fn current_thread(blocking_threads: usize) -> io::Result<Runtime> {
    Builder::new_current_thread()
        .enable_all()
        .max_blocking_threads(blocking_threads)
        .thread_name("blocking")
        .build()
}

/// Builds a runtime with one worker per core.
///
/// # Errors
/// When the kernel refuses an epoll instance or a thread.
pub fn multi_thread() -> io::Result<Runtime> {
    Builder::new_multi_thread()
        .event_interval(LOOK_EVERY)
        .global_queue_interval(LOOK_EVERY)
        .enable_all()
        .max_blocking_threads(MULTI_THREAD_BLOCKING)
        .thread_name("worker")
        .build()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_runtimes_run_async_and_blocking_work() {
        for runtime in [current_thread(2), multi_thread()] {
            let answer =
                runtime.unwrap().block_on(async { tokio::task::spawn_blocking(|| 7).await.unwrap() });
            assert_eq!(answer, 7);
        }
    }
}
