//! Times as people read them: `3d4h`, `in 12d`, `5m ago`.

use std::time::{Duration, SystemTime};

use fleet_kms_admin_api::Timestamp;

/// The two largest units of a duration.
pub fn short(duration: Duration) -> String {
    let seconds = duration.as_secs();
    let (days, hours, minutes) = (seconds / 86_400, seconds / 3_600 % 24, seconds / 60 % 60);
    match (days, hours, minutes) {
        (0, 0, 0) => format!("{seconds}s"),
        (0, 0, _) => format!("{minutes}m"),
        (0, _, 0) => format!("{hours}h"),
        (0, _, _) => format!("{hours}h{minutes}m"),
        (_, 0, _) => format!("{days}d"),
        (1..=9, _, _) => format!("{days}d{hours}h"),
        _ => format!("{days}d"),
    }
}

/// A time relative to now.
pub fn relative(time: Timestamp, now: SystemTime) -> String {
    match time.as_system_time().duration_since(now) {
        Ok(ahead) => format!("in {}", short(ahead)),
        Err(behind) => format!("{} ago", short(behind.duration())),
    }
}

/// A time with how far away it is.
pub fn both(time: Timestamp, now: SystemTime) -> String {
    format!("{time} ({})", relative(time, now))
}

#[cfg(test)]
mod tests {
    use std::time::UNIX_EPOCH;

    use super::*;

    #[test]
    fn durations_show_their_two_largest_units() {
        for (seconds, text) in [
            (0, "0s"),
            (59, "59s"),
            (300, "5m"),
            (3_600, "1h"),
            (5_400, "1h30m"),
            (86_400, "1d"),
            (270_000, "3d3h"),
            (2_600_000, "30d"),
        ] {
            assert_eq!(short(Duration::from_secs(seconds)), text);
        }
    }

    #[test]
    fn a_time_is_ahead_or_ago() {
        let now = UNIX_EPOCH + Duration::from_secs(1_000_000);
        assert_eq!(relative(Timestamp::from(now + Duration::from_secs(7_200)), now), "in 2h");
        assert_eq!(relative(Timestamp::from(now - Duration::from_secs(60)), now), "1m ago");
    }
}
