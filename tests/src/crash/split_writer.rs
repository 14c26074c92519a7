//! A writer that is wrong on purpose: each transaction of the agent becomes two of the store. Trials must see it.
//!
//! It stands in for the agent in a process of its own, so that the shim can kill it between the halves.

use std::path::Path;
use std::sync::Arc;

use async_trait::async_trait;
use fleet_kms_agent::authz::internal;
use fleet_kms_agent::changes::Changes as ChangeMaker;
use fleet_kms_agent::clusters::Clusters;
use fleet_kms_agent::control_plane::ControlPlane;
use fleet_kms_agent::live_keyrings::LiveKeyrings;
use fleet_kms_agent::storage::{self, Storage};
use fleet_kms_agent::witness::Witness;
use fleet_kms_audit::ChangeLog;
use fleet_kms_store::{
    Changes, CommitError, Operation, ReadError, Revision, Row, RowName, SqliteStore, Store, Txn,
};

use super::node::clock;
use super::template::{generator, load};
use crate::child::Spec;
use crate::fleet::AGENT;

/// Where the process finds its configuration.
const CONFIG: &str = "FLEET_KMS_SPLIT_WRITER";
/// The test that such a process runs.
const TEST: &str = "split_writer";

/// The process: this test program again, running only its ignored test `split_writer`.
///
/// # Errors
/// When the path of this program is not known.
pub fn process(config: &Path, logs: &Path) -> anyhow::Result<Spec> {
    let program = std::env::current_exe()?;
    let spec = Spec::new("split-writer", &program, logs).args([TEST, "--exact", "--ignored"]);
    Ok(spec.env(CONFIG, config))
}

/// Rotates the due clusters of the store that the environment names, each in two halves; nothing without that.
///
/// # Errors
/// When the store cannot be used.
pub async fn rotate() -> anyhow::Result<()> {
    let Some(config) = std::env::var_os(CONFIG) else { return Ok(()) };
    let config = load(Path::new(&config))?;
    let split: Arc<dyn Store> = Arc::new(SplitWriter(SqliteStore::open(&config.store)?));
    let root = (&*config.root.slot()?, "the root key");
    let Storage { ledger, store_keys, .. } =
        storage::open_with((split, &config.store), root, AGENT, generator).await?;
    let (keyrings, _) = LiveKeyrings::load(&ledger, store_keys, generator).await?;
    let clusters = Arc::new(Clusters::load(&ledger).await?);
    let (log, witness) = (ChangeLog::open(&config.audit)?, Witness::new(&config.audit));
    let changes = Arc::new(ChangeMaker::new(ledger, log, witness, None, clock(), generator));
    let due = keyrings.keyrings();
    let control_plane = ControlPlane::new(changes, Arc::new(keyrings), clusters, config.rotation, generator);
    for (cluster, snapshot) in due {
        control_plane.rotate_due(&internal::schedule(cluster), snapshot.keyring.active().version).await?;
    }
    Ok(())
}

struct SplitWriter(SqliteStore);

#[async_trait]
impl Store for SplitWriter {
    async fn get(&self, name: &RowName) -> Result<Option<Row>, ReadError> {
        self.0.get(name).await
    }

    async fn page_rows(
        &self,
        prefix: &str,
        after: Option<&RowName>,
        limit: usize,
    ) -> Result<Vec<Row>, ReadError> {
        self.0.page_rows(prefix, after, limit).await
    }

    async fn page_revisions(
        &self,
        prefix: &str,
        after: Option<&RowName>,
        limit: usize,
    ) -> Result<Vec<(RowName, Revision)>, ReadError> {
        self.0.page_revisions(prefix, after, limit).await
    }

    async fn commit(&self, txn: Txn) -> Result<Revision, CommitError> {
        let (first, second) = txn.operations().split_at(txn.operations().len() / 2);
        let conditions = txn.conditions().iter();
        let start = conditions.fold(Txn::new(), |txn, (row, revision)| txn.expect(row.clone(), *revision));
        if !first.is_empty() {
            self.0.commit(with(start, first)).await?;
        }
        self.0.commit(with(Txn::new(), second)).await
    }

    fn changes(&self, prefix: &str) -> Changes {
        self.0.changes(prefix)
    }
}

fn with(txn: Txn, operations: &[Operation]) -> Txn {
    operations.iter().fold(txn, |txn, operation| match operation {
        Operation::Put(row, bytes) => txn.put(row.clone(), bytes.clone()),
        Operation::Delete(row) => txn.delete(row.clone()),
    })
}
