//! Nodes: listed, banned, removed.

use std::sync::Arc;

use axum::Json;
use fleet_kms_admin_api as api;
use fleet_kms_admin_api::{Change, Page};
use fleet_kms_identity::{SpiffeId, Subject};
use fleet_kms_keyring::ClusterId;

use crate::admin::refusal::{Refused, no_node};
use crate::admin::request::{Call, Names, Options, Paging};
use crate::admin::views;
use crate::authz::{Action, Permit, actions};
use crate::identities::LiveIdentity;

pub(super) async fn list(call: Call, paging: Paging) -> Result<Json<Page<api::Node>>, Refused> {
    let permit = call.fleet::<actions::NodeList>()?;
    Ok(Json(page(&call, &paging, |cluster| permit.sees(cluster))))
}

pub(super) async fn list_of_cluster(
    call: Call,
    Names(cluster): Names<String>,
    paging: Paging,
) -> Result<Json<Page<api::Node>>, Refused> {
    let (cluster, _permit) = call.on::<actions::ClusterNodeList>(&cluster)?;
    Ok(Json(page(&call, &paging, |of| *of == cluster.id)))
}

/// Pages follow the SPIFFE ID, which sorts by cluster id, then name.
fn page(call: &Call, paging: &Paging, wanted: impl Fn(&ClusterId) -> bool) -> Page<api::Node> {
    let agent = call.agent();
    let mut found: Vec<(String, Arc<LiveIdentity>)> = Vec::new();
    agent.identities.for_each(|identity| {
        let Subject::Node { cluster, .. } = &identity.id.subject else { return };
        if wanted(&ClusterId::from_bytes(*cluster.as_bytes())) {
            found.push((identity.id.to_string(), Arc::clone(identity)));
        }
    });
    found.retain(|(id, _)| paging.after.as_ref().is_none_or(|after| id > after));
    found.sort_by(|one, other| one.0.cmp(&other.0));
    let more = found.len() > paging.limit;
    found.truncate(paging.limit);
    let next = found.last().filter(|_| more).map(|(id, _)| id.clone());
    Page { items: found.iter().filter_map(|(_, identity)| views::node(agent, identity)).collect(), next }
}

pub(super) async fn ban(
    call: Call,
    Names((cluster, node)): Names<(String, String)>,
    options: Options,
) -> Result<Json<Change<api::Node>>, Refused> {
    let (cluster, permit) = call.on::<actions::NodeBan>(&cluster)?;
    let identity = find(&call, &permit, &node)?;
    let effects = vec![
        format!("calls of {node} of {} are refused and its connections closed", cluster.name),
        format!("the API server on {node} can no longer read or write what is encrypted"),
    ];
    if options.dry_run {
        return Ok(plan(effects));
    }
    call.agent().issuer.ban(&permit, &identity.id, cluster.name.as_str(), options.wish().reason).await?;
    close_connections(&call, &identity.id);
    done(&call, &identity.id, effects)
}

pub(super) async fn unban(
    call: Call,
    Names((cluster, node)): Names<(String, String)>,
    options: Options,
) -> Result<Json<Change<api::Node>>, Refused> {
    let (cluster, permit) = call.on::<actions::NodeUnban>(&cluster)?;
    let identity = find(&call, &permit, &node)?;
    let effects = vec![format!("{node} of {} may call again", cluster.name)];
    if options.dry_run {
        return Ok(plan(effects));
    }
    call.agent().issuer.unban(&permit, &identity.id, cluster.name.as_str(), options.wish().reason).await?;
    done(&call, &identity.id, effects)
}

pub(super) async fn remove(
    call: Call,
    Names((cluster, node)): Names<(String, String)>,
    options: Options,
) -> Result<Json<Change<api::Node>>, Refused> {
    let (cluster, permit) = call.on::<actions::NodeRemove>(&cluster)?;
    let identity = find(&call, &permit, &node)?;
    let effects = vec![
        format!("{node} of {} is removed and its connections closed", cluster.name),
        "to come back it needs a new join token".to_owned(),
    ];
    if options.dry_run {
        return Ok(plan(effects));
    }
    let result = views::node(call.agent(), &identity);
    call.agent().issuer.remove(&permit, &identity.id, cluster.name.as_str(), options.wish().reason).await?;
    close_connections(&call, &identity.id);
    Ok(Json(Change { applied: true, effects, warnings: Vec::new(), result }))
}

/// Finds a node of the permit's cluster.
fn find<A: Action>(call: &Call, permit: &Permit<A>, node: &str) -> Result<Arc<LiveIdentity>, Refused> {
    let mut found = None;
    agent_nodes(call, permit, |identity, name| {
        if name == node {
            found = Some(Arc::clone(identity));
        }
    });
    found.ok_or_else(no_node)
}

fn agent_nodes<A: Action>(call: &Call, permit: &Permit<A>, mut each: impl FnMut(&Arc<LiveIdentity>, &str)) {
    let of = permit.cluster();
    call.agent().identities.for_each(|identity| {
        if let Subject::Node { cluster, name } = &identity.id.subject
            && cluster.as_bytes() == of.as_bytes()
        {
            each(identity, name.as_str());
        }
    });
}

fn close_connections(call: &Call, id: &SpiffeId) {
    call.admin
        .connections
        .close_where(|peer| peer.certificate.as_ref().is_some_and(|certificate| certificate.id() == id));
}

fn plan(effects: Vec<String>) -> Json<Change<api::Node>> {
    Json(Change { applied: false, effects, warnings: Vec::new(), result: None })
}

fn done(call: &Call, id: &SpiffeId, effects: Vec<String>) -> Result<Json<Change<api::Node>>, Refused> {
    let identity = call.agent().identities.find(id).ok_or_else(no_node)?;
    let result = views::node(call.agent(), &identity);
    Ok(Json(Change { applied: true, effects, warnings: Vec::new(), result }))
}
