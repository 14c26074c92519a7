//! The embedded store: one SQLite file in WAL mode with `synchronous=FULL`, for one agent.
//!
//! One thread writes, [`READERS`] threads read on connections of their own; no async thread ever waits for
//! the disk. SQLite has no page checksums here: what a row holds must authenticate itself (the agent's
//! records do), and `quick_check` at open finds only a broken structure.
//!
//! It must never answer a commit before SQLite has synced it, and never let a commit that was answered
//! [`CommitError::NotApplied`] come back; how is told in `writer.rs`.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;

use async_trait::async_trait;
use tokio::sync::{mpsc, oneshot};

use crate::changes::ChangeHub;
use crate::{Changes, CommitError, ReadError, Revision, Row, RowName, Store, Txn};

mod file;
mod lock;
mod reader;
mod writer;
mod backup;
mod replace;

use lock::StoreLock;
use reader::Reader;
use writer::{Writer, WriterJob};

pub use backup::{BackupError, BackupReport};
pub use file::OpenError;
pub use replace::Replacement;

/// Threads that read; more would only queue at the same disk.
const READERS: usize = 2;
/// Commits and reads that wait for a thread; beyond, callers wait to be queued.
const QUEUE: usize = 256;

/// A store in one SQLite file. Dropping it finishes what is queued and lets go of the file.
pub struct SqliteStore {
    path: PathBuf,
    hub: Arc<ChangeHub>,
    /// Set while a failed commit could still come back; see `writer.rs`.
    unsettled: Arc<AtomicBool>,
    reads: Option<mpsc::Sender<reader::ReadJob>>,
    /// `None` for a store opened read-only.
    writes: Option<mpsc::Sender<WriterJob>>,
    reader_threads: Vec<JoinHandle<()>>,
    writer_thread: Option<JoinHandle<()>>,
    lock: Option<Arc<StoreLock>>,
    /// Held by a backup while it runs, so that two never write one file.
    backing_up: Arc<Mutex<()>>,
}

impl SqliteStore {
    /// Creates a store in a file that must not exist, and opens it. Blocks on the disk.
    ///
    /// The file appears whole or not at all, with mode 0600.
    ///
    /// # Errors
    /// When the file exists, another process holds its lock, or the disk refuses.
    pub fn create(path: impl AsRef<Path>) -> Result<Self, OpenError> {
        let path = file::settle_path(path.as_ref())?;
        let lock = StoreLock::take(&path)?;
        file::create(&path)?;
        Self::start(path, lock)
    }

    /// Opens an existing store, and holds `<path>.lock` until it is dropped. Blocks on the disk.
    ///
    /// # Errors
    /// Names what is wrong with the file: absent, in use (and by which process), no SQLite database, not
    /// ours, newer than this program, damaged.
    pub fn open(path: impl AsRef<Path>) -> Result<Self, OpenError> {
        let path = file::settle_path(path.as_ref())?;
        file::must_exist(&path)?;
        let lock = StoreLock::take(&path)?;
        Self::start(path, lock)
    }

    /// Opens a backup to look into it: takes no lock, changes nothing, refuses every commit, and checks the
    /// whole file first. Blocks on the disk.
    ///
    /// # Errors
    /// As [`SqliteStore::open`], but never because it is in use.
    pub fn open_read_only(path: impl AsRef<Path>) -> Result<Self, OpenError> {
        let path = file::settle_path(path.as_ref())?;
        file::must_exist(&path)?;
        file::full_check(&file::open_reader(&path)?)?;
        let mut store = Self::stopped(path, None);
        store.start_readers()?;
        Ok(store)
    }

    /// Checks the whole file: structure, indices and content of every page.
    ///
    /// # Errors
    /// Says what is damaged, in SQLite's words.
    pub async fn integrity_check(&self) -> Result<(), OpenError> {
        let path = self.path.clone();
        backup::on_own_thread("store-check", move || file::full_check(&file::open_reader(&path)?))
            .await
            .unwrap_or_else(|stopped| Err(OpenError::Io(stopped)))
    }

    /// Writes a consistent copy to `to`, checks it, and puts it in place atomically and durably, replacing
    /// what is there. Commits go on meanwhile. The copy is one file with mode 0600 and needs no other.
    ///
    /// # Errors
    /// Says which step failed; `to` is then as it was.
    pub async fn backup(&self, to: &Path) -> Result<BackupReport, BackupError> {
        let (from, to, lock) = (self.path.clone(), to.to_owned(), self.lock.clone());
        let backing_up = Arc::clone(&self.backing_up);
        backup::on_own_thread("store-backup", move || {
            let _store_stays_ours = lock;
            let _one_at_a_time = backing_up.lock().unwrap_or_else(PoisonError::into_inner);
            backup::write(&from, &to)
        })
        .await
        .unwrap_or_else(|stopped| Err(BackupError::Io { step: "run", source: stopped }))
    }

    fn start(path: PathBuf, lock: StoreLock) -> Result<Self, OpenError> {
        let connection = file::open_writer(&path)?;
        Self::start_with(connection, path, lock)
    }

