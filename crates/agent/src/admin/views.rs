//! The agent's state as the admin API's JSON types. Reads, decides nothing.

use std::time::SystemTime;

use fleet_kms_admin_api as api;
use fleet_kms_admin_api::{HumanDuration, NodeState, Timestamp, VersionState};
use fleet_kms_identity::{ClusterUuid, Subject};
use fleet_kms_keyring::{ClusterId, KeyVersion, State};

use crate::agent::Agent;
use crate::clusters::LiveClusterName;
use crate::identities::LiveIdentity;
use crate::live_keyrings::{Snapshot, WrapCounts};

pub(super) fn cluster(
    cluster: &LiveClusterName,
    snapshot: &Snapshot,
    nodes: u32,
    now: SystemTime,
) -> api::Cluster {
    let keyring = &snapshot.keyring;
    let active = keyring.active();
    let activated = active.activated.unwrap_or(active.created);
    let due = keyring.due(&cluster.id);
    let kept = keyring.versions().iter().filter(|version| version.state != State::Destroyed).count();
    api::Cluster {
        id: cluster.id.to_string(),
        name: cluster.name.to_string(),
        revision: snapshot.revision.0,
        created: cluster.created.into(),
        active_version: active.version.get(),
        key_id: active.key_id.to_string(),
        activated: activated.into(),
        age_seconds: now.duration_since(activated).unwrap_or_default().as_secs(),
        period: HumanDuration::from(keyring.policy().period()),
        next_rotation: due.into(),
        overdue: due < now,
        versions: u32::try_from(kept).unwrap_or(u32::MAX),
        nodes,
        unbacked: keyring.unbacked().map(|version| version.version.get()).collect(),
    }
}

pub(super) fn version(version: &KeyVersion, wraps: &WrapCounts) -> api::Version {
    let destroy_not_before = match version.state {
        State::DestroyScheduled { not_before } => Some(not_before.into()),
        _ => None,
    };
    api::Version {
        version: version.version.get(),
        key_id: version.key_id.to_string(),
        state: state(version.state),
        created: version.created.into(),
        activated: version.activated.map(Timestamp::from),
        deactivated: version.deactivated.map(Timestamp::from),
        disabled: version.disabled.map(Timestamp::from),
        destroy_not_before,
        wraps: wraps.get(&version.version).copied().unwrap_or_default(),
        unbacked: version.unbacked,
    }
}

pub(super) fn state(state: State) -> VersionState {
    match state {
        State::Next => VersionState::Next,
        State::Active => VersionState::Active,
        State::DecryptOnly => VersionState::DecryptOnly,
        State::Disabled => VersionState::Disabled,
        State::DestroyScheduled { .. } => VersionState::DestroyScheduled,
        State::Destroyed => VersionState::Destroyed,
    }
}

/// A node; `None` for an identity of another kind.
pub(super) fn node(agent: &Agent, identity: &LiveIdentity) -> Option<api::Node> {
    let Subject::Node { cluster, name } = &identity.id.subject else { return None };
    let report = agent.nodes.find(&identity.id);
    let id = ClusterId::from_bytes(*cluster.as_bytes());
    // The newest certificate is the one that must be renewed before it ends.
    let issued = identity.next.as_ref().or(identity.current.as_ref());
    Some(api::Node {
        id: identity.id.to_string(),
        name: name.to_string(),
        cluster_id: id.to_string(),
        cluster: agent.clusters.name_of(&id).map_or_else(String::new, |name| name.to_string()),
        state: if identity.banned { NodeState::Banned } else { NodeState::Active },
        serial: issued.map(|issued| issued.serial.to_string()),
        certificate_not_after: issued.map(|issued| issued.not_after.into()),
        last_seen: report.as_ref().map(|report| report.seen.into()),
        build: report.as_ref().map(|report| report.build.clone()),
        highest_version: report.map(|report| report.highest_version).filter(|version| *version > 0),
    })
}

/// How many nodes a cluster has.
pub(super) fn nodes_of(agent: &Agent, cluster: &ClusterId) -> u32 {
    agent.identities.nodes_of(&ClusterUuid::from_bytes(*cluster.as_bytes()))
}
