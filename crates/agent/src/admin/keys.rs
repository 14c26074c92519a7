//! Versions, rotation, and what an officer does to single versions.

use std::sync::Arc;
use std::time::SystemTime;

use axum::Json;
use fleet_kms_admin_api as api;
use fleet_kms_admin_api::{Change, Explanation, Guard, Page, RotateKey, SetRotation};
use fleet_kms_keyring::rotation::RotationPolicy;
use fleet_kms_keyring::{KeyId, Keyring, Rotate, Version};

use crate::admin::clusters::current;
use crate::admin::effects::{effects, warnings};
use crate::admin::refusal::{Refused, no_cluster, no_version};
use crate::admin::request::{Body, Call, Names, OptionalBody, Options, Paging, version};
use crate::admin::views;
use crate::authz::actions;
use crate::clusters::LiveClusterName;
use crate::control_plane::{ChangesVersion, KeyChangeError, guards};
use crate::live_keyrings::Snapshot;

pub(super) async fn versions(
    call: Call,
    Names(cluster): Names<String>,
    paging: Paging,
) -> Result<Json<Page<api::Version>>, Refused> {
    let (cluster, _permit) = call.on::<actions::KeyVersions>(&cluster)?;
    let snapshot = snapshot(&call, &cluster)?;
    let after = paging.after.as_deref().map(cursor).transpose()?.unwrap_or(0);
    let mut rest = snapshot.keyring.versions().iter().filter(|version| version.version.get() > after);
    let wraps = call.agent().keyrings.wraps(&cluster.id);
    let items = rest.by_ref().take(paging.limit).map(|version| views::version(version, &wraps));
    let items: Vec<api::Version> = items.collect();
    let next = rest.next().and(items.last()).map(|last| last.version.to_string());
    Ok(Json(Page { items, next }))
}

/// Reads the cursor of a page of versions.
fn cursor(after: &str) -> Result<u32, Refused> {
    after
        .parse()
        .map_err(|_| Refused::field("after", "this is no cursor", "use the `next` of the page before"))
}

pub(super) async fn rotate(
    call: Call,
    Names(cluster): Names<String>,
    options: Options,
    OptionalBody(RotateKey { fresh }): OptionalBody<RotateKey>,
) -> Result<Json<Change<api::Cluster>>, Refused> {
    let (cluster, permit) = call.on_live::<actions::KeyRotate>(&cluster)?;
    let how = if fresh { Rotate::Fresh } else { Rotate::Regular };
    let before = snapshot(&call, &cluster)?;
    if options.dry_run {
        let rehearsed = rehearse(&call, (&options, &cluster), &before, |keyring, now| {
            keyring.rotate(how, now, &mut made_up_key_id).map(drop).map_err(KeyChangeError::from)
        })?;
        return Ok(Json(plan(&before, &rehearsed)));
    }
    call.agent().control_plane.rotate(&permit, how, options.wish()).await?;
    done(&call, &cluster, &before).map(Json)
}

pub(super) async fn set_rotation(
    call: Call,
    Names(cluster): Names<String>,
    options: Options,
    Body(SetRotation { period }): Body<SetRotation>,
) -> Result<Json<Change<api::Cluster>>, Refused> {
    let (cluster, permit) = call.on_live::<actions::RotationSet>(&cluster)?;
    let policy = RotationPolicy::try_new(period.as_duration());
    let policy = policy
        .map_err(|error| Refused::field("period", error.to_string(), "use 1h to 3650d, such as 30d"))?;
    let before = snapshot(&call, &cluster)?;
    if options.dry_run {
        let rehearsed = rehearse(&call, (&options, &cluster), &before, |keyring, _| {
            keyring.set_policy(policy);
            Ok(())
        })?;
        return Ok(Json(plan(&before, &rehearsed)));
    }
    call.agent().control_plane.set_policy(&permit, policy, options.wish()).await?;
    done(&call, &cluster, &before).map(Json)
}

type VersionAnswer = Result<Json<Change<api::Version>>, Refused>;
type VersionNames = Names<(String, String)>;

pub(super) async fn disable(call: Call, names: VersionNames, options: Options) -> VersionAnswer {
    change::<actions::KeyDisable>(call, names, options).await
}

