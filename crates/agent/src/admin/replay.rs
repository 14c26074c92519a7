//! A change runs to its end although its caller goes away, and a change that
//! comes again with its idempotency key is answered, not made, again.
//!
//! The answers are kept in this agent's memory for a while: a key makes a
//! retry after a broken connection harmless, not one after an agent's restart.
//! A join token's secret is never kept.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use axum::body::{Body, Bytes, to_bytes};
use axum::extract::{Request, State};
use axum::http::{HeaderMap, StatusCode, header};
use axum::middleware::Next;
use axum::response::{IntoResponse as _, Response};
use fleet_kms_admin_api::change::{IDEMPOTENCY_KEY, MAX_IDEMPOTENCY_KEY};
use fleet_kms_admin_api::{Code, Problem};
use sha2::{Digest as _, Sha256};
use tokio::time::{Instant, timeout};
use tracing::Instrument as _;

use crate::admin::refusal::{Label, Refused, internal};
use crate::admin::{Admin, BODY_WITHIN, MAX_BODY};
use crate::caller::Caller;

/// How long an answer is kept.
const KEEP: Duration = Duration::from_secs(10 * 60);
/// Answers that are kept.
const MAX_KEPT: usize = 1_024;
/// Answers kept of one caller.
const MAX_KEPT_EACH: usize = 64;
/// The longest answer that is kept.
const MAX_ANSWER: usize = 64 << 10;

/// Marks an answer that must not be kept, because it shows a secret.
#[derive(Clone, Copy)]
pub(super) struct Secret;

/// Answers by caller and key.
#[derive(Default)]
pub(super) struct Replays(Mutex<HashMap<Key, Entry>>);

type Key = (String, String);

struct Entry {
    fingerprint: [u8; 32],
    at: Instant,
    answer: Answer,
}

#[derive(Clone)]
enum Answer {
    Pending,
    Secret,
    Kept(Kept),
}

#[derive(Clone)]
struct Kept {
    status: StatusCode,
    headers: HeaderMap,
    body: Bytes,
    problem: Option<Box<Problem>>,
    label: Option<Label>,
}

/// Runs a change in a task of its own.
pub(super) async fn run(State(admin): State<Admin>, request: Request, next: Next) -> Response {
    let key = match key_of(&request) {
        Ok(key) => key,
        Err(refused) => return refused.into_response(),
    };
    let task = async move {
        match key {
            None => next.run(request).await,
            Some(key) => once(&admin, key, request, next).await,
        }
    };
    tokio::spawn(task.in_current_span())
        .await
        .unwrap_or_else(|error| internal(&error.to_string()).into_response())
}

fn key_of(request: &Request) -> Result<Option<Key>, Refused> {
    let Some(key) = request.headers().get(IDEMPOTENCY_KEY) else { return Ok(None) };
    let good = |byte: &u8| byte.is_ascii_alphanumeric() || b"-._~".contains(byte);
    let well_formed = (1..=MAX_IDEMPOTENCY_KEY).contains(&key.len()) && key.as_bytes().iter().all(good);
    let (true, Ok(key)) = (well_formed, key.to_str()) else {
        let remedy = "use 1 to 64 of A-Z, a-z, 0-9, '-', '.', '_' and '~'";
        return Err(Refused::new(Code::InvalidRequest, "the idempotency key is not well formed", remedy));
    };
    let caller = request.extensions().get::<Caller>().map(|caller| caller.id().to_string());
    Ok(Some((caller.unwrap_or_default(), key.to_owned())))
}

