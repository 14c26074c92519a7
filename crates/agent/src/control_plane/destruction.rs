//! The guards before a destruction: what each of them says of a version, and
//! why. A guard that does not know says so, and does not agree.

use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use fleet_kms_admin_api::{HumanDuration, Timestamp};
use fleet_kms_keyring::{ClusterId, KeyVersion, State, Version};

use super::ControlPlane;
use crate::high_water::{HighWater, SETTLE};
use crate::live_keyrings::LastUse;

/// Waiting period between the order and the destruction; the keyring takes none
/// below 7 days.
pub const DESTRUCTION_WAIT: Duration = Duration::from_secs(30 * 86_400);
/// For so long nobody may have asked for what a version wrapped: as long as an
/// object may lie untouched between two rotations of the default period.
const UNUSED_FOR: Duration = Duration::from_secs(30 * 86_400);
/// The guard that the order itself starts: it stands in no order's way.
const WAITING: &str = "waiting";

/// One guard before a destruction.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DestructionGuard {
    /// Its stable name.
    pub name: &'static str,
    /// Whether it agrees.
    pub ok: bool,
    /// Why.
    pub why: String,
}

/// What the agent knows beyond the keyring.
#[derive(Clone, Copy, Debug)]
pub struct Evidence {
    /// The wall clock.
    pub now: SystemTime,
    /// The wall clock, or the latest time that it ever showed.
    pub latest: SystemTime,
    /// For how long no date counts, because the clock jumped ahead.
    pub settling: Option<Duration>,
    /// For how long this process has seen what is used.
    pub watched: Duration,
    /// What it has seen of this version.
    pub last_use: LastUse,
    /// When the last backup was verified.
    pub last_backup: Option<SystemTime>,
}

/// Asks every guard about a version.
///
/// No census is taken yet, so nothing can be destroyed.
pub fn guards(version: &KeyVersion, evidence: &Evidence) -> Vec<DestructionGuard> {
    let guard = |name, asked: Result<String, String>| {
        let ok = asked.is_ok();
        DestructionGuard { name, ok, why: asked.unwrap_or_else(|no| no) }
    };
    vec![
        guard("disabled", disabled(version)),
        guard("census", Err("no census".to_owned())),
        guard("unused", unused(evidence)),
        guard("no_hit", no_hit(version, evidence)),
        guard("etcd_backups", Err("unknown: nobody has said how long backups of etcd are kept".to_owned())),
        guard("backup", backup(version, evidence)),
        guard(WAITING, waiting(version, evidence)),
    ]
}

/// The first guard that stands in the way of an order to destroy a version.
pub(super) fn refusal(version: &KeyVersion, evidence: &Evidence) -> Option<DestructionGuard> {
    guards(version, evidence).into_iter().find(|guard| !guard.ok && guard.name != WAITING)
}

fn disabled(version: &KeyVersion) -> Result<String, String> {
    match version.state {
        State::Disabled | State::DestroyScheduled { .. } => Ok("it is disabled".to_owned()),
        State::Destroyed => Err("it is destroyed".to_owned()),
        _ => Err("it is not disabled; disable it first".to_owned()),
    }
}

fn unused(evidence: &Evidence) -> Result<String, String> {
    match evidence.last_use.unwrapped {
        Some(ago) if ago < UNUSED_FOR => Err(format!("it unwrapped {} ago", short(ago))),
        _ if evidence.watched < UNUSED_FOR => Err(not_watched("it has unwrapped nothing", evidence)),
        _ => Ok(format!("it has unwrapped nothing for {}", short(UNUSED_FOR))),
    }
}

fn no_hit(version: &KeyVersion, evidence: &Evidence) -> Result<String, String> {
    let Some(since) = version.disabled else { return Err("it is not disabled; disable it first".to_owned()) };
    if let Some(ago) = evidence.last_use.refused.filter(|ago| *ago < UNUSED_FOR) {
        return Err(format!("somebody asked for what it wrapped {} ago", short(ago)));
    }
    let disabled_for = evidence.now.duration_since(since).unwrap_or_default();
    if disabled_for < UNUSED_FOR {
        return Err(format!("it has been disabled for {}, not {}", short(disabled_for), short(UNUSED_FOR)));
    }
    dates_count(evidence)?;
    if evidence.watched < UNUSED_FOR {
        return Err(not_watched("nobody asked for what it wrapped", evidence));
    }
    Ok(format!("nobody has asked for what it wrapped for {}", short(UNUSED_FOR)))
}

fn backup(version: &KeyVersion, evidence: &Evidence) -> Result<String, String> {
    match evidence.last_backup {
        Some(at) if !version.unbacked => {
            Ok(format!("a verified backup holds it; the last one is of {}", Timestamp::from(at)))
        }
        _ => Err("no verified backup holds it".to_owned()),
    }
}

fn waiting(version: &KeyVersion, evidence: &Evidence) -> Result<String, String> {
    let State::DestroyScheduled { not_before } = version.state else {
        return Err(format!("{} from the order on, and nobody has given it", short(DESTRUCTION_WAIT)));
    };
    // By the clock, never by the mark: a clock that was ahead once must make nothing due.
    if evidence.now < not_before {
        return Err(format!("it waits until {}", Timestamp::from(not_before)));
    }
    dates_count(evidence)?;
    Ok(format!("it has waited since the order, until {}", Timestamp::from(not_before)))
}

fn dates_count(evidence: &Evidence) -> Result<(), String> {
    match evidence.settling {
        Some(left) => Err(format!(
            "the clock jumped ahead or the agent was long off: dates count again in {}",
            short(left)
        )),
        None => Ok(()),
    }
}

fn not_watched(what: &str, evidence: &Evidence) -> String {
    let (watched, needed) = (short(evidence.watched), short(UNUSED_FOR));
    format!("unknown: {what} since this agent started {watched} ago, and it must have looked for {needed}")
}

/// In whole minutes, from an hour on; nobody decides by seconds.
fn short(time: Duration) -> HumanDuration {
    let seconds = time.as_secs();
    HumanDuration::from(Duration::from_secs(if seconds < 3_600 { seconds } else { seconds / 60 * 60 }))
}

/// Where a control plane finds what it knows beyond the keyrings.
pub struct Watch {
    /// The clock's mark.
    pub high_water: Arc<HighWater>,
    /// The monotonic clock.
    pub monotonic: fn() -> Instant,
}

impl ControlPlane {
    /// Gathers what is known of a version beyond its keyring.
    pub fn evidence(&self, cluster: &ClusterId, version: Version) -> Evidence {
        let now = self.changes.now();
        let last_backup = self.backups.as_ref().and_then(|backups| backups.last()).map(|(at, _)| at);
        let Some(Watch { high_water, monotonic }) = &self.watch else {
            let (watched, last_use) = (Duration::ZERO, LastUse::default());
            return Evidence { now, latest: now, settling: Some(SETTLE), watched, last_use, last_backup };
        };
        let at = monotonic();
        high_water.look(now, at);
        Evidence {
            now,
            latest: high_water.latest(now),
            settling: high_water.settling(at),
            watched: self.keyrings.watched(at),
            last_use: self.keyrings.last_use(cluster, version, at),
            last_backup,
        }
    }
}

#[cfg(test)]
mod tests;
