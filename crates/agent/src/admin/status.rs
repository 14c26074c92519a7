//! The agent's view of the fleet, and the document of this API.

use std::time::{Duration, SystemTime};

use axum::Json;
use axum::http::header;
use axum::response::IntoResponse;
use fleet_kms_admin_api::status::{
    ClusterCounts, DueRotation, ExpiringCertificate, NodeCounts, StoreStatus, Warning,
};
use fleet_kms_admin_api::{Status, openapi};
use fleet_kms_identity::Subject;
use fleet_kms_keyring::ClusterId;
use fleet_kms_keyring::rotation::WRAPS_HINT;

use crate::admin::refusal::Refused;
use crate::admin::request::Call;
use crate::agent::Agent;
use crate::authz::{FleetPermit, actions};
use crate::ca::{ISSUING_LIFE, ROOT_LIFE};

/// Rows of each list of the status.
const ROWS: usize = 10;
/// A node renews with more than 4 days left: one with less has tried in vain, or is off.
const NODE_MARGIN: Duration = Duration::from_secs(3 * 86_400);
/// A CA is renewed within a minute of half of its life, a prepared root is used after a week.
const CA_MARGIN: Duration = Duration::from_secs(14 * 86_400);
/// An admin has to ask for a new certificate in time.
const ADMIN_MARGIN: Duration = Duration::from_secs(7 * 86_400);

pub(super) async fn show(call: Call) -> Result<Json<Status>, Refused> {
    let permit = call.fleet::<actions::StatusShow>()?;
    let agent = call.agent();
    let now = (agent.clock())();
    let (clusters, next_rotations) = rotations(agent, &permit, now);
    let (nodes, expiring_certificates) = identities(agent, &permit, now);
    let unconfirmed = agent.changes.unconfirmed();
    Ok(Json(Status {
        agent: agent.own.live().certificate().id().subject.name().to_string(),
        version: env!("CARGO_PKG_VERSION").to_owned(),
        time: now.into(),
        store: StoreStatus { ok: unconfirmed.is_none(), detail: unconfirmed.map(|why| why.to_string()) },
        warnings: warnings(agent, now, clusters, &expiring_certificates),
        clusters,
        nodes,
        next_rotations,
        expiring_certificates,
        last_verified_backup: agent.backups.last().map(|(at, _)| at.into()),
    }))
}

pub(super) async fn openapi(call: Call) -> Result<impl IntoResponse, Refused> {
    let _permit = call.fleet::<actions::OpenapiShow>()?;
    Ok(([(header::CONTENT_TYPE, "application/json")], openapi::document_json()))
}

fn rotations(
    agent: &Agent,
    permit: &FleetPermit<actions::StatusShow>,
    now: SystemTime,
) -> (ClusterCounts, Vec<DueRotation>) {
    let mut counts = ClusterCounts::default();
    let mut due = Vec::new();
    for (id, snapshot) in agent.keyrings.keyrings() {
        if !permit.sees(&id) {
            continue;
        }
        let next = snapshot.keyring.due(&id);
        counts.total += 1;
        counts.overdue += u32::from(next < now);
        counts.unbacked += u32::from(snapshot.keyring.unbacked().next().is_some());
        due.push((next, id));
    }
    due.sort_unstable();
    let named = due.iter().take(ROWS).map(|(due, id)| {
        let name = agent.clusters.name_of(id).map_or_else(|| id.to_string(), |name| name.to_string());
        DueRotation { cluster: name, due: (*due).into() }
    });
    (counts, named.collect())
}

fn identities(
    agent: &Agent,
    permit: &FleetPermit<actions::StatusShow>,
    now: SystemTime,
) -> (NodeCounts, Vec<ExpiringCertificate>) {
    let mut counts = NodeCounts::default();
    let mut expiring = Vec::new();
    agent.identities.for_each(|identity| {
        let margin = match &identity.id.subject {
            Subject::Node { cluster, .. } if permit.sees(&ClusterId::from_bytes(*cluster.as_bytes())) => {
                counts.total += 1;
                counts.banned += u32::from(identity.banned);
                NODE_MARGIN
            }
            Subject::Admin { .. } => ADMIN_MARGIN,
            Subject::Node { .. } | Subject::Worker { .. } | Subject::Agent { .. } => return,
        };
        let newest = identity.next.as_ref().or(identity.current.as_ref());
        if let Some(issued) = newest
            && !identity.banned
            && issued.not_after < now + margin
        {
            expiring.push((issued.not_after, identity.id.to_string()));
        }
    });
    expiring.sort_unstable();
    let rows = expiring.into_iter().take(ROWS);
    (counts, rows.map(|(not_after, id)| ExpiringCertificate { id, not_after: not_after.into() }).collect())
}

