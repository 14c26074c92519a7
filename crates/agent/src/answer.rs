//! The one function that every data handler runs through: it finds the caller,
//! asks for the permit, and says afterwards what came of it, to the audit and
//! to the metrics. A handler names neither.

use std::collections::HashMap;
use std::future::Future;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use fleet_kms_audit::{Call as AuditCall, CallRecord, DataLog, Denial, NotRecorded};
use fleet_kms_identity::ClusterUuid;
use fleet_kms_keyring::Version;
use fleet_kms_transport::Clock;
use tonic::{Request, Response, Status};
use tracing::Instrument as _;

use crate::authz::{Action, Denied, Permit, Policy};
use crate::caller::Caller;
use crate::enrolment::issue::Issuer;
use crate::errors::chain;
use crate::grpc_code::DataError;
use crate::metrics::Metrics;
use crate::request_id::is_well_formed;
use crate::sightings::Sightings;

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

/// The metadata key that carries the id of a sidecar's call (docs/wire-format.md).
const REQUEST_ID: &str = "x-request-id";

/// Between two log lines about the same outcome of the same operation: what
/// fails for one node often fails for all.
const LOG_EVERY: Duration = Duration::from_secs(10);

/// The outcome of what was done.
const OK: &str = "ok";
/// How long a call waits for its record before it counts as one that cannot be
/// recorded: a third of what an API server waits for its answer.
const RECORD_WAIT: Duration = Duration::from_secs(1);

/// Who calls without a certificate.
const NOBODY: &str = "nobody";

/// What came of one wrapped DEK, for the audit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Said {
    /// Under which version, if known.
    pub version: Option<Version>,
    /// A closed label.
    pub outcome: &'static str,
}

impl Said {
    /// The DEK was wrapped or unwrapped under `version`.
    pub fn ok(version: Version) -> Self {
        Self { version: Some(version), outcome: OK }
    }
}

/// What handlers share.
pub struct Answers {
    policy: Arc<Policy>,
    issuer: Arc<Issuer>,
    audit: Arc<DataLog>,
    metrics: Arc<Metrics>,
    sightings: Arc<Sightings>,
    clock: Clock,
    monotonic: fn() -> Instant,
    failures: Failures,
}

impl Answers {
    /// Makes the one way to answer.
    pub fn new(
        (policy, issuer): (Arc<Policy>, Arc<Issuer>),
        audit: Arc<DataLog>,
        metrics: Arc<Metrics>,
        sightings: Arc<Sightings>,
        clock: Clock,
        monotonic: fn() -> Instant,
    ) -> Self {
        Self { policy, issuer, audit, metrics, sightings, clock, monotonic, failures: Failures::default() }
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
        let id = request.metadata().get(REQUEST_ID).map_or(&b""[..], |id| id.as_encoded_bytes());
        let id = std::str::from_utf8(id).ok().filter(|id| is_well_formed(id.as_bytes())).unwrap_or("-");
        let span = tracing::info_span!("call", operation, request = id);
        self.answer_one(operation, request, handler).instrument(span).await
    }

    async fn answer_one<A, In, Out, F>(
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
        let caller = Caller::from_connection(request.extensions()).ok();
        let permit = match &caller {
            Some(caller) => self.permit(caller).await.map(|permit| (permit, caller.clone())),
            None => Err(Denied::NoCertificate),
        };
        let permitted = permit.is_ok();
        let result = match permit {
            Ok(_) if self.audit.refuses() => Err(NotRecorded.into()),
            Ok((permit, caller)) => {
                handler(Call { permit, caller, message: request.into_inner(), now }).await
            }
            Err(denied) => Err(denied.into()),
        };
        let elapsed = (self.monotonic)().saturating_duration_since(started);
        let said = match &result {
            Ok((_, said)) => said.clone(),
            Err(error) => vec![Said { version: None, outcome: error.code().1 }],
        };
        let each = permitted && self.audit.records_each() && !matches!(result, Err(DataError::Audit(_)));
        let result = match self.say(operation, &caller, &said, elapsed, each).await {
            Ok(()) => result,
            Err(not_recorded) => Err(not_recorded.into()),
        };
        // A batch counts as its first item that was not simply done.
        let outcome = match &result {
            Ok((_, said)) => {
                said.iter().map(|said| said.outcome).find(|outcome| *outcome != OK).unwrap_or(OK)
            }
            Err(error) => error.code().1,
        };
        self.metrics.call(operation, outcome, elapsed);
        tracing::debug!(outcome, ?elapsed, "answered");
        if let Err(error) = &result {
            self.failures.log(operation, outcome, error, &caller, (self.monotonic)());
        }
        if let Err(DataError::Denied(denied)) = &result {
            self.say_denied(operation, &caller, *denied, now);
        }
        Ok(Response::new(result?.0))
    }

