//! The store key of one epoch and the keys derived from it.
//!
//! The store key itself encrypts nothing but is the root of HKDF-SHA256 (RFC 5869, no salt: the store key is
//! uniform) with
//! `info = "fleet-kms/store/1/" ‖ seal | mac | head ‖ store id ‖ epoch u32 BE`,
//! so that no key is used for two jobs, in two stores, or in two epochs.

use fleet_kms_keyring::sealed::{self, Kind, SealContext, SealKey};
use fleet_kms_keyring::{StoreId, stack};
use hkdf::Hkdf;
use rand_core::CryptoRng;
use sha2::Sha256;
use zeroize::{Zeroize, Zeroizing};

use crate::LockedKey;

/// What a derived key is for.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Purpose {
    /// Seals keys in rows of the store.
    Seal,
    /// Authenticates records.
    Mac,
    /// Keys the set hash of the store's head.
    Head,
}

/// The key that protects a store during one epoch.
pub struct StoreKey {
    key: LockedKey,
    store: StoreId,
    epoch: u32,
}

impl StoreKey {
    /// Makes the store key of a new epoch.
    pub fn generate(store: StoreId, epoch: u32, rng: &mut dyn CryptoRng) -> Self {
        Self { key: LockedKey::generate(rng), store, epoch }
    }

    /// Takes a store key from bytes that the caller knows, and wipes them: for vectors and tests only.
    pub fn danger_from_bytes(store: StoreId, epoch: u32, bytes: &mut [u8; 32]) -> Self {
        let key = LockedKey::filled(|key| key.copy_from_slice(bytes));
        bytes.zeroize();
        Self { key, store, epoch }
    }

    /// Takes a store key that a slot has opened.
    pub(crate) fn from_opened(store: StoreId, epoch: u32, key: LockedKey) -> Self {
        Self { key, store, epoch }
    }

    /// The store that it protects.
    pub fn store(&self) -> StoreId {
        self.store
    }

    /// The epoch: counts up with each rotation of the store key.
    pub fn epoch(&self) -> u32 {
        self.epoch
    }

    /// Whether the system keeps it out of swap.
    pub fn is_locked(&self) -> bool {
        self.key.is_locked()
    }

    /// The key that seals rows, for one call.
    pub fn seal_key(&self) -> SealKey {
        let mut bytes = Zeroizing::new([0; 32]);
        self.derive(Purpose::Seal, &mut bytes);
        SealKey::from_bytes(&mut bytes)
    }

    /// The key that authenticates records.
    pub fn mac_key(&self) -> LockedKey {
        LockedKey::filled(|bytes| self.derive(Purpose::Mac, bytes))
    }

    /// The key of the head's set hash.
    pub fn head_key(&self) -> LockedKey {
        LockedKey::filled(|bytes| self.derive(Purpose::Head, bytes))
    }

    /// Seals this key under a later epoch's: what the rows of this epoch need until they are re-sealed.
    pub fn seal_under(&self, newer: &Self, row: &[u8], rng: &mut dyn CryptoRng) -> Vec<u8> {
        sealed::seal(&newer.seal_key(), &newer.context_of_older(row), self.expose_secret(), rng)
    }

    /// Opens the key of an earlier epoch that [`Self::seal_under`] sealed under this one.
    ///
    /// # Errors
    /// When the blob is not that, or not of this row.
    pub fn open_older(&self, epoch: u32, row: &[u8], blob: &[u8]) -> Result<Self, sealed::OpenError> {
        let opened = sealed::open(&self.seal_key(), &self.context_of_older(row), blob)?;
        let bytes: &[u8; 32] =
            opened.as_slice().try_into().map_err(|_| sealed::OpenError::NotAKey { len: opened.len() })?;
        let key = LockedKey::filled(|key| key.copy_from_slice(bytes));
        Ok(Self { key, store: self.store, epoch })
    }

