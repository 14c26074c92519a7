//! What the metrics read off the agent's memory at each scrape: ages, states
//! and counts of the whole fleet. A scrape must never touch the store or wait.
//!
//! No series has a cluster or a node for a label: which ones they are is for
//! `kmsctl status` and `kmsctl key list` to say.

use std::fmt;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use fleet_kms_identity::Subject;
use fleet_kms_keyring::State as VersionState;
use fleet_kms_keyring::rotation::WRAPS_HINT;
use fleet_kms_transport::Connections;
use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::counter::ConstCounter;
use prometheus_client::metrics::gauge::ConstGauge;
use prometheus_client::registry::Unit;

use crate::agent::Agent;

/// Nodes report once a minute; one that missed so much is silent.
const SILENT_AFTER: Duration = Duration::from_secs(5 * 60);

/// States of a version that has a key, in their order.
const STATES: [&str; 5] = ["next", "active", "decrypt_only", "disabled", "destroy_scheduled"];

/// One scrape's view of the agent.
pub struct State {
    agent: Arc<Agent>,
    served: Connections,
}

impl State {
    /// Looks at an agent and the connections of its ports.
    pub fn new(agent: Arc<Agent>, served: Connections) -> Self {
        Self { agent, served }
    }
}

impl fmt::Debug for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("State")
    }
}

impl Collector for State {
    fn encode(&self, encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        let now = (self.agent.clock())();
        let mut page = Page(encoder);
        page.family("build_info", "1, with the release as its label", "version", &[(version(), 1)])?;
        self.keys(&mut page, now)?;
        self.identities(&mut page, now)?;
        self.store(&mut page, now)?;
        self.audit(&mut page)
    }
}

impl State {
    fn keys(&self, page: &mut Page<'_>, now: SystemTime) -> fmt::Result {
        let keys = Keys::of(&self.agent, now);
        page.gauge("clusters", "Clusters that this agent serves", keys.clusters)?;
        page.gauge("clusters_retired", "Retired clusters, whose keys are kept", keys.retired)?;
        let states: Vec<_> = STATES.into_iter().zip(keys.states).collect();
        page.family(
            "key_versions",
            "Key versions of served clusters that are not destroyed, by state",
            "state",
            &states,
        )?;
        page.gauge("rotations_overdue", "Clusters whose rotation is late", keys.overdue)?;
        page.seconds("oldest_active_version_age", "Age of the oldest active version", keys.oldest_seconds)?;
        let help =
            "Time until the next rotation of any cluster is due; negative when late, 0 without clusters";
        page.seconds("next_rotation", help, keys.next_seconds.unwrap_or(0))?;
        page.gauge("versions_unbacked", "Versions in use that no verified backup holds", keys.unbacked)?;
        page.gauge("active_version_most_wraps", "Most wraps under any active version", keys.most_wraps)?;
        let help = "Active versions with 2^32 wraps or more: rotate these clusters early";
        page.gauge("active_versions_over_wraps_hint", help, keys.over_hint)?;
        page.gauge("damaged_keys", "Stored keys that did not open at start", as_gauge(self.agent.damaged))?;
        let help = "Stored records that were damaged at start and are left out";
        page.gauge("damaged_records", help, as_gauge(self.agent.damaged_records()))
    }

    fn identities(&self, page: &mut Page<'_>, now: SystemTime) -> fmt::Result {
        let nodes = NodeCounts::of(&self.agent, now);
        let states = [("active", nodes.active), ("banned", nodes.banned)];
        page.family("nodes", "Enrolled nodes, by state", "state", &states)?;
        let help = "Active nodes that have not reported to this agent for 5 minutes, or not since its start";
        page.gauge("nodes_silent", help, nodes.silent)?;
        let help = "When the first certificate of an active node ends, Unix time; 0 without nodes";
        page.seconds("node_certificate_expiry_timestamp", help, nodes.first_end.map_or(0, unix))?;
        let own = self.agent.own.live().certificate().not_after();
        page.seconds(
            "certificate_expiry_timestamp",
            "When the agent's own certificate ends, Unix time",
            unix(own),
        )?;
        let (root, issuing) = self.agent.ca.live().load().ends();
        let help = "When the issuing CA ends, Unix time; it is replaced when half of its year is left";
        page.seconds("issuing_ca_expiry_timestamp", help, unix(issuing))?;
        let help =
            "When the active root CA ends, Unix time; it is replaced when half of its ten years is left";
        page.seconds("root_ca_expiry_timestamp", help, unix(root))?;
        let count = as_gauge(self.served.count());
        page.gauge("connections", "Connections to the data, enrolment and admin ports", count)
    }

