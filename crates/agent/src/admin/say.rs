//! What came of each request, said in one place: to the audit's sums, to its
//! denials, and to the metrics. A handler names neither.

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
    request: Request,
    next: Next,
) -> Response {
    let started = Instant::now();
    let caller = request.extensions().get::<Caller>().cloned();
    let response = next.run(request).await;
    let outcome = response.extensions().get::<Label>().map_or("ok", |label| label.0);
    let took = started.elapsed();
    let agent = &admin.agent;
    agent.metrics.call(operation.id(), outcome, took);
    let identity = caller.as_ref().map_or_else(|| "nobody".to_owned(), |caller| caller.id().to_string());
    let (operation, identity) = (operation.id(), identity.as_str());
    agent.data_log.count(&Call { identity, cluster: None, operation, version: None, outcome }, 1, took);
    if matches!(response.status().as_u16(), 401 | 403) {
        let address = caller.map_or_else(String::new, |caller| caller.address().to_string());
        let denial = Denial { identity, address: &address, operation, reason: outcome };
        agent.data_log.denied(&denial, (agent.clock())());
    }
    response
}
