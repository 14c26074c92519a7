//! When a certificate is renewed. A pure decision: it sleeps nowhere and reads no clock.

use std::time::{Duration, SystemTime};

/// The fleet's renewals are spread over this part of a leaf's life (7 hours of 7 days).
const JITTER_PARTS: u32 = 24;

/// What the holder of a certificate has to do about its age.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Renewal {
    /// Renew now, and keep trying until it is done.
    Due,
    /// Ask again, at the latest after this long.
    In(Duration),
}

/// Decides whether a certificate that ends at `not_after` is to be renewed at `now`.
///
/// Due once less than two thirds of `leaf_life` is left, less a jitter that `jitter_seed` (random, constant for one
/// certificate) fixes between nothing and a 24th of the life. `notBefore` is its issuer's and says nothing about the life.
pub fn renewal_due(not_after: SystemTime, leaf_life: Duration, now: SystemTime, jitter_seed: u64) -> Renewal {
    let left = not_after.duration_since(now).unwrap_or(Duration::ZERO);
    let jitter = fraction(leaf_life / JITTER_PARTS, jitter_seed);
    let threshold = (leaf_life / 3 * 2).saturating_sub(jitter);
    match left.checked_sub(threshold) {
        Some(wait) if !wait.is_zero() => Renewal::In(wait),
        _ => Renewal::Due,
    }
}

/// Returns the part of `whole` that `seed` picks, evenly between none of it and all of it.
fn fraction(whole: Duration, seed: u64) -> Duration {
    let nanos = u64::try_from(whole.as_nanos()).unwrap_or(u64::MAX);
    let part = (u128::from(nanos) * u128::from(seed)) >> 64;
    Duration::from_nanos(u64::try_from(part).expect("a product shifted back by 64 bits fits 64 bits"))
}

#[cfg(test)]
mod tests {
    use super::*;

    const DAY: Duration = Duration::from_secs(86_400);
    const LIFE: Duration = Duration::from_secs(7 * 86_400);

    fn not_after() -> SystemTime {
        SystemTime::UNIX_EPOCH + 20_000 * DAY
    }

    #[test]
    fn a_certificate_is_due_once_less_than_two_thirds_of_its_life_is_left() {
        let edge = not_after() - LIFE / 3 * 2;
        assert_eq!(renewal_due(not_after(), LIFE, edge - DAY, 0), Renewal::In(DAY));
        assert_eq!(renewal_due(not_after(), LIFE, edge, 0), Renewal::Due);
    }

    #[test]
    fn the_jitter_only_delays_and_at_most_by_a_24th_of_the_life() {
        let edge = not_after() - LIFE / 3 * 2;
        let Renewal::In(wait) = renewal_due(not_after(), LIFE, edge, u64::MAX) else { panic!("not delayed") };
        assert!(
            wait <= LIFE / JITTER_PARTS && wait > LIFE / JITTER_PARTS - Duration::from_secs(1),
            "{wait:?}"
        );
        assert_eq!(renewal_due(not_after(), LIFE, edge + LIFE / JITTER_PARTS, u64::MAX), Renewal::Due);
    }

    #[test]
    fn an_expired_certificate_is_due() {
        assert_eq!(renewal_due(not_after(), LIFE, not_after() + 180 * DAY, u64::MAX), Renewal::Due);
    }

    #[test]
    fn a_clock_at_1970_waits_instead_of_renewing_in_a_loop() {
        assert!(matches!(renewal_due(not_after(), LIFE, SystemTime::UNIX_EPOCH, 1), Renewal::In(_)));
    }
}
