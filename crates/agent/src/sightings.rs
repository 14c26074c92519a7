//! What the data port learns about serials: a *next* certificate in use is
//! promoted, a superseded one is a sign of a cloned identity.
//!
//! Neither makes a call wait, and a serial costs one change however often it is
//! seen.

use std::collections::HashSet;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use fleet_kms_identity::Serial;

use crate::caller::Caller;
use crate::changes::Changes;
use crate::enrolment::issue::Issuer;
use crate::errors::chain;
use crate::identities::{LiveIdentities, SerialStanding};
use crate::trail::Event;

/// Superseded serials that are remembered as reported; beyond it they are
/// reported again.
const MAX_REPORTED: usize = 10_000;

/// Acts on serials as they are seen.
pub struct Sightings(Arc<Shared>);

struct Shared {
    identities: Arc<LiveIdentities>,
    issuer: Arc<Issuer>,
    changes: Arc<Changes>,
    promoting: Mutex<HashSet<Serial>>,
    reported: Mutex<HashSet<Serial>>,
}

impl Sightings {
    /// Makes the observer of the data port.
    pub fn new(identities: Arc<LiveIdentities>, issuer: Arc<Issuer>, changes: Arc<Changes>) -> Self {
        let (promoting, reported) = (Mutex::default(), Mutex::default());
        Self(Arc::new(Shared { identities, issuer, changes, promoting, reported }))
    }

    /// A permitted caller was seen: if it uses its next certificate, that
    /// becomes the current one.
    pub fn in_use(&self, caller: &Caller) {
        let serial = caller.certificate().serial();
        let identity = self.0.identities.find(caller.id());
        let next = identity
            .is_some_and(|identity| identity.standing_of(caller.certificate()) == SerialStanding::Next);
        if !next || !lock(&self.0.promoting).insert(serial) {
            return;
        }
        let (shared, id) = (Arc::clone(&self.0), caller.id().clone());
        tokio::spawn(async move {
            if let Err(error) = shared.issuer.promote(&id, &serial).await {
                tracing::warn!(%id, error = chain(&error), "a certificate in use could not be promoted");
            }
            lock(&shared.promoting).remove(&serial);
        });
    }

    /// A caller with a superseded certificate was refused.
    pub fn superseded(&self, caller: &Caller) {
        let serial = caller.certificate().serial();
        {
            let mut reported = lock(&self.0.reported);
            if reported.len() >= MAX_REPORTED {
                reported.clear();
            }
            if !reported.insert(serial) {
                return;
            }
        }
        let (shared, id) = (Arc::clone(&self.0), caller.id().to_string());
        let address = caller.address().ip().to_string();
        tracing::warn!(id, %serial, address, "a superseded certificate was shown: a cloned identity?");
        let event = Event::new("identity_clone", &id)
            .reason(Some("superseded"))
            .detail("serial", serial.to_string())
            .detail("address", address);
        tokio::spawn(async move { shared.changes.event(event).await });
    }
}

fn lock(serials: &Mutex<HashSet<Serial>>) -> MutexGuard<'_, HashSet<Serial>> {
    serials.lock().unwrap_or_else(PoisonError::into_inner)
}
