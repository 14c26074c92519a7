//! The AEAD of every wrap and seal: XAES-256-GCM (C2SP), the only place that names a cipher.
//!
//! `sealed = nonce (24 random bytes) ‖ ciphertext ‖ tag (16)`
//!
//! XAES-256-GCM derives an AES-256-GCM key from the first half of a 192-bit nonce, so random nonces stay safe
//! for 2^80 messages per key (C2SP XAES-256-GCM, "Security"): no counter is kept, and neither a restored
//! database nor a cloned machine can make a nonce repeat. Callers pass the generator, never a nonce. Nothing
//! here keeps a key or a key schedule beyond the call.

use rand_core::CryptoRng;
use xaes_256_gcm::aead::{AeadInOut, KeyInit};
use xaes_256_gcm::{Tag, Xaes256Gcm};
use zeroize::Zeroizing;

use crate::stack;

/// Length of the nonce that precedes the ciphertext.
pub const NONCE_LEN: usize = 24;

/// Length of the tag that follows it.
pub const TAG_LEN: usize = 16;

/// The bytes are not what was sealed under this key and context: altered, foreign, or too short.
///
/// One error for all, because telling them apart would help only who forged them.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error("the ciphertext does not open under this key and context")]
pub struct OpenError;

/// Encrypts `plaintext` under a fresh random nonce and returns nonce ‖ ciphertext ‖ tag.
pub fn seal(key: &[u8; 32], aad: &[u8], plaintext: &[u8], rng: &mut dyn CryptoRng) -> Vec<u8> {
    danger_seal_with_nonce(key, aad, plaintext, &fresh_nonce(rng))
}

/// [`seal`] with the nonce given: for vectors only, a repeated nonce gives the plaintext away.
pub fn danger_seal_with_nonce(
    key: &[u8; 32],
    aad: &[u8],
    plaintext: &[u8],
    nonce: &[u8; NONCE_LEN],
) -> Vec<u8> {
    let mut out = Vec::new();
    danger_append_with_nonce(&mut out, key, aad, plaintext, nonce);
    out
}

/// Decrypts nonce ‖ ciphertext ‖ tag.
///
/// # Errors
/// [`OpenError`] unless every byte and `aad` are what [`seal`] was given.
pub fn open(key: &[u8; 32], aad: &[u8], sealed: &[u8]) -> Result<Zeroizing<Vec<u8>>, OpenError> {
    let (nonce, rest) = sealed.split_first_chunk::<NONCE_LEN>().ok_or(OpenError)?;
    let (ciphertext, tag) = rest.split_last_chunk::<TAG_LEN>().ok_or(OpenError)?;
    let mut plaintext = Zeroizing::new(ciphertext.to_vec());
    let opened = decrypt(key, nonce, aad, &mut plaintext, tag);
    stack::burn();
    opened.map(|()| plaintext)
}

/// A nonce for one message.
pub(crate) fn fresh_nonce(rng: &mut dyn CryptoRng) -> [u8; NONCE_LEN] {
    let mut nonce = [0; NONCE_LEN];
    rng.fill_bytes(&mut nonce);
    nonce
}

/// Appends nonce ‖ ciphertext ‖ tag to a frame that its caller has begun.
pub(crate) fn danger_append_with_nonce(
    out: &mut Vec<u8>,
    key: &[u8; 32],
    aad: &[u8],
    plaintext: &[u8],
    nonce: &[u8; NONCE_LEN],
) {
    // Reserved in one piece: growing would leave a copy of the plaintext behind.
    out.reserve_exact(NONCE_LEN + plaintext.len() + TAG_LEN);
    out.extend_from_slice(nonce);
    let start = out.len();
    out.extend_from_slice(plaintext);
    let (_, buffer) = out.split_at_mut(start);
    let tag = encrypt(key, nonce, aad, buffer);
    stack::burn();
    out.extend_from_slice(&tag);
}

// Never inlined, nor is `decrypt`: `stack::burn` relies on it.
#[inline(never)]
fn encrypt(key: &[u8; 32], nonce: &[u8; NONCE_LEN], aad: &[u8], buffer: &mut [u8]) -> Tag {
    Xaes256Gcm::new(key.into())
        .encrypt_inout_detached(nonce.into(), aad, buffer.into())
        .expect("no message of this program comes near the 64 GiB limit of GCM")
}

#[inline(never)]
fn decrypt(
    key: &[u8; 32],
    nonce: &[u8; NONCE_LEN],
    aad: &[u8],
    buffer: &mut [u8],
    tag: &[u8; TAG_LEN],
) -> Result<(), OpenError> {
    Xaes256Gcm::new(key.into())
        .decrypt_inout_detached(nonce.into(), aad, buffer.into(), tag.into())
        .map_err(|_| OpenError)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use rand_chacha::ChaCha20Rng;
    use rand_core::SeedableRng;

    use super::*;

    #[test]
    fn what_is_sealed_opens_and_shows_no_plaintext() {
        let mut rng = ChaCha20Rng::from_seed([1; 32]);
        let sealed = seal(&[7; 32], b"context", b"a secret of 25 bytes long", &mut rng);
        assert_eq!(sealed.len(), NONCE_LEN + 25 + TAG_LEN);
        assert!(!sealed.windows(8).any(|w| w == b"a secret"));
        assert_eq!(open(&[7; 32], b"context", &sealed).unwrap().as_slice(), b"a secret of 25 bytes long");
    }

    #[test]
    fn one_plaintext_sealed_twice_gives_different_bytes() {
        let mut rng = ChaCha20Rng::from_seed([1; 32]);
        assert_ne!(seal(&[7; 32], b"", b"same", &mut rng), seal(&[7; 32], b"", b"same", &mut rng));
    }

    #[test]
    fn another_key_or_context_does_not_open() {
        let mut rng = ChaCha20Rng::from_seed([1; 32]);
        let sealed = seal(&[7; 32], b"context", b"secret", &mut rng);
        assert_eq!(open(&[8; 32], b"context", &sealed), Err(OpenError));
        assert_eq!(open(&[7; 32], b"contexT", &sealed), Err(OpenError));
        assert_eq!(open(&[7; 32], b"", &sealed), Err(OpenError));
    }

    #[test]
    fn every_shorter_input_is_refused() {
        let sealed = danger_seal_with_nonce(&[7; 32], b"", b"secret", &[9; NONCE_LEN]);
        for len in 0..sealed.len() {
            assert_eq!(open(&[7; 32], b"", &sealed[..len]), Err(OpenError), "{len} bytes");
        }
    }

    proptest! {
        #[test]
        fn any_message_opens_and_any_flipped_bit_does_not(
            key: [u8; 32], aad: Vec<u8>, plaintext: Vec<u8>, nonce: [u8; NONCE_LEN], flip: prop::sample::Index,
        ) {
            let mut sealed = danger_seal_with_nonce(&key, &aad, &plaintext, &nonce);
            let opened = open(&key, &aad, &sealed);
            prop_assert_eq!(opened.as_deref(), Ok(&plaintext));
            let bit = flip.index(sealed.len() * 8);
            sealed[bit / 8] ^= 1 << (bit % 8);
            prop_assert_eq!(open(&key, &aad, &sealed), Err(OpenError));
        }
    }
}
