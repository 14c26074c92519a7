//! A key-encryption key, opened for one call.
//!
//! A `Kek` lives as short as the call that needs it and is wiped when dropped. It is never cloned, printed or
//! serialized; at rest it exists only as a sealed blob (`sealed.rs`).

use rand_core::CryptoRng;
use secrecy::{ExposeSecret, SecretBox};
use zeroize::Zeroize;

/// One version of a cluster's key-encryption key: 256 bits that wrap DEKs.
pub struct Kek(SecretBox<[u8; 32]>);

impl Kek {
    /// Makes a new key, in place. Keys are only ever made here: there is no import.
    pub fn generate(rng: &mut dyn CryptoRng) -> Self {
        Self(SecretBox::init_with_mut(|key: &mut [u8; 32]| rng.fill_bytes(key)))
    }

    /// Takes a key from bytes that the caller knows, and wipes them: for vectors and tests only.
    pub fn danger_from_bytes(bytes: &mut [u8; 32]) -> Self {
        let kek = Self(SecretBox::init_with_mut(|key: &mut [u8; 32]| key.copy_from_slice(bytes)));
        bytes.zeroize();
        kek
    }

    /// Takes a key out of an opened sealed blob; `None` unless it is 32 bytes long.
    pub(crate) fn from_opened(opened: &[u8]) -> Option<Self> {
        let bytes: &[u8; 32] = opened.try_into().ok()?;
        Some(Self(SecretBox::init_with_mut(|key: &mut [u8; 32]| key.copy_from_slice(bytes))))
    }

    pub(crate) fn expose_secret(&self) -> &[u8; 32] {
        self.0.expose_secret()
    }
}

#[cfg(test)]
mod tests {
    use std::fmt::{Debug, Display};

    use rand_chacha::ChaCha20Rng;
    use rand_core::SeedableRng;
    use static_assertions::assert_not_impl_any;

    use super::*;

    assert_not_impl_any!(Kek: Clone, Copy, Debug, Display, PartialEq, serde::Serialize, AsRef<[u8]>);

    #[test]
    fn two_generated_keys_differ() {
        let mut rng = ChaCha20Rng::from_seed([1; 32]);
        assert_ne!(Kek::generate(&mut rng).expose_secret(), Kek::generate(&mut rng).expose_secret());
    }

    #[test]
    fn the_bytes_that_a_key_is_taken_from_are_wiped() {
        let mut bytes = [7; 32];
        let kek = Kek::danger_from_bytes(&mut bytes);
        assert_eq!(bytes, [0; 32]);
        assert_eq!(kek.expose_secret(), &[7; 32]);
    }

    #[test]
    fn only_32_bytes_are_a_key() {
        assert!(Kek::from_opened(&[7; 31]).is_none());
        assert!(Kek::from_opened(&[7; 32]).is_some());
        assert!(Kek::from_opened(&[7; 33]).is_none());
    }
}
