//! One walk over a chain's files: what the verifier reports and what the writer continues from.
//!
//! It reads only. After the first break it goes on, because the writer has to find the end.

use std::path::{Path, PathBuf};
use std::{fmt, fs, io, mem};

use crate::chain::{Chain, Entry, Head, MAX_LINE, hash_of};
use crate::checkpoint::SignedCheckpoint;

/// A power cut may lose some of the records that no sync had made durable and leave later ones: all within this of
/// the last one. It is far more than they are ever apart.
const UNSYNCED_WITHIN_MS: i64 = 5_000;

/// The first place where a chain does not hold.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Break {
    /// The file's name in the directory.
    pub file: String,
    /// The line in it, from 1; 0 for the file as a whole.
    pub line: u64,
    /// What is wrong there.
    pub why: Why,
}

impl fmt::Display for Break {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.line {
            0 => write!(f, "{}: {}", self.file, self.why),
            line => write!(f, "{} line {line}: {}", self.file, self.why),
        }
    }
}

/// What is wrong at a [`Break`].
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Why {
    /// The numbers of the files have a gap here.
    #[error("the file is missing")]
    FileMissing,
    /// The line is no record.
    #[error("the line is no record")]
    NotARecord,
    /// The last line has no end.
    #[error("the last line is unfinished: a crash, or a write under way")]
    Unfinished,
    /// Lines are missing, doubled or in another order.
    #[error("the line has number {found} where {expected} should be")]
    Number {
        /// Its number.
        found: u64,
        /// The number after the line before.
        expected: u64,
    },
    /// It was written after other bytes than the line before has now.
    #[error("the line does not follow the one before: one of the two was changed")]
    Link,
    /// The file is no checkpoint of this chain.
    #[error("the file is no checkpoint of this chain")]
    NotACheckpoint,
    /// The line with the checkpoint's number is another one.
    #[error("the line is not the one that the checkpoint names")]
    NotTheCheckpoint,
    /// The chain ends before what its checkpoint says was removed.
    #[error("the chain ends here, before its checkpoint {seq}")]
    BeforeCheckpoint {
        /// The checkpoint's number.
        seq: u64,
    },
    /// Nobody who may has signed the checkpoint.
    #[error("the checkpoint proves nothing: {0}")]
    Signature(String),
    /// The chain ends before the head that was kept elsewhere.
    #[error("the chain ends here, before its kept head {seq}")]
    BeforeHead {
        /// The head's number.
        seq: u64,
    },
    /// The line with the head's number is another one.
    #[error("the line is not the one that was kept as head")]
    NotTheHead,
}

/// What follows the last record of a chain and is none: the trace of a crash while writing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Torn {
    /// The file's name in the directory.
    pub file: String,
    /// The first line that is no record, from 1.
    pub line: u64,
    /// The length of what is left once it is cut off.
    pub keep: u64,
    /// How many bytes are no record.
    pub bytes: u64,
}

/// What a walk found.
pub(crate) struct Walk {
    pub(crate) files: u64,
    /// The number of the last file, or of the last one that was removed.
    pub(crate) last_file: u64,
    /// Its length up to the end of its last record.
    pub(crate) last_length: u64,
    pub(crate) lines: u64,
    /// The end of the chain: its last record.
    pub(crate) head: Head,
    pub(crate) broken: Option<Break>,
    pub(crate) torn: Option<Torn>,
    /// The walk began within the chain and has seen no record yet: the first one is taken as it is.
    adrift: bool,
    /// A line that must come by.
    checkpoint: Option<Head>,
}

