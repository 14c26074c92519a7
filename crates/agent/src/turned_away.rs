//! Connections that came to no call: counted, audited and logged.
//!
//! What fails in the TLS handshake has no identity yet that could be believed,
//! so it goes by its address. Nothing here waits, and no flood fills the log or
//! the audit: both keep a few lines and a count.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use fleet_kms_audit::{Call, DataLog, Denial};
use fleet_kms_transport::{Clock, ConnectionEvent, Observer, Refusal};

use crate::errors::chain;
use crate::metrics::Metrics;

/// Between two log lines about one reason on one port.
const LOG_EVERY: Duration = Duration::from_secs(10);
/// Who connects over a local socket.
const LOCAL: &str = "local";

/// Hears of refused connections.
pub struct TurnedAway {
    metrics: Arc<Metrics>,
    audit: Arc<DataLog>,
    clock: Clock,
    monotonic: fn() -> Instant,
    /// Keyed by closed labels, so it stays small.
    logged: Mutex<HashMap<(&'static str, &'static str), Logged>>,
}

struct Logged {
    last: Instant,
    left_out: u64,
}

impl TurnedAway {
    /// Makes the one who hears of them.
    pub fn new(
        metrics: Arc<Metrics>,
        audit: Arc<DataLog>,
        clock: Clock,
        monotonic: fn() -> Instant,
    ) -> Arc<Self> {
        Arc::new(Self { metrics, audit, clock, monotonic, logged: Mutex::default() })
    }

    /// Returns what the connection loops tell.
    pub fn observer(self: Arc<Self>) -> Observer {
        Arc::new(move |event| match event {
            ConnectionEvent::Refused { port, source, refusal } => self.refused(port, *source, refusal),
            ConnectionEvent::AcceptFailed(error) => {
                self.metrics.accept_failed();
                self.log("any", "accept_failed", || {
                    format!("connections cannot be accepted: {error}; is LimitNOFILE too low?")
                });
            }
        })
    }

    fn refused(&self, port: &'static str, source: Option<IpAddr>, refusal: &Refusal) {
        tracing::debug!(port, ?source, ?refusal, "a connection was refused");
        self.metrics.tls_refused(port, refusal.label());
        if !refusal.is_denial() {
            return;
        }
        let address = source.map_or_else(|| LOCAL.to_owned(), |source| source.to_canonical().to_string());
        let operation = operation(port);
        let outcome = refusal.label();
        let call = Call { identity: &address, cluster: None, operation, version: None, outcome };
        self.audit.count(&call, 1, Duration::ZERO);
        let denial = Denial { identity: &address, address: &address, operation, reason: outcome };
        self.audit.denied(&denial, (self.clock)());
        self.log(port, outcome, || format!("a connection from {address} was refused: {}", chain(refusal)));
    }

    /// Logs the first of many.
    fn log(&self, port: &'static str, reason: &'static str, text: impl FnOnce() -> String) {
        let now = (self.monotonic)();
        let mut logged = self.logged.lock().unwrap_or_else(PoisonError::into_inner);
        let left_out = match logged.get_mut(&(port, reason)) {
            Some(entry) if now.saturating_duration_since(entry.last) < LOG_EVERY => {
                entry.left_out += 1;
                return;
            }
            Some(entry) => entry.left_out,
            None => 0,
        };
        logged.insert((port, reason), Logged { last: now, left_out: 0 });
        drop(logged);
        tracing::warn!(port, reason, left_out, "{}", text());
    }
}

/// What the audit calls a connection to a port.
fn operation(port: &'static str) -> &'static str {
    match port {
        "data" => "connect_data",
        "enrolment" => "connect_enrolment",
        "admin" => "connect_admin",
        _ => "connect",
    }
}

#[cfg(test)]
mod tests {
    use std::time::SystemTime;

    use fleet_kms_audit::{Clocks, DataOptions};
    use fleet_kms_transport::TlsError;
    use prometheus_client::encoding::text::encode;
    use prometheus_client::registry::Registry;

    use super::*;

    #[test]
    fn what_this_side_refuses_is_audited_by_address_and_a_flood_fills_neither_audit_nor_log() {
        let directory = tempfile::tempdir().unwrap();
        let now = SystemTime::UNIX_EPOCH + Duration::from_secs(1_800_000_000);
        let monotonic = fleet_kms_process::clock::monotonic;
        let clocks = Clocks { wall: Arc::new(move || now), monotonic };
        let audit = DataLog::open(directory.path(), DataOptions::default(), clocks).unwrap();
        let audit = Arc::new(audit);
        let mut registry = Registry::default();
        let metrics = Arc::new(Metrics::register(&mut registry));
        let turned_away = TurnedAway::new(metrics, Arc::clone(&audit), Arc::new(move || now), monotonic);
        let observer = Arc::clone(&turned_away).observer();
        let hear = |refusal: &Refusal| {
            let source = Some(IpAddr::from([127, 0, 0, 2]));
            observer(&ConnectionEvent::Refused { port: "data", source, refusal });
        };
        (0..1_000).for_each(|_| hear(&Refusal::Handshake(TlsError::NoCertificate)));
        hear(&Refusal::Handshake(TlsError::Io(std::io::ErrorKind::ConnectionReset.into())));
        audit.flush(now).unwrap();

        let lines = std::fs::read_to_string(directory.path().join("data-000001.jsonl")).unwrap();
        let denied = lines.lines().filter(|line| line.contains("\"denied\"")).collect::<Vec<_>>();
        assert_eq!(denied.len(), fleet_kms_audit::MAX_DETAILS_EACH, "{lines}");
        assert!(denied[0].contains("127.0.0.2") && denied[0].contains("no_certificate"), "{lines}");
        assert!(lines.contains("\"calls\":1000") && lines.contains("connect_data"), "{lines}");
        assert!(!lines.contains("broken"), "who hangs up was not refused: {lines}");
        assert_eq!(turned_away.logged.lock().unwrap()[&("data", "no_certificate")].left_out, 999);
        let mut text = String::new();
        encode(&mut text, &registry).unwrap();
        for (reason, count) in [("no_certificate", 1_000), ("broken", 1)] {
            let line =
                format!("fleet_kms_agent_tls_refused_total{{port=\"data\",reason=\"{reason}\"}} {count}");
            assert!(text.contains(&line), "{text}");
        }
    }
}
