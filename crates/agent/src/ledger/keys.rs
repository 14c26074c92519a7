//! The ledger's keys: for records and for the head, by epoch.
//!
//! There is one epoch, but while the store key is rotated there are two: new
//! records are under the newer one, the head stays under the older one until
//! its last transaction.

use std::sync::Arc;

use fleet_kms_seal::{LockedKey, StoreKey};

use crate::records::Codec;

/// The keys of the open epochs.
#[derive(Clone)]
pub(super) struct Keys {
    codec: Arc<Codec>,
    heads: Vec<(u32, Arc<LockedKey>)>,
}

impl Keys {
    pub(super) fn new(codec: Codec, head: LockedKey) -> Self {
        let heads = vec![(codec.epoch(), Arc::new(head))];
        Self { codec: Arc::new(codec), heads }
    }

    pub(super) fn codec(&self) -> &Arc<Codec> {
        &self.codec
    }

    pub(super) fn head(&self, epoch: u32) -> Option<&LockedKey> {
        self.heads.iter().find(|(known, _)| *known == epoch).map(|(_, key)| &**key)
    }

    pub(super) fn are_locked(&self) -> bool {
        self.heads.is_empty()
    }

    /// Adds an epoch, under which records are written from now on.
    pub(super) fn with_newer(&self, newer: &StoreKey) -> Self {
        let mut heads = vec![(newer.epoch(), Arc::new(newer.head_key()))];
        heads.extend(self.heads.iter().cloned());
        Self { codec: Arc::new(self.codec.with_newer(newer.epoch(), newer.mac_key())), heads }
    }

    /// Forgets all epochs but the newest.
    pub(super) fn without_older(&self) -> Self {
        let heads = self.heads.iter().take(1).cloned().collect();
        Self { codec: Arc::new(self.codec.without_older()), heads }
    }

    /// Forgets all epochs.
    pub(super) fn locked(&self) -> Self {
        Self { codec: Arc::new(self.codec.locked()), heads: Vec::new() }
    }
}
