//! Which agent a call goes to, and how long it may wait for one.
//!
//! An error counts as an agent's answer only if it carries a reason; anything
//! else is transport, and the call goes to another agent. Every call of the
//! agent API can be repeated: wrapping twice makes two wrapped DEKs of one DEK,
//! and one of them is forgotten.

use std::sync::Arc;
use std::time::Duration;

use arc_swap::ArcSwapOption;
use fleet_kms_proto::agent::data_plane_client::DataPlaneClient;
use fleet_kms_transport::{ClientTls, LinkService};
use tokio::time::{Instant, timeout};
use tonic::{Code, Request, Response, Status};

use crate::agent_link::{AgentLink, LinkContext, LinkState};
use crate::metrics::{Metrics, NO_ANSWER, OK, REFUSED, TRANSPORT};
use crate::request_id;

/// The trailer that makes an error an agent's own (docs/wire-format.md).
const REASON: &str = "fleet-kms-reason";

/// The reason of an agent whose keys are locked. Another agent may serve.
const LOCKED: &str = "locked";

/// The most bytes of an agent's text that reach this node's log.
const MAX_TEXT: usize = 200;

/// The pause before agents that are up, but gave no answer, are tried again.
const RETRY_PAUSE: Duration = Duration::from_millis(100);

/// With less time than this left, no agent is asked any more.
const SHORTEST_ATTEMPT: Duration = Duration::from_millis(2);

/// Why no agent's answer can be given.
#[derive(Debug, thiserror::Error)]
pub enum LinksError {
    /// This node has no identity yet.
    #[error("this node is not enrolled")]
    NotEnrolled,
    /// No agent is connected, for longer than calls are held.
    #[error("no agent could be reached for {outage:?}")]
    Unreachable {
        /// How long by now.
        outage: Duration,
    },
    /// The call's time is over.
    #[error("no agent answered in time")]
    OutOfTime {
        /// How long no agent has been connected, if that is why.
        outage: Option<Duration>,
    },
    /// An agent answered, with a refusal.
    #[error("an agent refused")]
    Refused(#[source] Refusal),
}

/// An agent's own error.
#[derive(Debug, thiserror::Error)]
#[error("{reason} ({code:?}): {text}")]
pub struct Refusal {
    /// The gRPC code.
    pub code: Code,
    /// The reason, one of a closed list.
    pub reason: String,
    /// The agent's text; for this node's log only.
    pub text: String,
}

/// All agents of this node. Clones are the same.
#[derive(Clone)]
pub struct Links(Arc<Shared>);

struct Shared {
    /// `None` until this node is enrolled.
    links: ArcSwapOption<Vec<Arc<AgentLink>>>,
    context: LinkContext,
    hold_for: Duration,
    metrics: Metrics,
    /// When an outage began that no agent was ever known in.
    started: Instant,
}

impl Links {
    /// Has no agent yet: this node may not be enrolled. A call may wait for an
    /// agent while an outage is younger than `hold_for`.
    pub fn new(context: LinkContext, hold_for: Duration, metrics: Metrics) -> Self {
        Self(Arc::new(Shared {
            links: ArcSwapOption::empty(),
            context,
            hold_for,
            metrics,
            started: Instant::now(),
        }))
    }

    /// Makes these the agents, spoken to over `tls`. Links to those that stay
    /// are kept.
    pub fn set_agents<'a>(&self, tls: &ClientTls, addresses: impl IntoIterator<Item = &'a str>) {
        let old = self.0.links.load_full().unwrap_or_default();
        let mut new: Vec<Arc<AgentLink>> = Vec::new();
        for address in addresses {
            if new.iter().any(|link| link.address() == address) {
                continue;
            }
            let kept = old.iter().find(|link| link.address() == address).map(Arc::clone);
            new.push(kept.unwrap_or_else(|| {
                Arc::new(AgentLink::start(address.to_owned(), tls.clone(), self.0.context.clone()))
            }));
        }
        // Another order on each node spreads the nodes over the agents.
        let seed = self.0.context.seed;
        new.sort_by_cached_key(|link| rendezvous(seed, link.address()));
        self.0.links.store(Some(Arc::new(new)));
        self.0.context.changes.send_modify(|count| *count = count.wrapping_add(1));
    }

    /// Calls an agent, and another one if that gives no answer, until the
    /// deadline. `attempt` gets a client and the time that it may take.
    pub async fn call<T, F>(
        &self,
        deadline: Instant,
        attempt: impl Fn(DataPlaneClient<LinkService>, Duration) -> F,
    ) -> Result<T, LinksError>
    where
        F: Future<Output = Result<Response<T>, Status>>,
    {
        let mut changes = self.0.context.changes.subscribe();
        let mut tried = Tried::default();
        let mut failed_over = false;
        loop {
            changes.borrow_and_update();
            let now = Instant::now();
            let left = deadline.saturating_duration_since(now);
            let pick = self.pick(&tried, now)?;
            if left < SHORTEST_ATTEMPT {
                return Err(LinksError::OutOfTime { outage: pick.outage(now) });
            }
            match pick {
                Pick::Up { link, service, connection, is_last } => {
                    let time = if is_last { left } else { left / 2 };
                    let outcome = timeout(time, attempt(DataPlaneClient::new(service), time)).await;
                    match self.judge(&link, outcome) {
                        Judged::Answer(answer) => {
                            if failed_over {
                                self.0.metrics.failed_over();
                            }
                            return Ok(answer);
                        }
                        Judged::Refused(refusal) => return Err(LinksError::Refused(refusal)),
                        Judged::TryAnother(refusal) => {
                            failed_over = true;
                            tried.add(&link, connection, refusal);
                        }
                    }
                }
                Pick::AllTried => {
                    if let Some(refusal) = tried.refusal.take() {
                        return Err(LinksError::Refused(refusal));
                    }
                    let _ = timeout(left.min(RETRY_PAUSE), changes.changed()).await;
                    tried = Tried::default();
                }
                Pick::Down { since } => {
                    let outage = now.duration_since(since);
                    let Some(hold) = self.0.hold_for.checked_sub(outage).filter(|hold| !hold.is_zero())
                    else {
                        return Err(LinksError::Unreachable { outage });
                    };
                    let _ = timeout(left.min(hold), changes.changed()).await;
                }
            }
        }
    }

