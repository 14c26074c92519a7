//! A root slot is removed while the agent serves, which renews the store key. Whatever is interrupted: either nothing
//! has begun, or the next start finishes it without being asked; every key opens all along with the slot that stays;
//! and in the end nothing is under the older store key, which the removed slot opens.

use anyhow::{Context, ensure};
use fleet_kms_agent::root::Root;

use super::{Acknowledged, Left};
use crate::crash::audit::AuditView;
use crate::crash::evidence::StoreView;
use crate::crash::site::{CommandsDisk, Site};

/// What the agent logs when the older store key is out of the store.
const DONE: &str = "every row is under the new store key";

pub(super) async fn rotate(
    site: &Site<'_>,
    disk: CommandsDisk<'_>,
    acknowledged: &mut Acknowledged,
) -> anyhow::Result<()> {
    remove(site, disk).await?;
    acknowledged.command = true;
    site.logged(DONE).await
}

pub(super) async fn look(site: &Site<'_>, acknowledged: &mut Acknowledged) -> anyhow::Result<Left> {
    let store = StoreView::of_copy(&site.config.store, &site.config.root).await?;
    acknowledged.violations.extend(store.violations(&site.template.before));
    let second = site.template.second.as_ref().context("a second slot")?;
    let left = Left { slot: store.slots.contains(&second.id), rotating: store.older_store_keys > 0 };
    if left.slot && (left.rotating || acknowledged.command) {
        acknowledged.violations.push(format!("the removed slot is there: {left:?}"));
    }
    Ok(left)
}

/// Without a word if the rotation has begun; else the operator removes the slot once more.
pub(super) async fn finish(site: &Site<'_>, left: Left) -> anyhow::Result<()> {
    if left.slot {
        remove(site, CommandsDisk::Sound).await?;
    }
    if left.slot || left.rotating {
        site.logged(DONE).await.context("the store key's rotation did not go on")?;
    }
    Ok(())
}

pub(super) async fn violations(
    site: &Site<'_>,
    store: &StoreView,
    audit: &AuditView,
) -> anyhow::Result<Vec<String>> {
    let second = site.template.second.as_ref().context("a second slot")?;
    let before = &site.template.before;
    let mut found = Vec::new();
    let renewed = before.epochs.iter().map(|epoch| epoch + 1).collect();
    if store.epochs != renewed || store.older_store_keys != 0 {
        let (epochs, older) = (&store.epochs, store.older_store_keys);
        found.push(format!("rows are under the store keys {epochs:?}, {older} older keys are left"));
    }
    let mut slots = before.slots.clone();
    slots.remove(&second.id);
    if store.slots != slots {
        found.push(format!("the slots are {:?}", store.slots));
    }
    let removed_slot = Root::File(second.file.clone());
    if StoreView::of_copy(&site.config.store, &removed_slot).await.is_ok() {
        found.push("the removed slot opens the store".to_owned());
    }
    let removed = audit.done("slot_remove");
    if removed != 1 {
        found.push(format!("the audit says that {removed} slots were removed"));
    }
    Ok(found)
}

async fn remove(site: &Site<'_>, disk: CommandsDisk<'_>) -> anyhow::Result<()> {
    let second = site.template.second.as_ref().context("a second slot")?;
    ensure!(second.file.exists(), "the second root key");
    site.run(&["slot", "remove", &second.id.to_string()], disk).await
}
