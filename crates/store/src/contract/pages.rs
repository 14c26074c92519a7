//! What a walk over a prefix sees.

use super::name;
use crate::{MAX_PAGE, ReadError, Store, Txn};

pub(super) async fn pages_walk_a_prefix_in_order(store: &dyn Store) {
    // More than one page at any limit, written out of order.
    let mut names: Vec<String> = (0..250).map(|n| format!("key/{:03}", (n * 97) % 250)).collect();
    for chunk in names.chunks(100) {
        let txn = chunk.iter().fold(Txn::new(), |txn, row| txn.put(name(row), row.as_bytes().to_vec()));
        store.commit(txn).await.unwrap();
    }
    names.sort();
    for limit in [1, 7, 125, 250, 1000] {
        let mut seen = Vec::new();
        let mut after = None;
        loop {
            let rows = store.page_rows("key/", after.as_ref(), limit).await.unwrap();
            let revisions = store.page_revisions("key/", after.as_ref(), limit).await.unwrap();
            let of_rows: Vec<_> = rows.iter().map(|row| (row.name.clone(), row.revision)).collect();
            assert_eq!(of_rows, revisions, "both pages agree");
            assert!(rows.iter().all(|row| row.bytes == row.name.as_bytes()));
            seen.extend(rows.iter().map(|row| row.name.as_str().to_owned()));
            if rows.len() < limit {
                break;
            }
            after = rows.last().map(|row| row.name.clone());
        }
        assert_eq!(seen, names, "with pages of {limit}");
    }
}

pub(super) async fn a_prefix_ends_where_it_ends(store: &dyn Store) {
    let names = ["a", "a!", "a/", "a/1", "a/~", "a/~~", "a0", "b"];
    let txn = names.iter().fold(Txn::new(), |txn, row| txn.put(name(row), vec![]));
    store.commit(txn).await.unwrap();
    let page = async |prefix: &str, after: Option<&str>| {
        let after = after.map(name);
        let rows = store.page_revisions(prefix, after.as_ref(), 100).await.unwrap();
        rows.into_iter().map(|(name, _)| name.as_str().to_owned()).collect::<Vec<_>>()
    };
    assert_eq!(page("", None).await, names);
    assert_eq!(page("a/", None).await, ["a/", "a/1", "a/~", "a/~~"]);
    assert_eq!(page("a/~", None).await, ["a/~", "a/~~"]);
    assert_eq!(page("a/", Some("a/1")).await, ["a/~", "a/~~"], "after is exclusive");
    assert_eq!(page("a/", Some("a/2")).await, ["a/~", "a/~~"], "after need not exist");
    assert_eq!(page("a/", Some("a")).await, ["a/", "a/1", "a/~", "a/~~"], "after may lie before the prefix");
    assert_eq!(page("a/", Some("b")).await, [""; 0], "after may lie behind the prefix");
    assert_eq!(page("c", None).await, [""; 0]);
    assert_eq!(page("a/é", None).await, [""; 0], "no name has such a prefix");
}

pub(super) async fn a_page_limit_is_refused_not_shortened(store: &dyn Store) {
    for limit in [0, MAX_PAGE + 1, usize::MAX] {
        let rows = store.page_rows("", None, limit).await;
        assert!(matches!(rows, Err(ReadError::PageLimit(_))), "{rows:?}");
        let revisions = store.page_revisions("", None, limit).await;
        assert!(matches!(revisions, Err(ReadError::PageLimit(_))), "{revisions:?}");
    }
}
