//! The program's clocks: the only place that reads them.
//!
//! Everything else takes `now` as a parameter, so that tests choose it.

use std::time::{Instant, SystemTime};

/// Reads the wall clock. It may jump; never measure a duration with it.
#[expect(clippy::disallowed_methods, reason = "the one place that reads the wall clock")]
pub fn now() -> SystemTime {
    SystemTime::now()
}

/// Reads the clock that never goes back.
#[expect(clippy::disallowed_methods, reason = "the one place that reads the monotonic clock")]
pub fn monotonic() -> Instant {
    Instant::now()
}
