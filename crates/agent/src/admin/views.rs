//! The agent's state as the admin API's JSON types. Reads, decides nothing.

use std::time::SystemTime;

use fleet_kms_admin_api as api;
use fleet_kms_admin_api::{ClusterState, HumanDuration, NodeState, Timestamp, VersionState};
use fleet_kms_identity::{ClusterUuid, Subject};
use fleet_kms_keyring::{ClusterId, KeyVersion, State};
use fleet_kms_store::Revision;

use crate::agent::Agent;
use crate::authz::Scope;
use crate::ca::LEAF_LIFE;
use crate::clusters::LiveClusterName;
use crate::control_plane::DESTRUCTION_WAIT;
use crate::identities::{Issued, LiveIdentity};
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
        state: if cluster.retired.is_some() { ClusterState::Retired } else { ClusterState::Live },
        retired: cluster.retired.map(Timestamp::from),
        keys_kept_until: cluster.retired.map(|retired| (retired + DESTRUCTION_WAIT).into()),
        revision: revision(cluster, snapshot).0,
        created: cluster.created.into(),
        active_version: active.version.get(),
        key_id: active.key_id.to_string(),
        activated: activated.into(),
        age_seconds: now.duration_since(activated).unwrap_or_default().as_secs(),
        period: HumanDuration::from(keyring.policy().period()),
        max_offline: Some(HumanDuration::from(cluster.max_offline.time())),
        next_rotation: due.into(),
        overdue: due < now && cluster.retired.is_none(),
        versions: u32::try_from(kept).unwrap_or(u32::MAX),
        nodes,
        unbacked: keyring.unbacked().map(|version| version.version.get()).collect(),
    }
}

/// The revision that callers see and send: the later of the cluster's two records'.
pub(super) fn revision(cluster: &LiveClusterName, snapshot: &Snapshot) -> Revision {
    snapshot.revision.max(cluster.revision)
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
    let issued = newest(identity);
    Some(api::Node {
        id: identity.id.to_string(),
        name: name.to_string(),
        cluster_id: id.to_string(),
        cluster: agent.clusters.name_of(&id).map_or_else(String::new, |name| name.to_string()),
        state: member_state(identity),
        revision: identity.revision.0,
        serial: issued.map(|issued| issued.serial.to_string()),
        certificate_not_after: issued.map(|issued| issued.not_after.into()),
        last_seen: last_seen(agent, identity).map(Timestamp::from),
        build: report.as_ref().map(|report| report.build.clone()),
        highest_version: report.map(|report| report.highest_version).filter(|version| *version > 0),
    })
}

/// When a node was last known to live. Its newest certificate says so too: the
/// agent that gave it heard the node then, and told the store, not just its own
/// memory.
pub(super) fn last_seen(agent: &Agent, identity: &LiveIdentity) -> Option<SystemTime> {
    let reported = agent.nodes.find(&identity.id).map(|report| report.seen);
    let issued = newest(identity).and_then(|issued| issued.not_after.checked_sub(LEAF_LIFE));
    reported.max(issued)
}

/// A worker; `None` for an identity of another kind.
pub(super) fn worker(agent: &Agent, identity: &LiveIdentity) -> Option<api::Worker> {
    let Subject::Worker { cluster, name } = &identity.id.subject else { return None };
    let id = ClusterId::from_bytes(*cluster.as_bytes());
    let issued = newest(identity);
    Some(api::Worker {
        id: identity.id.to_string(),
        name: name.to_string(),
        cluster_id: id.to_string(),
        cluster: agent.clusters.name_of(&id).map_or_else(String::new, |name| name.to_string()),
        state: member_state(identity),
        revision: identity.revision.0,
        serial: issued.map(|issued| issued.serial.to_string()),
        certificate_not_after: issued.map(|issued| issued.not_after.into()),
    })
}

/// An admin; `None` for an identity of another kind.
pub(super) fn admin(agent: &Agent, identity: &LiveIdentity) -> Option<api::Admin> {
    let Subject::Admin { name } = &identity.id.subject else { return None };
    let named =
        |id: &ClusterId| agent.clusters.name_of(id).map_or_else(|| id.to_string(), |name| name.to_string());
    let clusters = match &identity.scope {
        Scope::All => Vec::new(),
        Scope::Clusters(ids) => ids.iter().map(named).collect(),
    };
    let issued = newest(identity);
    Some(api::Admin {
        id: identity.id.to_string(),
        name: name.to_string(),
        roles: identity.roles.iter().map(|role| api::Role::from(role.name())).collect(),
        scope: api::Scope { all: identity.scope == Scope::All, clusters },
        state: member_state(identity),
        revision: identity.revision.0,
        serial: issued.map(|issued| issued.serial.to_string()),
        certificate_not_after: issued.map(|issued| issued.not_after.into()),
    })
}

/// The newest certificate is the one that must be renewed before it ends.
fn newest(identity: &LiveIdentity) -> Option<&Issued> {
    identity.next.as_ref().or(identity.current.as_ref())
}

fn member_state(identity: &LiveIdentity) -> NodeState {
    if identity.banned { NodeState::Banned } else { NodeState::Active }
}

/// How many nodes a cluster has.
pub(super) fn nodes_of(agent: &Agent, cluster: &ClusterId) -> u32 {
    agent.identities.nodes_of(&ClusterUuid::from_bytes(*cluster.as_bytes()))
}