    fn start_with(
        connection: rusqlite::Connection,
        path: PathBuf,
        lock: StoreLock,
    ) -> Result<Self, OpenError> {
        let mut store = Self::stopped(path, Some(Arc::new(lock)));
        store.start_readers()?;
        let (writes, jobs) = mpsc::channel(QUEUE);
        let (hub, unsettled) = (Arc::clone(&store.hub), Arc::clone(&store.unsettled));
        let writer = Writer::new(store.path.clone(), connection, hub, unsettled);
        store.writer_thread = Some(spawn("store-writer", move || writer.run(jobs))?);
        store.writes = Some(writes);
        Ok(store)
    }

    fn stopped(path: PathBuf, lock: Option<Arc<StoreLock>>) -> Self {
        Self {
            path,
            hub: Arc::default(),
            unsettled: Arc::default(),
            reads: None,
            writes: None,
            reader_threads: Vec::new(),
            writer_thread: None,
            lock,
            backing_up: Arc::default(),
        }
    }

    fn start_readers(&mut self) -> Result<(), OpenError> {
        let (reads, jobs) = mpsc::channel(QUEUE);
        let jobs = Arc::new(Mutex::new(jobs));
        self.reads = Some(reads);
        for _ in 0..READERS {
            let reader = Reader::new(file::open_reader(&self.path)?);
            let jobs = Arc::clone(&jobs);
            self.reader_threads.push(spawn("store-reader", move || reader.run(&jobs))?);
        }
        Ok(())
    }

    async fn read<T: Send + 'static>(
        &self,
        work: impl FnOnce(&rusqlite::Connection) -> rusqlite::Result<T> + Send + 'static,
    ) -> Result<T, ReadError> {
        if self.unsettled.load(Ordering::SeqCst) {
            self.settle().await?;
        }
        let (reply, answer) = oneshot::channel();
        let job: reader::ReadJob = Box::new(move |connection| drop(reply.send(work(connection))));
        let stopped = || ReadError::Unavailable(Stopped.into());
        self.reads.as_ref().ok_or_else(stopped)?.send(job).await.map_err(|_| stopped())?;
        answer.await.map_err(|_| stopped())?.map_err(reader::read_error)
    }

    async fn settle(&self) -> Result<(), ReadError> {
        let (reply, answer) = oneshot::channel();
        let stopped = || ReadError::Unsettled(Stopped.into());
        let writes = self.writes.as_ref().ok_or_else(stopped)?;
        writes.send(WriterJob::Settle { reply }).await.map_err(|_| stopped())?;
        answer.await.map_err(|_| stopped())?.map_err(ReadError::Unsettled)
    }
}

#[async_trait]
impl Store for SqliteStore {
    async fn get(&self, name: &RowName) -> Result<Option<Row>, ReadError> {
        let name = name.clone();
        self.read(move |connection| reader::get(connection, &name)).await
    }

    async fn page_rows(
        &self,
        prefix: &str,
        after: Option<&RowName>,
        limit: usize,
    ) -> Result<Vec<Row>, ReadError> {
        let page = reader::Page::new(prefix, after, limit)?;
        self.read(move |connection| page.rows(connection)).await
    }

    async fn page_revisions(
        &self,
        prefix: &str,
        after: Option<&RowName>,
        limit: usize,
    ) -> Result<Vec<(RowName, Revision)>, ReadError> {
        let page = reader::Page::new(prefix, after, limit)?;
        self.read(move |connection| page.revisions(connection)).await
    }

    async fn commit(&self, txn: Txn) -> Result<Revision, CommitError> {
        let parts = txn.into_parts()?;
        let writes = self.writes.as_ref().ok_or_else(|| CommitError::NotApplied(ReadOnly.into()))?;
        let (reply, answer) = oneshot::channel();
        let job = WriterJob::Commit { parts, reply };
        writes.send(job).await.map_err(|_| CommitError::NotApplied(Stopped.into()))?;
        answer.await.map_err(|_| CommitError::Unknown(Stopped.into()))?
    }

    fn changes(&self, prefix: &str) -> Changes {
        self.hub.subscribe(prefix)
    }
}

impl Drop for SqliteStore {
    fn drop(&mut self) {
        // Readers first: the connection that closes last must be the writer's, which may then fold the WAL
        // into the database. The lock goes after it, with the field.
        self.reads = None;
        for thread in self.reader_threads.drain(..) {
            let _ = thread.join();
        }
        self.writes = None;
        if let Some(thread) = self.writer_thread.take() {
            let _ = thread.join();
        }
    }
}

#[derive(Debug, thiserror::Error)]
#[error("the store is stopped")]
struct Stopped;

#[derive(Debug, thiserror::Error)]
#[error("the store is opened read-only")]
struct ReadOnly;

fn spawn(name: &str, work: impl FnOnce() + Send + 'static) -> Result<JoinHandle<()>, OpenError> {
    std::thread::Builder::new().name(name.to_owned()).spawn(work).map_err(OpenError::Io)
}

#[cfg(test)]
mod tests;
