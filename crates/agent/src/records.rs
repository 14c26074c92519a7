//! Records: the only codec between what the agent knows and what the store
//! keeps.
//!
//! `docs/store-format.md` has every row and layout. A record is authenticated,
//! not secret; what is secret is sealed (`fleet_kms_keyring::sealed`) and never
//! passes through here. Nothing here decides anything.

use std::sync::Arc;

use fleet_kms_keyring::StoreId;
use fleet_kms_seal::LockedKey;
use fleet_kms_store::{Revision, Row, RowName};
use hmac::{Hmac, KeyInit, Mac};
use sha2::Sha256;

pub mod keyring;
pub mod payload;
pub mod rows;

/// The format of every record that this release writes.
pub const FORMAT: u8 = 1;

const HEADER: usize = 1 + 4 + 8;
const TAG: usize = 32;
const RECORD_CONTEXT: &[u8] = b"fleet-kms/record/1";
const ELEMENT_CONTEXT: &[u8] = b"fleet-kms/row/1";

/// The payload of one kind of record.
pub trait Payload: prost::Message + Default + Clone {
    /// What an operator reads when such a record is damaged.
    const WHAT: &'static str;
}

/// A record read from the store, or about to be written.
#[derive(Debug, Clone)]
pub struct Record<P> {
    /// The row it lives in.
    pub row: RowName,
    /// The row's revision, zero before the first write.
    pub revision: Revision,
    /// Rises with each write of this row.
    pub seq: u64,
    /// The contents.
    pub payload: P,
    /// The bytes as stored, which the head's set hash covers.
    pub(crate) stored: Vec<u8>,
}

impl<P> Record<P> {
    /// A record that is about to be written for the first time.
    pub(crate) fn new(row: RowName, payload: P) -> Self {
        Self { row, revision: Revision::ABSENT, seq: 1, payload, stored: Vec::new() }
    }
}

/// Why a row's bytes are not a record of ours.
#[derive(Debug, thiserror::Error)]
pub enum RecordError {
    /// Shorter than header and tag.
    #[error("{what} in row {row} is cut short: {length} bytes")]
    Short { row: String, what: &'static str, length: usize },
    /// Written by a later release.
    #[error(
        "{what} in row {row} has format {format}, this release knows up to {FORMAT}; run the release that wrote it"
    )]
    Newer { row: String, what: &'static str, format: u8 },
    /// The epoch's key is not loaded.
    #[error("{what} in row {row} is of epoch {epoch}, whose store key is not open")]
    Epoch { row: String, what: &'static str, epoch: u32 },
    /// Edited, moved here from another row, or of another store.
    #[error(
        "{what} in row {row} fails authentication: it was edited, or moved from another row or store; restore a backup"
    )]
    Tag { row: String, what: &'static str },
    /// Authentic, yet not a payload of this kind.
    #[error("{what} in row {row} does not decode")]
    Payload {
        row: String,
        what: &'static str,
        #[source]
        source: prost::DecodeError,
    },
}

/// The MAC keys of the open epochs.
pub struct Codec {
    store: StoreId,
    epochs: Vec<(u32, Arc<LockedKey>)>,
}

impl Codec {
    /// Makes a codec that writes under `epoch`.
    pub fn new(store: StoreId, epoch: u32, mac: LockedKey) -> Self {
        Self { store, epochs: vec![(epoch, Arc::new(mac))] }
    }

    /// Returns the store's id.
    pub fn store(&self) -> StoreId {
        self.store
    }

    /// Returns the epoch that new records are written under.
    pub fn epoch(&self) -> u32 {
        self.epochs.first().map_or(0, |(epoch, _)| *epoch)
    }

    /// Returns a codec that writes under `epoch` and still reads the epochs
    /// of this one: the state of a store-key rotation.
    pub fn with_newer(&self, epoch: u32, mac: LockedKey) -> Self {
        let mut epochs = vec![(epoch, Arc::new(mac))];
        epochs.extend(self.epochs.iter().cloned());
        Self { store: self.store, epochs }
    }

    /// Encodes a record for `row`: header ‖ payload ‖ tag.
    pub fn encode<P: Payload>(&self, row: &RowName, seq: u64, payload: &P) -> Vec<u8> {
        self.frame(row, seq, |bytes| payload.encode_raw(bytes))
    }

    fn frame(&self, row: &RowName, seq: u64, payload: impl FnOnce(&mut Vec<u8>)) -> Vec<u8> {
        let mut bytes = vec![FORMAT];
        bytes.extend_from_slice(&self.epoch().to_be_bytes());
        bytes.extend_from_slice(&seq.to_be_bytes());
        payload(&mut bytes);
        let tag = self.record_mac(self.epoch(), row, &bytes).map(|mac| mac.finalize().into_bytes());
        bytes.extend_from_slice(&tag.expect("the writing epoch is always open"));
        bytes
    }

