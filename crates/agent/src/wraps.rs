//! Writes the counted wraps into rows of their own, so that a count never
//! stands in the way of a change of a keyring.
//!
//! Nothing depends on these numbers but a hint: they are not audited, a crash
//! loses what was counted since the last flush, and they never refuse a wrap.

use std::sync::Arc;
use std::time::Duration;

use fleet_kms_keyring::rotation::WRAPS_HINT;
use fleet_kms_keyring::{ClusterId, Version};
use tokio_util::sync::CancellationToken;

use crate::changes::Changes;
use crate::errors::chain;
use crate::ledger::{Changeset, Ledger, LedgerError, WriteError};
use crate::live_keyrings::{LiveKeyrings, WrapCounts};
use crate::records::payload::{VersionWraps, WrapsRecord};
use crate::records::rows;

/// Counted wraps are flushed so often: within a minute, however long a flush takes.
const FLUSH_EVERY: Duration = Duration::from_secs(30);
/// Clusters in one transaction; it leaves room for the head.
const BATCH: usize = 90;

/// Why counts were not stored.
#[derive(Debug, thiserror::Error)]
pub enum FlushError {
    /// The store cannot be read.
    #[error(transparent)]
    Ledger(#[from] LedgerError),
    /// The store did not take them.
    #[error(transparent)]
    Write(#[from] WriteError),
}

/// Flushes until `stop`.
pub async fn run(keyrings: Arc<LiveKeyrings>, changes: Arc<Changes>, stop: CancellationToken) {
    loop {
        tokio::select! {
            () = stop.cancelled() => return,
            () = tokio::time::sleep(FLUSH_EVERY) => {}
        }
        if let Err(error) = flush(&keyrings, &changes).await {
            let error = chain(&error);
            tracing::warn!(error, "the counted wraps cannot be stored; they are tried again");
        }
    }
}

/// Stores what was counted since the last flush.
///
/// # Errors
///
/// When the store does not take it; it is then stored by a later flush.
pub async fn flush(keyrings: &LiveKeyrings, changes: &Changes) -> Result<(), FlushError> {
    changes.beside_changes(|| flush_all(keyrings, changes.ledger())).await.unwrap_or(Ok(()))
}

async fn flush_all(keyrings: &LiveKeyrings, ledger: &Ledger) -> Result<(), FlushError> {
    let taken = keyrings.take_wraps();
    for (done, batch) in taken.chunks(BATCH).enumerate() {
        if let Err(error) = flush_batch(keyrings, ledger, batch).await {
            // Counts of an unclear commit are given up: twice would be worse than not at all.
            let unclear = usize::from(matches!(error, FlushError::Write(WriteError::Unknown(_))));
            for (cluster, counts) in taken.iter().skip((done + unclear) * BATCH) {
                keyrings.put_back_wraps(cluster, counts);
            }
            return Err(error);
        }
    }
    Ok(())
}

async fn flush_batch(
    keyrings: &LiveKeyrings,
    ledger: &Ledger,
    batch: &[(ClusterId, WrapCounts)],
) -> Result<(), FlushError> {
    let mut changeset = ledger.changeset();
    let mut totals = Vec::with_capacity(batch.len());
    for (cluster, counts) in batch {
        totals.push((*cluster, add(ledger, &mut changeset, cluster, counts).await?));
    }
    ledger.commit_counts(changeset).await?;
    for (cluster, total) in totals {
        keyrings.set_flushed_wraps(&cluster, total);
    }
    Ok(())
}

/// Adds counts to what the row has; returns the sums.
async fn add(
    ledger: &Ledger,
    changeset: &mut Changeset,
    cluster: &ClusterId,
    counts: &WrapCounts,
) -> Result<WrapCounts, LedgerError> {
    let row = rows::wraps(cluster);
    let record = ledger.read::<WrapsRecord>(&row).await?;
    let mut total = record.as_ref().map(|record| parse(&record.payload)).unwrap_or_default();
    for (version, wraps) in counts {
        let sum = total.entry(*version).or_default();
        let before = std::mem::replace(sum, sum.saturating_add(*wraps));
        if before < WRAPS_HINT && *sum >= WRAPS_HINT {
            tracing::warn!(%cluster, %version, "2^32 wraps under one version; rotate this cluster early");
        }
    }
    match &record {
        Some(record) => changeset.update(record, &payload(&total)),
        None => changeset.insert(row, &payload(&total)),
    }
    Ok(total)
}

/// Reads counts off their record; a version that is none is left out.
pub(crate) fn parse(record: &WrapsRecord) -> WrapCounts {
    let counts = record.versions.iter();
    counts.filter_map(|counted| Some((Version::new(counted.version)?, counted.wraps))).collect()
}

fn payload(counts: &WrapCounts) -> WrapsRecord {
    let versions =
        counts.iter().map(|(version, wraps)| VersionWraps { version: version.get(), wraps: *wraps });
    WrapsRecord { versions: versions.collect() }
}

#[cfg(test)]
mod tests {
    use fleet_kms_store::contract::{Fault, Flaky};
    use fleet_kms_store::{MemoryStore, Store};

    use super::*;
    use crate::promises::rig::{Clocks, Desk, create, initialise, permit, seed};

    async fn desk(store: Arc<dyn Store>, clocks: &Clocks) -> (Desk, tempfile::TempDir) {
        let audit = tempfile::tempdir().unwrap();
        (Desk::open(store, audit.path(), clocks).await, audit)
    }

    #[tokio::test]
    async fn wraps_outlive_a_restart_once_they_are_flushed() {
        seed(2);
        let (store, clocks) = (Arc::new(MemoryStore::new()), Clocks::new());
        initialise(&*store).await;
        let flaky = Arc::new(Flaky::new(Arc::clone(&store) as Arc<dyn Store>));
        let (desk, _audit) = desk(Arc::clone(&flaky) as Arc<dyn Store>, &clocks).await;
        let mut clusters = Vec::new();
        for number in 0..BATCH + 10 {
            clusters.push(create(&desk, number).await);
        }
        let wrap = |times: usize| {
            for cluster in &clusters {
                for _ in 0..times {
                    desk.keyrings.wrap(&permit(*cluster), None, &[1; 32], clocks.wall()).unwrap();
                }
            }
        };
        let counted = |desk: &Desk| {
            let counts = clusters.iter().map(|cluster| desk.keyrings.wraps(cluster));
            counts.map(|counts| counts.get(&Version::FIRST).copied().unwrap_or_default()).collect::<Vec<_>>()
        };
        wrap(2);
        flaky.inject(Fault::NotApplied);
        flush(&desk.keyrings, &desk.changes).await.unwrap_err();
        wrap(1);
        assert_eq!(counted(&desk), vec![3; clusters.len()], "what could not be stored is still counted");
        flush(&desk.keyrings, &desk.changes).await.unwrap();
        wrap(1);
        assert_eq!(counted(&desk), vec![4; clusters.len()]);
        let audit = tempfile::tempdir().unwrap();
        let other = Desk::open(store, audit.path(), &clocks).await;
        assert_eq!(counted(&other), vec![3; clusters.len()], "a crash costs what was not flushed");
        assert!(matches!(other.ledger.check().await.unwrap(), crate::ledger::Integrity::Intact { .. }));
    }

    #[tokio::test]
    async fn a_count_over_the_hint_shows() {
        seed(3);
        let (store, clocks) = (Arc::new(MemoryStore::new()), Clocks::new());
        initialise(&*store).await;
        let (desk, _audit) = desk(store, &clocks).await;
        let cluster = create(&desk, 1).await;
        desk.keyrings.put_back_wraps(&cluster, &WrapCounts::from([(Version::FIRST, WRAPS_HINT)]));
        assert_eq!(desk.keyrings.active_wraps(), [(cluster, Version::FIRST, WRAPS_HINT)]);
        flush(&desk.keyrings, &desk.changes).await.unwrap();
        assert_eq!(desk.keyrings.active_wraps(), [(cluster, Version::FIRST, WRAPS_HINT)]);
    }
}
