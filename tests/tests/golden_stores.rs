//! Stores of every format that was ever released are opened by this release: the golden databases.
#![allow(clippy::unwrap_used, reason = "a test")]

use std::path::PathBuf;

use fleet_kms_tests::golden;

/// Not a test: makes a golden database with the programs that are built, once for each format.
#[test]
#[ignore = "makes test data: FLEET_KMS_GOLDEN names the new directory"]
fn make_a_golden_database() {
    let to = PathBuf::from(std::env::var_os("FLEET_KMS_GOLDEN").unwrap());
    golden::make(&to, |_| Ok(())).unwrap();
}
