//! After a call, the caller's stack holds no copy of a store key, a root key or a derived key.
//!
//! As `tests/stack.rs` of keyring; the secrets are those of the golden vectors.

#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "a test fails by panicking")]

use std::fs::{self, File, Permissions};
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::PathBuf;

use data_encoding::HEXLOWER;
use fleet_kms_keyring::StoreId;
use fleet_kms_seal::{FileSlot, PassphraseSlot, RootSlot, SlotRecord, StoreKey};
use serde_json::Value;
use zeroize::Zeroizing;

#[test]
fn deriving_keys_leaves_none_of_them_on_the_stack() {
    let vector = vector("store-key-1.json", 0);
    let secrets = ["store_key", "mac", "head"].map(|field| text(&vector, field));
    let store: StoreId = text(&vector, "store").parse().unwrap();
    let bytes = HEXLOWER.decode(secrets[0].as_bytes()).unwrap();
    let mut boxed: Box<[u8; 32]> = bytes.into_boxed_slice().try_into().unwrap();
    let ((), found) = is_left(&secrets.each_ref().map(String::as_str), move || {
        let key = StoreKey::danger_from_bytes(store, 1, &mut boxed);
        drop((key.seal_key(), key.mac_key(), key.head_key()));
    });
    assert!(!found);
}

#[test]
fn opening_a_slot_leaves_neither_its_root_key_nor_the_store_key_on_the_stack() {
    for n in [0, 2] {
        let vector = vector("slot-1.json", n);
        let secrets = ["root", "store_key"].map(|field| text(&vector, field));
        let store: StoreId = text(&vector, "store").parse().unwrap();
        let record =
            SlotRecord::parse(&HEXLOWER.decode(text(&vector, "record").as_bytes()).unwrap()).unwrap();
        let passphrase = vector["passphrase"].as_str().map(|text| Zeroizing::new(text.to_owned()));
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("root.key");
        fs::write(&path, HEXLOWER.decode(secrets[0].as_bytes()).unwrap()).unwrap();
        fs::set_permissions(&path, Permissions::from_mode(0o400)).unwrap();
        let (opened, found) = is_left(&secrets.each_ref().map(String::as_str), move || match passphrase {
            Some(passphrase) => PassphraseSlot::existing(passphrase).open(&record, store).is_ok(),
            None => FileSlot::open(&path).unwrap().open(&record, store).is_ok(),
        });
        assert!(opened && !found, "slot vector {n}");
    }
}

fn vector(file: &str, n: usize) -> Value {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("test-data").join(file);
    let vectors: Vec<Value> = serde_json::from_slice(&fs::read(path).unwrap()).unwrap();
    vectors[n].clone()
}

fn text(vector: &Value, field: &str) -> String {
    vector[field].as_str().unwrap().to_owned()
}

/// Runs `call` on a thread of its own; returns its result and whether half a secret is on that thread's stack.
fn is_left<T: Send + 'static>(secrets: &[&str], call: impl FnOnce() -> T + Send + 'static) -> (T, bool) {
    let (result, snapshot) = std::thread::spawn(move || {
        let result = call();
        (result, own_stack())
    })
    .join()
    .unwrap();
    let halves: Vec<Vec<u8>> =
        secrets.iter().map(|secret| HEXLOWER.decode(&secret.as_bytes()[..32]).unwrap()).collect();
    let found = snapshot.windows(16).any(|window| halves.iter().any(|half| half == window));
    (result, found)
}

fn own_stack() -> Vec<u8> {
    let marker = 0_u8;
    let address = std::ptr::from_ref(&marker).addr();
    let maps = fs::read_to_string("/proc/self/maps").unwrap();
    let (from, to) = maps
        .lines()
        .filter_map(|line| line.split(' ').next()?.split_once('-'))
        .map(|(from, to)| [from, to].map(|text| usize::from_str_radix(text, 16).unwrap()))
        .map(|[from, to]| (from, to))
        .find(|(from, to)| (*from..*to).contains(&address))
        .unwrap();
    let mut snapshot = vec![0; to - from];
    File::open("/proc/self/mem").unwrap().read_exact_at(&mut snapshot, from as u64).unwrap();
    snapshot
}
