//! A wrapped DEK opens in its own cluster under its own key, unaltered, and in no other way; a sealed blob
//! likewise in its own place.

#![allow(clippy::unwrap_used, clippy::indexing_slicing, clippy::panic, reason = "a test fails by panicking")]

use fleet_kms_keyring::sealed::{self, Kind, SealContext, SealKey};
use fleet_kms_keyring::wrapped_dek::{self, Header, MAX_DEK, OVERHEAD, WrappedDek};
use fleet_kms_keyring::{ClusterId, Kek, KeyId, StoreId, Version};
use proptest::collection::vec;
use proptest::prelude::*;
use proptest::sample::Index;
use rand_chacha::ChaCha20Rng;
use rand_core::SeedableRng;

/// A DEK and all that it takes to wrap it.
#[derive(Debug)]
struct Wrapping {
    kek: [u8; 32],
    header: Header,
    cluster: ClusterId,
    dek: Vec<u8>,
    bytes: Vec<u8>,
}

fn wrapping() -> impl Strategy<Value = Wrapping> {
    let dek = prop_oneof![Just(vec![7; 32]), vec(any::<u8>(), 1..=MAX_DEK)];
    (any::<[u8; 32]>(), 1_u32.., any::<[u8; 16]>(), any::<[u8; 16]>(), dek, any::<[u8; 32]>()).prop_map(
        |(kek, version, key_id, cluster, dek, seed)| {
            let header =
                Header { version: Version::new(version).unwrap(), key_id: KeyId::from_bytes(key_id) };
            let cluster = ClusterId::from_bytes(cluster);
            let rng = &mut ChaCha20Rng::from_seed(seed);
            let bytes = wrapped_dek::wrap(&key(kek), header, &cluster, &dek, rng).unwrap();
            Wrapping { kek, header, cluster, dek, bytes }
        },
    )
}

fn key(mut bytes: [u8; 32]) -> Kek {
    Kek::danger_from_bytes(&mut bytes)
}

/// Whether `bytes` are refused, by the parser or by the key.
fn is_refused(kek: [u8; 32], cluster: &ClusterId, bytes: &[u8]) -> bool {
    match WrappedDek::parse(bytes) {
        Ok(parsed) => wrapped_dek::unwrap(&key(kek), cluster, &parsed).is_err(),
        Err(_) => true,
    }
}

fn flip(bytes: &mut [u8], index: Index) {
    let bit = index.index(bytes.len() * 8);
    bytes[bit / 8] ^= 1 << (bit % 8);
}

proptest! {
    #[test]
    fn a_wrapped_dek_opens_in_its_cluster(w in wrapping()) {
        prop_assert_eq!(w.bytes.len(), w.dek.len() + OVERHEAD);
        let parsed = WrappedDek::parse(&w.bytes).unwrap();
        prop_assert_eq!(parsed.header(), w.header);
        let opened = wrapped_dek::unwrap(&key(w.kek), &w.cluster, &parsed).unwrap();
        prop_assert_eq!(&*opened, &w.dek);
    }

    #[test]
    fn any_flipped_bit_is_refused(w in wrapping(), index: Index) {
        let mut bytes = w.bytes;
        flip(&mut bytes, index);
        prop_assert!(is_refused(w.kek, &w.cluster, &bytes));
    }

    #[test]
    fn any_other_cluster_is_refused(w in wrapping(), index: Index) {
        let mut other = *w.cluster.as_bytes();
        flip(&mut other, index);
        prop_assert!(is_refused(w.kek, &ClusterId::from_bytes(other), &w.bytes));
    }

    #[test]
    fn any_other_key_is_refused(w in wrapping(), index: Index) {
        let mut other = w.kek;
        flip(&mut other, index);
        prop_assert!(is_refused(other, &w.cluster, &w.bytes));
    }

    #[test]
    fn any_other_version_or_key_id_in_the_header_is_refused(w in wrapping(), version: [u8; 4], key_id: [u8; 16]) {
        let mut bytes = w.bytes;
        prop_assume!(bytes[1..5] != version && bytes[5..21] != key_id);
        let mut with_version = bytes.clone();
        with_version[1..5].copy_from_slice(&version);
        prop_assert!(is_refused(w.kek, &w.cluster, &with_version));
        bytes[5..21].copy_from_slice(&key_id);
        prop_assert!(is_refused(w.kek, &w.cluster, &bytes));
    }

    #[test]
    fn any_truncation_or_extension_is_refused(w in wrapping(), cut: Index, more in vec(any::<u8>(), 1..64)) {
        let mut longer = w.bytes.clone();
        longer.extend(&more);
        prop_assert!(is_refused(w.kek, &w.cluster, &longer));
        let mut longer_in_front = more;
        longer_in_front.extend(&w.bytes);
        prop_assert!(is_refused(w.kek, &w.cluster, &longer_in_front));
        let shorter = cut.index(w.bytes.len());
        prop_assert!(is_refused(w.kek, &w.cluster, &w.bytes[..shorter]));
        prop_assert!(is_refused(w.kek, &w.cluster, &w.bytes[shorter + 1..]));
    }

    #[test]
    fn any_bytes_are_parsed_without_a_panic_and_never_read_as_another_length(bytes in vec(any::<u8>(), 0..1200)) {
        if WrappedDek::parse(&bytes).is_ok() {
            prop_assert!((OVERHEAD + 1..=OVERHEAD + MAX_DEK).contains(&bytes.len()));
        }
    }

    #[test]
    fn a_sealed_blob_opens_in_its_place_only_and_unaltered(
        secret in vec(any::<u8>(), 0..200),
        places: [([u8; 16], Vec<u8>, u32); 2],
        seed: [u8; 32],
        index: Index,
    ) {
        let [here, there] = places.each_ref().map(|(store, row, epoch)| SealContext {
            store: StoreId::from_bytes(*store), row, kind: Kind::CaKey, epoch: *epoch,
        });
        let seal_key = SealKey::from_bytes(&mut seed.clone());
        let mut blob = sealed::seal(&seal_key, &here, &secret, &mut ChaCha20Rng::from_seed(seed));
        let opened = sealed::open(&seal_key, &here, &blob).unwrap();
        prop_assert_eq!(&*opened, &secret);
        prop_assert!(sealed::open(&seal_key, &there, &blob).is_err());
        prop_assert!(sealed::open(&seal_key, &here, &blob[..index.index(blob.len())]).is_err());
        flip(&mut blob, index);
        prop_assert!(sealed::open(&seal_key, &here, &blob).is_err());
        flip(&mut blob, index);
        blob.push(0);
        prop_assert!(sealed::open(&seal_key, &here, &blob).is_err());
    }
}
