//! Names of clusters, stores, slots, keys and key versions.
//!
//! Ids are 128 random bits, printed as a UUID; all are public and may be logged. An id is never derived from
//! a key, and a text that is not the one canonical spelling is refused, so that an id can be compared as text.

use std::fmt;
use std::num::NonZeroU32;
use std::str::FromStr;

use rand_core::CryptoRng;

/// Declares a 16-byte id as a type of its own, so that one kind is never taken for another.
macro_rules! id {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name([u8; 16]);

        impl $name {
            /// Draws a new id: 128 random bits, with no bits set aside for a UUID version.
            pub fn generate(rng: &mut dyn CryptoRng) -> Self {
                let mut bytes = [0; 16];
                rng.fill_bytes(&mut bytes);
                Self(bytes)
            }

            /// Takes an id from its bytes in a stored or received format.
            pub const fn from_bytes(bytes: [u8; 16]) -> Self {
                Self(bytes)
            }

            /// The bytes that formats and AEAD contexts carry.
            pub const fn as_bytes(&self) -> &[u8; 16] {
                &self.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write_uuid(&self.0, f)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write_uuid(&self.0, f)
            }
        }

        impl FromStr for $name {
            type Err = InvalidId;

            fn from_str(text: &str) -> Result<Self, InvalidId> {
                parse_uuid(text).map(Self)
            }
        }
    };
}

id! {
    /// One Kubernetes cluster, the tenant. Its name is only a label.
    ClusterId
}
id! {
    /// One key version, world-wide; also the KMS v2 `key_id`.
    KeyId
}
id! {
    /// One store, over all its backups and restores.
    StoreId
}
id! {
    /// One slot, a way to open the store key.
    SlotId
}

/// A key version's place in its keyring: counts up from 1, never reused.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct Version(NonZeroU32);

impl Version {
    /// The version that a new cluster starts with.
    pub const FIRST: Self = Self(NonZeroU32::MIN);

    /// The version with this number; `None` for 0, which names no version.
    pub const fn new(number: u32) -> Option<Self> {
        match NonZeroU32::new(number) {
            Some(number) => Some(Self(number)),
            None => None,
        }
    }

    /// The number, at least 1.
    pub const fn get(self) -> u32 {
        self.0.get()
    }

    /// The version after this one; `None` when the numbers are used up.
    pub fn next(self) -> Option<Self> {
        self.plus(1)
    }

    /// The version `n` after this one; `None` when the numbers are used up.
    pub fn plus(self, n: u32) -> Option<Self> {
        self.0.checked_add(n).map(Self)
    }
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// A text that is not an id in its canonical spelling.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error("not an id: expected a lower-case UUID such as 6f0c1a2e-93d4-4b57-8c21-0d9e5a7b3f18")]
pub struct InvalidId;

/// Where the hyphens stand in a UUID.
const HYPHENS: [usize; 4] = [8, 13, 18, 23];

/// Length of a hyphenated UUID.
const UUID_LEN: usize = 36;

fn write_uuid(bytes: &[u8; 16], f: &mut fmt::Formatter<'_>) -> fmt::Result {
    for (i, byte) in bytes.iter().enumerate() {
        if matches!(i, 4 | 6 | 8 | 10) {
            f.write_str("-")?;
        }
        write!(f, "{byte:02x}")?;
    }
    Ok(())
}

fn parse_uuid(text: &str) -> Result<[u8; 16], InvalidId> {
    if text.len() != UUID_LEN {
        return Err(InvalidId);
    }
    let mut value: u128 = 0;
    for (i, c) in text.bytes().enumerate() {
        let digit = match c {
            b'-' if HYPHENS.contains(&i) => continue,
            _ if HYPHENS.contains(&i) => return Err(InvalidId),
            b'0'..=b'9' => c - b'0',
            b'a'..=b'f' => c - b'a' + 10,
            _ => return Err(InvalidId),
        };
        value = value << 4 | u128::from(digit);
    }
    Ok(value.to_be_bytes())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use rand_chacha::ChaCha20Rng;
    use rand_core::SeedableRng;

    use super::*;

    #[test]
    fn an_id_prints_as_a_lower_case_uuid_and_reads_back() {
        let id = KeyId::from_bytes(*b"\x00\x01\x02\x03\x04\x05\x06\x07\x08\x09\x0a\x0b\xfc\xfd\xfe\xff");
        assert_eq!(id.to_string(), "00010203-0405-0607-0809-0a0bfcfdfeff");
        assert_eq!(format!("{id:?}"), id.to_string());
        assert_eq!(id.to_string().parse(), Ok(id));
    }

    #[test]
    fn only_the_canonical_spelling_of_an_id_is_read() {
        for text in [
            "",
            "00010203-0405-0607-0809-0a0bfcfdfef",
            "00010203-0405-0607-0809-0a0bfcfdfeff0",
            "00010203-0405-0607-0809-0A0BFCFDFEFF",
            "0001020304050607-0809-0a0bfcfdfeff--",
            "00010203-0405-0607-0809-0a0bfcfdfe-f",
            "{0010203-0405-0607-0809-0a0bfcfdfef}",
            "00010203+0405-0607-0809-0a0bfcfdfeff",
            "00010203-0405-0607-0809-0a0bfcfdfeé",
        ] {
            assert_eq!(text.parse::<ClusterId>(), Err(InvalidId), "{text}");
        }
    }

    #[test]
    fn two_generated_ids_differ() {
        let mut rng = ChaCha20Rng::from_seed([1; 32]);
        assert_ne!(StoreId::generate(&mut rng), StoreId::generate(&mut rng));
    }

    #[test]
    fn version_numbers_start_at_one_and_end_without_wrapping() {
        assert_eq!(Version::new(0), None);
        assert_eq!(Version::FIRST.get(), 1);
        assert_eq!(Version::FIRST.next(), Version::new(2));
        assert_eq!(Version::FIRST.plus(1_000), Version::new(1_001));
        assert_eq!(Version::new(u32::MAX).and_then(Version::next), None);
        assert!(Version::new(9) < Version::new(10));
    }

    proptest! {
        #[test]
        fn every_id_survives_its_text(bytes: [u8; 16]) {
            let id = StoreId::from_bytes(bytes);
            prop_assert_eq!(id.to_string().parse(), Ok(id));
        }
    }
}
