//! Appends to one chain, durably or to be synced a little later, and undoes what it could not finish.
//!
//! It must never leave half a line behind a record that it then links to, and never number two lines alike.

use std::fs::{DirBuilder, File, OpenOptions, TryLockError};
use std::io::{self, Seek, SeekFrom, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::SystemTime;

use serde::Serialize;

use crate::chain::{Chain, Entry, Head, MAX_LINE, next_line, rfc3339};
use crate::walk::{Break, Torn, Walk, walk_end, walk_tail};

/// From this size on the next record begins a new file, unless the configuration says otherwise.
pub const MAX_FILE: u64 = 16 * 1024 * 1024;

/// Why a chain could not be opened or continued; nothing was recorded.
#[derive(Debug, thiserror::Error)]
pub enum LogError {
    /// Another process writes it.
    #[error("the audit chain {0} is in use by another process")]
    InUse(Chain),
    /// The record is longer than [`MAX_LINE`].
    #[error("the audit record has {0} bytes, and {max} are allowed", max = MAX_LINE)]
    TooLong(usize),
    /// The record cannot be written as JSON.
    #[error("the audit record is no json")]
    Json(#[source] serde_json::Error),
    /// The file system refused.
    #[error("the audit cannot be written")]
    Io(#[from] io::Error),
}

/// What opening a chain found and did; worth a log line and, in the changes, an event.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Opened {
    /// The trace of a crash, cut off; it was never acknowledged, unless someone made it look so.
    pub torn: Option<Torn>,
    /// The first place in the files that were read where the chain does not hold; what is there was left alone.
    pub broken: Option<Break>,
}

pub(crate) struct Writer {
    directory: PathBuf,
    chain: Chain,
    file: Arc<File>,
    number: u64,
    /// The length of the file up to the end of its last acknowledged record.
    length: u64,
    head: Head,
    /// The file may have more than `length` bytes: an undo failed.
    overhang: bool,
    /// The end of the file that no sync has made durable, as it was written.
    unsynced: Vec<u8>,
    /// The last record that is durable.
    durable: Head,
    /// A sync failed: the kernel may have dropped what is in `unsynced`, so it is to be written again.
    rewrite: bool,
    /// Counts syncs, so that the end of an older one is told apart.
    syncs: u64,
    max_file: u64,
    _lock: File,
}

/// A sync that is under way without holding the writer.
pub(crate) struct Sync {
    file: Arc<File>,
    bytes: usize,
    head: Head,
    syncs: u64,
}

impl Sync {
    /// Waits for the disk.
    pub(crate) fn wait(&self) -> io::Result<()> {
        self.file.sync_data()
    }
}

impl Writer {
    /// Opens a chain to continue it and shows what its last files hold, from the last one on that `begins` with all
    /// that is carried over from the files before.
    pub(crate) fn open(
        directory: &Path,
        chain: Chain,
        max_file: u64,
        begins: impl Fn(&[u8]) -> bool,
        visit: impl FnMut(&Entry, Head),
    ) -> Result<(Self, Opened), LogError> {
        let lock = lock(directory, chain)?;
        let found = walk_tail(directory, chain, begins, visit)?;
        Self::resume(directory, chain, max_file, lock, found)
    }

    /// Opens a chain to continue it, and reads no more than it must for that.
    pub(crate) fn open_end(
        directory: &Path,
        chain: Chain,
        max_file: u64,
    ) -> Result<(Self, Opened), LogError> {
        let lock = lock(directory, chain)?;
        Self::resume(directory, chain, max_file, lock, walk_end(directory, chain)?)
    }

    fn resume(
        directory: &Path,
        chain: Chain,
        max_file: u64,
        lock: File,
        found: Walk,
    ) -> Result<(Self, Opened), LogError> {
        let number = found.last_file.saturating_add(u64::from(found.files == 0));
        let file = open_file(directory, chain, number)?;
        if let Some(torn) = &found.torn {
            // Best effort: the disk may be full, which is how ends get torn.
            let _ = set_aside(&directory.join(&torn.file), torn.keep);
            file.set_len(torn.keep)?;
        }
        // Also makes durable what a killed process had written but not synced: we are about to link to it.
        file.sync_all()?;
        let writer = Self {
            directory: directory.to_owned(),
            chain,
            file: Arc::new(file),
            number,
            length: found.last_length,
            head: found.head,
            overhang: false,
            unsynced: Vec::new(),
            durable: found.head,
            rewrite: false,
            syncs: 0,
            max_file,
            _lock: lock,
        };
        let broken = found.broken_before_the_end();
        Ok((writer, Opened { torn: found.torn, broken }))
    }

    pub(crate) fn head(&self) -> Head {
        self.head
    }

    /// The last record that is durable.
    pub(crate) fn durable(&self) -> Head {
        self.durable
    }

    /// The number of the file that is written.
    pub(crate) fn number(&self) -> u64 {
        self.number
    }

    /// Whether the next record is the first one of a file other than the first.
    pub(crate) fn begins_file(&self) -> bool {
        self.length >= self.max_file || (self.length == 0 && self.number > 1)
    }

    /// Whether something waits for a sync.
    pub(crate) fn is_unsynced(&self) -> bool {
        !self.unsynced.is_empty()
    }

    /// Appends records, all or none, and syncs them.
    pub(crate) fn append(&mut self, bodies: &[impl Serialize], now: SystemTime) -> Result<Head, LogError> {
        let before = (self.head, self.unsynced.len());
        let head = self.write(bodies, now)?;
        if let Err(error) = self.sync() {
            let (head, kept) = before;
            let added = self.unsynced.len().saturating_sub(kept);
            self.unsynced.truncate(kept);
            self.length = self.length.saturating_sub(added as u64);
            (self.head, self.overhang) = (head, true);
            // If this fails too, the next record tries again before it is written.
            let _ = self.undo_overhang();
            return Err(error.into());
        }
        Ok(head)
    }

    /// Appends records, all or none, and hands them to the kernel: a kill of this process leaves them, a power cut
    /// may not.
    pub(crate) fn write(&mut self, bodies: &[impl Serialize], now: SystemTime) -> Result<Head, LogError> {
        let (lines, head) = self.lines(bodies, now)?;
        self.write_again()?;
        self.undo_overhang()?;
        if self.length >= self.max_file {
            self.sync()?;
            self.next_file()?;
        }
        self.overhang = true;
        if let Err(error) = (&*self.file).write_all(&lines) {
            let _ = self.undo_overhang();
            return Err(error.into());
        }
        self.overhang = false;
        self.length = self.length.saturating_add(lines.len() as u64);
        self.head = head;
        self.unsynced.extend(lines);
        Ok(head)
    }

    /// Syncs all that was written.
    pub(crate) fn sync(&mut self) -> io::Result<()> {
        self.write_again()?;
        let sync = self.begin_sync();
        let result = sync.wait();
        self.end_sync(&sync, result.is_ok());
        result
    }

    /// Begins a sync; the writer may be used until [`Self::end_sync`].
    pub(crate) fn begin_sync(&self) -> Sync {
        let (bytes, head) = (self.unsynced.len(), self.head);
        Sync { file: Arc::clone(&self.file), bytes, head, syncs: self.syncs }
    }

    /// Takes note of what came of a sync.
    pub(crate) fn end_sync(&mut self, sync: &Sync, succeeded: bool) {
        if sync.syncs != self.syncs {
            // Another one was faster and has covered this one.
            return;
        }
        self.syncs = self.syncs.wrapping_add(1);
        if succeeded {
            self.unsynced.drain(..sync.bytes);
            self.durable = sync.head;
        } else {
            self.rewrite = !self.unsynced.is_empty();
        }
    }

    fn lines(&self, bodies: &[impl Serialize], now: SystemTime) -> Result<(Vec<u8>, Head), LogError> {
        let (mut head, mut lines) = (self.head, Vec::new());
        let time = rfc3339(now);
        for body in bodies {
            let (line, next) = next_line(head, &time, body).map_err(LogError::Json)?;
            if line.len() > MAX_LINE {
                return Err(LogError::TooLong(line.len()));
            }
            lines.extend(line);
            head = next;
        }
        Ok((lines, head))
    }

    /// After a failed sync the kernel forgets what it could not write, so it is handed over once more.
    fn write_again(&mut self) -> io::Result<()> {
        if self.rewrite {
            self.file.set_len(self.length.saturating_sub(self.unsynced.len() as u64))?;
            (&*self.file).write_all(&self.unsynced)?;
            self.syncs = self.syncs.wrapping_add(1);
            (self.rewrite, self.overhang) = (false, false);
        }
        Ok(())
    }

    fn undo_overhang(&mut self) -> io::Result<()> {
        if self.overhang {
            self.file.set_len(self.length)?;
            self.overhang = false;
        }
        Ok(())
    }

    fn next_file(&mut self) -> io::Result<()> {
        let number = self.number.saturating_add(1);
        self.file = Arc::new(open_file(&self.directory, self.chain, number)?);
        self.number = number;
        self.length = 0;
        Ok(())
    }

    #[cfg(test)]
    pub(crate) fn begin_files_at(&mut self, max_file: u64) {
        self.max_file = max_file;
    }
}

/// Opens or creates a file of the chain; its name is durable before anything is in it.
fn open_file(directory: &Path, chain: Chain, number: u64) -> io::Result<File> {
    let path = directory.join(chain.file_name(number));
    let file = OpenOptions::new().append(true).create(true).mode(0o640).open(path)?;
    File::open(directory)?.sync_all()?;
    Ok(file)
}

/// Copies a torn end to a file of its own: what looks like a crash may be the trace of someone.
fn set_aside(path: &Path, keep: u64) -> io::Result<()> {
    let mut torn = File::open(path)?;
    torn.seek(SeekFrom::Start(keep))?;
    let mut name = path.to_owned().into_os_string();
    name.push(format!(".torn-at-{keep}"));
    let mut copy = OpenOptions::new().write(true).create_new(true).mode(0o640).open(name)?;
    io::copy(&mut torn, &mut copy)?;
    copy.sync_all()
}

/// Takes the right to write a chain, in a directory that is made if need be: two writers would fork it.
fn lock(directory: &Path, chain: Chain) -> Result<File, LogError> {
    if !directory.try_exists()? {
        DirBuilder::new().recursive(true).mode(0o750).create(directory)?;
        File::open(directory.join(".."))?.sync_all()?;
    }
    let path = directory.join(format!("{chain}.lock"));
    let file = OpenOptions::new().write(true).create(true).truncate(false).mode(0o640).open(path)?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(TryLockError::WouldBlock) => Err(LogError::InUse(chain)),
        Err(TryLockError::Error(error)) => Err(error.into()),
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::time::UNIX_EPOCH;

    use serde_json::{Map, Value};

    use super::*;
    use crate::verify;

    fn body(n: u64) -> Map<String, Value> {
        crate::record::object([("n", n.into())])
    }

    #[test]
    fn what_a_failed_write_left_is_gone_before_the_next_record() {
        let directory = tempfile::tempdir().unwrap();
        let (mut writer, _) = Writer::open_end(directory.path(), Chain::Data, MAX_FILE).unwrap();
        let first = writer.append(&[body(1)], UNIX_EPOCH).unwrap();
        // A handle that cannot write stands for a disk that refuses, the undo included.
        let path = directory.path().join("data-000001.jsonl");
        let good = std::mem::replace(&mut writer.file, Arc::new(File::open(&path).unwrap()));
        assert!(matches!(writer.append(&[body(2)], UNIX_EPOCH), Err(LogError::Io(_))));
        assert!(writer.overhang && writer.head() == first);
        OpenOptions::new().append(true).open(&path).unwrap().write_all(b"{\"seq\":2,").unwrap();
        writer.file = good;
        let second = writer.append(&[body(2), body(3)], UNIX_EPOCH).unwrap();
        assert_eq!(second.seq, 3);
        let report = verify(directory.path()).unwrap();
        assert!(report.is_sound() && report.data.lines == 3, "{report:?}");
    }

    #[test]
    fn a_long_chain_is_continued_from_its_end() {
        let directory = tempfile::tempdir().unwrap();
        let (mut writer, _) = Writer::open_end(directory.path(), Chain::Data, MAX_FILE).unwrap();
        writer.begin_files_at(300);
        for n in 0..20 {
            writer.append(&[body(n)], UNIX_EPOCH).unwrap();
        }
        let (head, number) = (writer.head(), writer.number);
        drop(writer);
        // Empty and half-written files at the end are what crashes leave.
        for end in ["", "{\"seq\""] {
            fs::write(directory.path().join(Chain::Data.file_name(number + 1)), end).unwrap();
            let (writer, opened) = Writer::open_end(directory.path(), Chain::Data, MAX_FILE).unwrap();
            assert_eq!((writer.head(), writer.number), (head, number + 1));
            assert_eq!((opened.torn.is_some(), opened.broken), (!end.is_empty(), None));
        }
        let (mut writer, _) = Writer::open_end(directory.path(), Chain::Data, MAX_FILE).unwrap();
        assert_eq!(writer.append(&[body(20)], UNIX_EPOCH).unwrap().seq, 21);
        assert!(verify(directory.path()).unwrap().is_sound());
    }

    #[test]
    fn what_a_failed_sync_may_have_lost_is_written_again_with_the_next_record() {
        let directory = tempfile::tempdir().unwrap();
        let (mut writer, _) = Writer::open_end(directory.path(), Chain::Data, MAX_FILE).unwrap();
        let durable = writer.append(&[body(1)], UNIX_EPOCH).unwrap();
        let path = directory.path().join("data-000001.jsonl");
        let synced = fs::metadata(&path).unwrap().len();
        writer.write(&[body(2)], UNIX_EPOCH).unwrap();
        let sync = writer.begin_sync();
        writer.write(&[body(3)], UNIX_EPOCH).unwrap();
        writer.end_sync(&sync, false);
        assert_eq!((writer.durable(), writer.head().seq), (durable, 3));
        // The kernel dropped the pages: zeros where the lines were.
        let mut lost = fs::read(&path).unwrap();
        lost[usize::try_from(synced).unwrap()..].fill(0);
        fs::write(&path, lost).unwrap();
        writer.write(&[body(4)], UNIX_EPOCH).unwrap();
        writer.sync().unwrap();
        assert_eq!((writer.durable(), writer.is_unsynced()), (writer.head(), false));
        let report = verify(directory.path()).unwrap();
        assert!(report.is_sound() && report.data.lines == 4, "{report:?}");
    }

    #[test]
    fn a_sync_covers_what_was_written_before_it_began_and_no_more() {
        let directory = tempfile::tempdir().unwrap();
        let (mut writer, _) = Writer::open_end(directory.path(), Chain::Data, MAX_FILE).unwrap();
        let first = writer.write(&[body(1)], UNIX_EPOCH).unwrap();
        let (slow, quick) = (writer.begin_sync(), writer.begin_sync());
        writer.write(&[body(2)], UNIX_EPOCH).unwrap();
        writer.end_sync(&quick, true);
        assert_eq!((writer.durable(), writer.is_unsynced()), (first, true));
        writer.end_sync(&slow, true);
        assert_eq!((writer.durable(), writer.is_unsynced()), (first, true), "an older end counts no more");
    }

    #[test]
    fn what_a_power_cut_left_behind_a_hole_is_set_aside_and_an_edit_long_ago_is_not() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("data-000001.jsonl");
        let (mut writer, _) = Writer::open_end(directory.path(), Chain::Data, MAX_FILE).unwrap();
        let at = |seconds| UNIX_EPOCH + std::time::Duration::from_secs(seconds);
        for (n, seconds) in [(1, 0), (2, 100), (3, 86_399), (4, 86_400), (5, 86_401)] {
            writer.append(&[body(n)], at(seconds)).unwrap();
        }
        drop(writer);
        let whole = fs::read_to_string(&path).unwrap();
        let lines: Vec<_> = whole.split_inclusive('\n').collect();
        let without = |line: usize| {
            let mut lines: Vec<_> = lines.iter().map(|line| line.as_bytes().to_vec()).collect();
            // The end of the line stays: a hole is a sector's, not a line's, and this one takes no other record.
            let text = lines[line].len() - 1;
            lines[line][..text].fill(0);
            lines.concat()
        };
        fs::write(&path, without(2)).unwrap();
        let (writer, opened) = Writer::open_end(directory.path(), Chain::Data, MAX_FILE).unwrap();
        assert_eq!((writer.head().seq, opened.broken), (2, None));
        assert_eq!(opened.torn.unwrap().keep as usize, lines[0].len() + lines[1].len());
        assert!(verify(directory.path()).unwrap().is_sound());
        drop(writer);
        fs::write(&path, without(0)).unwrap();
        let (writer, opened) = Writer::open_end(directory.path(), Chain::Data, MAX_FILE).unwrap();
        assert_eq!((writer.head().seq, opened.torn), (5, None));
        assert_eq!(opened.broken.unwrap().line, 1);
    }
}
