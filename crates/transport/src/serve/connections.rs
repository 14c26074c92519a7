//! The connections that live now: counted, and closed at once when their peer is banned.

use std::{
    collections::HashMap,
    fmt, io,
    net::IpAddr,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
};

use fleet_kms_identity::SpiffeId;
use tokio_util::sync::CancellationToken;

use super::Refusal;
use crate::peer::{Peer, PeerInfo};

/// Hears what happens before a connection reaches any handler; for metrics, audit and log. It must not block.
pub type Observer = Arc<dyn Fn(&ConnectionEvent<'_>) + Send + Sync>;

/// What an [`Observer`] hears.
#[derive(Debug)]
pub enum ConnectionEvent<'a> {
    /// A connection was closed before its first call.
    Refused {
        /// The port, as [`Connections::of_port`] names it.
        port: &'static str,
        /// Where it came from; `None` for a local peer.
        source: Option<IpAddr>,
        /// Why.
        refusal: &'a Refusal,
    },
    /// Accepting failed; the loop goes on after a rest.
    AcceptFailed(&'a io::Error),
}

/// All live connections of the loops that share it.
#[derive(Clone, Default)]
pub struct Connections {
    inner: Arc<Inner>,
    port: &'static str,
}

#[derive(Default)]
struct Inner {
    observer: Option<Observer>,
    next: AtomicU64,
    table: Mutex<Table>,
}

#[derive(Default)]
struct Table {
    live: HashMap<u64, Live>,
    /// Connections of each identity on each port.
    held: HashMap<(&'static str, SpiffeId), usize>,
}

struct Live {
    peer: Peer,
    close: CancellationToken,
}

impl Connections {
    /// Returns an empty registry that nobody observes.
    pub fn new() -> Self {
        Self::default()
    }

    /// Returns an empty registry that tells `observer` of refused connections.
    pub fn observed_by(observer: Observer) -> Self {
        let inner = Arc::new(Inner { observer: Some(observer), ..Inner::default() });
        Self { inner, port: "" }
    }

    /// Returns the same registry for one port, whose name the observer hears.
    #[must_use]
    pub fn of_port(&self, port: &'static str) -> Self {
        Self { inner: Arc::clone(&self.inner), port }
    }

    /// Returns how many connections live, handshakes not included.
    pub fn count(&self) -> usize {
        self.table().live.len()
    }

    /// Closes the network connections whose peer `is_unwanted`, calls in flight included, and returns how many.
    ///
    /// For bans: the table that refuses the peer's calls must know the ban first, or it just comes back.
    pub fn close_where(&self, is_unwanted: impl Fn(&PeerInfo) -> bool) -> usize {
        let table = self.table();
        let unwanted = table.live.values().filter(|live| live.peer.network().is_some_and(&is_unwanted));
        unwanted.map(|live| live.close.cancel()).count()
    }

    pub(super) fn refused(&self, source: Option<IpAddr>, refusal: &Refusal) {
        self.report(&ConnectionEvent::Refused { port: self.port, source, refusal });
    }

    pub(super) fn report(&self, event: &ConnectionEvent<'_>) {
        if let Some(observer) = &self.inner.observer {
            observer(event);
        }
    }

    /// Enters a connection, unless its identity has `max_per_identity` on this port already.
    pub(super) fn enter(&self, peer: Peer, max_per_identity: usize) -> Result<Entry, Refusal> {
        let identity = peer.network().and_then(|peer| peer.certificate.as_ref());
        let held = identity.map(|certificate| (self.port, certificate.id().clone()));
        let mut table = self.table();
        if let Some(held) = &held {
            let count = table.held.entry(held.clone()).or_default();
            if *count >= max_per_identity {
                return Err(Refusal::IdentityFull);
            }
            *count += 1;
        }
        let number = self.inner.next.fetch_add(1, Ordering::Relaxed);
        let close = CancellationToken::new();
        table.live.insert(number, Live { peer: peer.clone(), close: close.clone() });
        Ok(Entry { connections: self.clone(), number, peer, held, close })
    }

    /// The table stays right even if a holder panicked: each change is one step.
    fn table(&self) -> MutexGuard<'_, Table> {
        self.inner.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl fmt::Debug for Connections {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Connections({})", self.count())
    }
}

/// One live connection, struck off when dropped.
pub(super) struct Entry {
    connections: Connections,
    number: u64,
    peer: Peer,
    held: Option<(&'static str, SpiffeId)>,
    close: CancellationToken,
}

impl Entry {
    pub(super) fn number(&self) -> u64 {
        self.number
    }

    pub(super) fn peer(&self) -> Peer {
        self.peer.clone()
    }

    pub(super) async fn closed(&self) {
        self.close.cancelled().await;
    }
}

impl Drop for Entry {
    fn drop(&mut self) {
        let mut table = self.connections.table();
        table.live.remove(&self.number);
        let Some(held) = &self.held else { return };
        if let Some(count) = table.held.get_mut(held) {
            *count -= 1;
            if *count == 0 {
                table.held.remove(held);
            }
        }
    }
}
