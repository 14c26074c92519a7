//! The one contract suite that every backend passes, and [`Flaky`], which loses replies.
//!
//! For tests only: everything here panics with the sentence that does not hold.

#![allow(clippy::unwrap_used, clippy::indexing_slicing, clippy::panic, reason = "a test suite in a module")]

use std::sync::Arc;

use crate::{RowName, Store, Txn};

mod basics;
mod pages;
mod races;
mod flaky;
mod lost_replies;

pub use flaky::{Fault, Flaky};

/// Runs the whole suite; `make` gives a fresh, empty store each time.
pub async fn suite(make: impl AsyncFn() -> Arc<dyn Store>) {
    basics::a_row_is_what_was_last_committed(&*make().await).await;
    basics::any_bytes_come_back(&*make().await).await;
    basics::all_puts_of_one_commit_have_its_revision(&*make().await).await;
    basics::revisions_rise_over_deletion_and_new_creation(&*make().await).await;
    basics::a_condition_that_does_not_hold_applies_nothing(&*make().await).await;
    basics::a_condition_on_a_row_that_is_not_changed_counts(&*make().await).await;
    basics::limits_are_refused_and_nothing_is_applied(&*make().await).await;
    basics::the_largest_transaction_is_taken(&*make().await).await;
    pages::pages_walk_a_prefix_in_order(&*make().await).await;
    pages::a_prefix_ends_where_it_ends(&*make().await).await;
    pages::a_page_limit_is_refused_not_shortened(&*make().await).await;
    races::one_committer_wins_each_revision(make().await).await;
    races::an_answered_commit_is_seen_by_every_later_read(make().await).await;
    races::a_page_never_shows_half_a_transaction(make().await).await;
    races::changes_say_look_again(make().await).await;
    races::a_dropped_commit_is_whole_or_absent(make().await).await;
    lost_replies::a_lost_reply_is_recognised_by_reading(make().await).await;
    lost_replies::a_retry_after_a_late_commit_conflicts(make().await).await;
    lost_replies::counters_survive_lost_replies(make().await).await;
}

pub(crate) fn name(text: &str) -> RowName {
    RowName::try_from(text).unwrap()
}

pub(crate) fn put(row: &str, bytes: &[u8]) -> Txn {
    Txn::new().put(name(row), bytes.to_vec())
}

pub(crate) async fn bytes(store: &dyn Store, row: &str) -> Option<Vec<u8>> {
    store.get(&name(row)).await.unwrap().map(|row| row.bytes)
}
