//! The bounded queue between the callers and the one thread that writes.

use crate::logging::Format;
use std::io::{self, Write};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, TrySendError, sync_channel};
use std::thread;
use std::time::Duration;
use tracing_subscriber::fmt::MakeWriter;

/// Lines that wait at most: half a minute of a busy agent.
const MAX_LINES: usize = 4_096;
/// A longer line is cut. With [`MAX_LINES`] this bounds the queue at 32 MiB.
const MAX_LINE_BYTES: usize = 8_192;
/// How long the end of the process waits for the queue to drain.
const DRAIN: Duration = Duration::from_secs(1);

enum Message {
    Line(Box<[u8]>),
    /// Answer on this channel once everything before is written.
    Flush(SyncSender<()>),
}

/// The callers' end. Cloning it is cheap.
#[derive(Clone)]
pub(super) struct Queue {
    lines: SyncSender<Message>,
    dropped: Arc<AtomicU64>,
}

impl Write for &Queue {
    /// Takes one line; never waits, never fails.
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        match self.lines.try_send(Message::Line(cut(line))) {
            Ok(()) => {}
            Err(TrySendError::Full(_) | TrySendError::Disconnected(_)) => {
                self.dropped.fetch_add(1, Ordering::Relaxed);
            }
        }
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl<'a> MakeWriter<'a> for Queue {
    type Writer = &'a Self;

    fn make_writer(&'a self) -> &'a Self {
        self
    }
}

fn cut(line: &[u8]) -> Box<[u8]> {
    match line.get(..MAX_LINE_BYTES - 1) {
        Some(head) => [head, b"\n"].concat().into(),
        None => line.into(),
    }
}

/// Keeps the log's end in order: dropping it waits up to a second for what is still queued.
pub struct Guard {
    queue: Queue,
}

impl Guard {
    /// The lines lost since the start because stderr was not read: for a metric.
    pub fn dropped(&self) -> u64 {
        self.queue.dropped.load(Ordering::Relaxed)
    }

    /// The counter behind [`Guard::dropped`], for a metrics registry that outlives this call.
    pub fn dropped_counter(&self) -> Arc<AtomicU64> {
        Arc::clone(&self.queue.dropped)
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        let (done, wait) = sync_channel(1);
        if self.queue.lines.try_send(Message::Flush(done)).is_ok() {
            // A stuck stderr must not keep the process alive.
            let _ = wait.recv_timeout(DRAIN);
        }
    }
}

/// Starts the thread that writes to `out`.
pub(super) fn start(out: impl Write + Send + 'static, format: Format) -> io::Result<(Queue, Guard)> {
    let (lines, receiver) = sync_channel(MAX_LINES);
    let queue = Queue { lines, dropped: Arc::default() };
    let dropped = Arc::clone(&queue.dropped);
    thread::Builder::new()
        .name("log".to_owned())
        .spawn(move || write_all(&receiver, out, format, &dropped))?;
    Ok((queue.clone(), Guard { queue }))
}

fn write_all(receiver: &Receiver<Message>, mut out: impl Write, format: Format, dropped: &AtomicU64) {
    let mut reported = 0;
    loop {
        match receiver.recv_timeout(Duration::from_secs(1)) {
            Ok(Message::Line(line)) => write_line(&mut out, &line, dropped),
            Ok(Message::Flush(done)) => {
                report(&mut out, format, dropped, &mut reported);
                let _ = out.flush();
                let _ = done.try_send(());
            }
            // The queue is empty: what was lost can be said without losing more.
            Err(RecvTimeoutError::Timeout) => report(&mut out, format, dropped, &mut reported),
            Err(RecvTimeoutError::Disconnected) => return,
        }
    }
}

fn write_line(out: &mut impl Write, line: &[u8], dropped: &AtomicU64) {
    if out.write_all(line).is_err() {
        dropped.fetch_add(1, Ordering::Relaxed);
    }
}

fn report(out: &mut impl Write, format: Format, dropped: &AtomicU64, reported: &mut u64) {
    let total = dropped.load(Ordering::Relaxed);
    let lost = total.saturating_sub(*reported);
    if lost == 0 {
        return;
    }
    let line = match format {
        Format::Text => {
            format!("WARN log lines were dropped, stderr was not read lost={lost} total={total}\n")
        }
        Format::Json => format!(
            "{{\"level\":\"WARN\",\"message\":\"log lines were dropped, stderr was not read\",\"lost\":{lost},\"total\":{total}}}\n"
        ),
    };
    if out.write_all(line.as_bytes()).is_ok() {
        *reported = total;
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use std::sync::{Mutex, MutexGuard};

    /// An output that tests read, and can hold shut.
    #[derive(Clone, Default)]
    pub(in crate::logging) struct Sink(Arc<Mutex<Vec<u8>>>);

    impl Sink {
        pub(in crate::logging) fn text(&self) -> String {
            String::from_utf8(self.0.lock().unwrap().clone()).unwrap()
        }

        fn hold(&self) -> MutexGuard<'_, Vec<u8>> {
            self.0.lock().unwrap()
        }
    }

    impl Write for Sink {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().extend_from_slice(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn a_stuck_output_drops_and_counts_and_never_waits() {
        let sink = Sink::default();
        let (queue, guard) = start(sink.clone(), Format::Text).unwrap();
        let held = sink.hold();
        for _ in 0..MAX_LINES + 100 {
            (&queue).write_all(b"line\n").unwrap();
        }
        // The thread may hold one line in its hand, besides those in the queue.
        assert!((99..=100).contains(&guard.dropped()), "{}", guard.dropped());
        drop(held);
        while !sink.text().contains("dropped") {
            thread::yield_now();
        }
        let lost = guard.dropped();
        assert!(sink.text().ends_with(&format!("stderr was not read lost={lost} total={lost}\n")));
    }

    #[test]
    fn the_end_waits_for_what_is_queued() {
        let sink = Sink::default();
        let (queue, guard) = start(sink.clone(), Format::Text).unwrap();
        for _ in 0..1_000 {
            (&queue).write_all(b"line\n").unwrap();
        }
        drop(guard);
        assert_eq!(sink.text().lines().count(), 1_000);
    }

    #[test]
    fn a_long_line_is_cut_and_still_ends() {
        let line = cut(&[b'x'; 100_000]);
        assert_eq!((line.len(), line.last()), (MAX_LINE_BYTES, Some(&b'\n')));
    }
}
