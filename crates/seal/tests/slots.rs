//! Slots of several kinds over one store key: any one opens it, and a wrong one says no more than that.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use fleet_kms_keyring::{SlotId, StoreId};
use fleet_kms_seal::{
    FileSlot, PassphraseSlot, RootSlot, SlotError, SlotKind, SlotRecord, StoreKey, generate_passphrase,
    open_any,
};
use rand_chacha::ChaCha20Rng;
use rand_core::SeedableRng;
use tempfile::TempDir;
use zeroize::Zeroizing;

const STORE: StoreId = StoreId::from_bytes([0x5a; 16]);

fn passphrase(text: &str) -> PassphraseSlot {
    PassphraseSlot::existing(Zeroizing::new(text.to_owned()))
}

fn slot(n: u8) -> SlotId {
    SlotId::from_bytes([n; 16])
}

#[test]
fn any_slot_opens_the_store_key_and_a_wrong_one_gets_a_constant_answer() {
    let mut rng = ChaCha20Rng::from_seed([1; 32]);
    let directory = TempDir::new().unwrap();
    let key = StoreKey::generate(STORE, 3, &mut rng);
    let file = FileSlot::create(&directory.path().join("root.key"), &mut rng).unwrap();
    let recovery = generate_passphrase(&mut rng);
    let records = [
        passphrase("correct horse battery").seal(&key, slot(1), &mut rng).unwrap(),
        file.seal(&key, slot(2), &mut rng).unwrap(),
        passphrase(&recovery).seal(&key, slot(3), &mut rng).unwrap(),
    ];
    let stored = records.map(|record| SlotRecord::parse(&record.encode()).unwrap());

    let same_key = |opened: &StoreKey| opened.mac_key().expose_secret() == key.mac_key().expose_secret();
    for (by, expected) in [
        (&passphrase("correct horse battery\n") as &dyn RootSlot, 1),
        (&file, 2),
        (&passphrase(&recovery), 3),
    ] {
        let (opened_slot, opened) = open_any(by, &stored, STORE).unwrap();
        assert_eq!(opened_slot, slot(expected));
        assert!(same_key(&opened) && opened.epoch() == 3);
    }

    for wrong in ["", "correct horse batterx", "correct horse battery ", "Correct horse battery"] {
        let refused = open_any(&passphrase(wrong), &stored, STORE).err().unwrap();
        assert_eq!(refused.to_string(), "no slot opens with this passphrase");
    }
}

#[test]
fn a_slot_opens_no_record_of_another_kind_and_a_store_without_its_kind_says_so() {
    let mut rng = ChaCha20Rng::from_seed([1; 32]);
    let directory = TempDir::new().unwrap();
    let key = StoreKey::generate(STORE, 1, &mut rng);
    let file = FileSlot::create(&directory.path().join("root.key"), &mut rng).unwrap();
    let record = file.seal(&key, slot(1), &mut rng).unwrap();
    let refused = passphrase("whatever").open(&record, STORE).err().unwrap();
    assert!(matches!(refused, SlotError::WrongKind { kind: SlotKind::Passphrase, found: SlotKind::File }));
    let refused = open_any(&passphrase("whatever"), [&record], STORE).err().unwrap();
    assert!(matches!(refused, SlotError::NoSuchSlot { kind: SlotKind::Passphrase }));
    assert!(refused.to_string().contains("open it with another kind"));
}
