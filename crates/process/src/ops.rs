//! The operations port: `/livez`, `/readyz` and `/metrics`, for probes, scrapers and people with curl.
//!
//! `/livez` says only that the process answers: it must never look at a peer, a store or a disk, or an outage
//! elsewhere restarts this process too. `/readyz` says in one line why not; whoever gives the state must have it at
//! hand, because a probe must not cause a call. On another address than loopback there is only `/metrics`, as
//! OpenMetrics for who asks for it and as Prometheus text for everybody else.

mod text_format;

use crate::logging;
use bytes::Bytes;
use fleet_kms_transport::{Connections, Drain, ServeLimits, TcpPort};
use http::{HeaderMap, Method, Request, Response, StatusCode, header};
use http_body_util::Full;
use hyper::body::Incoming;
use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric};
use prometheus_client::metrics::counter::ConstCounter;
use prometheus_client::registry::Registry;
use std::convert::Infallible;
use std::future::{Ready, ready};
use std::io;
use std::net::TcpListener;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll};
use tower_service::Service;

/// Probes and scrapers are few.
const MAX_CONNECTIONS: usize = 64;
/// One address, such as a scraper's, must not keep the others out.
const MAX_CONNECTIONS_PER_SOURCE: usize = 48;

const OPENMETRICS: &str = "application/openmetrics-text";
const OPENMETRICS_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";
const METRICS_TYPE: &str = "text/plain; version=0.0.4; charset=utf-8";
const TEXT_TYPE: &str = "text/plain; charset=utf-8";

type Readiness = dyn Fn() -> Result<(), String> + Send + Sync;

/// What the port answers from.
#[derive(Clone)]
pub struct OpsState {
    registry: Arc<Registry>,
    ready: Arc<Readiness>,
}

impl OpsState {
    /// Takes the metrics and a function that tells from memory whether the process does its job, or why not.
    pub fn new(registry: Registry, ready: impl Fn() -> Result<(), String> + Send + Sync + 'static) -> Self {
        Self { registry: Arc::new(registry), ready: Arc::new(ready) }
    }

    /// Answers one request. `loopback` is whether the port is on a loopback address.
    fn answer<B>(&self, request: &Request<B>, loopback: bool) -> Response<Full<Bytes>> {
        if request.method() != Method::GET && request.method() != Method::HEAD {
            return text(StatusCode::METHOD_NOT_ALLOWED, "only GET and HEAD\n");
        }
        match (request.uri().path(), loopback) {
            ("/metrics", _) => self.metrics(request.headers()),
            ("/livez", true) => text(StatusCode::OK, "ok\n"),
            ("/readyz", true) => match (self.ready)() {
                Ok(()) => text(StatusCode::OK, "ok\n"),
                Err(reason) => text(StatusCode::SERVICE_UNAVAILABLE, format!("{reason}\n")),
            },
            (_, true) => text(StatusCode::NOT_FOUND, "here are /livez, /readyz and /metrics\n"),
            (_, false) => text(StatusCode::NOT_FOUND, "here is /metrics\n"),
        }
    }

    fn metrics(&self, headers: &HeaderMap) -> Response<Full<Bytes>> {
        let mut accepted = headers.get_all(header::ACCEPT).iter().filter_map(|value| value.to_str().ok());
        let openmetrics = accepted.any(|value| value.contains(OPENMETRICS));
        let mut page = String::new();
        match prometheus_client::encoding::text::encode(&mut page, &self.registry) {
            Ok(()) if openmetrics => respond(StatusCode::OK, OPENMETRICS_TYPE, page),
            Ok(()) => respond(StatusCode::OK, METRICS_TYPE, text_format::from_openmetrics(&page)),
            Err(_) => text(StatusCode::INTERNAL_SERVER_ERROR, "the metrics could not be written\n"),
        }
    }
}

fn text(status: StatusCode, body: impl Into<Bytes>) -> Response<Full<Bytes>> {
    respond(status, TEXT_TYPE, body)
}

fn respond(status: StatusCode, content: &'static str, body: impl Into<Bytes>) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(body.into()));
    *response.status_mut() = status;
    response.headers_mut().insert(header::CONTENT_TYPE, header::HeaderValue::from_static(content));
    response
}

/// Serves the port until `drain`.
///
/// # Errors
/// When the runtime cannot watch the listener.
pub async fn serve(
    listener: TcpListener,
    state: OpsState,
    connections: Connections,
    drain: Drain,
) -> io::Result<()> {
    let port = Port { loopback: listener.local_addr()?.ip().is_loopback(), state };
    let limits = ServeLimits {
        max_connections: MAX_CONNECTIONS,
        max_connections_per_source: MAX_CONNECTIONS_PER_SOURCE,
        ..ServeLimits::default()
    };
    fleet_kms_transport::serve(TcpPort::from_std(listener)?, port, limits, connections, drain).await;
    Ok(())
}

