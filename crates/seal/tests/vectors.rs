//! Vectors of the slot record and of the keys derived from a store key, kept for ever.
//!
//! A file in `test-data` never changes: each vector is opened, and made again byte for byte with its nonce.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]

use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use data_encoding::HEXLOWER;
use fleet_kms_keyring::sealed::{self, Kind, SealContext};
use fleet_kms_keyring::{SlotId, StoreId, aead};
use fleet_kms_seal::{FileSlot, LockedKey, PassphraseSlot, RootSlot, SlotKind, SlotRecord, StoreKey};
use serde::Deserialize;
use serde::de::{DeserializeOwned, Deserializer, Error};
use zeroize::Zeroizing;

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct SlotVector {
    kind: String,
    passphrase: Option<String>,
    #[serde(deserialize_with = "hex_array")]
    root: [u8; 32],
    store: String,
    slot: String,
    epoch: u32,
    #[serde(deserialize_with = "hex")]
    parameters: Vec<u8>,
    #[serde(deserialize_with = "hex_array")]
    store_key: [u8; 32],
    #[serde(deserialize_with = "hex_array")]
    nonce: [u8; aead::NONCE_LEN],
    #[serde(deserialize_with = "hex")]
    record: Vec<u8>,
}

impl SlotVector {
    /// The slot as an operator has it: a file on disk, or a passphrase.
    fn slot(&self) -> Box<dyn RootSlot> {
        match (self.kind.as_str(), &self.passphrase) {
            ("file", None) => {
                let directory = tempfile::tempdir().unwrap();
                let path = directory.path().join("root.key");
                fs::write(&path, self.root).unwrap();
                fs::set_permissions(&path, Permissions::from_mode(0o400)).unwrap();
                Box::new(FileSlot::open(&path).unwrap())
            }
            ("passphrase", Some(text)) => Box::new(PassphraseSlot::existing(Zeroizing::new(text.clone()))),
            other => panic!("unknown slot {other:?}"),
        }
    }
}

#[test]
fn every_slot_record_of_format_1_opens_and_is_made_again() {
    for mut vector in read::<SlotVector>("slot-1.json") {
        let store: StoreId = vector.store.parse().unwrap();
        let slot: SlotId = vector.slot.parse().unwrap();
        let by = vector.slot();
        let kind = if vector.kind == "file" { SlotKind::File } else { SlotKind::Passphrase };

        let record = SlotRecord::parse(&vector.record).unwrap();
        assert_eq!((record.kind(), record.slot(), record.epoch()), (kind, slot, vector.epoch));
        assert_eq!(record.parameters(), vector.parameters);
        let opened = by.open(&record, store).unwrap();
        let key = StoreKey::danger_from_bytes(store, vector.epoch, &mut vector.store_key);
        assert_eq!(opened.mac_key().expose_secret(), key.mac_key().expose_secret());

        let root = LockedKey::from_zeroizing(Zeroizing::new(vector.root));
        let made =
            SlotRecord::danger_seal_with_nonce(kind, slot, vector.parameters, &root, &key, &vector.nonce);
        assert_eq!(HEXLOWER.encode(&made.encode()), HEXLOWER.encode(&vector.record));
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct StoreKeyVector {
    store: String,
    epoch: u32,
    #[serde(deserialize_with = "hex_array")]
    store_key: [u8; 32],
    #[serde(deserialize_with = "hex_array")]
    mac: [u8; 32],
    #[serde(deserialize_with = "hex_array")]
    head: [u8; 32],
    sealed_row: String,
    #[serde(deserialize_with = "hex")]
    sealed_head: Vec<u8>,
}

#[test]
fn every_derived_key_of_format_1_is_derived_again() {
    for mut vector in read::<StoreKeyVector>("store-key-1.json") {
        let store: StoreId = vector.store.parse().unwrap();
        let key = StoreKey::danger_from_bytes(store, vector.epoch, &mut vector.store_key);
        assert_eq!(key.mac_key().expose_secret(), &vector.mac);
        assert_eq!(key.head_key().expose_secret(), &vector.head);
        // The seal key shows itself only by what it opens.
        let row = vector.sealed_row.as_bytes();
        let context = SealContext { store, row, kind: Kind::Head, epoch: vector.epoch };
        let opened = sealed::open(&key.seal_key(), &context, &vector.sealed_head).unwrap();
        assert_eq!(opened.as_slice(), b"sealed by it");
    }
}

fn read<V: DeserializeOwned>(file: &str) -> Vec<V> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("test-data").join(file);
    let vectors: Vec<V> = serde_json::from_slice(&fs::read(path).unwrap()).unwrap();
    assert!(!vectors.is_empty());
    vectors
}

fn hex<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<u8>, D::Error> {
    HEXLOWER.decode(String::deserialize(deserializer)?.as_bytes()).map_err(D::Error::custom)
}

fn hex_array<'de, D: Deserializer<'de>, const N: usize>(deserializer: D) -> Result<[u8; N], D::Error> {
    hex(deserializer)?.try_into().map_err(|_| D::Error::custom("wrong length"))
}
