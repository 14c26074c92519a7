//! What an operator or a key officer does to the policy and to single
//! versions, and the guards before a destruction.

use std::time::{Duration, SystemTime};

use fleet_kms_keyring::rotation::RotationPolicy;
use fleet_kms_keyring::{KeyVersion, Keyring, State, Version};
use fleet_kms_store::Revision;

use super::{ControlPlane, KeyChangeError};
use crate::authz::{Action, Permit, actions};
use crate::changes::ChangeError;

/// Waiting period between the order and the destruction.
pub const DESTRUCTION_WAIT: Duration = Duration::from_secs(30 * 86_400);

/// What a caller says along with a change.
#[derive(Clone, Copy, Debug, Default)]
pub struct Wish<'a> {
    /// Why, for the audit.
    pub reason: Option<&'a str>,
    /// The revision of the keyring that the caller decided on.
    pub at: Option<Revision>,
}

impl Wish<'_> {
    /// Compares the wished revision with the present one.
    ///
    /// # Errors
    ///
    /// When they differ.
    pub fn check(&self, now: Revision) -> Result<(), KeyChangeError> {
        match self.at {
            Some(wished) if wished != now => Err(KeyChangeError::Revision { now, wished }),
            _ => Ok(()),
        }
    }
}

/// What can be done to one version.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum VersionChange {
    /// It is used for nothing until it is enabled.
    Disable,
    /// It unwraps again.
    Enable,
    /// It is to be destroyed after the waiting period.
    ScheduleDestruction,
    /// It is disabled, and no longer to be destroyed.
    CancelDestruction,
}

/// An action whose permit allows one change of a version.
pub trait ChangesVersion: Action {
    /// That change.
    const CHANGE: VersionChange;
}

impl ChangesVersion for actions::KeyDisable {
    const CHANGE: VersionChange = VersionChange::Disable;
}
impl ChangesVersion for actions::KeyEnable {
    const CHANGE: VersionChange = VersionChange::Enable;
}
impl ChangesVersion for actions::KeyDestroy {
    const CHANGE: VersionChange = VersionChange::ScheduleDestruction;
}
impl ChangesVersion for actions::KeyCancelDestroy {
    const CHANGE: VersionChange = VersionChange::CancelDestruction;
}

impl VersionChange {
    /// Makes the change, in memory.
    ///
    /// # Errors
    ///
    /// When the version's state or a guard does not allow it; nothing is changed.
    pub fn apply(
        self,
        keyring: &mut Keyring,
        version: Version,
        now: SystemTime,
    ) -> Result<(), KeyChangeError> {
        match self {
            Self::Disable => keyring.disable(version, now)?,
            Self::Enable => keyring.enable(version)?,
            Self::CancelDestruction => keyring.cancel_destruction(version)?,
            Self::ScheduleDestruction => {
                let mut scheduled = keyring.clone();
                // The state first: what it forbids, no evidence can allow.
                scheduled.schedule_destruction(version, now, DESTRUCTION_WAIT)?;
                let guards = keyring.by_version(version).map(guards).unwrap_or_default();
                if let Some(guard) = guards.into_iter().find(|guard| !guard.ok) {
                    return Err(KeyChangeError::Guarded { version, why: guard.why });
                }
                *keyring = scheduled;
            }
        }
        Ok(())
    }
}

/// One guard before a destruction.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DestructionGuard {
    /// Its stable name.
    pub name: &'static str,
    /// Whether it agrees.
    pub ok: bool,
    /// Why.
    pub why: String,
}

/// Asks every guard about a version.
///
/// No census is taken yet, so nothing can be destroyed.
pub fn guards(version: &KeyVersion) -> Vec<DestructionGuard> {
    let disabled = matches!(version.state, State::Disabled | State::DestroyScheduled { .. });
    let guard = |name, ok, yes: &str, no: &str| DestructionGuard {
        name,
        ok,
        why: if ok { yes.to_owned() } else { no.to_owned() },
    };
    vec![
        guard("disabled", disabled, "it is disabled", "it is not disabled; disable it first"),
        guard("census", false, "", "no census"),
        guard("backup", !version.unbacked, "a verified backup holds it", "no verified backup holds it"),
    ]
}

