//! Join tokens: made, listed, revoked. Only the answer to its making shows one.

use std::time::Duration;

use axum::http::StatusCode;
use axum::response::{IntoResponse as _, Response};
use axum::{Extension, Json};
use fleet_kms_admin_api as api;
use fleet_kms_admin_api::{Change, CreateToken, HumanDuration, IssuedToken, Page};
use fleet_kms_store::Revision;

use crate::admin::refusal::Refused;
use crate::admin::replay::Secret;
use crate::admin::request::{Call, Names, OptionalBody, Options, Paging};
use crate::authz::actions;
use crate::clusters::LiveClusterName;
use crate::enrolment::tokens::{self, DEFAULT_LIFE, TermsError, TokenTerms};
use crate::records::payload::TokenRecord;
use crate::times::from_ms;

pub(super) async fn create(
    call: Call,
    Names(cluster): Names<String>,
    options: Options,
    OptionalBody(body): OptionalBody<CreateToken>,
) -> Result<Response, Refused> {
    let (cluster, permit) = call.on_live::<actions::TokenCreate>(&cluster)?;
    let life = body.ttl.map_or(DEFAULT_LIFE, HumanDuration::as_duration);
    let terms = terms(&cluster, &body, life)?;
    let effects = vec![format!("a join token for {} is made", cluster.name)];
    if options.dry_run {
        return Ok(Json(Change::<IssuedToken>::plan(effects, Vec::new())).into_response());
    }
    let agent = call.agent();
    let made = tokens::create(
        &agent.changes,
        &agent.issuer.authorities(),
        &terms,
        (permit.who(), options.wish().reason),
        &mut *agent.generator()(),
    )
    .await?;
    let token = made.token.to_text().to_string();
    let details = view(&cluster, tokens::name_of(&made.token.hash()), &made.record, made.revision);
    let change = Change::done(effects, Vec::new(), Some(IssuedToken { token, details }));
    Ok((StatusCode::CREATED, Extension(Secret), Json(change)).into_response())
}

pub(super) async fn list(
    call: Call,
    Names(cluster): Names<String>,
    paging: Paging,
) -> Result<Json<Page<api::Token>>, Refused> {
    let (cluster, permit) = call.on::<actions::TokenList>(&cluster)?;
    let found = tokens::usable(&call.agent().changes, &permit).await?;
    let found =
        found.iter().map(|token| view(&cluster, token.name(), &token.record.payload, token.record.revision));
    let mut items: Vec<api::Token> =
        found.filter(|token| paging.after.as_ref().is_none_or(|after| token.id > *after)).collect();
    let more = items.len() > paging.limit;
    items.truncate(paging.limit);
    let next = items.last().filter(|_| more).map(|last| last.id.clone());
    Ok(Json(Page { items, next }))
}

pub(super) async fn revoke(
    call: Call,
    Names((cluster, token)): Names<(String, String)>,
    options: Options,
) -> Result<Json<Change<api::Token>>, Refused> {
    let (cluster, permit) = call.on::<actions::TokenRevoke>(&cluster)?;
    let changes = &call.agent().changes;
    let effects = vec![format!("join token {token} can no longer be used; nodes that it made stay")];
    if options.dry_run {
        let found = tokens::find(changes, &permit, &token).await?;
        options.wish().check_row(found.record.revision)?;
        return Ok(Json(Change::plan(effects, Vec::new())));
    }
    let revoked = tokens::revoke(changes, &permit, &token, cluster.name.as_str(), options.wish()).await?;
    let result = view(&cluster, revoked.name(), &revoked.record.payload, revoked.record.revision);
    Ok(Json(Change::done(effects, Vec::new(), Some(result))))
}

fn terms(cluster: &LiveClusterName, body: &CreateToken, life: Duration) -> Result<TokenTerms, TermsError> {
    let (node, pattern, cidr) = (body.node.as_deref(), body.pattern.as_deref(), body.cidr.as_deref());
    let uses = body.uses.unwrap_or(1);
    match &body.worker {
        Some(_) if node.is_some() || pattern.is_some() => Err(TermsError::WorkerAndNode),
        Some(worker) => TokenTerms::worker(cluster.id, worker, cidr, uses, life),
        None => TokenTerms::new(cluster.id, node, pattern, cidr, uses, life),
    }
}

fn view(cluster: &LiveClusterName, id: String, record: &TokenRecord, revision: Revision) -> api::Token {
    let text = |text: &String| (!text.is_empty()).then(|| text.clone());
    let worker = tokens::worker_of(record).map(str::to_owned);
    api::Token {
        id,
        cluster_id: cluster.id.to_string(),
        cluster: cluster.name.to_string(),
        node: text(&record.node).filter(|_| worker.is_none()),
        worker,
        revision: revision.0,
        pattern: text(&record.pattern),
        cidr: text(&record.cidr),
        uses: record.uses,
        used: record.uses.saturating_sub(record.uses_left),
        created: from_ms(record.issued_ms).into(),
        created_by: text(&record.issued_by),
        expires: from_ms(record.expires_ms).into(),
    }
}
