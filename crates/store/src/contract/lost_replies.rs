//! The recovery that [`CommitError::Unknown`] asks of a caller works on this backend.

use std::sync::Arc;

use super::flaky::{Fault, Flaky};
use super::{bytes, name, put};
use crate::{CommitError, Revision, Store};

pub(super) async fn a_lost_reply_is_recognised_by_reading(store: Arc<dyn Store>) {
    let flaky = Flaky::new(store);
    for (fault, applied) in [(Fault::ReplyLost, true), (Fault::RequestLost, false)] {
        flaky.inject(fault);
        let row = format!("{fault:?}");
        let txn = put(&row, b"random id").expect(name(&row), Revision::ABSENT);
        let result = flaky.commit(txn.clone()).await;
        assert!(matches!(result, Err(CommitError::Unknown(_))), "{result:?}");
        let own = bytes(&flaky, &row).await.is_some_and(|bytes| bytes == b"random id");
        assert_eq!(own, applied, "{fault:?}");
        let again = flaky.commit(txn).await;
        assert_eq!(matches!(again, Err(CommitError::Conflict)), applied, "a blind retry is safe: {again:?}");
        assert_eq!(bytes(&flaky, &row).await.unwrap(), b"random id");
    }
}

pub(super) async fn a_retry_after_a_late_commit_conflicts(store: Arc<dyn Store>) {
    let flaky = Flaky::new(store);
    flaky.inject(Fault::Late);
    let first = put("a", b"first").expect(name("a"), Revision::ABSENT);
    assert!(matches!(flaky.commit(first).await, Err(CommitError::Unknown(_))));
    assert_eq!(bytes(&flaky, "a").await, None, "it is still under way");
    let second = put("a", b"second").expect(name("a"), Revision::ABSENT);
    assert!(matches!(flaky.commit(second).await, Err(CommitError::Conflict)));
    assert_eq!(bytes(&flaky, "a").await.unwrap(), b"first");
}

pub(super) async fn counters_survive_lost_replies(store: Arc<dyn Store>) {
    let flaky = Flaky::new(store);
    let faults = [Fault::ReplyLost, Fault::RequestLost, Fault::NotApplied, Fault::Late];
    for id in 0..20_u8 {
        flaky.inject(faults[usize::from(id) % faults.len()]);
        loop {
            let row = flaky.get(&name("ids")).await.unwrap();
            let seen = row.as_ref().map_or(Revision::ABSENT, |row| row.revision);
            let mut ids = row.map_or(Vec::new(), |row| row.bytes);
            if ids.contains(&id) {
                break;
            }
            ids.push(id);
            if flaky.commit(put("ids", &ids).expect(name("ids"), seen)).await.is_ok() {
                break;
            }
        }
    }
    let ids: Vec<u8> = (0..20).collect();
    assert_eq!(bytes(&flaky, "ids").await.unwrap(), ids, "each exactly once, in order");
}
