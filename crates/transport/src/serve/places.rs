//! Who may connect, and whose handshake may run: counted per port and per source, so that one source that floods, or
//! stalls its handshakes, takes nothing from the others.
//!
//! A source has a few handshakes running and some more waiting; what comes on top is closed. Waiting connections hold
//! no slot of the port's handshakes.

use std::{
    collections::HashMap,
    future::Future,
    net::{IpAddr, Ipv6Addr},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use tokio::{sync::Semaphore, time::timeout};

use super::{Refusal, ServeLimits};
use crate::tls::TlsError;

/// Connections of one source that may wait or shake hands, as a multiple of those that may shake hands: a fleet behind
/// one address comes back through this.
const PENDING_FACTOR: usize = 8;

#[derive(Clone)]
pub(super) struct Places(Arc<Inner>);

struct Inner {
    max_connections: usize,
    max_per_source: usize,
    max_pending_per_source: usize,
    handshakes_per_source: usize,
    handshakes: Semaphore,
    table: Mutex<Table>,
}

#[derive(Default)]
struct Table {
    connections: usize,
    sources: HashMap<Source, Counts>,
}

struct Counts {
    connections: usize,
    pending: usize,
    handshakes: Arc<Semaphore>,
}

impl Places {
    pub(super) fn new(limits: &ServeLimits) -> Self {
        Self(Arc::new(Inner {
            max_connections: limits.max_connections,
            max_per_source: limits.max_connections_per_source,
            max_pending_per_source: limits.handshakes_per_source.saturating_mul(PENDING_FACTOR),
            handshakes_per_source: limits.handshakes_per_source,
            handshakes: Semaphore::new(limits.handshakes),
            table: Mutex::default(),
        }))
    }

    /// Takes a place for a connection from `address`; a local peer (`None`) counts only for the port.
    pub(super) fn take(&self, address: Option<IpAddr>) -> Result<Place, Refusal> {
        let inner = &self.0;
        let mut table = inner.table();
        if table.connections >= inner.max_connections {
            return Err(Refusal::Full);
        }
        let source = address.map(Source::from);
        if let Some(source) = source {
            let counts = table.sources.entry(source).or_insert_with(|| Counts {
                connections: 0,
                pending: 0,
                handshakes: Arc::new(Semaphore::new(inner.handshakes_per_source)),
            });
            if counts.connections >= inner.max_per_source || counts.pending >= inner.max_pending_per_source {
                return Err(Refusal::SourceFull);
            }
            counts.connections += 1;
            counts.pending += 1;
        }
        table.connections += 1;
        Ok(Place { inner: Arc::clone(inner), source, is_pending: source.is_some() })
    }
}

impl Inner {
    /// Counts stay right even if a holder panicked: each change is one step.
    fn table(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// One connection's place in the limits, given back when dropped.
pub(super) struct Place {
    inner: Arc<Inner>,
    source: Option<Source>,
    is_pending: bool,
}

impl Place {
    /// Runs a handshake when its turn comes.
    pub(super) async fn handshake<T>(
        &mut self,
        limit: Duration,
        handshake: impl Future<Output = Result<T, TlsError>>,
    ) -> Result<T, Refusal> {
        let inner = Arc::clone(&self.inner);
        let of_source = self.source.and_then(|source| {
            inner.table().sources.get(&source).map(|counts| Arc::clone(&counts.handshakes))
        });
        let turn = async {
            // The source's own turn first: its waiters must not fill the port's queue.
            match &of_source {
                Some(of_source) => Some((of_source.acquire().await, inner.handshakes.acquire().await)),
                None => None,
            }
        };
        let _turn = timeout(limit, turn).await.map_err(|_| Refusal::Timeout)?;
        let done =
            timeout(limit, handshake).await.map_err(|_| Refusal::Timeout)?.map_err(Refusal::Handshake)?;
        self.end_pending();
        Ok(done)
    }

    fn end_pending(&mut self) {
        if let (true, Some(source)) = (std::mem::take(&mut self.is_pending), self.source)
            && let Some(counts) = self.inner.table().sources.get_mut(&source)
        {
            counts.pending -= 1;
        }
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.end_pending();
        let mut table = self.inner.table();
        table.connections -= 1;
        let Some(source) = self.source else { return };
        if let Some(counts) = table.sources.get_mut(&source) {
            counts.connections -= 1;
            if counts.connections == 0 {
                table.sources.remove(&source);
            }
        }
    }
}

/// What counts as one source: an IPv4 address, or an IPv6 /64, which is one host's to choose addresses from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Source(IpAddr);

impl From<IpAddr> for Source {
    fn from(address: IpAddr) -> Self {
        match address.to_canonical() {
            IpAddr::V4(address) => Self(IpAddr::V4(address)),
            IpAddr::V6(address) => {
                Self(IpAddr::V6(Ipv6Addr::from_bits(address.to_bits() & (u128::MAX << 64))))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::future::{pending, ready};

    use super::*;

    fn places(max_connections: usize, max_connections_per_source: usize) -> Places {
        Places::new(&ServeLimits { max_connections, max_connections_per_source, ..ServeLimits::default() })
    }

    fn address(last: u8) -> Option<IpAddr> {
        Some(IpAddr::from([127, 0, 0, last]))
    }

    #[test]
    fn a_place_is_held_until_it_is_dropped() {
        let places = places(1, 1);
        let place = places.take(address(1)).unwrap();
        assert!(matches!(places.take(address(2)), Err(Refusal::Full)));
        drop(place);
        assert!(places.take(address(2)).is_ok());
        assert!(places.0.table().sources.is_empty(), "a source without connections is forgotten");
    }

    #[test]
    fn one_source_cannot_take_the_whole_port() {
        let places = places(10, 2);
        let _two = [places.take(address(1)).unwrap(), places.take(address(1)).unwrap()];
        assert!(matches!(places.take(address(1)), Err(Refusal::SourceFull)));
        assert!(places.take(address(2)).is_ok());
    }

    #[test]
    fn an_ipv6_host_is_one_source_whatever_address_it_picks() {
        let source = |text: &str| Source::from(text.parse::<IpAddr>().unwrap());
        assert_eq!(source("2001:db8::1"), source("2001:db8::ffff:1"));
        assert_ne!(source("2001:db8::1"), source("2001:db8:0:1::1"));
        assert_eq!(source("::ffff:10.0.0.1"), source("10.0.0.1"));
    }

    #[tokio::test(start_paused = true)]
    async fn stalled_handshakes_of_one_source_leave_the_others_theirs() {
        let places = places(10_000, 10_000);
        let stalled: Vec<_> = (0..64)
            .map(|_| {
                let mut place = places.take(address(2)).unwrap();
                tokio::spawn(async move {
                    place.handshake(Duration::from_secs(5), pending::<Result<(), TlsError>>()).await
                })
            })
            .collect();
        tokio::task::yield_now().await;
        assert!(matches!(places.take(address(2)), Err(Refusal::SourceFull)), "64 wait or run, no more");
        assert_eq!(places.0.handshakes.available_permits(), 512 - 8);
        let mut good = places.take(address(1)).unwrap();
        good.handshake(Duration::ZERO, ready(Ok(()))).await.unwrap();
        for task in stalled {
            assert!(matches!(task.await.unwrap(), Err(Refusal::Timeout)));
        }
        assert_eq!(places.0.handshakes.available_permits(), 512);
    }
}
