//! The audit, read: this agent's records and all agents' heads. A record of a
//! cluster is shown to whom the cluster is; what belongs to none, to whom all are.

use axum::Json;
use axum::extract::{FromRequestParts, Query};
use axum::http::request::Parts;
use data_encoding::HEXLOWER;
use fleet_kms_admin_api as api;
use fleet_kms_admin_api::audit::MAX_SEARCHED;
use fleet_kms_admin_api::{AuditChain, AuditQuery, Page};
use fleet_kms_audit::{Chain, Found, Range, search as search_files};
use fleet_kms_keyring::ClusterId;
use serde_json::{Map, Value};

use crate::admin::Admin;
use crate::admin::refusal::{Refused, internal};
use crate::admin::request::{Call, Paging, paging, unreadable};
use crate::authz::{FleetPermit, actions};
use crate::trail::heads::{self as stored_heads, StoredHead};

/// What is searched for.
pub(super) struct Search {
    chain: Chain,
    from: Option<String>,
    to: Option<String>,
    who: Option<String>,
    cluster: Option<String>,
    action: Option<String>,
    outcome: Option<String>,
    before: Option<u64>,
    limit: usize,
}

impl FromRequestParts<Admin> for Search {
    type Rejection = Refused;

    async fn from_request_parts(parts: &mut Parts, _: &Admin) -> Result<Self, Refused> {
        let query = Query::<AuditQuery>::try_from_uri(&parts.uri);
        let Query(query) = query.map_err(|error| unreadable(&error.body_text()))?;
        let Paging { limit, after } = paging(query.limit, query.after)?;
        let before = after.map(|after| after.parse::<u64>()).transpose();
        let cursor = |_| Refused::field("after", "this is no cursor", "use the `next` of the page before");
        let chain = query.chain.as_deref().unwrap_or("changes");
        let chain = Chain::from_name(chain)
            .ok_or_else(|| Refused::field("chain", "there is no such chain", "use changes or data"))?;
        for (name, text) in [
            ("who", &query.who),
            ("cluster", &query.cluster),
            ("action", &query.action),
            ("outcome", &query.outcome),
        ] {
            if text.as_ref().is_some_and(|text| text.is_empty() || text.len() > MAX_SEARCHED) {
                return Err(Refused::field(name, "this is no text to search for", "use 1 to 512 bytes"));
            }
        }
        // Records have milliseconds; a second begins with its first one.
        let time = |time: api::Timestamp| time.to_string().replace('Z', ".000Z");
        Ok(Self {
            chain,
            from: query.from.map(time),
            to: query.to.map(time),
            who: query.who,
            cluster: query.cluster,
            action: query.action,
            outcome: query.outcome,
            before: before.map_err(cursor)?,
            limit,
        })
    }
}

pub(super) async fn search(call: Call, search: Search) -> Result<Json<Page<api::AuditRecord>>, Refused> {
    let permit = call.fleet::<actions::AuditSearch>()?;
    let _turn = call.admin.searches.acquire().await;
    let directory = call.agent().audit.clone();
    let chain = search.chain;
    let found = tokio::task::spawn_blocking(move || {
        let (before, from) = (search.before, search.from.as_deref());
        let range = Range { chain, before, from, limit: search.limit };
        search_files(&directory, range, |found| search.wants(found) && may_see(&permit, found))
    });
    let page = match found.await {
        Ok(Ok(page)) => page,
        Ok(Err(error)) => return Err(internal(&format!("the audit cannot be read: {error}"))),
        Err(_) => return Err(internal("the search ended")),
    };
    let items = page.items.into_iter().filter_map(|found| view(chain, found)).collect();
    Ok(Json(Page { items, next: page.next.map(|next| next.to_string()) }))
}

pub(super) async fn heads(call: Call, paging: Paging) -> Result<Json<Page<api::AuditHead>>, Refused> {
    let _permit = call.fleet::<actions::AuditHeads>()?;
    let mut heads = stored_heads::all(call.agent().changes.ledger()).await?;
    let name = |head: &StoredHead| format!("{}/{}", head.agent, head.chain);
    heads.retain(|head| paging.after.as_ref().is_none_or(|after| name(head) > *after));
    let more = heads.len() > paging.limit;
    heads.truncate(paging.limit);
    let next = heads.last().filter(|_| more).map(name);
    let items = heads.into_iter().map(|stored| api::AuditHead {
        agent: stored.agent,
        chain: of(stored.chain),
        seq: stored.head.seq,
        hash: HEXLOWER.encode(&stored.head.hash),
        stored: stored.written.into(),
    });
    Ok(Json(Page { items: items.collect(), next }))
}

impl Search {
    fn wants(&self, found: &Found) -> bool {
        let is = |wanted: &Option<String>, value: Option<&str>| {
            wanted.as_deref().is_none_or(|wanted| value == Some(wanted))
        };
        let cluster = found.body.get("cluster");
        let of_cluster = |part| is(&self.cluster, part);
        self.to.as_ref().is_none_or(|to| found.time < *to)
            && self.who.as_ref().is_none_or(|wanted| who(&found.body).is_some_and(|who| who.contains(wanted)))
            && is(&self.action, action(&found.body))
            && is(&self.outcome, found.outcome.as_deref())
            && (self.cluster.is_none() || of_cluster(cluster_id(&found.body)) || of_cluster(name(cluster)))
    }
}

fn may_see(permit: &FleetPermit<actions::AuditSearch>, found: &Found) -> bool {
    let id = cluster_id(&found.body).and_then(|id| id.parse::<ClusterId>().ok());
    permit.sees_all() || id.is_some_and(|id| permit.sees(&id))
}

/// `None` for a line whose time is none, which this agent never writes.
fn view(chain: Chain, found: Found) -> Option<api::AuditRecord> {
    let text = |field: &str| found.body.get(field).and_then(Value::as_str).map(str::to_owned);
    let cluster = name(found.body.get("cluster")).or(cluster_id(&found.body)).map(str::to_owned);
    Some(api::AuditRecord {
        chain: of(chain),
        seq: found.seq,
        time: serde_json::from_value(Value::String(found.time)).ok()?,
        kind: text("kind").unwrap_or_default(),
        who: who(&found.body).map(str::to_owned),
        action: action(&found.body).map(str::to_owned),
        cluster,
        target: text("target"),
        outcome: found.outcome,
        record: found.body,
    })
}

fn of(chain: Chain) -> AuditChain {
    match chain {
        Chain::Changes => AuditChain::Changes,
        Chain::Data => AuditChain::Data,
    }
}

fn who(body: &Map<String, Value>) -> Option<&str> {
    body.get("who").or_else(|| body.get("identity"))?.as_str()
}

fn action(body: &Map<String, Value>) -> Option<&str> {
    body.get("action").or_else(|| body.get("operation"))?.as_str()
}

fn name(cluster: Option<&Value>) -> Option<&str> {
    cluster?.get("name")?.as_str()
}

fn cluster_id(body: &Map<String, Value>) -> Option<&str> {
    let cluster = body.get("cluster")?;
    cluster.get("id").unwrap_or(cluster).as_str()
}
