//! What holds whatever happens between agent and store.

use std::sync::Arc;

use fleet_kms_audit::{ChangeId, Recorded};
use fleet_kms_keyring::StoreId;
use fleet_kms_seal::LockedKey;
use fleet_kms_store::contract::{Fault, Flaky};
use fleet_kms_store::{MemoryStore, RowName, Store, Txn};
use zeroize::Zeroizing;

use super::{Integrity, Ledger, Mark, WriteError};
use crate::enrolment::rig::generator;
use crate::records::payload::IssuedRecord;
use crate::records::{Codec, rows};

const STORE: StoreId = StoreId::from_bytes([5; 16]);

fn key(byte: u8) -> LockedKey {
    LockedKey::from_zeroizing(Zeroizing::new([byte; 32]))
}

async fn open(store: &Arc<dyn Store>) -> Ledger {
    let codec = Codec::new(STORE, 1, key(1));
    Ledger::open(Arc::clone(store), codec, key(2), "agent-1".to_owned(), generator).await.unwrap()
}

async fn new_store() -> Arc<MemoryStore> {
    let store = Arc::new(MemoryStore::new());
    Ledger::create(&*store, Codec::new(STORE, 1, key(1)), key(2), Vec::new(), generator).await.unwrap();
    store
}

fn mark(number: u8) -> Mark {
    let intent = Recorded { seq: u64::from(number), hash: [number; 32] };
    Mark { change: ChangeId::from_bytes([number; 16]), intent }
}

fn name() -> RowName {
    rows::fixed(rows::ISSUED)
}

async fn write(ledger: &Ledger, number: u8) -> Result<(), WriteError> {
    let mut changeset = ledger.changeset();
    let payload = IssuedRecord { last: number.into() };
    match ledger.read::<IssuedRecord>(&name()).await.unwrap() {
        Some(record) => changeset.update(&record, &payload),
        None => changeset.insert(name(), &payload),
    }
    ledger.commit(changeset, &mark(number)).await.map(drop)
}

#[tokio::test]
async fn a_write_raises_seq_and_count_and_leaves_the_head_intact() {
    let store: Arc<dyn Store> = new_store().await;
    let ledger = open(&store).await;
    for number in 1..=3 {
        write(&ledger, number).await.unwrap();
        ledger.settle(&mark(number).change).await.unwrap();
    }
    let record = ledger.read::<IssuedRecord>(&name()).await.unwrap().unwrap();
    assert_eq!((record.seq, record.payload.last, ledger.head_count().await), (3, 3, 3));
    // The record itself and the last change: the settled ones are gone.
    assert_eq!(open(&store).await.check().await.unwrap(), Integrity::Intact { rows: 2 });
}

#[tokio::test]
async fn what_the_last_run_left_settled_goes_with_the_first_change_of_the_next() {
    let store: Arc<dyn Store> = new_store().await;
    write(&open(&store).await, 1).await.unwrap();
    let ledger = open(&store).await;
    ledger.settle_all().await.unwrap();
    write(&ledger, 2).await.unwrap();
    assert!(!ledger.happened(&mark(1).change).await.unwrap());
    assert!(ledger.happened(&mark(2).change).await.unwrap());
    assert!(matches!(ledger.check().await.unwrap(), Integrity::Intact { .. }));
}

#[tokio::test]
async fn an_edited_a_deleted_and_a_replayed_row_show() {
    let store = new_store().await;
    let shared: Arc<dyn Store> = Arc::<MemoryStore>::clone(&store);
    let ledger = open(&shared).await;
    write(&ledger, 1).await.unwrap();
    let old = store.get(&name()).await.unwrap().unwrap();
    write(&ledger, 2).await.unwrap();
    let now = store.get(&name()).await.unwrap().unwrap();
    let mut edited = now.bytes.clone();
    edited[20] ^= 1;
    for tampered in
        [Txn::new().put(name(), edited), Txn::new().put(name(), old.bytes), Txn::new().delete(name())]
    {
        store.commit(tampered).await.unwrap();
        assert!(matches!(open(&shared).await.check().await.unwrap(), Integrity::Broken { .. }));
        store.commit(Txn::new().put(name(), now.bytes.clone())).await.unwrap();
        assert!(matches!(open(&shared).await.check().await.unwrap(), Integrity::Intact { .. }));
    }
}

#[tokio::test]
async fn a_lost_reply_is_cleared_up_by_the_changes_own_record() {
    // A late one is found out before it can surprise anybody.
    for (fault, happened) in [(Fault::ReplyLost, true), (Fault::RequestLost, false), (Fault::Late, true)] {
        let flaky = Arc::new(Flaky::new(new_store().await));
        let store: Arc<dyn Store> = Arc::<Flaky>::clone(&flaky);
        let ledger = open(&store).await;
        flaky.inject(fault);
        let result = write(&ledger, 1).await;
        assert_eq!(result.is_ok(), happened, "{fault:?}: {result:?}");
        assert_eq!(ledger.happened(&mark(1).change).await.unwrap(), happened);
        write(&ledger, 2).await.unwrap();
        assert_eq!(ledger.happened(&mark(1).change).await.unwrap(), happened, "what was told stays true");
        assert!(matches!(ledger.check().await.unwrap(), Integrity::Intact { .. }));
    }
}

#[tokio::test]
async fn two_agents_on_one_store_do_not_lose_each_others_writes() {
    let store: Arc<dyn Store> = new_store().await;
    let (one, other) = (open(&store).await, open(&store).await);
    write(&one, 1).await.unwrap();
    // `other` has an old head, and the row is as it last read it.
    write(&other, 2).await.unwrap();
    let read = one.read::<IssuedRecord>(&name()).await.unwrap().unwrap();
    write(&other, 3).await.unwrap();
    let mut stale = one.changeset();
    stale.update(&read, &IssuedRecord { last: 9 });
    let refused = one.commit(stale, &mark(4)).await;
    assert!(matches!(refused, Err(WriteError::Conflict)), "{refused:?}");
    assert_eq!(one.read::<IssuedRecord>(&name()).await.unwrap().unwrap().payload.last, 3);
    assert!(matches!(one.check().await.unwrap(), Integrity::Intact { .. }));
}
