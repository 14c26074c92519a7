//! List, make and show clusters.

use std::time::SystemTime;

use axum::Json;
use axum::http::StatusCode;
use fleet_kms_admin_api as api;
use fleet_kms_admin_api::{Change, CreateCluster, HumanDuration, Page, SetMaxOffline};

use crate::admin::effects::warnings;
use crate::admin::refusal::{Refused, no_cluster};
use crate::admin::request::{Body, Call, Names, Options, Paging};
use crate::admin::views;
use crate::agent::Agent;
use crate::authz::actions;
use crate::clusters::LiveClusterName;
use crate::control_plane::NewCluster;
use crate::max_offline::MaxOffline;

pub(super) async fn list(call: Call, paging: Paging) -> Result<Json<Page<api::Cluster>>, Refused> {
    let permit = call.fleet::<actions::ClusterList>()?;
    let agent = call.agent();
    let nodes = views::nodes_by_cluster(agent);
    let now = (agent.clock())();
    let mut items: Vec<api::Cluster> = Vec::new();
    let mut after = paging.after;
    // An admin of some clusters only: those it may not see do not fill its pages.
    while items.len() <= paging.limit {
        let page = agent.clusters.page(after.as_deref(), paging.limit + 1);
        let Some(last) = page.last() else { break };
        after = Some(last.name.to_string());
        for cluster in page.iter().filter(|cluster| permit.sees(&cluster.id)) {
            let count = nodes.get(&cluster.id).copied().unwrap_or(0);
            items.extend(view(agent, cluster, count, now));
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
    let period = body.period.map(HumanDuration::as_duration);
    let max_offline = body.max_offline.map(HumanDuration::as_duration);
    let new = NewCluster { name: &body.name, period, max_offline };
    if options.dry_run {
        control.check_new_cluster(new).await?;
        let effects =
            vec![format!("cluster {} is made, with version 1 active and version 2 next", body.name)];
        let plan = Change { applied: false, effects, warnings: Vec::new(), result: None };
        return Ok((StatusCode::OK, Json(plan)));
    }
    let created = control.create_cluster(&permit, new, options.wish().reason).await?;
    let cluster = LiveClusterName {
        id: created.id,
        name: created.name,
        created: created.created,
        max_offline: created.max_offline,
    };
    let snapshot = call.agent().keyrings.keyring(&cluster.id).ok_or_else(no_cluster)?;
    let change = Change {
        applied: true,
        effects: Vec::new(),
        warnings: warnings(&snapshot.keyring),
        result: Some(views::cluster(&cluster, &snapshot, 0, (call.agent().clock())())),
    };
    Ok((StatusCode::CREATED, Json(change)))
}

pub(super) async fn set_max_offline(
    call: Call,
    Names(cluster): Names<String>,
    options: Options,
    Body(SetMaxOffline { max_offline }): Body<SetMaxOffline>,
) -> Result<Json<Change<api::Cluster>>, Refused> {
    let (cluster, permit) = call.on::<actions::MaxOfflineSet>(&cluster)?;
    let wished = MaxOffline::try_new(max_offline.as_duration());
    let wished = wished
        .map_err(|error| Refused::field("max_offline", error.to_string(), "use 7d to 730d, such as 180d"))?;
    let mut effects = Vec::new();
    if wished != cluster.max_offline {
        effects.push(format!(
            "a node whose certificate ended up to {} ago may renew it",
            HumanDuration::from(wished.time())
        ));
    }
    if options.dry_run {
        return Ok(Json(Change { applied: false, effects, warnings: Vec::new(), result: None }));
    }
    call.agent().control_plane.set_max_offline(&permit, wished, options.wish().reason).await?;
    let cluster = LiveClusterName { max_offline: wished, ..cluster };
    let result = Some(current(call.agent(), &cluster)?);
    Ok(Json(Change { applied: true, effects, warnings: Vec::new(), result }))
}

/// A cluster as it is now.
pub(super) fn current(agent: &Agent, cluster: &LiveClusterName) -> Result<api::Cluster, Refused> {
    let nodes = views::nodes_by_cluster(agent).get(&cluster.id).copied().unwrap_or(0);
    view(agent, cluster, nodes, (agent.clock())()).ok_or_else(no_cluster)
}

fn view(agent: &Agent, cluster: &LiveClusterName, nodes: u32, now: SystemTime) -> Option<api::Cluster> {
    let snapshot = agent.keyrings.keyring(&cluster.id)?;
    Some(views::cluster(cluster, &snapshot, nodes, now))
}
