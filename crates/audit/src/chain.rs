//! Lines and links, without a file: `prev` of a line is the SHA-256 of the bytes of the line before.

use std::fmt;
use std::time::{SystemTime, UNIX_EPOCH};

use data_encoding::HEXLOWER;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use sha2::{Digest, Sha256};
use time::OffsetDateTime;

use crate::Recorded;

/// The longest line, newline excluded. A record that needs more is refused, so that a reader has a bound.
pub const MAX_LINE: usize = 64 * 1024;

/// One of the two chains in a directory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Chain {
    /// Intents, outcomes and events.
    Changes,
    /// Sums of data calls, and denials in detail.
    Data,
}

impl Chain {
    /// Returns the word that its files begin with.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Changes => "changes",
            Self::Data => "data",
        }
    }

    /// What the first line links to: no chain can pass for the other.
    pub(crate) fn genesis(self) -> [u8; 32] {
        Sha256::digest(format!("fleet-kms/audit/1/{}", self.name())).into()
    }

    /// Both chains.
    pub const ALL: [Self; 2] = [Self::Changes, Self::Data];

    /// Finds a chain by its word.
    #[must_use]
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|chain| chain.name() == name)
    }

    pub(crate) fn file_name(self, number: u64) -> String {
        format!("{}-{number:06}.jsonl", self.name())
    }

    pub(crate) fn checkpoint_name(self) -> String {
        format!("{}.checkpoint", self.name())
    }

    /// Returns the number of a file of this chain; `None` for any other file.
    pub(crate) fn number_of(self, file_name: &str) -> Option<u64> {
        let number = file_name.strip_prefix(self.name())?.strip_prefix('-')?.strip_suffix(".jsonl")?;
        let number = number.parse().ok()?;
        (self.file_name(number) == file_name).then_some(number)
    }
}

impl fmt::Display for Chain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// The end of a chain at some moment: kept elsewhere, it proves that nothing before it was changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Head {
    /// The number of the last line; 0 for an empty chain.
    pub seq: u64,
    /// The SHA-256 of the last line; what the first line links to for an empty chain.
    pub hash: [u8; 32],
}

impl Head {
    pub(crate) fn start(chain: Chain) -> Self {
        Self { seq: 0, hash: chain.genesis() }
    }
}

impl From<Recorded> for Head {
    fn from(recorded: Recorded) -> Self {
        Self { seq: recorded.seq, hash: recorded.hash }
    }
}

/// A line as read back.
#[derive(Debug, Deserialize)]
pub(crate) struct Entry {
    pub(crate) seq: u64,
    pub(crate) prev: String,
    #[serde(flatten)]
    pub(crate) body: Map<String, Value>,
}

impl Entry {
    /// Reads a line without its newline; `None` if it is no record.
    pub(crate) fn parse(line: &[u8]) -> Option<Self> {
        serde_json::from_slice(line).ok()
    }

    pub(crate) fn follows(&self, hash: &[u8; 32]) -> bool {
        self.prev == HEXLOWER.encode(hash)
    }

    pub(crate) fn text(&self, field: &str) -> Option<&str> {
        self.body.get(field)?.as_str()
    }
}

#[derive(Serialize)]
struct NewLine<'a, B> {
    seq: u64,
    time: &'a str,
    prev: String,
    #[serde(flatten)]
    body: &'a B,
}

/// Makes the line that follows `head`, newline included, and the head after it.
pub(crate) fn next_line(
    head: Head,
    time: &str,
    body: &impl Serialize,
) -> serde_json::Result<(Vec<u8>, Head)> {
    let seq = head.seq.saturating_add(1);
    let line = NewLine { seq, time, prev: HEXLOWER.encode(&head.hash), body };
    let mut bytes = serde_json::to_vec(&line)?;
    let hash = hash_of(&bytes);
    bytes.push(b'\n');
    Ok((bytes, Head { seq, hash }))
}

pub(crate) fn hash_of(line: &[u8]) -> [u8; 32] {
    Sha256::digest(line).into()
}

/// Prints a time as RFC 3339 in UTC with milliseconds; what lies outside the calendar is moved to its edge.
pub(crate) fn rfc3339(time: SystemTime) -> String {
    let since = time.duration_since(UNIX_EPOCH).unwrap_or_default();
    let seconds = i64::try_from(since.as_secs()).unwrap_or(i64::MAX);
    let date = OffsetDateTime::from_unix_timestamp(seconds)
        .unwrap_or_else(|_| time::PrimitiveDateTime::MAX.assume_utc());
    let (year, month, day) = (date.year(), u8::from(date.month()), date.day());
    let (hour, minute, second) = date.to_hms();
    let millis = since.subsec_millis();
    format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}.{millis:03}Z")
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn a_line_is_what_it_was_in_the_first_release() {
        let body = crate::record::object([("kind", "event".into()), ("action", "x".into())]);
        let now = UNIX_EPOCH + Duration::from_millis(1_764_000_000_042);
        let (line, head) = next_line(Head::start(Chain::Changes), &rfc3339(now), &body).unwrap();
        let expected =
            r#"{"seq":1,"time":"2025-11-24T16:00:00.042Z","prev":"PREV","action":"x","kind":"event"}"#;
        let genesis = "80d6a7d636962641b999423c133c8df87379e42e1697216f9d4ad6dfe633d49d";
        let expected = expected.replace("PREV", genesis);
        assert_eq!(String::from_utf8(line).unwrap(), format!("{expected}\n"));
        assert_eq!(head, Head { seq: 1, hash: hash_of(expected.as_bytes()) });
        assert_ne!(Chain::Data.genesis(), Chain::Changes.genesis());
    }

    #[test]
    fn times_before_and_beyond_the_calendar_do_not_panic() {
        assert_eq!(rfc3339(UNIX_EPOCH - Duration::from_secs(1)), "1970-01-01T00:00:00.000Z");
        assert!(rfc3339(UNIX_EPOCH + Duration::from_secs(1 << 60)).starts_with("9999-12-31T"));
    }

    #[test]
    fn only_exact_file_names_count() {
        assert_eq!(Chain::Data.number_of("data-000007.jsonl"), Some(7));
        assert_eq!(Chain::Data.number_of("data-1000000.jsonl"), Some(1_000_000));
        for other in ["data-7.jsonl", "changes-000007.jsonl", "data-000007.jsonl.gz", "data-+00007.jsonl"] {
            assert_eq!(Chain::Data.number_of(other), None, "{other}");
        }
    }
}
