//! One walk over a chain's files: what the verifier reports and what the writer continues from.
//!
//! It reads only. After the first break it goes on, because the writer has to find the end.

use std::path::{Path, PathBuf};
use std::{fmt, fs, io, mem};

use crate::chain::{Chain, Entry, Head, MAX_LINE, hash_of};

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
    /// The number of the last file, 0 if there is none.
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
}

/// Walks all files of a chain in order and shows each record with its hash and its place.
pub(crate) fn walk(
    directory: &Path,
    chain: Chain,
    mut visit: impl FnMut(&Entry, Head, &Place<'_>),
) -> io::Result<Walk> {
    Walk::start(chain, 0).files(&files(directory, chain)?, chain, &mut visit)
}

/// Walks only the files at the end that hold the last record: enough to continue a long chain at a start.
pub(crate) fn walk_end(directory: &Path, chain: Chain) -> io::Result<Walk> {
    let files = files(directory, chain)?;
    for (index, (number, _)) in files.iter().enumerate().skip(1).rev() {
        let end = files.get(index..).unwrap_or_default();
        let found = Walk::start(chain, number.saturating_sub(1)).files(end, chain, &mut |_, _, _| ())?;
        if found.lines > 0 {
            return Ok(found);
        }
    }
    Walk::start(chain, 0).files(&files, chain, &mut |_, _, _| ())
}

/// Where a record stands.
pub(crate) struct Place<'a> {
    pub(crate) file: &'a str,
    pub(crate) line: u64,
}

impl Walk {
    /// Starts behind a file; 0 is the beginning of the chain.
    fn start(chain: Chain, last_file: u64) -> Self {
        let head = Head::start(chain);
        let adrift = last_file > 0;
        Self { files: 0, last_file, last_length: 0, lines: 0, head, broken: None, torn: None, adrift }
    }

    fn files(
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
            self.file(&fs::read(path)?, &chain.file_name(*number), visit);
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

    fn file(&mut self, bytes: &[u8], file: &str, visit: &mut impl FnMut(&Entry, Head, &Place<'_>)) {
        let mut end = 0_u64;
        let (mut good_end, mut good_lines) = (0, 0);
        // What the next line must link to: the line before as it is now, record or not.
        let mut link = self.head.hash;
        for (index, line) in bytes.split_inclusive(|byte| *byte == b'\n').enumerate() {
            let number = index as u64 + 1;
            end += line.len() as u64;
            let content = line.strip_suffix(b"\n");
            let entry = content.filter(|line| line.len() <= MAX_LINE).and_then(Entry::parse);
            let (Some(content), Some(entry)) = (content, entry) else {
                let why = if content.is_none() { Why::Unfinished } else { Why::NotARecord };
                self.break_at(file.to_owned(), number, why);
                link = hash_of(content.unwrap_or(line));
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
            self.lines += 1;
            (good_end, good_lines) = (end, number);
            visit(&entry, self.head, &Place { file, line: number });
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

/// Lists a chain's files by number.
fn files(directory: &Path, chain: Chain) -> io::Result<Vec<(u64, PathBuf)>> {
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
