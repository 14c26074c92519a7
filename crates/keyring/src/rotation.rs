//! When a key version is due for rotation.
//!
//! Due = activation time + period − jitter, by the wall clock. The jitter is a fixed function of cluster and
//! version, so every agent and every restart computes the same time, and a fleet that was created in one
//! minute does not rotate in one. It is always early, by 2.5 % to 5 %: a period is a promise, and the least of
//! it leaves time for a schedule that looks once a minute and paces its rotations (90 s of the shortest
//! period, 18 h of the default one). This module decides, and never waits or rotates.

use std::time::{Duration, SystemTime};

use sha2::{Digest, Sha256};

use crate::{ClusterId, Version};

/// How often a cluster's key is rotated.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct RotationPolicy {
    period: Duration,
}

/// Shortest period; below it a fleet would do little else.
pub const MIN_PERIOD: Duration = Duration::from_secs(60 * 60);

/// Longest period, ten years: a longer one is a typing error.
pub const MAX_PERIOD: Duration = Duration::from_secs(3_650 * 24 * 60 * 60);

/// Wraps under one version from which on an early rotation is advised, though XAES-256-GCM needs none.
pub const WRAPS_HINT: u64 = 1 << 32;

/// How far two clocks of a healthy fleet may differ.
pub const CLOCK_TOLERANCE: Duration = Duration::from_secs(5 * 60);

impl RotationPolicy {
    /// A policy with this period.
    ///
    /// # Errors
    /// [`InvalidPolicy`] for a period outside [`MIN_PERIOD`]..=[`MAX_PERIOD`].
    pub fn try_new(period: Duration) -> Result<Self, InvalidPolicy> {
        if (MIN_PERIOD..=MAX_PERIOD).contains(&period) {
            Ok(Self { period })
        } else {
            Err(InvalidPolicy { period })
        }
    }

    /// The time from one activation to the latest moment of the next.
    pub fn period(&self) -> Duration {
        self.period
    }

    /// When a version that became Active at `activated` is due.
    pub fn due(&self, cluster: &ClusterId, version: Version, activated: SystemTime) -> SystemTime {
        // A date beyond the clock's range cannot be an activation: re-anchoring comes first.
        activated.checked_add(self.period - self.jitter(cluster, version)).unwrap_or(activated)
    }

    /// How much earlier than a full period a version is rotated: from a fortieth of it to a twentieth.
    fn jitter(&self, cluster: &ClusterId, version: Version) -> Duration {
        let mut hash = Sha256::new();
        hash.update(b"fleet-kms/rotation-jitter/1");
        hash.update(cluster.as_bytes());
        hash.update(version.get().to_be_bytes());
        let digest: [u8; 32] = hash.finalize().into();
        let [a, b, c, d, ..] = digest;
        let fraction = u32::from_be_bytes([a, b, c, d]);
        let least = self.period / JITTER_DIVISOR;
        let spread = (least.as_millis() * u128::from(fraction)) >> 32;
        least + Duration::from_millis(u64::try_from(spread).expect("a fortieth of ten years fits"))
    }
}

impl Default for RotationPolicy {
    /// Every 30 days.
    fn default() -> Self {
        Self { period: Duration::from_secs(30 * 24 * 60 * 60) }
    }
}

/// A rotation period that no cluster can have.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error("rotation period is {} s: set it to at least 1h and at most 3650d", period.as_secs())]
pub struct InvalidPolicy {
    period: Duration,
}

/// What the schedule has to do for one keyring.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Step {
    /// Nothing before this time.
    Wait(SystemTime),
    /// Rotate once, however many periods were missed.
    Rotate,
    /// Rewrite the activation time, which lies in the future, to now.
    Reanchor,
}

/// Whether this process may rotate on schedule: at least half a period of its own monotonic time must lie
/// between two rotations that it sees, whatever the wall clock does in between.
///
/// `seen` is the monotonic time since this process saw the Active version change; `None` if it never did.
/// So a clock that jumps forward costs one early rotation, and one that flaps is bounded.
pub fn may_rotate_on_schedule(period: Duration, seen: Option<Duration>) -> bool {
    seen.is_none_or(|since| since >= period / 2)
}

/// A fortieth, 2.5 %: both the least jitter and how far it spreads.
const JITTER_DIVISOR: u32 = 40;

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const DAY: u64 = 24 * 60 * 60;

    fn cluster(n: u128) -> ClusterId {
        ClusterId::from_bytes(n.to_be_bytes())
    }

    #[test]
    fn the_default_period_is_30_days() {
        assert_eq!(RotationPolicy::default().period(), Duration::from_secs(30 * DAY));
    }

    #[test]
    fn a_period_outside_its_limits_is_refused_with_the_remedy() {
        for refused in
            [Duration::ZERO, MIN_PERIOD - Duration::from_nanos(1), MAX_PERIOD + Duration::from_nanos(1)]
        {
            let message = RotationPolicy::try_new(refused).unwrap_err().to_string();
            assert!(message.contains("rotation period"), "{message}");
            assert!(message.contains("at least 1h"), "{message}");
        }
        assert!(RotationPolicy::try_new(MIN_PERIOD).is_ok());
        assert!(RotationPolicy::try_new(MAX_PERIOD).is_ok());
    }

    #[test]
    fn the_due_time_of_a_version_never_changes_between_releases() {
        let due = RotationPolicy::default().due(&cluster(7), Version::FIRST, SystemTime::UNIX_EPOCH);
        let early = SystemTime::UNIX_EPOCH + Duration::from_secs(30 * DAY);
        assert_eq!(early.duration_since(due).unwrap(), Duration::from_millis(93_187_944));
    }

    #[test]
    fn the_dues_of_10_000_clusters_spread_over_the_whole_jitter_window() {
        let policy = RotationPolicy::default();
        let mut per_tenth = [0_u32; 10];
        for n in 0..10_000 {
            let jitter = policy.jitter(&cluster(n), Version::FIRST);
            let tenth = (jitter - policy.period() / 40).as_secs() * 10 / (30 * DAY / 40);
            per_tenth[usize::try_from(tenth).unwrap()] += 1;
        }
        assert!(per_tenth.iter().all(|n| (850..1_150).contains(n)), "{per_tenth:?}");
    }

    #[test]
    fn the_schedule_waits_half_a_period_after_a_change_that_it_saw() {
        let period = Duration::from_secs(30 * DAY);
        assert!(may_rotate_on_schedule(period, None));
        assert!(!may_rotate_on_schedule(period, Some(Duration::ZERO)));
        assert!(!may_rotate_on_schedule(period, Some(period / 2 - Duration::from_nanos(1))));
        assert!(may_rotate_on_schedule(period, Some(period / 2)));
    }

    proptest! {
        #[test]
        fn due_is_2_and_a_half_to_5_percent_early(
            id: [u8; 16],
            number in 1_u32..,
            period in MIN_PERIOD.as_millis() as u64..=MAX_PERIOD.as_millis() as u64,
            activated in 0..10_000_000_000_u64,
        ) {
            let policy = RotationPolicy::try_new(Duration::from_millis(period)).unwrap();
            let activated = SystemTime::UNIX_EPOCH + Duration::from_secs(activated);
            let (cluster, version) = (ClusterId::from_bytes(id), Version::new(number).unwrap());
            let due = policy.due(&cluster, version, activated);
            prop_assert_eq!(due, policy.due(&cluster, version, activated));
            let after = due.duration_since(activated).unwrap();
            prop_assert!(after <= policy.period() - policy.period() / 40);
            prop_assert!(after >= policy.period() - policy.period() / 20);
        }
    }
}
