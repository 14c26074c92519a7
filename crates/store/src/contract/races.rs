//! What several callers see at once.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use tokio::task::JoinSet;
use tokio::time::timeout;

use super::{bytes, name, put};
use crate::{CommitError, Revision, Store, Txn};

/// Far longer than any hint takes.
const HINT: Duration = Duration::from_secs(10);

pub(super) async fn one_committer_wins_each_revision(store: Arc<dyn Store>) {
    const TASKS: u8 = 8;
    const ROUNDS: usize = 20;
    let mut tasks = JoinSet::new();
    for task in 0..TASKS {
        let store = Arc::clone(&store);
        tasks.spawn(async move {
            let mut won = Vec::new();
            while won.len() < ROUNDS {
                let row = store.get(&name("counter")).await.unwrap();
                let seen = row.as_ref().map_or(Revision::ABSENT, |row| row.revision);
                let mut history = row.map_or(Vec::new(), |row| row.bytes);
                history.push(task);
                match store.commit(put("counter", &history).expect(name("counter"), seen)).await {
                    Ok(revision) => won.push((seen, revision)),
                    Err(CommitError::Conflict) => {}
                    Err(other) => panic!("{other:?}"),
                }
            }
            won
        });
    }
    let won = tasks.join_all().await.concat();
    let seen: BTreeSet<_> = won.iter().map(|(seen, _)| seen).collect();
    let made: BTreeSet<_> = won.iter().map(|(_, made)| made).collect();
    let all = usize::from(TASKS) * ROUNDS;
    assert_eq!((seen.len(), made.len()), (all, all), "each revision was replaced by one winner");
    let history = bytes(&*store, "counter").await.unwrap();
    assert_eq!(history.len(), all);
    assert!((0..TASKS).all(|task| history.iter().filter(|t| **t == task).count() == ROUNDS));
}

pub(super) async fn an_answered_commit_is_seen_by_every_later_read(store: Arc<dyn Store>) {
    for n in 0..50_u8 {
        let revision = store.commit(put("a", &[n])).await.unwrap();
        let mut reads = JoinSet::new();
        for _ in 0..4 {
            let store = Arc::clone(&store);
            reads.spawn(async move { store.get(&name("a")).await.unwrap().unwrap() });
        }
        for row in reads.join_all().await {
            assert_eq!((row.revision, row.bytes), (revision, vec![n]));
        }
    }
}

pub(super) async fn a_page_never_shows_half_a_transaction(store: Arc<dyn Store>) {
    let writer = {
        let store = Arc::clone(&store);
        tokio::spawn(async move {
            for n in 0..100_u8 {
                let txn = (0..10).fold(Txn::new(), |txn, row| txn.put(name(&format!("p/{row}")), vec![n]));
                store.commit(txn).await.unwrap();
            }
        })
    };
    while !writer.is_finished() {
        let rows = store.page_rows("p/", None, 100).await.unwrap();
        let states: BTreeSet<_> = rows.iter().map(|row| (row.revision, row.bytes.clone())).collect();
        assert!(states.len() <= 1 && [0, 10].contains(&rows.len()), "one commit, whole: {states:?}");
        tokio::task::yield_now().await;
    }
    writer.await.unwrap();
}

pub(super) async fn changes_say_look_again(store: Arc<dyn Store>) {
    let mut keys = store.changes("key/");
    let mut all = store.changes("");
    store.commit(put("other/1", b"")).await.unwrap();
    timeout(HINT, all.next()).await.expect("a hint for any row");
    for n in 0..5 {
        store.commit(put(&format!("key/{n}"), b"")).await.unwrap();
    }
    timeout(HINT, keys.next()).await.expect("a hint after a put");
    let mut late = store.changes("key/");
    store.commit(Txn::new().delete(name("key/0"))).await.unwrap();
    timeout(HINT, keys.next()).await.expect("a hint after a delete");
    timeout(HINT, late.next()).await.expect("a hint for a late subscriber");
}

pub(super) async fn a_dropped_commit_is_whole_or_absent(store: Arc<dyn Store>) {
    for n in 0..50_u8 {
        let txn = put("a", &[n]).put(name("b"), vec![n]);
        let task = tokio::spawn({
            let store = Arc::clone(&store);
            async move { store.commit(txn).await.map(drop) }
        });
        tokio::task::yield_now().await;
        task.abort();
        let _ = task.await;
        // The next commit is ordered behind a dropped one that got through.
        store.commit(put("fence", &[n])).await.unwrap();
        assert_eq!(bytes(&*store, "a").await, bytes(&*store, "b").await);
    }
}
