//! The open store key, and during its rotation the one of the epoch before.
//!
//! Each blob says which epoch it is of; a key never leaves this module but
//! sealed, and what is opened with it lives for one call.

use std::sync::Arc;

use fleet_kms_keyring::Kek;
use fleet_kms_keyring::sealed::{self, Kind, SealContext};
use fleet_kms_seal::StoreKey;
use fleet_kms_store::RowName;
use rand_core::CryptoRng;
use zeroize::Zeroizing;

use super::{KeysError, SealedKek};

/// The store keys that rows are sealed under.
pub struct StoreKeys {
    current: Arc<StoreKey>,
    older: Option<Arc<StoreKey>>,
}

impl StoreKeys {
    /// Takes the key of the only epoch.
    pub fn new(current: StoreKey) -> Self {
        Self { current: Arc::new(current), older: None }
    }

    /// Takes the keys of two epochs, while a rotation is under way.
    pub fn between(older: StoreKey, newer: StoreKey) -> Self {
        Self { current: Arc::new(newer), older: Some(Arc::new(older)) }
    }

    /// Returns the key that new rows are sealed under.
    pub(crate) fn current(&self) -> &StoreKey {
        &self.current
    }

    /// Returns the key of the epoch before, while a rotation is under way.
    pub(crate) fn older(&self) -> Option<&StoreKey> {
        self.older.as_deref()
    }

    /// Returns these keys with `newer` on top.
    pub(super) fn with_newer(&self, newer: StoreKey) -> Self {
        Self { current: Arc::new(newer), older: Some(Arc::clone(&self.current)) }
    }

    /// Returns the newest key alone.
    pub(super) fn without_older(&self) -> Self {
        Self { current: Arc::clone(&self.current), older: None }
    }

    /// Says whether a blob is of the newest epoch.
    pub(super) fn is_current(&self, blob: &[u8]) -> bool {
        sealed::epoch_of(blob) == Ok(self.current.epoch())
    }

    pub(super) fn open_kek(&self, kek: &SealedKek) -> Result<Kek, KeysError> {
        let key = self.of(&kek.bytes)?;
        let context = context(key, &kek.row, Kind::Kek);
        sealed::open_kek(&key.seal_key(), &context, &kek.bytes).map_err(|_| KeysError::Damaged)
    }

    pub(super) fn seal_kek(&self, row: &RowName, kek: &Kek, rng: &mut dyn CryptoRng) -> Vec<u8> {
        let key = self.current();
        sealed::seal_kek(&key.seal_key(), &context(key, row, Kind::Kek), kek, rng)
    }

    pub(super) fn open(
        &self,
        row: &RowName,
        kind: Kind,
        blob: &[u8],
    ) -> Result<Zeroizing<Vec<u8>>, KeysError> {
        let key = self.of(blob)?;
        sealed::open(&key.seal_key(), &context(key, row, kind), blob).map_err(|_| KeysError::Damaged)
    }

    pub(super) fn seal(
        &self,
        row: &RowName,
        kind: Kind,
        plaintext: &[u8],
        rng: &mut dyn CryptoRng,
    ) -> Vec<u8> {
        let key = self.current();
        sealed::seal(&key.seal_key(), &context(key, row, kind), plaintext, rng)
    }

    /// Returns the key of the epoch that a blob is of.
    fn of(&self, blob: &[u8]) -> Result<&StoreKey, KeysError> {
        let epoch = sealed::epoch_of(blob).map_err(|_| KeysError::Damaged)?;
        let mut keys = std::iter::once(&self.current).chain(&self.older);
        keys.find(|key| key.epoch() == epoch).map(|key| &**key).ok_or(KeysError::Damaged)
    }
}

fn context<'a>(key: &StoreKey, row: &'a RowName, kind: Kind) -> SealContext<'a> {
    SealContext { store: key.store(), row: row.as_bytes(), kind, epoch: key.epoch() }
}
