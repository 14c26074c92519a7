//! The latest time that the wall clock has ever shown here, kept in the store.
//!
//! It only ever delays a destruction: the waiting period begins at this mark or
//! now, whichever is later, so that a clock that was set back, or a store that
//! is looked at years later, makes nothing due. And because a clock that has
//! jumped ahead makes every date look past, no date counts until the clock has
//! gone on for a day without such a jump. Rotation never asks it.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use crate::changes::Changes;
use crate::ledger::{Ledger, LedgerError, WriteError};
use crate::records::payload::ClockRecord;
use crate::records::rows;
use crate::times::{from_ms, to_ms};

/// The agent looks at the clock so often.
pub const LOOK_EVERY: Duration = Duration::from_secs(60);
/// How far the wall clock may get ahead of monotonic time between two looks: an
/// hour is more than any correction that a healthy clock gets.
const JUMP: Duration = Duration::from_secs(60 * 60);
/// How long no date counts after a jump ahead, or a start that looks like one.
pub const SETTLE: Duration = Duration::from_secs(24 * 60 * 60);
/// The stored mark trails by at most so much, to spare the store.
const STORE_EVERY: Duration = Duration::from_secs(60 * 60);

/// Why the mark was not stored.
#[derive(Debug, thiserror::Error)]
pub enum StoreMarkError {
    /// The store cannot be read.
    #[error(transparent)]
    Ledger(#[from] LedgerError),
    /// The store did not take it.
    #[error(transparent)]
    Write(#[from] WriteError),
}

/// The mark, and whether the clock can be taken at its word.
pub struct HighWater(Mutex<State>);

struct State {
    mark: SystemTime,
    stored: SystemTime,
    /// The last look.
    seen: Option<(SystemTime, Instant)>,
    jumped: Option<Instant>,
}

impl HighWater {
    /// Reads the mark; in a store without one every time is yet to come.
    ///
    /// # Errors
    ///
    /// When the store cannot be read or the record is damaged.
    pub async fn load(ledger: &Ledger) -> Result<Self, LedgerError> {
        let record = ledger.read::<ClockRecord>(&rows::fixed(rows::CLOCK)).await?;
        Ok(Self::from_mark(from_ms(record.map_or(0, |record| record.payload.highest_ms))))
    }

    fn from_mark(mark: SystemTime) -> Self {
        Self(Mutex::new(State { mark, stored: mark, seen: None, jumped: None }))
    }

    /// Looks at the clocks: raises the mark, and notices a jump ahead.
    pub fn look(&self, now: SystemTime, monotonic: Instant) {
        let mut state = self.lock();
        // What was before this process is known by the mark alone: a long stop looks like a jump, and may be one.
        let (wall, at, slack) = match state.seen {
            Some((wall, at)) => (wall, at, JUMP),
            None => (state.mark, monotonic, JUMP + STORE_EVERY),
        };
        let expected = wall + monotonic.saturating_duration_since(at);
        if now.duration_since(expected).is_ok_and(|ahead| ahead > slack) {
            state.jumped = Some(monotonic);
        }
        state.seen = Some((now, monotonic));
        state.mark = state.mark.max(now);
    }

    /// Returns the mark, or `now` if that is later.
    pub fn latest(&self, now: SystemTime) -> SystemTime {
        self.lock().mark.max(now)
    }

    /// Returns for how long no date counts yet, because the clock jumped ahead.
    pub fn settling(&self, monotonic: Instant) -> Option<Duration> {
        let jumped = self.lock().jumped?;
        SETTLE.checked_sub(monotonic.saturating_duration_since(jumped)).filter(|left| !left.is_zero())
    }

    /// Stores the mark once it is an hour above what the store has; it never
    /// lowers it.
    ///
    /// # Errors
    ///
    /// When the store does not take it; a later call tries again.
    pub async fn store(&self, changes: &Changes) -> Result<(), StoreMarkError> {
        let (mark, stored) = {
            let state = self.lock();
            (state.mark, state.stored)
        };
        if mark.duration_since(stored).is_ok_and(|above| above >= STORE_EVERY) {
            let raised = changes.beside_changes(|| raise(changes.ledger(), mark)).await;
            if let Some(raised) = raised.transpose()? {
                self.lock().stored = raised;
            }
        }
        Ok(())
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Returns what the store has then; another agent may have seen a later time.
async fn raise(ledger: &Ledger, mark: SystemTime) -> Result<SystemTime, StoreMarkError> {
    let row = rows::fixed(rows::CLOCK);
    let record = ledger.read::<ClockRecord>(&row).await?;
    let known = record.as_ref().map_or(0, |record| record.payload.highest_ms);
    let highest_ms = known.max(to_ms(mark));
    if highest_ms > known {
        let mut changeset = ledger.changeset();
        match &record {
            Some(record) => changeset.update(record, &ClockRecord { highest_ms }),
            None => changeset.insert(row, &ClockRecord { highest_ms }),
        }
        ledger.commit_counts(changeset).await?;
    }
    Ok(from_ms(highest_ms))
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use fleet_kms_store::{MemoryStore, Store};

    use super::*;
    use crate::promises::rig::{Clocks, DAY, Desk, initialise, seed};

    const YEARS: Duration = Duration::from_secs(10 * 365 * 86_400);

    /// Looks once a minute for `time`, as the agent does.
    fn pass(high_water: &HighWater, clocks: &Clocks, time: Duration) {
        for _ in 0..time.as_secs() / 60 {
            clocks.pass(LOOK_EVERY);
            high_water.look(clocks.wall(), clocks.monotonic());
        }
    }

    fn settled(clocks: &Clocks) -> HighWater {
        let high_water = HighWater::from_mark(clocks.wall());
        high_water.look(clocks.wall(), clocks.monotonic());
        assert_eq!(high_water.settling(clocks.monotonic()), None);
        high_water
    }

    #[test]
    fn the_mark_only_rises_and_a_jump_ahead_makes_no_date_count_for_a_day() {
        let clocks = Clocks::new();
        let high_water = settled(&clocks);
        let before = clocks.wall();
        clocks.set_wall(before + YEARS);
        pass(&high_water, &clocks, Duration::from_secs(5 * 60));
        let ahead = clocks.wall();
        assert!(high_water.settling(clocks.monotonic()).is_some());
        clocks.set_wall(before);
        pass(&high_water, &clocks, DAY - Duration::from_secs(10 * 60));
        assert!(high_water.settling(clocks.monotonic()).is_some());
        pass(&high_water, &clocks, Duration::from_secs(10 * 60));
        assert_eq!(high_water.settling(clocks.monotonic()), None);
        assert_eq!(high_water.latest(clocks.wall()), ahead, "what was seen stays seen");
    }

    #[test]
    fn a_clock_that_goes_back_and_forth_never_settles_and_a_corrected_one_does() {
        let clocks = Clocks::new();
        let high_water = settled(&clocks);
        for _ in 0..48 {
            let now = clocks.wall();
            clocks.set_wall(now - 40 * DAY);
            pass(&high_water, &clocks, Duration::from_secs(30 * 60));
            clocks.set_wall(clocks.wall() + 40 * DAY);
            pass(&high_water, &clocks, Duration::from_secs(30 * 60));
            assert!(high_water.settling(clocks.monotonic()).is_some());
        }
        let clocks = Clocks::new();
        let high_water = settled(&clocks);
        clocks.set_wall(clocks.wall() + Duration::from_secs(10 * 60));
        pass(&high_water, &clocks, DAY);
        assert_eq!(high_water.settling(clocks.monotonic()), None);
    }

    #[tokio::test]
    async fn the_mark_outlives_the_process_and_another_one_never_lowers_it() {
        seed(6);
        let (store, clocks) = (Arc::new(MemoryStore::new()), Clocks::new());
        initialise(&*store).await;
        let audit = tempfile::tempdir().unwrap();
        let desk = Desk::open(Arc::clone(&store) as Arc<dyn Store>, audit.path(), &clocks).await;
        let start = clocks.wall();
        let high_water = HighWater::load(&desk.ledger).await.unwrap();
        high_water.look(start, clocks.monotonic());
        assert!(high_water.settling(clocks.monotonic()).is_some(), "nothing is known of this clock");
        high_water.store(&desk.changes).await.unwrap();
        // The next one starts with a clock that is behind, and one after it with one that is right.
        let next = HighWater::load(&desk.ledger).await.unwrap();
        next.look(start - 60 * DAY, clocks.monotonic());
        assert_eq!(next.latest(start - 60 * DAY), start);
        next.store(&desk.changes).await.unwrap();
        let after = HighWater::load(&desk.ledger).await.unwrap();
        after.look(start, clocks.monotonic());
        assert_eq!((after.latest(start), after.settling(clocks.monotonic())), (start, None));
        assert!(matches!(desk.ledger.check().await.unwrap(), crate::ledger::Integrity::Intact { .. }));
    }
}
