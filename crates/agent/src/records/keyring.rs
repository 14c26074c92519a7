//! A keyring as its record keeps it, and back.

use std::time::Duration;

use fleet_kms_keyring::rotation::{InvalidPolicy, RotationPolicy};
use fleet_kms_keyring::{ClusterId, InvalidKeyring, KeyId, KeyVersion, Keyring, State, Version};

use super::payload::{KeyringRecord, VersionRecord, VersionState};
use super::{Record, rows};
use crate::times::{from_ms, optional, optional_ms, to_ms};

/// A keyring record that contradicts itself: only damage or a newer release
/// does that.
#[derive(Debug, thiserror::Error)]
pub enum KeyringError {
    /// The row's name is not a cluster id.
    #[error("row {row} does not name a cluster")]
    Row { row: String },
    /// A field has no meaning to this release.
    #[error("the keyring in row {row} has a bad {field}")]
    Field { row: String, field: &'static str },
    /// The period is out of bounds.
    #[error("the keyring in row {row} has a bad period")]
    Period {
        row: String,
        #[source]
        source: InvalidPolicy,
    },
    /// The versions do not make a keyring.
    #[error("the keyring in row {row} is not one")]
    Invalid {
        row: String,
        #[source]
        source: InvalidKeyring,
    },
}

/// Returns the cluster whose keyring a record is.
///
/// # Errors
///
/// When the row's name is not a cluster id.
pub fn cluster_of(record: &Record<KeyringRecord>) -> Result<ClusterId, KeyringError> {
    let name = record.row.as_str();
    name.strip_prefix(rows::KEYRINGS)
        .and_then(|id| id.parse().ok())
        .ok_or_else(|| KeyringError::Row { row: name.to_owned() })
}

/// Reads a keyring off its record.
///
/// # Errors
///
/// When the record contradicts itself.
pub fn parse(record: &Record<KeyringRecord>) -> Result<Keyring, KeyringError> {
    let row = || record.row.as_str().to_owned();
    let period = Duration::from_secs(record.payload.period_seconds);
    let policy =
        RotationPolicy::try_new(period).map_err(|source| KeyringError::Period { row: row(), source })?;
    let versions = record
        .payload
        .versions
        .iter()
        .map(|version| parse_version(version).map_err(|field| KeyringError::Field { row: row(), field }));
    Keyring::from_parts(policy, versions.collect::<Result<_, _>>()?)
        .map_err(|source| KeyringError::Invalid { row: row(), source })
}

/// Returns the record's payload for a keyring.
pub fn payload(keyring: &Keyring) -> KeyringRecord {
    KeyringRecord {
        period_seconds: keyring.policy().period().as_secs(),
        versions: keyring.versions().iter().map(version_payload).collect(),
    }
}

fn parse_version(version: &VersionRecord) -> Result<KeyVersion, &'static str> {
    let state = match VersionState::try_from(version.state).map_err(|_| "state")? {
        VersionState::Unspecified => return Err("state"),
        VersionState::Next => State::Next,
        VersionState::Active => State::Active,
        VersionState::DecryptOnly => State::DecryptOnly,
        VersionState::Disabled => State::Disabled,
        VersionState::DestroyScheduled => {
            State::DestroyScheduled { not_before: from_ms(version.destroy_not_before_ms) }
        }
        VersionState::Destroyed => State::Destroyed,
    };
    Ok(KeyVersion {
        version: Version::new(version.version).ok_or("version")?,
        key_id: KeyId::from_bytes(version.key_id.as_slice().try_into().map_err(|_| "key id")?),
        state,
        created: from_ms(version.created_ms),
        activated: optional(version.activated_ms),
        deactivated: optional(version.deactivated_ms),
        disabled: optional(version.disabled_ms),
        unbacked: version.unbacked,
    })
}

fn version_payload(version: &KeyVersion) -> VersionRecord {
    let (state, destroy_not_before_ms) = match version.state {
        State::Next => (VersionState::Next, 0),
        State::Active => (VersionState::Active, 0),
        State::DecryptOnly => (VersionState::DecryptOnly, 0),
        State::Disabled => (VersionState::Disabled, 0),
        State::DestroyScheduled { not_before } => (VersionState::DestroyScheduled, to_ms(not_before)),
        State::Destroyed => (VersionState::Destroyed, 0),
    };
    VersionRecord {
        version: version.version.get(),
        key_id: version.key_id.as_bytes().to_vec(),
        state: state.into(),
        created_ms: to_ms(version.created),
        activated_ms: optional_ms(version.activated),
        deactivated_ms: optional_ms(version.deactivated),
        disabled_ms: optional_ms(version.disabled),
        destroy_not_before_ms,
        wraps: 0,
        unbacked: version.unbacked,
    }
}
