//! The parser of wrapped DEKs, which reads bytes of any cluster's etcd. The same check runs over the corpus
//! in `crates/keyring/tests/corpus.rs`, so that the corpus is used without a fuzzer too.

#![no_main]

use fleet_kms_keyring::wrapped_dek::{self, MAX_DEK, OVERHEAD, WrappedDek};
use fleet_kms_keyring::{ClusterId, Kek};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    let Ok(parsed) = WrappedDek::parse(bytes) else { return };
    // What the parser accepts is exactly what the format describes.
    assert!((OVERHEAD + 1..=OVERHEAD + MAX_DEK).contains(&bytes.len()));
    assert_eq!(bytes[0], 1);
    assert_eq!(bytes[1..5], parsed.header().version.get().to_be_bytes());
    assert_eq!(&bytes[5..21], parsed.header().key_id.as_bytes());
    // No input opens under a key that wrapped nothing.
    let kek = Kek::danger_from_bytes(&mut [7; 32]);
    assert!(wrapped_dek::unwrap(&kek, &ClusterId::from_bytes([0xc1; 16]), &parsed).is_err());
});
