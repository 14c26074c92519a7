//! One agent's connection: who keeps it up, and whether it is.
//!
//! A task per agent dials, publishes [`LinkState`], notices by pings that the
//! agent is frozen or the network swallows everything, and dials again for ever.
//! It must never queue a call: who may wait, and for how long, is decided in
//! [`crate::links`].

mod backoff;

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use fleet_kms_transport::{ClientTls, ConnectError, ConnectOptions, LinkService, connect};
use tokio::sync::{Notify, watch};
use tokio::time::Instant;
use tokio_util::task::AbortOnDropHandle;

use self::backoff::Backoff;
use crate::errors::chain;

/// How long name resolution, TCP, TLS and HTTP/2 may take together.
const CONNECT_WITHIN: Duration = Duration::from_secs(3);

/// How often a quiet connection is tried with a ping, and how long the answer
/// may take: a frozen agent is given up within their sum.
const PING_EVERY: Duration = Duration::from_secs(1);
const PING_WITHIN: Duration = Duration::from_secs(2);

/// How long a link that failed a call is taken only if no other is left.
const SUSPECT_FOR: Duration = Duration::from_secs(10);

/// What all links of a process share.
#[derive(Debug, Clone)]
pub struct LinkContext {
    /// Counts changes of any link's state.
    pub changes: watch::Sender<u64>,
    /// Told when a certificate is refused for its dates.
    pub time_is_doubtful: Arc<Notify>,
    /// Spreads the fleet's reconnects.
    pub seed: u64,
}

impl LinkContext {
    /// `seed` is this process's own.
    pub fn new(seed: u64) -> Self {
        Self { changes: watch::Sender::new(0), time_is_doubtful: Arc::default(), seed }
    }
}

/// Whether an agent can be called now.
#[derive(Clone)]
pub enum LinkState {
    /// Connected. `connection` counts this link's connections.
    Up {
        /// What calls go over.
        service: LinkService,
        /// Which connection of this link it is.
        connection: u64,
    },
    /// Not connected.
    Down {
        /// Why, for this node's log.
        reason: String,
        /// Since when.
        since: Instant,
    },
}

/// One agent, and the task that keeps the connection to it.
pub struct AgentLink {
    address: String,
    shared: Arc<Shared>,
    _task: AbortOnDropHandle<()>,
}

struct Shared {
    state: Mutex<LinkState>,
    suspect_until: Mutex<Option<Instant>>,
    changes: watch::Sender<u64>,
}

impl AgentLink {
    /// Starts to keep a connection to the agent at `address` (`host:port`), for
    /// as long as the link lives.
    pub fn start(address: String, tls: ClientTls, context: LinkContext) -> Self {
        let down = LinkState::Down { reason: "not connected yet".to_owned(), since: Instant::now() };
        let shared = Arc::new(Shared {
            state: Mutex::new(down),
            suspect_until: Mutex::new(None),
            changes: context.changes.clone(),
        });
        let task = tokio::spawn(keep(address.clone(), tls, context, Arc::clone(&shared)));
        Self { address, shared, _task: AbortOnDropHandle::new(task) }
    }

    /// Where the agent is.
    pub fn address(&self) -> &str {
        &self.address
    }

    /// Whether it can be called now.
    pub fn state(&self) -> LinkState {
        self.shared.state.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Whether a call failed here lately.
    pub fn is_suspect(&self, now: Instant) -> bool {
        self.suspect_until().is_some_and(|until| now < until)
    }

    /// Notes that a call got no answer here.
    pub fn suspect(&self, now: Instant) {
        *self.suspect_until() = Some(now + SUSPECT_FOR);
    }

    /// Notes that the agent answered.
    pub fn trust(&self) {
        *self.suspect_until() = None;
    }

    fn suspect_until(&self) -> std::sync::MutexGuard<'_, Option<Instant>> {
        self.shared.suspect_until.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Shared {
    fn publish(&self, state: LinkState) {
        *self.state.lock().unwrap_or_else(PoisonError::into_inner) = state;
        self.changes.send_modify(|count| *count = count.wrapping_add(1));
    }
}

/// Connects, and connects again, for ever.
async fn keep(address: String, tls: ClientTls, context: LinkContext, shared: Arc<Shared>) {
    let options =
        ConnectOptions { timeout: CONNECT_WITHIN, ping_interval: PING_EVERY, ping_timeout: PING_WITHIN };
    let mut backoff = Backoff::new(context.seed, &address);
    let mut down_since = Instant::now();
    let mut last_reason = String::new();
    for connection in 0_u64.. {
        match connect(&address, &tls, options).await {
            Ok(link) => {
                tracing::info!(agent = address, "connected");
                *shared.suspect_until.lock().unwrap_or_else(PoisonError::into_inner) = None;
                shared.publish(LinkState::Up { service: link.service, connection });
                let up_since = Instant::now();
                let end = link.driver.await;
                down_since = Instant::now();
                backoff.was_up(down_since.duration_since(up_since));
                last_reason = chain(&end);
                tracing::info!(agent = address, reason = last_reason, "the connection ended");
            }
            Err(error) => {
                if matches!(error, ConnectError::CertificateDates { .. }) {
                    context.time_is_doubtful.notify_one();
                }
                let reason = chain(&error);
                if reason != last_reason {
                    tracing::warn!(agent = address, reason, "cannot connect");
                }
                last_reason = reason;
            }
        }
        shared.publish(LinkState::Down { reason: last_reason.clone(), since: down_since });
        tokio::time::sleep(backoff.next(down_since.elapsed())).await;
    }
}
