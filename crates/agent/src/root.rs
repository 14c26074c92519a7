//! Where the agent's root key comes from: a file, or a systemd credential that
//! holds a root key or a passphrase. Never the environment or the command line,
//! which other processes can read.

use std::fmt;
use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use fleet_kms_seal::{FileSlot, PassphraseSlot, RootFileError, RootSlot};
use zeroize::Zeroizing;

/// Where systemd puts the credentials of a unit.
const CREDENTIALS_DIRECTORY: &str = "CREDENTIALS_DIRECTORY";
/// No passphrase is longer.
const MAX_PASSPHRASE: usize = 1024;

/// Where the root key comes from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Root {
    /// A file with the root key.
    File(PathBuf),
    /// A systemd credential with the root key.
    Credential(String),
    /// A systemd credential with the passphrase of a slot.
    PassphraseCredential(String),
}

/// Why the root key was not read.
#[derive(Debug, thiserror::Error)]
pub enum RootError {
    /// The root key file cannot be used.
    #[error(transparent)]
    File(#[from] RootFileError),
    /// systemd gave this process no credentials.
    #[error(
        "there is no credential {name}: systemd sets {CREDENTIALS_DIRECTORY} for units with LoadCredential="
    )]
    NoCredentials { name: String },
    /// The passphrase cannot be read.
    #[error("cannot read the passphrase from {from}")]
    Passphrase {
        from: String,
        #[source]
        source: io::Error,
    },
}

impl Root {
    /// Reads the root key.
    ///
    /// # Errors
    ///
    /// Names the file or credential and what is wrong with it.
    pub fn slot(&self) -> Result<Box<dyn RootSlot>, RootError> {
        Ok(match self {
            Self::File(path) => Box::new(FileSlot::open(path)?),
            Self::Credential(name) => Box::new(FileSlot::open_credential(&credentials(name)?, name)?),
            Self::PassphraseCredential(name) => {
                let path = credentials(name)?.join(name);
                let failed = |source| RootError::Passphrase { from: format!("credential {name}"), source };
                let text = File::open(&path).and_then(|mut file| read_passphrase(&mut file));
                Box::new(PassphraseSlot::existing(text.map_err(failed)?))
            }
        })
    }

    /// Returns the directory that the agent must be able to read.
    pub fn directory(&self) -> Option<PathBuf> {
        match self {
            Self::File(path) => path.parent().map(Path::to_owned),
            Self::Credential(name) | Self::PassphraseCredential(name) => credentials(name).ok(),
        }
    }
}

impl fmt::Display for Root {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::File(path) => write!(f, "{}", path.display()),
            Self::Credential(name) => write!(f, "credential {name}"),
            Self::PassphraseCredential(name) => write!(f, "the passphrase in credential {name}"),
        }
    }
}

/// Reads a passphrase to its end, into memory that is wiped.
///
/// # Errors
///
/// When it cannot be read, is empty, not UTF-8 or longer than 1,024 bytes.
pub fn read_passphrase(from: &mut dyn Read) -> io::Result<Zeroizing<String>> {
    let mut bytes = Zeroizing::new(vec![0; MAX_PASSPHRASE + 1]);
    let mut length = 0;
    loop {
        match from.read(bytes.get_mut(length..).unwrap_or_default()) {
            Ok(0) => break,
            Ok(read) => length += read,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    let bad = |text| io::Error::new(io::ErrorKind::InvalidData, text);
    match length {
        0 => return Err(bad("it is empty")),
        1..=MAX_PASSPHRASE => {}
        _ => return Err(bad("it is longer than 1,024 bytes")),
    }
    let text = str::from_utf8(bytes.get(..length).unwrap_or_default()).map_err(|_| bad("it is not UTF-8"))?;
    Ok(Zeroizing::new(text.to_owned()))
}

fn credentials(name: &str) -> Result<PathBuf, RootError> {
    let missing = || RootError::NoCredentials { name: name.to_owned() };
    std::env::var_os(CREDENTIALS_DIRECTORY).map(PathBuf::from).ok_or_else(missing)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_passphrase_is_read_whole_or_refused() {
        assert_eq!(&**read_passphrase(&mut "correct horse\n".as_bytes()).unwrap(), "correct horse\n");
        for bad in [&b""[..], &[0xff; 4], &[b'x'; 1025]] {
            read_passphrase(&mut &*bad).unwrap_err();
        }
    }
}
