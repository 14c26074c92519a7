//! This node's talk with the fleet about itself: it reports its state, and
//! learns the active version, where the agents are and which roots to trust.
//!
//! The key id that KMS v2's Status names is moved here, only by naming it, and
//! never to a lower version.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::time::Duration;

use arc_swap::ArcSwapOption;
use fleet_kms_identity::AgentAddress;
use fleet_kms_proto::agent::{StatusRequest, StatusResponse};
use tokio::sync::watch;
use tokio::time::Instant;

use crate::agent_calls;
use crate::answer::Answers;
use crate::grpc_code::CallError;
use crate::links::Links;
use crate::metrics::Metrics;
use crate::wrapped_header::KeyId;

/// How often a node reports when all is well, and when it is not.
const REPORT_EVERY: Duration = Duration::from_secs(60);
const REPORT_EVERY_IN_TROUBLE: Duration = Duration::from_secs(5);

/// The time of one report.
const REPORT_WITHIN: Duration = Duration::from_secs(5);

/// The most agents and roots that one answer may name; more make no sense.
const MAX_AGENTS: usize = 64;
const MAX_ROOTS: usize = 8;

/// A version as an agent names it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ActiveVersion {
    /// Its number.
    pub version: u32,
    /// Its name.
    pub key_id: KeyId,
}

/// What the fleet has told about itself.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Learnt {
    /// The agents; empty if none were named yet.
    pub agents: Vec<AgentAddress>,
    /// The roots to trust, DER; empty if none were named yet.
    pub roots: Vec<Vec<u8>>,
    /// The highest key version seen.
    pub highest_version: u32,
}

/// The node's status. Clones are the same.
#[derive(Clone)]
pub struct NodeStatus(Arc<Shared>);

struct Shared {
    links: Links,
    metrics: Metrics,
    named: ArcSwapOption<ActiveVersion>,
    highest_version: AtomicU32,
    certificate_not_after: AtomicU64,
    learnt: watch::Sender<Learnt>,
}

impl NodeStatus {
    /// Knows nothing yet.
    pub fn new(links: Links, metrics: Metrics) -> Self {
        Self(Arc::new(Shared {
            links,
            metrics,
            named: ArcSwapOption::empty(),
            highest_version: AtomicU32::new(0),
            certificate_not_after: AtomicU64::new(0),
            learnt: watch::Sender::new(Learnt::default()),
        }))
    }

    /// Asks an agent for the active version; learns what else it tells.
    pub async fn ask(&self, deadline: Instant) -> Result<ActiveVersion, CallError> {
        let request = StatusRequest {
            build: env!("CARGO_PKG_VERSION").to_owned(),
            errors: self.0.metrics.errors(),
            certificate_not_after: self.0.certificate_not_after.load(Ordering::Relaxed),
            highest_version: self.0.highest_version.load(Ordering::Relaxed),
        };
        let answer = agent_calls::status(&self.0.links, &request, deadline).await?;
        let key_id = KeyId::from_slice(&answer.key_id).ok_or(CallError::BadAnswer("no key id"))?;
        if answer.version == 0 {
            return Err(CallError::BadAnswer("no version"));
        }
        let active = ActiveVersion { version: answer.version, key_id };
        self.learn(answer);
        Ok(active)
    }

    /// Names a version to kube-apiserver: this one, or the one named before if
    /// that was a higher one. An agent may be behind the others for a moment.
    pub fn name(&self, active: ActiveVersion) -> ActiveVersion {
        let named = self.0.named.rcu(|named| match named {
            Some(named) if named.version >= active.version => Some(Arc::clone(named)),
            _ => Some(Arc::new(active)),
        });
        match named {
            Some(before) if before.version >= active.version => *before,
            _ => active,
        }
    }

    /// The version that kube-apiserver was told last; `None` if this process has
    /// not told any.
    pub fn named(&self) -> Option<ActiveVersion> {
        self.0.named.load().as_deref().copied()
    }

    /// Notes a version that this node saw in an earlier life.
    pub fn saw_version(&self, version: u32) {
        let highest = version.max(self.0.highest_version.fetch_max(version, Ordering::Relaxed));
        self.0.metrics.set_highest_version(highest);
    }

    /// Sets what is reported about the certificate.
    pub fn set_certificate_not_after(&self, seconds: u64) {
        self.0.certificate_not_after.store(seconds, Ordering::Relaxed);
        self.0.metrics.set_certificate_not_after(seconds);
    }

    /// What the fleet has told; changes only when it tells something else.
    pub fn learnt(&self) -> watch::Receiver<Learnt> {
        self.0.learnt.subscribe()
    }

    /// Reports for ever. Trouble, whichever call met it, is looked at again soon:
    /// `/readyz` must not stay red when the agents are back and nobody calls.
    pub async fn report(self, answers: Answers) {
        loop {
            let outcome = self.ask(Instant::now() + REPORT_WITHIN).await;
            answers.note_health(outcome.as_ref().err());
            tokio::select! {
                () = answers.in_trouble() => tokio::time::sleep(REPORT_EVERY_IN_TROUBLE).await,
                () = tokio::time::sleep(REPORT_EVERY) => {}
            }
        }
    }

    fn learn(&self, answer: StatusResponse) {
        let highest = answer.version.max(self.0.highest_version.fetch_max(answer.version, Ordering::Relaxed));
        self.0.metrics.set_highest_version(highest);
        let agents: Vec<AgentAddress> = answer
            .agents
            .into_iter()
            .map(|agent| AgentAddress { data: agent.data, enrolment: agent.enrolment })
            .collect();
        self.0.learnt.send_if_modified(|learnt| {
            let before = learnt.clone();
            learnt.highest_version = highest;
            if (1..=MAX_AGENTS).contains(&agents.len()) {
                learnt.agents = agents;
            }
            if (1..=MAX_ROOTS).contains(&answer.roots.len()) {
                learnt.roots = answer.roots;
            }
            *learnt != before
        });
    }
}
