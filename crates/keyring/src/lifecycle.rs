//! How a keyring changes: created, rotated, re-anchored; its versions disabled and destroyed.
//!
//! Each change is all or nothing in memory; the caller stores it in one transaction before anyone sees it.
//! No change here takes a version back, gives one number or id twice, or destroys what an operator did not
//! schedule.

use std::time::{Duration, SystemTime};

use crate::keyring::{KeyVersion, Keyring};
use crate::rotation::{CLOCK_TOLERANCE, RotationPolicy, Step};
use crate::{ClusterId, KeyId, Operation, State, Version};

/// Which rotation.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Rotate {
    /// Next becomes Active.
    Regular,
    /// Next is retired unused; a brand-new version becomes Active, with a new Next.
    Fresh,
    /// A fresh rotation after a restore, with numbers [`RESTORE_JUMP`] higher: the lost store may have used
    /// the ones in between.
    AfterRestore,
}

/// How many version numbers are left out after a restore.
pub const RESTORE_JUMP: u32 = 1_000;

/// Shortest time between scheduling a destruction and its earliest date.
pub const MIN_DESTRUCTION_WAIT: Duration = Duration::from_secs(7 * 24 * 60 * 60);

impl Keyring {
    /// Makes a cluster's keyring: version 1 Active, version 2 Next, both without a backup.
    ///
    /// # Panics
    /// If `key_id` gives both versions one id.
    pub fn create(policy: RotationPolicy, now: SystemTime, key_id: &mut dyn FnMut(Version) -> KeyId) -> Self {
        let [first, second] = [Version::FIRST, Version::FIRST.next().expect("2 is a version")];
        let mut active = new_next(first, key_id(first), now);
        active.state = State::Active;
        active.activated = Some(now);
        let next = new_next(second, key_id(second), now);
        assert_ne!(active.key_id, next.key_id, "a key id names one version");
        Self { policy, versions: vec![active, next] }
    }

    /// Makes another version Active and returns the new versions, whose KEKs the caller must store with it.
    ///
    /// # Errors
    /// [`RotateError`]; the keyring is then unchanged.
    pub fn rotate(
        &mut self,
        how: Rotate,
        now: SystemTime,
        key_id: &mut dyn FnMut(Version) -> KeyId,
    ) -> Result<Vec<Version>, RotateError> {
        let (skip, count) = match how {
            Rotate::Regular => (0, 1),
            Rotate::Fresh => (0, 2),
            Rotate::AfterRestore => (RESTORE_JUMP, 2),
        };
        let added = self.added(skip, count, now, key_id)?;
        let new_versions = added.iter().map(|v| v.version).collect();
        self.retire_active(now);
        if how == Rotate::Regular {
            self.activate_next(now);
            self.versions.extend(added);
        } else {
            self.retire_next();
            let [active, next] = added.try_into().expect("a fresh rotation adds two versions");
            self.versions.push(active);
            self.activate_next(now);
            self.versions.push(next);
        }
        Ok(new_versions)
    }

    /// Refuses every use of a version until it is enabled again.
    ///
    /// # Errors
    /// [`TransitionError`] unless the version is DecryptOnly.
    pub fn disable(&mut self, version: Version, now: SystemTime) -> Result<(), TransitionError> {
        self.apply(version, Operation::Disable)?.disabled = Some(now);
        Ok(())
    }

    /// Lets a Disabled version unwrap again.
    ///
    /// # Errors
    /// [`TransitionError`] unless the version is Disabled.
    pub fn enable(&mut self, version: Version) -> Result<(), TransitionError> {
        self.apply(version, Operation::Enable)?.disabled = None;
        Ok(())
    }

    /// Sets the date from which a version may be destroyed: `wait` after `now`.
    ///
    /// `now` is the wall clock, or the persisted high-water mark when that is later.
    ///
    /// # Errors
    /// [`TransitionError`] unless the version is Disabled and `wait` is at least [`MIN_DESTRUCTION_WAIT`].
    pub fn schedule_destruction(
        &mut self,
        version: Version,
        now: SystemTime,
        wait: Duration,
    ) -> Result<(), TransitionError> {
        let not_before = now
            .checked_add(wait)
            .filter(|_| wait >= MIN_DESTRUCTION_WAIT)
            .ok_or(TransitionError::Wait { version })?;
        self.apply(version, Operation::ScheduleDestruction { not_before }).map(drop)
    }

    /// Takes a scheduled destruction back: the version is Disabled again.
    ///
    /// # Errors
    /// [`TransitionError`] unless the version is scheduled for destruction.
    pub fn cancel_destruction(&mut self, version: Version) -> Result<(), TransitionError> {
        self.apply(version, Operation::CancelDestruction).map(drop)
    }

    /// Turns a version into a tombstone; the caller destroys its KEK row in the same transaction.
    ///
    /// The date is only one of the guards, and never enough by itself: the caller has the evidence.
    ///
    /// # Errors
    /// [`TransitionError`] unless the version is scheduled for destruction and the date has come.
    pub fn destroy(&mut self, version: Version, now: SystemTime) -> Result<(), TransitionError> {
        if let Some(State::DestroyScheduled { not_before }) = self.by_version(version).map(|v| v.state)
            && now < not_before
        {
            return Err(TransitionError::TooEarly { version });
        }
        self.apply(version, Operation::Destroy).map(drop)
    }

