//! What a trial leaves behind, read by the agent's own library while no agent runs: the store, and the audit.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;

use anyhow::Context;
use fleet_kms_agent::config::Config;
use fleet_kms_agent::ledger::Integrity;
use fleet_kms_agent::live_keyrings::LiveKeyrings;
use fleet_kms_agent::records::payload::{IdentityRecord, KeyringRecord, TokenRecord};
use fleet_kms_agent::records::{keyring, rows};
use fleet_kms_agent::storage::{self, Storage};
use fleet_kms_keyring::{ClusterId, Keyring, State};
use serde_json::Value;

use super::template::generator;
use crate::fleet::AGENT;

/// The rows of a store, as far as trials judge them.
pub struct StoreView {
    /// The head fits the rows.
    pub is_intact: bool,
    /// Versions whose KEK is missing or does not open.
    pub damaged: usize,
    /// Versions and states.
    pub keyrings: BTreeMap<ClusterId, Keyring>,
    /// The sealed KEKs by row name.
    pub keks: BTreeMap<String, Vec<u8>>,
    /// The SPIFFE IDs of all identities.
    pub identities: BTreeSet<String>,
    /// Uses that are left of all tokens.
    pub uses_left: u32,
}

impl StoreView {
    /// Opens a store that no agent has open, and reads it.
    ///
    /// # Errors
    /// When the agent could not start with it either.
    pub async fn read(config: &Config) -> anyhow::Result<Self> {
        let Storage { ledger, store_keys, .. } =
            storage::open(&config.store, &config.root, AGENT, generator).await?;
        let is_intact = matches!(ledger.check().await?, Integrity::Intact { .. });
        let mut keyrings = BTreeMap::new();
        for record in ledger.scan::<KeyringRecord>(rows::KEYRINGS).await? {
            keyrings.insert(keyring::cluster_of(&record)?, keyring::parse(&record)?);
        }
        let keks = ledger.scan_rows(rows::KEKS).await?;
        let identities = ledger.scan::<IdentityRecord>(rows::IDENTITIES).await?;
        let tokens = ledger.scan::<TokenRecord>(rows::TOKENS).await?;
        let (_, damaged) = LiveKeyrings::load(&ledger, store_keys, generator).await?;
        Ok(Self {
            is_intact,
            damaged: damaged.len(),
            keyrings,
            keks: keks.into_iter().map(|row| (row.name.as_str().to_owned(), row.bytes)).collect(),
            identities: identities.into_iter().map(|record| record.payload.id).collect(),
            uses_left: tokens.iter().map(|token| token.payload.uses_left).sum(),
        })
    }

    /// The active version of a cluster.
    pub fn active(&self, cluster: &ClusterId) -> Option<u32> {
        self.keyrings.get(cluster).map(|keyring| keyring.active().version.get())
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
        for (row, bytes) in &before.keks {
            if self.keks.get(row) != Some(bytes) {
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

/// The chain of changes: what was intended, and what came of it.
#[derive(Default)]
pub struct AuditView {
    /// Of each change: what was to be done, and the last outcome.
    changes: BTreeMap<String, (String, Option<String>)>,
}

impl AuditView {
    /// Reads the chain without judging it; a torn last line is left out.
    ///
    /// # Errors
    /// When a file cannot be read.
    pub fn read(directory: &Path) -> anyhow::Result<Self> {
        let mut view = Self::default();
        let mut files: Vec<_> = fs::read_dir(directory)?.collect::<Result<_, _>>()?;
        files.sort_by_key(fs::DirEntry::file_name);
        for file in files {
            let name = file.file_name().to_string_lossy().into_owned();
            if name.starts_with("changes-") && name.ends_with(".jsonl") {
                view.take(&fs::read(file.path())?);
            }
        }
        Ok(view)
    }

    fn take(&mut self, bytes: &[u8]) {
        for line in bytes.split(|byte| *byte == b'\n') {
            let Ok(line) = serde_json::from_slice::<Value>(line) else { continue };
            let text = |field: &str| line.get(field).and_then(Value::as_str).map(str::to_owned);
            let Some(change) = text("change") else { continue };
            let entry = self.changes.entry(change).or_default();
            match text("kind").as_deref() {
                Some("intent") => entry.0 = text("action").unwrap_or_default(),
                Some("outcome") => entry.1 = text("outcome"),
                _ => {}
            }
        }
    }

    /// The changes whose outcome is not recorded.
    pub fn open(&self) -> BTreeSet<String> {
        let open = self.changes.iter().filter(|(_, (_, outcome))| outcome.is_none());
        open.map(|(change, _)| change.clone()).collect()
    }

    /// Whether this change is recorded as done.
    pub fn is_done(&self, change: &str) -> bool {
        self.changes.get(change).is_some_and(|(_, outcome)| outcome.as_deref() == Some("done"))
    }

    /// How many changes of this kind are recorded as done.
    pub fn done(&self, action: &str) -> usize {
        self.changes.values().filter(|(what, end)| what == action && end.as_deref() == Some("done")).count()
    }

    /// How many changes there are, whatever came of them.
    pub fn intents(&self) -> usize {
        self.changes.len()
    }

    /// Names what is not as it must be once an agent has started again.
    ///
    /// # Errors
    /// When the chains cannot be read.
    pub fn violations(&self, directory: &Path) -> anyhow::Result<Vec<String>> {
        let mut found = Vec::new();
        let report = fleet_kms_audit::verify(directory).context("reading the audit")?;
        if !report.is_sound() {
            found.push(format!("the audit does not verify: {report:?}"));
        }
        for (change, (action, outcome)) in &self.changes {
            match outcome.as_deref() {
                Some("done" | "not done") => {}
                other => found.push(format!("{action} {change} has the outcome {other:?}")),
            }
            if action.is_empty() {
                found.push(format!("{change} has an outcome and no intent"));
            }
        }
        Ok(found)
    }
}
