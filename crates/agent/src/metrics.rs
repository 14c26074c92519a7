//! What the agent counts as it happens; what it reads off its memory at a
//! scrape is in `scrape.rs`. Label sets are closed; `docs/metrics.md` has one
//! line for each series.

use std::time::Duration;

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};
use prometheus_client::registry::{Registry, Unit};

/// Stands before the name of every series.
pub const PREFIX: &str = "fleet_kms_agent";

/// Labels of a call.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct CallLabels {
    operation: &'static str,
    outcome: &'static str,
}

/// Labels of a connection that came to no call.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct RefusedLabels {
    port: &'static str,
    reason: &'static str,
}

/// All metrics of the agent that are counted as things happen.
pub struct Metrics {
    calls: Family<CallLabels, Histogram, fn() -> Histogram>,
    tls_refused: Family<RefusedLabels, Counter>,
    accept_failures: Counter,
}

impl Metrics {
    /// Registers the metrics.
    pub fn register(registry: &mut Registry) -> Self {
        let registry = registry.sub_registry_with_prefix(PREFIX);
        // 25 µs to 0.8 s: a wrap takes microseconds, a deadline three seconds.
        let calls = Family::<CallLabels, Histogram, fn() -> Histogram>::new_with_constructor(|| {
            Histogram::new(exponential_buckets(0.000_025, 2.0, 16))
        });
        let help = "Time to answer a call, by operation and outcome";
        registry.register_with_unit("call_duration", help, Unit::Seconds, calls.clone());
        let tls_refused = Family::default();
        let help = "Connections that came to no call, by port and reason; most fail in the TLS handshake";
        registry.register("tls_refused", help, tls_refused.clone());
        let accept_failures = Counter::default();
        let help = "Connections that the system did not hand over, as when files run out";
        registry.register("accept_failures", help, accept_failures.clone());
        Self { calls, tls_refused, accept_failures }
    }

    /// Counts one connection that came to no call.
    pub fn tls_refused(&self, port: &'static str, reason: &'static str) {
        self.tls_refused.get_or_create(&RefusedLabels { port, reason }).inc();
    }

    /// Counts one connection that the system did not hand over.
    pub fn accept_failed(&self) {
        self.accept_failures.inc();
    }

    /// Counts one call.
    pub fn call(&self, operation: &'static str, outcome: &'static str, elapsed: Duration) {
        let labels = CallLabels { operation, outcome };
        self.calls.get_or_create(&labels).observe(elapsed.as_secs_f64());
    }
}
