//! The public part of a wrapped DEK, as far as a node may know it.
//!
//! It reads two fields at fixed offsets (docs/wire-format.md). It must never
//! judge a wrapped DEK: that needs the key, and only an agent has it.

/// Where the key id ends; the nonce follows.
const LENGTH: usize = 21;

/// Which version of which key wrapped a DEK, as its header says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct WrappedHeader {
    /// The version number.
    pub version: u32,
    /// The key id.
    pub key_id: KeyId,
}

impl WrappedHeader {
    /// Reads the header; `None` if there are too few bytes or the format is
    /// another one.
    pub fn read(wrapped: &[u8]) -> Option<Self> {
        let [1, v0, v1, v2, v3, key_id @ ..] = *wrapped.first_chunk::<LENGTH>()? else { return None };
        Some(Self { version: u32::from_be_bytes([v0, v1, v2, v3]), key_id: KeyId(key_id) })
    }
}

/// The name of one key version: public, printed as a UUID. It is the KMS v2
/// `key_id`.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct KeyId([u8; 16]);

impl KeyId {
    /// Takes the 16 bytes that an agent answers.
    pub fn from_slice(bytes: &[u8]) -> Option<Self> {
        bytes.try_into().ok().map(Self)
    }

    /// Returns the 16 bytes.
    pub fn as_bytes(&self) -> &[u8; 16] {
        &self.0
    }
}

impl std::fmt::Display for KeyId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        uuid::Uuid::from_bytes(self.0).hyphenated().fmt(f)
    }
}

impl std::fmt::Debug for KeyId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        std::fmt::Display::fmt(self, f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_header_is_read_at_its_offsets() {
        let wrapped: Vec<u8> = [1, 0, 0, 1, 2].into_iter().chain(0x10..0x20).chain([9; 40]).collect();
        let header = WrappedHeader::read(&wrapped).unwrap();
        assert_eq!(header.version, 258);
        assert_eq!(header.key_id.to_string(), "10111213-1415-1617-1819-1a1b1c1d1e1f");
    }

    #[test]
    fn too_few_bytes_and_another_format_have_no_header() {
        assert_eq!(WrappedHeader::read(&[1; 20]), None);
        assert_eq!(WrappedHeader::read(&[2; 93]), None);
        assert_eq!(WrappedHeader::read(&[]), None);
    }
}