/// Walks all files of a chain in order and shows each record with its hash and its place.
pub(crate) fn walk(
    directory: &Path,
    chain: Chain,
    mut visit: impl FnMut(&Entry, Head, &Place<'_>),
) -> io::Result<Walk> {
    let files = files(directory, chain)?;
    let first = files.first().map(|(number, _)| *number);
    let mut walk = Walk::from_beginning(directory, chain, first)?.files(&files, chain, &mut visit)?;
    walk.judge_beginning(chain, first);
    Ok(walk)
}

/// Walks only the files at the end that hold the last record: enough to continue a long chain at a start.
pub(crate) fn walk_end(directory: &Path, chain: Chain) -> io::Result<Walk> {
    let has_record = |bytes: &[u8]| lines_of(bytes).any(|line| Entry::parse(line).is_some());
    walk_tail(directory, chain, has_record, |_, _| ())
}

/// Returns the finished lines of a file.
pub(crate) fn lines_of(bytes: &[u8]) -> impl DoubleEndedIterator<Item = &[u8]> {
    bytes.split_inclusive(|byte| *byte == b'\n').filter_map(|line| line.strip_suffix(b"\n"))
}

/// Walks the files from the last one on whose content `begins` takes as a beginning.
pub(crate) fn walk_tail(
    directory: &Path,
    chain: Chain,
    begins: impl Fn(&[u8]) -> bool,
    mut visit: impl FnMut(&Entry, Head),
) -> io::Result<Walk> {
    let files = files(directory, chain)?;
    for (index, (number, path)) in files.iter().enumerate().skip(1).rev() {
        if !begins(&fs::read(path)?) {
            continue;
        }
        let end = files.get(index..).unwrap_or_default();
        let start = Walk::start(chain, number.saturating_sub(1));
        return start.files(end, chain, &mut |entry, head, _| visit(entry, head));
    }
    let first = files.first().map(|(number, _)| *number);
    let start = Walk::from_beginning(directory, chain, first)?;
    start.files(&files, chain, &mut |entry, head, _| visit(entry, head))
}

/// Where a record stands.
pub(crate) struct Place<'a> {
    pub(crate) file: &'a str,
    pub(crate) line: u64,
}

impl Walk {
    /// Starts behind a file; 0 is the beginning of the chain.
    fn start(chain: Chain, last_file: u64) -> Self {
        Self {
            files: 0,
            last_file,
            last_length: 0,
            lines: 0,
            head: Head::start(chain),
            broken: None,
            torn: None,
            adrift: last_file > 0,
            checkpoint: None,
        }
    }

    /// Starts at the beginning of what is there: the chain's own, or the end of what its checkpoint says was removed.
    /// A removal that a crash cut short leaves files from before the checkpoint: they must lead up to it.
    pub(crate) fn from_beginning(directory: &Path, chain: Chain, first: Option<u64>) -> io::Result<Self> {
        let checkpoint = match SignedCheckpoint::read(directory, chain) {
            Ok(checkpoint) => checkpoint.map(|signed| signed.checkpoint),
            Err(error) if error.kind() == io::ErrorKind::InvalidData => {
                let mut walk = Self::start(chain, first.unwrap_or(1).saturating_sub(1));
                walk.break_at(chain.checkpoint_name(), 0, Why::NotACheckpoint);
                return Ok(walk);
            }
            Err(error) => return Err(error),
        };
        let Some((file, end)) = checkpoint.and_then(|checkpoint| Some((checkpoint.file, checkpoint.head()?)))
        else {
            return Ok(Self::start(chain, 0));
        };
        let mut walk = match first {
            Some(first) if first < file => Self::start(chain, first.saturating_sub(1)),
            _ => Self { adrift: false, head: end, ..Self::start(chain, file.saturating_sub(1)) },
        };
        walk.checkpoint = (walk.head != end).then_some(end);
        Ok(walk)
    }

    /// Names what is wrong with where the chain begins.
    fn judge_beginning(&mut self, chain: Chain, first: Option<u64>) {
        if let Some(Head { seq, .. }) = self.checkpoint {
            let file = chain.file_name(self.last_file.max(1));
            self.break_at(file, 0, Why::BeforeCheckpoint { seq });
        } else if first.is_none() && self.last_file > 0 {
            self.break_at(chain.file_name(self.last_file + 1), 0, Why::FileMissing);
        }
    }