    fn store(&self, page: &mut Page<'_>, now: SystemTime) -> fmt::Result {
        let agent = &self.agent;
        let tally = agent.changes.tally();
        page.gauge(
            "locked",
            "1 while no key can be used, until a restart",
            agent.keyrings.is_locked().into(),
        )?;
        let backup =
            agent.backups.age(now).map_or(-1, |age| i64::try_from(age.as_secs()).unwrap_or(i64::MAX));
        page.seconds("backup_age", "Age of the last verified backup; -1 when there is none", backup)?;
        let help = "Clusters whose values were wrapped under a version this store has not activated";
        page.gauge("store_rolled_back", help, as_gauge(agent.rolled_back.clusters().len()))?;
        let help = "1 while changes are refused because the store may be an old copy";
        page.gauge("store_unconfirmed", help, agent.changes.unconfirmed().is_some().into())?;
        let help = "1 while the last change that reached the store failed there";
        page.gauge("store_failing", help, tally.store_failing().into())?;
        page.counters("changes", "Changes, by how they ended", "outcome", tally.ends())
    }

    fn audit(&self, page: &mut Page<'_>) -> fmt::Result {
        let agent = &self.agent;
        let audit = agent.data_log.state();
        let help = "1 while the audit's changes cannot be written, so that every change is refused";
        page.gauge("audit_changes_failing", help, agent.changes.audit_is_failing().into())?;
        let help = "1 while the audit's data calls cannot be written";
        page.gauge("audit_data_failing", help, audit.failing.into())?;
        let help = "Chains of the audit that ended before their stored head at the start";
        page.gauge("audit_cut_chains", help, as_gauge(agent.audit_cut))?;
        let help = "Changes refused because they could not be recorded";
        page.counter("audit_refused_changes", help, agent.changes.refused())?;
        let help = "Data calls refused because they could not be recorded";
        page.counter("audit_refused_calls", help, audit.refused)?;
        let help = "Data calls answered without a record of their own";
        page.counter("audit_unrecorded_calls", help, audit.unrecorded)
    }
}

/// The keyrings, summed up.
#[derive(Default)]
struct Keys {
    clusters: i64,
    retired: i64,
    states: [i64; STATES.len()],
    overdue: i64,
    oldest_seconds: i64,
    next_seconds: Option<i64>,
    unbacked: i64,
    most_wraps: i64,
    over_hint: i64,
}

impl Keys {
    fn of(agent: &Agent, now: SystemTime) -> Self {
        let mut keys = Self::default();
        for (cluster, snapshot) in agent.keyrings.keyrings() {
            if agent.clusters.is_retired(&cluster) {
                keys.retired += 1;
                continue;
            }
            let keyring = &snapshot.keyring;
            keys.clusters += 1;
            for version in keyring.versions() {
                if let Some(count) = state(version.state).and_then(|state| keys.states.get_mut(state)) {
                    *count += 1;
                }
            }
            keys.unbacked += as_gauge(keyring.unbacked().count());
            let age = seconds_between(keyring.active().activated.unwrap_or(now), now);
            keys.oldest_seconds = keys.oldest_seconds.max(age);
            // As `kmsctl status` counts: past the date that the agent set itself, jitter included.
            let due = seconds_between(now, keyring.due(&cluster));
            keys.overdue += i64::from(due < 0);
            keys.next_seconds = Some(keys.next_seconds.map_or(due, |next| next.min(due)));
        }
        for (_, _, wraps) in agent.keyrings.active_wraps() {
            keys.most_wraps = keys.most_wraps.max(i64::try_from(wraps).unwrap_or(i64::MAX));
            keys.over_hint += i64::from(wraps >= WRAPS_HINT);
        }
        keys
    }
}

