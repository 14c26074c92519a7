//! Nodes: listed, banned, removed.

use std::time::Duration;

use axum::Json;
use fleet_kms_admin_api as api;
use fleet_kms_admin_api::{NodeQuery, Page};
use fleet_kms_identity::{ClusterUuid, Name, Subject};
use fleet_kms_keyring::ClusterId;

use crate::admin::members::{self, Member};
use crate::admin::refusal::{Refused, no_node};
use crate::admin::request::{Asked, Call, Names, Paging, paging};
use crate::admin::views;
use crate::agent::Agent;
use crate::authz::actions;
use crate::identities::LiveIdentity;

/// Nodes, as [`members`] sees them.
pub(super) struct Nodes;

impl Member for Nodes {
    type View = api::Node;

    fn parts(subject: &Subject) -> Option<(&ClusterUuid, &Name)> {
        match subject {
            Subject::Node { cluster, name } => Some((cluster, name)),
            _ => None,
        }
    }

    fn view(agent: &Agent, identity: &LiveIdentity) -> Option<api::Node> {
        views::node(agent, identity)
    }

    fn none() -> Refused {
        no_node()
    }

    fn ban_effect(name: &str) -> Option<String> {
        Some(format!("the API server on {name} can no longer read or write what is encrypted"))
    }
}

pub(super) async fn list(
    call: Call,
    Asked(query): Asked<NodeQuery>,
) -> Result<Json<Page<api::Node>>, Refused> {
    let permit = call.fleet::<actions::NodeList>()?;
    page(&call, query, |cluster| permit.sees(cluster)).map(Json)
}

pub(super) async fn list_of_cluster(
    call: Call,
    Names(cluster): Names<String>,
    Asked(query): Asked<NodeQuery>,
) -> Result<Json<Page<api::Node>>, Refused> {
    let (cluster, _permit) = call.on::<actions::ClusterNodeList>(&cluster)?;
    page(&call, query, |of| *of == cluster.id).map(Json)
}

fn page(
    call: &Call,
    query: NodeQuery,
    wanted: impl Fn(&ClusterId) -> bool,
) -> Result<Page<api::Node>, Refused> {
    let agent = call.agent();
    let unseen = query.unseen.map(api::HumanDuration::as_duration);
    let Paging { limit, after } = paging(query.limit, query.after)?;
    let mut found = members::listed::<Nodes>(agent, |cluster, identity| {
        wanted(cluster) && unseen.is_none_or(|unseen| is_unseen(agent, identity, unseen))
    });
    found.retain(|(id, _)| after.as_ref().is_none_or(|after| id > after));
    let more = found.len() > limit;
    found.truncate(limit);
    let next = found.last().filter(|_| more).map(|(id, _)| id.clone());
    Ok(Page { items: found.iter().filter_map(|(_, identity)| views::node(agent, identity)).collect(), next })
}

fn is_unseen(agent: &Agent, identity: &LiveIdentity, unseen: Duration) -> bool {
    let now = (agent.clock())();
    // One that left no sign at all is older than any.
    views::last_seen(agent, identity)
        .is_none_or(|seen| now.duration_since(seen).unwrap_or_default() >= unseen)
}
