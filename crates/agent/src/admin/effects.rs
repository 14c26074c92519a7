//! A change of a keyring in words, made from the keyring before and after: the
//! same for a dry run and for the change itself.

use fleet_kms_admin_api::{HumanDuration, Timestamp};
use fleet_kms_keyring::{KeyVersion, Keyring, State};

/// What changes, one sentence each.
pub(super) fn effects(before: &Keyring, after: &Keyring) -> Vec<String> {
    let mut effects = Vec::new();
    if before.policy().period() != after.policy().period() {
        let period = HumanDuration::from(after.policy().period());
        effects.push(format!("the key is rotated every {period}"));
    }
    let changes = after.versions().iter().filter_map(|version| {
        let old = before.by_version(version.version).map(|old| old.state);
        sentence(old, version)
    });
    effects.extend(changes);
    effects
}

/// What no verified backup holds although it is about to be needed.
pub(super) fn warnings(after: &Keyring) -> Vec<String> {
    let active = after.active();
    if !active.unbacked {
        return Vec::new();
    }
    vec![format!("version {} is in no verified backup yet: make one now", active.version)]
}

fn sentence(old: Option<State>, version: &KeyVersion) -> Option<String> {
    let number = version.version;
    let text = match (old, version.state) {
        (None, State::Next) => format!("version {number} is made and waits for the next rotation"),
        (None, State::Active) => format!("version {number} is made and becomes active"),
        (Some(State::Next), State::Active) => format!("version {number} becomes active"),
        (Some(State::Active), State::DecryptOnly) => format!("version {number} unwraps only, from now on"),
        (Some(State::Next), State::DecryptOnly) => {
            format!("version {number} is retired before its time; it unwraps only")
        }
        (Some(State::DecryptOnly), State::Disabled) => {
            format!("version {number} is disabled: what it wrapped cannot be read until it is enabled again")
        }
        (Some(State::Disabled), State::DecryptOnly) => format!("version {number} unwraps again"),
        (Some(State::Disabled), State::DestroyScheduled { not_before }) => {
            format!("version {number} may be destroyed from {} on", Timestamp::from(not_before))
        }
        (Some(State::DestroyScheduled { .. }), State::Disabled) => {
            format!("version {number} is no longer to be destroyed; it stays disabled")
        }
        (old, new) if old == Some(new) => return None,
        (_, new) => format!("version {number} is {}", super::views::state(new)),
    };
    Some(text)
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, SystemTime, UNIX_EPOCH};

    use fleet_kms_keyring::rotation::RotationPolicy;
    use fleet_kms_keyring::{KeyId, Rotate, Version};

    use super::*;

    fn key_id(version: Version) -> KeyId {
        KeyId::from_bytes(u128::from(version.get()).to_be_bytes())
    }

    fn now() -> SystemTime {
        UNIX_EPOCH + Duration::from_secs(1_800_000_000)
    }

    #[test]
    fn a_rotation_is_told_version_by_version() {
        let before = Keyring::create(RotationPolicy::default(), now(), &mut key_id);
        let mut after = before.clone();
        after.rotate(Rotate::Regular, now(), &mut key_id).unwrap();
        let told = [
            "version 1 unwraps only, from now on",
            "version 2 becomes active",
            "version 3 is made and waits for the next rotation",
        ];
        assert_eq!(effects(&before, &after), told);
        assert!(effects(&after, &after).is_empty());
    }

    #[test]
    fn a_fresh_rotation_warns_of_the_missing_backup() {
        let mut keyring = Keyring::create(RotationPolicy::default(), now(), &mut key_id);
        keyring.mark_backed(Version::new(2).unwrap());
        assert!(warnings(&keyring).is_empty());
        keyring.rotate(Rotate::Fresh, now(), &mut key_id).unwrap();
        assert_eq!(warnings(&keyring), ["version 3 is in no verified backup yet: make one now"]);
    }
}
