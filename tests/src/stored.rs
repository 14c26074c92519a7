//! What kube-apiserver stores in etcd under KMS v1 and v2, as far as it is readable without a key.

use anyhow::{Context, ensure};

/// What the documentation of KMS tells a user to look for.
pub const V1_PREFIX: &str = "k8s:enc:kms:v1:kms-plugin:";
/// The same for KMS v2.
pub const V2_PREFIX: &str = "k8s:enc:kms:v2:kms-plugin:";

/// The header of a wrapped DEK (docs/wire-format.md).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Header {
    /// The format.
    pub format: u8,
    /// The key version.
    pub version: u32,
    /// The key id, as kmsctl prints it.
    pub key_id: String,
}

impl Header {
    /// Reads the header of the wrapped DEK in a value of etcd.
    ///
    /// # Errors
    /// When the value is not one of our provider's.
    pub fn of_stored(value: &[u8]) -> anyhow::Result<Self> {
        if let Some(rest) = value.strip_prefix(V1_PREFIX.as_bytes()) {
            let (length, rest) = rest.split_first_chunk().context("no length")?;
            let length = usize::from(u16::from_be_bytes(*length));
            return Self::of_wrapped(rest.get(..length).context("shorter than its wrapped DEK")?);
        }
        let rest = value.strip_prefix(V2_PREFIX.as_bytes());
        let object = rest.with_context(|| format!("no prefix: {}", String::from_utf8_lossy(value)))?;
        let header = Self::of_wrapped(protobuf_field(object, ENCRYPTED_DEK_SOURCE)?)?;
        let key_id = protobuf_field(object, KEY_ID)?;
        ensure!(key_id == header.key_id.as_bytes(), "key id {key_id:?} beside {header:?}");
        Ok(header)
    }

    fn of_wrapped(wrapped: &[u8]) -> anyhow::Result<Self> {
        let (&format, rest) = wrapped.split_first().context("no format")?;
        let (version, rest) = rest.split_first_chunk().context("no version")?;
        let key_id = rest.get(..16).context("no key id")?;
        let hex = data_encoding::HEXLOWER.encode(key_id);
        let mut key_id = String::new();
        for (at, digit) in hex.chars().enumerate() {
            if matches!(at, 8 | 12 | 16 | 20) {
                key_id.push('-');
            }
            key_id.push(digit);
        }
        Ok(Self { format, version: u32::from_be_bytes(*version), key_id })
    }
}

/// Fields of kube-apiserver's `v2.EncryptedObject`.
const KEY_ID: u64 = 2;
const ENCRYPTED_DEK_SOURCE: u64 = 3;

/// The first length-delimited field of this number.
fn protobuf_field(mut message: &[u8], number: u64) -> anyhow::Result<&[u8]> {
    const LENGTH_DELIMITED: u64 = 2;
    loop {
        let tag = varint(&mut message).with_context(|| format!("no field {number}"))?;
        let value = varint(&mut message)?;
        if tag & 7 != LENGTH_DELIMITED {
            ensure!(tag & 7 == 0, "wire type {}", tag & 7);
            continue;
        }
        let (field, rest) = message.split_at_checked(usize::try_from(value)?).context("a cut field")?;
        if tag >> 3 == number {
            return Ok(field);
        }
        message = rest;
    }
}

fn varint(message: &mut &[u8]) -> anyhow::Result<u64> {
    let mut value = 0;
    for shift in (0..64).step_by(7) {
        let (&byte, rest) = message.split_first().context("the end")?;
        *message = rest;
        value |= u64::from(byte & 0x7f) << shift;
        if byte < 0x80 {
            return Ok(value);
        }
    }
    anyhow::bail!("a varint of more than ten bytes")
}

#[cfg(test)]
mod tests {
    use super::*;

    const ID: [u8; 16] = [0xab, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15];
    const ID_TEXT: &str = "ab010203-0405-0607-0809-0a0b0c0d0e0f";

    fn wrapped() -> Vec<u8> {
        [&[1, 0, 0, 1, 2][..], &ID, &[0; 72]].concat()
    }

    fn expected() -> Header {
        Header { format: 1, version: 258, key_id: ID_TEXT.to_owned() }
    }

    #[test]
    fn the_header_is_found_in_both_versions() {
        let v1 = [V1_PREFIX.as_bytes(), &[0, 93], &wrapped(), b"the object"].concat();
        assert_eq!(Header::of_stored(&v1).unwrap(), expected());

        let object =
            [&[0x0a, 2, 7, 7, 0x12, 36][..], ID_TEXT.as_bytes(), &[0x1a, 93], &wrapped(), &[0x28, 1]]
                .concat();
        let v2 = [V2_PREFIX.as_bytes(), &object].concat();
        assert_eq!(Header::of_stored(&v2).unwrap(), expected());
    }

    #[test]
    fn anything_else_is_an_error() {
        for value in [&b"k8s\0plain"[..], V1_PREFIX.as_bytes(), V2_PREFIX.as_bytes(), b""] {
            assert!(Header::of_stored(value).is_err());
        }
    }
}
