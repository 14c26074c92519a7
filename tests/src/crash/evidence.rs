//! What a trial leaves behind in the store, read by the agent's own library while no agent runs.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::ensure;
use fleet_kms_agent::ledger::Integrity;
use fleet_kms_agent::live_keyrings::LiveKeyrings;
use fleet_kms_agent::records::payload::{BackupRecord, IdentityRecord, KeyringRecord, TokenRecord};
use fleet_kms_agent::records::{epoch_of, keyring, rows};
use fleet_kms_agent::root::Root;
use fleet_kms_agent::storage::{self, Storage};
use fleet_kms_keyring::sealed::{self, Kind, SealContext};
use fleet_kms_keyring::{ClusterId, Keyring, SlotId, State};
use fleet_kms_seal::{SlotRecord, StoreKey, open_any};
use fleet_kms_store::{Row, SqliteStore, Store};

use super::template::{generator, temporary};
use crate::fleet::AGENT;

/// The rows of a store, as far as trials judge them.
pub struct StoreView {
    /// The head fits the rows.
    pub is_intact: bool,
    /// Versions whose KEK is missing or does not open.
    pub damaged: usize,
    /// Versions and states.
    pub keyrings: BTreeMap<ClusterId, Keyring>,
    /// The KEKs by row name.
    pub keks: BTreeMap<String, StoredKek>,
    /// The SPIFFE IDs of all identities.
    pub identities: BTreeSet<String>,
    /// Uses that are left of all tokens.
    pub uses_left: u32,
    /// The root slots.
    pub slots: BTreeSet<SlotId>,
    /// The epochs of the store key that rows are under, but for those of the store key's rotation itself.
    pub epochs: BTreeSet<u32>,
    /// Older store keys, which are there while the store key is rotated.
    pub older_store_keys: usize,
    /// The file of the last verified backup.
    pub backup: Option<PathBuf>,
}

/// A KEK as it is stored.
#[derive(PartialEq, Eq)]
pub struct StoredKek {
    bytes: Vec<u8>,
    epoch: Option<u32>,
    /// What it holds, if it is of the newest epoch.
    secret: Option<Vec<u8>>,
}

impl StoreView {
    /// Opens a store that no agent has open, and reads it.
    ///
    /// # Errors
    /// When the agent could not start with it either.
    pub async fn read(store: &Path, root: &Root) -> anyhow::Result<Self> {
        let storage = storage::open(store, root, AGENT, generator).await?;
        Self::of(storage, root).await
    }

    /// Reads a copy of a store, which an agent may have open if it has stopped or died.
    ///
    /// # Errors
    /// As [`StoreView::read`].
    pub async fn of_copy(store: &Path, root: &Root) -> anyhow::Result<Self> {
        let scratch = temporary()?;
        for suffix in ["", "-wal"] {
            let from = with_suffix(store, suffix);
            if from.exists() {
                fs::copy(&from, scratch.path().join(format!("store.db{suffix}")))?;
            }
        }
        Self::read(&scratch.path().join("store.db"), root).await
    }

    /// Reads a backup as `kms-agent backup verify` does, which has to be one and whole.
    ///
    /// # Errors
    /// When it does not verify.
    pub async fn of_backup(file: &Path, root: &Root) -> anyhow::Result<Self> {
        // A copy: what SQLite leaves beside a half one would be in nobody's way otherwise.
        let scratch = temporary()?;
        let copy = scratch.path().join("backup.db");
        fs::copy(file, &copy)?;
        let store: Arc<dyn Store> = Arc::new(SqliteStore::open_read_only(&copy)?);
        let slot = root.slot()?;
        let opened = storage::open_with((store, &copy), (&*slot, "the root key"), AGENT, generator).await?;
        let view = Self::of(opened, root).await?;
        ensure!(view.is_intact && view.damaged == 0, "it opens, and its rows are not what they were");
        Ok(view)
    }

