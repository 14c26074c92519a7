//! The layer over a service that takes a given time.

use std::convert::Infallible;

use tonic::Code;
use tower::{ServiceExt, service_fn};

use super::*;

/// Calls a handler that needs `work`, and returns the answer's code and the time it took.
async fn call(timeout: Option<&str>, work: Duration) -> (Code, Duration) {
    let service = DeadlineLayer.layer(service_fn(move |_: http::Request<()>| async move {
        tokio::time::sleep(work).await;
        Ok::<_, Infallible>(Status::ok("").into_http::<String>())
    }));
    let mut request = http::Request::new(());
    if let Some(timeout) = timeout {
        request.headers_mut().insert("grpc-timeout", timeout.parse().unwrap());
    }
    let start = Instant::now();
    let response = service.oneshot(request).await.unwrap();
    (Status::from_header_map(response.headers()).unwrap().code(), start.elapsed())
}

#[tokio::test(start_paused = true)]
async fn a_late_call_is_answered_20_ms_before_the_clients_deadline() {
    let (code, took) = call(Some("3000m"), Duration::from_secs(5)).await;
    assert_eq!((code, took), (Code::DeadlineExceeded, Duration::from_millis(2_980)));
}

#[tokio::test(start_paused = true)]
async fn a_call_in_time_is_left_alone() {
    let (code, took) = call(Some("3S"), Duration::from_millis(2_970)).await;
    assert_eq!((code, took), (Code::Ok, Duration::from_millis(2_970)));
}

#[tokio::test(start_paused = true)]
async fn no_deadline_and_a_far_one_mean_10_s() {
    for timeout in [None, Some("1H")] {
        let (code, took) = call(timeout, Duration::from_secs(60)).await;
        assert_eq!((code, took), (Code::DeadlineExceeded, LONGEST - MARGIN));
    }
}

#[tokio::test(start_paused = true)]
async fn a_deadline_shorter_than_the_margin_is_answered_half_way() {
    let (code, took) = call(Some("10m"), Duration::from_secs(1)).await;
    assert_eq!((code, took), (Code::DeadlineExceeded, Duration::from_millis(5)));
    let (code, took) = call(Some("0n"), Duration::ZERO).await;
    assert_eq!((code, took), (Code::DeadlineExceeded, Duration::ZERO));
}

#[tokio::test(start_paused = true)]
async fn a_malformed_deadline_is_the_callers_fault() {
    assert_eq!(call(Some("3s"), Duration::ZERO).await.0, Code::InvalidArgument);
}

#[tokio::test(start_paused = true)]
async fn a_handler_sees_what_is_left_and_is_dropped_at_the_deadline() {
    let (alive, dropped) = tokio::sync::oneshot::channel::<()>();
    let alive = std::sync::Mutex::new(Some(alive));
    let service = DeadlineLayer.layer(service_fn(|request: http::Request<()>| {
        let deadline = *request.extensions().get::<Deadline>().unwrap();
        assert_eq!(deadline.remaining(Instant::now()), Duration::from_millis(980));
        let alive = alive.lock().unwrap().take();
        async move {
            let _alive = alive;
            std::future::pending::<Result<http::Response<String>, Infallible>>().await
        }
    }));
    let mut request = http::Request::new(());
    request.headers_mut().insert("grpc-timeout", "1S".parse().unwrap());
    let response = service.oneshot(request).await.unwrap();
    assert_eq!(response.status(), http::StatusCode::OK, "a gRPC error travels in the trailers");
    assert!(dropped.await.is_err());
}
