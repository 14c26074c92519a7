//! "Look again": coalesced change hints for the subscribers of a prefix.
//!
//! A hint carries nothing, so it can neither be stale nor be mistaken for the state: whoever gets one reads.

use std::future;
use std::sync::{Mutex, PoisonError};

use tokio::sync::watch;

use crate::RowName;

/// A subscription to changes of rows under one prefix.
pub struct Changes(watch::Receiver<()>);

impl Changes {
    /// Returns a subscription and the sender that wakes it; for backends outside this crate's own.
    #[must_use]
    pub fn channel() -> (watch::Sender<()>, Self) {
        let (sender, receiver) = watch::channel(());
        (sender, Self(receiver))
    }

    /// Waits until rows under the prefix may have changed since the last call, or since the subscription.
    ///
    /// Dropping the future loses no hint. Once the store is gone it waits for ever.
    pub async fn next(&mut self) {
        if self.0.changed().await.is_err() {
            future::pending().await
        }
    }
}

/// The subscribers of one in-process store.
#[derive(Default)]
pub(crate) struct ChangeHub(Mutex<Vec<(String, watch::Sender<()>)>>);

impl ChangeHub {
    pub(crate) fn subscribe(&self, prefix: &str) -> Changes {
        let (sender, changes) = Changes::channel();
        let mut subscribers = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        subscribers.retain(|(_, sender)| !sender.is_closed());
        subscribers.push((prefix.to_owned(), sender));
        changes
    }

    pub(crate) fn publish(&self, names: &[RowName]) {
        let subscribers = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        for (prefix, sender) in subscribers.iter() {
            if names.iter().any(|name| name.as_str().starts_with(prefix.as_str())) {
                sender.send_replace(());
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_dropped_subscription_is_forgotten() {
        let hub = ChangeHub::default();
        for _ in 0..10 {
            drop(hub.subscribe("a/"));
        }
        let _kept = hub.subscribe("b/");
        assert_eq!(hub.0.lock().unwrap().len(), 1);
    }
}
