//! What records say, as the JSON objects that a chain then numbers and links.

use std::fmt;
use std::str::FromStr;

use data_encoding::HEXLOWER;
use serde_json::{Map, Value};

/// The random id that one change has in the audit and in its store transaction; printed as a UUID.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ChangeId([u8; 16]);

impl ChangeId {
    /// Takes 16 random bytes as an id.
    #[must_use]
    pub const fn from_bytes(bytes: [u8; 16]) -> Self {
        Self(bytes)
    }

    /// Returns the 16 bytes.
    #[must_use]
    pub const fn as_bytes(&self) -> &[u8; 16] {
        &self.0
    }
}

impl fmt::Display for ChangeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&hyphenated(&self.0))
    }
}

impl fmt::Debug for ChangeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// The text is no hyphenated lower-case UUID.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("a change id is a hyphenated lower-case uuid")]
pub struct InvalidChangeId;

impl FromStr for ChangeId {
    type Err = InvalidChangeId;

    fn from_str(text: &str) -> Result<Self, InvalidChangeId> {
        let digits = text.replace('-', "");
        let bytes = HEXLOWER.decode(digits.as_bytes()).map_err(|_| InvalidChangeId)?;
        let id = Self(bytes.try_into().map_err(|_| InvalidChangeId)?);
        if id.to_string() == text { Ok(id) } else { Err(InvalidChangeId) }
    }
}

/// Where a record is in its chain; what a change's store transaction carries.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Recorded {
    /// Its number in the chain, from 1.
    pub seq: u64,
    /// SHA-256 of its line.
    pub hash: [u8; 32],
}

/// A cluster as records name it: the id is its identity, the name what it was called then.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ClusterRef<'a> {
    /// Its id.
    pub id: &'a [u8; 16],
    /// Its name at the time.
    pub name: &'a str,
}

/// A change that is about to be done.
#[derive(Clone, Debug)]
pub struct Intent<'a> {
    /// Its id, also in its store transaction.
    pub change: ChangeId,
    /// What is to be done, such as `key_rotate`.
    pub action: &'a str,
    /// The SPIFFE ID of who asked, or `schedule`.
    pub who: &'a str,
    /// The cluster whose keys or identities change.
    pub cluster: Option<ClusterRef<'a>>,
    /// What in it changes: a version, a node, a slot.
    pub target: Option<&'a str>,
    /// Why, in the words of who asked.
    pub reason: Option<&'a str>,
    /// What else an auditor needs; never a secret.
    pub details: Map<String, Value>,
}

/// Something that happened without being a change: a denied caller, an identity seen twice.
#[derive(Clone, Debug)]
pub struct Event<'a> {
    /// What happened, such as `store_rolled_back`.
    pub action: &'a str,
    /// The SPIFFE ID of who did it, or what noticed it.
    pub who: &'a str,
    /// The cluster it concerns.
    pub cluster: Option<ClusterRef<'a>>,
    /// What in it is concerned.
    pub target: Option<&'a str>,
    /// What else an auditor needs; never a secret.
    pub details: Map<String, Value>,
}

/// How an intended change ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome<'a> {
    /// It is in the store.
    Done,
    /// It is not in the store and will not be.
    NotDone {
        /// Why, such as `conflict`.
        why: &'a str,
    },
    /// The store could not tell; a later look may.
    Unknown,
}

impl Intent<'_> {
    pub(crate) fn body(&self) -> Map<String, Value> {
        let mut body = object([
            ("kind", "intent".into()),
            ("change", self.change.to_string().into()),
            ("action", self.action.into()),
            ("who", self.who.into()),
        ]);
        about(&mut body, self.cluster, self.target, &self.details);
        if let Some(reason) = self.reason {
            body.insert("reason".into(), reason.into());
        }
        body
    }
}

impl Event<'_> {
    pub(crate) fn body(&self) -> Map<String, Value> {
        let mut body =
            object([("kind", "event".into()), ("action", self.action.into()), ("who", self.who.into())]);
        about(&mut body, self.cluster, self.target, &self.details);
        body
    }
}

impl Outcome<'_> {
    pub(crate) fn body(&self, change: &ChangeId) -> Map<String, Value> {
        let (outcome, why) = match self {
            Self::Done => ("done", None),
            Self::NotDone { why } => ("not done", Some(*why)),
            Self::Unknown => ("unknown", None),
        };
        let mut body = object([
            ("kind", "outcome".into()),
            ("change", change.to_string().into()),
            ("outcome", outcome.into()),
        ]);
        if let Some(why) = why {
            body.insert("why".into(), why.into());
        }
        body
    }
}

fn about(
    body: &mut Map<String, Value>,
    cluster: Option<ClusterRef<'_>>,
    target: Option<&str>,
    details: &Map<String, Value>,
) {
    if let Some(cluster) = cluster {
        let named = object([("id", hyphenated(cluster.id).into()), ("name", cluster.name.into())]);
        body.insert("cluster".into(), named.into());
    }
    if let Some(target) = target {
        body.insert("target".into(), target.into());
    }
    if !details.is_empty() {
        body.insert("details".into(), details.clone().into());
    }
}

pub(crate) fn object<const N: usize>(fields: [(&str, Value); N]) -> Map<String, Value> {
    fields.into_iter().map(|(name, value)| (name.to_owned(), value)).collect()
}

/// Prints 16 bytes the way UUIDs are printed.
pub(crate) fn hyphenated(bytes: &[u8; 16]) -> String {
    let mut text = HEXLOWER.encode(bytes);
    for position in [20, 16, 12, 8] {
        text.insert(position, '-');
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_change_id_is_read_only_as_it_is_printed() {
        let id = ChangeId::from_bytes(*b"\x00\x11\x22\x33\x44\x55\x66\x77\x88\x99\xaa\xbb\xcc\xdd\xee\xff");
        assert_eq!(id.to_string(), "00112233-4455-6677-8899-aabbccddeeff");
        assert_eq!(id.to_string().parse(), Ok(id));
        let others = ["", "00112233445566778899aabbccddeeff", "00112233-4455-6677-8899-AABBCCDDEEFF"];
        for other in others {
            assert_eq!(other.parse::<ChangeId>(), Err(InvalidChangeId), "{other}");
        }
    }

    #[test]
    fn an_intent_says_who_what_where_and_why() {
        let intent = Intent {
            change: ChangeId::from_bytes([1; 16]),
            action: "key_rotate",
            who: "schedule",
            cluster: Some(ClusterRef { id: &[2; 16], name: "edge-1" }),
            target: Some("version 4"),
            reason: Some("due"),
            details: object([("how", "regular".into())]),
        };
        let expected = r#"{"action":"key_rotate","change":"01010101-0101-0101-0101-010101010101","cluster":{"id":"02020202-0202-0202-0202-020202020202","name":"edge-1"},"details":{"how":"regular"},"kind":"intent","reason":"due","target":"version 4","who":"schedule"}"#;
        assert_eq!(Value::from(intent.body()).to_string(), expected);
    }
}
