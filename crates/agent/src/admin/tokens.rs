//! Join tokens: made, listed, revoked. Only the answer to its making shows one.

use axum::http::StatusCode;
use axum::response::{IntoResponse as _, Response};
use axum::{Extension, Json};
use fleet_kms_admin_api as api;
use fleet_kms_admin_api::{Change, CreateToken, HumanDuration, IssuedToken, Page};

use crate::admin::refusal::Refused;
use crate::admin::replay::Secret;
use crate::admin::request::{Call, Names, OptionalBody, Options, Paging};
use crate::authz::actions;
use crate::clusters::LiveClusterName;
use crate::enrolment::tokens::{self, DEFAULT_LIFE, TokenTerms};
use crate::records::payload::TokenRecord;
use crate::times::from_ms;

pub(super) async fn create(
    call: Call,
    Names(cluster): Names<String>,
    options: Options,
    OptionalBody(body): OptionalBody<CreateToken>,
) -> Result<Response, Refused> {
    let (cluster, permit) = call.on::<actions::TokenCreate>(&cluster)?;
    let life = body.ttl.map_or(DEFAULT_LIFE, HumanDuration::as_duration);
    let terms = TokenTerms::new(
        cluster.id,
        body.node.as_deref(),
        body.pattern.as_deref(),
        body.cidr.as_deref(),
        body.uses.unwrap_or(1),
        life,
    )?;
    let effects = vec![format!("a join token for {} is made", cluster.name)];
    if options.dry_run {
        let plan: Change<IssuedToken> =
            Change { applied: false, effects, warnings: Vec::new(), result: None };
        return Ok(Json(plan).into_response());
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
    let issued =
        IssuedToken { token, details: view(&cluster, tokens::name_of(&made.token.hash()), &made.record) };
    let change = Change { applied: true, effects, warnings: Vec::new(), result: Some(issued) };
    Ok((StatusCode::CREATED, Extension(Secret), Json(change)).into_response())
}

pub(super) async fn list(
    call: Call,
    Names(cluster): Names<String>,
    paging: Paging,
) -> Result<Json<Page<api::Token>>, Refused> {
    let (cluster, permit) = call.on::<actions::TokenList>(&cluster)?;
    let found = tokens::usable(&call.agent().changes, &permit).await?;
    let found = found.iter().map(|token| view(&cluster, token.name(), &token.record.payload));
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
        tokens::find(changes, &permit, &token).await?;
        return Ok(Json(Change { applied: false, effects, warnings: Vec::new(), result: None }));
    }
    let reason = options.wish().reason;
    let revoked = tokens::revoke(changes, &permit, &token, cluster.name.as_str(), reason).await?;
    let result = Some(view(&cluster, revoked.name(), &revoked.record.payload));
    Ok(Json(Change { applied: true, effects, warnings: Vec::new(), result }))
}

fn view(cluster: &LiveClusterName, id: String, record: &TokenRecord) -> api::Token {
    let text = |text: &String| (!text.is_empty()).then(|| text.clone());
    api::Token {
        id,
        cluster_id: cluster.id.to_string(),
        cluster: cluster.name.to_string(),
        node: text(&record.node),
        pattern: text(&record.pattern),
        cidr: text(&record.cidr),
        uses: record.uses,
        used: record.uses.saturating_sub(record.uses_left),
        created: from_ms(record.issued_ms).into(),
        created_by: text(&record.issued_by),
        expires: from_ms(record.expires_ms).into(),
    }
}
