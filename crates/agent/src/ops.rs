//! The agent's ops port: `/livez`, `/readyz`, `/metrics`.
//!
//! Ready means: the keys are open and the data plane is served. Neither a probe
//! nor a scrape touches the store.

use std::fmt;
use std::io;
use std::net::TcpListener;
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use fleet_kms_keyring::rotation::WRAPS_HINT;
use fleet_kms_process::ops::{self, OpsState};
use fleet_kms_transport::{Connections, Drain};
use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric};
use prometheus_client::metrics::counter::ConstCounter;
use prometheus_client::metrics::gauge::ConstGauge;
use prometheus_client::registry::{Registry, Unit};
use tokio_util::task::TaskTracker;

use crate::agent::Agent;
use crate::errors::chain;

/// Serves the ops port until `drain`.
///
/// # Errors
///
/// When the runtime cannot watch the listener.
pub fn spawn(
    tasks: &TaskTracker,
    agent: &Arc<Agent>,
    listener: TcpListener,
    mut registry: Registry,
    drain: Drain,
) -> io::Result<()> {
    registry.register_collector(Box::new(State(Arc::clone(agent))));
    let ready = Arc::clone(agent);
    let state = OpsState::new(registry, move || readiness(&ready));
    tasks.spawn(async move {
        if let Err(error) = ops::serve(listener, state, Connections::new(), drain).await {
            tracing::error!(error = chain(&error), "the ops port is not served");
        }
    });
    Ok(())
}

fn readiness(agent: &Agent) -> Result<(), String> {
    if agent.keyrings.is_locked() {
        return Err("locked: no key can be used; restart the agent to unlock it".to_owned());
    }
    Ok(())
}

/// What is read off the agent's memory at each scrape.
struct State(Arc<Agent>);

impl fmt::Debug for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("State")
    }
}

/// Gauges of one scrape.
struct Gauges {
    clusters: i64,
    versions: i64,
    overdue: i64,
    oldest_active_seconds: i64,
    next_rotation_seconds: i64,
    unbacked: i64,
    most_wraps: i64,
    wraps_over_hint: i64,
}

