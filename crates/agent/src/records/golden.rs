//! Golden records and head (`test-data/store-1.json`), made by an independent
//! implementation in another language. They never change: every later release
//! reads them and, while it writes format 1, writes them byte for byte.

use data_encoding::HEXLOWER;
use fleet_kms_keyring::State;
use fleet_kms_store::{MemoryStore, Revision, Row, RowName, Store, Txn};
use zeroize::Zeroizing;

use super::payload::{
    AuthorityRecord, ChangeRecord, ClusterRecord, IdentityRecord, IssuedRecord, KeyringRecord, NameRecord,
    TokenRecord,
};
use super::{Codec, Payload, RecordError, keyring};
use crate::identities;
use crate::ledger::Ledger;
use fleet_kms_seal::LockedKey;

const GOLDEN: &str = include_str!("../../test-data/store-1.json");

#[derive(serde::Deserialize)]
struct Golden {
    mac_key: String,
    head_key: String,
    store: String,
    epoch: u32,
    records: Vec<GoldenRecord>,
    head: GoldenHead,
}

#[derive(serde::Deserialize)]
struct GoldenRecord {
    kind: String,
    row: String,
    epoch: u32,
    seq: u64,
    payload: String,
    record: String,
    element: String,
}

#[derive(serde::Deserialize)]
struct GoldenHead {
    count: u64,
    set: String,
    blob: String,
}

fn golden() -> Golden {
    serde_json::from_str(GOLDEN).unwrap()
}

fn key(hex: &str) -> LockedKey {
    LockedKey::from_zeroizing(Zeroizing::new(bytes(hex).try_into().unwrap()))
}

fn bytes(hex: &str) -> Vec<u8> {
    HEXLOWER.decode(hex.as_bytes()).unwrap()
}

fn codec(golden: &Golden) -> Codec {
    Codec::new(golden.store.parse().unwrap(), golden.epoch, key(&golden.mac_key))
}

fn row(golden: &GoldenRecord) -> Row {
    let name = RowName::try_from(golden.row.clone()).unwrap();
    Row { name, revision: Revision(1), bytes: bytes(&golden.record) }
}

fn opens_and_is_made_again<P: Payload>(codec: &Codec, golden: &GoldenRecord) {
    let record = codec.decode::<P>(row(golden)).unwrap();
    assert_eq!(record.seq, golden.seq, "{}", golden.row);
    if P::FORMAT == 1 {
        assert_eq!(record.payload.encode_to_vec(), bytes(&golden.payload), "{}", golden.row);
        assert_eq!(codec.encode(&record.row, golden.seq, &record.payload), bytes(&golden.record));
    } else {
        // Written again it is of a newer format, and means the same.
        let stored = codec.encode(&record.row, golden.seq, &record.payload);
        assert_eq!(stored[0], P::FORMAT);
        let again = Row { name: record.row.clone(), revision: record.revision, bytes: stored };
        assert_eq!(codec.decode::<P>(again).unwrap().payload.encode_to_vec(), record.payload.encode_to_vec());
    }
    assert_eq!(codec.element(codec.epoch(), &record.row, &record.stored).to_vec(), bytes(&golden.element));
}

#[test]
fn every_golden_record_opens_and_is_written_the_same_again() {
    let golden = golden();
    let codec = codec(&golden);
    for record in &golden.records {
        assert_eq!(record.epoch, golden.epoch);
        match record.kind.as_str() {
            "keyring" => opens_and_is_made_again::<KeyringRecord>(&codec, record),
            "cluster" => opens_and_is_made_again::<ClusterRecord>(&codec, record),
            "identity" => opens_and_is_made_again::<IdentityRecord>(&codec, record),
            "token" => opens_and_is_made_again::<TokenRecord>(&codec, record),
            "authority" => opens_and_is_made_again::<AuthorityRecord>(&codec, record),
            "issued" => opens_and_is_made_again::<IssuedRecord>(&codec, record),
            "name" => opens_and_is_made_again::<NameRecord>(&codec, record),
            "change" => opens_and_is_made_again::<ChangeRecord>(&codec, record),
            other => panic!("no payload for {other}"),
        }
    }
}

#[test]
fn the_golden_keyring_has_a_version_in_every_state() {
    let golden = golden();
    let record = golden.records.iter().find(|record| record.kind == "keyring").unwrap();
    let record = codec(&golden).decode::<KeyringRecord>(row(record)).unwrap();
    let keyring = keyring::parse(&record).unwrap();
    let states: Vec<_> = keyring.versions().iter().map(|version| version.state).collect();
    assert!(matches!(
        states.as_slice(),
        [
            State::Destroyed,
            State::DestroyScheduled { .. },
            State::Disabled,
            State::DecryptOnly,
            State::Active,
            State::Next
        ]
    ));
    // The golden record has counts in a field that nobody has used since.
    let mut unused = record.payload.clone();
    unused.versions.iter_mut().for_each(|version| version.wraps = 0);
    assert_eq!(keyring::payload(&keyring), unused);
}

