//! The id of one call of kube-apiserver: in this node's log, and with every
//! attempt that is made for it, in the agent's log.
//!
//! It must be unique enough to be found in two logs, and need no generator on
//! the way of a call.

use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};

use tonic::metadata::{Ascii, MetadataValue};

/// The metadata key that carries it to an agent (docs/wire-format.md).
pub const HEADER: &str = "x-request-id";

/// An id.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RequestId(u64);

impl fmt::Display for RequestId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:016x}", self.0)
    }
}

/// Counts ids up from a number of this process's own.
#[derive(Debug)]
pub struct RequestIds(AtomicU64);

impl RequestIds {
    /// Starts at `seed`, which should be random: two nodes, or one after a
    /// restart, then hardly ever share an id.
    pub fn new(seed: u64) -> Self {
        Self(AtomicU64::new(seed))
    }

    /// Makes the next id.
    pub fn next(&self) -> RequestId {
        RequestId(self.0.fetch_add(1, Ordering::Relaxed))
    }
}

tokio::task_local! {
    static CURRENT: RequestId;
}

/// Runs `call` as the work of one id.
pub async fn scope<F: Future>(id: RequestId, call: F) -> F::Output {
    CURRENT.scope(id, call).await
}

/// The id of the call that this task works for.
pub fn current() -> Option<MetadataValue<Ascii>> {
    let id = CURRENT.try_with(|id| *id).ok()?;
    Some(id.to_string().parse().expect("hexadecimal digits are a metadata value"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn work_outside_a_call_has_no_id_and_inside_its_own() {
        let ids = RequestIds::new(255);
        assert!(current().is_none());
        let id = scope(ids.next(), async { current().unwrap() }).await;
        assert_eq!(id.to_str().unwrap(), "00000000000000ff");
        assert_ne!(ids.next(), ids.next());
    }
}