    /// Authenticates and decodes what `row` holds.
    ///
    /// # Errors
    ///
    /// When the bytes are not what this store wrote to this row; see
    /// [`RecordError`].
    pub fn decode<P: Payload>(&self, row: Row) -> Result<Record<P>, RecordError> {
        let what = P::WHAT;
        let (seq, payload) = self.authenticate(&row, what)?;
        let payload = P::decode(payload).map_err(|source| {
            let row = row.name.as_str().to_owned();
            RecordError::Payload { row, what, source }
        })?;
        Ok(Record { row: row.name, revision: row.revision, seq, payload, stored: row.bytes })
    }

    /// Says whether `row` holds a record of this store, of whatever kind.
    pub fn is_authentic(&self, row: &Row) -> bool {
        self.authenticate(row, "a record").is_ok()
    }

    /// Says whether a store key of ours tagged these bytes for this row, in
    /// whatever format: a later release's record is genuine, a damaged one is
    /// not.
    pub fn is_genuine(&self, row: &Row) -> bool {
        let Some((body, tag)) = row.bytes.split_last_chunk::<TAG>() else { return false };
        let mac = epoch_of(body).and_then(|epoch| self.record_mac(epoch, &row.name, body));
        mac.is_some_and(|mac| mac.verify_slice(tag).is_ok())
    }

    /// Checks format and tag; returns seq and payload.
    fn authenticate<'a>(&self, row: &'a Row, what: &'static str) -> Result<(u64, &'a [u8]), RecordError> {
        let name = || row.name.as_str().to_owned();
        let (body, tag) = row
            .bytes
            .split_last_chunk::<TAG>()
            .filter(|(body, _)| body.len() >= HEADER)
            .ok_or_else(|| RecordError::Short { row: name(), what, length: row.bytes.len() })?;
        let (header, payload) = body.split_first_chunk::<HEADER>().expect("checked above");
        let [format, e0, e1, e2, e3, seq @ ..] = *header;
        if format != FORMAT {
            return Err(RecordError::Newer { row: name(), what, format });
        }
        let epoch = u32::from_be_bytes([e0, e1, e2, e3]);
        let mac = self.record_mac(epoch, &row.name, body).ok_or_else(|| RecordError::Epoch {
            row: name(),
            what,
            epoch,
        })?;
        mac.verify_slice(tag).map_err(|_| RecordError::Tag { row: name(), what })?;
        Ok((u64::from_be_bytes(seq), payload))
    }

    /// Returns a codec that no longer reads epochs before the writing one: the
    /// end of a store-key rotation.
    pub fn without_older(&self) -> Self {
        Self { store: self.store, epochs: self.epochs.iter().take(1).cloned().collect() }
    }

    /// Returns a codec without a key, which reads nothing: `kms-agent lock`.
    pub fn locked(&self) -> Self {
        Self { store: self.store, epochs: Vec::new() }
    }

    /// Writes a record again under the writing epoch, whatever its payload is;
    /// `None` when it is of that epoch.
    ///
    /// # Errors
    ///
    /// As [`Self::decode`].
    pub fn renew(&self, row: &Row) -> Result<Option<Vec<u8>>, RecordError> {
        if epoch_of(&row.bytes) == Some(self.epoch()) {
            return Ok(None);
        }
        let (seq, payload) = self.authenticate(row, "a record")?;
        Ok(Some(self.frame(&row.name, seq + 1, |bytes| bytes.extend_from_slice(payload))))
    }

    /// Returns a row's element of the head's set hash: a PRF of name and bytes
    /// under the MAC key of the head's epoch.
    pub fn element(&self, epoch: u32, row: &RowName, stored: &[u8]) -> [u8; 32] {
        let mut mac = self.mac(epoch).expect("the head's epoch is open");
        mac.update(ELEMENT_CONTEXT);
        mac.update(self.store.as_bytes());
        update_name(&mut mac, row);
        mac.update(stored);
        mac.finalize().into_bytes().into()
    }

    fn record_mac(&self, epoch: u32, row: &RowName, body: &[u8]) -> Option<Hmac<Sha256>> {
        let mut mac = self.mac(epoch)?;
        mac.update(RECORD_CONTEXT);
        mac.update(self.store.as_bytes());
        update_name(&mut mac, row);
        mac.update(body);
        Some(mac)
    }

    fn mac(&self, epoch: u32) -> Option<Hmac<Sha256>> {
        let (_, key) = self.epochs.iter().find(|(known, _)| *known == epoch)?;
        Some(Hmac::new_from_slice(key.expose_secret()).expect("HMAC takes keys of any length"))
    }
}

/// Returns the epoch that a record or a sealed blob says it is of; both have it
/// in the same place. Unproven until one of them opens.
pub fn epoch_of(stored: &[u8]) -> Option<u32> {
    let (_, rest) = stored.split_first()?;
    rest.first_chunk().map(|epoch| u32::from_be_bytes(*epoch))
}

/// A row name in a MAC or AAD: u16 length ‖ bytes.
fn update_name(mac: &mut Hmac<Sha256>, row: &RowName) {
    let name = row.as_bytes();
    let length = u16::try_from(name.len()).expect("a row name has at most 255 bytes");
    mac.update(&length.to_be_bytes());
    mac.update(name);
}

#[cfg(test)]
mod golden;
