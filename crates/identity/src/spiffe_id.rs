//! SPIFFE IDs: the only names that anything in fleet-kms is known by.
//!
//! `spiffe://<trust domain>/cluster/<cluster id>/{node,worker}/<name>`, `…/agent/<name>`, `…/admin/<name>`.
//! Parsing is strict and prints back the same bytes: there is one spelling of an ID, so that equal means equal.

use std::{fmt, str::FromStr};

use thiserror::Error;
use uuid::Uuid;

/// A SPIFFE ID is at most 2,048 bytes (SPIFFE-ID, section 2.3).
const MAX_SPIFFE_ID: usize = 2_048;
/// A trust domain is at most 255 bytes (SPIFFE-ID, section 2.1).
const MAX_TRUST_DOMAIN: usize = 255;
/// A name fits one DNS label's length, so that node names survive as labels in metrics and host names.
const MAX_NAME: usize = 63;

/// The realm that one fleet CA vouches for: lower-case letters, digits, `.`, `-` and `_`.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct TrustDomain(String);

impl TrustDomain {
    /// Returns the trust domain as text, without scheme or path.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for TrustDomain {
    type Err = TrustDomainError;

    fn from_str(text: &str) -> Result<Self, TrustDomainError> {
        let allowed = |byte: u8| matches!(byte, b'a'..=b'z' | b'0'..=b'9' | b'.' | b'-' | b'_');
        if text.is_empty() || text.len() > MAX_TRUST_DOMAIN || !text.bytes().all(allowed) {
            return Err(TrustDomainError);
        }
        Ok(Self(text.to_owned()))
    }
}

impl fmt::Display for TrustDomain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for TrustDomain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// A trust domain that is empty, too long or holds other characters than SPIFFE allows.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
#[error("a trust domain is 1 to {MAX_TRUST_DOMAIN} characters of a-z, 0-9, '.', '-' and '_'")]
pub struct TrustDomainError;

/// The name of a node, worker, agent or admin: `[a-z0-9]([a-z0-9.-]{0,61}[a-z0-9])?`.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Name(String);

impl Name {
    /// Returns the name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for Name {
    type Err = NameError;

    fn from_str(text: &str) -> Result<Self, NameError> {
        let alphanumeric = |byte: &u8| matches!(byte, b'a'..=b'z' | b'0'..=b'9');
        let inner = |byte: &u8| alphanumeric(byte) || matches!(byte, b'.' | b'-');
        let bytes = text.as_bytes();
        let edges = bytes.first().is_some_and(alphanumeric) && bytes.last().is_some_and(alphanumeric);
        if !edges || bytes.len() > MAX_NAME || !bytes.iter().all(inner) {
            return Err(NameError);
        }
        Ok(Self(text.to_owned()))
    }
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// A name that does not have the one allowed form.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
#[error(
    "a name is 1 to {MAX_NAME} characters of a-z, 0-9, '.' and '-', and begins and ends with a letter or digit"
)]
pub struct NameError;

/// The cluster id as it stands in a SPIFFE ID: 16 bytes, printed as a hyphenated lower-case UUID.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ClusterUuid([u8; 16]);

impl ClusterUuid {
    /// Takes the cluster id's 16 bytes.
    pub const fn from_bytes(bytes: [u8; 16]) -> Self {
        Self(bytes)
    }

    /// Returns the cluster id's 16 bytes.
    pub const fn as_bytes(&self) -> &[u8; 16] {
        &self.0
    }
}

impl FromStr for ClusterUuid {
    type Err = SpiffeIdError;

    fn from_str(text: &str) -> Result<Self, SpiffeIdError> {
        let cluster =
            Uuid::try_parse(text).map(|uuid| Self(uuid.into_bytes())).map_err(|_| SpiffeIdError::Cluster)?;
        // The parser also takes upper case, braces and no hyphens; an ID has one spelling.
        if cluster.to_string() == text { Ok(cluster) } else { Err(SpiffeIdError::Cluster) }
    }
}

