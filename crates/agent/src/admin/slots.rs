//! Root slots, to be seen only. Whatever changes one needs root keys in hand:
//! a removal seals the next store key for each slot that stays. Root keys are
//! never sent over this API, so that is done on the agent's host.

use axum::Json;
use fleet_kms_admin_api as api;
use fleet_kms_admin_api::{Page, SlotKind};
use fleet_kms_seal as seal;

use crate::admin::refusal::Refused;
use crate::admin::request::{Call, Paging};
use crate::authz::actions;
use crate::slots::Slot;
use crate::times::optional;

pub(super) async fn list(
    call: Call,
    Paging { limit, after }: Paging,
) -> Result<Json<Page<api::Slot>>, Refused> {
    let _permit = call.fleet::<actions::SlotList>()?;
    let slots = &call.agent().slots;
    let found = slots.list().await?;
    let mut items: Vec<_> =
        found.iter().map(|slot| view(slot, slot.record.slot() == slots.in_use())).collect();
    items.retain(|slot| after.as_ref().is_none_or(|after| slot.id > *after));
    items.sort_unstable_by(|one, other| one.id.cmp(&other.id));
    let more = items.len() > limit;
    items.truncate(limit);
    let next = items.last().filter(|_| more).map(|last| last.id.clone());
    Ok(Json(Page { items, next }))
}

fn view(slot: &Slot, in_use: bool) -> api::Slot {
    api::Slot {
        id: slot.record.slot().to_string(),
        kind: match slot.record.kind() {
            seal::SlotKind::File => SlotKind::File,
            seal::SlotKind::Passphrase => SlotKind::Passphrase,
        },
        label: slot.note.label.clone(),
        in_use,
        added: optional(slot.note.added_ms).map(Into::into),
        verified: optional(slot.note.verified_ms).map(Into::into),
    }
}