    async fn of(storage: Storage, root: &Root) -> anyhow::Result<Self> {
        let Storage { ledger, store_keys, .. } = storage;
        let is_intact = matches!(ledger.check().await?, Integrity::Intact { .. });
        let mut keyrings = BTreeMap::new();
        for record in ledger.scan::<KeyringRecord>(rows::KEYRINGS).await? {
            keyrings.insert(keyring::cluster_of(&record)?, keyring::parse(&record)?);
        }
        let slots = ledger.scan_rows(rows::SLOTS).await?;
        let slots = slots.iter().map(|row| SlotRecord::parse(&row.bytes)).collect::<Result<Vec<_>, _>>()?;
        let (_, store_key) = open_any(&*root.slot()?, &slots, ledger.codec().store())?;
        let identities = ledger.scan::<IdentityRecord>(rows::IDENTITIES).await?;
        let tokens = ledger.scan::<TokenRecord>(rows::TOKENS).await?;
        let backup = ledger.read::<BackupRecord>(&rows::fixed(rows::BACKUP)).await?;
        let all = ledger.scan_rows("").await?;
        let keks = all.iter().filter(|row| row.name.as_str().starts_with(rows::KEKS));
        let keks = keks.map(|row| (row.name.as_str().to_owned(), StoredKek::of(row, &store_key))).collect();
        let (_, damaged) = LiveKeyrings::load(&ledger, store_keys, generator).await?;
        Ok(Self {
            is_intact,
            damaged: damaged.len(),
            keyrings,
            keks,
            identities: identities.into_iter().map(|record| record.payload.id).collect(),
            uses_left: tokens.iter().map(|token| token.payload.uses_left).sum(),
            slots: slots.iter().map(SlotRecord::slot).collect(),
            epochs: all.iter().filter(|row| has_epoch(row)).filter_map(|row| epoch_of(&row.bytes)).collect(),
            older_store_keys: all.iter().filter(|row| is_older_store_key(row)).count(),
            backup: backup.map(|record| record.payload.file.into()),
        })
    }

    /// The active version of a cluster.
    pub fn active(&self, cluster: &ClusterId) -> Option<u32> {
        self.keyrings.get(cluster).map(|keyring| keyring.active().version.get())
    }

    /// How many versions in use no backup holds.
    pub fn unbacked(&self) -> usize {
        self.keyrings.values().map(|keyring| keyring.unbacked().count()).sum()
    }

    /// Names what is not as it must be in a store that was `before`, whatever happened since.
    pub fn violations(&self, before: &Self) -> Vec<String> {
        let mut found = Vec::new();
        if !self.is_intact {
            found.push("the rows are not what the last transaction left".to_owned());
        }
        if self.damaged > 0 {
            found.push(format!("{} keys are missing or do not open", self.damaged));
        }
        for (row, kek) in &before.keks {
            if !self.keks.get(row).is_some_and(|now| kek.may_become(now)) {
                found.push(format!("{row} was lost or rewritten"));
            }
        }
        for (cluster, old) in &before.keyrings {
            match self.keyrings.get(cluster) {
                Some(new) => found.extend(lost_versions(old, new)),
                None => found.push(format!("the keyring of {cluster} was lost")),
            }
        }
        found.extend(self.keyrings.values().flat_map(reused_versions));
        found
    }
}

impl StoredKek {
    fn of(row: &Row, store_key: &StoreKey) -> Self {
        let epoch = epoch_of(&row.bytes);
        let (store, epoch_number) = (store_key.store(), store_key.epoch());
        let context = SealContext { store, row: row.name.as_bytes(), kind: Kind::Kek, epoch: epoch_number };
        let secret = sealed::open(&store_key.seal_key(), &context, &row.bytes).ok();
        Self { bytes: row.bytes.clone(), epoch, secret: secret.map(|secret| secret.to_vec()) }
    }

    /// A KEK is written once, and again only as the same key under a later store key.
    fn may_become(&self, now: &Self) -> bool {
        self.bytes == now.bytes
            || (now.epoch > self.epoch && now.secret.is_some() && now.secret == self.secret)
    }
}

fn is_older_store_key(row: &Row) -> bool {
    row.name.as_str().starts_with(rows::OLDER_STORE_KEYS)
}

fn has_epoch(row: &Row) -> bool {
    let name = row.name.as_str();
    name != rows::META && !name.starts_with(rows::SLOTS) && !is_older_store_key(row)
}

/// A keyring that parses has exactly one Active and one Next; this is about the past.
fn lost_versions(old: &Keyring, new: &Keyring) -> Vec<String> {
    let versions = old.versions().iter();
    let lost = versions.filter(|version| {
        let now = new.by_version(version.version);
        now.is_none_or(|now| now.key_id != version.key_id || now.state == State::Destroyed)
    });
    lost.map(|version| format!("version {} was lost or got another key id", version.version)).collect()
}

fn reused_versions(keyring: &Keyring) -> Vec<String> {
    let mut found = Vec::new();
    let ids: BTreeSet<_> = keyring.versions().iter().map(|version| *version.key_id.as_bytes()).collect();
    if ids.len() != keyring.versions().len() {
        found.push("two versions share a key id".to_owned());
    }
    let numbers = keyring.versions().iter().map(|version| version.version.get());
    if !numbers.eq(1..=u32::try_from(keyring.versions().len()).unwrap_or(u32::MAX)) {
        found.push("the versions have a gap".to_owned());
    }
    found
}

/// Appends to a path's last part.
pub fn with_suffix(path: &Path, suffix: &str) -> PathBuf {
    let mut path = path.as_os_str().to_owned();
    path.push(suffix);
    path.into()
}
