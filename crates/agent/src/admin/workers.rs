//! Workers: listed, banned, removed. They enrol with a join token of theirs.

use axum::Json;
use fleet_kms_admin_api as api;
use fleet_kms_admin_api::Page;
use fleet_kms_identity::{ClusterUuid, Name, Subject};

use crate::admin::members::{self, Member};
use crate::admin::refusal::{Refused, no_worker};
use crate::admin::request::{Call, Names, Paging};
use crate::admin::views;
use crate::agent::Agent;
use crate::authz::actions;
use crate::identities::LiveIdentity;

/// Workers, as [`members`] sees them.
pub(super) struct Workers;

impl Member for Workers {
    type View = api::Worker;

    fn parts(subject: &Subject) -> Option<(&ClusterUuid, &Name)> {
        match subject {
            Subject::Worker { cluster, name } => Some((cluster, name)),
            _ => None,
        }
    }

    fn view(agent: &Agent, identity: &LiveIdentity) -> Option<api::Worker> {
        views::worker(agent, identity)
    }

    fn none() -> Refused {
        no_worker()
    }

    fn ban_effect(_: &str) -> Option<String> {
        None
    }
}

pub(super) async fn list(
    call: Call,
    Names(cluster): Names<String>,
    Paging { limit, after }: Paging,
) -> Result<Json<Page<api::Worker>>, Refused> {
    let (cluster, _permit) = call.on::<actions::WorkerList>(&cluster)?;
    let agent = call.agent();
    let mut found = members::listed::<Workers>(agent, |of, _| *of == cluster.id);
    found.retain(|(id, _)| after.as_ref().is_none_or(|after| id > after));
    let more = found.len() > limit;
    found.truncate(limit);
    let next = found.last().filter(|_| more).map(|(id, _)| id.clone());
    let items = found.iter().filter_map(|(_, identity)| views::worker(agent, identity)).collect();
    Ok(Json(Page { items, next }))
}
