//! The wrapped DEK: the bytes that live in a cluster's etcd for years.
//!
//! | offset | length | field (big-endian) |
//! |---|---|---|
//! | 0 | 1 | format = 1 |
//! | 1 | 4 | version, u32 ≥ 1 |
//! | 5 | 16 | key id |
//! | 21 | 24 | nonce |
//! | 45 | n + 16 | ciphertext ‖ tag, 1 ≤ n ≤ 1,024 |
//!
//! `AAD = "fleet-kms/wrapped-dek/1" ‖ bytes 0..21 ‖ cluster id`. The cluster is bound but not stored: a value
//! copied into another cluster's etcd does not open there, and who asks for it is known from the caller's
//! certificate. The header is readable without a key, which is what makes a census possible; it is not proven
//! until the DEK opens. This format is frozen: a change is a new format number, and format 1 opens for ever.

use rand_core::CryptoRng;
use zeroize::Zeroizing;

use crate::aead::{self, NONCE_LEN, TAG_LEN};
use crate::{ClusterId, Kek, KeyId, Version};

/// Longest DEK that is wrapped: 32 bytes are usual, KMS v2 limits the wrapped form to 1,024.
pub const MAX_DEK: usize = 1024;

/// How much longer the wrapped DEK is than the DEK.
pub const OVERHEAD: usize = HEADER_LEN + NONCE_LEN + TAG_LEN;

/// What a wrapped DEK says of itself: which key version wrapped it.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Header {
    /// The version's place in its keyring.
    pub version: Version,
    /// The version's name; the one to look up by.
    pub key_id: KeyId,
}

/// A wrapped DEK whose frame is right; whether it opens, only its key can say.
#[derive(Clone, Copy)]
pub struct WrappedDek<'a> {
    header: Header,
    sealed: &'a [u8],
}

impl<'a> WrappedDek<'a> {
    /// Reads the frame of a wrapped DEK, without a key.
    ///
    /// # Errors
    /// [`MalformedWrappedDek`] for a length outside 62..=1,085, a format other than 1, or version 0.
    pub fn parse(bytes: &'a [u8]) -> Result<Self, MalformedWrappedDek> {
        let malformed_length = MalformedWrappedDek::Length { len: bytes.len() };
        if !(OVERHEAD + 1..=OVERHEAD + MAX_DEK).contains(&bytes.len()) {
            return Err(malformed_length);
        }
        let (&[format], rest) = bytes.split_first_chunk().ok_or(malformed_length)?;
        if format != FORMAT {
            return Err(MalformedWrappedDek::Format { format });
        }
        let (version, rest) = rest.split_first_chunk().ok_or(malformed_length)?;
        let (key_id, sealed) = rest.split_first_chunk().ok_or(malformed_length)?;
        let version = Version::new(u32::from_be_bytes(*version)).ok_or(MalformedWrappedDek::VersionZero)?;
        Ok(Self { header: Header { version, key_id: KeyId::from_bytes(*key_id) }, sealed })
    }

    /// What the wrapped DEK says of itself; unproven until it opens.
    pub fn header(&self) -> Header {
        self.header
    }
}

/// Wraps a DEK for one cluster under the key version that `header` names.
///
/// # Errors
/// [`WrapError`] for an empty DEK or one longer than [`MAX_DEK`].
pub fn wrap(
    kek: &Kek,
    header: Header,
    cluster: &ClusterId,
    dek: &[u8],
    rng: &mut dyn CryptoRng,
) -> Result<Vec<u8>, WrapError> {
    danger_wrap_with_nonce(kek, header, cluster, dek, &aead::fresh_nonce(rng))
}

/// [`wrap`] with the nonce given: for vectors only, a repeated nonce gives the DEK away.
///
/// # Errors
/// As [`wrap`].
pub fn danger_wrap_with_nonce(
    kek: &Kek,
    header: Header,
    cluster: &ClusterId,
    dek: &[u8],
    nonce: &[u8; NONCE_LEN],
) -> Result<Vec<u8>, WrapError> {
    match dek.len() {
        0 => return Err(WrapError::Empty),
        len if len > MAX_DEK => return Err(WrapError::TooLong { len }),
        _ => {}
    }
    let mut out = Vec::with_capacity(OVERHEAD + dek.len());
    out.extend_from_slice(&encode_header(header));
    aead::danger_append_with_nonce(&mut out, kek.expose_secret(), &aad(header, cluster), dek, nonce);
    Ok(out)
}

/// Opens a wrapped DEK of `cluster` with the KEK that its header names.
///
/// # Errors
/// [`UnwrapError`] if any byte was altered, or the KEK or the cluster is another.
pub fn unwrap(
    kek: &Kek,
    cluster: &ClusterId,
    wrapped: &WrappedDek<'_>,
) -> Result<Zeroizing<Vec<u8>>, UnwrapError> {
    aead::open(kek.expose_secret(), &aad(wrapped.header, cluster), wrapped.sealed).map_err(UnwrapError)
}

