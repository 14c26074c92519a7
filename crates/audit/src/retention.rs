//! Which old files of a chain may go, and their removal behind a signed checkpoint.
//!
//! The caller signs between the two steps. Nothing is removed before its checkpoint is durable, the file that is
//! written never goes, and a file that does not hold is set aside as evidence.

use std::fs::{self, File};
use std::io::{self, BufRead as _, BufReader, Read as _};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use data_encoding::HEXLOWER;

use crate::chain::{Chain, Entry, Head, MAX_LINE, rfc3339};
use crate::checkpoint::{Checkpoint, SignedCheckpoint};
use crate::walk::{Break, Walk, Why, files};

/// How much of a chain is kept.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Retention {
    /// Old files go until the chain has no more bytes than this.
    pub max_bytes: Option<u64>,
    /// Files go whose newest record is older than this.
    pub max_age: Option<Duration>,
}

/// Files that are to be removed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Removal {
    directory: PathBuf,
    chain: Chain,
    files: Vec<(u64, PathBuf)>,
    end: Head,
    broken: Option<Break>,
}

impl Removal {
    /// Decides; `current` is the file that is written, and records from `needed` on stay.
    pub(crate) fn plan(
        directory: &Path,
        chain: Chain,
        (current, needed): (u64, u64),
        retention: &Retention,
        now: SystemTime,
    ) -> io::Result<Option<Self>> {
        let mut old = files(directory, chain)?;
        old.retain(|(number, _)| *number <= current);
        let Some(count) = too_many(&old, retention, now)? else { return Ok(None) };
        // The first line of the file that stays says how what goes ended.
        for count in (1..=count).rev() {
            let Some((_, kept)) = old.get(count) else { continue };
            let Some(first) = first_record(kept)? else { continue };
            let hash = HEXLOWER.decode(first.prev.as_bytes()).ok().and_then(|hash| hash.try_into().ok());
            if let Some(hash) = hash.filter(|_| first.seq <= needed) {
                old.truncate(count);
                let end = Head { seq: first.seq.saturating_sub(1), hash };
                let broken = broken(directory, chain, &old, end)?;
                return Ok(Some(Self { directory: directory.to_owned(), chain, files: old, end, broken }));
            }
        }
        Ok(None)
    }

    /// How many files.
    #[must_use]
    pub fn files(&self) -> usize {
        self.files.len()
    }

    /// The place where they do not hold, if there is one.
    #[must_use]
    pub fn broken(&self) -> Option<&Break> {
        self.broken.as_ref()
    }

    /// Returns the statement to sign.
    #[must_use]
    pub fn checkpoint(&self, agent: &str, now: SystemTime) -> Checkpoint {
        Checkpoint {
            agent: agent.to_owned(),
            chain: self.chain.name().to_owned(),
            file: self.files.last().map_or(1, |(number, _)| *number) + 1,
            hash: HEXLOWER.encode(&self.end.hash),
            seq: self.end.seq,
            time: rfc3339(now),
            broken: self.broken.as_ref().map(ToString::to_string),
        }
    }

    /// Writes the checkpoint, then removes the files, the oldest first.
    ///
    /// # Errors
    /// When the file system refuses; the next attempt goes on where this one stopped.
    pub fn carry_out(
        self,
        text: String,
        checkpoint: Checkpoint,
        signature: Vec<u8>,
        issuers: Vec<Vec<u8>>,
    ) -> io::Result<()> {
        SignedCheckpoint { checkpoint, text, signature, issuers }.write(&self.directory, self.chain)?;
        for (number, path) in &self.files {
            if self.broken.as_ref().is_some_and(|place| place.file == self.chain.file_name(*number)) {
                let mut aside = path.clone().into_os_string();
                aside.push(".broken");
                fs::rename(path, aside)?;
            } else {
                fs::remove_file(path)?;
            }
        }
        File::open(&self.directory)?.sync_all()
    }
}

/// Returns how many files at the beginning are too old or too much.
fn too_many(files: &[(u64, PathBuf)], retention: &Retention, now: SystemTime) -> io::Result<Option<usize>> {
    let mut count = 0;
    if let Some(max) = retention.max_bytes {
        let sizes = files.iter().map(|(_, path)| Ok(fs::metadata(path)?.len()));
        let sizes = sizes.collect::<io::Result<Vec<u64>>>()?;
        let mut total = sizes.iter().sum::<u64>();
        for size in sizes {
            if total <= max {
                break;
            }
            total = total.saturating_sub(size);
            count += 1;
        }
    }
    if let Some(age) = retention.max_age {
        let limit = rfc3339(now.checked_sub(age).unwrap_or(SystemTime::UNIX_EPOCH));
        while let Some((_, next)) = files.get(count + 1) {
            // A file's last record is no younger than the first one of the next file.
            let time = first_record(next)?.and_then(|first| first.text("time").map(str::to_owned));
            if time.is_none_or(|time| time >= limit) {
                break;
            }
            count += 1;
        }
    }
    let count = count.min(files.len().saturating_sub(1));
    Ok((count > 0).then_some(count))
}

/// Reads the first record of a file; `None` when there is none yet or it is damaged.
pub(crate) fn first_record(path: &Path) -> io::Result<Option<Entry>> {
    let mut line = Vec::new();
    BufReader::new(File::open(path)?).take(MAX_LINE as u64 + 1).read_until(b'\n', &mut line)?;
    Ok(line.strip_suffix(b"\n").and_then(Entry::parse))
}

fn broken(directory: &Path, chain: Chain, old: &[(u64, PathBuf)], end: Head) -> io::Result<Option<Break>> {
    let first = old.first().map(|(number, _)| *number);
    let walked = Walk::from_beginning(directory, chain, first)?.files(old, chain, &mut |_, _, _| ())?;
    let last = walked.last_file;
    let ends = || Break { file: chain.file_name(last), line: 0, why: Why::Link };
    Ok(walked.broken.or_else(|| (walked.head != end).then(ends)))
}

#[cfg(test)]
mod tests;
