//! The verifier: walks both chains of a directory and names the first place where one does not hold.
//!
//! Without heads kept elsewhere it finds accidents; a cut tail, a changed last line or a chain written anew
//! only shows against a head.

use std::io;
use std::path::Path;

use crate::chain::{Chain, Head};
use crate::walk::{Break, Why, walk};

/// What the verifier found in one chain.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ChainReport {
    /// The chain.
    pub chain: Chain,
    /// How many files it has.
    pub files: u64,
    /// How many records.
    pub lines: u64,
    /// Its end.
    pub head: Head,
    /// The first place where it does not hold.
    pub broken: Option<Break>,
}

/// What the verifier found in a directory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Report {
    /// The chain of changes.
    pub changes: ChainReport,
    /// The chain of data calls.
    pub data: ChainReport,
}

impl Report {
    /// Says whether both chains hold.
    #[must_use]
    pub fn is_sound(&self) -> bool {
        self.changes.broken.is_none() && self.data.broken.is_none()
    }
}

/// Verifies both chains of a directory by themselves.
///
/// # Errors
/// When the directory or a file cannot be read.
pub fn verify(directory: &Path) -> io::Result<Report> {
    verify_against(directory, None, None)
}

/// Verifies both chains, and that each still holds the line that was its head at some time; it may have
/// grown since.
///
/// # Errors
/// When the directory or a file cannot be read.
pub fn verify_against(directory: &Path, changes: Option<Head>, data: Option<Head>) -> io::Result<Report> {
    Ok(Report {
        changes: chain(directory, Chain::Changes, changes)?,
        data: chain(directory, Chain::Data, data)?,
    })
}

fn chain(directory: &Path, chain: Chain, kept: Option<Head>) -> io::Result<ChainReport> {
    let mut not_the_head = None;
    let mut passed = kept.is_none_or(|kept| kept.seq == 0);
    let found = walk(directory, chain, |_, head, place| {
        let Some(kept) = kept.filter(|kept| kept.seq == head.seq) else { return };
        passed |= kept == head;
        if kept != head {
            let (file, line) = (place.file.to_owned(), place.line);
            not_the_head.get_or_insert(Break { file, line, why: Why::NotTheHead });
        }
    })?;
    let before_head = || {
        let seq = kept.filter(|_| !passed)?.seq;
        let file = chain.file_name(found.last_file.max(1));
        Some(Break { file, line: 0, why: Why::BeforeHead { seq } })
    };
    let broken = found.broken.clone().or(not_the_head).or_else(before_head);
    Ok(ChainReport { chain, files: found.files, lines: found.lines, head: found.head, broken })
}

#[cfg(test)]
mod tests;
