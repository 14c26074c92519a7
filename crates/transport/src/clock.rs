//! The clock that certificates are judged by.

use std::{
    fmt,
    sync::Arc,
    time::{Duration, SystemTime},
};

use rustls::time_provider::TimeProvider;
use rustls_pki_types::UnixTime;

/// Returns the present, as the program believes it: a node's believed time is not its wall clock.
pub type Clock = Arc<dyn Fn() -> SystemTime + Send + Sync>;

/// Our clock as rustls asks for it.
pub(crate) struct RustlsClock(pub(crate) Clock);

impl TimeProvider for RustlsClock {
    fn current_time(&self) -> Option<UnixTime> {
        Some(unix_time((self.0)()))
    }
}

impl fmt::Debug for RustlsClock {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("RustlsClock")
    }
}

/// Converts for rustls; a time before 1970 becomes 1970, when no certificate is valid.
pub(crate) fn unix_time(time: SystemTime) -> UnixTime {
    UnixTime::since_unix_epoch(time.duration_since(SystemTime::UNIX_EPOCH).unwrap_or(Duration::ZERO))
}

/// Converts from rustls.
pub(crate) fn system_time(time: UnixTime) -> SystemTime {
    SystemTime::UNIX_EPOCH.checked_add(Duration::from_secs(time.as_secs())).unwrap_or(SystemTime::UNIX_EPOCH)
}
