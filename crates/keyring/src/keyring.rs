//! A cluster's keyring: all its key versions and which of them may do what.
//!
//! A `Keyring` holds states and times, never key material. It cannot be wrong: versions strictly ascend, ids
//! are unique, exactly one version is Active, and exactly one is Next and the highest. Look-ups here, changes
//! in `lifecycle.rs`.

use std::time::{Duration, SystemTime};

use crate::rotation::RotationPolicy;
use crate::wrapped_dek::Header;
use crate::{KeyId, State, UnwrapRefused, Version, WrapRefused};

/// One key version of a cluster, as the keyring record keeps it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct KeyVersion {
    /// Its place in the keyring.
    pub version: Version,
    /// Its name.
    pub key_id: KeyId,
    /// What it may be used for.
    pub state: State,
    /// When it was made.
    pub created: SystemTime,
    /// When it became Active; a fresh rotation retires a version that never was.
    pub activated: Option<SystemTime>,
    /// When it stopped being Active.
    pub deactivated: Option<SystemTime>,
    /// Since when it has been Disabled.
    pub disabled: Option<SystemTime>,
    /// Whether no verified backup is known to hold it.
    pub unbacked: bool,
}

/// All key versions of one cluster and its rotation policy.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Keyring {
    pub(crate) policy: RotationPolicy,
    pub(crate) versions: Vec<KeyVersion>,
}

/// How long after a rotation a caller may still name the version that was Active until then.
///
/// Covers a sidecar whose last `Status` answer is older than the rotation: kube-apiserver asks at least once
/// a minute (`apiserver/pkg/storage/value/encrypt/envelope/kmsv2`).
pub const NAMED_WRAP_GRACE: Duration = Duration::from_secs(5 * 60);

impl Keyring {
    /// Takes a keyring from its stored parts.
    ///
    /// # Errors
    /// [`InvalidKeyring`] names the invariant that the parts break.
    pub fn from_parts(policy: RotationPolicy, versions: Vec<KeyVersion>) -> Result<Self, InvalidKeyring> {
        for pair in versions.windows(2) {
            if let [lower, higher] = pair
                && lower.version >= higher.version
            {
                return Err(InvalidKeyring::NotAscending { version: higher.version });
            }
        }
        let mut ids: Vec<KeyId> = versions.iter().map(|v| v.key_id).collect();
        ids.sort_unstable();
        if let Some([key_id, _]) = ids.array_windows().find(|[a, b]| a == b) {
            return Err(InvalidKeyring::SameKeyId { key_id: *key_id });
        }
        let in_state = |state| versions.iter().filter(|v| v.state == state).count();
        match (in_state(State::Active), in_state(State::Next)) {
            (1, 1) => {}
            (1, found) => return Err(InvalidKeyring::NextCount { found }),
            (found, _) => return Err(InvalidKeyring::ActiveCount { found }),
        }
        if versions.last().is_none_or(|highest| highest.state != State::Next) {
            return Err(InvalidKeyring::NextNotHighest);
        }
        if versions.iter().any(|v| v.state == State::Active && v.activated.is_none()) {
            return Err(InvalidKeyring::NoActivationTime);
        }
        Ok(Self { policy, versions })
    }

    /// All versions, ascending, tombstones included.
    pub fn versions(&self) -> &[KeyVersion] {
        &self.versions
    }

    /// The version that wraps.
    pub fn active(&self) -> &KeyVersion {
        self.versions.iter().rfind(|v| v.state == State::Active).expect("a keyring has one Active version")
    }

    /// The version that the next rotation makes Active.
    pub fn next(&self) -> &KeyVersion {
        self.versions.last().expect("a keyring has a Next version, the highest")
    }

    /// The version with this name.
    pub fn by_key_id(&self, key_id: &KeyId) -> Option<&KeyVersion> {
        // Newest first: that is what callers ask for.
        self.versions.iter().rev().find(|v| v.key_id == *key_id)
    }

    /// The version with this number.
    pub fn by_version(&self, version: Version) -> Option<&KeyVersion> {
        self.versions.get(self.position(version)?)
    }

