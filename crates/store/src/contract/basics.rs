//! What one caller sees of rows, revisions, conditions and limits.

use super::{bytes, name, put};
use crate::{CommitError, MAX_BYTES, MAX_OPERATIONS, Refusal, Revision, Store, Txn};

pub(super) async fn a_row_is_what_was_last_committed(store: &dyn Store) {
    assert_eq!(store.get(&name("a")).await.unwrap(), None, "a new store is empty");
    store.commit(put("a", b"1")).await.unwrap();
    let revision = store.commit(put("a", b"2")).await.unwrap();
    let row = store.get(&name("a")).await.unwrap().unwrap();
    assert_eq!((row.name, row.revision, row.bytes), (name("a"), revision, b"2".to_vec()));
    store.commit(Txn::new().delete(name("a"))).await.unwrap();
    assert_eq!(store.get(&name("a")).await.unwrap(), None, "a deleted row is gone");
    store.commit(Txn::new().delete(name("a"))).await.unwrap();
}

pub(super) async fn any_bytes_come_back(store: &dyn Store) {
    let all: Vec<u8> = (0..=255).collect();
    for value in [&b""[..], b"\0", &all, &vec![0xff; 100_000]] {
        store.commit(put("kek/0?*%_'\"\\", value)).await.unwrap();
        assert_eq!(bytes(store, "kek/0?*%_'\"\\").await.unwrap(), value);
    }
}

pub(super) async fn all_puts_of_one_commit_have_its_revision(store: &dyn Store) {
    store.commit(put("c", b"old")).await.unwrap();
    let txn = Txn::new().put(name("a"), vec![1]).put(name("b"), vec![2]).delete(name("c"));
    let revision = store.commit(txn).await.unwrap();
    let rows = store.page_revisions("", None, 10).await.unwrap();
    assert_eq!(rows, [(name("a"), revision), (name("b"), revision)]);
}

pub(super) async fn revisions_rise_over_deletion_and_new_creation(store: &dyn Store) {
    let mut last = Revision::ABSENT;
    for _ in 0..3 {
        for txn in [put("a", b"x"), put("b", b"x"), Txn::new().delete(name("a"))] {
            let revision = store.commit(txn).await.unwrap();
            assert!(revision > last, "{revision} after {last}");
            last = revision;
        }
    }
    let first = store.commit(put("a", b"first life")).await.unwrap();
    store.commit(Txn::new().delete(name("a"))).await.unwrap();
    store.commit(put("a", b"second life")).await.unwrap();
    let stale = store.commit(put("a", b"stale").expect(name("a"), first)).await;
    assert!(matches!(stale, Err(CommitError::Conflict)), "a recreated row has no old revision: {stale:?}");
}

pub(super) async fn a_condition_that_does_not_hold_applies_nothing(store: &dyn Store) {
    let created = store.commit(put("a", b"1").expect(name("a"), Revision::ABSENT)).await.unwrap();
    let wrong =
        [(name("a"), Revision::ABSENT), (name("a"), Revision(created.0 + 1)), (name("absent"), created)];
    for (row, revision) in wrong {
        let txn = put("a", b"2").put(name("b"), vec![]).expect(name("a"), created).expect(row, revision);
        let result = store.commit(txn).await;
        assert!(matches!(result, Err(CommitError::Conflict)), "{result:?}");
    }
    assert_eq!(bytes(store, "a").await.unwrap(), b"1");
    assert_eq!(bytes(store, "b").await, None);
    let txn = put("a", b"2").expect(name("a"), created).expect(name("absent"), Revision::ABSENT);
    store.commit(txn).await.unwrap();
    assert_eq!(bytes(store, "a").await.unwrap(), b"2");
}

pub(super) async fn a_condition_on_a_row_that_is_not_changed_counts(store: &dyn Store) {
    let guard = store.commit(put("guard", b"1")).await.unwrap();
    store.commit(put("a", b"1").expect(name("guard"), guard)).await.unwrap();
    store.commit(put("guard", b"2")).await.unwrap();
    let result = store.commit(Txn::new().delete(name("a")).expect(name("guard"), guard)).await;
    assert!(matches!(result, Err(CommitError::Conflict)), "{result:?}");
    assert_eq!(bytes(store, "a").await.unwrap(), b"1");
}

pub(super) async fn limits_are_refused_and_nothing_is_applied(store: &dyn Store) {
    let many = (0..=MAX_OPERATIONS).fold(Txn::new(), |txn, n| txn.put(name(&format!("r{n}")), vec![]));
    let result = store.commit(many).await;
    assert!(matches!(result, Err(CommitError::Refused(Refusal::TooManyOperations(101)))), "{result:?}");
    let result = store.commit(put("r", &vec![0; MAX_BYTES])).await;
    assert!(matches!(result, Err(CommitError::Refused(Refusal::TooManyBytes(_)))), "{result:?}");
    let result = store.commit(put("r", b"").delete(name("r"))).await;
    assert!(matches!(result, Err(CommitError::Refused(Refusal::NamedTwice(_)))), "{result:?}");
    let result = store.commit(Txn::new().expect(name("r"), Revision::ABSENT)).await;
    assert!(matches!(result, Err(CommitError::Refused(Refusal::Empty))), "{result:?}");
    assert_eq!(store.page_rows("", None, 10).await.unwrap(), []);
}

pub(super) async fn the_largest_transaction_is_taken(store: &dyn Store) {
    let row = |n: usize| name(&format!("row/{n:06}"));
    let value = vec![7; MAX_BYTES / MAX_OPERATIONS - 20];
    let txn = (0..MAX_OPERATIONS)
        .fold(Txn::new(), |txn, n| txn.put(row(n), value.clone()).expect(row(n), Revision::ABSENT));
    store.commit(txn).await.unwrap();
    let rows = store.page_rows("row/", None, 1000).await.unwrap();
    assert_eq!(rows.len(), MAX_OPERATIONS);
    assert!(rows.iter().all(|row| row.bytes == value));
    let one = vec![8; MAX_BYTES - 3];
    store.commit(put("one", &one)).await.unwrap();
    assert_eq!(bytes(store, "one").await.unwrap(), one);
}
