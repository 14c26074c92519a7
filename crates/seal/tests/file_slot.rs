//! Root key files: what is read, what is made, and every refusal with its remedy.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::fs::{self, Permissions};
use std::os::unix::fs::{PermissionsExt, chown, symlink};
use std::path::{Path, PathBuf};

use data_encoding::{BASE64, BASE64_NOPAD, HEXLOWER, HEXUPPER};
use fleet_kms_keyring::{SlotId, StoreId};
use fleet_kms_seal::{FileSlot, RootFileError, RootSlot, SlotError, SlotKind, SlotRecord, StoreKey};
use rand_chacha::ChaCha20Rng;
use rand_core::SeedableRng;
use static_assertions::assert_not_impl_any;
use tempfile::TempDir;

assert_not_impl_any!(FileSlot: Clone, Copy, std::fmt::Debug, PartialEq, serde::Serialize);

const STORE: StoreId = StoreId::from_bytes([0x5a; 16]);
const SLOT: SlotId = SlotId::from_bytes([0x51; 16]);
const ROOT: [u8; 32] = *b"\x00\x01\x02 thirty-two bytes, root\xfd\xfd\xfe\xff.\n";

fn rng() -> ChaCha20Rng {
    ChaCha20Rng::from_seed([1; 32])
}

fn file(directory: &TempDir, content: impl AsRef<[u8]>, mode: u32) -> PathBuf {
    let path = directory.path().join("root.key");
    let _ = fs::remove_file(&path);
    fs::write(&path, content).unwrap();
    fs::set_permissions(&path, Permissions::from_mode(mode)).unwrap();
    path
}

fn refusal(path: &Path) -> String {
    FileSlot::open(path).err().unwrap().to_string()
}

/// A record that [`ROOT`] opens.
fn record() -> SlotRecord {
    let directory = TempDir::new().unwrap();
    let slot = FileSlot::open(&file(&directory, ROOT, 0o400)).unwrap();
    slot.seal(&StoreKey::generate(STORE, 1, &mut rng()), SLOT, &mut rng()).unwrap()
}

#[test]
fn a_new_file_has_mode_0400_and_opens_what_was_sealed_with_it() {
    let directory = TempDir::new().unwrap();
    let path = directory.path().join("root.key");
    let made = FileSlot::create(&path, &mut rng()).unwrap();
    assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o7777, 0o400);
    assert_eq!(fs::read_to_string(&path).unwrap().trim_end().len(), 64);

    let key = StoreKey::generate(STORE, 7, &mut rng());
    let record = made.seal(&key, SLOT, &mut rng()).unwrap();
    assert_eq!((record.kind(), record.slot(), record.epoch()), (SlotKind::File, SLOT, 7));
    let opened = FileSlot::open(&path).unwrap().open(&record, STORE).unwrap();
    assert_eq!(opened.epoch(), 7);
    assert_eq!(opened.mac_key().expose_secret(), key.mac_key().expose_secret());
}

#[test]
fn a_file_that_exists_is_never_replaced() {
    let directory = TempDir::new().unwrap();
    let path = file(&directory, ROOT, 0o400);
    let refused = FileSlot::create(&path, &mut rng()).err().unwrap();
    assert!(matches!(refused, RootFileError::Exists { .. }), "{refused}");
    assert!(refused.to_string().contains("move it away or name another"), "{refused}");
    assert_eq!(fs::read(&path).unwrap(), ROOT);
}

#[test]
fn a_file_in_a_missing_directory_is_not_made() {
    let directory = TempDir::new().unwrap();
    let refused = FileSlot::create(&directory.path().join("none/root.key"), &mut rng()).err().unwrap();
    assert!(matches!(refused, RootFileError::Write { .. }), "{refused}");
}

#[test]
fn raw_hex_and_base64_give_the_same_key() {
    let directory = TempDir::new().unwrap();
    let record = record();
    let forms = [HEXLOWER, HEXUPPER, BASE64, BASE64_NOPAD].map(|encoding| encoding.encode(&ROOT));
    let with_breaks = forms.iter().flat_map(|form| ["", "\n", "\r\n"].map(|end| format!("{form}{end}")));
    for content in with_breaks.map(String::into_bytes).chain([ROOT.to_vec()]) {
        let slot = FileSlot::open(&file(&directory, &content, 0o400)).unwrap();
        assert!(slot.open(&record, STORE).is_ok(), "{}", String::from_utf8_lossy(&content));
    }
}