    /// The version to wrap under: the Active one, or the one that the caller names.
    ///
    /// # Errors
    /// [`WrapRefused`] for a named version that is neither Active nor was within [`NAMED_WRAP_GRACE`].
    pub fn for_wrap(&self, named: Option<&KeyId>, now: SystemTime) -> Result<&KeyVersion, WrapRefused> {
        let Some(key_id) = named else { return Ok(self.active()) };
        let found = self.by_key_id(key_id).ok_or(WrapRefused::UnknownKeyId)?;
        let version = found.version;
        match found.state {
            State::Active => Ok(found),
            State::DecryptOnly if within_grace(found.deactivated, now) => Ok(found),
            State::DecryptOnly => Err(WrapRefused::Retired { version }),
            State::Next => Err(WrapRefused::NotYetActive { version }),
            State::Disabled | State::DestroyScheduled { .. } => Err(WrapRefused::Disabled { version }),
            State::Destroyed => Err(WrapRefused::Destroyed { version }),
        }
    }

    /// The version to unwrap with. One in state Next is proof that this copy of the store is behind.
    ///
    /// # Errors
    /// [`UnwrapRefused`] unless the keyring has this key id with this version, in a state that unwraps.
    pub fn for_unwrap(&self, header: &Header) -> Result<&KeyVersion, UnwrapRefused> {
        // By number first, which is a binary search; the id decides.
        let found = match self.by_version(header.version) {
            Some(found) if found.key_id == header.key_id => found,
            _ if self.by_key_id(&header.key_id).is_some() => return Err(UnwrapRefused::VersionMismatch),
            _ => return Err(UnwrapRefused::UnknownKeyId),
        };
        let version = found.version;
        match found.state {
            State::Next | State::Active | State::DecryptOnly => Ok(found),
            State::Disabled | State::DestroyScheduled { .. } => Err(UnwrapRefused::Disabled { version }),
            State::Destroyed => Err(UnwrapRefused::Destroyed { version }),
        }
    }

    /// The rotation policy.
    pub fn policy(&self) -> &RotationPolicy {
        &self.policy
    }

    /// Versions that can have wrapped something and that no verified backup is known to hold.
    pub fn unbacked(&self) -> impl Iterator<Item = &KeyVersion> {
        self.versions.iter().filter(|v| v.unbacked && !matches!(v.state, State::Next | State::Destroyed))
    }

    pub(crate) fn position(&self, version: Version) -> Option<usize> {
        self.versions.binary_search_by_key(&version, |v| v.version).ok()
    }
}

/// Why a keyring's parts do not fit together.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum InvalidKeyring {
    /// Versions out of order, or one twice.
    #[error("version {version} does not come after the version before it")]
    NotAscending {
        /// The version out of place.
        version: Version,
    },
    /// One key id names two versions.
    #[error("key id {key_id} names two versions")]
    SameKeyId {
        /// The id.
        key_id: KeyId,
    },
    /// No Active version, or several.
    #[error("a keyring has exactly one active version, not {found}")]
    ActiveCount {
        /// How many there are.
        found: usize,
    },
    /// No Next version, or several.
    #[error("a keyring has exactly one next version, not {found}")]
    NextCount {
        /// How many there are.
        found: usize,
    },
    /// A version above Next.
    #[error("the next version is not the highest")]
    NextNotHighest,
    /// An Active version without the time that its rotation is counted from.
    #[error("the active version has no activation time")]
    NoActivationTime,
}

