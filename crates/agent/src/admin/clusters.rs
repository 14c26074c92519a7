//! List, make and show clusters.

use std::time::SystemTime;

use axum::Json;
use axum::http::StatusCode;
use fleet_kms_admin_api as api;
use fleet_kms_admin_api::{Change, ClusterQuery, CreateCluster, HumanDuration, Page, SetMaxOffline};
use fleet_kms_keyring::ClusterId;

use crate::admin::effects::warnings;
use crate::admin::refusal::{Refused, no_cluster};
use crate::admin::request::{Asked, Body, Call, Names, Options, Paging, paging};
use crate::admin::views;
use crate::agent::Agent;
use crate::authz::actions;
use crate::clusters::LiveClusterName;
use crate::control_plane::{ClusterChange, NewCluster};
use crate::max_offline::MaxOffline;

pub(super) async fn list(
    call: Call,
    Asked(query): Asked<ClusterQuery>,
) -> Result<Json<Page<api::Cluster>>, Refused> {
    let permit = call.fleet::<actions::ClusterList>()?;
    let Paging { limit, mut after } = paging(query.limit, query.after)?;
    let agent = call.agent();
    let now = (agent.clock())();
    let mut items: Vec<api::Cluster> = Vec::new();
    // An admin of some clusters only: those it may not see do not fill its pages.
    while items.len() <= limit {
        let page = agent.clusters.page(after.as_deref().map(place), limit + 1, query.retired);
        let Some(last) = page.last() else { break };
        after = Some(cursor(&last.name.to_string(), &last.id.to_string()));
        for cluster in page.iter().filter(|cluster| permit.sees(&cluster.id)) {
            items.extend(view(agent, cluster, now));
        }
    }
    let more = items.len() > limit;
    items.truncate(limit);
    let next = items.last().filter(|_| more).map(|last| cursor(&last.name, &last.id));
    Ok(Json(Page { items, next }))
}

/// Retired clusters may share a name, so a place in the list is name and id.
fn cursor(name: &str, id: &str) -> String {
    format!("{name}/{id}")
}

fn place(cursor: &str) -> (&str, Option<ClusterId>) {
    match cursor.split_once('/') {
        Some((name, id)) => (name, id.parse().ok()),
        None => (cursor, None),
    }
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
        return Ok((StatusCode::OK, Json(Change::plan(effects, Vec::new()))));
    }
    let cluster = control.create_cluster(&permit, new, options.wish().reason).await?;
    let snapshot = call.agent().keyrings.keyring(&cluster.id).ok_or_else(no_cluster)?;
    let result = views::cluster(&cluster, &snapshot, 0, (call.agent().clock())());
    let change = Change::done(Vec::new(), warnings(&snapshot.keyring), Some(result));
    Ok((StatusCode::CREATED, Json(change)))
}

pub(super) async fn set_max_offline(
    call: Call,
    Names(cluster): Names<String>,
    options: Options,
    Body(SetMaxOffline { max_offline }): Body<SetMaxOffline>,
) -> Result<Json<Change<api::Cluster>>, Refused> {
    let (cluster, permit) = call.on_live::<actions::MaxOfflineSet>(&cluster)?;
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
    let (control, change) = (&call.agent().control_plane, ClusterChange::MaxOffline(wished));
    if options.dry_run {
        control.check_cluster_change(cluster.id, &change, options.wish()).await?;
        return Ok(Json(Change::plan(effects, Vec::new())));
    }
    let cluster = control.change_cluster(&permit, &change, options.wish()).await?;
    Ok(Json(Change::done(effects, Vec::new(), Some(current(call.agent(), &cluster)?))))
}

/// A cluster as it is now.
pub(super) fn current(agent: &Agent, cluster: &LiveClusterName) -> Result<api::Cluster, Refused> {
    view(agent, cluster, (agent.clock())()).ok_or_else(no_cluster)
}

fn view(agent: &Agent, cluster: &LiveClusterName, now: SystemTime) -> Option<api::Cluster> {
    let snapshot = agent.keyrings.keyring(&cluster.id)?;
    Some(views::cluster(cluster, &snapshot, views::nodes_of(agent, &cluster.id), now))
}
