//! The gate: a number for each request, a caller who is an admin of the fleet,
//! and how much one caller and all together may ask at once. Whoever is no admin
//! gets no further, to no replay and no limit that admins share. No role is
//! judged here.

use std::collections::HashMap;
use std::fmt::Write as _;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use axum::extract::{Request, State};
use axum::http::HeaderValue;
use axum::middleware::Next;
use axum::response::{IntoResponse as _, Response};
use fleet_kms_admin_api::Code;
use fleet_kms_admin_api::change::REQUEST_ID;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::{Instant, timeout};
use tracing::Instrument as _;

use crate::admin::refusal::Refused;
use crate::admin::{Admin, say};
use crate::authz::Denied;
use crate::caller::Caller;
use crate::request_id::is_well_formed;

/// Requests of one caller at once.
const CALLS_EACH: usize = 8;
/// Requests of all callers at once, so that the data port keeps its share.
const CALLS: usize = 64;
/// How long a request waits for its place among all.
const WAIT: Duration = Duration::from_secs(5);
/// Requests of one caller a second, in the long run.
const RATE: f64 = 50.0;
/// Requests of one caller that may come at once after a rest.
const BURST: f64 = 100.0;
/// When a caller may try again: by then its budget has grown by 50 requests.
const AGAIN_AFTER: Duration = Duration::from_secs(1);
/// Callers that are remembered; more than any fleet has admins.
const CALLERS: usize = 1_024;
/// What a caller asked for who is no admin: that is not looked at.
const ANY: &str = "admin_api";

/// The places and what each caller has left.
pub(super) struct Gate {
    places: Arc<Semaphore>,
    callers: Mutex<HashMap<String, Budget>>,
}

struct Budget {
    places: Arc<Semaphore>,
    tokens: f64,
    at: Instant,
}

/// Held while a request runs.
struct Place(#[expect(dead_code, reason = "held for their drop")] [OwnedSemaphorePermit; 2]);

impl Default for Gate {
    fn default() -> Self {
        Self { places: Arc::new(Semaphore::new(CALLS)), callers: Mutex::default() }
    }
}

impl Gate {
    async fn enter(&self, caller: &str) -> Result<Place, Refused> {
        let own = self.charge(caller, Instant::now())?;
        let of_all = timeout(WAIT, Arc::clone(&self.places).acquire_owned()).await;
        let Ok(Ok(of_all)) = of_all else {
            let (what, remedy) = ("the agent has too many admin requests", "try again in a few seconds");
            return Err(Refused::new(Code::Unavailable, what, remedy).after(AGAIN_AFTER));
        };
        Ok(Place([own, of_all]))
    }

    fn charge(&self, caller: &str, now: Instant) -> Result<OwnedSemaphorePermit, Refused> {
        let mut callers = self.callers.lock().unwrap_or_else(PoisonError::into_inner);
        if callers.len() >= CALLERS && !callers.contains_key(caller) {
            callers.retain(|_, budget| !budget.is_rested(now));
        }
        let rested = || Budget { places: Arc::new(Semaphore::new(CALLS_EACH)), tokens: BURST, at: now };
        let budget = callers.entry(caller.to_owned()).or_insert_with(rested);
        budget.refill(now);
        let too_many = |what| {
            Refused::new(Code::TooManyRequests, what, "wait as long as Retry-After says, then try again")
                .after(AGAIN_AFTER)
        };
        if budget.tokens < 1.0 {
            return Err(too_many(format!("this caller sends more than {RATE} requests a second")));
        }
        let place = Arc::clone(&budget.places).try_acquire_owned();
        let place =
            place.map_err(|_| too_many(format!("this caller has {CALLS_EACH} requests under way")))?;
        budget.tokens -= 1.0;
        Ok(place)
    }
}

impl Budget {
    fn refill(&mut self, now: Instant) {
        let since = now.saturating_duration_since(self.at).as_secs_f64();
        self.tokens = since.mul_add(RATE, self.tokens).min(BURST);
        self.at = now;
    }

    fn is_rested(&self, now: Instant) -> bool {
        let idle = now.saturating_duration_since(self.at).as_secs_f64() * RATE >= BURST;
        idle && self.places.available_permits() == CALLS_EACH
    }
}

/// Gives the request an id, the caller's own if it is well formed, and puts it
/// on the answer and on every log line about the request.
pub(super) async fn number(State(admin): State<Admin>, mut request: Request, next: Next) -> Response {
    let given = request.headers().get(REQUEST_ID).filter(|id| is_well_formed(id.as_bytes())).cloned();
    let id = given.unwrap_or_else(|| random_id(&admin));
    request.headers_mut().insert(REQUEST_ID, id.clone());
    let span = tracing::info_span!("admin", request = id.to_str().unwrap_or_default());
    let mut response = next.run(request).instrument(span).await;
    response.headers_mut().insert(REQUEST_ID, id);
    response
}

fn random_id(admin: &Admin) -> HeaderValue {
    let mut bytes = [0; 8];
    admin.agent.generator()().fill_bytes(&mut bytes);
    let mut text = String::with_capacity(16);
    for byte in bytes {
        // Writing to a string cannot fail.
        _ = write!(text, "{byte:02x}");
    }
    HeaderValue::from_str(&text).expect("hexadecimal digits are a header value")
}

/// Lets in who has a certificate and a place.
pub(super) async fn pass(State(admin): State<Admin>, mut request: Request, next: Next) -> Response {
    let caller = Caller::from_connection(request.extensions()).ok();
    let known = caller.as_ref().map_or(Err(Denied::NoCertificate), |caller| admin.agent.policy.admin(caller));
    let caller = match (known, caller) {
        (Ok(()), Some(caller)) => caller,
        (Err(denied), caller) => {
            say::denied(&admin, ANY, caller.as_ref(), denied.label());
            return Refused::from(denied).into_response();
        }
        (Ok(()), None) => unreachable!("only a caller is judged"),
    };
    let _place = match admin.gate.enter(&caller.id().to_string()).await {
        Ok(place) => place,
        Err(refused) => return refused.into_response(),
    };
    request.extensions_mut().insert(caller);
    next.run(request).await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_caller_has_a_burst_then_a_rate_and_others_are_not_its_victims() {
        let gate = Gate::default();
        let mut now = Instant::now();
        for _ in 0..100 {
            gate.charge("a", now).map(drop).unwrap();
        }
        assert!(gate.charge("a", now).is_err());
        assert!(gate.charge("b", now).is_ok());
        now += Duration::from_millis(100);
        for _ in 0..5 {
            gate.charge("a", now).map(drop).unwrap();
        }
        assert!(gate.charge("a", now).is_err());
    }

    #[test]
    fn a_caller_has_eight_places() {
        let gate = Gate::default();
        let now = Instant::now();
        let places: Vec<_> = (0..8).map(|_| gate.charge("a", now).unwrap()).collect();
        assert!(gate.charge("a", now).is_err());
        drop(places);
        assert!(gate.charge("a", now).is_ok());
    }

    #[test]
    fn rested_callers_are_forgotten_when_there_are_too_many() {
        let gate = Gate::default();
        let now = Instant::now();
        for n in 0..CALLERS {
            gate.charge(&n.to_string(), now).map(drop).unwrap();
        }
        gate.charge("new", now + Duration::from_secs(10)).map(drop).unwrap();
        assert_eq!(gate.callers.lock().unwrap().len(), 1);
    }
}
