//! What is said over the local socket.
//!
//! A request is a line of JSON and, for each secret that it announces, u16
//! length ‖ bytes. Program and agent are of the same release: nothing here is
//! kept compatible.

use std::io;
use std::path::PathBuf;

use fleet_kms_seal::{FileSlot, PassphraseSlot, RootSlot, SlotKind};
use serde::{Deserialize, Serialize};
use zeroize::Zeroizing;

/// No request is longer.
pub const MAX_REQUEST: usize = 256 * 1024;

/// What a command asks of the agent.
#[derive(Debug, Serialize, Deserialize)]
#[serde(tag = "command", rename_all = "snake_case", deny_unknown_fields)]
pub enum Request {
    /// Make and verify a backup and hand it over.
    Backup,
    /// A handed-over backup is durable.
    BackupStored { number: u64, file: PathBuf },
    /// List the root slots.
    SlotList,
    /// Add a root slot for the secret.
    SlotAdd { label: String, secrets: Vec<SecretKind> },
    /// Say which slot the secret opens.
    SlotTest { secrets: Vec<SecretKind> },
    /// Remove a slot and rotate the store key, which the secrets of the others
    /// are needed for.
    SlotRemove { id: String, force: bool, compromised: bool, new_passphrase: bool, secrets: Vec<SecretKind> },
    /// Wipe the keys.
    Lock,
    /// Make a certificate for an admin.
    AdminIssue { name: String, roles: Vec<String>, clusters: Vec<String> },
    /// The store is right as it is.
    Confirm { bans: Vec<(String, bool)> },
}

/// What kind of root key a secret is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum SecretKind {
    /// The content of a root key file.
    File,
    /// A passphrase.
    Passphrase,
}

/// The root key or passphrase of a slot; wiped when dropped.
pub struct Secret {
    /// What it is.
    pub kind: SecretKind,
    /// The bytes.
    pub bytes: Zeroizing<Vec<u8>>,
}

impl Secret {
    /// Makes a slot of it; `None` if it is no root key.
    pub fn slot(&self) -> Option<Box<dyn RootSlot>> {
        match self.kind {
            SecretKind::File => FileSlot::from_content(&self.bytes).map(|slot| Box::new(slot) as _),
            SecretKind::Passphrase => {
                let text = Zeroizing::new(str::from_utf8(&self.bytes).ok()?.to_owned());
                Some(Box::new(PassphraseSlot::existing(text)))
            }
        }
    }
}

/// What the agent says to a request.
#[derive(Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Answer {
    /// It was done.
    Ok(Box<Reply>),
    /// It was not, and why.
    Error(String),
}

/// What came of a request.
#[derive(Serialize, Deserialize)]
#[serde(tag = "reply", rename_all = "snake_case")]
pub enum Reply {
    /// A backup to be copied from here.
    Backup { number: u64, file: PathBuf, clusters: usize, versions: usize },
    /// The slots.
    Slots { slots: Vec<SlotLine> },
    /// The slot concerned.
    Slot { id: String },
    /// A slot was removed, and the store key's rotation has begun.
    SlotRemoved { kept: usize, rotated: usize, passphrase: Option<String> },
    /// An admin's key and certificates, PEM.
    Admin { key: String, chain: String, roots: String },
    /// The store was made good.
    Confirmed { rotated: usize, banned: usize },
    /// Nothing to say.
    Done,
}

/// A root slot, as `slot list` shows it.
#[derive(Debug, Serialize, Deserialize)]
pub struct SlotLine {
    /// Its id.
    pub id: String,
    /// What opens it.
    pub kind: SecretKind,
    /// Where its root key was when it last opened the store.
    pub label: String,
    /// When it last opened the store, Unix milliseconds; 0 for never.
    pub verified_ms: u64,
    /// It opened the store at this agent's start.
    pub in_use: bool,
}

impl From<SlotKind> for SecretKind {
    fn from(kind: SlotKind) -> Self {
        match kind {
            SlotKind::File => Self::File,
            SlotKind::Passphrase => Self::Passphrase,
        }
    }
}

impl Request {
    fn secrets(&self) -> &[SecretKind] {
        match self {
            Self::SlotAdd { secrets, .. } | Self::SlotTest { secrets } | Self::SlotRemove { secrets, .. } => {
                secrets
            }
            Self::Backup
            | Self::BackupStored { .. }
            | Self::SlotList
            | Self::Lock
            | Self::AdminIssue { .. }
            | Self::Confirm { .. } => &[],
        }
    }
}

/// Writes a request with its secrets, whose kinds it names.
///
/// # Errors
///
/// When a secret is longer than 65,535 bytes.
pub fn encode(request: &Request, secrets: &[Secret]) -> io::Result<Zeroizing<Vec<u8>>> {
    // In one piece: growing would leave copies of secrets behind.
    let mut out = Zeroizing::new(Vec::with_capacity(MAX_REQUEST));
    out.extend_from_slice(&serde_json::to_vec(request)?);
    out.push(b'\n');
    for secret in secrets {
        let length = u16::try_from(secret.bytes.len()).map_err(io::Error::other)?;
        out.extend_from_slice(&length.to_be_bytes());
        out.extend_from_slice(&secret.bytes);
    }
    Ok(out)
}

/// Reads a request with its secrets.
///
/// # Errors
///
/// When it is not one.
pub fn parse(bytes: &[u8]) -> io::Result<(Request, Vec<Secret>)> {
    let bad = |text| io::Error::new(io::ErrorKind::InvalidData, text);
    if bytes.len() > MAX_REQUEST {
        return Err(bad("a request that is too long"));
    }
    let end = bytes.iter().position(|byte| *byte == b'\n').ok_or_else(|| bad("a request without an end"))?;
    let (line, rest) = bytes.split_at(end);
    let request: Request = serde_json::from_slice(line)?;
    let mut rest = rest.get(1..).unwrap_or_default();
    let mut secrets = Vec::new();
    for kind in request.secrets() {
        let short = || bad("a secret that is cut short");
        let (length, after) = rest.split_first_chunk().ok_or_else(short)?;
        let (secret, after) =
            after.split_at_checked(usize::from(u16::from_be_bytes(*length))).ok_or_else(short)?;
        secrets.push(Secret { kind: *kind, bytes: Zeroizing::new(secret.to_vec()) });
        rest = after;
    }
    if rest.is_empty() { Ok((request, secrets)) } else { Err(bad("more bytes than the request announces")) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_comes_back_with_its_secrets_and_nothing_else_does() {
        let secret = |kind, bytes: &[u8]| Secret { kind, bytes: Zeroizing::new(bytes.to_vec()) };
        let secrets = [secret(SecretKind::File, &[7; 32]), secret(SecretKind::Passphrase, b"correct\nhorse")];
        let request = Request::SlotTest { secrets: secrets.iter().map(|secret| secret.kind).collect() };
        let bytes = encode(&request, &secrets).unwrap();
        let line = bytes.split(|byte| *byte == b'\n').next().unwrap();
        assert_eq!(line, br#"{"command":"slot_test","secrets":["file","passphrase"]}"#);
        let (_, parsed) = parse(&bytes).unwrap();
        assert_eq!(parsed.len(), 2);
        assert!(parsed.iter().zip(&secrets).all(|(a, b)| a.kind == b.kind && *a.bytes == *b.bytes));
        assert!(parse(&bytes[..bytes.len() - 1]).is_err());
        assert!(parse(&[&bytes[..], b"x"].concat()).is_err());
        assert!(parse(b"{\"command\":\"unknown\"}\n").is_err());
        assert!(parse(b"{\"command\":\"lock\"}").is_err());
    }
}