pub(super) async fn enable(call: Call, names: VersionNames, options: Options) -> VersionAnswer {
    change::<actions::KeyEnable>(call, names, options).await
}

pub(super) async fn destroy(call: Call, names: VersionNames, options: Options) -> VersionAnswer {
    change::<actions::KeyDestroy>(call, names, options).await
}

pub(super) async fn cancel_destroy(call: Call, names: VersionNames, options: Options) -> VersionAnswer {
    change::<actions::KeyCancelDestroy>(call, names, options).await
}

async fn change<A: ChangesVersion>(
    call: Call,
    Names((cluster, number)): VersionNames,
    options: Options,
) -> VersionAnswer {
    let (cluster, permit) = call.on::<A>(&cluster)?;
    let number = version(&number)?;
    let before = snapshot(&call, &cluster)?;
    before.keyring.by_version(number).ok_or_else(no_version)?;
    let evidence = call.agent().control_plane.evidence(&cluster.id, number);
    if options.dry_run {
        let rehearsed = rehearse(&call, (&options, &cluster), &before, |keyring, _| {
            A::CHANGE.apply(keyring, number, &evidence)
        })?;
        let effects = effects(&before.keyring, &rehearsed);
        return Ok(Json(Change::plan(effects, Vec::new())));
    }
    call.agent().control_plane.change_version(&permit, number, options.wish()).await?;
    let after = snapshot(&call, &cluster)?;
    let wraps = call.agent().keyrings.wraps(&cluster.id);
    let result = after.keyring.by_version(number).map(|version| views::version(version, &wraps));
    let effects = effects(&before.keyring, &after.keyring);
    Ok(Json(Change::done(effects, Vec::new(), result)))
}

pub(super) async fn explain(
    call: Call,
    Names((cluster, number)): Names<(String, String)>,
) -> Result<Json<Explanation>, Refused> {
    let (cluster, _permit) = call.on::<actions::KeyExplain>(&cluster)?;
    let number = version(&number)?;
    let snapshot = snapshot(&call, &cluster)?;
    let found = snapshot.keyring.by_version(number).ok_or_else(no_version)?;
    let evidence = call.agent().control_plane.evidence(&cluster.id, number);
    let guards = guards(found, &evidence).into_iter();
    let guards: Vec<Guard> =
        guards.map(|guard| Guard { name: guard.name.to_owned(), ok: guard.ok, why: guard.why }).collect();
    Ok(Json(Explanation {
        cluster: cluster.name.to_string(),
        version: number.get(),
        state: views::state(found.state),
        destroyable: guards.iter().all(|guard| guard.ok),
        guards,
    }))
}

fn snapshot(call: &Call, cluster: &LiveClusterName) -> Result<Arc<Snapshot>, Refused> {
    call.agent().keyrings.keyring(&cluster.id).ok_or_else(no_cluster)
}

/// Makes the change to a copy.
fn rehearse(
    call: &Call,
    (options, cluster): (&Options, &LiveClusterName),
    before: &Snapshot,
    change: impl FnOnce(&mut Keyring, SystemTime) -> Result<(), KeyChangeError>,
) -> Result<Keyring, Refused> {
    options.wish().check(views::revision(cluster, before))?;
    let mut keyring = before.keyring.clone();
    change(&mut keyring, (call.agent().clock())())?;
    Ok(keyring)
}

fn plan<T>(before: &Snapshot, rehearsed: &Keyring) -> Change<T> {
    Change::plan(effects(&before.keyring, rehearsed), warnings(rehearsed))
}

fn done(call: &Call, cluster: &LiveClusterName, before: &Snapshot) -> Result<Change<api::Cluster>, Refused> {
    let after = snapshot(call, cluster)?;
    let result = current(call.agent(), cluster)?;
    Ok(Change::done(effects(&before.keyring, &after.keyring), warnings(&after.keyring), Some(result)))
}

/// For a rehearsal only, which nobody sees the ids of; unlike any random one.
fn made_up_key_id(version: Version) -> KeyId {
    KeyId::from_bytes(u128::from(version.get()).to_be_bytes())
}