impl ControlPlane {
    /// Changes one version as the permit's action says.
    ///
    /// # Errors
    ///
    /// When state, guards, the wished revision or the store refuse.
    pub async fn change_version<A: ChangesVersion>(
        &self,
        permit: &Permit<A>,
        version: Version,
        wish: Wish<'_>,
    ) -> Result<(), ChangeError<KeyChangeError>> {
        self.change_keyring(permit, wish, Some(version), |keyring, now| {
            A::CHANGE.apply(keyring, version, now)
        })
        .await
    }

    /// Changes the rotation policy.
    ///
    /// # Errors
    ///
    /// When the wished revision or the store refuse.
    pub async fn set_policy(
        &self,
        permit: &Permit<actions::RotationSet>,
        policy: RotationPolicy,
        wish: Wish<'_>,
    ) -> Result<(), ChangeError<KeyChangeError>> {
        self.change_keyring(permit, wish, None, |keyring, _| {
            keyring.set_policy(policy);
            Ok(())
        })
        .await
    }

    async fn change_keyring<A: Action>(
        &self,
        permit: &Permit<A>,
        wish: Wish<'_>,
        version: Option<Version>,
        change: impl Fn(&mut Keyring, SystemTime) -> Result<(), KeyChangeError> + Send + Sync,
    ) -> Result<(), ChangeError<KeyChangeError>> {
        let mut intent = self.key_intent(A::ID, permit).reason(wish.reason);
        if let Some(version) = version {
            intent = intent.target(format!("version {version}"));
        }
        let prepare = || {
            self.prepare_keyring(permit.cluster(), wish, |keyring, now| {
                change(keyring, now)?;
                Ok(Vec::new())
            })
        };
        self.changes.run_applied(intent, prepare, |snapshot, at| self.publish(permit, snapshot, at)).await
    }
}

#[cfg(test)]
mod tests {
    use std::time::UNIX_EPOCH;

    use fleet_kms_keyring::{KeyId, Rotate};

    use super::*;

    fn keyring() -> Keyring {
        let mut key_id = |version: Version| KeyId::from_bytes(u128::from(version.get()).to_be_bytes());
        let mut keyring = Keyring::create(RotationPolicy::default(), UNIX_EPOCH, &mut key_id);
        keyring.rotate(Rotate::Regular, UNIX_EPOCH, &mut key_id).unwrap();
        keyring
    }

    #[test]
    fn a_destruction_waits_for_a_census_and_the_state_speaks_first() {
        let (mut keyring, first) = (keyring(), Version::FIRST);
        let schedule = VersionChange::ScheduleDestruction;
        let refused = schedule.apply(&mut keyring, first, UNIX_EPOCH).unwrap_err();
        assert!(matches!(refused, KeyChangeError::Transition(_)), "{refused}");
        VersionChange::Disable.apply(&mut keyring, first, UNIX_EPOCH).unwrap();
        let before = keyring.clone();
        let refused = schedule.apply(&mut keyring, first, UNIX_EPOCH).unwrap_err();
        assert_eq!(refused.to_string(), "version 1 may not be destroyed: no census");
        assert_eq!(keyring, before);
        VersionChange::Enable.apply(&mut keyring, first, UNIX_EPOCH).unwrap();
    }

    #[test]
    fn a_wish_at_another_revision_is_refused() {
        let wish = Wish { reason: None, at: Some(Revision(7)) };
        assert!(wish.check(Revision(7)).is_ok());
        assert!(wish.check(Revision(8)).is_err());
        assert!(Wish::default().check(Revision(8)).is_ok());
    }
}
