//! What came of each request, said in one place: to the audit's sums, to its
//! denials, and to the metrics. A handler names neither, and reads here which
//! operation it is.

use std::time::Duration;

use axum::extract::{Request, State};
use axum::middleware::Next;
use axum::response::Response;
use fleet_kms_admin_api::Operation;
use fleet_kms_audit::{Call, Denial};
use tokio::time::Instant;

use crate::admin::Admin;
use crate::admin::refusal::Label;
use crate::caller::Caller;

pub(super) async fn say(
    State((admin, operation)): State<(Admin, Operation)>,
    mut request: Request,
    next: Next,
) -> Response {
    let started = Instant::now();
    let caller = request.extensions().get::<Caller>().cloned();
    request.extensions_mut().insert(operation);
    let response = next.run(request).await;
    let outcome = response.extensions().get::<Label>().map_or("ok", |label| label.0);
    let took = started.elapsed();
    let agent = &admin.agent;
    agent.metrics.call(operation.id(), outcome, took);
    let identity = name(caller.as_ref());
    let (operation, identity) = (operation.id(), identity.as_str());
    agent.data_log.count(&Call { identity, cluster: None, operation, version: None, outcome }, 1, took);
    if matches!(response.status().as_u16(), 401 | 403) {
        note(&admin, operation, caller.as_ref(), outcome);
    }
    response
}

/// Says that a caller was turned away before it reached an operation.
pub(super) fn denied(admin: &Admin, operation: &'static str, caller: Option<&Caller>, reason: &'static str) {
    let agent = &admin.agent;
    agent.metrics.call(operation, reason, Duration::ZERO);
    let identity = name(caller);
    let call = Call { identity: &identity, cluster: None, operation, version: None, outcome: reason };
    agent.data_log.count(&call, 1, Duration::ZERO);
    note(admin, operation, caller, reason);
}

fn note(admin: &Admin, operation: &'static str, caller: Option<&Caller>, reason: &'static str) {
    let address = caller.map_or_else(String::new, |caller| caller.address().to_string());
    let denial = Denial { identity: &name(caller), address: &address, operation, reason };
    admin.agent.data_log.denied(&denial, (admin.agent.clock())());
}

fn name(caller: Option<&Caller>) -> String {
    caller.map_or_else(|| "nobody".to_owned(), |caller| caller.id().to_string())
}
