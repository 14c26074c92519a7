//! The ends of this agent's audit chains, kept in the store.
//!
//! Whoever can write the audit's files can write a chain anew; the store is another place, authenticated under the
//! store key. A row never runs ahead of what is durable in the file.

use fleet_kms_audit::{Chain, ChangeLog, DataLog, Head};

use crate::changes::Changes;
use crate::ledger::{Ledger, LedgerError, WriteError};
use crate::records::payload::AuditHeadRecord;
use crate::records::rows;
use crate::times::{from_ms, to_ms};

/// Why the heads were not stored.
#[derive(Debug, thiserror::Error)]
pub enum HeadsError {
    /// The store cannot be read.
    #[error(transparent)]
    Ledger(#[from] LedgerError),
    /// The store did not take them.
    #[error(transparent)]
    Write(#[from] WriteError),
}

/// A head as the store has it.
#[derive(Debug, Clone)]
pub struct StoredHead {
    /// The agent.
    pub agent: String,
    /// The chain.
    pub chain: Chain,
    /// Where it ended.
    pub head: Head,
    /// When the row was written.
    pub written: std::time::SystemTime,
}

/// Stores heads; nothing happens while the agent is locked or the store not confirmed.
///
/// # Errors
///
/// When the store does not take them; the next attempt has newer ones.
pub async fn store(changes: &Changes, agent: &str, heads: &[(Chain, Head)]) -> Result<(), HeadsError> {
    let done = changes.beside_changes(|| async {
        let ledger = changes.ledger();
        let mut changeset = ledger.changeset();
        for (chain, head) in heads {
            let row = rows::audit_head(agent, chain.name());
            let written_ms = to_ms(changes.now());
            let payload = AuditHeadRecord { seq: head.seq, hash: head.hash.to_vec(), written_ms };
            match ledger.read::<AuditHeadRecord>(&row).await? {
                Some(record) => changeset.update(&record, &payload),
                None => changeset.insert(row, &payload),
            }
        }
        ledger.commit_counts(changeset).await.map(drop).map_err(HeadsError::from)
    });
    done.await.unwrap_or(Ok(()))
}

/// Reads all agents' heads, by agent and chain.
///
/// # Errors
///
/// When the store cannot be read.
pub async fn all(ledger: &Ledger) -> Result<Vec<StoredHead>, LedgerError> {
    let records = ledger.scan::<AuditHeadRecord>(rows::AUDIT_HEADS).await?;
    let parsed = records.iter().filter_map(|record| {
        let (agent, chain) = record.row.as_str().strip_prefix(rows::AUDIT_HEADS)?.rsplit_once('/')?;
        let hash = record.payload.hash.as_slice().try_into().ok()?;
        Some(StoredHead {
            agent: agent.to_owned(),
            chain: Chain::from_name(chain)?,
            head: Head { seq: record.payload.seq, hash },
            written: from_ms(record.payload.written_ms),
        })
    });
    Ok(parsed.collect())
}

/// Names the chains that end before the head that the store has, or elsewhere than it: their tail was cut, or they
/// were begun anew. A full comparison is `kmsctl audit verify`'s.
///
/// # Errors
///
/// When the store cannot be read.
pub async fn cut(
    ledger: &Ledger,
    agent: &str,
    changes: &ChangeLog,
    data: &DataLog,
) -> Result<Vec<(Chain, Head, Head)>, LedgerError> {
    let found = [(Chain::Changes, changes.head()), (Chain::Data, data.head())];
    let stored = all(ledger).await?;
    let of = |chain| stored.iter().find(|stored| stored.agent == agent && stored.chain == chain);
    let cut = found.into_iter().filter_map(|(chain, head)| {
        let kept = of(chain)?.head;
        let is_cut = kept.seq > head.seq || (kept.seq == head.seq && kept != head);
        is_cut.then_some((chain, kept, head))
    });
    Ok(cut.collect())
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use fleet_kms_audit::{Clocks, DataOptions};
    use fleet_kms_store::MemoryStore;

    use super::*;
    use crate::promises::rig::{Clocks as RigClocks, Desk, create, initialise, seed};

    #[tokio::test]
    async fn heads_are_stored_by_agent_and_a_chain_that_ends_before_its_head_shows() {
        seed(5);
        let (store, clocks) = (Arc::new(MemoryStore::new()), RigClocks::new());
        initialise(&*store).await;
        let audit = tempfile::tempdir().unwrap();
        let desk = Desk::open(store, audit.path(), &clocks).await;
        create(&desk, 1).await;
        let elsewhere = tempfile::tempdir().unwrap();
        let data_clocks = Clocks { wall: clocks.clock(), monotonic: fleet_kms_process::clock::monotonic };
        let data = DataLog::open(elsewhere.path(), DataOptions::default(), data_clocks).unwrap();
        let log = desk.changes.log();
        let head = log.head();
        for _ in 0..2 {
            store_heads(&desk, "agent-1", head).await;
        }
        store_heads(&desk, "agent-2", Head { seq: 1, hash: [9; 32] }).await;
        let stored = all(&desk.ledger).await.unwrap();
        let names: Vec<_> = stored.iter().map(|stored| (stored.agent.as_str(), stored.head.seq)).collect();
        assert_eq!(names, [("agent-1", head.seq), ("agent-2", 1)]);
        assert_eq!(cut(&desk.ledger, "agent-1", log, &data).await.unwrap(), []);
        create(&desk, 2).await;
        assert_eq!(cut(&desk.ledger, "agent-1", log, &data).await.unwrap(), [], "it may have grown");
        let later = Head { seq: log.head().seq + 1, ..head };
        for kept in [later, Head { hash: [7; 32], ..log.head() }] {
            store_heads(&desk, "agent-1", kept).await;
            let found = cut(&desk.ledger, "agent-1", log, &data).await.unwrap();
            assert_eq!(found, [(Chain::Changes, kept, log.head())]);
        }
        assert!(matches!(desk.ledger.check().await.unwrap(), crate::ledger::Integrity::Intact { .. }));
    }

    async fn store_heads(desk: &Desk, agent: &str, head: Head) {
        store(&desk.changes, agent, &[(Chain::Changes, head)]).await.unwrap();
    }
}
