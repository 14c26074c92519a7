//! The sealed blob: a key or another secret at rest in the store, under a key derived from the store key.
//!
//! `blob = format u8 (1) ‖ epoch u32 ‖ nonce (24) ‖ ciphertext ‖ tag (16)`, big-endian, with
//! `AAD = "fleet-kms/sealed/1" ‖ store id ‖ row name (u16 length ‖ bytes) ‖ kind u8 ‖ format ‖ epoch`.
//!
//! Bound to its store, row, kind and epoch, a blob opens nowhere but where it was put: who can write to the
//! store's disk cannot swap one cluster's KEK for another's. This module derives no key and stores nothing.

use rand_core::CryptoRng;
use secrecy::{ExposeSecret, SecretBox};
use zeroize::{Zeroize, Zeroizing};

use crate::aead::{self, NONCE_LEN, TAG_LEN};
use crate::{Kek, StoreId};

/// The key that seals rows of one store in one epoch; derived from the store key for one call.
pub struct SealKey(SecretBox<[u8; 32]>);

impl SealKey {
    /// Takes the key from its bytes and wipes them.
    pub fn from_bytes(bytes: &mut [u8; 32]) -> Self {
        let key = Self(SecretBox::init_with_mut(|key: &mut [u8; 32]| key.copy_from_slice(bytes)));
        bytes.zeroize();
        key
    }
}

/// What a blob holds; part of its AAD, so that one kind never opens as another.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Kind {
    /// A key-encryption key.
    Kek = 1,
    /// A private key of the fleet CA.
    CaKey = 2,
    /// The store's head: its revision and the set hash of its rows.
    Head = 3,
    /// The store key of the epoch before, while a rotation of the store key is under way.
    OlderStoreKey = 4,
}

/// Where a blob belongs.
#[derive(Clone, Copy, Debug)]
pub struct SealContext<'a> {
    /// The store.
    pub store: StoreId,
    /// The row's name; the store limits it to 255 bytes.
    pub row: &'a [u8],
    /// What the blob holds.
    pub kind: Kind,
    /// The epoch of the store key that sealed it.
    pub epoch: u32,
}

/// Seals `plaintext` for one place in the store.
pub fn seal(key: &SealKey, context: &SealContext<'_>, plaintext: &[u8], rng: &mut dyn CryptoRng) -> Vec<u8> {
    danger_seal_with_nonce(key, context, plaintext, &aead::fresh_nonce(rng))
}

/// [`seal`] with the nonce given: for vectors only, a repeated nonce gives the plaintext away.
pub fn danger_seal_with_nonce(
    key: &SealKey,
    context: &SealContext<'_>,
    plaintext: &[u8],
    nonce: &[u8; NONCE_LEN],
) -> Vec<u8> {
    let mut out = Vec::with_capacity(OVERHEAD + plaintext.len());
    out.push(FORMAT);
    out.extend_from_slice(&context.epoch.to_be_bytes());
    aead::danger_append_with_nonce(&mut out, key.0.expose_secret(), &aad(context), plaintext, nonce);
    out
}

/// Opens a blob that stands where `context` says.
///
/// # Errors
/// [`OpenError`] unless the blob was sealed under this key, for this place and epoch, and is unaltered.
pub fn open(key: &SealKey, context: &SealContext<'_>, blob: &[u8]) -> Result<Zeroizing<Vec<u8>>, OpenError> {
    let (epoch, sealed) = split(blob)?;
    if epoch != context.epoch {
        return Err(OpenError::Epoch { expected: context.epoch, found: epoch });
    }
    aead::open(key.0.expose_secret(), &aad(context), sealed).map_err(OpenError::Refused)
}

/// The epoch whose store key opens this blob; unproven until it does.
///
/// # Errors
/// [`OpenError`] for a blob that is too short or of a format that this release does not know.
pub fn epoch_of(blob: &[u8]) -> Result<u32, OpenError> {
    split(blob).map(|(epoch, _)| epoch)
}

/// Seals a KEK; the kind is [`Kind::Kek`] whatever `context` says.
pub fn seal_kek(key: &SealKey, context: &SealContext<'_>, kek: &Kek, rng: &mut dyn CryptoRng) -> Vec<u8> {
    seal(key, &SealContext { kind: Kind::Kek, ..*context }, kek.expose_secret(), rng)
}

/// Opens a KEK; the kind is [`Kind::Kek`] whatever `context` says.
///
/// # Errors
/// As [`open`], and for a blob that holds anything but 32 bytes.
pub fn open_kek(key: &SealKey, context: &SealContext<'_>, blob: &[u8]) -> Result<Kek, OpenError> {
    let opened = open(key, &SealContext { kind: Kind::Kek, ..*context }, blob)?;
    Kek::from_opened(&opened).ok_or(OpenError::NotAKey { len: opened.len() })
}

/// Why a sealed blob does not open.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum OpenError {
    /// Too short for any blob.
    #[error("a sealed blob has at least 45 bytes, not {len}")]
    Length {
        /// Length of the bytes.
        len: usize,
    },
    /// A format that this release does not know.
    #[error("unknown sealed-blob format {format}: use the release that wrote it, or a later one")]
    Format {
        /// The format byte.
        format: u8,
    },
    /// Sealed under the store key of another epoch.
    #[error("the blob is sealed under epoch {found}, not {expected}")]
    Epoch {
        /// The epoch that the caller has the key of.
        expected: u32,
        /// The epoch that the blob names.
        found: u32,
    },
    /// Altered, moved from another place, or sealed under another key.
    #[error("the sealed blob does not open here")]
    Refused(#[source] aead::OpenError),
    /// It opens, but holds no key.
    #[error("the sealed blob holds {len} bytes where a key has 32")]
    NotAKey {
        /// Length of what it holds.
        len: usize,
    },
}

