//! Vectors: the published ones of XAES-256-GCM, and our own of every format, kept for ever.
//!
//! A file in `test-data` never changes: each vector is opened, and made again byte for byte with its nonce.

#![allow(clippy::unwrap_used, clippy::indexing_slicing, clippy::panic, reason = "a test fails by panicking")]

use std::path::Path;

use data_encoding::HEXLOWER;
use fleet_kms_keyring::sealed::{self, Kind, SealContext, SealKey};
use fleet_kms_keyring::wrapped_dek::{self, Header, WrappedDek};
use fleet_kms_keyring::{ClusterId, Kek, StoreId, Version, aead};
use serde::Deserialize;
use serde::de::{DeserializeOwned, Deserializer, Error};
use shake::Shake128;
use shake::digest::{ExtendableOutput, Update, XofReader};

#[test]
fn xaes_256_gcm_agrees_with_the_vectors_of_c2sp() {
    let nonce = b"ABCDEFGHIJKLMNOPQRSTUVWX";
    for (key, aad, expected) in [
        (1, "", "ce546ef63c9cc60765923609b33a9a1974e96e52daf2fcf7075e2271"),
        (3, "c2sp.org/XAES-256-GCM", "986ec1832593df5443a179437fd083bf3fdb41abd740a21f71eb769d"),
    ] {
        let sealed = aead::danger_seal_with_nonce(&[key; 32], aad.as_bytes(), b"XAES-256-GCM", nonce);
        let (front, rest) = sealed.split_at(aead::NONCE_LEN);
        assert_eq!(front, nonce);
        assert_eq!(HEXLOWER.encode(rest), expected);
        assert_eq!(aead::open(&[key; 32], aad.as_bytes(), &sealed).unwrap().as_slice(), b"XAES-256-GCM");
    }
}

#[test]
fn xaes_256_gcm_agrees_with_the_10_000_accumulated_vectors_of_c2sp() {
    let expected = "e6b9edf2df6cec60c8cbd864e2211b597fb69a529160cd040d56c0c210081939";
    assert_eq!(accumulated(10_000), expected);
}

#[test]
#[ignore = "half a minute in a debug build; run with --release -- --ignored"]
fn xaes_256_gcm_agrees_with_the_1_000_000_accumulated_vectors_of_c2sp() {
    let expected = "2163ae1445985a30b60585ee67daa55674df06901b890593e824b8a7c885ab15";
    assert_eq!(accumulated(1_000_000), expected);
}

/// C2SP XAES-256-GCM, "Accumulated randomized tests".
fn accumulated(iterations: u32) -> String {
    fn bytes<const N: usize>(stream: &mut impl XofReader) -> [u8; N] {
        let mut out = [0; N];
        stream.read(&mut out);
        out
    }
    fn counted(stream: &mut impl XofReader) -> Vec<u8> {
        let [len] = bytes(stream);
        let mut out = vec![0; usize::from(len)];
        stream.read(&mut out);
        out
    }
    let mut stream = Shake128::default().finalize_xof();
    let mut hash = Shake128::default();
    for _ in 0..iterations {
        let (key, nonce) = (bytes(&mut stream), bytes(&mut stream));
        let (plaintext, aad) = (counted(&mut stream), counted(&mut stream));
        let sealed = aead::danger_seal_with_nonce(&key, &aad, &plaintext, &nonce);
        assert_eq!(aead::open(&key, &aad, &sealed).unwrap().as_slice(), plaintext);
        hash.update(&sealed[aead::NONCE_LEN..]);
    }
    HEXLOWER.encode(&bytes::<32>(&mut hash.finalize_xof()))
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct WrappedDekVector {
    #[serde(deserialize_with = "hex_array")]
    kek: [u8; 32],
    version: u32,
    key_id: String,
    cluster: String,
    #[serde(deserialize_with = "hex")]
    dek: Vec<u8>,
    #[serde(deserialize_with = "hex_array")]
    nonce: [u8; aead::NONCE_LEN],
    #[serde(deserialize_with = "hex")]
    wrapped: Vec<u8>,
}

#[test]
fn every_wrapped_dek_of_format_1_opens_and_is_made_again() {
    for mut vector in read::<WrappedDekVector>("wrapped-dek-1.json") {
        let kek = Kek::danger_from_bytes(&mut vector.kek);
        let cluster: ClusterId = vector.cluster.parse().unwrap();
        let header =
            Header { version: Version::new(vector.version).unwrap(), key_id: vector.key_id.parse().unwrap() };
        let made =
            wrapped_dek::danger_wrap_with_nonce(&kek, header, &cluster, &vector.dek, &vector.nonce).unwrap();
        assert_eq!(HEXLOWER.encode(&made), HEXLOWER.encode(&vector.wrapped));
        let parsed = WrappedDek::parse(&vector.wrapped).unwrap();
        assert_eq!(parsed.header(), header);
        assert_eq!(*wrapped_dek::unwrap(&kek, &cluster, &parsed).unwrap(), vector.dek);
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct SealedVector {
    #[serde(deserialize_with = "hex_array")]
    key: [u8; 32],
    store: String,
    row: String,
    kind: String,
    epoch: u32,
    #[serde(deserialize_with = "hex")]
    plaintext: Vec<u8>,
    #[serde(deserialize_with = "hex_array")]
    nonce: [u8; aead::NONCE_LEN],
    #[serde(deserialize_with = "hex")]
    blob: Vec<u8>,
}

#[test]
fn every_sealed_blob_of_format_1_opens_and_is_made_again() {
    for mut vector in read::<SealedVector>("sealed-1.json") {
        let key = SealKey::from_bytes(&mut vector.key);
        let store: StoreId = vector.store.parse().unwrap();
        let kind = match vector.kind.as_str() {
            "kek" => Kind::Kek,
            "ca-key" => Kind::CaKey,
            "head" => Kind::Head,
            other => panic!("unknown kind {other}"),
        };
        let context = SealContext { store, row: vector.row.as_bytes(), kind, epoch: vector.epoch };
        let made = sealed::danger_seal_with_nonce(&key, &context, &vector.plaintext, &vector.nonce);
        assert_eq!(HEXLOWER.encode(&made), HEXLOWER.encode(&vector.blob));
        assert_eq!(sealed::epoch_of(&vector.blob), Ok(vector.epoch));
        assert_eq!(*sealed::open(&key, &context, &vector.blob).unwrap(), vector.plaintext);
        if kind == Kind::Kek {
            assert!(sealed::open_kek(&key, &context, &vector.blob).is_ok());
        }
    }
}

fn read<V: DeserializeOwned>(file: &str) -> Vec<V> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("test-data").join(file);
    let vectors: Vec<V> = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
    assert!(!vectors.is_empty());
    vectors
}

fn hex<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<u8>, D::Error> {
    HEXLOWER.decode(String::deserialize(deserializer)?.as_bytes()).map_err(D::Error::custom)
}

fn hex_array<'de, D: Deserializer<'de>, const N: usize>(deserializer: D) -> Result<[u8; N], D::Error> {
    hex(deserializer)?.try_into().map_err(|_| D::Error::custom("wrong length"))
}
