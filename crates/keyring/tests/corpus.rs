//! The fuzz corpus of the wrapped-DEK parser, run as a plain test.

#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "a test fails by panicking")]

use std::fs;
use std::path::{Path, PathBuf};

use fleet_kms_keyring::wrapped_dek::{self, MAX_DEK, OVERHEAD, WrappedDek};
use fleet_kms_keyring::{ClusterId, Kek};

#[test]
fn the_parser_accepts_of_the_corpus_exactly_the_good_inputs() {
    let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fuzz/corpus/wrapped_dek");
    let inputs: Vec<PathBuf> = fs::read_dir(corpus).unwrap().map(|entry| entry.unwrap().path()).collect();
    assert!(inputs.len() >= 12, "the corpus is there");
    for input in inputs {
        let bytes = fs::read(&input).unwrap();
        let name = input.file_name().unwrap().to_string_lossy();
        let parsed = WrappedDek::parse(&bytes);
        // Inputs that a fuzzer added are named by their hash; they must only not panic.
        if name.contains('-') || name == "empty" {
            assert_eq!(parsed.is_ok(), name.starts_with("good-"), "{name}");
        }
        if let Ok(parsed) = parsed {
            check(&bytes, &parsed);
        }
    }
}

/// As in the fuzz target.
fn check(bytes: &[u8], parsed: &WrappedDek<'_>) {
    assert!((OVERHEAD + 1..=OVERHEAD + MAX_DEK).contains(&bytes.len()));
    assert_eq!(bytes[0], 1);
    assert_eq!(bytes[1..5], parsed.header().version.get().to_be_bytes());
    assert_eq!(&bytes[5..21], parsed.header().key_id.as_bytes());
    let kek = Kek::danger_from_bytes(&mut [7; 32]);
    assert!(wrapped_dek::unwrap(&kek, &ClusterId::from_bytes([0xc1; 16]), parsed).is_err());
}