impl Collector for State {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        let agent = &self.0;
        let now = (agent.clock())();
        let gauges = gauges(agent, now);
        let expiry = seconds_between(UNIX_EPOCH, agent.own.live().certificate().not_after());
        let audit = agent.data_log.state();
        let (root_end, issuing_end) = agent.ca.live().load().ends();
        let unconfirmed = i64::from(agent.changes.unconfirmed().is_some());
        let lines = [
            ("clusters", "Clusters that this agent serves", None, gauges.clusters),
            ("key_versions", "Key versions that are not destroyed", None, gauges.versions),
            (
                "rotations_overdue",
                "Clusters whose active version is older than its period",
                None,
                gauges.overdue,
            ),
            (
                "oldest_active_version_age",
                "Age of the oldest active version",
                Some(Unit::Seconds),
                gauges.oldest_active_seconds,
            ),
            (
                "next_rotation",
                "Time until the next rotation of any cluster is due; negative when late",
                Some(Unit::Seconds),
                gauges.next_rotation_seconds,
            ),
            ("versions_unbacked", "Versions in use that no verified backup holds", None, gauges.unbacked),
            ("active_version_most_wraps", "Most wraps under any active version", None, gauges.most_wraps),
            (
                "active_versions_over_wraps_hint",
                "Active versions with 2^32 wraps or more: rotate these clusters early",
                None,
                gauges.wraps_over_hint,
            ),
            (
                "backup_age",
                "Age of the last verified backup; -1 when there is none",
                Some(Unit::Seconds),
                agent.backups.age(now).map_or(-1, |age| i64::try_from(age.as_secs()).unwrap_or(i64::MAX)),
            ),
            (
                "store_rolled_back",
                "Clusters whose values were wrapped under a version this store has not activated",
                None,
                as_gauge(agent.rolled_back.clusters().len()),
            ),
            (
                "certificate_expiry_timestamp",
                "When the agent's own certificate ends, Unix time",
                Some(Unit::Seconds),
                expiry,
            ),
            (
                "audit_changes_failing",
                "1 while the audit's changes cannot be written, so that every change is refused",
                None,
                i64::from(agent.changes.audit_is_failing()),
            ),
            (
                "audit_data_failing",
                "1 while the audit's data calls cannot be written",
                None,
                i64::from(audit.failing),
            ),
            (
                "audit_cut_chains",
                "Chains of the audit that ended before their stored head at the start",
                None,
                as_gauge(agent.audit_cut),
            ),
            (
                "issuing_ca_expiry_timestamp",
                "When the issuing CA ends, Unix time; it is replaced when half of its year is left",
                Some(Unit::Seconds),
                seconds_between(UNIX_EPOCH, issuing_end),
            ),
            (
                "root_ca_expiry_timestamp",
                "When the active root CA ends, Unix time; it is replaced when half of its ten years is left",
                Some(Unit::Seconds),
                seconds_between(UNIX_EPOCH, root_end),
            ),
            ("damaged_keys", "Stored keys that did not open at start", None, as_gauge(agent.damaged)),
            (
                "damaged_records",
                "Stored records that were damaged at start and are left out",
                None,
                as_gauge(agent.damaged_records()),
            ),
            (
                "store_unconfirmed",
                "1 while changes are refused because the store may be an old copy",
                None,
                unconfirmed,
            ),
        ];
        for (name, help, unit, value) in lines {
            let gauge = ConstGauge::new(value);
            let name = format!("fleet_kms_agent_{name}");
            gauge.encode(encoder.encode_descriptor(&name, help, unit.as_ref(), gauge.metric_type())?)?;
        }
        let counters = [
            (
                "audit_refused_changes",
                "Changes refused because they could not be recorded",
                agent.changes.refused(),
            ),
            ("audit_refused_calls", "Data calls refused because they could not be recorded", audit.refused),
            ("audit_unrecorded_calls", "Data calls answered without a record of their own", audit.unrecorded),
        ];
        for (name, help, value) in counters {
            let counter = ConstCounter::new(value);
            let name = format!("fleet_kms_agent_{name}");
            counter.encode(encoder.encode_descriptor(&name, help, None, counter.metric_type())?)?;
        }
        Ok(())
    }
}

fn gauges(agent: &Agent, now: SystemTime) -> Gauges {
    let keyrings = agent.keyrings.keyrings();
    let mut gauges = Gauges {
        clusters: as_gauge(keyrings.len()),
        versions: 0,
        overdue: 0,
        oldest_active_seconds: 0,
        next_rotation_seconds: i64::MAX,
        unbacked: 0,
        most_wraps: 0,
        wraps_over_hint: 0,
    };
    for (cluster, snapshot) in &keyrings {
        let keyring = &snapshot.keyring;
        gauges.versions += as_gauge(snapshot.keks.len());
        gauges.unbacked += as_gauge(keyring.unbacked().count());
        let activated = keyring.active().activated.unwrap_or(now);
        let age = seconds_between(activated, now);
        gauges.oldest_active_seconds = gauges.oldest_active_seconds.max(age);
        let period = i64::try_from(keyring.policy().period().as_secs()).unwrap_or(i64::MAX);
        gauges.overdue += i64::from(age > period);
        let due = seconds_between(now, keyring.due(cluster));
        gauges.next_rotation_seconds = gauges.next_rotation_seconds.min(due);
    }
    for (_, _, wraps) in agent.keyrings.active_wraps() {
        gauges.most_wraps = gauges.most_wraps.max(i64::try_from(wraps).unwrap_or(i64::MAX));
        gauges.wraps_over_hint += i64::from(wraps >= WRAPS_HINT);
    }
    if keyrings.is_empty() {
        gauges.next_rotation_seconds = 0;
    }
    gauges
}

/// Seconds from one time to another, negative when the other is earlier.
fn seconds_between(from: SystemTime, to: SystemTime) -> i64 {
    let seconds = |duration: std::time::Duration| i64::try_from(duration.as_secs()).unwrap_or(i64::MAX);
    to.duration_since(from).map_or_else(|error| -seconds(error.duration()), seconds)
}

fn as_gauge(count: usize) -> i64 {
    i64::try_from(count).unwrap_or(i64::MAX)
}
