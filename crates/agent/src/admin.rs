//! The admin port: HTTPS and JSON for operators and their programs.

use std::sync::Arc;

use axum::Router;
use fleet_kms_transport::Connections;

use crate::agent::Agent;

/// Makes the router of the admin port.
pub fn router(_agent: Arc<Agent>, _connections: Connections) -> Router {
    Router::new()
}
