//! The order to stop: connections finish their calls and take no new ones.

use tokio_util::sync::CancellationToken;

/// Tells every connection loop that holds a clone to drain. It cannot be taken back.
#[derive(Clone, Debug, Default)]
pub struct Drain(CancellationToken);

impl Drain {
    /// Returns an order that has not been given.
    pub fn new() -> Self {
        Self::default()
    }

    /// Gives the order: stop accepting, send GOAWAY, end within the limit of each loop.
    pub fn drain(&self) {
        self.0.cancel();
    }

    /// Tells whether the order has been given.
    pub fn is_draining(&self) -> bool {
        self.0.is_cancelled()
    }

    /// Waits for the order.
    pub async fn drained(&self) {
        self.0.cancelled().await;
    }
}
