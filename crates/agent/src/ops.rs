//! The agent's ops port: `/livez`, `/readyz`, `/metrics`.
//!
//! Ready means: the keys are open and the data plane is served. Neither a probe
//! nor a scrape touches the store.

use std::io;
use std::net::TcpListener;
use std::sync::Arc;

use fleet_kms_process::ops::{self, OpsState};
use fleet_kms_transport::{Connections, Drain};
use prometheus_client::registry::Registry;
use tokio_util::task::TaskTracker;

use crate::agent::Agent;
use crate::errors::chain;
use crate::metrics::PREFIX;
use crate::scrape::State;

/// Serves the ops port until `drain`; `served` are the other ports' connections.
///
/// # Errors
///
/// When the runtime cannot watch the listener.
pub fn spawn(
    tasks: &TaskTracker,
    agent: &Arc<Agent>,
    served: &Connections,
    listener: TcpListener,
    mut registry: Registry,
    drain: Drain,
) -> io::Result<()> {
    let state = State::new(Arc::clone(agent), served.clone());
    registry.sub_registry_with_prefix(PREFIX).register_collector(Box::new(state));
    let ready = Arc::clone(agent);
    let state = OpsState::new(registry, move || readiness(&ready));
    tasks.spawn(async move {
        if let Err(error) = ops::serve(listener, state, Connections::new(), drain).await {
            tracing::error!(error = chain(&error), "the ops port is not served");
        }
    });
    Ok(())
}

fn readiness(agent: &Agent) -> Result<(), String> {
    if agent.keyrings.is_locked() {
        return Err("locked: no key can be used; restart the agent to unlock it".to_owned());
    }
    Ok(())
}
