use std::sync::Arc;

use fleet_kms_audit::{ChangeId, Recorded};
use fleet_kms_seal::FileSlot;
use fleet_kms_store::{MemoryStore, Store};
use tempfile::TempDir;

use super::*;
use crate::ledger::{Integrity, Mark};
use crate::promises::rig::{Clocks, Desk, create, generator, initialise, seed};

/// An agent's slots, over a store in memory.
struct Rig {
    desk: Desk,
    slots: Slots,
    _audit: TempDir,
}

impl Rig {
    async fn new() -> Self {
        seed(1);
        let (store, audit) = (Arc::new(MemoryStore::new()), tempfile::tempdir().unwrap());
        initialise(&*store).await;
        let desk = Desk::open(store as Arc<dyn Store>, audit.path(), &Clocks::new()).await;
        let (changes, keyrings) = (Arc::clone(&desk.changes), Arc::clone(&desk.keyrings));
        let path = audit.path().join("store.db");
        let backups = Backups::load(path, None, Arc::clone(&changes), Arc::clone(&keyrings)).await.unwrap();
        let in_use = SlotId::generate(&mut *generator());
        let slots = Slots::new(changes, keyrings, Arc::new(backups), in_use, generator);
        Self { desk, slots, _audit: audit }
    }

    async fn remove(&self, id: SlotId, staying: &str) -> Result<(), SlotsError> {
        let given: Vec<Box<dyn RootSlot>> = vec![Box::new(root(staying))];
        let id = id.to_string();
        let removal = Removal { id: &id, force: false, new_passphrase: false, given: &given };
        self.slots.remove(&removal).await.map(drop)
    }
}

/// A root key, all of one hex digit.
fn root(digit: &str) -> FileSlot {
    FileSlot::from_content(digit.repeat(64).as_bytes()).unwrap()
}

#[tokio::test]
async fn the_proof_of_a_change_without_recorded_outcome_survives_a_store_key_rotation() {
    let rig = Rig::new().await;
    create(&rig.desk, 1).await;
    let first = rig.slots.add(&root("a"), "a").await.unwrap();
    rig.slots.add(&root("b"), "b").await.unwrap();
    // As if the audit's disk had failed after the commit.
    let ledger = &rig.desk.ledger;
    let mark = |n| Mark { change: ChangeId::from_bytes([n; 16]), intent: Recorded { seq: 9, hash: [n; 32] } };
    let (open, settled) = (mark(7), mark(8));
    for mark in [&open, &settled] {
        ledger.commit(ledger.changeset(), mark).await.unwrap();
    }
    rig.remove(first, "b").await.unwrap();
    // As a start does with what a crash left.
    ledger.settle(&settled.change).await.unwrap();
    rig.slots.finish().await.unwrap();
    assert!(!rig.desk.keyrings.is_rotating());
    assert!(ledger.happened(&open.change).await.unwrap(), "the next start looks it up");
    assert!(!ledger.happened(&settled.change).await.unwrap(), "nobody needs it any more");
    assert!(matches!(ledger.check().await.unwrap(), Integrity::Intact { .. }));
}

#[tokio::test]
async fn a_slot_that_is_added_while_another_is_removed_opens_the_store_or_is_not_there() {
    let rig = Rig::new().await;
    let first = rig.slots.add(&root("a"), "a").await.unwrap();
    rig.slots.add(&root("b"), "b").await.unwrap();
    let third = root("c");
    let (added, removed) = tokio::join!(rig.slots.add(&third, "c"), rig.remove(first, "b"));
    // Only what the second needed was not given: the root key of a slot that was added meanwhile.
    assert!(removed.is_ok() || matches!(removed, Err(SlotsError::NotGiven { .. })), "{removed:?}");
    rig.slots.finish().await.unwrap();
    assert!(added.is_ok() || matches!(added, Err(SlotsError::Rotating)), "{added:?}");
    let codec = rig.desk.ledger.codec();
    let slots = rig.slots.list().await.unwrap();
    assert_eq!(slots.len(), 1 + usize::from(removed.is_err()) + usize::from(added.is_ok()));
    for Slot { record, .. } in slots {
        let roots = [&root("a"), &root("b"), &third];
        let epoch = roots.iter().find_map(|root| root.open(&record, codec.store()).ok()).unwrap().epoch();
        assert_eq!(epoch, codec.epoch(), "a slot for a store key that has gone");
    }
}