    /// Rewrites an activation time that lies in the future to `now`; returns whether it did.
    pub fn reanchor(&mut self, now: SystemTime) -> bool {
        let ahead = is_ahead(self.activated(), now);
        if ahead {
            self.active_mut().activated = Some(now);
        }
        ahead
    }

    /// Sets the rotation policy.
    pub fn set_policy(&mut self, policy: RotationPolicy) {
        self.policy = policy;
    }

    /// When the Active version is due for rotation.
    pub fn due(&self, cluster: &ClusterId) -> SystemTime {
        self.policy.due(cluster, self.active().version, self.activated())
    }

    /// What the schedule has to do for this keyring now.
    pub fn next_step(&self, cluster: &ClusterId, now: SystemTime) -> Step {
        let due = self.due(cluster);
        if is_ahead(self.activated(), now) {
            Step::Reanchor
        } else if due <= now {
            Step::Rotate
        } else {
            Step::Wait(due)
        }
    }

    /// Notes that a verified backup holds every version up to `highest`.
    pub fn mark_backed(&mut self, highest: Version) {
        for version in self.versions.iter_mut().filter(|v| v.version <= highest) {
            version.unbacked = false;
        }
    }

    /// Makes `count` new versions above the highest; refuses before anything is changed.
    fn added(
        &self,
        skip: u32,
        count: u32,
        now: SystemTime,
        key_id: &mut dyn FnMut(Version) -> KeyId,
    ) -> Result<Vec<KeyVersion>, RotateError> {
        let highest = self.next().version.plus(skip).ok_or(RotateError::NoVersionLeft)?;
        let mut added: Vec<KeyVersion> = Vec::new();
        for n in 1..=count {
            let version = highest.plus(n).ok_or(RotateError::NoVersionLeft)?;
            let key_id = key_id(version);
            if self.by_key_id(&key_id).is_some() || added.iter().any(|v| v.key_id == key_id) {
                return Err(RotateError::KeyIdTaken { key_id });
            }
            added.push(new_next(version, key_id, now));
        }
        Ok(added)
    }

    fn retire_active(&mut self, now: SystemTime) {
        let active = self.active_mut();
        active.state = active.state.after(Operation::Retire).expect("Active can be retired");
        active.deactivated = Some(now);
    }

    fn activate_next(&mut self, now: SystemTime) {
        let next = self.next_mut();
        next.state = next.state.after(Operation::Activate).expect("Next can be activated");
        next.activated = Some(now);
    }

    fn retire_next(&mut self) {
        let next = self.next_mut();
        next.state = next.state.after(Operation::Retire).expect("Next can be retired");
    }

    fn apply(&mut self, version: Version, operation: Operation) -> Result<&mut KeyVersion, TransitionError> {
        let found = self.find_mut(version).ok_or(TransitionError::Unknown { version })?;
        let state = found.state;
        found.state = state.after(operation).ok_or(TransitionError::Refused { version, state, operation })?;
        Ok(found)
    }

    fn find_mut(&mut self, version: Version) -> Option<&mut KeyVersion> {
        let position = self.position(version)?;
        self.versions.get_mut(position)
    }

    fn active_mut(&mut self) -> &mut KeyVersion {
        let active = self.active().version;
        self.find_mut(active).expect("the Active version is in its keyring")
    }

    fn next_mut(&mut self) -> &mut KeyVersion {
        self.versions.last_mut().expect("a keyring has a Next version, the highest")
    }

    fn activated(&self) -> SystemTime {
        self.active().activated.expect("the Active version has an activation time")
    }
}

/// Why a keyring does not rotate.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum RotateError {
    /// All 2^32 − 1 numbers are used up.
    #[error("no version number is left")]
    NoVersionLeft,
    /// The generator gave an id that names another version.
    #[error("key id {key_id} already names a version")]
    KeyIdTaken {
        /// The id.
        key_id: KeyId,
    },
}

/// Why a version does not change its state.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum TransitionError {
    /// The keyring has no such version.
    #[error("there is no version {version}")]
    Unknown {
        /// The version asked for.
        version: Version,
    },
    /// The move does not exist.
    #[error("cannot {operation} version {version}, which is {state}: {}", state.remedy(*operation))]
    Refused {
        /// The version asked for.
        version: Version,
        /// The state that it is in.
        state: State,
        /// What was asked.
        operation: Operation,
    },
    /// The date set by the schedule has not come.
    #[error("cannot destroy version {version} yet: its waiting period is not over")]
    TooEarly {
        /// The version asked for.
        version: Version,
    },
    /// The waiting period is too short, or ends beyond any date.
    #[error("cannot schedule the destruction of version {version}: the waiting period is at least 7 days")]
    Wait {
        /// The version asked for.
        version: Version,
    },
}

fn new_next(version: Version, key_id: KeyId, now: SystemTime) -> KeyVersion {
    KeyVersion {
        version,
        key_id,
        state: State::Next,
        created: now,
        activated: None,
        deactivated: None,
        disabled: None,
        unbacked: true,
    }
}

/// Beyond what clocks of a healthy fleet differ by.
fn is_ahead(activated: SystemTime, now: SystemTime) -> bool {
    activated.duration_since(now).is_ok_and(|ahead| ahead > CLOCK_TOLERANCE)
}