/// The port as the connection loop calls it.
#[derive(Clone)]
struct Port {
    state: OpsState,
    loopback: bool,
}

impl Service<Request<Incoming>> for Port {
    type Response = Response<Full<Bytes>>;
    type Error = Infallible;
    type Future = Ready<Result<Self::Response, Infallible>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<Incoming>) -> Self::Future {
        ready(Ok(self.state.answer(&request, self.loopback)))
    }
}

/// Adds the counter of log lines that were lost because nobody read stderr. `registry` brings the program's prefix.
pub fn register_log_drops(registry: &mut Registry, log: &logging::Guard) {
    registry.register_collector(Box::new(LogDrops(log.dropped_counter())));
}

#[derive(Debug)]
struct LogDrops(Arc<AtomicU64>);

impl Collector for LogDrops {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), std::fmt::Error> {
        let counter = ConstCounter::new(self.0.load(Ordering::Relaxed));
        let help = "Log lines dropped because stderr was not read";
        counter.encode(encoder.encode_descriptor("log_lines_dropped", help, None, counter.metric_type())?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{listen, runtime};
    use prometheus_client::metrics::counter::Counter;
    use std::io::{Read, Write};
    use std::net::{SocketAddr, TcpStream};

    fn state(ready: Result<(), String>) -> OpsState {
        let mut registry = Registry::default();
        let calls = Counter::<u64>::default();
        calls.inc_by(7);
        registry.register("calls", "Calls", calls);
        OpsState::new(registry, move || ready.clone())
    }

    fn status(method: &str, path: &str, loopback: bool) -> u16 {
        let request = Request::builder().method(method).uri(path).body(()).unwrap();
        state(Ok(())).answer(&request, loopback).status().as_u16()
    }

    #[test]
    fn another_address_than_loopback_serves_metrics_only() {
        for path in ["/livez", "/readyz"] {
            assert_eq!((status("GET", path, true), status("GET", path, false)), (200, 404));
        }
        assert_eq!((status("GET", "/metrics", true), status("GET", "/metrics", false)), (200, 200));
    }

    #[test]
    fn other_methods_and_paths_are_refused() {
        assert_eq!(status("POST", "/livez", true), 405);
        assert_eq!(status("HEAD", "/livez", true), 200);
        assert_eq!(status("GET", "/", true), 404);
    }

    /// One HTTP/1.1 request, as a probe makes it.
    fn get(address: SocketAddr, path: &str) -> String {
        let mut stream = TcpStream::connect(address).unwrap();
        write!(stream, "GET {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n").unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        answer
    }

    #[test]
    fn who_asks_for_openmetrics_gets_it() {
        let accept = "application/openmetrics-text;version=1.0.0;q=0.8,text/plain;q=0.5";
        let request = Request::builder().uri("/metrics").header(header::ACCEPT, accept).body(()).unwrap();
        let answer = state(Ok(())).answer(&request, true);
        assert_eq!(answer.headers()[header::CONTENT_TYPE], OPENMETRICS_TYPE);
    }

    #[test]
    fn lost_log_lines_are_a_metric_and_logging_starts_once() {
        let log = logging::init(logging::Format::Text, logging::Filter::default()).unwrap();
        let twice = logging::init(logging::Format::Text, logging::Filter::default());
        assert!(matches!(twice, Err(logging::InitError::Twice)));
        let mut registry = Registry::default();
        register_log_drops(&mut registry, &log);
        let mut page = String::new();
        prometheus_client::encoding::text::encode(&mut page, &registry).unwrap();
        assert!(page.contains("log_lines_dropped_total 0\n"), "{page}");
    }

    #[test]
    fn the_port_tells_why_it_is_not_ready_and_ends_by_the_drain() {
        let listener = listen::tcp("127.0.0.1:0".parse().unwrap()).unwrap();
        let address = listener.local_addr().unwrap();
        let drain = Drain::new();
        let served = {
            let (state, drain) = (state(Err("no agent answers".to_owned())), drain.clone());
            std::thread::spawn(move || {
                let runtime = runtime::current_thread(1).unwrap();
                runtime.block_on(serve(listener, state, Connections::default(), drain))
            })
        };
        assert!(get(address, "/livez").starts_with("HTTP/1.1 200 "));
        let answer = get(address, "/readyz");
        assert!(answer.starts_with("HTTP/1.1 503 ") && answer.ends_with("no agent answers\n"), "{answer}");
        let metrics = get(address, "/metrics");
        assert!(metrics.contains("# TYPE calls_total counter\ncalls_total 7\n"), "{metrics}");
        assert!(metrics.contains(METRICS_TYPE), "{metrics}");
        drain.drain();
        served.join().unwrap().unwrap();
    }
}
