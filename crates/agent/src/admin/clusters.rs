//! List, make and show clusters.

use std::time::SystemTime;

use axum::Json;
use axum::http::StatusCode;
use fleet_kms_admin_api as api;
use fleet_kms_admin_api::{Change, CreateCluster, Page};

use crate::admin::effects::warnings;
use crate::admin::refusal::{Refused, no_cluster};
use crate::admin::request::{Body, Call, Names, Options, Paging};
use crate::admin::views;
use crate::agent::Agent;
use crate::authz::actions;
use crate::clusters::LiveClusterName;

pub(super) async fn list(call: Call, paging: Paging) -> Result<Json<Page<api::Cluster>>, Refused> {
    let permit = call.fleet::<actions::ClusterList>()?;
    let agent = call.agent();
    let now = (agent.clock())();
    let mut items: Vec<api::Cluster> = Vec::new();
    let mut after = paging.after;
    // An admin of some clusters only: those it may not see do not fill its pages.
    while items.len() <= paging.limit {
        let page = agent.clusters.page(after.as_deref(), paging.limit + 1);
        let Some(last) = page.last() else { break };
        after = Some(last.name.to_string());
        for cluster in page.iter().filter(|cluster| permit.sees(&cluster.id)) {
            items.extend(view(agent, cluster, now));
        }
    }
    let more = items.len() > paging.limit;
    items.truncate(paging.limit);
    let next = items.last().filter(|_| more).map(|last| last.name.clone());
    Ok(Json(Page { items, next }))
}

pub(super) async fn show(call: Call, Names(cluster): Names<String>) -> Result<Json<api::Cluster>, Refused> {
    let (cluster, _permit) = call.on::<actions::ClusterShow>(&cluster)?;
    Ok(Json(current(call.agent(), &cluster)?))
}

pub(super) async fn create(
    call: Call,
    options: Options,
    Body(body): Body<CreateCluster>,
) -> Result<(StatusCode, Json<Change<api::Cluster>>), Refused> {
    let permit = call.fleet::<actions::ClusterCreate>()?;
    let control = &call.agent().control_plane;
    let period = body.period.map(api::HumanDuration::as_duration);
    if options.dry_run {
        control.check_new_cluster(&body.name, period).await?;
        let effects =
            vec![format!("cluster {} is made, with version 1 active and version 2 next", body.name)];
        let plan = Change { applied: false, effects, warnings: Vec::new(), result: None };
        return Ok((StatusCode::OK, Json(plan)));
    }
    let created = control.create_cluster(&permit, &body.name, period, options.wish().reason).await?;
    let cluster = LiveClusterName { id: created.id, name: created.name, created: created.created };
    let snapshot = call.agent().keyrings.keyring(&cluster.id).ok_or_else(no_cluster)?;
    let change = Change {
        applied: true,
        effects: Vec::new(),
        warnings: warnings(&snapshot.keyring),
        result: Some(views::cluster(&cluster, &snapshot, 0, (call.agent().clock())())),
    };
    Ok((StatusCode::CREATED, Json(change)))
}

/// A cluster as it is now.
pub(super) fn current(agent: &Agent, cluster: &LiveClusterName) -> Result<api::Cluster, Refused> {
    view(agent, cluster, (agent.clock())()).ok_or_else(no_cluster)
}

fn view(agent: &Agent, cluster: &LiveClusterName, now: SystemTime) -> Option<api::Cluster> {
    let snapshot = agent.keyrings.keyring(&cluster.id)?;
    Some(views::cluster(cluster, &snapshot, views::nodes_of(agent, &cluster.id), now))
}
