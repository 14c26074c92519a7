//! Points in time as records keep them: milliseconds since the Unix epoch, 0
//! for "not yet".

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use time::OffsetDateTime;

/// Returns the milliseconds since the Unix epoch; earlier times count as 0.
pub fn to_ms(time: SystemTime) -> u64 {
    let since = time.duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}

/// Returns the time of so many milliseconds.
pub fn from_ms(ms: u64) -> SystemTime {
    UNIX_EPOCH + Duration::from_millis(ms)
}

/// Returns a time to the second as it stands in names of files, such as
/// `20261124T084603Z`: it sorts.
pub fn stamp(time: SystemTime) -> String {
    let at = OffsetDateTime::from(time);
    let (date, month) = (at.date(), u8::from(at.month()));
    let (hour, minute, second) = at.to_hms();
    format!("{:04}{month:02}{:02}T{hour:02}{minute:02}{second:02}Z", date.year(), date.day())
}

/// Returns `None` for 0.
pub fn optional(ms: u64) -> Option<SystemTime> {
    (ms != 0).then(|| from_ms(ms))
}

/// Returns 0 for `None`.
pub fn optional_ms(time: Option<SystemTime>) -> u64 {
    time.map_or(0, to_ms)
}
