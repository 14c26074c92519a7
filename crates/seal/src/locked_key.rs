//! A 256-bit key in locked memory.
//!
//! For keys that live as long as the process: the store key and what records are authenticated with. Wiped on
//! drop; never cloned, printed, compared or serialized.

use rand_core::CryptoRng;
use zeroize::Zeroizing;

use crate::arena::{ARENA, Place};

/// 32 bytes in the locked arena of this process.
pub struct LockedKey(Place);

impl LockedKey {
    /// Makes a new key, in place.
    pub fn generate(rng: &mut dyn CryptoRng) -> Self {
        Self::filled(|bytes| rng.fill_bytes(bytes))
    }

    /// Moves a key into locked memory; the source is wiped.
    pub fn from_zeroizing(source: Zeroizing<[u8; 32]>) -> Self {
        Self::filled(|bytes| bytes.copy_from_slice(source.as_slice()))
    }

    /// The key, for the call that uses it.
    pub fn expose_secret(&self) -> &[u8; 32] {
        self.0.bytes()
    }

    /// Whether the system granted the lock: if not, the key may reach the swap device.
    pub fn is_locked(&self) -> bool {
        self.0.locked
    }

    /// A key that `fill` writes where it stays.
    pub(crate) fn filled(fill: impl FnOnce(&mut [u8; 32])) -> Self {
        let mut key = Self(ARENA.take());
        fill(key.0.bytes_mut());
        key
    }
}

impl Drop for LockedKey {
    fn drop(&mut self) {
        ARENA.give_back(&mut self.0);
    }
}

#[cfg(test)]
mod tests {
    use std::fmt::{Debug, Display};

    use rand_chacha::ChaCha20Rng;
    use rand_core::SeedableRng;
    use static_assertions::{assert_impl_all, assert_not_impl_any};

    use super::*;

    assert_not_impl_any!(LockedKey: Clone, Copy, Debug, Display, PartialEq, serde::Serialize, AsRef<[u8]>);
    assert_impl_all!(LockedKey: Send, Sync);

    #[test]
    fn a_key_is_what_it_was_made_from() {
        let key = LockedKey::from_zeroizing(Zeroizing::new([7; 32]));
        assert_eq!(key.expose_secret(), &[7; 32]);
    }

    #[test]
    fn two_generated_keys_differ() {
        let mut rng = ChaCha20Rng::from_seed([1; 32]);
        let [a, b] = [LockedKey::generate(&mut rng), LockedKey::generate(&mut rng)];
        assert_ne!(a.expose_secret(), b.expose_secret());
        assert_ne!(a.expose_secret(), &[0; 32]);
    }

    #[test]
    fn keys_made_and_dropped_by_many_threads_keep_their_bytes() {
        std::thread::scope(|scope| {
            for n in 0..8_u8 {
                scope.spawn(move || {
                    for _ in 0..500 {
                        let keys = [n, n + 100].map(|b| LockedKey::from_zeroizing(Zeroizing::new([b; 32])));
                        std::thread::yield_now();
                        assert_eq!(keys[0].expose_secret(), &[n; 32]);
                        assert_eq!(keys[1].expose_secret(), &[n + 100; 32]);
                    }
                });
            }
        });
    }
}
