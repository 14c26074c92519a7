//! Root slots and the epochs of the store key: what needs the store key itself
//! and is no call of a node.

use fleet_kms_keyring::SlotId;
use fleet_kms_keyring::sealed::Kind;
use fleet_kms_seal::{RootSlot, SlotError, SlotRecord, StoreKey};
use fleet_kms_store::{Row, RowName};

use super::{KeysError, LiveKeyrings, SealedKek, Snapshot, StoreKeys};
use crate::authz::{FleetPermit, actions};
use crate::records::rows;

/// The next epoch: its key, sealed for the slots that stay, and the key of the
/// epoch before under it.
pub struct NextEpoch {
    key: StoreKey,
    slots: Vec<SlotRecord>,
    older: (RowName, Vec<u8>),
}

impl NextEpoch {
    /// Returns its number.
    pub fn number(&self) -> u32 {
        self.key.epoch()
    }

    /// Returns its slots.
    pub fn slots(&self) -> &[SlotRecord] {
        &self.slots
    }

    /// Returns the row of the older key, and what it holds.
    pub fn older(&self) -> (&RowName, &[u8]) {
        (&self.older.0, &self.older.1)
    }

    /// Returns its key, for the ledger to derive its own from.
    pub(crate) fn key(&self) -> &StoreKey {
        &self.key
    }
}

impl LiveKeyrings {
    /// Seals the store key for a new slot, which has to open it again.
    ///
    /// # Errors
    ///
    /// When the agent is locked or the slot does not work.
    pub fn seal_slot(
        &self,
        _permit: &FleetPermit<actions::Slots>,
        slot: &dyn RootSlot,
        id: SlotId,
    ) -> Result<SlotRecord, SlotSealError> {
        let keys = self.store_keys()?;
        let record = slot.seal(keys.current(), id, &mut *(self.generator)())?;
        slot.open(&record, keys.current().store())?;
        Ok(record)
    }

    /// Looks whether a root key opens a slot.
    ///
    /// # Errors
    ///
    /// When it does not.
    pub fn test_slot(
        &self,
        _permit: &FleetPermit<actions::Slots>,
        slot: &dyn RootSlot,
        record: &SlotRecord,
    ) -> Result<(), SlotError> {
        let refused = SlotError::DoesNotOpen { kind: slot.kind() };
        let store = self.store_keys.load().as_ref().map(|keys| keys.current().store());
        slot.open(record, store.ok_or(refused)?).map(drop)
    }

    /// Makes the key of the next epoch and seals it for these slots.
    ///
    /// # Errors
    ///
    /// When the agent is locked or a slot does not work.
    pub fn next_epoch(
        &self,
        _permit: &FleetPermit<actions::Slots>,
        slots: &[(SlotId, &dyn RootSlot)],
    ) -> Result<NextEpoch, SlotSealError> {
        let keys = self.store_keys()?;
        let older = keys.current();
        let mut rng = (self.generator)();
        let key = StoreKey::generate(older.store(), older.epoch() + 1, &mut *rng);
        let mut records = Vec::new();
        for (id, slot) in slots {
            let record = slot.seal(&key, *id, &mut *rng)?;
            slot.open(&record, key.store())?;
            records.push(record);
        }
        let row = rows::older_store_key(older.epoch());
        let sealed = older.seal_under(&key, row.as_bytes(), &mut *rng);
        Ok(NextEpoch { key, slots: records, older: (row, sealed) })
    }

    /// Seals under the next epoch from now on; the one before is still opened.
    pub(crate) fn begin_epoch(&self, _permit: &FleetPermit<actions::Slots>, next: NextEpoch) {
        if let Some(keys) = self.store_keys.load_full() {
            self.store_keys.store(Some(keys.with_newer(next.key).into()));
        }
    }

    /// Says whether rows of an older epoch are still to be re-sealed.
    pub fn is_rotating(&self) -> bool {
        self.store_keys.load().as_ref().is_some_and(|keys| keys.older().is_some())
    }

    /// Seals a row's content under the newest key; `None` when it is.
    ///
    /// # Errors
    ///
    /// When the agent is locked or the row is damaged.
    pub fn reseal(
        &self,
        _permit: &FleetPermit<actions::Slots>,
        row: &Row,
        kind: Kind,
    ) -> Result<Option<Vec<u8>>, KeysError> {
        let keys = self.store_keys()?;
        if keys.is_current(&row.bytes) {
            return Ok(None);
        }
        let opened = keys.open(&row.name, kind, &row.bytes)?;
        Ok(Some(keys.seal(&row.name, kind, &opened, &mut *(self.generator)())))
    }

    /// Brings the sealed KEKs in memory under the newest key.
    pub(crate) fn reseal_in_memory(&self, _permit: &FleetPermit<actions::Slots>) {
        let Some(keys) = self.store_keys.load_full() else { return };
        for live in self.clusters.load().values() {
            live.snapshot.rcu(|snapshot| {
                let all = snapshot.keks.values().all(|kek| keys.is_current(&kek.bytes));
                if all { snapshot.clone() } else { self.resealed(snapshot, &keys).into() }
            });
        }
    }

    /// Forgets the key of the epoch before.
    pub(crate) fn end_epoch(&self, _permit: &FleetPermit<actions::Slots>) {
        if let Some(keys) = self.store_keys.load_full() {
            self.store_keys.store(Some(keys.without_older().into()));
        }
    }

    fn resealed(&self, snapshot: &Snapshot, keys: &StoreKeys) -> Snapshot {
        let reseal = |kek: &SealedKek| match keys.open_kek(kek) {
            Ok(opened) => SealedKek {
                row: kek.row.clone(),
                bytes: keys.seal_kek(&kek.row, &opened, &mut *(self.generator)()),
            },
            // Damaged before: it stays as it is.
            Err(_) => kek.clone(),
        };
        let keks = snapshot.keks.iter().map(|(version, kek)| (*version, reseal(kek))).collect();
        Snapshot { revision: snapshot.revision, keyring: snapshot.keyring.clone(), keks }
    }
}

/// Why a slot was not sealed.
#[derive(Debug, thiserror::Error)]
pub enum SlotSealError {
    /// The agent is locked.
    #[error(transparent)]
    Keys(#[from] KeysError),
    /// The slot does not work.
    #[error(transparent)]
    Slot(#[from] SlotError),
}
