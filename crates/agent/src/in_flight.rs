//! How many calls of one caller are worked on at a time; the rest waits unread.
//!
//! A call that waits here costs what its connection's window holds of it, and no
//! work: not even its message is read. So a caller that floods fills its own
//! places, not the memory and the processors that all share. A call waits until
//! its deadline, which a layer outside this one keeps.

use std::collections::HashMap;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};

use fleet_kms_identity::SpiffeId;
use fleet_kms_transport::PeerInfo;
use tokio::sync::Semaphore;
use tower::{Layer, Service};

/// Calls of one caller at a time. Each takes well under a millisecond once it is
/// read, and a message arrives with its call: this is thousands a second.
const CALLS_PER_CALLER: usize = 8;
/// Callers that may be remembered before those without a call are forgotten.
const CALLERS_BEFORE_SWEEP: usize = 1_024;

/// Gives every caller its places.
#[derive(Clone, Default)]
pub struct InFlightLayer(Arc<Mutex<Callers>>);

#[derive(Default)]
struct Callers {
    places: HashMap<SpiffeId, Arc<Semaphore>>,
    sweep_at: usize,
}

impl Callers {
    fn places_of(&mut self, caller: &SpiffeId) -> Arc<Semaphore> {
        if let Some(places) = self.places.get(caller) {
            return Arc::clone(places);
        }
        if self.places.len() >= self.sweep_at {
            self.places.retain(|_, places| Arc::strong_count(places) > 1);
            self.sweep_at = (2 * self.places.len()).max(CALLERS_BEFORE_SWEEP);
        }
        let places = Arc::new(Semaphore::new(CALLS_PER_CALLER));
        self.places.insert(caller.clone(), Arc::clone(&places));
        places
    }
}

impl<S> Layer<S> for InFlightLayer {
    type Service = InFlight<S>;

    fn layer(&self, inner: S) -> InFlight<S> {
        InFlight { inner, callers: Arc::clone(&self.0) }
    }
}

/// A service whose callers have their places.
#[derive(Clone)]
pub struct InFlight<S> {
    inner: S,
    callers: Arc<Mutex<Callers>>,
}

impl<S, B> Service<http::Request<B>> for InFlight<S>
where
    S: Service<http::Request<B>> + Clone + Send + 'static,
    S::Future: Send,
    B: Send + 'static,
{
    type Response = S::Response;
    type Error = S::Error;
    type Future = Pin<Box<dyn Future<Output = Result<S::Response, S::Error>> + Send>>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(context)
    }

    fn call(&mut self, request: http::Request<B>) -> Self::Future {
        let peer = request.extensions().get::<Arc<PeerInfo>>();
        let caller = peer.and_then(|peer| peer.certificate.as_ref()).map(|certificate| certificate.id());
        let places = caller
            .map(|caller| self.callers.lock().unwrap_or_else(PoisonError::into_inner).places_of(caller));
        // The one that was polled ready is used, a fresh one stays.
        let inner = self.inner.clone();
        let mut ready = std::mem::replace(&mut self.inner, inner);
        Box::pin(async move {
            // Who shows no certificate is refused by what comes next, at no cost. Nobody closes a semaphore.
            let _place = match &places {
                Some(places) => places.acquire().await.ok(),
                None => None,
            };
            ready.call(request).await
        })
    }
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::time::SystemTime;

    use fleet_kms_identity::{Certificate, Standing};
    use tokio::sync::Notify;
    use tokio::task::yield_now;
    use tower::{ServiceExt, service_fn};

    use super::*;

    fn request(name: &str) -> http::Request<()> {
        let key = rcgen::KeyPair::generate().unwrap();
        let mut params = rcgen::CertificateParams::default();
        let uri = format!("spiffe://fleet.test/admin/{name}");
        params.subject_alt_names = vec![rcgen::SanType::URI(uri.try_into().unwrap())];
        params.serial_number = Some(vec![1].into());
        let certificate = Certificate::from_der(params.self_signed(&key).unwrap().der()).unwrap();
        let standing = Standing::at(SystemTime::UNIX_EPOCH, SystemTime::UNIX_EPOCH, SystemTime::UNIX_EPOCH);
        let address = ([127, 0, 0, 1], 1).into();
        let mut request = http::Request::new(());
        request.extensions_mut().insert(Arc::new(PeerInfo {
            certificate: Some(certificate),
            standing,
            address,
        }));
        request
    }

    #[tokio::test]
    async fn one_callers_calls_wait_for_each_other_and_another_callers_do_not() {
        let (begun, end) = (Arc::new(AtomicUsize::new(0)), Arc::new(Notify::new()));
        let (counted, ending) = (Arc::clone(&begun), Arc::clone(&end));
        let service = InFlightLayer::default().layer(service_fn(move |_: http::Request<()>| {
            counted.fetch_add(1, Ordering::SeqCst);
            let ending = Arc::clone(&ending);
            async move {
                ending.notified().await;
                Ok::<_, Infallible>(())
            }
        }));
        let call = |name| tokio::spawn(service.clone().oneshot(request(name)));
        let mut calls: Vec<_> = (0..CALLS_PER_CALLER + 3).map(|_| call("greedy")).collect();
        yield_now().await;
        assert_eq!(begun.load(Ordering::SeqCst), CALLS_PER_CALLER);
        calls.push(call("modest"));
        yield_now().await;
        assert_eq!(begun.load(Ordering::SeqCst), CALLS_PER_CALLER + 1);
        // A call whose deadline drops it gives its place to the next.
        calls.remove(0).abort();
        while begun.load(Ordering::SeqCst) < CALLS_PER_CALLER + 2 {
            yield_now().await;
        }
        for call in calls {
            end.notify_waiters();
            while !call.is_finished() {
                end.notify_waiters();
                yield_now().await;
            }
            call.await.unwrap().unwrap();
        }
    }

    #[test]
    fn callers_without_a_call_are_forgotten() {
        let mut callers = Callers::default();
        let id = |n: usize| format!("spiffe://fleet.test/admin/a{n}").parse::<SpiffeId>().unwrap();
        let held = callers.places_of(&id(0));
        (1..5_000).for_each(|n| drop(callers.places_of(&id(n))));
        assert!(callers.places.len() <= CALLERS_BEFORE_SWEEP + 1, "{}", callers.places.len());
        assert!(Arc::ptr_eq(&held, &callers.places_of(&id(0))));
    }
}