/// Within the grace on either side: the rotation may have been stamped by another agent's clock, and after
/// a clock was set back the version must not stay nameable until that time comes again.
fn within_grace(deactivated: Option<SystemTime>, now: SystemTime) -> bool {
    deactivated.is_some_and(|then| {
        let apart = now.duration_since(then).unwrap_or_else(|ahead| ahead.duration());
        apart <= NAMED_WRAP_GRACE
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(seconds: u64) -> SystemTime {
        SystemTime::UNIX_EPOCH + Duration::from_secs(seconds)
    }

    fn id(version: Version) -> KeyId {
        KeyId::from_bytes(u128::from(version.get()).to_be_bytes())
    }

    fn version(number: u32, state: State) -> KeyVersion {
        let version = Version::new(number).unwrap();
        KeyVersion {
            version,
            key_id: id(version),
            state,
            created: at(0),
            activated: Some(at(0)),
            deactivated: Some(at(1_000)),
            disabled: None,
            unbacked: false,
        }
    }

    fn from_parts(versions: &[KeyVersion]) -> Result<Keyring, InvalidKeyring> {
        Keyring::from_parts(RotationPolicy::default(), versions.to_vec())
    }

    #[test]
    fn parts_that_break_an_invariant_are_refused_by_name() {
        let (old, active, next) =
            (version(1, State::DecryptOnly), version(4, State::Active), version(9, State::Next));
        let refused = |parts: &[&KeyVersion]| {
            from_parts(&parts.iter().map(|v| (*v).clone()).collect::<Vec<_>>()).unwrap_err()
        };
        assert!(from_parts(&[old.clone(), active.clone(), next.clone()]).is_ok());
        assert_eq!(refused(&[]), InvalidKeyring::ActiveCount { found: 0 });
        assert_eq!(refused(&[&old, &next]), InvalidKeyring::ActiveCount { found: 0 });
        assert_eq!(refused(&[&old, &active]), InvalidKeyring::NextCount { found: 0 });
        assert_eq!(refused(&[&active, &old, &next]), InvalidKeyring::NotAscending { version: old.version });
        assert_eq!(
            refused(&[&active, &active, &next]),
            InvalidKeyring::NotAscending { version: active.version }
        );
        assert_eq!(
            refused(&[&version(1, State::Active), &active, &next]),
            InvalidKeyring::ActiveCount { found: 2 }
        );
        assert_eq!(
            refused(&[&version(1, State::Next), &active, &next]),
            InvalidKeyring::NextCount { found: 2 }
        );
        assert_eq!(refused(&[&version(1, State::Next), &active]), InvalidKeyring::NextNotHighest);
        let twin = KeyVersion { key_id: old.key_id, ..active.clone() };
        assert_eq!(refused(&[&old, &twin, &next]), InvalidKeyring::SameKeyId { key_id: old.key_id });
        let undated = KeyVersion { activated: None, ..active };
        assert_eq!(refused(&[&old, &undated, &next]), InvalidKeyring::NoActivationTime);
    }

    #[test]
    fn a_named_version_wraps_for_five_minutes_after_it_was_active() {
        let keyring =
            from_parts(&[version(1, State::DecryptOnly), version(2, State::Active), version(3, State::Next)])
                .unwrap();
        let old = keyring.versions()[0].clone();
        let named = |now| keyring.for_wrap(Some(&old.key_id), at(now)).map(|v| v.version);
        let retired = Err(WrapRefused::Retired { version: old.version });
        assert_eq!(named(1_000), Ok(old.version));
        assert_eq!(named(1_300), Ok(old.version));
        assert_eq!(named(1_301), retired);
        // Another agent's clock is a little ahead; or this one was set back by more.
        assert_eq!(named(700), Ok(old.version));
        assert_eq!(named(699), retired);
        assert_eq!(keyring.for_wrap(None, at(1_000)).unwrap().state, State::Active);
    }

    #[test]
    fn a_next_that_a_fresh_rotation_retired_never_wraps_by_name() {
        let retired = KeyVersion { activated: None, deactivated: None, ..version(1, State::DecryptOnly) };
        let keyring =
            from_parts(&[retired.clone(), version(2, State::Active), version(3, State::Next)]).unwrap();
        let refused = keyring.for_wrap(Some(&retired.key_id), at(0));
        assert_eq!(refused, Err(WrapRefused::Retired { version: retired.version }));
    }

    #[test]
    fn a_header_of_no_version_here_is_told_apart_from_a_mismatch_but_neither_is_ours() {
        let keyring = from_parts(&[version(1, State::Active), version(2, State::Next)]).unwrap();
        let [one, two] = [1, 2].map(|n| Version::new(n).unwrap());
        let unwrap = |version, key_id| keyring.for_unwrap(&Header { version, key_id }).map(|v| v.version);
        assert_eq!(unwrap(one, id(one)), Ok(one));
        assert_eq!(unwrap(two, id(one)), Err(UnwrapRefused::VersionMismatch));
        assert_eq!(unwrap(Version::new(3).unwrap(), id(one)), Err(UnwrapRefused::VersionMismatch));
        assert_eq!(unwrap(one, KeyId::from_bytes([9; 16])), Err(UnwrapRefused::UnknownKeyId));
        assert!(UnwrapRefused::UnknownKeyId.is_not_ours() && UnwrapRefused::VersionMismatch.is_not_ours());
        assert!(!UnwrapRefused::Disabled { version: one }.is_not_ours());
        assert!(!UnwrapRefused::Destroyed { version: one }.is_not_ours());
    }
}
