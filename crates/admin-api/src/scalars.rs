//! Times and durations as JSON text: RFC 3339 in UTC, and durations as people
//! write them (`30d`, `12h`). Must never read a clock.

use std::borrow::Cow;
use std::fmt;
use std::str::FromStr;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Deserializer, Serialize, Serializer, de};
use utoipa::openapi::schema::{KnownFormat, ObjectBuilder, SchemaFormat, Type};
use utoipa::openapi::{RefOr, Schema};
use utoipa::{PartialSchema, ToSchema};

/// The last second that RFC 3339 can write: 9999-12-31T23:59:59Z.
const LAST_SECOND: u64 = 253_402_300_799;

/// An instant, as RFC 3339 text in UTC with seconds.
///
/// What RFC 3339 cannot write (before 1970, after 9999) becomes the nearest
/// time that it can: an answer about a broken clock must still be an answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Timestamp(SystemTime);

impl Timestamp {
    /// The instant as the standard library's type.
    pub fn as_system_time(self) -> SystemTime {
        self.0
    }

    /// How long ago this was at `now`; zero when it lies in the future.
    pub fn age(self, now: SystemTime) -> Duration {
        now.duration_since(self.0).unwrap_or(Duration::ZERO)
    }
}

impl From<SystemTime> for Timestamp {
    fn from(time: SystemTime) -> Self {
        let seconds = time.duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs()).min(LAST_SECOND);
        Self(UNIX_EPOCH + Duration::from_secs(seconds))
    }
}

impl fmt::Display for Timestamp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        humantime::format_rfc3339_seconds(self.0).fmt(f)
    }
}

impl Serialize for Timestamp {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Timestamp {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = Cow::<str>::deserialize(deserializer)?;
        humantime::parse_rfc3339(&text).map(Self::from).map_err(de::Error::custom)
    }
}

impl PartialSchema for Timestamp {
    fn schema() -> RefOr<Schema> {
        ObjectBuilder::new()
            .schema_type(Type::String)
            .format(Some(SchemaFormat::KnownFormat(KnownFormat::DateTime)))
            .into()
    }
}

impl ToSchema for Timestamp {}

/// A duration in whole seconds, written as people do: `30d`, `12h`, `1h30m`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct HumanDuration(Duration);

/// A text that is no duration.
#[derive(Debug, thiserror::Error)]
#[error("`{text}` is not a duration; write one like 30d, 12h or 15m")]
pub struct NotADuration {
    text: String,
}

impl HumanDuration {
    /// The longest duration that is read: a hundred years.
    pub const MAX: Duration = Duration::from_secs(100 * 366 * 86_400);

    /// The duration as the standard library's type.
    pub fn as_duration(self) -> Duration {
        self.0
    }
}

impl From<Duration> for HumanDuration {
    fn from(duration: Duration) -> Self {
        Self(Duration::from_secs(duration.as_secs()))
    }
}

impl FromStr for HumanDuration {
    type Err = NotADuration;

    fn from_str(text: &str) -> Result<Self, NotADuration> {
        match humantime::parse_duration(text) {
            // humantime reads a `0` without a unit, the document does not.
            Ok(duration) if duration <= Self::MAX && text != "0" => Ok(Self::from(duration)),
            _ => Err(NotADuration { text: text.chars().take(40).collect() }),
        }
    }
}

impl fmt::Display for HumanDuration {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut rest = self.0.as_secs();
        if rest == 0 {
            return f.pad("0s");
        }
        let mut text = String::new();
        for (unit, seconds) in [("d", 86_400), ("h", 3_600), ("m", 60), ("s", 1)] {
            let count = rest / seconds;
            rest %= seconds;
            if count > 0 {
                text.push_str(&format!("{count}{unit}"));
            }
        }
        f.pad(&text)
    }
}

impl Serialize for HumanDuration {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for HumanDuration {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        Cow::<str>::deserialize(deserializer)?.parse().map_err(de::Error::custom)
    }
}

impl PartialSchema for HumanDuration {
    fn schema() -> RefOr<Schema> {
        ObjectBuilder::new()
            .schema_type(Type::String)
            .pattern(Some("^([0-9]{1,5}(d|h|m|s) ?){1,4}$"))
            .examples(["30d", "12h", "15m"])
            .into()
    }
}

impl ToSchema for HumanDuration {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_time_is_written_as_rfc_3339_and_read_back() {
        let time = Timestamp::from(UNIX_EPOCH + Duration::from_secs(1_800_000_000));
        let json = serde_json::to_string(&time).unwrap();
        assert_eq!(json, "\"2027-01-15T08:00:00Z\"");
        assert_eq!(serde_json::from_str::<Timestamp>(&json).unwrap(), time);
    }

    #[test]
    fn a_time_that_rfc_3339_cannot_write_becomes_the_nearest() {
        assert_eq!(Timestamp::from(UNIX_EPOCH - Duration::from_secs(9)).to_string(), "1970-01-01T00:00:00Z");
        let far = UNIX_EPOCH + Duration::from_secs(LAST_SECOND + 9);
        assert_eq!(Timestamp::from(far).to_string(), "9999-12-31T23:59:59Z");
    }

    #[test]
    fn a_duration_is_written_in_days_hours_minutes_and_seconds() {
        for (seconds, text) in [(0, "0s"), (30 * 86_400, "30d"), (5_400, "1h30m"), (86_461, "1d1m1s")] {
            let duration = HumanDuration::from(Duration::from_secs(seconds));
            assert_eq!(duration.to_string(), text);
            assert_eq!(text.parse::<HumanDuration>().unwrap(), duration);
        }
    }

    #[test]
    fn what_is_no_duration_is_refused_with_an_example() {
        for text in ["", "soon", "-1d", "30", "0", "1000000000y", "99999999999999999999d"] {
            assert!(text.parse::<HumanDuration>().unwrap_err().to_string().contains("like 30d"), "{text}");
        }
    }
}