/// The place of a state in [`STATES`]; `None` for a tombstone.
fn state(state: VersionState) -> Option<usize> {
    match state {
        VersionState::Next => Some(0),
        VersionState::Active => Some(1),
        VersionState::DecryptOnly => Some(2),
        VersionState::Disabled => Some(3),
        VersionState::DestroyScheduled { .. } => Some(4),
        VersionState::Destroyed => None,
    }
}

/// The nodes, summed up.
#[derive(Default)]
struct NodeCounts {
    active: i64,
    banned: i64,
    silent: i64,
    first_end: Option<SystemTime>,
}

impl NodeCounts {
    fn of(agent: &Agent, now: SystemTime) -> Self {
        let mut nodes = Self::default();
        agent.identities.for_each(|identity| {
            let Subject::Node { .. } = identity.id.subject else { return };
            if identity.banned {
                nodes.banned += 1;
                return;
            }
            nodes.active += 1;
            let seen = agent.nodes.last_seen(&identity.id);
            let heard = seen.is_some_and(|seen| now.duration_since(seen).unwrap_or_default() < SILENT_AFTER);
            nodes.silent += i64::from(!heard);
            let newest = identity.next.as_ref().or(identity.current.as_ref());
            if let Some(end) = newest.map(|issued| issued.not_after) {
                nodes.first_end = Some(nodes.first_end.map_or(end, |first| first.min(end)));
            }
        });
        nodes
    }
}

/// The page that a scrape gets.
struct Page<'a>(DescriptorEncoder<'a>);

impl Page<'_> {
    fn gauge(&mut self, name: &str, help: &str, value: i64) -> fmt::Result {
        let gauge = ConstGauge::new(value);
        gauge.encode(self.0.encode_descriptor(name, help, None, MetricType::Gauge)?)
    }

    fn seconds(&mut self, name: &str, help: &str, value: i64) -> fmt::Result {
        let gauge = ConstGauge::new(value);
        gauge.encode(self.0.encode_descriptor(name, help, Some(&Unit::Seconds), MetricType::Gauge)?)
    }

    fn counter(&mut self, name: &str, help: &str, value: u64) -> fmt::Result {
        let counter = ConstCounter::new(value);
        counter.encode(self.0.encode_descriptor(name, help, None, MetricType::Counter)?)
    }

    fn family(&mut self, name: &str, help: &str, label: &'static str, values: &[(&str, i64)]) -> fmt::Result {
        let mut family = self.0.encode_descriptor(name, help, None, MetricType::Gauge)?;
        for (value, count) in values {
            ConstGauge::new(*count).encode(family.encode_family(&[(label, *value)])?)?;
        }
        Ok(())
    }

    fn counters(
        &mut self,
        name: &str,
        help: &str,
        label: &'static str,
        values: impl Iterator<Item = (&'static str, u64)>,
    ) -> fmt::Result {
        let mut family = self.0.encode_descriptor(name, help, None, MetricType::Counter)?;
        for (value, count) in values {
            ConstCounter::new(count).encode(family.encode_family(&[(label, value)])?)?;
        }
        Ok(())
    }
}

fn version() -> &'static str {
    env!("CARGO_PKG_VERSION")
}

/// Seconds from one time to another, negative when the other is earlier.
fn seconds_between(from: SystemTime, to: SystemTime) -> i64 {
    let seconds = |duration: Duration| i64::try_from(duration.as_secs()).unwrap_or(i64::MAX);
    to.duration_since(from).map_or_else(|error| -seconds(error.duration()), seconds)
}

fn unix(time: SystemTime) -> i64 {
    seconds_between(UNIX_EPOCH, time)
}

fn as_gauge(count: usize) -> i64 {
    i64::try_from(count).unwrap_or(i64::MAX)
}
