//! How often things may be asked on the enrolment port.
//!
//! Renewals and enrolments have budgets of their own, and a wrong token costs
//! its source address, never another caller: guesses cannot starve a fleet that
//! comes back. In memory, per agent; a restart begins with full budgets.

use std::collections::HashMap;
use std::hash::Hash;
use std::net::{IpAddr, Ipv6Addr};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use fleet_kms_identity::Serial;

/// Wrong tokens from one source address.
const GUESSES: Rate = Rate { burst: 20, interval: Duration::from_secs(6) };
/// Enrolments with a good token, all callers together: a rack that is installed
/// at once, at what one SQLite store commits without falling behind.
const ENROLMENTS: Rate = Rate { burst: 500, interval: Duration::from_millis(10) };
/// Renewals, all callers together: 3,000 nodes that come back at once are
/// through in 15 seconds.
const RENEWALS: Rate = Rate { burst: 500, interval: Duration::from_millis(5) };
/// Renewals asked for with one certificate: more than lost replies and restarts
/// need, too few for one broken node to spend the fleet's budget. By serial, so
/// that a clone with an old certificate spends nothing of the true node's.
const RENEWALS_EACH: Rate = Rate { burst: 10, interval: Duration::from_secs(30) };
/// `Time` calls from one source address, behind which a site may stand.
const TIMES: Rate = Rate { burst: 1_000, interval: Duration::from_millis(5) };
/// Addresses or identities remembered per budget; about 1 MiB each.
const MAX_KEYS: usize = 8_192;

/// `burst` at once, then one each `interval`.
#[derive(Debug, Clone, Copy)]
struct Rate {
    burst: u32,
    interval: Duration,
}

impl Rate {
    fn span(self) -> Duration {
        self.interval.saturating_mul(self.burst)
    }
}

/// The budget is spent.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("too many requests; try again in {} s", .retry_after.as_secs() + 1)]
pub struct Limited {
    /// When one more will be granted, if nobody else takes it.
    pub retry_after: Duration,
    /// The first refusal since the budget last had something left: worth a
    /// line in the audit, unlike the thousands that may follow.
    pub first: bool,
}

/// All budgets of the enrolment port.
pub struct Limits {
    guesses: KeyedBudgets<IpAddr>,
    enrolments: Mutex<Budget>,
    renewals: Mutex<Budget>,
    renewals_each: KeyedBudgets<Serial>,
    times: KeyedBudgets<IpAddr>,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            guesses: KeyedBudgets::new(GUESSES),
            enrolments: Mutex::default(),
            renewals: Mutex::default(),
            renewals_each: KeyedBudgets::new(RENEWALS_EACH),
            times: KeyedBudgets::new(TIMES),
        }
    }
}

impl Limits {
    /// Asks whether this address may still show tokens; takes nothing.
    ///
    /// # Errors
    ///
    /// When it has shown too many wrong ones.
    pub fn may_show_token(&self, address: IpAddr, now: SystemTime) -> Result<(), Limited> {
        self.guesses.with(source(address), now, |budget| budget.peek(GUESSES, now))
    }

    /// Charges a wrong token to its source address.
    pub fn charge_guess(&self, address: IpAddr, now: SystemTime) {
        self.guesses.with(source(address), now, |budget| budget.charge(GUESSES, now));
    }

    /// Takes one enrolment.
    ///
    /// # Errors
    ///
    /// When too many nodes enrol at once.
    pub fn enrolment(&self, now: SystemTime) -> Result<(), Limited> {
        lock(&self.enrolments).take(ENROLMENTS, now)
    }

    /// Takes one request for renewal with this certificate, granted or not.
    ///
    /// # Errors
    ///
    /// When it asks in a loop.
    pub fn may_ask_renewal(&self, serial: Serial, now: SystemTime) -> Result<(), Limited> {
        self.renewals_each.with(serial, now, |budget| budget.take(RENEWALS_EACH, now))
    }

    /// Takes one renewal of the fleet's.
    ///
    /// # Errors
    ///
    /// When too many nodes renew at once.
    pub fn renewal(&self, now: SystemTime) -> Result<(), Limited> {
        lock(&self.renewals).take(RENEWALS, now)
    }

    /// Takes one `Time` call from this address.
    ///
    /// # Errors
    ///
    /// When it asks too often.
    pub fn time(&self, address: IpAddr, now: SystemTime) -> Result<(), Limited> {
        self.times.with(source(address), now, |budget| budget.take(TIMES, now))
    }
}

/// One budget, as the time at which it will be full again (GCRA, ITU-T I.371).
#[derive(Debug)]
struct Budget {
    full_at: SystemTime,
    refused: bool,
}

impl Default for Budget {
    fn default() -> Self {
        Self { full_at: SystemTime::UNIX_EPOCH, refused: false }
    }
}

impl Budget {
    fn take(&mut self, rate: Rate, now: SystemTime) -> Result<(), Limited> {
        self.peek(rate, now)?;
        self.charge(rate, now);
        Ok(())
    }

    fn peek(&mut self, rate: Rate, now: SystemTime) -> Result<(), Limited> {
        // Kept, so that the budget refills from here on whatever the clock did before.
        self.full_at = self.full_at(rate, now);
        match (self.full_at + rate.interval).duration_since(now + rate.span()) {
            Ok(retry_after) if !retry_after.is_zero() => {
                let first = !std::mem::replace(&mut self.refused, true);
                Err(Limited { retry_after, first })
            }
            _ => {
                self.refused = false;
                Ok(())
            }
        }
    }