#[test]
fn a_file_of_the_wrong_length_or_text_is_refused_by_its_length() {
    let directory = TempDir::new().unwrap();
    let hex = HEXLOWER.encode(&ROOT);
    for content in [
        &[][..],
        &[7; 31],
        &[7; 33],
        &[7; 64],
        &[b'a'; 63],
        &[b'a'; 65],
        &[b'='; 44],
        format!("{hex} ").as_bytes(),
        format!("{hex}\n\n\n").as_bytes(),
        &[b'a'; 100_000],
    ] {
        let refused = refusal(&file(&directory, content, 0o400));
        assert!(refused.contains(&format!("has {} bytes", content.len())), "{refused}");
        assert!(
            refused.contains("must hold 32 raw bytes, 64 hex digits or 44 base64 characters"),
            "{refused}"
        );
    }
}

#[test]
fn only_modes_0400_and_0600_are_accepted() {
    let directory = TempDir::new().unwrap();
    for mode in [0o400, 0o600] {
        assert!(FileSlot::open(&file(&directory, ROOT, mode)).is_ok(), "{mode:o}");
    }
    for mode in [0o644, 0o440, 0o404, 0o640, 0o420, 0o402, 0o700, 0o500, 0o4400] {
        let path = file(&directory, ROOT, mode);
        let expected = format!("root key file {0} has mode {mode:04o}; run chmod 0400 {0}", path.display());
        assert_eq!(refusal(&path), expected);
    }
}

#[test]
fn a_file_of_another_owner_is_refused() {
    let directory = TempDir::new().unwrap();
    let path = file(&directory, ROOT, 0o400);
    if chown(&path, Some(12_345), None).is_err() {
        return; // Only root can give a file away.
    }
    assert_eq!(
        refusal(&path),
        format!("root key file {0} is owned by uid 12345; run chown 0 {0}", path.display())
    );
}

#[test]
fn links_directories_pipes_and_missing_files_are_refused() {
    let directory = TempDir::new().unwrap();
    let target = file(&directory, ROOT, 0o400);
    let link = directory.path().join("link");
    symlink(target, &link).unwrap();
    assert!(refusal(&link).ends_with("is a symbolic link; name the file that it points to"));

    assert!(refusal(directory.path()).ends_with("is not a regular file; name a file that holds the key"));

    let pipe = directory.path().join("pipe");
    let kind = rustix::fs::FileType::Fifo;
    rustix::fs::mknodat(rustix::fs::CWD, &pipe, kind, rustix::fs::Mode::RUSR, 0).unwrap();
    assert!(refusal(&pipe).ends_with("is not a regular file; name a file that holds the key"));

    let missing = FileSlot::open(&directory.path().join("missing")).err().unwrap();
    assert!(missing.to_string().contains("check its name"), "{missing}");
    assert!(std::error::Error::source(&missing).is_some());
}

#[test]
fn a_credential_is_named_and_may_show_the_mode_of_its_acl() {
    let directory = TempDir::new().unwrap();
    for mode in [0o400, 0o440, 0o600] {
        file(&directory, ROOT, mode);
        let slot = FileSlot::open_credential(directory.path(), "root.key").unwrap();
        assert!(slot.open(&record(), STORE).is_ok());
    }
    file(&directory, ROOT, 0o444);
    assert!(FileSlot::open_credential(directory.path(), "root.key").is_err());
    for name in ["", ".", "..", "../root.key", "/root.key", "a/b"] {
        let refused = FileSlot::open_credential(directory.path(), name).err().unwrap();
        assert!(matches!(refused, RootFileError::CredentialName { .. }), "{refused}");
    }
}

#[test]
fn another_file_or_another_store_opens_nothing() {
    let directory = TempDir::new().unwrap();
    let record = record();
    let other = FileSlot::open(&file(&directory, [7; 32], 0o400)).unwrap();
    let refused = other.open(&record, STORE).err().unwrap();
    assert!(matches!(refused, SlotError::DoesNotOpen { kind: SlotKind::File }));
    assert_eq!(refused.to_string(), "no slot opens with this root key file");
    let right = FileSlot::open(&file(&directory, ROOT, 0o400)).unwrap();
    assert!(right.open(&record, StoreId::from_bytes([9; 16])).is_err());
}
