//! Admins: listed, given other roles or another scope, removed. Made only on
//! the agent's host, by `kms-agent admin issue`.

use std::sync::Arc;

use axum::Json;
use fleet_kms_admin_api as api;
use fleet_kms_admin_api::{Change, Page, SetRoles, SetScope};
use fleet_kms_identity::{SpiffeId, Subject};
use fleet_kms_keyring::ClusterId;

use crate::admin::members::{close_connections_of, reach};
use crate::admin::refusal::{Refused, no_admin, no_cluster};
use crate::admin::request::{Body, Call, Names, Options, Paging};
use crate::admin::views;
use crate::authz::{Role, Scope, actions};
use crate::enrolment::issue::{AdminChange, ChangesAdmin};
use crate::identities::LiveIdentity;

type Answer = Result<Json<Change<api::Admin>>, Refused>;

pub(super) async fn list(
    call: Call,
    Paging { limit, after }: Paging,
) -> Result<Json<Page<api::Admin>>, Refused> {
    let _permit = call.fleet::<actions::AdminList>()?;
    let mut items: Vec<api::Admin> = Vec::new();
    call.agent().identities.for_each(|identity| items.extend(views::admin(call.agent(), identity)));
    items.retain(|admin| after.as_ref().is_none_or(|after| admin.name > *after));
    items.sort_unstable_by(|one, other| one.name.cmp(&other.name));
    let more = items.len() > limit;
    items.truncate(limit);
    let next = items.last().filter(|_| more).map(|last| last.name.clone());
    Ok(Json(Page { items, next }))
}

pub(super) async fn show(call: Call, Names(admin): Names<String>) -> Result<Json<api::Admin>, Refused> {
    let _permit = call.fleet::<actions::AdminShow>()?;
    let identity = find(&call, &admin)?;
    views::admin(call.agent(), &identity).map(Json).ok_or_else(no_admin)
}

pub(super) async fn set_roles(
    call: Call,
    Names(admin): Names<String>,
    options: Options,
    Body(SetRoles { roles }): Body<SetRoles>,
) -> Answer {
    let roles = roles.iter().map(role).collect::<Result<Vec<_>, _>>()?;
    let names: Vec<_> = roles.iter().map(|role| role.name()).collect();
    let effects = vec![format!("from its next call on, {admin} has these roles only: {}", names.join(", "))];
    change::<actions::AdminSetRole>(call, &admin, AdminChange::Roles(roles), effects, options).await
}

pub(super) async fn set_scope(
    call: Call,
    Names(admin): Names<String>,
    options: Options,
    Body(body): Body<SetScope>,
) -> Answer {
    // The role first: names of clusters are answered to nobody else.
    let _role = call.fleet::<actions::AdminSetScope>()?;
    let scope = scope(&call, &body)?;
    let what = if body.all { "every cluster".to_owned() } else { body.clusters.join(", ") };
    let effects = vec![format!("from its next call on, {admin} may act on {what}")];
    change::<actions::AdminSetScope>(call, &admin, AdminChange::Scope(scope), effects, options).await
}

pub(super) async fn remove(call: Call, Names(admin): Names<String>, options: Options) -> Answer {
    let effects = vec![
        format!("{admin} is no admin any more and its connections are closed"),
        "`kms-agent admin issue` on the agent's host makes it one again".to_owned(),
    ];
    change::<actions::AdminRemove>(call, &admin, AdminChange::Remove, effects, options).await
}

async fn change<A: ChangesAdmin>(
    call: Call,
    admin: &str,
    change: AdminChange,
    effects: Vec<String>,
    options: Options,
) -> Answer {
    let permit = call.fleet::<A>()?;
    let before = find(&call, admin)?;
    let issuer = &call.agent().issuer;
    if options.dry_run {
        issuer.check_admin_change(&permit, &before.id, &change, options.wish()).await?;
        return Ok(Json(Change::plan(effects, Vec::new())));
    }
    issuer.change_admin(&permit, &before.id, &change, options.wish()).await?;
    let after = call.agent().identities.find(&before.id);
    if after.is_none() {
        close_connections_of(&call, &before.id);
    }
    let result = views::admin(call.agent(), &after.unwrap_or(before));
    let done = Change::done(effects, Vec::new(), result);
    Ok(Json(Change { agents: reach(call.agent()), ..done }))
}

fn find(call: &Call, admin: &str) -> Result<Arc<LiveIdentity>, Refused> {
    let name = admin.parse().map_err(|_| no_admin())?;
    let trust_domain = call.caller.id().trust_domain.clone();
    let id = SpiffeId::new(trust_domain, Subject::Admin { name });
    call.agent().identities.find(&id).ok_or_else(no_admin)
}

fn role(role: &api::Role) -> Result<Role, Refused> {
    Role::from_name(role.as_str()).ok_or_else(|| {
        let remedy = "use operator, key-officer, auditor or enroller";
        Refused::field("roles", format!("there is no role {:.40}", role.as_str()), remedy)
    })
}

fn scope(call: &Call, body: &SetScope) -> Result<Scope, Refused> {
    if body.all != body.clusters.is_empty() {
        let remedy = "give `all` or at least one cluster, not both";
        return Err(Refused::field("clusters", "a scope is all clusters or some", remedy));
    }
    if body.all {
        return Ok(Scope::All);
    }
    let find =
        |name: &String| call.agent().clusters.find(name).map(|cluster| cluster.id).ok_or_else(no_cluster);
    let mut ids = body.clusters.iter().map(find).collect::<Result<Vec<ClusterId>, _>>()?;
    ids.sort_unstable();
    ids.dedup();
    Ok(Scope::Clusters(ids))
}