async fn once(admin: &Admin, key: Key, request: Request, next: Next) -> Response {
    let (head, body) = request.into_parts();
    let Ok(Ok(body)) = timeout(BODY_WITHIN, to_bytes(body, MAX_BODY)).await else {
        let remedy = "send at most 64 KiB";
        return Refused::new(Code::BodyTooLarge, "the body is too long, too slow or broke off", remedy)
            .into_response();
    };
    // Another revision makes it another request; none is not an empty one.
    let at = head.headers.get(header::IF_MATCH).map(|at| [b"=", at.as_bytes()].concat()).unwrap_or_default();
    let mut hash = Sha256::new();
    for part in [head.method.as_str().as_bytes(), head.uri.to_string().as_bytes(), &at, &body] {
        hash.update((part.len() as u64).to_be_bytes());
        hash.update(part);
    }
    match admin.replays.begin(&key, hash.finalize().into(), Instant::now()) {
        Begun::New => {}
        Begun::Answered(answer) => return answer.into_response(),
        Begun::Refused(refused) => return refused.into_response(),
    }
    let response = next.run(Request::from_parts(head, Body::from(body))).await;
    let (response, answer) = keep(response).await;
    admin.replays.end(key, answer);
    response
}

/// What a key is at its arrival.
enum Begun {
    New,
    Answered(Kept),
    Refused(Refused),
}

impl Replays {
    fn begin(&self, key: &Key, fingerprint: [u8; 32], now: Instant) -> Begun {
        let mut entries = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        entries.retain(|_, entry| {
            matches!(entry.answer, Answer::Pending) || now.saturating_duration_since(entry.at) < KEEP
        });
        if let Some(entry) = entries.get(key) {
            return entry.meet(&fingerprint);
        }
        make_room(&mut entries, &key.0);
        if entries.len() >= MAX_KEPT {
            let remedy = "try again, or leave the idempotency key out";
            return Begun::Refused(Refused::new(Code::Unavailable, "too many changes are under way", remedy));
        }
        entries.insert(key.clone(), Entry { fingerprint, at: now, answer: Answer::Pending });
        Begun::New
    }

    fn end(&self, key: Key, answer: Option<Answer>) {
        let mut entries = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        match (answer, entries.get_mut(&key)) {
            (Some(answer), Some(entry)) => entry.answer = answer,
            _ => drop(entries.remove(&key)),
        }
    }
}

/// Forgets the oldest answer when there are too many, of this caller or in all:
/// nobody's answers keep another's change out.
fn make_room(entries: &mut HashMap<Key, Entry>, caller: &str) {
    let own = entries.keys().filter(|(of, _)| of == caller).count();
    let full = entries.len() >= MAX_KEPT;
    if own < MAX_KEPT_EACH && !full {
        return;
    }
    let answered = |entry: &Entry| !matches!(entry.answer, Answer::Pending);
    let candidates = entries.iter().filter(|((of, _), entry)| answered(entry) && (full || of == caller));
    if let Some(oldest) = candidates.min_by_key(|(_, entry)| entry.at).map(|(key, _)| key.clone()) {
        entries.remove(&oldest);
    }
}

impl Entry {
    fn meet(&self, fingerprint: &[u8; 32]) -> Begun {
        let reused =
            |detail, remedy| Begun::Refused(Refused::new(Code::IdempotencyKeyReused, detail, remedy));
        if self.fingerprint != *fingerprint {
            return reused(
                "this idempotency key came with another request",
                "use a new key for a new change",
            );
        }
        match &self.answer {
            Answer::Pending => {
                reused("this change is under way", "wait, then send it again with the same key")
            }
            Answer::Secret => reused(
                "this change was made, and its secret is not kept",
                "revoke the token and ask for another one, with a new key",
            ),
            Answer::Kept(kept) => Begun::Answered(kept.clone()),
        }
    }
}

