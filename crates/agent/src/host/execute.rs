//! What a command on the host asks for, done by whoever has the store open: the
//! running agent, or the command itself when none runs.

use fleet_kms_identity::Name;
use fleet_kms_keyring::Rotate;
use fleet_kms_seal::RootSlot;

use crate::agent::Agent;
use crate::authz::{Role, Scope, internal};
use crate::bans::Bans;
use crate::errors::chain;
use crate::local::protocol::{Reply, Request, Secret, SlotLine};
use crate::slots::Removal;

/// Who works on the agent's host, for the audit.
const HOST: &str = "host";

/// Does what a request asks for.
///
/// # Errors
///
/// Says in words for the operator why not.
pub async fn execute(agent: &Agent, request: Request, secrets: Vec<Secret>) -> Result<Reply, String> {
    match request {
        Request::Backup => {
            let made = agent.backups.hand_over().await.map_err(|error| chain(&error))?;
            let (number, verified) = made;
            let (clusters, versions) = (verified.held.highest.len(), verified.held.versions);
            Ok(Reply::Backup { number, file: verified.file, clusters, versions })
        }
        Request::BackupStored { number, file } => {
            agent.backups.stored(number, file).await.map_err(|error| chain(&error))?;
            Ok(Reply::Done)
        }
        Request::SlotList => list(agent).await,
        Request::SlotAdd { label, .. } => {
            let slot = only(&secrets)?;
            let id = agent.slots.add(&*slot, &label).await.map_err(|error| chain(&error))?;
            Ok(Reply::Slot { id: id.to_string() })
        }
        Request::SlotTest { .. } => {
            let slot = only(&secrets)?;
            let id = agent.slots.test(&*slot).await.map_err(|error| chain(&error))?;
            Ok(Reply::Slot { id: id.to_string() })
        }
        Request::SlotRemove { id, force, compromised, new_passphrase, .. } => {
            remove(agent, (&id, force, compromised, new_passphrase), &secrets).await
        }
        Request::Lock => {
            agent.lock().await;
            Ok(Reply::Done)
        }
        Request::AdminIssue { name, roles, clusters } => issue(agent, &name, &roles, &clusters).await,
        Request::Confirm { bans } => confirm(agent, bans).await,
    }
}

async fn list(agent: &Agent) -> Result<Reply, String> {
    let slots = agent.slots.list().await.map_err(|error| chain(&error))?;
    let lines = slots.iter().map(|slot| SlotLine {
        id: slot.record.slot().to_string(),
        kind: slot.record.kind().into(),
        label: slot.note.label.clone(),
        verified_ms: slot.note.verified_ms,
        in_use: slot.record.slot() == agent.slots.in_use(),
    });
    Ok(Reply::Slots { slots: lines.collect() })
}

async fn remove(
    agent: &Agent,
    (id, force, compromised, new_passphrase): (&str, bool, bool, bool),
    secrets: &[Secret],
) -> Result<Reply, String> {
    let given: Vec<Box<dyn RootSlot>> = secrets.iter().filter_map(Secret::slot).collect();
    let removal = Removal { id, force, new_passphrase, given: &given };
    let removed = agent.slots.remove(&removal).await.map_err(|error| chain(&error))?;
    let mut rotated = 0;
    if compromised {
        for (cluster, _) in agent.keyrings.keyrings() {
            let permit = internal::recovery(cluster);
            let done = agent.control_plane.rotate_as_recovery(&permit, Rotate::Fresh).await;
            done.map_err(|error| {
                let error = chain(&error);
                format!("the slot is removed, but cluster {cluster} was not rotated: {error}; run kmsctl key rotate --fresh for it")
            })?;
            rotated += 1;
        }
    }
    let passphrase = removed.passphrase.map(|passphrase| passphrase.to_string());
    Ok(Reply::SlotRemoved { kept: removed.left, rotated, passphrase })
}

async fn issue(agent: &Agent, name: &str, roles: &[String], clusters: &[String]) -> Result<Reply, String> {
    let name: Name = name.parse().map_err(|error| format!("{name:?} is no name of an admin: {error}"))?;
    let known = |role: &String| {
        let all: Vec<_> = Role::ALL.iter().map(|role| role.name()).collect();
        Role::from_name(role).ok_or_else(|| format!("{role:?} is no role; use {}", all.join(", ")))
    };
    let roles = roles.iter().map(known).collect::<Result<Vec<_>, _>>()?;
    let find = |name: &String| {
        let cluster = agent.clusters.find(name).ok_or_else(|| format!("there is no cluster {name:?}"))?;
        Ok::<_, String>(cluster.id)
    };
    let scope = match clusters {
        [] => Scope::All,
        names => Scope::Clusters(names.iter().map(find).collect::<Result<_, _>>()?),
    };
    let bundle =
        agent.issuer.issue_admin(HOST, &name, &roles, &scope).await.map_err(|error| chain(&error))?;
    Ok(Reply::Admin {
        key: bundle.key.to_pem().to_string(),
        chain: bundle.chain_pem(),
        roots: bundle.roots_pem(),
    })
}

async fn confirm(agent: &Agent, bans: Vec<(String, bool)>) -> Result<Reply, String> {
    let Some(why) = agent.changes.unconfirmed() else {
        return Err("the store is not unconfirmed: there is nothing to confirm".to_owned());
    };
    let mut known = Bans::default();
    for (id, banned) in bans {
        let id = id.parse().map_err(|error| format!("{id:?}: {error}"))?;
        known.states.push((id, banned));
    }
    tracing::warn!(%why, "an operator confirms the store");
    let recovered = agent.confirm(&known).await.map_err(|error| chain(&error))?;
    Ok(Reply::Confirmed { rotated: recovered.rotated, banned: recovered.banned })
}

fn only(secrets: &[Secret]) -> Result<Box<dyn RootSlot>, String> {
    match secrets {
        [secret] => secret.slot().ok_or_else(|| "that is no root key".to_owned()),
        _ => Err("exactly one root key is needed".to_owned()),
    }
}
