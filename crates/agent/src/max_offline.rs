//! How long after its end a node's certificate may still renew: a setting of
//! each cluster. A node that was off for longer needs a join token.

use std::time::Duration;

use fleet_kms_admin_api::HumanDuration;

use crate::ca::LEAF_LIFE;

/// How long the nodes of a cluster may be off and still come back by
/// themselves, counted from their certificate's end.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct MaxOffline(Duration);

/// A time that no cluster can have.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("nodes may be off for 7d to 730d, not for {}", HumanDuration::from(*.0))]
pub struct InvalidMaxOffline(Duration);

impl MaxOffline {
    /// What a new cluster gets unless it asks for another: 180 days.
    pub const DEFAULT: Self = Self(Duration::from_secs(180 * 86_400));
    /// The shortest: a node that is off for a certificate's life is no
    /// exception.
    pub const MIN: Duration = LEAF_LIFE;
    /// The longest: whoever finds a disk that is older than two years shall not
    /// have a node.
    pub const MAX: Duration = Duration::from_secs(730 * 86_400);

    /// Takes a time, in whole seconds.
    ///
    /// # Errors
    ///
    /// When it is out of bounds.
    pub fn try_new(time: Duration) -> Result<Self, InvalidMaxOffline> {
        if (Self::MIN..=Self::MAX).contains(&time) {
            Ok(Self(Duration::from_secs(time.as_secs())))
        } else {
            Err(InvalidMaxOffline(time))
        }
    }

    /// Returns the time.
    pub const fn time(self) -> Duration {
        self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_certificates_life_to_two_years_and_nothing_else() {
        let second = Duration::from_secs(1);
        for time in [MaxOffline::MIN, MaxOffline::DEFAULT.time(), MaxOffline::MAX] {
            assert_eq!(MaxOffline::try_new(time).unwrap().time(), time);
        }
        for time in [Duration::ZERO, MaxOffline::MIN - second, MaxOffline::MAX + second, Duration::MAX] {
            let refused = MaxOffline::try_new(time).unwrap_err().to_string();
            assert!(refused.starts_with("nodes may be off for 7d to 730d, not for "), "{refused}");
        }
    }
}