impl fmt::Display for ClusterUuid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(Uuid::from_bytes_ref(&self.0).as_hyphenated(), f)
    }
}

impl fmt::Debug for ClusterUuid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// What a SPIFFE ID names within its trust domain.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Subject {
    /// A control-plane node of a cluster, running a sidecar.
    Node {
        /// The node's cluster.
        cluster: ClusterUuid,
        /// The node's name, unique in its cluster.
        name: Name,
    },
    /// A worker of one cluster: census and rewrap.
    Worker {
        /// The worker's cluster.
        cluster: ClusterUuid,
        /// The worker's name, unique in its cluster.
        name: Name,
    },
    /// An agent.
    Agent {
        /// The agent's name.
        name: Name,
    },
    /// A human or robot operator; role and scope are in the store, not here.
    Admin {
        /// The admin's name.
        name: Name,
    },
}

impl Subject {
    /// Returns the cluster that this subject belongs to; agents and admins belong to none.
    pub fn cluster(&self) -> Option<&ClusterUuid> {
        match self {
            Self::Node { cluster, .. } | Self::Worker { cluster, .. } => Some(cluster),
            Self::Agent { .. } | Self::Admin { .. } => None,
        }
    }

    /// Returns the subject's name.
    pub fn name(&self) -> &Name {
        match self {
            Self::Node { name, .. }
            | Self::Worker { name, .. }
            | Self::Agent { name }
            | Self::Admin { name } => name,
        }
    }

    /// Tells whether this is an agent, the only subject that a sidecar or `kmsctl` may talk to.
    pub fn is_agent(&self) -> bool {
        matches!(self, Self::Agent { .. })
    }
}

/// One identity: a subject in a trust domain.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SpiffeId {
    /// The realm whose CA vouches for the subject.
    pub trust_domain: TrustDomain,
    /// Who it is.
    pub subject: Subject,
}

impl SpiffeId {
    /// Names `subject` in `trust_domain`.
    pub fn new(trust_domain: TrustDomain, subject: Subject) -> Self {
        Self { trust_domain, subject }
    }
}

impl FromStr for SpiffeId {
    type Err = SpiffeIdError;

    fn from_str(text: &str) -> Result<Self, SpiffeIdError> {
        if text.len() > MAX_SPIFFE_ID {
            return Err(SpiffeIdError::TooLong);
        }
        let rest = text.strip_prefix("spiffe://").ok_or(SpiffeIdError::Scheme)?;
        let (trust_domain, path) = rest.split_once('/').ok_or(SpiffeIdError::Path)?;
        let trust_domain = trust_domain.parse()?;
        // Collected one past the longest path, so that a longer one matches no arm below.
        let segments: Vec<&str> = path.splitn(5, '/').collect();
        let subject = match segments.as_slice() {
            ["cluster", cluster, "node", name] => {
                Subject::Node { cluster: cluster.parse()?, name: name.parse()? }
            }
            ["cluster", cluster, "worker", name] => {
                Subject::Worker { cluster: cluster.parse()?, name: name.parse()? }
            }
            ["agent", name] => Subject::Agent { name: name.parse()? },
            ["admin", name] => Subject::Admin { name: name.parse()? },
            _ => return Err(SpiffeIdError::Path),
        };
        Ok(Self { trust_domain, subject })
    }
}

impl fmt::Display for SpiffeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "spiffe://{}", self.trust_domain)?;
        match &self.subject {
            Subject::Node { cluster, name } => write!(f, "/cluster/{cluster}/node/{name}"),
            Subject::Worker { cluster, name } => write!(f, "/cluster/{cluster}/worker/{name}"),
            Subject::Agent { name } => write!(f, "/agent/{name}"),
            Subject::Admin { name } => write!(f, "/admin/{name}"),
        }
    }
}

