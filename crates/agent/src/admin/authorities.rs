//! The fleet CA: shown, rotated, replaced after a compromise.

use std::collections::HashSet;
use std::time::SystemTime;

use axum::Json;
use data_encoding::HEXLOWER;
use fleet_kms_admin_api::{Ca, CaGeneration, CaKind, CaState, Change, RotateCa, RotatedCa, Timestamp};
use fleet_kms_identity::{SpiffeId, Subject, fingerprint};

use crate::admin::refusal::Refused;
use crate::admin::request::{Call, OptionalBody, Options};
use crate::agent::Agent;
use crate::authz::{Action, FleetPermit, actions};
use crate::ca::{Kind, Port, Roll, Stored};
use crate::enrolment::issue::certificates_pem;
use crate::errors::chain;
use crate::records::payload::{AuthorityState, IdentityRecord};
use crate::records::rows;
use crate::trail::Intent;

pub(super) async fn show(call: Call) -> Result<Json<Ca>, Refused> {
    let _permit = call.fleet::<actions::CaShow>()?;
    Ok(Json(view(call.agent()).await?))
}

pub(super) async fn rotate(
    call: Call,
    options: Options,
    OptionalBody(RotateCa { root }): OptionalBody<RotateCa>,
) -> Result<Json<Change<RotatedCa>>, Refused> {
    let permit = call.fleet::<actions::CaRotate>()?;
    let mut effects = vec!["a new issuing CA signs from now on; every certificate stays good".to_owned()];
    if root {
        effects.insert(0, "a new root, signed by the old one too, becomes active".to_owned());
        effects.push("nodes learn the new root by themselves, also those that are off now".to_owned());
    }
    if options.dry_run {
        return Ok(Json(Change { applied: false, effects, warnings: Vec::new(), result: None }));
    }
    let what = if root { Roll::Root } else { Roll::Issuing };
    let target = if root { "root" } else { "issuing" };
    call.agent().ca.roll(what, intent(&permit, &options).target(target)).await?;
    let result = Some(rotated(call.agent(), None).await?);
    let warnings = vec!["make a backup: an older one has the CA from before this change".to_owned()];
    Ok(Json(Change { applied: true, effects, warnings, result }))
}

pub(super) async fn replace(call: Call, options: Options) -> Result<Json<Change<RotatedCa>>, Refused> {
    let permit = call.fleet::<actions::CaReplace>()?;
    let mut nodes = HashSet::new();
    call.agent().identities.for_each(|identity| {
        if matches!(identity.id.subject, Subject::Node { .. }) && !identity.banned {
            nodes.insert(identity.id.clone());
        }
    });
    let effects = vec![
        "root and issuing CA are replaced, and nothing leads from the old ones to the new ones".to_owned(),
        format!(
            "{} nodes are shut out at once, and their API servers from what is encrypted, until each is \
             enrolled with a join token",
            nodes.len()
        ),
        "every other admin needs `kms-agent admin issue`, join tokens made before are void".to_owned(),
    ];
    if options.dry_run {
        return Ok(Json(Change { applied: false, effects, warnings: Vec::new(), result: None }));
    }
    let agent = call.agent();
    agent.ca.roll(Roll::Compromised, intent(&permit, &options)).await?;
    let mut warnings = vec![
        "make a backup now: an older one would bring the compromised CA back".to_owned(),
        "rotate the clusters' keys too if whoever had the CA's key may have wrapped or unwrapped".to_owned(),
    ];
    let certificate = match agent.issuer.issue_again(permit.who(), call.caller.certificate()).await {
        Ok(again) => Some(certificates_pem(&again.chain)),
        Err(error) => {
            tracing::error!(error = chain(&error), "an admin's certificate could not be made again");
            warnings.push(
                "your certificate is void: on the agent's host, run `kms-agent admin issue`".to_owned(),
            );
            None
        }
    };
    close_old_connections(&call);
    let result = Some(rotated(agent, certificate).await?);
    Ok(Json(Change { applied: true, effects, warnings, result }))
}

/// Closes what was let in by the old roots, but for the connection that waits
/// for this answer.
fn close_old_connections(call: &Call) {
    let caller = call.caller.certificate();
    call.admin.connections.close_where(|peer| {
        peer.certificate.as_ref().is_some_and(|shown| {
            (shown.serial(), shown.spki_sha256()) != (caller.serial(), caller.spki_sha256())
        })
    });
}

fn intent<A: Action>(permit: &FleetPermit<A>, options: &Options) -> Intent {
    Intent::new(A::ID, permit.who()).reason(options.wish().reason)
}

async fn rotated(agent: &Agent, certificate: Option<String>) -> Result<RotatedCa, Refused> {
    Ok(RotatedCa { ca: view(agent).await?, roots: certificates_pem(&agent.bulletin.roots()), certificate })
}

async fn view(agent: &Agent) -> Result<Ca, Refused> {
    let (authorities, now) = (agent.ca.live().load_full(), (agent.clock())());
    let stored = authorities.generations();
    let generations = stored.iter().map(|one| generation(one, now)).collect();
    let is_trusted = |root: u32| {
        let of = |one: &&Stored| one.kind == Kind::Root && one.generation == root;
        stored.iter().find(of).is_some_and(|root| root.is_trusted(Port::Enrolment, now))
    };
    let good = stored.iter().filter(|one| one.signed_by.is_some_and(is_trusted));
    let good: HashSet<&[u8]> = good.map(|issuing| issuing.certificate.as_slice()).collect();
    let mut nodes_to_enrol = Vec::new();
    for record in agent.changes.ledger().scan::<IdentityRecord>(rows::IDENTITIES).await? {
        let IdentityRecord { id, current, next, banned_ms, .. } = record.payload;
        let is_node = id.parse().is_ok_and(|id: SpiffeId| matches!(id.subject, Subject::Node { .. }));
        let has_way = [current, next]
            .into_iter()
            .flatten()
            .any(|issued| issued.chain.get(1).is_some_and(|issuer| good.contains(issuer.as_slice())));
        if is_node && banned_ms == 0 && !has_way {
            nodes_to_enrol.push(id);
        }
    }
    Ok(Ca { generations, nodes_to_enrol })
}

fn generation(stored: &Stored, now: SystemTime) -> CaGeneration {
    let state = match stored.state {
        AuthorityState::Prepared => CaState::Prepared,
        AuthorityState::Active | AuthorityState::Unspecified => CaState::Active,
        AuthorityState::Retiring if stored.is_trusted(Port::Enrolment, now) => CaState::Retiring,
        AuthorityState::Retiring => CaState::Retired,
    };
    let kind = match stored.kind {
        Kind::Root => CaKind::Root,
        Kind::Issuing => CaKind::Issuing,
    };
    let until = stored.trusted_until(Port::Enrolment).filter(|_| stored.kind == Kind::Root);
    CaGeneration {
        kind,
        generation: stored.generation,
        state,
        sha256: HEXLOWER.encode(&fingerprint(&stored.certificate)),
        not_before: stored.not_before.into(),
        not_after: stored.not_after.into(),
        signed_by: stored.signed_by,
        activates: stored.activates().map(Timestamp::from),
        retired: stored.retired.map(Timestamp::from),
        trusted_until: until.map(Timestamp::from),
    }
}