/// Takes a copy of an answer; none of what may be tried again.
async fn keep(response: Response) -> (Response, Option<Answer>) {
    let status = response.status();
    let refused = [StatusCode::TOO_MANY_REQUESTS, StatusCode::UNAUTHORIZED, StatusCode::FORBIDDEN];
    if status.is_server_error() || refused.contains(&status) {
        return (response, None);
    }
    if response.extensions().get::<Secret>().is_some() {
        return (response, Some(Answer::Secret));
    }
    let (head, body) = response.into_parts();
    let Ok(body) = to_bytes(body, MAX_ANSWER).await else {
        return (internal("an answer to a change is longer than 64 KiB").into_response(), None);
    };
    let kept = Kept {
        status,
        headers: head.headers.clone(),
        body: body.clone(),
        problem: head.extensions.get::<Box<Problem>>().cloned(),
        label: head.extensions.get::<Label>().copied(),
    };
    (Response::from_parts(head, Body::from(body)), Some(Answer::Kept(kept)))
}

impl Kept {
    fn into_response(self) -> Response {
        let mut response = Response::new(Body::from(self.body));
        *response.status_mut() = self.status;
        *response.headers_mut() = self.headers;
        if let Some(problem) = self.problem {
            response.extensions_mut().insert(problem);
        }
        if let Some(label) = self.label {
            response.extensions_mut().insert(label);
        }
        response
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key() -> Key {
        ("admin".to_owned(), "k".to_owned())
    }

    fn kept() -> Answer {
        let (status, headers) = (StatusCode::OK, HeaderMap::new());
        Answer::Kept(Kept { status, headers, body: Bytes::from("x"), problem: None, label: None })
    }

    #[test]
    fn the_same_change_is_answered_again_and_another_one_is_refused() {
        let (replays, now) = (Replays::default(), Instant::now());
        assert!(matches!(replays.begin(&key(), [1; 32], now), Begun::New));
        assert!(matches!(replays.begin(&key(), [1; 32], now), Begun::Refused(_)), "it is under way");
        replays.end(key(), Some(kept()));
        assert!(matches!(replays.begin(&key(), [1; 32], now), Begun::Answered(_)));
        assert!(matches!(replays.begin(&key(), [2; 32], now), Begun::Refused(_)));
        let other = ("another".to_owned(), "k".to_owned());
        assert!(matches!(replays.begin(&other, [2; 32], now), Begun::New), "keys are each caller's own");
    }

    #[test]
    fn what_failed_may_be_tried_again() {
        let (replays, now) = (Replays::default(), Instant::now());
        assert!(matches!(replays.begin(&key(), [1; 32], now), Begun::New));
        replays.end(key(), None);
        assert!(matches!(replays.begin(&key(), [1; 32], now), Begun::New));
    }

    #[test]
    fn answers_are_kept_for_ten_minutes() {
        let (replays, now) = (Replays::default(), Instant::now());
        assert!(matches!(replays.begin(&key(), [1; 32], now), Begun::New));
        replays.end(key(), Some(kept()));
        assert!(matches!(replays.begin(&key(), [1; 32], now), Begun::Answered(_)));
        assert!(matches!(replays.begin(&key(), [1; 32], now + KEEP), Begun::New));
    }

    #[test]
    fn one_caller_forgets_its_own_oldest_answer_and_keeps_nobody_out() {
        let (replays, now) = (Replays::default(), Instant::now());
        let of = |caller: &str, n: usize| (caller.to_owned(), n.to_string());
        for n in 0..MAX_KEPT {
            let at = now + Duration::from_millis(n as u64);
            assert!(matches!(replays.begin(&of("loud", n), [0; 32], at), Begun::New));
            replays.end(of("loud", n), Some(kept()));
        }
        let own = replays.0.lock().unwrap().len();
        assert_eq!(own, MAX_KEPT_EACH);
        assert!(matches!(replays.begin(&key(), [1; 32], now), Begun::New));
    }

    #[test]
    fn changes_under_way_are_never_forgotten_and_are_bounded() {
        let (replays, now) = (Replays::default(), Instant::now());
        for n in 0..MAX_KEPT {
            let key = (n.to_string(), "k".to_owned());
            assert!(matches!(replays.begin(&key, [0; 32], now), Begun::New));
        }
        assert!(matches!(replays.begin(&key(), [1; 32], now), Begun::Refused(_)));
    }
}