    fn context_of_older<'a>(&self, row: &'a [u8]) -> SealContext<'a> {
        SealContext { store: self.store, row, kind: Kind::OlderStoreKey, epoch: self.epoch }
    }

    pub(crate) fn expose_secret(&self) -> &[u8; 32] {
        self.key.expose_secret()
    }

    fn derive(&self, purpose: Purpose, out: &mut [u8; 32]) {
        let info: [&[u8]; 4] =
            [b"fleet-kms/store/1/", purpose.label(), self.store.as_bytes(), &self.epoch.to_be_bytes()];
        hkdf(self.key.expose_secret(), &info, out);
        stack::burn();
    }
}

// Never inlined: `stack::burn` relies on it.
#[inline(never)]
fn hkdf(key: &[u8; 32], info: &[&[u8]], out: &mut [u8; 32]) {
    let (mut prk, hkdf) = Hkdf::<Sha256>::extract(None, key);
    prk.as_mut_slice().zeroize();
    hkdf.expand_multi_info(info, out).expect("HKDF-SHA256 gives up to 8,160 bytes");
}

impl Purpose {
    /// The labels differ in their first byte, so no label and store id spell another's.
    fn label(self) -> &'static [u8] {
        match self {
            Self::Seal => b"seal",
            Self::Mac => b"mac",
            Self::Head => b"head",
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fmt::{Debug, Display};

    use static_assertions::{assert_impl_all, assert_not_impl_any};

    use super::*;

    assert_not_impl_any!(StoreKey: Clone, Copy, Debug, Display, PartialEq, serde::Serialize, AsRef<[u8]>);
    assert_impl_all!(StoreKey: Send, Sync);

    const STORE: StoreId = StoreId::from_bytes([0x5a; 16]);

    fn derived(store: StoreId, epoch: u32, key: u8, purpose: Purpose) -> [u8; 32] {
        let mut out = [0; 32];
        StoreKey::danger_from_bytes(store, epoch, &mut [key; 32]).derive(purpose, &mut out);
        out
    }

    #[test]
    fn every_purpose_store_epoch_and_store_key_has_its_own_key() {
        let other = StoreId::from_bytes([0x5b; 16]);
        let mut keys = [
            [7; 32],
            derived(STORE, 1, 7, Purpose::Seal),
            derived(STORE, 1, 7, Purpose::Mac),
            derived(STORE, 1, 7, Purpose::Head),
            derived(STORE, 2, 7, Purpose::Seal),
            derived(STORE, 1, 8, Purpose::Seal),
            derived(other, 1, 7, Purpose::Seal),
        ];
        keys.sort_unstable();
        assert!(keys.windows(2).all(|pair| pair[0] != pair[1]));
        assert_eq!(derived(STORE, 1, 7, Purpose::Mac), derived(STORE, 1, 7, Purpose::Mac));
    }

    #[test]
    fn the_mac_and_head_keys_are_the_derived_ones() {
        let key = StoreKey::danger_from_bytes(STORE, 1, &mut [7; 32]);
        assert_eq!(key.mac_key().expose_secret(), &derived(STORE, 1, 7, Purpose::Mac));
        assert_eq!(key.head_key().expose_secret(), &derived(STORE, 1, 7, Purpose::Head));
    }

    #[test]
    fn an_older_key_opens_under_the_newer_one_in_its_own_row_only() {
        use rand_chacha::ChaCha20Rng;
        use rand_core::SeedableRng;
        let mut rng = ChaCha20Rng::from_seed([1; 32]);
        let older = StoreKey::danger_from_bytes(STORE, 1, &mut [7; 32]);
        let newer = StoreKey::danger_from_bytes(STORE, 2, &mut [8; 32]);
        let blob = older.seal_under(&newer, b"store-key/1", &mut rng);
        let opened = newer.open_older(1, b"store-key/1", &blob).ok().unwrap();
        assert_eq!((opened.expose_secret(), opened.epoch()), (&[7; 32], 1));
        assert!(newer.open_older(1, b"store-key/2", &blob).is_err());
        assert!(older.open_older(1, b"store-key/1", &blob).is_err());
    }

    #[test]
    fn the_bytes_that_a_key_is_taken_from_are_wiped() {
        let mut bytes = [7; 32];
        StoreKey::danger_from_bytes(STORE, 1, &mut bytes);
        assert_eq!(bytes, [0; 32]);
    }
}
