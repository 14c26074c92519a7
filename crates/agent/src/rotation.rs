//! The schedule: rotates each cluster when it is due, for ever.
//!
//! It looks at least once a minute, never sleeps towards a date, and never
//! trusts the wall clock alone (`rotation/plan.rs` decides). Nothing that fails
//! disarms it: not a store that does not take a rotation, not a cluster that
//! cannot be rotated.

use std::num::NonZeroU32;
use std::sync::Arc;
use std::time::{Duration, Instant};

use fleet_kms_keyring::ClusterId;
use fleet_kms_transport::Clock;
use tokio::time::{Interval, MissedTickBehavior};
use tokio_util::sync::CancellationToken;

use crate::authz::internal;
use crate::changes::{ChangeError, Changes};
use crate::control_plane::{ControlPlane, KeyChangeError};
use crate::errors::chain;
use crate::live_keyrings::LiveKeyrings;

mod plan;
#[cfg(test)]
mod tests;

pub use plan::{Due, Plan, Seen};

/// The schedule looks at least this often.
pub const LOOK_EVERY: Duration = Duration::from_secs(60);
/// The shortest pause between two looks.
const LOOK_AT_MOST_EVERY: Duration = Duration::from_secs(1);
/// What is due at once is worked off for so long; then the schedule looks
/// again, because something more urgent may have become due.
const WORK_AT_MOST: Duration = Duration::from_secs(20);
/// After so many failures in a row it is the store that fails: the rest waits
/// for the next look.
const FAILURES_IN_A_ROW: u32 = 3;

/// How many clusters are rotated in a second, so that a fleet that is due at
/// once stays in nobody's way.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Pace(NonZeroU32);

impl Pace {
    /// The fastest pace; the disk is slower.
    pub const MAX: u32 = 1_000;

    /// Makes a pace from rotations per second, `1..=MAX`.
    pub fn per_second(number: u32) -> Option<Self> {
        NonZeroU32::new(number).filter(|number| number.get() <= Self::MAX).map(Self)
    }

    fn interval(self) -> Interval {
        let mut interval = tokio::time::interval(Duration::from_secs(1) / self.0.get());
        interval.set_missed_tick_behavior(MissedTickBehavior::Delay);
        interval
    }
}

impl Default for Pace {
    fn default() -> Self {
        Self(NonZeroU32::new(50).expect("50 is not 0"))
    }
}

/// The schedule of one agent.
pub struct Schedule {
    control_plane: Arc<ControlPlane>,
    keyrings: Arc<LiveKeyrings>,
    changes: Arc<Changes>,
    wall: Clock,
    monotonic: fn() -> Instant,
    pace: Pace,
    seen: Seen,
    refused: bool,
}

impl Schedule {
    /// Makes a schedule that has seen nothing yet.
    pub fn new(
        control_plane: Arc<ControlPlane>,
        keyrings: Arc<LiveKeyrings>,
        changes: Arc<Changes>,
        clocks: (Clock, fn() -> Instant),
        pace: Pace,
    ) -> Self {
        let (wall, monotonic) = clocks;
        let (seen, refused) = (Seen::default(), false);
        Self { control_plane, keyrings, changes, wall, monotonic, pace, seen, refused }
    }

    /// Runs until `stop`; a rotation that has begun is finished.
    pub async fn run(mut self, stop: CancellationToken) {
        let mut pace = self.pace.interval();
        let mut caught_up: Option<Instant> = None;
        loop {
            let now = (self.monotonic)();
            if caught_up.is_none_or(|at| now.saturating_duration_since(at) >= LOOK_EVERY) {
                self.catch_up().await;
                caught_up = Some(now);
            }
            let pause = self.look(&mut pace, &stop).await;
            tokio::select! {
                () = stop.cancelled() => return,
                () = tokio::time::sleep(pause) => {}
            }
        }
    }

    /// Looks at every cluster once and does what is due; returns how long to
    /// wait before the next look.
    async fn look(&mut self, pace: &mut Interval, stop: &CancellationToken) -> Duration {
        if self.keyrings.is_locked() || self.is_refused() {
            return LOOK_EVERY;
        }
        let started = (self.monotonic)();
        let mut keyrings = self.keyrings.keyrings();
        keyrings.retain(|(cluster, _)| !self.control_plane.is_retired(cluster));
        let plan = self.seen.plan(&keyrings, (self.wall)(), started);
        let mut failures = 0;
        for (cluster, due) in plan.work {
            pace.tick().await;
            if stop.is_cancelled() {
                break;
            }
            if (self.monotonic)().saturating_duration_since(started) >= WORK_AT_MOST {
                return LOOK_AT_MOST_EVERY;
            }
            let done = carry_out(&self.control_plane, cluster, due).await;
            self.seen.note_outcome(&cluster, done);
            failures = if done { 0 } else { failures + 1 };
            if failures == FAILURES_IN_A_ROW {
                tracing::error!("the store does not take rotations; the rest waits for the next look");
                break;
            }
        }
        plan.pause.clamp(LOOK_AT_MOST_EVERY, LOOK_EVERY)
    }

    /// Says whether all changes are refused; tells the log once.
    fn is_refused(&mut self) -> bool {
        let why = self.changes.unconfirmed();
        if let Some(why) = why
            && !self.refused
        {
            tracing::warn!(%why, "no rotation on schedule before kms-agent restore --confirm");
        }
        self.refused = why.is_some();
        self.refused
    }

    /// Compares memory with the store. It goes on without, if it must.
    async fn catch_up(&self) {
        let caught_up = self.changes.beside_changes(|| self.keyrings.catch_up(self.changes.ledger()));
        match caught_up.await.unwrap_or(Ok(0)) {
            Ok(0) => {}
            Ok(count) => tracing::info!(count, "read keyrings that are newer in the store"),
            Err(error) => tracing::warn!(error = chain(&error), "the store cannot be compared with memory"),
        }
    }
}

/// Does what is due to one cluster; says whether that is settled now.
pub async fn carry_out(control_plane: &ControlPlane, cluster: ClusterId, due: Due) -> bool {
    let permit = internal::schedule(cluster);
    let result = match due {
        Due::Rotate { from } => control_plane.rotate_due(&permit, from).await.map(|rotated| {
            tracing::info!(%cluster, version = %rotated.active, key_id = %rotated.key_id, "rotated on schedule");
        }),
        Due::Reanchor => control_plane.reanchor(&permit).await.map(|()| {
            tracing::warn!(%cluster, "the activation time was in the future; it is now");
        }),
    };
    match result {
        Ok(()) | Err(ChangeError::Refused(KeyChangeError::NotDue)) => true,
        Err(error) => {
            let error = chain(&error);
            tracing::error!(%cluster, error, "a due rotation failed; it is tried again within a minute");
            false
        }
    }
}
