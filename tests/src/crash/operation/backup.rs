//! `kms-agent backup FILE` while the agent serves. Whatever is interrupted: the file is absent, or the older backup,
//! or a whole new one; nothing half-made verifies; and the store never says that a version is in a backup that it is
//! not in.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::ensure;

use super::{Acknowledged, Left};
use crate::crash::audit::AuditView;
use crate::crash::evidence::StoreView;
use crate::crash::site::{CommandsDisk, Site};
use crate::crash::template::SAVED;

pub(super) async fn make(
    site: &Site<'_>,
    disk: CommandsDisk<'_>,
    acknowledged: &mut Acknowledged,
) -> anyhow::Result<()> {
    site.run(&["backup", &file(site).to_string_lossy()], disk).await?;
    acknowledged.command = true;
    Ok(())
}

pub(super) async fn look(site: &Site<'_>, acknowledged: &mut Acknowledged) -> anyhow::Result<Left> {
    let before = &site.template.before;
    let store = StoreView::of_copy(&site.config.store, &site.config.root).await?;
    let found = &mut acknowledged.violations;
    found.extend(store.violations(before));
    let is_whole = is_whole(site, found).await?;
    let is_noted = store.backup.as_deref() == Some(&*file(site)) || store.unbacked() < before.unbacked();
    if (is_noted || acknowledged.command) && !is_whole {
        let who = if is_noted { "the store" } else { "the command" };
        found.push(format!("{who} says that the backup is good, and it is not there"));
    }
    for half in leftovers(&site.disk)? {
        if let Ok(view) = StoreView::of_backup(&half, &site.config.root).await {
            let half = half.display();
            found.extend(view.violations(before).iter().map(|lacks| format!("{half} verifies, yet {lacks}")));
        }
    }
    Ok(Left::default())
}

pub(super) async fn finish(site: &Site<'_>) -> anyhow::Result<()> {
    site.run(&["backup", &file(site).to_string_lossy()], CommandsDisk::Sound).await
}

pub(super) async fn violations(
    site: &Site<'_>,
    store: &StoreView,
    audit: &AuditView,
) -> anyhow::Result<Vec<String>> {
    let mut found = Vec::new();
    ensure!(is_whole(site, &mut found).await?, "the second backup is no whole one: {found:?}");
    if store.backup.as_deref() != Some(&*file(site)) || store.unbacked() > 0 {
        found.push(format!("{} versions are in no backup, the last is {:?}", store.unbacked(), store.backup));
    }
    let noted = audit.done("backup");
    if !(1..=2).contains(&noted) {
        found.push(format!("the audit says that {noted} backups were noted"));
    }
    let left: Vec<PathBuf> = leftovers(&site.disk)?;
    if !left.is_empty() {
        found.push(format!("after the second backup there is still {left:?}"));
    }
    Ok(found)
}

fn file(site: &Site<'_>) -> PathBuf {
    site.disk.join(SAVED)
}

/// Says whether the new backup is there and whole; absent and the older one are right as well, but are not it.
async fn is_whole(site: &Site<'_>, found: &mut Vec<String>) -> anyhow::Result<bool> {
    let file = file(site);
    if !file.exists() || Some(fs::read(&file)?) == site.template.saved {
        return Ok(false);
    }
    match StoreView::of_backup(&file, &site.config.root).await {
        Ok(view) => {
            let lacks = view.violations(&site.template.before);
            let is_whole = lacks.is_empty();
            found.extend(lacks.iter().map(|lacks| format!("the backup verifies, yet {lacks}")));
            Ok(is_whole)
        }
        Err(error) => {
            found.push(format!("the backup is neither the older one nor a whole new one: {error:#}"));
            Ok(false)
        }
    }
}

/// What a backup is made of before it has its name.
fn leftovers(directory: &Path) -> anyhow::Result<Vec<PathBuf>> {
    let mut left = Vec::new();
    for entry in fs::read_dir(directory)? {
        let path = entry?.path();
        let name = path.to_string_lossy();
        if name.contains(".partial") || name.contains(".handover") {
            left.push(path);
        }
    }
    Ok(left)
}
