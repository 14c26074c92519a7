//! What the agent counts as it happens; what it reads off its memory at a
//! scrape is in `scrape.rs`. Label sets are closed; `docs/metrics.md` has one
//! line for each series.

use std::sync::Arc;
use std::time::Duration;

use fleet_kms_transport::{ConnectionEvent, Observer, Refusal};
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

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ReasonLabel {
    reason: &'static str,
}

/// All metrics of the agent that are counted as things happen.
pub struct Metrics {
    calls: Family<CallLabels, Histogram, fn() -> Histogram>,
    refused: Family<ReasonLabel, Counter>,
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
        let refused = Family::<ReasonLabel, Counter>::default();
        let help = "Connections that came to no call, by reason";
        registry.register("refused_connections", help, refused.clone());
        // A closed set is there from the start, so that a first event shows as an increase.
        for reason in Refusal::LABELS {
            drop(refused.get_or_create(&ReasonLabel { reason }));
        }
        let accept_failures = Counter::default();
        let help = "Connections that the system did not hand over, as when files run out";
        registry.register("accept_failures", help, accept_failures.clone());
        Self { calls, refused, accept_failures }
    }

    /// Counts one call.
    pub fn call(&self, operation: &'static str, outcome: &'static str, elapsed: Duration) {
        let labels = CallLabels { operation, outcome };
        self.calls.get_or_create(&labels).observe(elapsed.as_secs_f64());
    }

    /// Counts connections that come to no call; a denied peer's calls are in the
    /// audit.
    pub fn observer(self: &Arc<Self>) -> Observer {
        let metrics = Arc::clone(self);
        Arc::new(move |event| {
            match event {
                ConnectionEvent::Refused { refusal, .. } => {
                    metrics.refused.get_or_create(&ReasonLabel { reason: refusal.label() }).inc();
                }
                ConnectionEvent::AcceptFailed(_) => drop(metrics.accept_failures.inc()),
            }
            tracing::debug!(?event, "a connection was refused");
        })
    }
}
