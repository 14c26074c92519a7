//! The slot record: one sealed copy of the store key, as the bytes of a store row.
//!
//! `record = format u8 (1) ‖ kind u8 ‖ slot id (16) ‖ epoch u32 ‖ parameters (u16 length ‖ bytes) ‖ sealed`,
//! big-endian, where `sealed` is the store key under the slot's root key (nonce ‖ ciphertext ‖ tag) with
//! `AAD = "fleet-kms/slot/1" ‖ store id ‖ everything before`.
//!
//! The frame is readable without a key, so that slots can be listed; it is not proven until the key opens. The
//! parameters belong to the kind (salt and costs of a passphrase, later a TPM's blob).

use std::fmt;

use fleet_kms_keyring::{SlotId, StoreId, aead};
use rand_core::CryptoRng;
use zeroize::Zeroizing;

use crate::slot::SlotError;
use crate::{LockedKey, StoreKey};

/// What kind of root key a slot has.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum SlotKind {
    /// A root key in a file, or a systemd credential.
    File = 1,
    /// A root key made from a passphrase.
    Passphrase = 2,
}

/// One way to open the store key: all that is stored of it.
#[derive(Clone, PartialEq, Eq)]
pub struct SlotRecord {
    kind: SlotKind,
    slot: SlotId,
    epoch: u32,
    parameters: Vec<u8>,
    sealed: Vec<u8>,
}

impl SlotRecord {
    /// Reads a record, without a key.
    ///
    /// # Errors
    /// [`MalformedSlotRecord`] for a frame that does not add up, or a format or kind unknown to this release.
    pub fn parse(bytes: &[u8]) -> Result<Self, MalformedSlotRecord> {
        let (&[format], rest) = bytes.split_first_chunk().ok_or(MalformedSlotRecord::Length)?;
        if format != FORMAT {
            return Err(MalformedSlotRecord::Format { format });
        }
        let (&[kind], rest) = rest.split_first_chunk().ok_or(MalformedSlotRecord::Length)?;
        let kind = SlotKind::from_byte(kind).ok_or(MalformedSlotRecord::Kind { kind })?;
        let (slot, rest) = rest.split_first_chunk().ok_or(MalformedSlotRecord::Length)?;
        let (epoch, rest) = rest.split_first_chunk().ok_or(MalformedSlotRecord::Length)?;
        let (len, rest) = rest.split_first_chunk().ok_or(MalformedSlotRecord::Length)?;
        let len = usize::from(u16::from_be_bytes(*len));
        let (parameters, sealed) = rest.split_at_checked(len).ok_or(MalformedSlotRecord::Length)?;
        if sealed.len() != SEALED_LEN {
            return Err(MalformedSlotRecord::Length);
        }
        Ok(Self {
            kind,
            slot: SlotId::from_bytes(*slot),
            epoch: u32::from_be_bytes(*epoch),
            parameters: parameters.to_vec(),
            sealed: sealed.to_vec(),
        })
    }

    /// The bytes of the row.
    pub fn encode(&self) -> Vec<u8> {
        let mut out = frame(self.kind, self.slot, self.epoch, &self.parameters);
        out.extend_from_slice(&self.sealed);
        out
    }

    /// What kind of root key opens it.
    pub fn kind(&self) -> SlotKind {
        self.kind
    }

    /// The slot's id.
    pub fn slot(&self) -> SlotId {
        self.slot
    }

    /// The epoch of the store key in it.
    pub fn epoch(&self) -> u32 {
        self.epoch
    }

    /// What the slot's kind keeps beside the sealed key; unproven until that opens.
    pub fn parameters(&self) -> &[u8] {
        &self.parameters
    }

    /// Seals a store key under a slot's root key.
    ///
    /// # Panics
    /// If the parameters are longer than 65,535 bytes: no kind has such.
    pub fn seal(
        kind: SlotKind,
        slot: SlotId,
        parameters: Vec<u8>,
        root: &LockedKey,
        key: &StoreKey,
        rng: &mut dyn CryptoRng,
    ) -> Self {
        let mut nonce = [0; aead::NONCE_LEN];
        rng.fill_bytes(&mut nonce);
        Self::danger_seal_with_nonce(kind, slot, parameters, root, key, &nonce)
    }

    /// [`Self::seal`] with the nonce given: for vectors only, a repeated nonce gives the store key away.
    ///
    /// # Panics
    /// As [`Self::seal`].
    pub fn danger_seal_with_nonce(
        kind: SlotKind,
        slot: SlotId,
        parameters: Vec<u8>,
        root: &LockedKey,
        key: &StoreKey,
        nonce: &[u8; aead::NONCE_LEN],
    ) -> Self {
        let aad = aad(key.store(), &frame(kind, slot, key.epoch(), &parameters));
        let sealed = aead::danger_seal_with_nonce(root.expose_secret(), &aad, key.expose_secret(), nonce);
        Self { kind, slot, epoch: key.epoch(), parameters, sealed }
    }

    /// Opens the store key with the slot's root key.
    ///
    /// # Errors
    /// [`SlotError::DoesNotOpen`] for another root key or store, or if any byte of the record was altered.
    pub fn open(&self, store: StoreId, root: &LockedKey) -> Result<StoreKey, SlotError> {
        let refused = SlotError::DoesNotOpen { kind: self.kind };
        let aad = aad(store, &frame(self.kind, self.slot, self.epoch, &self.parameters));
        let opened: Zeroizing<Vec<u8>> =
            aead::open(root.expose_secret(), &aad, &self.sealed).map_err(|_| refused)?;
        let bytes: &[u8; 32] = opened.as_slice().try_into().expect("parsed or sealed as 32 bytes");
        let key = LockedKey::filled(|key| key.copy_from_slice(bytes));
        Ok(StoreKey::from_opened(store, self.epoch, key))
    }
}

