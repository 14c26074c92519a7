use std::sync::Arc;

use fleet_kms_keyring::ClusterId;
use fleet_kms_store::SqliteStore;

use super::*;
use crate::ledger::Integrity;
use crate::max_offline::MaxOffline;
use crate::promises::rig::{Clocks, Desk, create, initialise_with, seed};
use crate::records::Payload;
use crate::records::payload::ClusterRecord;

/// More than two pages of transactions.
const CLUSTERS: usize = 120;

/// A cluster's record as format 1 had it.
#[derive(Clone, PartialEq, prost::Message)]
struct OldCluster {
    #[prost(bytes = "vec", tag = "1")]
    id: Vec<u8>,
    #[prost(string, tag = "2")]
    name: String,
    #[prost(uint64, tag = "3")]
    created_ms: u64,
    #[prost(uint64, tag = "4")]
    retired_ms: u64,
}

impl Payload for OldCluster {
    const FORMAT: u8 = 1;
    const WHAT: &'static str = ClusterRecord::WHAT;
}

/// Brings clusters back to format 1.
async fn age(desk: &Desk, clusters: &[ClusterId]) {
    for some in clusters.chunks(40) {
        let prepare = || async {
            let mut changeset = desk.ledger.changeset();
            for cluster in some {
                let record = desk.ledger.read::<ClusterRecord>(&rows::cluster(cluster)).await?.unwrap();
                let ClusterRecord { id, name, created_ms, retired_ms, .. } = record.payload.clone();
                let old = OldCluster { id, name, created_ms, retired_ms };
                assert!(
                    desk.ledger.read::<OldCluster>(&record.row).await.is_err(),
                    "a newer format is refused"
                );
                let row = desk.ledger.read_row(&rows::cluster(cluster)).await?.unwrap();
                let bytes = desk.ledger.codec().encode(&row.name, 2, &old);
                changeset.replace_sealed(&row, bytes);
            }
            Ok::<_, LedgerError>((changeset, ()))
        };
        desk.changes.run(Intent::new("age", "test"), prepare).await.unwrap();
    }
}

async fn formats(desk: &Desk) -> Vec<u8> {
    let rows = desk.ledger.scan_rows(rows::CLUSTERS).await.unwrap();
    rows.iter().map(|row| format_of(&row.bytes).unwrap()).collect()
}

async fn backups(desk: &Desk, store: &Path) -> Backups {
    Backups::load(store.to_owned(), None, Arc::clone(&desk.changes), Arc::clone(&desk.keyrings))
        .await
        .unwrap()
}

fn of<'a>(desk: &'a Desk, backups: &'a Backups) -> Migration<'a> {
    Migration { changes: &desk.changes, keyrings: &desk.keyrings, backups, damaged: 0 }
}

#[tokio::test]
async fn many_pages_are_migrated_one_by_one_and_go_on_where_they_were_cut_off() {
    seed(4);
    let (directory, clocks) = (tempfile::tempdir().unwrap(), Clocks::new());
    let path = directory.path().join("store.db");
    let store = Arc::new(SqliteStore::create(&path).unwrap());
    let mut meta = storage::meta(crate::promises::rig::codec().store());
    meta[0] = 1;
    initialise_with(&*store, vec![(rows::fixed(rows::META), meta)]).await;
    let audit = directory.path().join("audit");
    std::fs::create_dir(&audit).unwrap();
    let open = || Desk::open(Arc::clone(&store) as Arc<dyn Store>, &audit, &clocks);

    let desk = open().await;
    let mut clusters = Vec::new();
    for number in 0..CLUSTERS {
        clusters.push(create(&desk, number).await);
    }
    age(&desk, &clusters).await;
    assert_eq!(formats(&desk).await, [1; CLUSTERS]);
    assert_eq!(outlook(&*store).await.unwrap(), Some(Outlook::Begins { from: 1 }));

    let aside = backups(&desk, &path).await;
    let migration = of(&desk, &aside);
    migration.begin(1).await.unwrap();
    let kind = kinds::of_row("cluster/x").unwrap();
    let pages = batches(desk.ledger.scan_rows(rows::CLUSTERS).await.unwrap());
    assert!(pages.len() > 2, "{}", pages.len());
    migration.rewrite(kind, &pages[1]).await.unwrap();
    drop((aside, desk));

    let desk = open().await;
    assert_eq!(outlook(&*store).await.unwrap(), Some(Outlook::GoesOn));
    assert!(formats(&desk).await.contains(&1) && formats(&desk).await.contains(&2));
    let aside = backups(&desk, &path).await;
    assert_eq!(of(&desk, &aside).rewrite_all().await.unwrap(), CLUSTERS - pages[1].len(), "none twice");
    of(&desk, &aside).run().await.unwrap();
    assert_eq!(formats(&desk).await, [2; CLUSTERS]);
    assert_eq!(outlook(&*store).await.unwrap(), None);
    for record in desk.ledger.scan::<ClusterRecord>(rows::CLUSTERS).await.unwrap() {
        assert_eq!(record.payload.max_offline_seconds, MaxOffline::DEFAULT.time().as_secs());
        assert_eq!(record.seq, 3);
    }
    assert!(matches!(desk.ledger.check().await.unwrap(), Integrity::Intact { .. }));
    let backup = SqliteStore::open_read_only(directory.path().join("store.db.format-1")).unwrap();
    let backed_up = backup.page_rows(rows::CLUSTERS, None, 200).await.unwrap();
    assert!(backed_up.len() == CLUSTERS && backed_up.iter().all(|row| is_older(row, kind)));
}
