//! The header `grpc-timeout`: at most 8 digits and a unit (gRPC over HTTP/2, "Timeout").

use std::time::Duration;

use http::HeaderMap;
use thiserror::Error;

const HEADER: &str = "grpc-timeout";
const MAX_DIGITS: usize = 8;

/// Reads how long the client waits; `None` when it does not say.
///
/// # Errors
///
/// Refuses what the protocol does not allow, and two headers, instead of guessing a deadline.
pub(super) fn parse(headers: &HeaderMap) -> Result<Option<Duration>, MalformedTimeout> {
    let mut values = headers.get_all(HEADER).iter();
    let Some(value) = values.next() else { return Ok(None) };
    if values.next().is_some() {
        return Err(MalformedTimeout);
    }
    let (unit, digits) = value.as_bytes().split_last().ok_or(MalformedTimeout)?;
    if digits.is_empty() || digits.len() > MAX_DIGITS || !digits.iter().all(u8::is_ascii_digit) {
        return Err(MalformedTimeout);
    }
    let amount = digits.iter().fold(0, |amount, digit| amount * 10 + u64::from(digit - b'0'));
    match unit {
        b'H' => Ok(Some(Duration::from_secs(amount * 3_600))),
        b'M' => Ok(Some(Duration::from_secs(amount * 60))),
        b'S' => Ok(Some(Duration::from_secs(amount))),
        b'm' => Ok(Some(Duration::from_millis(amount))),
        b'u' => Ok(Some(Duration::from_micros(amount))),
        b'n' => Ok(Some(Duration::from_nanos(amount))),
        _ => Err(MalformedTimeout),
    }
}

/// A `grpc-timeout` that is none.
#[derive(Debug, Error, PartialEq, Eq)]
#[error("grpc-timeout is malformed: 1 to 8 digits and one of H, M, S, m, u, n")]
pub(super) struct MalformedTimeout;

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(value: &str) -> Result<Option<Duration>, MalformedTimeout> {
        parse(&HeaderMap::from_iter([(HEADER.parse().unwrap(), value.parse().unwrap())]))
    }

    #[test]
    fn every_unit_is_read() {
        assert_eq!(parsed("2998553u"), Ok(Some(Duration::from_micros(2_998_553))), "as grpc-go sends 3 s");
        assert_eq!(parsed("1H"), Ok(Some(Duration::from_secs(3_600))));
        assert_eq!(parsed("2M"), Ok(Some(Duration::from_secs(120))));
        assert_eq!(parsed("3S"), Ok(Some(Duration::from_secs(3))));
        assert_eq!(parsed("4m"), Ok(Some(Duration::from_millis(4))));
        assert_eq!(parsed("5n"), Ok(Some(Duration::from_nanos(5))));
        assert_eq!(parsed("99999999H"), Ok(Some(Duration::from_secs(99_999_999 * 3_600))));
        assert_eq!(parse(&HeaderMap::new()), Ok(None));
    }

    #[test]
    fn what_the_protocol_does_not_allow_is_refused() {
        for value in ["", "S", "1", "1s", "-1S", "+1S", "1.5S", " 1S", "1 S", "123456789n", "1SS", "٣S"] {
            assert_eq!(parsed(value), Err(MalformedTimeout), "{value:?}");
        }
        let mut headers = HeaderMap::new();
        headers.append(HEADER, "1S".parse().unwrap());
        headers.append(HEADER, "2S".parse().unwrap());
        assert_eq!(parse(&headers), Err(MalformedTimeout), "two deadlines are none");
    }
}
