//! The verifier: walks both chains of a directory and names the first place where one does not hold.
//!
//! Without heads kept elsewhere it finds accidents; a cut tail, a changed last line or a chain written anew
//! only shows against a head.

use std::io;
use std::path::Path;

use crate::chain::{Chain, Head};
use crate::checkpoint::{Checkpoint, SignedCheckpoint};
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
    /// What says how it goes on from before its first file, if anything was removed.
    pub checkpoint: Option<Checkpoint>,
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

/// What a directory is compared with.
#[derive(Clone, Copy, Default)]
pub struct Against<'a> {
    /// The end of the changes at some time, kept elsewhere.
    pub changes: Option<Head>,
    /// The end of the data calls at some time, kept elsewhere.
    pub data: Option<Head>,
    /// Judges who signed a checkpoint; the error says what is wrong. Without it a checkpoint is taken as it is.
    pub signer: Option<&'a Signer<'a>>,
}

/// Judges who signed a checkpoint.
pub type Signer<'a> = dyn Fn(&SignedCheckpoint) -> Result<(), String> + 'a;

/// Verifies both chains of a directory by themselves.
///
/// # Errors
/// When the directory or a file cannot be read.
pub fn verify(directory: &Path) -> io::Result<Report> {
    verify_against(directory, Against::default())
}

/// Verifies both chains, that each still holds the line that was its head at some time (it may have grown since), and
/// that what is missing at its beginning was removed by whom it should.
///
/// # Errors
/// When the directory or a file cannot be read.
pub fn verify_against(directory: &Path, against: Against<'_>) -> io::Result<Report> {
    Ok(Report {
        changes: chain(directory, Chain::Changes, against.changes, against)?,
        data: chain(directory, Chain::Data, against.data, against)?,
    })
}

fn chain(
    directory: &Path,
    chain: Chain,
    kept: Option<Head>,
    against: Against<'_>,
) -> io::Result<ChainReport> {
    let signed = match SignedCheckpoint::read(directory, chain) {
        // The walk names it.
        Err(error) if error.kind() == io::ErrorKind::InvalidData => None,
        signed => signed?,
    };
    // What was removed can no longer be compared; the checkpoint's signer answers for it.
    let removed = signed.as_ref().map_or(0, |signed| signed.checkpoint.seq);
    let mut not_the_head = None;
    let mut passed = kept.is_none_or(|kept| kept.seq <= removed);
    let found = walk(directory, chain, |_, head, place| {
        let Some(kept) = kept.filter(|kept| kept.seq == head.seq) else { return };
        passed |= kept == head;
        if kept != head {
            let (file, line) = (place.file.to_owned(), place.line);
            not_the_head.get_or_insert(Break { file, line, why: Why::NotTheHead });
        }
    })?;
    let unproven = || {
        let why = against.signer?(signed.as_ref()?).err()?;
        Some(Break { file: chain.checkpoint_name(), line: 0, why: Why::Signature(why) })
    };
    let not_the_removed_head = || {
        let signed = signed.as_ref()?;
        let differs = kept.is_some_and(|kept| kept.seq == removed && Some(kept) != signed.checkpoint.head());
        differs.then(|| Break { file: chain.checkpoint_name(), line: 0, why: Why::NotTheHead })
    };
    let before_head = || {
        let seq = kept.filter(|_| !passed)?.seq;
        let file = chain.file_name(found.last_file.max(1));
        Some(Break { file, line: 0, why: Why::BeforeHead { seq } })
    };
    let broken = unproven()
        .or(found.broken.clone())
        .or(not_the_head)
        .or_else(not_the_removed_head)
        .or_else(before_head);
    let checkpoint = signed.as_ref().map(|signed| signed.checkpoint.clone());
    Ok(ChainReport { chain, files: found.files, lines: found.lines, head: found.head, checkpoint, broken })
}

#[cfg(test)]
mod tests;