fn warnings(
    agent: &Agent,
    now: SystemTime,
    clusters: ClusterCounts,
    expiring: &[ExpiringCertificate],
) -> Vec<Warning> {
    let warning = |code: &str, text: String, remedy: &str| Warning {
        code: code.to_owned(),
        text,
        remedy: remedy.to_owned(),
    };
    let mut warnings = Vec::new();
    if agent.keyrings.is_locked() {
        let text = "the agent is locked: no key can be used".to_owned();
        warnings.push(warning("locked", text, "restart the agent"));
    }
    if agent.damaged > 0 {
        let text = format!("{} stored keys do not open", agent.damaged);
        warnings.push(warning("store_damaged", text, "look at the agent's log; restore a backup"));
    }
    if agent.damaged_records() > 0 {
        let text = format!("{} stored records are damaged and left out", agent.damaged_records());
        warnings.push(warning("store_damaged", text, "look at the agent's log; restore a backup"));
    }
    if let Some(why) = agent.changes.unconfirmed() {
        let remedy = "on the agent's host, run `kms-agent restore --confirm`";
        warnings.push(warning("recovered_unconfirmed", why.to_string(), remedy));
    }
    let rolled_back = agent.rolled_back.clusters();
    if !rolled_back.is_empty() {
        let text = format!(
            "store_rolled_back: {} clusters have values of versions that this store has not activated",
            rolled_back.len()
        );
        warnings.push(warning(
            "store_rolled_back",
            text,
            "find out who put an old copy in place; see docs/operations/backup-and-restore.md",
        ));
    }
    warnings.extend(audit_warnings(agent));
    if clusters.overdue > 0 {
        let text = format!("the rotation of {} is late", clusters_in_words(clusters.overdue));
        warnings.push(warning("rotation_overdue", text, "look at the agent's log and its clock"));
    }
    let many = agent.keyrings.active_wraps().into_iter().filter(|(_, _, wraps)| *wraps >= WRAPS_HINT).count();
    if many > 0 {
        let text = format!("{many} clusters have wrapped 2^32 times or more under their active version");
        warnings.push(warning("many_wraps", text, "rotate them early; nothing is at risk meanwhile"));
    }
    if clusters.unbacked > 0 {
        let text =
            format!("no verified backup holds all versions of {}", clusters_in_words(clusters.unbacked));
        warnings.push(warning("unbacked", text, "make a backup and verify it"));
    }
    let (root_end, issuing_end) = agent.ca.live().load().ends();
    if root_end < now + ROOT_LIFE / 2 - CA_MARGIN || issuing_end < now + ISSUING_LIFE / 2 - CA_MARGIN {
        let text = "the fleet CA is past half of its life and was not renewed".to_owned();
        warnings.push(warning(
            "ca_not_renewed",
            text,
            "look at the agent's log; `kmsctl ca show` has the dates; see docs/operations/certificates.md",
        ));
    }
    if !expiring.is_empty() {
        let text = "certificates are about to end and were not renewed".to_owned();
        let remedy = "look why these nodes are off or cannot reach the enrolment port; issue admins' anew";
        warnings.push(warning("certificates_expiring", text, remedy));
    }
    warnings
}

fn audit_warnings(agent: &Agent) -> Vec<Warning> {
    let warning = |code: &str, text: String| Warning {
        code: code.to_owned(),
        text,
        remedy: "see docs/audit.md: look at the audit's disk, then at `kmsctl audit verify`".to_owned(),
    };
    let mut warnings = Vec::new();
    if agent.changes.audit_is_failing() {
        let text = "the audit cannot be written: every change is refused".to_owned();
        warnings.push(warning("audit_full", text));
    }
    let data = agent.data_log.state();
    if data.failing {
        let text = format!(
            "data calls cannot be recorded in the audit; since the start {} were answered without a record, {} refused",
            data.unrecorded, data.refused
        );
        warnings.push(warning("audit_data_full", text));
    }
    if agent.audit_cut > 0 {
        let text = "the audit's files end before what the store has seen of them".to_owned();
        warnings.push(warning("audit_cut", text));
    }
    warnings
}

fn clusters_in_words(count: u32) -> String {
    if count == 1 { "1 cluster".to_owned() } else { format!("{count} clusters") }
}