impl fmt::Debug for SpiffeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// Why a text is not the SPIFFE ID of anything in a fleet.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum SpiffeIdError {
    /// Longer than SPIFFE allows.
    #[error("a SPIFFE ID is at most {MAX_SPIFFE_ID} bytes")]
    TooLong,
    /// Another scheme, or none.
    #[error("the ID does not begin with spiffe://")]
    Scheme,
    /// The trust domain has not the allowed form.
    #[error("the ID's trust domain is malformed")]
    TrustDomain(#[from] TrustDomainError),
    /// The path is none of the four that exist.
    #[error("the ID's path names neither a node, a worker, an agent nor an admin")]
    Path,
    /// The cluster id is no hyphenated lower-case UUID.
    #[error("the ID's cluster is not a hyphenated lower-case UUID")]
    Cluster,
    /// The name has not the allowed form.
    #[error("the ID's name is malformed")]
    Name(#[from] NameError),
}

#[cfg(test)]
mod tests {
    use super::*;

    const CLUSTER: &str = "0b5e1a52-7c1f-4f0e-9a36-5d0c3a1f2e44";

    #[test]
    fn every_kind_of_id_prints_as_it_was_parsed() {
        for text in [
            format!("spiffe://fleet.example/cluster/{CLUSTER}/node/cp-1.site-a"),
            format!("spiffe://fleet.example/cluster/{CLUSTER}/worker/census"),
            "spiffe://fleet_1.example/agent/a".to_owned(),
            "spiffe://f/admin/jo-hn.doe".to_owned(),
        ] {
            assert_eq!(text.parse::<SpiffeId>().unwrap().to_string(), text);
        }
    }

    #[test]
    fn an_id_with_another_spelling_is_refused() {
        for text in [
            "",
            "spiffe://fleet.example",
            "spiffe://fleet.example/",
            "spiffe:///agent/a",
            "SPIFFE://fleet.example/agent/a",
            "https://fleet.example/agent/a",
            "spiffe://Fleet.example/agent/a",
            "spiffe://fleet.example:443/agent/a",
            "spiffe://user@fleet.example/agent/a",
            "spiffe://fleet.example/agent/a/",
            "spiffe://fleet.example//agent/a",
            "spiffe://fleet.example/agent/",
            "spiffe://fleet.example/agent/A",
            "spiffe://fleet.example/agent/*",
            "spiffe://fleet.example/agent/a?x",
            "spiffe://fleet.example/agent/a#x",
            "spiffe://fleet.example/agent/%61",
            "spiffe://fleet.example/agent/a.",
            "spiffe://fleet.example/agent/-a",
            "spiffe://fleet.example/agent/..",
            "spiffe://fleet.example/agent/a\0",
            "spiffe://fleet.example/root/a",
            "spiffe://fleet.example/cluster/0B5E1A52-7C1F-4F0E-9A36-5D0C3A1F2E44/node/a",
            "spiffe://fleet.example/cluster/0b5e1a527c1f4f0e9a365d0c3a1f2e44/node/a",
            "spiffe://fleet.example/cluster/0b5e1a52-7c1f-4f0e-9a36-5d0c3a1f2e44/node",
            "spiffe://fleet.example/cluster/0b5e1a52-7c1f-4f0e-9a36-5d0c3a1f2e44/agent/a",
            "spiffe://fleet.example/cluster/0b5e1a52-7c1f-4f0e-9a36-5d0c3a1f2e44/node/a/b",
        ] {
            assert!(text.parse::<SpiffeId>().is_err(), "{text}");
        }
    }

    #[test]
    fn a_name_may_be_63_characters_and_no_longer() {
        assert!("a".repeat(MAX_NAME).parse::<Name>().is_ok());
        assert_eq!("a".repeat(MAX_NAME + 1).parse::<Name>(), Err(NameError));
    }

    #[test]
    fn only_nodes_and_workers_belong_to_a_cluster() {
        let subject = |text: &str| text.parse::<SpiffeId>().unwrap().subject;
        assert!(subject(&format!("spiffe://f/cluster/{CLUSTER}/node/a")).cluster().is_some());
        assert!(subject(&format!("spiffe://f/cluster/{CLUSTER}/worker/a")).cluster().is_some());
        assert!(subject("spiffe://f/agent/a").cluster().is_none());
        assert!(subject("spiffe://f/admin/a").cluster().is_none());
    }
}
