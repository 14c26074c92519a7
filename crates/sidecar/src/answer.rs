//! What every answer to kube-apiserver has in common: its deadline, and that it
//! is counted, logged and remembered for `/readyz`.
//!
//! Every handler's body runs through [`Answers::answer`]; a handler names no
//! metric, no log line and no gRPC code.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use fleet_kms_transport::deadline::Deadline;
use tokio::sync::watch;
use tokio::time::Instant;
use tonic::{Request, Response, Status};

use crate::errors::chain;
use crate::grpc_code::CallError;
use crate::metrics::{Metrics, OK, Operation};
use crate::request_id::{self, RequestId, RequestIds};

/// Between two log lines about the same outcome of the same operation. During an
/// outage every call fails alike.
const LOG_EVERY: Duration = Duration::from_secs(10);

/// The time for a call that came without a deadline, as in tests that serve the
/// handlers alone. `transport`'s layer gives every call one.
const DEFAULT_TIME: Duration = Duration::from_secs(10);

/// How much earlier than `transport`'s layer we give up, so that the answer says
/// why.
const OWN_MARGIN: Duration = Duration::from_millis(5);

/// One call: its message, and until when it must be answered.
#[derive(Debug)]
pub struct Call<T> {
    /// What kube-apiserver sent.
    pub message: T,
    /// When an answer is of no more use.
    pub deadline: Instant,
}

/// Answers calls. Clones are the same.
#[derive(Debug, Clone)]
pub struct Answers(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    metrics: Metrics,
    readiness: watch::Sender<Result<(), String>>,
    logged: Mutex<HashMap<(Operation, &'static str), Logged>>,
    ids: RequestIds,
}

#[derive(Debug)]
struct Logged {
    last: Instant,
    left_out: u64,
}

impl Answers {
    /// Not ready until something succeeds. `seed` is this process's own.
    pub fn new(metrics: Metrics, seed: u64) -> Self {
        let readiness = watch::Sender::new(Err("no kms-agent has answered yet".to_owned()));
        let ids = RequestIds::new(seed);
        Self(Arc::new(Shared { metrics, readiness, logged: Mutex::default(), ids }))
    }

    /// Runs the body of one handler and makes its outcome known.
    pub async fn answer<Q, A, F>(
        &self,
        operation: Operation,
        request: Request<Q>,
        body: impl FnOnce(Call<Q>) -> F,
    ) -> Result<Response<A>, Status>
    where
        F: Future<Output = Result<A, CallError>>,
    {
        let arrived = Instant::now();
        let deadline = match request.extensions().get::<Deadline>() {
            Some(Deadline(deadline)) => *deadline - OWN_MARGIN,
            None => arrived + DEFAULT_TIME,
        };
        let id = self.0.ids.next();
        let result = request_id::scope(id, body(Call { message: request.into_inner(), deadline })).await;
        let now = Instant::now();
        let outcome = result.as_ref().map_or_else(CallError::outcome, |_| OK);
        let (took, left) = (now.duration_since(arrived), deadline.saturating_duration_since(now));
        self.0.metrics.answered(operation, outcome, took, left);
        tracing::debug!(request = %id, operation = operation.as_str(), outcome, ?took, "answered");
        if operation != Operation::V1Version {
            self.note_health(result.as_ref().err());
        }
        result.map(Response::new).map_err(|error| {
            self.log(id, operation, &error, now);
            Status::from(error)
        })
    }

    /// Remembers what a real call says about this node.
    pub fn note_health(&self, error: Option<&CallError>) {
        let readiness = match error {
            Some(error) if error.is_node_failure() => Err(error.text()),
            _ => Ok(()),
        };
        self.0.readiness.send_modify(|known| *known = readiness);
    }

    /// What the last real call said: for `/readyz`.
    pub fn readiness(&self) -> Result<(), String> {
        self.0.readiness.borrow().clone()
    }

    /// Waits until a call has failed for this node's sake; at once if the last
    /// one did.
    pub async fn in_trouble(&self) {
        // Fails only when there is no sender any more, and this is one.
        let _ = self.0.readiness.subscribe().wait_for(Result::is_err).await;
    }

    fn log(&self, id: RequestId, operation: Operation, error: &CallError, now: Instant) {
        let mut logged = self.0.logged.lock().unwrap_or_else(PoisonError::into_inner);
        let left_out = match logged.get_mut(&(operation, error.outcome())) {
            Some(entry) if now.duration_since(entry.last) < LOG_EVERY => {
                entry.left_out += 1;
                return;
            }
            Some(entry) => std::mem::take(&mut entry.left_out),
            None => 0,
        };
        logged.insert((operation, error.outcome()), Logged { last: now, left_out: 0 });
        drop(logged);
        let operation = operation.as_str();
        tracing::warn!(request = %id, operation, error = chain(error), left_out, "a call of kube-apiserver failed");
    }
}
