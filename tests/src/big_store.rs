//! Fills the store of an agent that does not run with many clusters, in process and past the admin API, which would
//! take minutes.

use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use anyhow::Context;
use fleet_kms_agent::authz::internal;
use fleet_kms_agent::changes::Changes;
use fleet_kms_agent::config::{Config, PREFIX, RawConfig};
use fleet_kms_agent::ledger::{Changeset, Ledger, LedgerError};
use fleet_kms_agent::live_keyrings::LiveKeyrings;
use fleet_kms_agent::max_offline::MaxOffline;
use fleet_kms_agent::records::payload::{ClusterRecord, NameRecord};
use fleet_kms_agent::records::{keyring, rows};
use fleet_kms_agent::storage;
use fleet_kms_agent::times::to_ms;
use fleet_kms_agent::trail::Intent;
use fleet_kms_agent::witness::Witness;
use fleet_kms_audit::ChangeLog;
use fleet_kms_keyring::rotation::RotationPolicy;
use fleet_kms_keyring::{ClusterId, KeyId, Keyring, Rotate};
use fleet_kms_process::{clock, config};

/// Operations that one transaction leaves for the clusters.
const OPERATIONS: usize = 80;
/// Records of a cluster beside its KEKs.
const RECORDS: usize = 3;

/// How many clusters to make, and how old they look.
#[derive(Debug, Clone, Copy)]
pub struct Fill {
    /// How many.
    pub clusters: usize,
    /// Versions of each, at least 2.
    pub versions: usize,
    /// When the active version became active.
    pub activated: SystemTime,
}

/// The generator of programs, for the in-process parts of an agent.
pub fn generator() -> Box<dyn rand_core::CryptoRng + Send> {
    Box::new(rand_core::UnwrapErr(getrandom::SysRng))
}

/// Reads an agent's configuration file.
///
/// # Errors
/// When it is not one.
pub fn load_config(file: &Path) -> anyhow::Result<Config> {
    Ok(config::load_as::<RawConfig, Config>(file, PREFIX)?)
}

/// The parts of an agent that keep keys, over its real store and audit.
pub struct Opened {
    /// All access to the store.
    pub ledger: Arc<Ledger>,
    /// The keys.
    pub keyrings: Arc<LiveKeyrings>,
    /// Makes changes.
    pub changes: Arc<Changes>,
}

/// Opens an agent's store and audit in this process; the agent must not run.
///
/// # Errors
/// When they cannot be opened.
pub async fn open(config: &Config) -> anyhow::Result<Opened> {
    let storage = storage::open(&config.store, &config.root, config.name.as_str(), generator).await?;
    let (keyrings, _) = LiveKeyrings::load(&storage.ledger, storage.store_keys, generator).await?;
    let log = ChangeLog::open(&config.audit)?;
    let witness = Witness::new(&config.audit);
    let ledger = storage.ledger;
    let changes = Changes::new(Arc::clone(&ledger), log, witness, None, Arc::new(clock::now), generator);
    Ok(Opened { ledger, keyrings: Arc::new(keyrings), changes: Arc::new(changes) })
}

/// Makes clusters named `edge-1`, `edge-2`, …
///
/// # Errors
/// When the store does not take them.
pub async fn fill(config: &Config, fill: Fill) -> anyhow::Result<()> {
    let opened = open(config).await?;
    let each = RECORDS + fill.versions;
    let numbers: Vec<usize> = (1..=fill.clusters).collect();
    for batch in numbers.chunks((OPERATIONS / each).max(1)) {
        let made: Vec<Made> =
            batch.iter().map(|number| make(&opened.keyrings, *number, fill)).collect::<Result<_, _>>()?;
        let prepare = || async {
            let mut changeset = opened.ledger.changeset();
            made.iter().for_each(|made| made.add_to(&mut changeset));
            Ok::<_, LedgerError>((changeset, ()))
        };
        let done = opened.changes.run(Intent::new("fill", "test"), prepare).await;
        done.context("a batch of clusters")?;
    }
    Ok(())
}

/// One cluster's rows.
struct Made {
    id: ClusterId,
    name: String,
    created: SystemTime,
    keyring: Keyring,
    keks: HashMap<fleet_kms_store::RowName, Vec<u8>>,
}

fn make(keyrings: &LiveKeyrings, number: usize, fill: Fill) -> anyhow::Result<Made> {
    let period = RotationPolicy::default().period();
    let rotations = u32::try_from(fill.versions.saturating_sub(2))?;
    let created = fill.activated - period * rotations;
    let mut key_id = |_| KeyId::generate(&mut *generator());
    let mut keyring = Keyring::create(RotationPolicy::default(), created, &mut key_id);
    for rotation in 1..=rotations {
        keyring.rotate(Rotate::Regular, created + period * rotation, &mut key_id)?;
    }
    let id = ClusterId::generate(&mut *generator());
    let permit = internal::schedule(id);
    let mut keks = HashMap::new();
    for version in keyring.versions() {
        let kek = keyrings.make_kek(&permit, version.version)?;
        keks.insert(kek.row, kek.bytes);
    }
    Ok(Made { id, name: format!("edge-{number}"), created, keyring, keks })
}

impl Made {
    fn add_to(&self, changeset: &mut Changeset) {
        let cluster = ClusterRecord {
            id: self.id.as_bytes().to_vec(),
            name: self.name.clone(),
            created_ms: to_ms(self.created),
            retired_ms: 0,
            max_offline_seconds: MaxOffline::DEFAULT.time().as_secs(),
        };
        changeset.insert(rows::cluster(&self.id), &cluster);
        changeset
            .insert(rows::cluster_name(&self.name), &NameRecord { cluster: self.id.as_bytes().to_vec() });
        changeset.insert(rows::keyring(&self.id), &keyring::payload(&self.keyring));
        for (row, bytes) in &self.keks {
            changeset.insert_sealed(row.clone(), bytes.clone());
        }
    }
}

/// A day, of which tests need many.
pub const DAY: Duration = Duration::from_secs(86_400);