    /// Asks the table; after a restore once more, when the caller's certificate
    /// was taken as its current one.
    async fn permit<A: Action>(&self, caller: &Caller) -> Result<Permit<A>, Denied> {
        match self.policy.permit::<A>(caller) {
            Err(denied) if denied.may_be_forgotten() && self.issuer.readopt(caller.certificate()).await => {
                self.policy.permit::<A>(caller)
            }
            permit => permit,
        }
    }

    /// Counts what came of a call in the audit, or records it: one entry for
    /// each version and outcome.
    async fn say(
        &self,
        operation: &'static str,
        caller: &Option<Caller>,
        said: &[Said],
        took: Duration,
        each: bool,
    ) -> Result<(), NotRecorded> {
        let identity = caller.as_ref().map_or_else(|| NOBODY.to_owned(), |caller| caller.id().to_string());
        let cluster = caller.as_ref().and_then(|caller| caller.id().subject.cluster());
        let mut counted: Vec<(Said, u64)> = Vec::new();
        for said in said {
            match counted.iter_mut().find(|(known, _)| known == said) {
                Some((_, items)) => *items += 1,
                None => counted.push((*said, 1)),
            }
        }
        let cluster = cluster.map(ClusterUuid::as_bytes);
        if each {
            let (identity, cluster) = (Arc::<str>::from(identity), cluster.copied());
            let record = |(Said { version, outcome }, items): (Said, u64)| CallRecord {
                identity: Arc::clone(&identity),
                cluster,
                operation,
                version: version.map(Version::get),
                outcome,
                items,
                took,
            };
            return self.record(counted.into_iter().map(record).collect()).await;
        }
        for (said, items) in counted {
            let version = said.version.map(Version::get);
            let call = AuditCall { identity: &identity, cluster, operation, version, outcome: said.outcome };
            self.audit.count(&call, items, took);
        }
        Ok(())
    }

    /// Waits until a call is recorded, off the disk and not for ever.
    async fn record(&self, calls: Vec<CallRecord>) -> Result<(), NotRecorded> {
        let (done, recorded) = tokio::sync::oneshot::channel();
        // Nobody hears it who has gone: the call's deadline has passed.
        self.audit.record(calls, Box::new(move |result| _ = done.send(result)));
        match tokio::time::timeout(RECORD_WAIT, recorded).await {
            Ok(Ok(result)) => result,
            Ok(Err(_)) | Err(_) => self.audit.late(),
        }
    }

    fn say_denied(&self, operation: &'static str, caller: &Option<Caller>, denied: Denied, now: SystemTime) {
        let identity = caller.as_ref().map_or_else(|| NOBODY.to_owned(), |caller| caller.id().to_string());
        let address = caller.as_ref().map_or_else(String::new, |caller| caller.address().ip().to_string());
        let denial = Denial { identity: &identity, address: &address, operation, reason: denied.label() };
        self.audit.denied(&denial, now);
        if let (Denied::Superseded, Some(caller)) = (denied, caller) {
            self.sightings.superseded(caller);
        }
    }
}

/// Says why calls fail, with the id that their senders logged, and not once for
/// each call.
#[derive(Default)]
struct Failures(Mutex<HashMap<Kind, Logged>>);

/// Operation and outcome of a failure.
type Kind = (&'static str, &'static str);
/// When it was logged last, and how many were not since.
type Logged = (Instant, u64);

impl Failures {
    fn log(
        &self,
        operation: &'static str,
        outcome: &'static str,
        error: &DataError,
        caller: &Option<Caller>,
        now: Instant,
    ) {
        let mut logged = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let left_out = match logged.get_mut(&(operation, outcome)) {
            Some((last, left_out)) if now.saturating_duration_since(*last) < LOG_EVERY => {
                *left_out += 1;
                return;
            }
            Some((_, left_out)) => *left_out,
            None => 0,
        };
        logged.insert((operation, outcome), (now, 0));
        drop(logged);
        let caller = caller.as_ref().map_or_else(|| NOBODY.to_owned(), |caller| caller.id().to_string());
        tracing::warn!(caller, outcome, error = chain(error), left_out, "a call was refused");
    }
}
