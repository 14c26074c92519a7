//! Row names, revisions and rows: the words that every backend shares.

use std::borrow::Borrow;
use std::fmt;

/// The longest row name, in bytes; a backend may use names as keys of any index.
const MAX_NAME: usize = 255;

/// A row's name: 1 to 255 printable ASCII bytes, ordered bytewise.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RowName(String);

impl RowName {
    /// Returns the name as text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Returns the name as bytes, as it is bound into what a row's bytes authenticate.
    #[must_use]
    pub fn as_bytes(&self) -> &[u8] {
        self.0.as_bytes()
    }
}

impl TryFrom<String> for RowName {
    type Error = InvalidRowName;

    fn try_from(name: String) -> Result<Self, InvalidRowName> {
        if name.is_empty() || name.len() > MAX_NAME {
            return Err(InvalidRowName::Length(name.len()));
        }
        // Space counts as printable and is allowed by no backend's tooling without quoting: refused.
        match name.bytes().position(|byte| !byte.is_ascii_graphic()) {
            Some(position) => Err(InvalidRowName::Byte { position }),
            None => Ok(Self(name)),
        }
    }
}

impl TryFrom<&str> for RowName {
    type Error = InvalidRowName;

    fn try_from(name: &str) -> Result<Self, InvalidRowName> {
        Self::try_from(name.to_owned())
    }
}

impl Borrow<str> for RowName {
    fn borrow(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for RowName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for RowName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Why a text is no row name.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum InvalidRowName {
    /// It is empty or longer than 255 bytes.
    #[error("a row name has 1 to 255 bytes, not {0}")]
    Length(usize),
    /// It has a byte that is no printable ASCII, or a space.
    #[error("a row name has only printable ascii without spaces, unlike its byte {position}")]
    Byte {
        /// Offset of the first such byte.
        position: usize,
    },
}

/// The store-wide number of the commit that last wrote a row; [`Revision::ABSENT`] for a row that is not
/// there.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Revision(pub u64);

impl Revision {
    /// The revision of a row that is not there; as a condition: "must not exist".
    pub const ABSENT: Self = Self(0);
}

impl fmt::Display for Revision {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// One row as read. Its bytes are not printed.
#[derive(Clone, PartialEq, Eq)]
pub struct Row {
    /// Its name.
    pub name: RowName,
    /// The commit that last wrote it.
    pub revision: Revision,
    /// What that commit wrote.
    pub bytes: Vec<u8>,
}

impl fmt::Debug for Row {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Row")
            .field("name", &self.name)
            .field("revision", &self.revision)
            .field("length", &self.bytes.len())
            .finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_is_printable_ascii_of_1_to_255_bytes() {
        assert!(RowName::try_from("kek/0c6a…").is_err());
        assert_eq!(RowName::try_from(""), Err(InvalidRowName::Length(0)));
        assert_eq!(RowName::try_from("x".repeat(256)), Err(InvalidRowName::Length(256)));
        assert!(RowName::try_from("x".repeat(255)).is_ok());
        for byte in 0..=255_u8 {
            let name = String::from_utf8(vec![b'a', byte]);
            let accepted = name.is_ok_and(|name| RowName::try_from(name).is_ok());
            assert_eq!(accepted, (0x21..=0x7e).contains(&byte), "byte {byte:#04x}");
        }
    }

    #[test]
    fn a_row_does_not_print_its_bytes() {
        let name = RowName::try_from("a").unwrap();
        let row = Row { name, revision: Revision(7), bytes: b"secret".to_vec() };
        assert_eq!(format!("{row:?}"), "Row { name: a, revision: Revision(7), length: 6 }");
    }
}
