//! One plain HTTP request, for the few that the harness makes: etcd's JSON gateway, `kubectl proxy`, metrics.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::Duration;

use anyhow::{Context, bail};

/// How long a peer may be silent.
const SILENCE_LIMIT: Duration = Duration::from_secs(60);

/// An answer with any status.
#[derive(Debug)]
pub struct Answer {
    /// The status code.
    pub status: u16,
    /// The body, as text.
    pub body: String,
}

impl Answer {
    /// The body of a 2xx answer.
    ///
    /// # Errors
    /// With status and body of any other.
    pub fn ok(self) -> anyhow::Result<String> {
        if !(200..300).contains(&self.status) {
            bail!("HTTP {}: {}", self.status, self.body);
        }
        Ok(self.body)
    }
}

/// GETs `path` from 127.0.0.1.
///
/// # Errors
/// When there was no answer at all.
pub fn get(port: u16, path: &str) -> anyhow::Result<Answer> {
    request(port, "GET", path, "application/json", "")
}

/// Sends a request to 127.0.0.1. As HTTP/1.0, so that the answer ends with the connection and is never chunked.
///
/// # Errors
/// When there was no answer at all.
pub fn request(
    port: u16,
    method: &str,
    path: &str,
    content_type: &str,
    body: &str,
) -> anyhow::Result<Answer> {
    let mut stream = TcpStream::connect(("127.0.0.1", port)).with_context(|| format!("port {port}"))?;
    stream.set_read_timeout(Some(SILENCE_LIMIT))?;
    write!(
        stream,
        "{method} {path} HTTP/1.0\r\nHost: localhost\r\nContent-Type: {content_type}\r\nContent-Length: {}\r\n\r\n{body}",
        body.len(),
    )?;
    let mut bytes = Vec::new();
    stream.read_to_end(&mut bytes).with_context(|| format!("{method} {path}"))?;
    parse(&String::from_utf8_lossy(&bytes)).with_context(|| format!("{method} {path}: not an HTTP answer"))
}

fn parse(text: &str) -> Option<Answer> {
    let (head, body) = text.split_once("\r\n\r\n")?;
    let status = head.split(' ').nth(1)?.parse().ok()?;
    Some(Answer { status, body: body.to_owned() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn status_and_body_are_told_apart() {
        let answer = parse("HTTP/1.0 404 Not Found\r\nA: b\r\n\r\none\r\n\r\ntwo").unwrap();
        assert_eq!((answer.status, answer.body.as_str()), (404, "one\r\n\r\ntwo"));
        assert!(answer.ok().is_err());
    }

    #[test]
    fn half_an_answer_is_none() {
        assert!(parse("HTTP/1.0 200 OK\r\nA: b").is_none());
        assert!(parse("").is_none());
    }
}