    pub(crate) fn files(
        mut self,
        files: &[(u64, PathBuf)],
        chain: Chain,
        visit: &mut impl FnMut(&Entry, Head, &Place<'_>),
    ) -> io::Result<Self> {
        for (number, path) in files {
            let expected = self.last_file.saturating_add(1);
            if *number != expected {
                self.break_at(chain.file_name(expected), 0, Why::FileMissing);
            }
            // Only the very end of a chain can be torn by a crash; elsewhere it is a break, and noted as one.
            self.torn = None;
            self.files += 1;
            self.last_file = *number;
            self.file(&fs::read(path)?, (chain, &chain.file_name(*number)), visit);
        }
        Ok(self)
    }

    /// Takes the first break, unless it is only the torn end.
    pub(crate) fn broken_before_the_end(&self) -> Option<Break> {
        let torn = |place: &Break| {
            self.torn.as_ref().is_some_and(|torn| torn.file == place.file && torn.line <= place.line)
        };
        self.broken.clone().filter(|place| !torn(place))
    }

    fn file(
        &mut self,
        bytes: &[u8],
        (chain, file): (Chain, &str),
        visit: &mut impl FnMut(&Entry, Head, &Place<'_>),
    ) {
        let mut end = 0_u64;
        let (mut good_end, mut good_lines) = (0, 0);
        // What the next line must link to: the line before as it is now, record or not.
        let mut link = self.head.hash;
        let mut hole: Option<Hole> = None;
        for (index, line) in bytes.split_inclusive(|byte| *byte == b'\n').enumerate() {
            let number = index as u64 + 1;
            end += line.len() as u64;
            let content = line.strip_suffix(b"\n");
            let entry = content.filter(|line| line.len() <= MAX_LINE).and_then(Entry::parse);
            let (Some(content), Some(entry)) = (content, entry) else {
                let why = if content.is_none() { Why::Unfinished } else { Why::NotARecord };
                self.break_at(file.to_owned(), number, why);
                link = hash_of(content.unwrap_or(line));
                let at = end - line.len() as u64;
                hole.get_or_insert_with(|| Hole {
                    at,
                    line: number,
                    head: self.head,
                    lines: self.lines,
                    after: Vec::new(),
                });
                continue;
            };
            let expected = self.head.seq.saturating_add(1);
            if mem::take(&mut self.adrift) {
                // Nothing to compare with.
            } else if entry.seq != expected {
                let why = Why::Number { found: entry.seq, expected };
                self.break_at(file.to_owned(), number, why);
            } else if !entry.follows(&link) {
                self.break_at(file.to_owned(), number, Why::Link);
            }
            link = hash_of(content);
            self.head = Head { seq: entry.seq, hash: link };
            if let Some(end) = self.checkpoint.take_if(|end| end.seq <= entry.seq)
                && end != self.head
            {
                self.break_at(file.to_owned(), number, Why::NotTheCheckpoint);
            }
            self.lines += 1;
            (good_end, good_lines) = (end, number);
            if let Some(hole) = &mut hole {
                hole.after.push(entry.text("time").and_then(milliseconds_of_day));
            }
            visit(&entry, self.head, &Place { file, line: number });
        }
        // The changes are synced one by one: nothing can be missing among them.
        if let Some(hole) = hole.filter(|hole| chain == Chain::Data && hole.is_of_a_power_cut()) {
            (self.head, self.lines) = (hole.head, hole.lines);
            (good_end, good_lines) = (hole.at, hole.line - 1);
        }
        self.last_length = good_end;
        self.torn = (good_end < end).then(|| Torn {
            file: file.to_owned(),
            line: good_lines + 1,
            keep: good_end,
            bytes: end - good_end,
        });
    }

    fn break_at(&mut self, file: String, line: u64, why: Why) {
        self.broken.get_or_insert(Break { file, line, why });
    }
}

/// A line that is no record, with records after it.
struct Hole {
    at: u64,
    line: u64,
    head: Head,
    lines: u64,
    /// When the records after it were written, in milliseconds of their day.
    after: Vec<Option<i64>>,
}

impl Hole {
    fn is_of_a_power_cut(&self) -> bool {
        let Some(Some(last)) = self.after.last() else { return false };
        let is_near = |time: &Option<i64>| {
            time.is_some_and(|time| (last - time).rem_euclid(86_400_000) <= UNSYNCED_WITHIN_MS)
        };
        self.after.iter().all(is_near)
    }
}

/// Reads the time of day off an RFC 3339 time with milliseconds in UTC.
fn milliseconds_of_day(time: &str) -> Option<i64> {
    let number = |from: usize, to: usize| time.get(from..to)?.parse::<i64>().ok();
    Some(((number(11, 13)? * 60 + number(14, 16)?) * 60 + number(17, 19)?) * 1000 + number(20, 23)?)
}

/// Lists a chain's files by number.
pub(crate) fn files(directory: &Path, chain: Chain) -> io::Result<Vec<(u64, PathBuf)>> {
    let mut files = Vec::new();
    for entry in fs::read_dir(directory)? {
        let entry = entry?;
        if let Some(number) = entry.file_name().to_str().and_then(|name| chain.number_of(name)) {
            files.push((number, entry.path()));
        }
    }
    files.sort();
    Ok(files)
}
