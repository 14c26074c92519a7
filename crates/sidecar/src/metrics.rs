//! What the sidecar counts, with closed label sets; `docs/metrics.md` has one
//! line for each series.

use std::time::Duration;

use fleet_kms_transport::{ConnectionEvent, Observer, Refusal};
use prometheus_client::encoding::{EncodeLabelSet, EncodeLabelValue, LabelValueEncoder};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::{Registry, Unit};

/// Stands before the name of every series.
pub const PREFIX: &str = "fleet_kms_sidecar";

/// 0.5 ms to 8 s: from a call over a local network to the longest deadline.
const CALL_SECONDS: [f64; 15] =
    [0.0005, 0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 1.0, 3.0, 8.0];
/// None to kube-apiserver's own 3 s and our longest.
const LEFT_SECONDS: [f64; 11] = [0.0, 0.01, 0.05, 0.1, 0.25, 0.5, 1.0, 2.0, 2.5, 3.0, 10.0];

/// A kind of call that kube-apiserver makes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[expect(missing_docs, reason = "the names are those of the RPCs")]
pub enum Operation {
    V1Version,
    V1Encrypt,
    V1Decrypt,
    V2Status,
    V2Encrypt,
    V2Decrypt,
}

impl Operation {
    /// The label.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::V1Version => "v1_version",
            Self::V1Encrypt => "v1_encrypt",
            Self::V1Decrypt => "v1_decrypt",
            Self::V2Status => "v2_status",
            Self::V2Encrypt => "v2_encrypt",
            Self::V2Decrypt => "v2_decrypt",
        }
    }
}

