//! The witness: the head's count, kept outside the store.
//!
//! A store that is older than its witness was put back from a copy: it starts
//! `recovered-unconfirmed`. The witness lives beside the audit, which is not in
//! a backup of the store. It only ever rises, and trails the store by at most
//! the change that a crash cut off.

use std::fs::{self, File};
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};

use fleet_kms_keyring::StoreId;

const FILE: &str = "witness";

/// What the witness remembers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Seen {
    /// Of which store.
    pub store: StoreId,
    /// The highest count of transactions.
    pub count: u64,
}

/// The witness file of one agent.
#[derive(Debug, Clone)]
pub struct Witness {
    /// `None` sees nothing.
    directory: Option<PathBuf>,
}

impl Witness {
    /// The witness in the audit's directory.
    pub fn new(directory: &Path) -> Self {
        Self { directory: Some(directory.to_owned()) }
    }

    /// A witness that sees nothing: of a copy that is not in place yet.
    pub fn nowhere() -> Self {
        Self { directory: None }
    }

    /// Reads what was seen; `None` before the first change.
    ///
    /// # Errors
    ///
    /// When the file cannot be read or is not a witness.
    pub fn read(&self) -> io::Result<Option<Seen>> {
        let Some(directory) = &self.directory else { return Ok(None) };
        let text = match fs::read_to_string(directory.join(FILE)) {
            Ok(text) => text,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error),
        };
        parse(&text).map(Some).ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "not a witness"))
    }

    /// Remembers a count; durable on return.
    ///
    /// # Errors
    ///
    /// When the file cannot be written.
    pub fn write(&self, seen: Seen) -> io::Result<()> {
        let Some(directory) = &self.directory else { return Ok(()) };
        let new = directory.join("witness.new");
        let mut file = File::create(&new)?;
        writeln!(file, "{} {}", seen.store, seen.count)?;
        file.sync_all()?;
        fs::rename(&new, directory.join(FILE))?;
        File::open(directory)?.sync_all()
    }
}

fn parse(text: &str) -> Option<Seen> {
    let (store, count) = text.trim_end().split_once(' ')?;
    Some(Seen { store: store.parse().ok()?, count: count.parse().ok()? })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_witness_remembers_what_was_written() {
        let directory = tempfile::tempdir().unwrap();
        let witness = Witness::new(directory.path());
        assert_eq!(witness.read().unwrap(), None);
        let seen = Seen { store: StoreId::from_bytes([7; 16]), count: 42 };
        witness.write(seen).unwrap();
        assert_eq!(witness.read().unwrap(), Some(seen));
    }

    #[test]
    fn a_damaged_witness_is_an_error_not_an_absence() {
        let directory = tempfile::tempdir().unwrap();
        fs::write(directory.path().join(FILE), "42").unwrap();
        Witness::new(directory.path()).read().unwrap_err();
    }
}
