//! The admin API: HTTPS and JSON on a port of its own, `docs/openapi.json`.
//!
//! A request passes the gate (who, how many, how often), the replay (a change
//! runs to its end, a repeated one is answered once), its handler (may they,
//! do it), and what came of it is said in one place. Nothing here decides about
//! keys or identities; that is the control plane's.

use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::extract::DefaultBodyLimit;
use axum::middleware::{from_fn, from_fn_with_state};
use axum::routing::{MethodRouter, delete, get, post, put};
use fleet_kms_admin_api::operations::Kind;
use fleet_kms_admin_api::{Code, Operation, Problem};
use fleet_kms_transport::Connections;

use crate::agent::Agent;
use crate::authz::actions;

mod gate;
mod replay;
mod request;
mod say;
mod refusal;
mod views;
mod clusters;
mod cluster_changes;
mod keys;
mod effects;
mod tokens;
mod members;
mod nodes;
mod audit;
mod workers;
mod admins;
mod slots;
mod authorities;
mod status;

use gate::Gate;
use refusal::Refused;
use replay::Replays;

/// The longest request body.
const MAX_BODY: usize = 64 << 10;
/// How long a request's body may take to come: until then it holds a place of its caller.
const BODY_WITHIN: Duration = Duration::from_secs(10);

/// What handlers share.
#[derive(Clone)]
struct Admin(Arc<Shared>);

struct Shared {
    agent: Arc<Agent>,
    connections: Connections,
    gate: Gate,
    replays: Replays,
    /// Searches read files: one at a time, so that data calls keep the disk and the cores.
    searches: tokio::sync::Semaphore,
}

impl std::ops::Deref for Admin {
    type Target = Shared;

    fn deref(&self) -> &Shared {
        &self.0
    }
}

/// Makes the service of the admin port.
pub fn router(agent: Arc<Agent>, connections: Connections) -> Router {
    let shared = Shared {
        agent,
        connections,
        gate: Gate::default(),
        replays: Replays::default(),
        searches: tokio::sync::Semaphore::new(1),
    };
    let admin = Admin(Arc::new(shared));
    let mut router = Router::new();
    for operation in Operation::ALL {
        let said = from_fn_with_state((admin.clone(), *operation), say::say);
        let mut route = route(*operation).layer(said);
        if operation.kind() == Kind::Change {
            // Not around what answers other methods: that is no change, and takes nobody's key.
            route = route.route_layer(from_fn_with_state(admin.clone(), replay::run));
        }
        router = router.route(operation.path(), route);
    }
    router
        .fallback(no_such_route)
        .method_not_allowed_fallback(method_not_allowed)
        .layer(DefaultBodyLimit::max(MAX_BODY))
        .layer(from_fn_with_state(admin.clone(), gate::pass))
        .layer(from_fn(refusal::write))
        .layer(from_fn_with_state(admin.clone(), gate::number))
        .with_state(admin)
}

/// The handler of each operation; one without does not compile.
fn route(operation: Operation) -> MethodRouter<Admin> {
    match operation {
        Operation::ListClusters => get(clusters::list),
        Operation::CreateCluster => post(clusters::create),
        Operation::ShowCluster => get(clusters::show),
        Operation::RetireCluster => post(cluster_changes::retire),
        Operation::RestoreCluster => post(cluster_changes::restore),
        Operation::RenameCluster => post(cluster_changes::rename),
        Operation::SetRotation => put(keys::set_rotation),
        Operation::SetMaxOffline => put(clusters::set_max_offline),
        Operation::RotateKey => post(keys::rotate),
        Operation::ListVersions => get(keys::versions),
        Operation::DisableVersion => post(keys::disable),
        Operation::EnableVersion => post(keys::enable),
        Operation::DestroyVersion => post(keys::destroy),
        Operation::CancelDestroyVersion => post(keys::cancel_destroy),
        Operation::ExplainVersion => get(keys::explain),
        Operation::CreateToken => post(tokens::create),
        Operation::ListTokens => get(tokens::list),
        Operation::RevokeToken => delete(tokens::revoke),
        Operation::ListNodes => get(nodes::list),
        Operation::ListClusterNodes => get(nodes::list_of_cluster),
        Operation::BanNode => post(members::ban::<nodes::Nodes, actions::NodeBan>),
        Operation::UnbanNode => post(members::unban::<nodes::Nodes, actions::NodeUnban>),
        Operation::RemoveNode => delete(members::remove::<nodes::Nodes, actions::NodeRemove>),
        Operation::ListWorkers => get(workers::list),
        Operation::BanWorker => post(members::ban::<workers::Workers, actions::WorkerBan>),
        Operation::UnbanWorker => post(members::unban::<workers::Workers, actions::WorkerUnban>),
        Operation::RemoveWorker => delete(members::remove::<workers::Workers, actions::WorkerRemove>),
        Operation::ListAdmins => get(admins::list),
        Operation::ShowAdmin => get(admins::show),
        Operation::SetAdminRoles => put(admins::set_roles),
        Operation::SetAdminScope => put(admins::set_scope),
        Operation::RemoveAdmin => delete(admins::remove),
        Operation::ListSlots => get(slots::list),
        Operation::SearchAudit => get(audit::search),
        Operation::ListAuditHeads => get(audit::heads),
        Operation::ShowCa => get(authorities::show),
        Operation::RotateCa => post(authorities::rotate),
        Operation::ReplaceCa => post(authorities::replace),
        Operation::ShowStatus => get(status::show),
        Operation::ShowOpenapi => get(status::openapi),
    }
}

async fn no_such_route() -> Refused {
    Problem::new(Code::NoSuchRoute, "there is no such route", "read /openapi.json").into()
}

async fn method_not_allowed() -> Refused {
    Problem::new(Code::MethodNotAllowed, "the route has no such method", "read /openapi.json").into()
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use crate::authz::{TABLE, Who};

    use super::*;

    #[test]
    fn every_operation_has_a_row_of_admins_in_the_table_and_every_such_row_an_operation() {
        let operations: HashSet<_> = Operation::ALL.iter().map(|operation| operation.id()).collect();
        let of_admins = |who: &[Who]| !who.is_empty() && who.iter().all(|who| matches!(who, Who::Admin(_)));
        let rows: HashSet<_> = TABLE.iter().filter(|row| of_admins(row.who)).map(|row| row.id).collect();
        assert_eq!(operations, rows);
    }
}
