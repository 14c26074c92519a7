//! Old files of the audit go, behind a checkpoint that the issuing CA signs.
//!
//! A removal is recorded among the changes before it happens; what cannot be recorded or signed is not removed.

use std::io;
use std::sync::Arc;

use fleet_kms_audit::{Chain, LogError, Removal};

use crate::agent::Agent;
use crate::ca::SignError;
use crate::config::AuditOptions;
use crate::trail::Event;

/// Who removes.
const AGENT: &str = "agent";

/// Why nothing was removed, or not all.
#[derive(Debug, thiserror::Error)]
pub enum RetentionError {
    /// The files cannot be read or removed.
    #[error("the old files cannot be removed")]
    Io(#[from] io::Error),
    /// The checkpoint cannot be signed.
    #[error("the checkpoint cannot be signed")]
    Sign(#[from] SignError),
    /// The removal cannot be recorded.
    #[error("the removal cannot be recorded")]
    Audit(#[from] LogError),
}

/// Removes what is too old or too much of one chain.
///
/// # Errors
///
/// See [`RetentionError`]; the next attempt goes on.
pub async fn apply(agent: &Arc<Agent>, chain: Chain, options: AuditOptions) -> Result<(), RetentionError> {
    let now = (agent.clock())();
    let planning = Arc::clone(agent);
    let plan = move || match chain {
        Chain::Changes => planning.changes.log().removal(&options.keep_changes, now),
        Chain::Data => planning.data_log.removal(&options.keep_data, now),
    };
    let Some(removal) = off_runtime(plan).await? else { return Ok(()) };
    let checkpoint = removal.checkpoint(&agent.name(), now);
    let text = checkpoint.text();
    let authorities = agent.issuer.authorities();
    let (signature, issuers) = (authorities.sign_checkpoint(&text)?, authorities.issuers(now));
    agent.changes.event_first(event(chain, &removal, &checkpoint.hash, checkpoint.seq)).await?;
    if let Some(broken) = removal.broken() {
        tracing::error!(%broken, "a file of the audit does not hold; it is set aside as .broken");
    }
    tracing::info!(%chain, files = removal.files(), "old audit files are removed behind a checkpoint");
    off_runtime(move || removal.carry_out(text, checkpoint, signature, issuers)).await?;
    Ok(())
}

fn event(chain: Chain, removal: &Removal, hash: &str, seq: u64) -> Event {
    let event = Event::new("audit_checkpoint", AGENT)
        .target(chain.name())
        .detail("files", removal.files().to_string())
        .detail("seq", seq.to_string())
        .detail("hash", hash);
    match removal.broken() {
        Some(broken) => event.detail("broken", broken.to_string()),
        None => event,
    }
}

async fn off_runtime<T: Send + 'static>(
    act: impl FnOnce() -> io::Result<T> + Send + 'static,
) -> io::Result<T> {
    tokio::task::spawn_blocking(act).await.map_err(io::Error::other)?
}