impl EncodeLabelValue for Operation {
    fn encode(&self, encoder: &mut LabelValueEncoder<'_>) -> Result<(), std::fmt::Error> {
        EncodeLabelValue::encode(&self.as_str(), encoder)
    }
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct CallLabels {
    operation: Operation,
    outcome: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct OperationLabel {
    operation: Operation,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct OutcomeLabel {
    outcome: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ReasonLabel {
    reason: &'static str,
}

/// The sidecar's metrics. Clones count together.
#[derive(Debug, Clone)]
pub struct Metrics {
    calls: Family<CallLabels, Histogram>,
    deadline_left: Family<OperationLabel, Histogram>,
    errors: Counter,
    attempts: Family<OutcomeLabel, Counter>,
    failovers: Counter,
    renewals: Family<OutcomeLabel, Counter>,
    refused: Family<ReasonLabel, Counter>,
    links: Gauge,
    links_up: Gauge,
    highest_version: Gauge,
    certificate_not_after: Gauge,
    missing_protections: Gauge,
}

impl Metrics {
    /// Makes the metrics and registers them.
    pub fn register(registry: &mut Registry) -> Self {
        let metrics = Self {
            calls: Family::new_with_constructor(|| Histogram::new(CALL_SECONDS)),
            deadline_left: Family::new_with_constructor(|| Histogram::new(LEFT_SECONDS)),
            errors: Counter::default(),
            attempts: Family::default(),
            failovers: Counter::default(),
            renewals: Family::default(),
            refused: Family::default(),
            links: Gauge::default(),
            links_up: Gauge::default(),
            highest_version: Gauge::default(),
            certificate_not_after: Gauge::default(),
            missing_protections: Gauge::default(),
        };
        metrics.register_in(registry.sub_registry_with_prefix(PREFIX));
        // Closed sets are there from the start, so that a first event shows as an increase.
        for outcome in [OK, NO_ANSWER, REFUSED, TRANSPORT] {
            drop(metrics.attempts.get_or_create(&OutcomeLabel { outcome }));
        }
        for outcome in [OK, FAILED] {
            drop(metrics.renewals.get_or_create(&OutcomeLabel { outcome }));
        }
        for refusal in [Refusal::Full, Refusal::SourceFull, Refusal::Timeout] {
            drop(metrics.refused.get_or_create(&ReasonLabel { reason: refusal.label() }));
        }
        metrics
    }

    fn register_in(&self, registry: &mut Registry) {
        let help = "Time to answer kube-apiserver, by operation and outcome";
        registry.register_with_unit("call_duration", help, Unit::Seconds, self.calls.clone());
        let help = "Time left to kube-apiserver's deadline when its call was answered";
        registry.register_with_unit("deadline_left", help, Unit::Seconds, self.deadline_left.clone());
        registry.register("errors", "Calls of kube-apiserver answered with an error", self.errors.clone());
        registry.register("agent_attempts", "Calls made to agents, by outcome", self.attempts.clone());
        let help = "Calls that another agent answered after one gave no answer";
        registry.register("failovers", help, self.failovers.clone());
        registry.register("renewals", "Attempts to renew the certificate, by outcome", self.renewals.clone());
        let help = "Connections to the socket that came to no call, by reason";
        registry.register("refused_connections", help, self.refused.clone());
        registry.register("links", "Agents that are known", self.links.clone());
        registry.register("links_up", "Agents with a live connection", self.links_up.clone());
        let help = "The highest key version that this node has seen";
        registry.register("highest_key_version", help, self.highest_version.clone());
        let help = "When this node's certificate ends, Unix time; 0 if it is not enrolled";
        let gauge = self.certificate_not_after.clone();
        registry.register_with_unit("certificate_expiry_timestamp", help, Unit::Seconds, gauge);
        let help = "Protections that this machine refused at start; the log names them";
        registry.register("missing_protections", help, self.missing_protections.clone());
    }

    /// Counts an answer to kube-apiserver, given `left` before its deadline.
    pub fn answered(&self, operation: Operation, outcome: &'static str, took: Duration, left: Duration) {
        self.calls.get_or_create(&CallLabels { operation, outcome }).observe(took.as_secs_f64());
        self.deadline_left.get_or_create(&OperationLabel { operation }).observe(left.as_secs_f64());
        if outcome != OK {
            self.errors.inc();
        }
    }

    /// Counts a call to one agent.
    pub fn attempted(&self, outcome: &'static str) {
        self.attempts.get_or_create(&OutcomeLabel { outcome }).inc();
    }

    /// Counts a call that another agent answered.
    pub fn failed_over(&self) {
        self.failovers.inc();
    }

    /// Counts an attempt to renew.
    pub fn renewed(&self, outcome: &'static str) {
        self.renewals.get_or_create(&OutcomeLabel { outcome }).inc();
    }

    /// Counts the socket's refused connections.
    pub fn observer(&self) -> Observer {
        let refused = self.refused.clone();
        std::sync::Arc::new(move |event| {
            if let ConnectionEvent::Refused { refusal, .. } = event {
                refused.get_or_create(&ReasonLabel { reason: refusal.label() }).inc();
            }
            tracing::debug!(?event, "a connection was refused");
        })
    }

    /// Sets how many agents are known and how many of them are connected.
    pub fn set_links(&self, known: usize, up: usize) {
        self.links.set(i64::try_from(known).unwrap_or(i64::MAX));
        self.links_up.set(i64::try_from(up).unwrap_or(i64::MAX));
    }

    /// Sets the highest key version seen.
    pub fn set_highest_version(&self, version: u32) {
        self.highest_version.set(version.into());
    }

    /// Sets when the certificate expires.
    pub fn set_certificate_not_after(&self, seconds: u64) {
        self.certificate_not_after.set(i64::try_from(seconds).unwrap_or(i64::MAX));
    }

    /// Sets how many protections the machine refused.
    pub fn set_missing_protections(&self, count: usize) {
        self.missing_protections.set(i64::try_from(count).unwrap_or(i64::MAX));
    }

    /// Calls answered with an error, since the start.
    pub fn errors(&self) -> u64 {
        self.errors.get()
    }
}

/// The outcome of what succeeded.
pub const OK: &str = "ok";
/// The outcome of a renewal that did not come about.
pub const FAILED: &str = "failed";
/// An agent gave no answer in the time of one attempt.
pub const NO_ANSWER: &str = "no_answer";
/// An agent answered with a refusal.
pub const REFUSED: &str = "refused";
/// The connection failed a call.
pub const TRANSPORT: &str = "transport";
