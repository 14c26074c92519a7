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
pub struct Connections(Arc<Inner>);

#[derive(Default)]
struct Inner {
    observer: Option<Observer>,
    next: AtomicU64,
    live: Mutex<HashMap<u64, Live>>,
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
        Self(Arc::new(Inner { observer: Some(observer), ..Inner::default() }))
    }

    /// Returns how many connections live, handshakes not included.
    pub fn count(&self) -> usize {
        self.live().len()
    }

    /// Closes the network connections whose peer `is_unwanted`, calls in flight included, and returns how many.
    ///
    /// For bans: the table that refuses the peer's calls must know the ban first, or it just comes back.
    pub fn close_where(&self, is_unwanted: impl Fn(&PeerInfo) -> bool) -> usize {
        let live = self.live();
        let unwanted = live.values().filter(|live| live.peer.network().is_some_and(&is_unwanted));
        unwanted.map(|live| live.close.cancel()).count()
    }

    pub(super) fn report(&self, event: &ConnectionEvent<'_>) {
        if let Some(observer) = &self.0.observer {
            observer(event);
        }
    }

    pub(super) fn enter(&self, peer: Peer) -> Entry {
        let number = self.0.next.fetch_add(1, Ordering::Relaxed);
        let close = CancellationToken::new();
        self.live().insert(number, Live { peer: peer.clone(), close: close.clone() });
        Entry { connections: self.clone(), number, peer, close }
    }

    /// The table stays right even if a holder panicked: each change is one step.
    fn live(&self) -> MutexGuard<'_, HashMap<u64, Live>> {
        self.0.live.lock().unwrap_or_else(PoisonError::into_inner)
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
        self.connections.live().remove(&self.number);
    }
}
