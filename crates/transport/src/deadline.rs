//! The deadline of a call, by which it is answered: a layer for every gRPC port.
//!
//! `grpc-timeout` counts from the request's arrival. We answer [`MARGIN`] before the client stops waiting, so that it
//! gets our code and text instead of its own; handlers find what is left as [`Deadline`] in the request's extensions,
//! and what is still running then is dropped.

mod grpc_timeout;

use std::{
    future::Future,
    pin::Pin,
    task::{Context, Poll},
    time::Duration,
};

use pin_project_lite::pin_project;
use tokio::time::{Instant, Sleep, sleep_until};
use tonic::Status;
use tower_layer::Layer;
use tower_service::Service;

/// The time an answer needs to reach a client on the same host or site.
pub const MARGIN: Duration = Duration::from_millis(20);
/// The deadline of a call that names none or a later one; kube-apiserver's is 3 s by default.
pub const LONGEST: Duration = Duration::from_secs(10);

/// When the call must be answered: [`MARGIN`] before the client's own deadline.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Deadline(pub Instant);

impl Deadline {
    /// Returns what is left at `now`; zero once it has passed.
    pub fn remaining(&self, now: Instant) -> Duration {
        self.0.saturating_duration_since(now)
    }

    /// Sets the deadline of a call that arrived at `arrival` and whose client waits for `timeout`.
    fn of(arrival: Instant, timeout: Duration) -> Self {
        // Who waits less than two margins gets half of it: an answer in time is worth more than a longer try.
        let margin = MARGIN.min(timeout / 2);
        Self(arrival + (timeout - margin))
    }
}

/// Gives every call a [`Deadline`] and keeps it.
#[derive(Clone, Copy, Debug, Default)]
pub struct DeadlineLayer;

impl<S> Layer<S> for DeadlineLayer {
    type Service = DeadlineService<S>;

    fn layer(&self, inner: S) -> DeadlineService<S> {
        DeadlineService { inner }
    }
}

/// A service whose calls end by their deadline.
#[derive(Clone, Debug)]
pub struct DeadlineService<S> {
    inner: S,
}

impl<S, B, R> Service<http::Request<B>> for DeadlineService<S>
where
    S: Service<http::Request<B>, Response = http::Response<R>>,
    R: Default,
{
    type Response = http::Response<R>;
    type Error = S::Error;
    type Future = DeadlineFuture<S::Future>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(context)
    }

    fn call(&mut self, mut request: http::Request<B>) -> Self::Future {
        let arrival = Instant::now();
        let timeout = match grpc_timeout::parse(request.headers()) {
            Ok(timeout) => timeout.map_or(LONGEST, |timeout| timeout.min(LONGEST)),
            Err(malformed) => {
                return DeadlineFuture::refused(Status::invalid_argument(malformed.to_string()));
            }
        };
        if timeout.is_zero() {
            return DeadlineFuture::refused(exceeded());
        }
        let deadline = Deadline::of(arrival, timeout);
        request.extensions_mut().insert(deadline);
        let call = self.inner.call(request);
        DeadlineFuture { state: State::Running { call, sleep: sleep_until(deadline.0) } }
    }
}

fn exceeded() -> Status {
    Status::deadline_exceeded("the call could not be answered before its deadline")
}

pin_project! {
    /// A call with its deadline.
    #[derive(Debug)]
    pub struct DeadlineFuture<F> {
        #[pin]
        state: State<F>,
    }
}

pin_project! {
    #[project = StateProjection]
    #[derive(Debug)]
    enum State<F> {
        // Answered without being tried.
        Refused { status: Option<Status> },
        Running { #[pin] call: F, #[pin] sleep: Sleep },
    }
}

impl<F> DeadlineFuture<F> {
    fn refused(status: Status) -> Self {
        Self { state: State::Refused { status: Some(status) } }
    }
}

impl<F, R, E> Future for DeadlineFuture<F>
where
    F: Future<Output = Result<http::Response<R>, E>>,
    R: Default,
{
    type Output = F::Output;

    fn poll(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<F::Output> {
        match self.project().state.project() {
            StateProjection::Refused { status } => {
                Poll::Ready(Ok(status.take().expect("a future is not polled after it is done").into_http()))
            }
            StateProjection::Running { call, sleep } => match call.poll(context) {
                Poll::Ready(answer) => Poll::Ready(answer),
                Poll::Pending => sleep.poll(context).map(|()| Ok(exceeded().into_http())),
            },
        }
    }
}

#[cfg(test)]
mod tests;
