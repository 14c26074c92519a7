//! What is done to a node is done to a worker in the same way: banned, unbanned,
//! removed.

use std::sync::Arc;

use axum::Json;
use fleet_kms_admin_api::{AgentReach, Change};
use fleet_kms_identity::{ClusterUuid, Name, SpiffeId, Subject};
use fleet_kms_keyring::ClusterId;

use crate::admin::refusal::Refused;
use crate::admin::request::{Call, Names, Options};
use crate::agent::Agent;
use crate::authz::Permit;
use crate::clusters::LiveClusterName;
use crate::enrolment::issue::{Bans, MemberChangeError, Removes, Unbans};
use crate::identities::LiveIdentity;

/// A kind of identity that belongs to a cluster.
pub(super) trait Member {
    /// What the API shows of one.
    type View;
    /// Cluster and name, if `subject` is of this kind.
    fn parts(subject: &Subject) -> Option<(&ClusterUuid, &Name)>;
    /// What the API shows.
    fn view(agent: &Agent, identity: &LiveIdentity) -> Option<Self::View>;
    /// There is none of that name.
    fn none() -> Refused;
    /// What a ban of it means beyond its calls, if anything.
    fn ban_effect(name: &str) -> Option<String>;
}

pub(super) async fn ban<M: Member, A: Bans>(
    call: Call,
    Names((cluster, name)): Names<(String, String)>,
    options: Options,
) -> Result<Json<Change<M::View>>, Refused> {
    let (cluster, permit, identity) = find::<M, A>(&call, &cluster, &name)?;
    let mut effects =
        vec![format!("calls of {name} of {} are refused and its connections closed", cluster.name)];
    effects.extend(M::ban_effect(&name));
    if options.dry_run {
        return plan(&options, &identity, effects);
    }
    let done = call.agent().issuer.ban(&permit, &identity.id, cluster.name.as_str(), options.wish()).await;
    done.map_err(refused::<M>)?;
    close_connections_of(&call, &identity.id);
    done_as::<M>(&call, &identity.id, effects)
}

pub(super) async fn unban<M: Member, A: Unbans>(
    call: Call,
    Names((cluster, name)): Names<(String, String)>,
    options: Options,
) -> Result<Json<Change<M::View>>, Refused> {
    let (cluster, permit, identity) = find::<M, A>(&call, &cluster, &name)?;
    let effects = vec![format!("{name} of {} may call again", cluster.name)];
    if options.dry_run {
        return plan(&options, &identity, effects);
    }
    let done = call.agent().issuer.unban(&permit, &identity.id, cluster.name.as_str(), options.wish()).await;
    done.map_err(refused::<M>)?;
    done_as::<M>(&call, &identity.id, effects)
}

pub(super) async fn remove<M: Member, A: Removes>(
    call: Call,
    Names((cluster, name)): Names<(String, String)>,
    options: Options,
) -> Result<Json<Change<M::View>>, Refused> {
    let (cluster, permit, identity) = find::<M, A>(&call, &cluster, &name)?;
    let effects = vec![
        format!("{name} of {} is removed and its connections closed", cluster.name),
        "to come back it needs a new join token".to_owned(),
    ];
    if options.dry_run {
        return plan(&options, &identity, effects);
    }
    let result = M::view(call.agent(), &identity);
    let done = call.agent().issuer.remove(&permit, &identity.id, cluster.name.as_str(), options.wish()).await;
    done.map_err(refused::<M>)?;
    close_connections_of(&call, &identity.id);
    let change = Change::done(effects, Vec::new(), result);
    Ok(Json(Change { agents: reach(call.agent()), ..change }))
}

/// Says which live agents act on what was just committed. This agent published
/// it before it answers; it serves this store alone.
pub(super) fn reach(agent: &Agent) -> Vec<AgentReach> {
    let name = agent.own.live().certificate().id().subject.name().to_string();
    vec![AgentReach { agent: name, has_it: true, may_serve_until: None }]
}

pub(super) fn close_connections_of(call: &Call, id: &SpiffeId) {
    call.admin
        .connections
        .close_where(|peer| peer.certificate.as_ref().is_some_and(|certificate| certificate.id() == id));
}

/// The identities of one kind that are wanted, by SPIFFE ID, which sorts by
/// cluster id, then name.
pub(super) fn listed<M: Member>(
    agent: &Agent,
    wanted: impl Fn(&ClusterId, &LiveIdentity) -> bool,
) -> Vec<(String, Arc<LiveIdentity>)> {
    let mut found = Vec::new();
    agent.identities.for_each(|identity| {
        let Some((cluster, _)) = M::parts(&identity.id.subject) else { return };
        if wanted(&ClusterId::from_bytes(*cluster.as_bytes()), identity) {
            found.push((identity.id.to_string(), Arc::clone(identity)));
        }
    });
    found.sort_unstable_by(|one, other| one.0.cmp(&other.0));
    found
}

type Found<A> = (LiveClusterName, Permit<A>, Arc<LiveIdentity>);

fn find<M: Member, A: crate::authz::Action>(
    call: &Call,
    cluster: &str,
    name: &str,
) -> Result<Found<A>, Refused> {
    let (cluster, permit) = call.on::<A>(cluster)?;
    let mut found = None;
    call.agent().identities.for_each(|identity| {
        if let Some((of, known)) = M::parts(&identity.id.subject)
            && of.as_bytes() == cluster.id.as_bytes()
            && known.as_str() == name
        {
            found = Some(Arc::clone(identity));
        }
    });
    Ok((cluster, permit, found.ok_or_else(M::none)?))
}

fn plan<V>(
    options: &Options,
    identity: &LiveIdentity,
    effects: Vec<String>,
) -> Result<Json<Change<V>>, Refused> {
    options.wish().check_row(identity.revision)?;
    Ok(Json(Change::plan(effects, Vec::new())))
}

fn done_as<M: Member>(
    call: &Call,
    id: &SpiffeId,
    effects: Vec<String>,
) -> Result<Json<Change<M::View>>, Refused> {
    let identity = call.agent().identities.find(id).ok_or_else(M::none)?;
    let change = Change::done(effects, Vec::new(), M::view(call.agent(), &identity));
    Ok(Json(Change { agents: reach(call.agent()), ..change }))
}

fn refused<M: Member>(error: MemberChangeError) -> Refused {
    match error {
        MemberChangeError::Unknown => M::none(),
        error => error.into(),
    }
}
