//! The one function that every data handler runs through: it finds the caller,
//! asks for the permit, and says afterwards what came of it, to the audit and
//! to the metrics. A handler names neither.

use std::future::Future;
use std::sync::Arc;
use std::time::{Instant, SystemTime};

use fleet_kms_audit::{DataCall, DataLog};
use fleet_kms_keyring::Version;
use fleet_kms_transport::Clock;
use tonic::{Request, Response, Status};

use crate::authz::{Action, Denied, Permit, Policy};
use crate::caller::Caller;
use crate::grpc_code::DataError;
use crate::metrics::Metrics;

/// What a handler works with.
pub struct Call<A, In> {
    /// Proof that the caller may, with its cluster.
    pub permit: Permit<A>,
    /// Who calls.
    pub caller: Caller,
    /// What it asks.
    pub message: In,
    /// When it asked.
    pub now: SystemTime,
}

/// What came of one wrapped DEK, for the audit.
#[derive(Debug, Clone, Copy)]
pub struct Said {
    /// Under which version, if known.
    pub version: Option<Version>,
    /// A closed label.
    pub outcome: &'static str,
}

impl Said {
    /// The DEK was wrapped or unwrapped under `version`.
    pub fn ok(version: Version) -> Self {
        Self { version: Some(version), outcome: "ok" }
    }
}

/// What handlers share.
pub struct Answers {
    policy: Arc<Policy>,
    audit: Arc<DataLog>,
    metrics: Arc<Metrics>,
    clock: Clock,
    monotonic: fn() -> Instant,
}

impl Answers {
    /// Makes the one way to answer.
    pub fn new(
        policy: Arc<Policy>,
        audit: Arc<DataLog>,
        metrics: Arc<Metrics>,
        clock: Clock,
        monotonic: fn() -> Instant,
    ) -> Self {
        Self { policy, audit, metrics, clock, monotonic }
    }

    /// Answers one request: who, may they, `handler`, say so.
    ///
    /// # Errors
    ///
    /// When the caller may not, or the handler fails.
    pub async fn answer<A, In, Out, F>(
        &self,
        operation: &'static str,
        request: Request<In>,
        handler: impl FnOnce(Call<A, In>) -> F,
    ) -> Result<Response<Out>, Status>
    where
        A: Action,
        F: Future<Output = Result<(Out, Vec<Said>), DataError>>,
    {
        let started = (self.monotonic)();
        let now = (self.clock)();
        let caller = Caller::from_connection(request.extensions());
        let who = caller.as_ref().ok().map(|caller| caller.id().to_string());
        let result = match caller {
            Err(_) => Err(Denied::NoCertificate.into()),
            Ok(caller) => match self.policy.permit::<A>(&caller) {
                Err(denied) => Err(denied.into()),
                Ok(permit) => handler(Call { permit, caller, message: request.into_inner(), now }).await,
            },
        };
        let elapsed = (self.monotonic)().saturating_duration_since(started);
        let outcome = result.as_ref().map_or_else(|error| error.code().1, |_| "ok");
        self.metrics.call(operation, outcome, elapsed);
        let said = match &result {
            Ok((_, said)) => said.clone(),
            Err(error) => vec![Said { version: None, outcome: error.code().1 }],
        };
        for said in said {
            self.audit.count(&DataCall {
                who: who.as_deref().unwrap_or("nobody"),
                operation,
                version: said.version.map(Version::get),
                outcome: said.outcome,
                elapsed,
            });
        }
        Ok(Response::new(result?.0))
    }
}