    fn charge(&mut self, rate: Rate, now: SystemTime) {
        self.full_at = self.full_at(rate, now) + rate.interval;
    }

    /// A clock that was set back leaves an empty budget, never a locked one.
    fn full_at(&self, rate: Rate, now: SystemTime) -> SystemTime {
        self.full_at.clamp(now, now + rate.span())
    }
}

/// A budget for each key. When there are too many keys, those without a budget
/// of their own share one.
struct KeyedBudgets<K> {
    rate: Rate,
    budgets: Mutex<(HashMap<K, Budget>, Budget)>,
}

impl<K: Eq + Hash> KeyedBudgets<K> {
    fn new(rate: Rate) -> Self {
        Self { rate, budgets: Mutex::default() }
    }

    fn with<T>(&self, key: K, now: SystemTime, act: impl FnOnce(&mut Budget) -> T) -> T {
        let mut budgets = lock(&self.budgets);
        let (keyed, shared) = &mut *budgets;
        if keyed.len() >= MAX_KEYS && !keyed.contains_key(&key) {
            // A full budget says no more than an absent one.
            keyed.retain(|_, budget| budget.full_at(self.rate, now) > now);
            if keyed.len() >= MAX_KEYS {
                return act(shared);
            }
        }
        act(keyed.entry(key).or_default())
    }
}

/// What counts as one source: an IPv4 address, or an IPv6 network of 64 bits,
/// which is what one host may choose its addresses from.
fn source(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V6(address) => IpAddr::V6(Ipv6Addr::from_bits(address.to_bits() & !u128::from(u64::MAX))),
        v4 @ IpAddr::V4(_) => v4,
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    const START: SystemTime = SystemTime::UNIX_EPOCH;
    const RATE: Rate = Rate { burst: 3, interval: Duration::from_secs(10) };

    fn later(seconds: u64) -> SystemTime {
        START + Duration::from_secs(1_000_000 + seconds)
    }

    fn address(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    fn serial(number: u64) -> Serial {
        Serial::new(number, [0; 8]).unwrap()
    }

    #[test]
    fn a_burst_passes_and_then_one_each_interval() {
        let mut budget = Budget::default();
        for _ in 0..3 {
            assert_eq!(budget.take(RATE, later(0)), Ok(()));
        }
        let refused = budget.take(RATE, later(4)).unwrap_err();
        assert_eq!(refused, Limited { retry_after: Duration::from_secs(6), first: true });
        assert!(!budget.take(RATE, later(4)).unwrap_err().first);
        assert_eq!(budget.take(RATE, later(10)), Ok(()));
        assert!(budget.take(RATE, later(10)).unwrap_err().first);
        assert_eq!((0..4).filter(|_| budget.take(RATE, later(1_000)).is_ok()).count(), 3);
    }

    #[test]
    fn a_clock_set_back_by_a_year_does_not_lock_anybody_out() {
        let mut budget = Budget::default();
        budget.take(RATE, later(365 * 86_400)).unwrap();
        assert!(budget.take(RATE, later(0)).is_err());
        assert_eq!(budget.take(RATE, later(10)), Ok(()));
    }

    #[test]
    fn wrong_tokens_cost_their_own_address_only() {
        let limits = Limits::default();
        let tries = (0..100_000)
            .filter(|_| {
                let may = limits.may_show_token(address("192.0.2.1"), later(0)).is_ok();
                limits.charge_guess(address("192.0.2.1"), later(0));
                may
            })
            .count();
        assert_eq!(tries, 20);
        assert_eq!(limits.may_show_token(address("192.0.2.2"), later(0)), Ok(()));
        assert_eq!(limits.enrolment(later(0)), Ok(()));
        assert_eq!(limits.renewal(later(0)), Ok(()));
    }

    #[test]
    fn all_addresses_of_an_ipv6_network_are_one_source() {
        assert_eq!(source(address("2001:db8::1")), source(address("2001:db8::ffff:1")));
        assert_ne!(source(address("2001:db8::1")), source(address("2001:db8:0:1::1")));
        assert_eq!(source(address("::ffff:192.0.2.1")), address("192.0.2.1"));
    }

    #[test]
    fn one_certificate_in_a_loop_leaves_the_others_their_renewals() {
        let limits = Limits::default();
        let granted = (0..1_000).filter(|_| limits.may_ask_renewal(serial(1), later(0)).is_ok()).count();
        assert_eq!(granted, 10);
        assert_eq!(limits.may_ask_renewal(serial(2), later(0)), Ok(()));
        assert_eq!(limits.renewal(later(0)), Ok(()));
    }

    #[test]
    fn more_addresses_than_are_remembered_share_a_budget() {
        let limits = Limits::default();
        for n in 0..u32::try_from(MAX_KEYS).unwrap() {
            limits.charge_guess(IpAddr::V4((0x0a00_0000 + n).into()), later(0));
        }
        for n in 0..20 {
            limits.charge_guess(IpAddr::V4((0x0b00_0000 + n).into()), later(0));
        }
        assert!(limits.may_show_token(address("12.0.0.1"), later(0)).is_err());
        assert_eq!(limits.may_show_token(address("12.0.0.1"), later(3_600)), Ok(()));
    }
}
