//! What the audit needs from time to time: sums written, heads stored, old files removed.

use std::sync::Arc;
use std::time::Duration;

use fleet_kms_audit::{Chain, Head};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::agent::Agent;
use crate::config::AuditOptions;
use crate::errors::chain;
use crate::trail::{heads, retention};

/// Between two looks: a change's head is stored within this, and a chain that cannot be written is tried again.
const LOOK_EVERY: Duration = Duration::from_secs(1);
/// The data calls' head is stored so often.
const DATA_HEAD_EVERY: Duration = Duration::from_secs(30);
/// Old files are looked for so often.
const RETENTION_EVERY: Duration = Duration::from_secs(10);

/// Keeps the audit until `stop`; [`finish`] then does the last of it.
pub async fn run(agent: Arc<Agent>, options: AuditOptions, stop: CancellationToken) {
    let started = Instant::now();
    let (mut flushed, mut data_head, mut retained) = (started, started, None);
    let mut stored = Stored::default();
    loop {
        tokio::select! {
            () = stop.cancelled() => return,
            () = tokio::time::sleep(LOOK_EVERY) => {}
        }
        if flushed.elapsed() >= options.summary_every || agent.data_log.state().failing {
            flush(&agent).await;
            flushed = Instant::now();
        }
        let with_data = data_head.elapsed() >= DATA_HEAD_EVERY;
        if with_data {
            data_head = Instant::now();
        }
        stored.store(&agent, with_data).await;
        if retained.is_none_or(|retained: Instant| retained.elapsed() >= RETENTION_EVERY) {
            retain(&agent, options).await;
            retained = Some(Instant::now());
        }
    }
}

/// Writes what was counted and stores the heads, before the agent ends.
pub async fn finish(agent: &Arc<Agent>) {
    flush(agent).await;
    Stored::default().store(agent, true).await;
}

/// What of the heads is in the store already.
#[derive(Default)]
struct Stored {
    changes: Option<Head>,
    data: Option<Head>,
    failing: bool,
}

impl Stored {
    async fn store(&mut self, agent: &Agent, with_data: bool) {
        let (changes, data) = (agent.changes.log().head(), agent.data_log.head());
        let mut moved = Vec::new();
        if self.changes != Some(changes) {
            moved.push((Chain::Changes, changes));
        }
        if self.data != Some(data) && (with_data || !moved.is_empty()) {
            moved.push((Chain::Data, data));
        }
        if moved.is_empty() {
            return;
        }
        match heads::store(&agent.changes, &agent.name(), &moved).await {
            Ok(()) => (self.changes, self.data, self.failing) = (Some(changes), Some(data), false),
            Err(error) => {
                if !std::mem::replace(&mut self.failing, true) {
                    tracing::warn!(error = chain(&error), "the audit's heads cannot be stored; tried again");
                }
            }
        }
    }
}

/// Waits for the disk off the runtime's threads; one flush at a time.
async fn flush(agent: &Arc<Agent>) {
    let failed = agent.data_log.state().failing;
    let flushing = Arc::clone(agent);
    let flushed = tokio::task::spawn_blocking(move || flushing.data_log.flush((flushing.clock())())).await;
    match flushed {
        Ok(Ok(_)) if failed => tracing::info!("the audit's data calls can be recorded again"),
        Ok(Ok(_)) => {}
        // Said once; the status and the metrics go on saying it.
        Ok(Err(error)) if !failed => {
            tracing::error!(error = chain(&error), "the data summary cannot be written to the audit");
        }
        Ok(Err(_)) => {}
        Err(_) => tracing::error!("the data summary was not written: its task ended"),
    }
}

async fn retain(agent: &Arc<Agent>, options: AuditOptions) {
    for of in Chain::ALL {
        if let Err(error) = retention::apply(agent, of, options).await {
            tracing::warn!(error = chain(&error), chain = %of, "old audit files stay");
        }
    }
}
