//! Checkpoints: the end of what retention removed from a chain, signed, in one file beside the chain.
//!
//! `<chain>.checkpoint` is JSON: `signed` holds the statement as text, `signature` and `issuers` (base64) prove who
//! made it. This crate knows no key: who signs and who judges a signature pass a function. A checkpoint must be
//! durable before the first file that it speaks of is removed.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;

use data_encoding::{BASE64, HEXLOWER};
use serde::{Deserialize, Serialize};

use crate::chain::{Chain, Head};

/// What the signed bytes begin with; the statement's text follows.
pub const CHECKPOINT_CONTEXT: &[u8] = b"fleet-kms/audit-checkpoint/1";

/// A larger file is no checkpoint.
const MAX_BYTES: u64 = 64 * 1024;

/// What a checkpoint says.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Checkpoint {
    /// The agent that removed the files.
    pub agent: String,
    /// `changes` or `data`.
    pub chain: String,
    /// The number of the first file that was kept.
    pub file: u64,
    /// SHA-256 of the last removed line, in hexadecimal.
    pub hash: String,
    /// The number of the last removed line.
    pub seq: u64,
    /// When, RFC 3339 in UTC.
    pub time: String,
    /// The place where the removed files did not hold, if there was one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub broken: Option<String>,
}

/// A checkpoint with the proof of who made it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SignedCheckpoint {
    /// What it says.
    pub checkpoint: Checkpoint,
    /// The text that was signed.
    pub text: String,
    /// ECDSA on P-256 with SHA-256 over [`CHECKPOINT_CONTEXT`] and the text.
    pub signature: Vec<u8>,
    /// Certificates from the signer's up to, but without, a root; DER.
    pub issuers: Vec<Vec<u8>>,
}

#[derive(Serialize, Deserialize)]
struct OnDisk {
    signed: String,
    signature: String,
    issuers: Vec<String>,
}

impl Checkpoint {
    /// Returns the end of what was removed.
    pub(crate) fn head(&self) -> Option<Head> {
        let hash = HEXLOWER.decode(self.hash.as_bytes()).ok()?.try_into().ok()?;
        Some(Head { seq: self.seq, hash })
    }

    /// Returns the statement as it is signed.
    #[must_use]
    pub fn text(&self) -> String {
        serde_json::to_string(self).expect("plain members are JSON")
    }
}

impl SignedCheckpoint {
    /// Returns the bytes that the signature is over.
    #[must_use]
    pub fn message(&self) -> Vec<u8> {
        message(&self.text)
    }

    /// Reads the checkpoint of a chain; `Ok(None)` when nothing was removed yet.
    ///
    /// # Errors
    /// `InvalidData` when it is none of this chain, and whatever the file system says.
    pub(crate) fn read(directory: &Path, chain: Chain) -> io::Result<Option<Self>> {
        let path = directory.join(chain.checkpoint_name());
        match fs::metadata(&path) {
            Ok(about) if about.len() <= MAX_BYTES => {}
            Ok(_) => return Err(invalid()),
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error),
        }
        let bytes = fs::read(path)?;
        parse(&bytes, chain).map(Some).ok_or_else(invalid)
    }

    /// Writes it, durably and in one step.
    pub(crate) fn write(&self, directory: &Path, chain: Chain) -> io::Result<()> {
        let name = chain.checkpoint_name();
        let new = directory.join(format!("{name}.new"));
        let issuers = self.issuers.iter().map(|der| BASE64.encode(der)).collect();
        let (signed, signature) = (self.text.clone(), BASE64.encode(&self.signature));
        let mut bytes =
            serde_json::to_vec(&OnDisk { signed, signature, issuers }).map_err(io::Error::other)?;
        bytes.push(b'\n');
        let mut file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o640).open(&new)?;
        file.write_all(&bytes)?;
        file.sync_all()?;
        fs::rename(new, directory.join(name))?;
        File::open(directory)?.sync_all()
    }
}

/// Returns the bytes that are signed for a statement.
#[must_use]
pub fn message(text: &str) -> Vec<u8> {
    [CHECKPOINT_CONTEXT, text.as_bytes()].concat()
}

fn parse(bytes: &[u8], chain: Chain) -> Option<SignedCheckpoint> {
    let on_disk: OnDisk = serde_json::from_slice(bytes).ok()?;
    let checkpoint: Checkpoint = serde_json::from_str(&on_disk.signed).ok()?;
    if checkpoint.chain != chain.name() || checkpoint.file < 2 || checkpoint.head().is_none() {
        return None;
    }
    let issuers =
        on_disk.issuers.iter().map(|text| BASE64.decode(text.as_bytes()).ok()).collect::<Option<_>>()?;
    let signature = BASE64.decode(on_disk.signature.as_bytes()).ok()?;
    Some(SignedCheckpoint { checkpoint, text: on_disk.signed, signature, issuers })
}

fn invalid() -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, "not a checkpoint of this chain")
}
