//! What is due, in which order: pure, all times are given.
//!
//! A scheduled rotation also needs half a period of this process's monotonic
//! time since it saw the active version change. So a clock that jumps or flaps
//! costs at most one early rotation, and its repair nothing.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use fleet_kms_keyring::rotation::{Step, may_rotate_on_schedule};
use fleet_kms_keyring::{ClusterId, Keyring, Version};

use super::LOOK_EVERY;
use crate::live_keyrings::Snapshot;

/// What the schedule wants to do to a cluster.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Due {
    /// Rotate it, unless it has another active version by then.
    Rotate {
        /// The active version that is due.
        from: Version,
    },
    /// Its activation lies in the future: rewrite it to now.
    Reanchor,
}

/// What to do now, and when to look again.
#[derive(Debug, PartialEq, Eq)]
pub struct Plan {
    /// The most urgent first.
    pub work: Vec<(ClusterId, Due)>,
    /// At most a minute.
    pub pause: Duration,
}

/// What this process has seen of each cluster.
#[derive(Debug, Default)]
pub struct Seen {
    clusters: HashMap<ClusterId, Known>,
}

#[derive(Debug)]
struct Known {
    active: Version,
    /// When this process saw it change; `None` if it never did.
    changed: Option<Instant>,
    failures: u32,
}

impl Known {
    fn may_rotate(&self, keyring: &Keyring, monotonic: Instant) -> bool {
        let since = self.changed.map(|changed| monotonic.saturating_duration_since(changed));
        may_rotate_on_schedule(keyring.policy().period(), since)
    }
}

impl Seen {
    /// Notes every cluster's active version and decides what is due.
    pub fn plan(
        &mut self,
        keyrings: &[(ClusterId, Arc<Snapshot>)],
        now: SystemTime,
        monotonic: Instant,
    ) -> Plan {
        let mut pause = LOOK_EVERY;
        let mut work = Vec::new();
        for (cluster, snapshot) in keyrings {
            let keyring = &snapshot.keyring;
            let known = self.note(cluster, keyring.active().version, monotonic);
            let due = match keyring.next_step(cluster, now) {
                Step::Wait(until) => {
                    pause = pause.min(until.duration_since(now).unwrap_or_default());
                    continue;
                }
                Step::Reanchor => Due::Reanchor,
                Step::Rotate if known.may_rotate(keyring, monotonic) => Due::Rotate { from: known.active },
                Step::Rotate => continue,
            };
            work.push((known.failures, end_of_period(keyring), *cluster, due));
        }
        if self.clusters.len() > keyrings.len() {
            let present: HashSet<&ClusterId> = keyrings.iter().map(|(cluster, _)| cluster).collect();
            self.clusters.retain(|cluster, _| present.contains(cluster));
        }
        // What failed before waits behind the rest, so that it cannot hold up a fleet.
        work.sort_unstable_by_key(|(failures, end, cluster, _)| (*failures, *end, *cluster));
        Plan { work: work.into_iter().map(|(_, _, cluster, due)| (cluster, due)).collect(), pause }
    }

    /// Notes whether what was due could be done.
    pub fn note_outcome(&mut self, cluster: &ClusterId, done: bool) {
        if let Some(known) = self.clusters.get_mut(cluster) {
            known.failures = if done { 0 } else { known.failures.saturating_add(1) };
        }
    }

    fn note(&mut self, cluster: &ClusterId, active: Version, monotonic: Instant) -> &Known {
        let known = self.clusters.entry(*cluster);
        let known = known.or_insert(Known { active, changed: None, failures: 0 });
        if known.active != active {
            (known.active, known.changed) = (active, Some(monotonic));
        }
        known
    }

    #[cfg(test)]
    pub(crate) fn len(&self) -> usize {
        self.clusters.len()
    }
}

/// When a rotation would be late.
fn end_of_period(keyring: &Keyring) -> SystemTime {
    let activated = keyring.active().activated.unwrap_or(SystemTime::UNIX_EPOCH);
    activated.checked_add(keyring.policy().period()).unwrap_or(activated)
}
