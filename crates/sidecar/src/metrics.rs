//! What the sidecar counts, with closed label sets.

use std::time::Duration;

use prometheus_client::encoding::{EncodeLabelSet, EncodeLabelValue};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::Registry;

/// 0.5 ms to 8 s: from a call over a local network to the longest deadline.
const CALL_SECONDS: [f64; 15] =
    [0.0005, 0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 1.0, 3.0, 8.0];

/// A kind of call that kube-apiserver makes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, EncodeLabelValue)]
#[expect(missing_docs, reason = "the names are those of the RPCs")]
pub enum Operation {
    V1Version,
    V1Encrypt,
    V1Decrypt,
    V2Status,
    V2Encrypt,
    V2Decrypt,
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

/// The sidecar's metrics. Clones count together.
#[derive(Debug, Clone)]
pub struct Metrics {
    calls: Family<CallLabels, Counter>,
    seconds: Family<OperationLabel, Histogram>,
    attempts: Family<OutcomeLabel, Counter>,
    renewals: Family<OutcomeLabel, Counter>,
    links: Gauge,
    links_up: Gauge,
    errors: Counter,
    highest_version: Gauge,
    certificate_not_after: Gauge,
}

impl Metrics {
    /// Makes the metrics and registers them.
    pub fn register(registry: &mut Registry) -> Self {
        let metrics = Self {
            calls: Family::default(),
            seconds: Family::new_with_constructor(|| Histogram::new(CALL_SECONDS)),
            attempts: Family::default(),
            renewals: Family::default(),
            links: Gauge::default(),
            links_up: Gauge::default(),
            errors: Counter::default(),
            highest_version: Gauge::default(),
            certificate_not_after: Gauge::default(),
        };
        let registry = registry.sub_registry_with_prefix("kms_sidecar");
        registry.register("calls", "Calls of kube-apiserver", metrics.calls.clone());
        registry.register("call_seconds", "Time to answer kube-apiserver", metrics.seconds.clone());
        registry.register("agent_attempts", "Calls made to agents", metrics.attempts.clone());
        registry.register("renewals", "Attempts to renew the certificate", metrics.renewals.clone());
        registry.register("links", "Agents that are known", metrics.links.clone());
        registry.register("links_up", "Agents with a live connection", metrics.links_up.clone());
        registry.register("errors", "Calls answered with an error", metrics.errors.clone());
        registry.register(
            "highest_key_version",
            "The highest key version seen",
            metrics.highest_version.clone(),
        );
        registry.register(
            "certificate_not_after_seconds",
            "When the certificate expires, in seconds since 1970; 0 if not enrolled",
            metrics.certificate_not_after.clone(),
        );
        metrics
    }

    /// Counts an answer to kube-apiserver.
    pub fn answered(&self, operation: Operation, outcome: &'static str, took: Duration) {
        self.calls.get_or_create(&CallLabels { operation, outcome }).inc();
        self.seconds.get_or_create(&OperationLabel { operation }).observe(took.as_secs_f64());
        if outcome != OK {
            self.errors.inc();
        }
    }

    /// Counts a call to one agent.
    pub fn attempted(&self, outcome: &'static str) {
        self.attempts.get_or_create(&OutcomeLabel { outcome }).inc();
    }

    /// Counts an attempt to renew.
    pub fn renewed(&self, outcome: &'static str) {
        self.renewals.get_or_create(&OutcomeLabel { outcome }).inc();
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

    /// Calls answered with an error, since the start.
    pub fn errors(&self) -> u64 {
        self.errors.get()
    }
}

/// The outcome of what succeeded.
pub const OK: &str = "ok";
