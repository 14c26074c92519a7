//! The join token: what a node shows once to get its first certificate, and by which it knows the agent's root.
//!
//! Text form `fkjt1.` ‖ base64url(secret 32 ‖ SHA-256 of the root certificate 32 ‖ issue time u64 big-endian). What a
//! token is good for (cluster, names, uses, end) is in the agent's store under the secret's hash, never in the token,
//! so that it can be changed and revoked. Only its SHA-256 is ever stored. Attack: a token that named no root would
//! make the first contact trust whoever answers.

use std::{
    fmt,
    str::FromStr,
    time::{Duration, SystemTime},
};

use data_encoding::BASE64URL_NOPAD;
use rand_core::CryptoRng;
use sha2::{Digest, Sha256};
use thiserror::Error;
use zeroize::Zeroizing;

const PREFIX: &str = "fkjt1.";
const SECRET: usize = 32;
const LENGTH: usize = SECRET + 32 + 8;
/// 72 bytes in base64url.
const TEXT_LENGTH: usize = PREFIX.len() + 96;

/// A join token. It holds a secret: it prints only through [`JoinToken::to_text`], and is wiped when dropped.
pub struct JoinToken {
    secret: Zeroizing<[u8; SECRET]>,
    root_sha256: [u8; 32],
    issued: u64,
}

impl JoinToken {
    /// Makes a token for the CA whose root certificate (DER) has the SHA-256 `root_sha256`.
    pub fn generate(root_sha256: [u8; 32], issued: SystemTime, rng: &mut dyn CryptoRng) -> Self {
        let mut secret = Zeroizing::new([0; SECRET]);
        rng.fill_bytes(secret.as_mut_slice());
        let issued = issued.duration_since(SystemTime::UNIX_EPOCH).unwrap_or(Duration::ZERO).as_secs();
        Self { secret, root_sha256, issued }
    }

    /// Returns the SHA-256 of the root certificate that the agent must prove to belong to.
    pub fn root_sha256(&self) -> &[u8; 32] {
        &self.root_sha256
    }

    /// Returns when the token was made. A lower bound for the present, for a node whose clock stopped.
    pub fn issued(&self) -> SystemTime {
        // A date that the platform cannot hold says nothing about the present.
        SystemTime::UNIX_EPOCH.checked_add(Duration::from_secs(self.issued)).unwrap_or(SystemTime::UNIX_EPOCH)
    }

    /// Returns the secret, to be shown to an agent that has proved its root.
    pub fn expose_secret(&self) -> &[u8; SECRET] {
        &self.secret
    }

    /// Returns the SHA-256 of the secret: the name that the agent stores the token under.
    pub fn hash(&self) -> [u8; 32] {
        Sha256::digest(self.secret.as_slice()).into()
    }

    /// Returns the text to hand to the operator or the agent; it is the secret.
    pub fn to_text(&self) -> Zeroizing<String> {
        let mut bytes = Zeroizing::new(Vec::with_capacity(LENGTH));
        bytes.extend_from_slice(self.secret.as_slice());
        bytes.extend_from_slice(&self.root_sha256);
        bytes.extend_from_slice(&self.issued.to_be_bytes());
        let mut text = Zeroizing::new(String::with_capacity(TEXT_LENGTH));
        text.push_str(PREFIX);
        BASE64URL_NOPAD.encode_append(&bytes, &mut text);
        text
    }
}

impl FromStr for JoinToken {
    type Err = JoinTokenError;

    /// Reads a token; white space around it, as files and terminals add, is ignored.
    fn from_str(text: &str) -> Result<Self, JoinTokenError> {
        let text = text.trim_ascii();
        let encoded = text.strip_prefix(PREFIX).ok_or(JoinTokenError::Prefix)?;
        if text.len() != TEXT_LENGTH {
            return Err(JoinTokenError::Length { expected: TEXT_LENGTH, found: text.len() });
        }
        let mut bytes = Zeroizing::new([0; LENGTH]);
        BASE64URL_NOPAD
            .decode_mut(encoded.as_bytes(), bytes.as_mut_slice())
            .map_err(|_| JoinTokenError::Alphabet)?;
        let (secret, rest) = bytes.split_first_chunk::<SECRET>().ok_or(JoinTokenError::Alphabet)?;
        let (root_sha256, rest) = rest.split_first_chunk::<32>().ok_or(JoinTokenError::Alphabet)?;
        let issued = rest.first_chunk::<8>().ok_or(JoinTokenError::Alphabet)?;
        Ok(Self {
            secret: Zeroizing::new(*secret),
            root_sha256: *root_sha256,
            issued: u64::from_be_bytes(*issued),
        })
    }
}

impl fmt::Debug for JoinToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("JoinToken").field("issued", &self.issued).finish_non_exhaustive()
    }
}

/// Why a text is not a join token. None of the messages repeats the text.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum JoinTokenError {
    /// It does not begin like one.
    #[error("a join token begins with {PREFIX}")]
    Prefix,
    /// Cut off, or with something appended.
    #[error("a join token has {expected} characters, this has {found}: copy all of it")]
    Length {
        /// The length of every token.
        expected: usize,
        /// The length that was found.
        found: usize,
    },
    /// Characters that are not base64url.
    #[error("the join token holds characters that a token cannot hold")]
    Alphabet,
}

#[cfg(test)]
mod tests {
    use static_assertions::assert_not_impl_any;

    use super::*;

    assert_not_impl_any!(JoinToken: Clone, fmt::Display);

    fn token() -> JoinToken {
        JoinToken { secret: Zeroizing::new([7; 32]), root_sha256: [9; 32], issued: 1_700_000_000 }
    }

    #[test]
    fn a_token_survives_its_text_form() {
        let read: JoinToken = format!("\n {}\r\n", token().to_text().as_str()).parse().unwrap();
        assert_eq!(read.hash(), token().hash());
        assert_eq!(read.root_sha256(), &[9; 32]);
        assert_eq!(read.issued(), SystemTime::UNIX_EPOCH + Duration::from_secs(1_700_000_000));
    }

    #[test]
    fn the_text_form_never_changes() {
        assert_eq!(
            token().to_text().as_str(),
            "fkjt1.BwcHBwcHBwcHBwcHBwcHBwcHBwcHBwcHBwcHBwcHBwcJCQkJCQkJCQkJCQkJCQkJCQkJCQkJCQkJCQkJCQkJCQAAAABlU_EA"
        );
    }

    #[test]
    fn a_cut_or_foreign_text_is_refused_without_repeating_it() {
        let text = token().to_text();
        let cut = text.get(..text.len() - 1).unwrap().parse::<JoinToken>().unwrap_err();
        assert_eq!(cut, JoinTokenError::Length { expected: 102, found: 101 });
        assert!(!cut.to_string().contains("BwcH"));
        assert_eq!("fkjt2.x".parse::<JoinToken>().unwrap_err(), JoinTokenError::Prefix);
        assert_eq!(text.replace('B', "+").parse::<JoinToken>().unwrap_err(), JoinTokenError::Alphabet);
    }

    #[test]
    fn debug_shows_no_secret() {
        assert_eq!(format!("{:?}", token()), "JoinToken { issued: 1700000000, .. }");
    }
}
