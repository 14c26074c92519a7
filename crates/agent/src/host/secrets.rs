//! How a command is given a root key or passphrase: a file, a descriptor, a
//! credential or a prompt. Never an argument or the environment.

use std::fs::File;
use std::io::{self, BufRead as _, IsTerminal as _, Read as _, Write as _};
use std::path::{Path, PathBuf};

use clap::Args;
use fleet_kms_seal::{FileSlot, PassphraseSlot, RootSlot};
use rustix::termios::{LocalModes, OptionalActions, tcgetattr, tcsetattr};
use zeroize::Zeroizing;

use crate::config::Config;
use crate::errors::chain;
use crate::local::protocol::{Secret, SecretKind};
use crate::root::read_passphrase;

/// A root key file holds at most hex digits and a line break.
const MAX_ROOT_FILE: u64 = 128;

/// A root slot given on the command line instead of the configured one.
#[derive(Debug, Clone, Args)]
pub struct Given {
    /// A root key file.
    #[arg(long)]
    root_file: Option<PathBuf>,
    /// A descriptor to read a passphrase from, such as 3 with 3<file.
    #[arg(long, conflicts_with = "root_file")]
    passphrase_fd: Option<u32>,
    /// Ask for a passphrase.
    #[arg(long, conflicts_with_all = ["root_file", "passphrase_fd"])]
    passphrase: bool,
}

impl Given {
    /// Returns the given slot, or the configured one, and what it is called.
    pub(super) fn root(&self, config: &Config) -> Result<(Box<dyn RootSlot>, String), String> {
        if let Some(path) = &self.root_file {
            let slot = FileSlot::open(path).map_err(|error| chain(&error))?;
            return Ok((Box::new(slot), path.display().to_string()));
        }
        if let Some(secret) = self.passphrase()? {
            let text = Zeroizing::new(utf8(&secret)?.to_owned());
            return Ok((Box::new(PassphraseSlot::existing(text)), "the passphrase".to_owned()));
        }
        let slot = config.root.slot().map_err(|error| chain(&error))?;
        Ok((slot, config.root.to_string()))
    }

    /// Returns the given secret; `None` when none was.
    pub(super) fn secret(&self) -> Result<Option<Secret>, String> {
        match &self.root_file {
            Some(path) => root_file(path).map(Some),
            None => self.passphrase(),
        }
    }

    fn passphrase(&self) -> Result<Option<Secret>, String> {
        match self.passphrase_fd {
            Some(fd) => from_descriptor(fd).map(Some),
            None if self.passphrase => prompt("Passphrase: ").map(Some),
            None => Ok(None),
        }
    }
}

/// Reads a root key file, after all checks that its use asks for.
pub(super) fn root_file(path: &Path) -> Result<Secret, String> {
    FileSlot::open(path).map_err(|error| chain(&error))?;
    let failed = |error: io::Error| format!("cannot read {}: {error}", path.display());
    let mut bytes = Zeroizing::new(Vec::with_capacity(MAX_ROOT_FILE as usize));
    let file = File::open(path).map_err(failed)?;
    file.take(MAX_ROOT_FILE).read_to_end(&mut bytes).map_err(failed)?;
    Ok(Secret { kind: SecretKind::File, bytes })
}

/// Reads a passphrase from a descriptor that this process was started with.
pub(super) fn from_descriptor(fd: u32) -> Result<Secret, String> {
    let failed = |error: io::Error| format!("cannot read a passphrase from descriptor {fd}: {error}");
    let mut file = File::open(format!("/dev/fd/{fd}")).map_err(failed)?;
    Ok(passphrase(&read_passphrase(&mut file).map_err(failed)?))
}

/// Asks on the terminal, without showing what is typed.
pub(super) fn prompt(text: &str) -> Result<Secret, String> {
    let failed = |error: io::Error| format!("cannot ask for a passphrase: {error}");
    let terminal = File::options().read(true).write(true).open("/dev/tty");
    let mut terminal = terminal.map_err(|_| "there is no terminal: use --passphrase-fd".to_owned())?;
    if !terminal.is_terminal() {
        return Err("there is no terminal: use --passphrase-fd".to_owned());
    }
    let before = tcgetattr(&terminal).map_err(|error| failed(error.into()))?;
    let mut hidden = before.clone();
    hidden.local_modes &= !LocalModes::ECHO;
    tcsetattr(&terminal, OptionalActions::Flush, &hidden).map_err(|error| failed(error.into()))?;
    let read = (|| {
        terminal.write_all(text.as_bytes())?;
        let mut line = Zeroizing::new(String::with_capacity(1024));
        io::BufReader::new(&terminal).read_line(&mut line)?;
        Ok(line)
    })();
    let restored = tcsetattr(&terminal, OptionalActions::Flush, &before);
    // The line break of the enter key was not shown either.
    let _ = terminal.write_all(b"\n");
    let line = read.map_err(failed)?;
    restored.map_err(|error| failed(error.into()))?;
    Ok(passphrase(&line))
}

fn passphrase(text: &Zeroizing<String>) -> Secret {
    let text = text.trim_end_matches(['\n', '\r']);
    Secret { kind: SecretKind::Passphrase, bytes: Zeroizing::new(text.as_bytes().to_vec()) }
}

pub(super) fn utf8(secret: &Secret) -> Result<&str, String> {
    str::from_utf8(&secret.bytes).map_err(|_| "the passphrase is not UTF-8".to_owned())
}
