//! Clusters retired, restored and renamed.

use axum::Json;
use fleet_kms_admin_api as api;
use fleet_kms_admin_api::{Change, RenameCluster, RestoreCluster};
use fleet_kms_keyring::ClusterId;

use crate::admin::clusters::current;
use crate::admin::members::reach;
use crate::admin::refusal::Refused;
use crate::admin::request::{Body, Call, Names, OptionalBody, Options};
use crate::authz::{Permit, actions};
use crate::changes::ChangeError;
use crate::clusters::{ClusterName, LiveClusterName};
use crate::control_plane::{LabelChange, LabelError};
use crate::enrolment::issue::{MemberChangeError, Removes};
use crate::enrolment::tokens::{self, RevokesTokens};

type Answer = Result<Json<Change<api::Cluster>>, Refused>;

pub(super) async fn retire(call: Call, Names(cluster): Names<String>, options: Options) -> Answer {
    let (cluster, permit) = call.on::<actions::ClusterRetire>(&cluster)?;
    let members = call.agent().issuer.members(&permit).await.map_err(MemberChangeError::from)?.len();
    let effects = vec![
        format!(
            "calls of every node of {} are refused from now on: its API servers can neither read nor write what is encrypted",
            cluster.name
        ),
        format!("{} removed; to come back each needs a new join token", in_words(members)),
        format!("the name {} is free; the keys stay in the store and in every backup", cluster.name),
    ];
    let control = &call.agent().control_plane;
    if options.dry_run {
        control.check_label(cluster.id, &LabelChange::Retire, options.wish()).await?;
        return Ok(Json(Change::plan(effects, Vec::new())));
    }
    match control.change_label(&permit, &LabelChange::Retire, options.wish()).await {
        Ok(_) => {}
        // Retired, but a failure kept its nodes in the list: go on from there.
        Err(ChangeError::Refused(LabelError::Retired)) if members > 0 => {}
        Err(error) => return Err(error.into()),
    }
    close_connections_of(&call, cluster.id);
    let mut warnings = Vec::new();
    if let Err(refused) = clear(&call, &permit, &cluster, options.wish().reason).await {
        let (id, why) = (cluster.id, refused.detail());
        warnings.push(format!(
            "not all nodes are off the list yet ({why}); none of them may call. Run `kmsctl cluster retire {id}` again"
        ));
    }
    done(&call, cluster.id, effects, warnings)
}

pub(super) async fn restore(
    call: Call,
    Names(cluster): Names<String>,
    options: Options,
    OptionalBody(RestoreCluster { name }): OptionalBody<RestoreCluster>,
) -> Answer {
    let (cluster, permit) = call.on_retired::<actions::ClusterRestore>(&cluster)?;
    let change = LabelChange::Restore(name.as_deref().map(parse).transpose()?);
    let control = &call.agent().control_plane;
    let planned = control.check_label(cluster.id, &change, options.wish()).await?;
    let effects = vec![
        format!(
            "{} is live again as {}, with all its keys, and is rotated when it is due",
            cluster.id, planned.name
        ),
        "its nodes need join tokens; what they wrapped before can then be read again".to_owned(),
    ];
    if options.dry_run {
        return Ok(Json(Change::plan(effects, Vec::new())));
    }
    // No identity or token of before may come back with it.
    clear(&call, &permit, &cluster, options.wish().reason).await?;
    control.change_label(&permit, &change, options.wish()).await?;
    done(&call, cluster.id, effects, Vec::new())
}

pub(super) async fn rename(
    call: Call,
    Names(cluster): Names<String>,
    options: Options,
    Body(RenameCluster { name }): Body<RenameCluster>,
) -> Answer {
    let (cluster, permit) = call.on_live::<actions::ClusterRename>(&cluster)?;
    let change = LabelChange::Rename(parse(&name)?);
    let effects = vec![format!("{} is called {name}; its id, keys and nodes stay", cluster.name)];
    let control = &call.agent().control_plane;
    if options.dry_run {
        control.check_label(cluster.id, &change, options.wish()).await?;
        return Ok(Json(Change::plan(effects, Vec::new())));
    }
    control.change_label(&permit, &change, options.wish()).await?;
    done(&call, cluster.id, effects, Vec::new())
}

/// Removes all nodes, workers and join tokens of a cluster.
async fn clear<A: Removes + RevokesTokens>(
    call: &Call,
    permit: &Permit<A>,
    cluster: &LiveClusterName,
    reason: Option<&str>,
) -> Result<(), Refused> {
    let agent = call.agent();
    agent.issuer.remove_all(permit, cluster.name.as_str(), reason).await?;
    Ok(tokens::revoke_all(&agent.changes, permit, cluster.name.as_str(), reason).await?)
}

fn close_connections_of(call: &Call, cluster: ClusterId) {
    call.admin.connections.close_where(|peer| {
        let of = peer.certificate.as_ref().and_then(|certificate| certificate.id().subject.cluster());
        of.is_some_and(|of| of.as_bytes() == cluster.as_bytes())
    });
}

fn done(call: &Call, id: ClusterId, effects: Vec<String>, warnings: Vec<String>) -> Answer {
    let cluster = call.agent().clusters.find(&id.to_string()).ok_or_else(super::refusal::no_cluster)?;
    let change = Change::done(effects, warnings, Some(current(call.agent(), &cluster)?));
    Ok(Json(Change { agents: reach(call.agent()), ..change }))
}

fn parse(name: &str) -> Result<ClusterName, LabelError> {
    Ok(name.parse::<ClusterName>()?)
}

fn in_words(members: usize) -> String {
    match members {
        1 => "1 node or worker is".to_owned(),
        members => format!("{members} nodes and workers are"),
    }
}
