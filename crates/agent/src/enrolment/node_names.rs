//! Which node names, and which addresses, a join token is good for.

use std::fmt;
use std::net::IpAddr;
use std::str::FromStr;

use fleet_kms_identity::Name;

/// A pattern is no longer than what it matches may be.
const MAX_PATTERN: usize = 63;

/// The node names that a token makes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum NodeNames {
    /// This one, which may exist already.
    Exact(Name),
    /// This one, a worker's, which may exist already.
    Worker(Name),
    /// New ones that match.
    Matching(Pattern),
    /// Any new one.
    Any,
}

/// A name with `*` for any characters, also none.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pattern(String);

/// A text that can match no node name.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("a node-name pattern is 1 to {MAX_PATTERN} characters of a-z, 0-9, '.', '-' and '*'")]
pub struct PatternError;

impl Pattern {
    /// Returns the pattern as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Says whether the whole of `name` matches.
    pub fn matches(&self, name: &Name) -> bool {
        let mut pieces = self.0.split('*');
        let first = pieces.next().unwrap_or_default();
        let Some(mut rest) = name.as_str().strip_prefix(first) else {
            return false;
        };
        let Some(last) = pieces.next_back() else {
            return rest.is_empty();
        };
        // The leftmost place for each piece leaves the most for those after it.
        for piece in pieces {
            match rest.split_once(piece) {
                Some((_, after)) => rest = after,
                None => return false,
            }
        }
        rest.ends_with(last)
    }
}

impl FromStr for Pattern {
    type Err = PatternError;

    fn from_str(text: &str) -> Result<Self, PatternError> {
        let allowed = |byte: u8| matches!(byte, b'a'..=b'z' | b'0'..=b'9' | b'.' | b'-' | b'*');
        if text.is_empty() || text.len() > MAX_PATTERN || !text.bytes().all(allowed) {
            return Err(PatternError);
        }
        Ok(Self(text.to_owned()))
    }
}

/// A network in CIDR notation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Cidr {
    network: IpAddr,
    prefix: u8,
}

/// A text that is no network.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "a network is an address, '/' and a prefix length, such as 10.1.0.0/16, with no bit set after the prefix"
)]
pub struct CidrError;

impl Cidr {
    /// Says whether `address` is in the network.
    pub fn contains(&self, address: IpAddr) -> bool {
        // A dual-stack socket shows IPv4 callers as mapped IPv6 addresses.
        match (self.network, address.to_canonical()) {
            (IpAddr::V4(_), IpAddr::V4(_)) | (IpAddr::V6(_), IpAddr::V6(_)) => {
                masked(address.to_canonical(), self.prefix) == self.network
            }
            (IpAddr::V4(_), IpAddr::V6(_)) | (IpAddr::V6(_), IpAddr::V4(_)) => false,
        }
    }
}

impl FromStr for Cidr {
    type Err = CidrError;

    fn from_str(text: &str) -> Result<Self, CidrError> {
        let (network, prefix) = text.split_once('/').ok_or(CidrError)?;
        let network: IpAddr = network.parse().map_err(|_| CidrError)?;
        let longest = if network.is_ipv4() { 32 } else { 128 };
        let prefix = prefix.parse().ok().filter(|prefix| *prefix <= longest).ok_or(CidrError)?;
        let cidr = Self { network, prefix };
        // Host bits are a slip of the pen more often than a wish.
        if masked(network, prefix) == network { Ok(cidr) } else { Err(CidrError) }
    }
}

impl fmt::Display for Cidr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.network, self.prefix)
    }
}

fn masked(address: IpAddr, prefix: u8) -> IpAddr {
    match address {
        IpAddr::V4(v4) => {
            let mask = u32::MAX.checked_shl(32 - u32::from(prefix.min(32))).unwrap_or(0);
            IpAddr::V4((v4.to_bits() & mask).into())
        }
        IpAddr::V6(v6) => {
            let mask = u128::MAX.checked_shl(128 - u32::from(prefix.min(128))).unwrap_or(0);
            IpAddr::V6((v6.to_bits() & mask).into())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn matches(pattern: &str, name: &str) -> bool {
        pattern.parse::<Pattern>().unwrap().matches(&name.parse().unwrap())
    }

    #[test]
    fn a_star_stands_for_any_characters_and_for_none() {
        for (pattern, name) in
            [("cp-*", "cp-1"), ("*", "a"), ("*-cp-*.x", "site1-cp-3.x"), ("a*a*a", "aaa"), ("cp1", "cp1")]
        {
            assert!(matches(pattern, name), "{pattern} {name}");
        }
    }

    #[test]
    fn the_whole_name_must_match() {
        for (pattern, name) in [
            ("cp-*", "xcp-1"),
            ("*-cp", "a-cpx"),
            ("a*a", "a"),
            ("ab*ba", "aba"),
            ("cp1", "cp10"),
            ("a**b", "ac"),
        ] {
            assert!(!matches(pattern, name), "{pattern} {name}");
        }
    }

    #[test]
    fn a_pattern_that_can_match_no_name_is_refused() {
        for text in ["", "Node", "a b", "a/b", "ä*", &"x".repeat(64)] {
            assert_eq!(text.parse::<Pattern>(), Err(PatternError), "{text}");
        }
    }

    #[test]
    fn a_network_contains_its_addresses_only() {
        let contains = |network: &str, address: &str| {
            network.parse::<Cidr>().unwrap().contains(address.parse().unwrap())
        };
        assert!(contains("10.1.0.0/16", "10.1.255.1"));
        assert!(contains("10.1.0.0/16", "::ffff:10.1.2.3"));
        assert!(!contains("10.1.0.0/16", "10.2.0.1"));
        assert!(!contains("10.1.0.0/16", "2001:db8::1"));
        assert!(contains("2001:db8::/32", "2001:db8:1::1"));
        assert!(contains("0.0.0.0/0", "203.0.113.9") && !contains("0.0.0.0/0", "::1"));
        assert!(contains("192.0.2.7/32", "192.0.2.7") && !contains("192.0.2.7/32", "192.0.2.6"));
    }

    #[test]
    fn a_network_with_host_bits_or_a_long_prefix_is_refused() {
        for text in ["10.1.0.1/16", "10.1.0.0/33", "10.1.0.0", "2001:db8::/129", "x/8", "10.0.0.0/-1"] {
            assert_eq!(text.parse::<Cidr>(), Err(CidrError), "{text}");
        }
        assert_eq!("10.1.0.0/16".parse::<Cidr>().unwrap().to_string(), "10.1.0.0/16");
    }
}
