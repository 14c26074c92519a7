//! The schedule: rotates each cluster when it is due, for ever.
//!
//! It looks at least once a minute, never sleeps towards a date, and never
//! trusts the wall clock alone: a scheduled rotation also needs half a period
//! of this process's monotonic time since it saw the active version change. So
//! a clock that jumps or flaps costs at most one early rotation.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use fleet_kms_keyring::rotation::{Step, may_rotate_on_schedule};
use fleet_kms_keyring::{ClusterId, Keyring, Version};
use tokio_util::sync::CancellationToken;

use crate::authz::internal;
use crate::changes::ChangeError;
use crate::control_plane::{ControlPlane, KeyChangeError};
use crate::live_keyrings::LiveKeyrings;

/// The schedule looks at least this often.
const LOOK_EVERY: Duration = Duration::from_secs(60);
/// The shortest pause between two looks.
const LOOK_AT_MOST_EVERY: Duration = Duration::from_secs(1);
/// Rotations per second, so that a fleet that is due at once stays in nobody's
/// way.
const PER_SECOND: u32 = 50;

/// What the schedule wants to do to a cluster.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Due {
    /// Rotate it.
    Rotate,
    /// Its activation lies in the future: rewrite it to now.
    Reanchor,
}

/// What this process has seen of each cluster's active version.
#[derive(Debug, Default)]
pub struct Seen {
    active: HashMap<ClusterId, (Version, Option<Instant>)>,
}

impl Seen {
    /// Decides about one cluster, and notes its active version.
    pub fn decide(
        &mut self,
        cluster: &ClusterId,
        keyring: &Keyring,
        now: SystemTime,
        monotonic: Instant,
    ) -> Option<Due> {
        let since = self.note(cluster, keyring.active().version, monotonic);
        match keyring.next_step(cluster, now) {
            Step::Wait(_) => None,
            Step::Reanchor => Some(Due::Reanchor),
            Step::Rotate => may_rotate_on_schedule(keyring.policy().period(), since).then_some(Due::Rotate),
        }
    }

    /// Returns how long ago this process saw the active version change; `None`
    /// if it never did.
    fn note(&mut self, cluster: &ClusterId, active: Version, monotonic: Instant) -> Option<Duration> {
        let (known, changed) = self.active.entry(*cluster).or_insert((active, None));
        if *known != active {
            (*known, *changed) = (active, Some(monotonic));
        }
        changed.map(|changed| monotonic.saturating_duration_since(changed))
    }
}

/// The two clocks of the schedule.
#[derive(Debug, Clone, Copy)]
pub struct Clocks {
    /// The wall clock: when a rotation is due.
    pub wall: fn() -> SystemTime,
    /// The monotonic clock: how far apart two rotations are.
    pub monotonic: fn() -> Instant,
}

/// Runs the schedule until `stop`.
pub async fn run(
    control_plane: Arc<ControlPlane>,
    keyrings: Arc<LiveKeyrings>,
    clocks: Clocks,
    stop: CancellationToken,
) {
    let Clocks { wall, monotonic } = clocks;
    let mut seen = Seen::default();
    loop {
        let pause = look(&control_plane, &keyrings, &mut seen, wall, monotonic).await;
        tokio::select! {
            () = stop.cancelled() => return,
            () = tokio::time::sleep(pause) => {}
        }
    }
}

/// Looks at every cluster once; returns how long to wait before the next look.
async fn look(
    control_plane: &ControlPlane,
    keyrings: &LiveKeyrings,
    seen: &mut Seen,
    wall: fn() -> SystemTime,
    monotonic: fn() -> Instant,
) -> Duration {
    let mut pause = LOOK_EVERY;
    for (cluster, snapshot) in keyrings.keyrings() {
        let now = wall();
        if let Some(due) = seen.decide(&cluster, &snapshot.keyring, now, monotonic()) {
            carry_out(control_plane, cluster, due).await;
            tokio::time::sleep(Duration::from_secs(1) / PER_SECOND).await;
        } else if let Step::Wait(until) = snapshot.keyring.next_step(&cluster, now) {
            pause = pause.min(until.duration_since(now).unwrap_or_default());
        }
    }
    pause.max(LOOK_AT_MOST_EVERY)
}

async fn carry_out(control_plane: &ControlPlane, cluster: ClusterId, due: Due) {
    let permit = internal::schedule(cluster);
    let result = match due {
        Due::Rotate => control_plane.rotate_due(&permit).await.map(|rotated| {
            tracing::info!(%cluster, version = %rotated.active, key_id = %rotated.key_id, "rotated on schedule");
        }),
        Due::Reanchor => control_plane.reanchor(&permit).await.map(|()| {
            tracing::warn!(%cluster, "the activation time was in the future; it is now");
        }),
    };
    match result {
        Ok(()) | Err(ChangeError::Refused(KeyChangeError::NotDue)) => {}
        Err(error) => {
            let error = crate::errors::chain(&error);
            tracing::error!(%cluster, error, "a due rotation failed; it is tried again within a minute");
        }
    }
}
