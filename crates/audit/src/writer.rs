//! Appends to one chain, durably, and undoes what it could not finish.
//!
//! It must never leave half a line behind a record that it then links to, and never number two lines alike.

use std::fs::{DirBuilder, File, OpenOptions, TryLockError};
use std::io::{self, Seek, SeekFrom, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use serde_json::{Map, Value};

use crate::chain::{Chain, Entry, Head, MAX_LINE, next_line};
use crate::walk::{Break, Torn, Walk, walk, walk_end};

/// From this size on the next record begins a new file.
const MAX_FILE: u64 = 16 * 1024 * 1024;

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
    /// The first place where the chain does not hold; what is there was left alone.
    pub broken: Option<Break>,
}

pub(crate) struct Writer {
    directory: PathBuf,
    chain: Chain,
    file: File,
    number: u64,
    /// The length of the file up to the end of its last acknowledged record.
    length: u64,
    head: Head,
    /// The file may have more than `length` bytes: an undo failed.
    overhang: bool,
    max_file: u64,
    _lock: File,
}

impl Writer {
    /// Opens a chain to continue it, and shows all it holds.
    pub(crate) fn open(
        directory: &Path,
        chain: Chain,
        mut visit: impl FnMut(&Entry, Head),
    ) -> Result<(Self, Opened), LogError> {
        let lock = lock(directory, chain)?;
        Self::resume(directory, chain, lock, walk(directory, chain, |entry, head, _| visit(entry, head))?)
    }

    /// Opens a chain to continue it, and reads no more than it must for that.
    pub(crate) fn open_end(directory: &Path, chain: Chain) -> Result<(Self, Opened), LogError> {
        let lock = lock(directory, chain)?;
        Self::resume(directory, chain, lock, walk_end(directory, chain)?)
    }

    fn resume(directory: &Path, chain: Chain, lock: File, found: Walk) -> Result<(Self, Opened), LogError> {
        let number = found.last_file.max(1);
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
            file,
            number,
            length: found.last_length,
            head: found.head,
            overhang: false,
            max_file: MAX_FILE,
            _lock: lock,
        };
        let broken = found.broken_before_the_end();
        Ok((writer, Opened { torn: found.torn, broken }))
    }

    pub(crate) fn head(&self) -> Head {
        self.head
    }

    /// Appends records, all or none, and syncs them.
    pub(crate) fn append(
        &mut self,
        bodies: &[Map<String, Value>],
        now: SystemTime,
    ) -> Result<Head, LogError> {
        let mut head = self.head;
        let mut lines = Vec::new();
        for body in bodies {
            let (line, next) = next_line(head, now, body).map_err(LogError::Json)?;
            if line.len() > MAX_LINE {
                return Err(LogError::TooLong(line.len()));
            }
            lines.extend(line);
            head = next;
        }
        self.undo_overhang()?;
        if self.length >= self.max_file {
            self.next_file()?;
        }
        self.overhang = true;
        if let Err(error) = self.file.write_all(&lines).and_then(|()| self.file.sync_data()) {
            // If this fails too, the next append tries again before it writes.
            let _ = self.undo_overhang();
            return Err(error.into());
        }
        self.overhang = false;
        self.length = self.length.saturating_add(lines.len() as u64);
        self.head = head;
        Ok(head)
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
        self.file = open_file(&self.directory, self.chain, number)?;
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

    use super::*;
    use crate::verify;

    fn body(n: u64) -> Map<String, Value> {
        crate::record::object([("n", n.into())])
    }

    #[test]
    fn what_a_failed_write_left_is_gone_before_the_next_record() {
        let directory = tempfile::tempdir().unwrap();
        let (mut writer, _) = Writer::open(directory.path(), Chain::Data, |_, _| ()).unwrap();
        let first = writer.append(&[body(1)], UNIX_EPOCH).unwrap();
        // A handle that cannot write stands for a disk that refuses, the undo included.
        let path = directory.path().join("data-000001.jsonl");
        let good = std::mem::replace(&mut writer.file, File::open(&path).unwrap());
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
        let (mut writer, _) = Writer::open_end(directory.path(), Chain::Data).unwrap();
        writer.begin_files_at(300);
        for n in 0..20 {
            writer.append(&[body(n)], UNIX_EPOCH).unwrap();
        }
        let (head, number) = (writer.head(), writer.number);
        drop(writer);
        // Empty and half-written files at the end are what crashes leave.
        for end in ["", "{\"seq\""] {
            fs::write(directory.path().join(Chain::Data.file_name(number + 1)), end).unwrap();
            let (writer, opened) = Writer::open_end(directory.path(), Chain::Data).unwrap();
            assert_eq!((writer.head(), writer.number), (head, number + 1));
            assert_eq!((opened.torn.is_some(), opened.broken), (!end.is_empty(), None));
        }
        let (mut writer, _) = Writer::open_end(directory.path(), Chain::Data).unwrap();
        assert_eq!(writer.append(&[body(20)], UNIX_EPOCH).unwrap().seq, 21);
        assert!(verify(directory.path()).unwrap().is_sound());
    }
}
