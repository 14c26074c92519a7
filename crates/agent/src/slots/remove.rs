//! Removing a slot: one transaction that drops it, seals the next epoch's store
//! key for the slots that stay, and keeps the older key under the newer one
//! until every row is re-sealed.

use fleet_kms_keyring::SlotId;
use fleet_kms_seal::{PassphraseSlot, RootSlot, SlotKind, generate_passphrase};
use zeroize::Zeroizing;

use super::{Slot, Slots, SlotsError, flatten, orphaned_backup};
use crate::authz::internal;
use crate::records::payload::SlotNote;
use crate::records::rows;
use crate::trail::Intent;

/// What is to be removed, and how.
pub struct Removal<'a> {
    /// The slot, as typed.
    pub id: &'a str,
    /// Even the last that opens a kept backup.
    pub force: bool,
    /// Replaces passphrase slots whose passphrase is not given by a new one.
    pub new_passphrase: bool,
    /// Opens the slots that stay.
    pub given: &'a [Box<dyn RootSlot>],
}

/// What came of a removal.
pub struct Removed {
    /// Slots that are left.
    pub left: usize,
    /// The passphrase of the new slot: shown once, kept nowhere.
    pub passphrase: Option<Zeroizing<String>>,
}

/// A slot of the next epoch: the root key that seals it, its id and label.
struct Next<'a> {
    root: &'a dyn RootSlot,
    id: SlotId,
    note: SlotNote,
}

impl Slots {
    /// Removes a slot and begins the rotation of the store key.
    ///
    /// # Errors
    ///
    /// When the slot must stay, the root key of another is missing, or the
    /// store refuses.
    pub async fn remove(&self, removal: &Removal<'_>) -> Result<Removed, SlotsError> {
        let _one = self.one_at_a_time.lock().await;
        self.must_not_rotate().await?;
        let slots = self.list().await?;
        let unknown = || SlotsError::Unknown(removal.id.to_owned());
        let removed = slots.iter().map(|slot| slot.record.slot());
        let removed = removed.into_iter().find(|slot| slot.to_string() == removal.id).ok_or_else(unknown)?;
        let passphrase = removal.new_passphrase.then(|| generate_passphrase(&mut *(self.generator)()));
        let new = passphrase.clone().map(PassphraseSlot::existing);
        let next = self.next_slots(&slots, removed, removal, new.as_ref())?;
        let left: Vec<SlotId> = next.iter().map(|next| next.id).collect();
        if !removal.force
            && let Some(backup) = orphaned_backup(&self.backups, &left, removed).await?
        {
            return Err(SlotsError::LastOfBackup { slot: removed, backup });
        }
        self.begin(&slots, &next, removed).await?;
        self.rotate.notify_one();
        Ok(Removed { left: left.len(), passphrase })
    }

    /// Finds the root key of each slot that stays; it has to open the slot now.
    fn next_slots<'a>(
        &self,
        slots: &[Slot],
        removed: SlotId,
        removal: &'a Removal<'_>,
        new: Option<&'a PassphraseSlot>,
    ) -> Result<Vec<Next<'a>>, SlotsError> {
        let mut next = Vec::new();
        for slot in slots.iter().filter(|slot| slot.record.slot() != removed) {
            let (id, kind) = (slot.record.slot(), slot.record.kind());
            let opens = |root: &&dyn RootSlot| {
                root.kind() == kind
                    && self.keyrings.test_slot(&internal::slots(), *root, &slot.record).is_ok()
            };
            match removal.given.iter().map(|root| &**root).find(opens) {
                Some(root) => next.push(Next { root, id, note: self.note_of(&slot.note.label) }),
                None if kind == SlotKind::Passphrase && new.is_some() => {}
                None => return Err(SlotsError::NotGiven { slot: id, kind }),
            }
        }
        // Opened just now: each slot that stays is verified. A new passphrase is
        // not, before somebody has typed it.
        if next.is_empty() {
            let others = slots.iter().any(|slot| slot.record.slot() != removed);
            return Err(if others { SlotsError::LastVerified(removed) } else { SlotsError::NoneLeft });
        }
        if let Some(new) = new {
            let id = SlotId::generate(&mut *(self.generator)());
            let note = SlotNote { verified_ms: 0, ..self.note_of("recovery passphrase") };
            next.push(Next { root: new, id, note });
        }
        Ok(next)
    }

    /// Writes the slots of the next epoch in one transaction, and goes on under
    /// its key before another change begins.
    async fn begin(&self, slots: &[Slot], next: &[Next<'_>], removed: SlotId) -> Result<(), SlotsError> {
        let seal: Vec<_> = next.iter().map(|next| (next.id, next.root)).collect();
        let epoch = self.keyrings.next_epoch(&internal::slots(), &seal)?;
        let intent = Intent::new("slot_remove", "host").target(removed.to_string());
        let intent = intent.detail("epoch", epoch.number().to_string());
        let prepare = || async {
            let ledger = self.changes.ledger();
            let mut changeset = ledger.changeset();
            for slot in slots {
                let id = slot.record.slot();
                match epoch.slots().iter().find(|new| new.slot() == id) {
                    Some(new) => changeset.replace_sealed(&slot.row, new.encode()),
                    None => changeset.delete_sealed(&slot.row),
                }
                if let Some(note) = ledger.read::<SlotNote>(&rows::slot_note(&id)).await? {
                    changeset.delete(&note);
                }
            }
            for new in epoch.slots() {
                if !slots.iter().any(|slot| slot.record.slot() == new.slot()) {
                    changeset.insert_sealed(rows::slot(&new.slot()), new.encode());
                }
            }
            let (row, older) = epoch.older();
            changeset.insert_sealed(row.clone(), older.to_vec());
            Ok::<_, SlotsError>((changeset, ()))
        };
        // A lost reply leaves the store with the older key under the newer one:
        // this process goes on under the older, the next start finishes.
        self.changes.run(intent, prepare).await.map_err(flatten)?;
        self.changes
            .between_changes(|| async {
                self.changes.ledger().add_epoch(epoch.key()).await;
                self.keyrings.begin_epoch(&internal::slots(), epoch);
            })
            .await;
        for next in next.iter().filter(|next| next.note.verified_ms != 0) {
            self.note(next.id, &next.note.label, "slot_kept").await?;
        }
        Ok(())
    }
}
