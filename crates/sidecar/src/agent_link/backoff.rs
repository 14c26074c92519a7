//! How long to wait before an agent is dialled again.

use std::hash::{DefaultHasher, Hash, Hasher};
use std::time::Duration;

/// The first wait after a connection was lost.
const FIRST: Duration = Duration::from_millis(50);

/// The longest wait while calls are still held for the agent to come back, so
/// that its restart costs them little more than the restart took.
const LONGEST_AT_FIRST: Duration = Duration::from_millis(250);

/// The longest wait after that. A fleet's sidecars each dial a dead agent about
/// once in two seconds.
const LONGEST: Duration = Duration::from_secs(2);

/// How old an outage is when waits may become long.
const AT_FIRST: Duration = Duration::from_secs(10);

/// A connection that lived shorter than this does not make the next wait short:
/// an agent that accepts and hangs up at once is not hammered.
const STABLE: Duration = Duration::from_secs(1);

/// The waits of one link.
#[derive(Debug)]
pub(super) struct Backoff {
    wait: Duration,
    jitter: u64,
}

impl Backoff {
    /// `seed` and `address` make the jitter; equal ones make it equal.
    pub(super) fn new(seed: u64, address: &str) -> Self {
        let mut hasher = DefaultHasher::new();
        (seed, address).hash(&mut hasher);
        Self { wait: FIRST, jitter: hasher.finish() }
    }

    /// Notes that a connection ended after so long.
    pub(super) fn was_up(&mut self, lived: Duration) {
        if lived >= STABLE {
            self.wait = FIRST;
        }
    }

    /// Returns the next wait, between half of it and all of it, in an outage of
    /// this age.
    pub(super) fn next(&mut self, outage: Duration) -> Duration {
        let longest = if outage < AT_FIRST { LONGEST_AT_FIRST } else { LONGEST };
        let wait = self.wait.min(longest);
        self.wait = (wait * 2).min(LONGEST);
        // xorshift64: spread, not secrecy.
        self.jitter ^= self.jitter << 13;
        self.jitter ^= self.jitter >> 7;
        self.jitter ^= self.jitter << 17;
        let part = u32::try_from(self.jitter % 1_000).unwrap_or(0);
        wait / 2 + wait / 2 * part / 1_000
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_grow_to_their_limit_and_stay_short_while_calls_are_held() {
        let mut backoff = Backoff::new(1, "a:1");
        assert!(backoff.next(Duration::ZERO) <= FIRST);
        for _ in 0..20 {
            assert!(backoff.next(Duration::from_secs(5)) <= LONGEST_AT_FIRST);
        }
        for _ in 0..20 {
            backoff.next(Duration::from_secs(11));
        }
        let wait = backoff.next(Duration::from_secs(60));
        assert!(wait >= LONGEST / 2 && wait <= LONGEST, "{wait:?}");
    }

    #[test]
    fn only_a_connection_that_lasted_makes_the_next_wait_short() {
        let mut backoff = Backoff::new(1, "a:1");
        for _ in 0..9 {
            backoff.next(Duration::from_secs(60));
        }
        backoff.was_up(Duration::from_millis(10));
        assert!(backoff.next(Duration::ZERO) > FIRST);
        backoff.was_up(Duration::from_secs(1));
        assert!(backoff.next(Duration::ZERO) <= FIRST);
    }

    #[test]
    fn two_nodes_do_not_dial_in_step() {
        let waits = |seed| {
            let mut backoff = Backoff::new(seed, "a:1");
            (0..8).map(|_| backoff.next(Duration::ZERO)).collect::<Vec<_>>()
        };
        assert_ne!(waits(1), waits(2));
        assert_eq!(waits(3), waits(3));
    }
}
