//! Why a keyring refuses a wrap or an unwrap, finely enough for audit and metrics.
//!
//! What the caller is told is coarser: [`WrapRefused::is_not_ours`] and [`UnwrapRefused::is_not_ours`] mark the
//! reasons that must not be told apart from a wrapped DEK that is malformed or does not open.

use crate::Version;

/// Why a named version does not wrap.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum WrapRefused {
    /// No version of this cluster has this key id.
    #[error("unknown key id")]
    UnknownKeyId,
    /// Still Next: this agent may be behind the one that told the caller.
    #[error("version {version} is not active yet")]
    NotYetActive {
        /// The named version.
        version: Version,
    },
    /// No longer Active: the caller must ask for the status again.
    #[error("version {version} is no longer active")]
    Retired {
        /// The named version.
        version: Version,
    },
    /// Disabled, or scheduled for destruction.
    #[error("version {version} is disabled")]
    Disabled {
        /// The named version.
        version: Version,
    },
    /// Destroyed.
    #[error("version {version} is destroyed")]
    Destroyed {
        /// The named version.
        version: Version,
    },
}

impl WrapRefused {
    /// Whether the name is none of this keyring's: the caller learns no more than that.
    pub fn is_not_ours(&self) -> bool {
        matches!(self, Self::UnknownKeyId)
    }
}

/// Why a header's version does not unwrap.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum UnwrapRefused {
    /// No version of this cluster has this key id.
    #[error("unknown key id")]
    UnknownKeyId,
    /// The key id is known, under another version: the header was altered.
    #[error("the key id belongs to another version")]
    VersionMismatch,
    /// Disabled, or scheduled for destruction.
    #[error("version {version} is disabled")]
    Disabled {
        /// The header's version.
        version: Version,
    },
    /// Destroyed.
    #[error("version {version} is destroyed")]
    Destroyed {
        /// The header's version.
        version: Version,
    },
}

impl UnwrapRefused {
    /// Whether the header is none of this keyring's: the caller learns no more than that.
    pub fn is_not_ours(&self) -> bool {
        matches!(self, Self::UnknownKeyId | Self::VersionMismatch)
    }
}