/// Bytes that do not have the frame of a wrapped DEK.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum MalformedWrappedDek {
    /// Too short or too long for any DEK.
    #[error("a wrapped DEK has 62 to 1085 bytes, not {len}")]
    Length {
        /// Length of the bytes.
        len: usize,
    },
    /// A format that this release does not know.
    #[error("unknown wrapped-DEK format {format}")]
    Format {
        /// The format byte.
        format: u8,
    },
    /// Version 0, which names no key.
    #[error("version 0 in the header of a wrapped DEK")]
    VersionZero,
}

/// Why a DEK is not wrapped.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum WrapError {
    /// There is nothing to wrap.
    #[error("the DEK is empty")]
    Empty,
    /// Longer than any DEK.
    #[error("the DEK has {len} bytes, at most 1024 are wrapped")]
    TooLong {
        /// Length of the DEK.
        len: usize,
    },
}

/// The wrapped DEK does not open: altered, or of another key or cluster.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error("the wrapped DEK does not open")]
pub struct UnwrapError(#[source] aead::OpenError);

const FORMAT: u8 = 1;

const HEADER_LEN: usize = 1 + 4 + 16;

const CONTEXT: &[u8; 23] = b"fleet-kms/wrapped-dek/1";

fn encode_header(header: Header) -> [u8; HEADER_LEN] {
    let mut out = [FORMAT; HEADER_LEN];
    let (_, rest) = out.split_at_mut(1);
    let (version, key_id) = rest.split_at_mut(4);
    version.copy_from_slice(&header.version.get().to_be_bytes());
    key_id.copy_from_slice(header.key_id.as_bytes());
    out
}

/// Every part has a fixed length, so two contexts never spell the same bytes.
fn aad(header: Header, cluster: &ClusterId) -> Vec<u8> {
    let mut out = Vec::with_capacity(CONTEXT.len() + HEADER_LEN + 16);
    out.extend_from_slice(CONTEXT);
    out.extend_from_slice(&encode_header(header));
    out.extend_from_slice(cluster.as_bytes());
    out
}

#[cfg(test)]
mod tests {
    use rand_chacha::ChaCha20Rng;
    use rand_core::SeedableRng;

    use super::*;

    const CLUSTER: ClusterId = ClusterId::from_bytes([0xc1; 16]);
    const HEADER: Header = Header { version: Version::FIRST, key_id: KeyId::from_bytes([0xab; 16]) };

    fn kek() -> Kek {
        Kek::danger_from_bytes(&mut [7; 32])
    }

    fn wrapped(dek: &[u8]) -> Vec<u8> {
        wrap(&kek(), HEADER, &CLUSTER, dek, &mut ChaCha20Rng::from_seed([1; 32])).unwrap()
    }

    #[test]
    fn a_32_byte_dek_becomes_93_bytes_and_comes_back() {
        let bytes = wrapped(&[5; 32]);
        assert_eq!(bytes.len(), 93);
        let parsed = WrappedDek::parse(&bytes).unwrap();
        assert_eq!(parsed.header(), HEADER);
        assert_eq!(unwrap(&kek(), &CLUSTER, &parsed).unwrap().as_slice(), &[5; 32]);
    }

    #[test]
    fn deks_of_1_to_1024_bytes_are_wrapped_and_no_others() {
        let rng = &mut ChaCha20Rng::from_seed([1; 32]);
        let mut of_len = |len| wrap(&kek(), HEADER, &CLUSTER, &vec![5; len], rng).map(|w| w.len());
        assert_eq!(of_len(0), Err(WrapError::Empty));
        assert_eq!(of_len(1), Ok(62));
        assert_eq!(of_len(MAX_DEK), Ok(1085));
        assert_eq!(of_len(MAX_DEK + 1), Err(WrapError::TooLong { len: 1025 }));
    }

    #[test]
    fn a_malformed_frame_is_refused_with_its_reason() {
        let good = wrapped(&[5; 32]);
        let parse = |bytes: &[u8]| WrappedDek::parse(bytes).map(|w| w.header()).unwrap_err();
        assert_eq!(parse(&[]), MalformedWrappedDek::Length { len: 0 });
        assert_eq!(parse(&good[..61]), MalformedWrappedDek::Length { len: 61 });
        assert_eq!(parse(&[1; 1086]), MalformedWrappedDek::Length { len: 1086 });
        for format in (0..=u8::MAX).filter(|f| *f != 1) {
            let mut bytes = good.clone();
            bytes[0] = format;
            assert_eq!(parse(&bytes), MalformedWrappedDek::Format { format });
        }
        let mut bytes = good;
        bytes[1..5].fill(0);
        assert_eq!(parse(&bytes), MalformedWrappedDek::VersionZero);
    }
}