    /// As [`Self::set_agents`], with new connections to all of them: this node
    /// has another identity.
    pub fn replace_agents<'a>(&self, tls: &ClientTls, addresses: impl IntoIterator<Item = &'a str>) {
        self.0.links.store(None);
        self.set_agents(tls, addresses);
    }

    /// What the links tell beside their state.
    pub fn context(&self) -> &LinkContext {
        &self.0.context
    }

    /// Waits until some agent is connected.
    pub async fn up(&self) {
        let mut changes = self.0.context.changes.subscribe();
        loop {
            changes.borrow_and_update();
            if matches!(self.pick(&Tried::default(), Instant::now()), Ok(Pick::Up { .. })) {
                return;
            }
            if changes.changed().await.is_err() {
                return;
            }
        }
    }

    /// Picks the first agent that is up, was not tried and did not fail lately.
    fn pick(&self, tried: &Tried, now: Instant) -> Result<Pick, LinksError> {
        let links = self.0.links.load_full().ok_or(LinksError::NotEnrolled)?;
        let (mut up, mut down_since) = (Vec::new(), None);
        for link in links.iter() {
            match link.state() {
                LinkState::Up { service, connection } => up.push((link, service, connection)),
                LinkState::Down { since, .. } => down_since = down_since.max(Some(since)),
            }
        }
        self.0.metrics.set_links(links.len(), up.len());
        if up.is_empty() {
            return Ok(Pick::Down { since: down_since.unwrap_or(self.0.started) });
        }
        up.retain(|(link, _, connection)| !tried.contains(link, *connection));
        // A stable sort: among equals the order of this node.
        up.sort_by_key(|(link, _, _)| link.is_suspect(now));
        let is_last = up.len() == 1;
        Ok(match up.into_iter().next() {
            Some((link, service, connection)) => {
                Pick::Up { link: Arc::clone(link), service, connection, is_last }
            }
            None => Pick::AllTried,
        })
    }

    fn judge<T, E>(&self, link: &AgentLink, outcome: Result<Result<Response<T>, Status>, E>) -> Judged<T> {
        let status = match outcome {
            Ok(Ok(answer)) => {
                self.0.metrics.attempted(OK);
                link.trust();
                return Judged::Answer(answer.into_inner());
            }
            Ok(Err(status)) => status,
            Err(_elapsed) => {
                self.0.metrics.attempted(NO_ANSWER);
                link.suspect(Instant::now());
                tracing::debug!(agent = link.address(), "no answer in the time of one attempt");
                return Judged::TryAnother(None);
            }
        };
        match refusal(&status) {
            Some(refusal) => {
                self.0.metrics.attempted(REFUSED);
                link.trust();
                match refusal.reason == LOCKED {
                    true => Judged::TryAnother(Some(refusal)),
                    false => Judged::Refused(refusal),
                }
            }
            None => {
                self.0.metrics.attempted(TRANSPORT);
                link.suspect(Instant::now());
                tracing::debug!(agent = link.address(), %status, "the connection failed a call");
                Judged::TryAnother(None)
            }
        }
    }
}

/// Puts the time that an attempt may take into its request, and the id of the
/// call that it is made for.
pub fn attempt_request<T>(message: T, time: Duration) -> Request<T> {
    let mut request = Request::new(message);
    request.set_timeout(time);
    if let Some(id) = request_id::current() {
        request.metadata_mut().insert(request_id::HEADER, id);
    }
    request
}

/// An agent's own error; `None` for one that has come from anything else.
pub fn refusal(status: &Status) -> Option<Refusal> {
    let reason = status.metadata().get(REASON)?.to_str().ok()?.to_owned();
    let text = status.message().chars().take(MAX_TEXT).collect();
    Some(Refusal { code: status.code(), reason, text })
}

fn rendezvous(seed: u64, address: &str) -> u64 {
    use std::hash::{DefaultHasher, Hash, Hasher};
    let mut hasher = DefaultHasher::new();
    (seed, address).hash(&mut hasher);
    hasher.finish()
}

/// What to do with a call now.
enum Pick {
    Up {
        link: Arc<AgentLink>,
        service: LinkService,
        connection: u64,
        /// No other agent is up and untried.
        is_last: bool,
    },
    AllTried,
    Down {
        since: Instant,
    },
}

impl Pick {
    fn outage(&self, now: Instant) -> Option<Duration> {
        match self {
            Self::Down { since } => Some(now.duration_since(*since)),
            Self::Up { .. } | Self::AllTried => None,
        }
    }
}

enum Judged<T> {
    Answer(T),
    Refused(Refusal),
    TryAnother(Option<Refusal>),
}

/// The connections that gave a call no answer.
#[derive(Default)]
struct Tried {
    connections: Vec<(String, u64)>,
    refusal: Option<Refusal>,
}

impl Tried {
    fn add(&mut self, link: &AgentLink, connection: u64, refusal: Option<Refusal>) {
        self.connections.push((link.address().to_owned(), connection));
        self.refusal = refusal.or(self.refusal.take());
    }

    fn contains(&self, link: &AgentLink, connection: u64) -> bool {
        self.connections.iter().any(|(address, tried)| address == link.address() && *tried == connection)
    }
}