/// Says which slot it is; the sealed key is nobody's to print.
impl fmt::Debug for SlotRecord {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SlotRecord")
            .field("kind", &self.kind)
            .field("slot", &self.slot)
            .field("epoch", &self.epoch)
            .finish_non_exhaustive()
    }
}

impl SlotKind {
    fn from_byte(byte: u8) -> Option<Self> {
        [Self::File, Self::Passphrase].into_iter().find(|kind| *kind as u8 == byte)
    }
}

impl fmt::Display for SlotKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::File => "root key file",
            Self::Passphrase => "passphrase",
        })
    }
}

/// Bytes that are no slot record of this release.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum MalformedSlotRecord {
    /// The lengths do not add up.
    #[error("a slot record of the wrong length")]
    Length,
    /// A format that this release does not know.
    #[error("unknown slot-record format {format}: use the release that wrote it, or a later one")]
    Format {
        /// The format byte.
        format: u8,
    },
    /// A kind of slot that this release does not know.
    #[error("unknown slot kind {kind}: use the release that wrote it, or a later one")]
    Kind {
        /// The kind byte.
        kind: u8,
    },
}

const FORMAT: u8 = 1;

const CONTEXT: &[u8] = b"fleet-kms/slot/1";

const SEALED_LEN: usize = aead::NONCE_LEN + 32 + aead::TAG_LEN;

fn frame(kind: SlotKind, slot: SlotId, epoch: u32, parameters: &[u8]) -> Vec<u8> {
    let len = u16::try_from(parameters.len()).expect("the parameters of a slot are short");
    let mut out = vec![FORMAT, kind as u8];
    out.extend_from_slice(slot.as_bytes());
    out.extend_from_slice(&epoch.to_be_bytes());
    out.extend_from_slice(&len.to_be_bytes());
    out.extend_from_slice(parameters);
    out
}

fn aad(store: StoreId, frame: &[u8]) -> Vec<u8> {
    [CONTEXT, store.as_bytes(), frame].concat()
}

#[cfg(test)]
mod tests {
    use proptest::collection::vec;
    use proptest::prelude::*;
    use proptest::sample::Index;

    use super::*;

    const STORE: StoreId = StoreId::from_bytes([0x5a; 16]);
    const SLOT: SlotId = SlotId::from_bytes([0x51; 16]);

    fn root(byte: u8) -> LockedKey {
        LockedKey::from_zeroizing(Zeroizing::new([byte; 32]))
    }

    fn record(parameters: Vec<u8>) -> SlotRecord {
        let key = StoreKey::danger_from_bytes(STORE, 3, &mut [7; 32]);
        SlotRecord::danger_seal_with_nonce(SlotKind::File, SLOT, parameters, &root(1), &key, &[9; 24])
    }

    #[test]
    fn a_record_opens_with_its_root_key_in_its_store_only() {
        let record = record(vec![]);
        let opened = record.open(STORE, &root(1)).ok().unwrap();
        assert_eq!((opened.expose_secret(), opened.epoch(), opened.store()), (&[7; 32], 3, STORE));
        let refused = SlotError::DoesNotOpen { kind: SlotKind::File };
        assert_eq!(record.open(STORE, &root(2)).err().unwrap().to_string(), refused.to_string());
        assert!(record.open(StoreId::from_bytes([0x5b; 16]), &root(1)).is_err());
    }

    #[test]
    fn what_a_newer_release_wrote_is_refused_with_the_remedy() {
        let mut bytes = record(vec![]).encode();
        bytes[1] = 77;
        let refused = SlotRecord::parse(&bytes).unwrap_err();
        assert_eq!(refused, MalformedSlotRecord::Kind { kind: 77 });
        assert!(refused.to_string().contains("use the release that wrote it"));
        bytes[0] = 2;
        let refused = SlotRecord::parse(&bytes).unwrap_err();
        assert_eq!(refused, MalformedSlotRecord::Format { format: 2 });
        assert!(refused.to_string().contains("use the release that wrote it"));
    }

    #[test]
    fn a_printed_record_shows_no_sealed_bytes() {
        let text = format!("{:?}", record(vec![0xee; 4]));
        assert_eq!(
            text,
            "SlotRecord { kind: File, slot: 51515151-5151-5151-5151-515151515151, epoch: 3, .. }"
        );
    }

    proptest! {
        #[test]
        fn any_record_survives_its_bytes_and_no_altered_one_opens(
            parameters in vec(any::<u8>(), 0..300), index: Index, more in vec(any::<u8>(), 1..9),
        ) {
            let record = record(parameters);
            let bytes = record.encode();
            prop_assert_eq!(SlotRecord::parse(&bytes), Ok(record));

            let is_refused = |bytes: &[u8]| match SlotRecord::parse(bytes) {
                Ok(parsed) => parsed.open(STORE, &root(1)).is_err(),
                Err(_) => true,
            };
            let mut flipped = bytes.clone();
            let bit = index.index(bytes.len() * 8);
            flipped[bit / 8] ^= 1 << (bit % 8);
            prop_assert!(is_refused(&flipped));
            prop_assert!(is_refused(&bytes[..index.index(bytes.len())]));
            prop_assert!(is_refused(&[bytes, more].concat()));
        }

        #[test]
        fn any_bytes_are_parsed_without_a_panic(bytes in vec(any::<u8>(), 0..200)) {
            if let Ok(record) = SlotRecord::parse(&bytes) {
                prop_assert_eq!(record.encode(), bytes);
            }
        }
    }
}