#[test]
fn a_cluster_of_format_1_has_the_180_days_that_every_cluster_had() {
    let golden = golden();
    let record = golden.records.iter().find(|record| record.kind == "cluster").unwrap();
    let record = codec(&golden).decode::<ClusterRecord>(row(record)).unwrap();
    assert_eq!(record.payload.max_offline_seconds, 180 * 86_400);
}

#[test]
fn a_rotation_of_the_store_key_keeps_a_records_format_and_refuses_a_newer_one() {
    let golden = golden();
    let record = golden.records.iter().find(|record| record.kind == "cluster").unwrap();
    let codec = codec(&golden).with_newer(golden.epoch + 1, key(&golden.head_key));
    let renewed = codec.renew(&row(record)).unwrap().unwrap();
    assert_eq!(renewed[0], 1);
    let renewed = Row { bytes: renewed, ..row(record) };
    let (before, after) =
        (codec.decode::<ClusterRecord>(row(record)).unwrap(), codec.decode(renewed).unwrap());
    assert_eq!((after.seq, after.payload), (before.seq + 1, before.payload));
    let mut newer = row(record);
    newer.bytes[0] = ClusterRecord::FORMAT + 1;
    let error = codec.renew(&newer).unwrap_err();
    assert!(matches!(error, RecordError::Newer { format: 3, known: 2, .. }), "{error}");
}

#[test]
fn the_golden_identities_parse() {
    let golden = golden();
    let records = golden.records.iter().filter(|record| record.kind == "identity");
    let parsed: Vec<_> = records
        .map(|record| identities::parse(&codec(&golden).decode(row(record)).unwrap()).unwrap())
        .collect();
    assert_eq!(parsed[0].current.as_ref().unwrap().serial.issue_number(), 5);
    assert_eq!(parsed[0].next.as_ref().unwrap().serial.issue_number(), 9);
    assert!(parsed[0].banned);
    assert_eq!(parsed[1].roles.len(), 2);
}

#[test]
fn any_flipped_bit_or_another_place_is_refused() {
    let golden = golden();
    let codec = codec(&golden);
    let record = golden.records.iter().find(|record| record.kind == "issued").unwrap();
    for bit in 0..bytes(&record.record).len() * 8 {
        let mut row = row(record);
        row.bytes[bit / 8] ^= 1 << (bit % 8);
        codec.decode::<IssuedRecord>(row).unwrap_err();
    }
    for length in 0..bytes(&record.record).len() {
        let mut row = row(record);
        row.bytes.truncate(length);
        codec.decode::<IssuedRecord>(row).unwrap_err();
    }
    let mut moved = row(record);
    moved.name = RowName::try_from("elsewhere".to_owned()).unwrap();
    assert!(matches!(codec.decode::<IssuedRecord>(moved), Err(RecordError::Tag { .. })));
    let mut newer = row(record);
    newer.bytes[0] = 2;
    let error = codec.decode::<IssuedRecord>(newer).unwrap_err();
    assert!(matches!(error, RecordError::Newer { format: 2, .. }), "{error}");
}

#[tokio::test]
async fn the_golden_head_opens_and_fits_the_golden_records() {
    let golden = golden();
    let store = MemoryStore::new();
    let mut txn = Txn::new().put(RowName::try_from("head".to_owned()).unwrap(), bytes(&golden.head.blob));
    for record in &golden.records {
        let row = row(record);
        txn = txn.put(row.name, row.bytes);
    }
    store.commit(txn).await.unwrap();
    let set = golden.records.iter().fold([0; 32], |set: [u8; 32], record| {
        let element = bytes(&record.element);
        std::array::from_fn(|index| set[index] ^ element[index])
    });
    assert_eq!(set.to_vec(), bytes(&golden.head.set));
    let head_key = key(&golden.head_key);
    let store: std::sync::Arc<dyn Store> = std::sync::Arc::new(store);
    let generator = crate::enrolment::rig::generator;
    let ledger =
        Ledger::open(store, codec(&golden), head_key, "agent-1".to_owned(), generator).await.unwrap();
    assert_eq!(ledger.head_count().await, golden.head.count);
    assert_eq!(
        ledger.check().await.unwrap(),
        crate::ledger::Integrity::Intact { rows: golden.records.len() }
    );
}
