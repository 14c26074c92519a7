//! What a node takes for the time.
//!
//! A control-plane node's clock may be wrong by years at boot, and certificates
//! are judged by it. So an agent is asked ([`verify`]), and its answer plus the
//! monotonic clock is believed from then on. Before the first answer it is the
//! wall clock, but never before a moment that is known to have passed.
//!
//! It must never go back because a wall clock did, and never believe an answer
//! that a stolen key or a relay could give.

mod proof;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant, SystemTime};

use arc_swap::ArcSwapOption;
use fleet_kms_process::clock;
use fleet_kms_transport::Clock;
use tokio::sync::Notify;

pub(crate) use self::proof::chains;
pub use self::proof::{TimeProofError, verify};

/// The believed time. Clones are the same.
#[derive(Debug, Clone, Default)]
pub struct BelievedTime(Arc<Shared>);

#[derive(Debug, Default)]
struct Shared {
    /// Milliseconds since 1970 that have passed for sure.
    passed: AtomicU64,
    proven: ArcSwapOption<Proven>,
    told: Notify,
}

#[derive(Debug)]
struct Proven {
    time: SystemTime,
    at: Instant,
}

impl BelievedTime {
    /// Notes that `moment` has passed: an agent proved it once, or a
    /// certificate or token was made then.
    pub fn has_passed(&self, moment: SystemTime) {
        self.0.passed.fetch_max(millis(moment), Ordering::Relaxed);
    }

    /// Believes an agent's proven answer, from `at` on.
    pub fn believe(&self, time: SystemTime, at: Instant) {
        self.0.proven.store(Some(Arc::new(Proven { time, at })));
        self.0.told.notify_one();
    }

    /// Waits until an agent has told the time, since this was last asked: what was
    /// decided by a wrong time must be decided again at once. For one waiter.
    pub async fn told(&self) {
        self.0.told.notified().await;
    }

    /// Whether an agent has told this process the time.
    pub fn is_proven(&self) -> bool {
        self.0.proven.load().is_some()
    }

    /// The present.
    pub fn now(&self) -> SystemTime {
        self.at(clock::now(), clock::monotonic())
    }

    /// As `transport` asks for it.
    pub fn clock(&self) -> Clock {
        let time = self.clone();
        Arc::new(move || time.now())
    }

    fn at(&self, wall: SystemTime, monotonic: Instant) -> SystemTime {
        match self.0.proven.load().as_deref() {
            Some(proven) => proven.time + monotonic.saturating_duration_since(proven.at),
            None => {
                let passed = Duration::from_millis(self.0.passed.load(Ordering::Relaxed));
                wall.max(SystemTime::UNIX_EPOCH + passed)
            }
        }
    }
}

/// Milliseconds since 1970.
fn millis(time: SystemTime) -> u64 {
    let since = time.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn second(second: u64) -> SystemTime {
        SystemTime::UNIX_EPOCH + Duration::from_secs(second)
    }

    #[test]
    fn before_an_answer_it_is_the_wall_clock_but_not_before_what_has_passed() {
        let time = BelievedTime::default();
        let monotonic = clock::monotonic();
        time.has_passed(second(1_000));
        time.has_passed(second(500));
        assert_eq!(time.at(second(10), monotonic), second(1_000));
        assert_eq!(time.at(second(2_000), monotonic), second(2_000));
    }

    #[test]
    fn after_an_answer_the_wall_clock_says_nothing() {
        let time = BelievedTime::default();
        let at = clock::monotonic();
        time.has_passed(second(5_000));
        time.believe(second(1_000), at);
        for wall in [second(1), second(9_000)] {
            assert_eq!(time.at(wall, at + Duration::from_secs(7)), second(1_007));
        }
    }
}