const FORMAT: u8 = 1;

/// How much longer a blob is than what it holds.
const OVERHEAD: usize = 1 + 4 + NONCE_LEN + TAG_LEN;

const CONTEXT: &[u8] = b"fleet-kms/sealed/1";

fn split(blob: &[u8]) -> Result<(u32, &[u8]), OpenError> {
    let too_short = OpenError::Length { len: blob.len() };
    let (&format, rest) = blob.split_first().ok_or(too_short)?;
    if format != FORMAT {
        return Err(OpenError::Format { format });
    }
    if blob.len() < OVERHEAD {
        return Err(too_short);
    }
    let (epoch, sealed) = rest.split_first_chunk().ok_or(too_short)?;
    Ok((u32::from_be_bytes(*epoch), sealed))
}

/// The row name is the only part of variable length and carries its own: two places never spell the same.
fn aad(context: &SealContext<'_>) -> Vec<u8> {
    let row_len = u16::try_from(context.row.len()).expect("the store limits a row name to 255 bytes");
    let mut out = Vec::with_capacity(CONTEXT.len() + 16 + 2 + context.row.len() + 6);
    out.extend_from_slice(CONTEXT);
    out.extend_from_slice(context.store.as_bytes());
    out.extend_from_slice(&row_len.to_be_bytes());
    out.extend_from_slice(context.row);
    out.push(context.kind as u8);
    out.push(FORMAT);
    out.extend_from_slice(&context.epoch.to_be_bytes());
    out
}

#[cfg(test)]
mod tests {
    use std::fmt::{Debug, Display};

    use rand_chacha::ChaCha20Rng;
    use rand_core::SeedableRng;
    use static_assertions::assert_not_impl_any;

    use super::*;

    assert_not_impl_any!(SealKey: Clone, Copy, Debug, Display, PartialEq, serde::Serialize, AsRef<[u8]>);

    const HERE: SealContext<'_> =
        SealContext { store: StoreId::from_bytes([0x5a; 16]), row: b"kek/1/1", kind: Kind::Head, epoch: 3 };

    fn key() -> SealKey {
        SealKey::from_bytes(&mut [7; 32])
    }

    fn rng() -> ChaCha20Rng {
        ChaCha20Rng::from_seed([1; 32])
    }

    #[test]
    fn a_blob_opens_where_it_was_put_and_names_its_epoch() {
        let blob = seal(&key(), &HERE, b"secret", &mut rng());
        assert_eq!(blob.len(), OVERHEAD + 6);
        assert_eq!(epoch_of(&blob), Ok(3));
        assert_eq!(open(&key(), &HERE, &blob).unwrap().as_slice(), b"secret");
    }

    #[test]
    fn a_blob_opens_in_no_other_place() {
        let blob = seal(&key(), &HERE, b"secret", &mut rng());
        let refused = Err(OpenError::Refused(aead::OpenError));
        for elsewhere in [
            SealContext { store: StoreId::from_bytes([0x5b; 16]), ..HERE },
            SealContext { row: b"kek/1/2", ..HERE },
            SealContext { row: b"kek/1/", ..HERE },
            SealContext { kind: Kind::CaKey, ..HERE },
        ] {
            assert_eq!(open(&key(), &elsewhere, &blob), refused, "{elsewhere:?}");
        }
        let later = SealContext { epoch: 4, ..HERE };
        assert_eq!(open(&key(), &later, &blob), Err(OpenError::Epoch { expected: 4, found: 3 }));
        assert_eq!(open(&SealKey::from_bytes(&mut [8; 32]), &HERE, &blob), refused);
    }

    #[test]
    fn a_blob_whose_epoch_was_rewritten_does_not_open() {
        let mut blob = seal(&key(), &HERE, b"secret", &mut rng());
        blob[4] = 4;
        let later = SealContext { epoch: 4, ..HERE };
        assert_eq!(open(&key(), &later, &blob), Err(OpenError::Refused(aead::OpenError)));
    }

    #[test]
    fn a_short_blob_and_a_newer_format_are_refused_with_their_reason() {
        let mut blob = seal(&key(), &HERE, b"", &mut rng());
        assert_eq!(epoch_of(&[]), Err(OpenError::Length { len: 0 }));
        assert_eq!(epoch_of(&blob[..OVERHEAD - 1]), Err(OpenError::Length { len: OVERHEAD - 1 }));
        blob[0] = 2;
        assert_eq!(open(&key(), &HERE, &blob), Err(OpenError::Format { format: 2 }));
        assert!(OpenError::Format { format: 2 }.to_string().contains("use the release that wrote it"));
    }

    #[test]
    fn a_kek_opens_only_as_a_kek() {
        let blob = seal_kek(&key(), &HERE, &Kek::danger_from_bytes(&mut [9; 32]), &mut rng());
        assert_eq!(open_kek(&key(), &HERE, &blob).ok().unwrap().expose_secret(), &[9; 32]);
        assert_eq!(open(&key(), &HERE, &blob), Err(OpenError::Refused(aead::OpenError)));

        let as_kek = SealContext { kind: Kind::Kek, ..HERE };
        let blob = seal(&key(), &as_kek, &[9; 31], &mut rng());
        assert_eq!(open_kek(&key(), &HERE, &blob).err(), Some(OpenError::NotAKey { len: 31 }));
    }

    #[test]
    fn the_bytes_that_a_key_is_taken_from_are_wiped() {
        let mut bytes = [7; 32];
        SealKey::from_bytes(&mut bytes);
        assert_eq!(bytes, [0; 32]);
    }
}
