//! Join tokens: made for an operator, judged when a node shows one.
//!
//! The store holds what a token is good for under the SHA-256 of its secret,
//! never the secret. A token is judged whole before anything is consumed, and
//! judging writes nothing.

use std::net::IpAddr;
use std::time::{Duration, SystemTime};

use fleet_kms_identity::{ClusterUuid, JoinToken, Name, NameError, Subject};
use fleet_kms_keyring::ClusterId;
use fleet_kms_store::Revision;

use super::audit_trail;
use super::issue::IssueFailure;
use super::node_names::{Cidr, CidrError, NodeNames, Pattern, PatternError};
use crate::ca::Authorities;
use crate::changes::Changes;
use crate::ledger::Changeset;
use crate::records::payload::{ClusterRecord, TokenRecord, TokenUse};
use crate::records::rows;
use crate::times::{from_ms, to_ms};

mod kept;

pub(crate) use super::audit_trail::token_name as name_of;
pub use kept::{KeptToken, RevokesTokens, TokenChangeError, find, revoke, revoke_all, usable};

/// Long enough to paste it into a terminal.
pub const MIN_LIFE: Duration = Duration::from_secs(60);
/// The life of a token whose maker said nothing about it.
pub const DEFAULT_LIFE: Duration = Duration::from_secs(15 * 60);
/// For machine images that are rebuilt once a year.
pub const MAX_LIFE: Duration = Duration::from_secs(366 * 86_400);
/// The nodes of the largest cluster that one token should make.
pub const MAX_USES: u32 = 10_000;
/// Stands before the name in the record of a worker's token. No node name has a
/// `/`, so a release that knows no workers refuses such a token.
const WORKER: &str = "worker/";
/// Uses listed in the token's record, the latest ones; the audit has all.
const USES_KEPT: usize = 64;

/// What a new token is to be good for.
#[derive(Debug, Clone)]
pub struct TokenTerms {
    cluster: ClusterId,
    names: NodeNames,
    network: Option<Cidr>,
    uses: u32,
    life: Duration,
}

/// A wish that no token can fulfil.
#[derive(Debug, thiserror::Error)]
pub enum TermsError {
    /// The node's name has no allowed form.
    #[error("the node name is not allowed")]
    Node(#[source] NameError),
    /// The pattern can match no name.
    #[error("the node-name pattern is not allowed")]
    Pattern(#[source] PatternError),
    /// The worker's name has no allowed form.
    #[error("the worker name is not allowed")]
    Worker(#[source] NameError),
    /// A worker and a node at once.
    #[error("a token is for a worker or for nodes, not both")]
    WorkerAndNode,
    /// A name and a pattern at once.
    #[error("a token has a node name or a pattern, not both")]
    NodeAndPattern,
    /// The network does not parse.
    #[error("the network is not allowed")]
    Network(#[source] CidrError),
    /// No use, or too many.
    #[error("a token has 1 to {MAX_USES} uses")]
    Uses,
    /// Too short or too long.
    #[error("a token lives 1 minute to 366 days")]
    Life,
}

impl TokenTerms {
    /// Parses an operator's wish; an absent text means "any".
    ///
    /// # Errors
    ///
    /// When a text has no meaning or a number is out of bounds.
    pub fn new(
        cluster: ClusterId,
        node: Option<&str>,
        pattern: Option<&str>,
        network: Option<&str>,
        uses: u32,
        life: Duration,
    ) -> Result<Self, TermsError> {
        let names = match (node, pattern) {
            (Some(_), Some(_)) => return Err(TermsError::NodeAndPattern),
            (Some(node), None) => NodeNames::Exact(node.parse().map_err(TermsError::Node)?),
            (None, Some(pattern)) => NodeNames::Matching(pattern.parse().map_err(TermsError::Pattern)?),
            (None, None) => NodeNames::Any,
        };
        let network = network.map(str::parse).transpose().map_err(TermsError::Network)?;
        if !(1..=MAX_USES).contains(&uses) {
            return Err(TermsError::Uses);
        }
        if !(MIN_LIFE..=MAX_LIFE).contains(&life) {
            return Err(TermsError::Life);
        }
        Ok(Self { cluster, names, network, uses, life })
    }

    /// As [`Self::new`], for one worker.
    ///
    /// # Errors
    ///
    /// As [`Self::new`].
    pub fn worker(
        cluster: ClusterId,
        worker: &str,
        network: Option<&str>,
        uses: u32,
        life: Duration,
    ) -> Result<Self, TermsError> {
        let names = NodeNames::Worker(worker.parse().map_err(TermsError::Worker)?);
        Ok(Self { names, ..Self::new(cluster, None, None, network, uses, life)? })
    }

    fn record(&self, who: &str, now: SystemTime) -> TokenRecord {
        let (node, pattern) = match &self.names {
            NodeNames::Exact(name) => (name.to_string(), String::new()),
            NodeNames::Worker(name) => (format!("{WORKER}{name}"), String::new()),
            NodeNames::Matching(pattern) => (String::new(), pattern.as_str().to_owned()),
            NodeNames::Any => (String::new(), String::new()),
        };
        TokenRecord {
            cluster: self.cluster.as_bytes().to_vec(),
            node,
            pattern,
            cidr: self.network.map(|network| network.to_string()).unwrap_or_default(),
            uses_left: self.uses,
            issued_ms: to_ms(now),
            expires_ms: to_ms(now + self.life),
            issued_by: who.to_owned(),
            used: Vec::new(),
            uses: self.uses,
        }
    }
}

/// Why no token was made.
#[derive(Debug, thiserror::Error)]
pub enum TokenError {
    /// No such cluster, or no longer.
    #[error("there is no such cluster")]
    Cluster,
    /// Store, audit or CA failed.
    #[error(transparent)]
    Failed(#[from] IssueFailure),
}

impl TokenError {
    /// Returns the closed metric and audit label.
    pub fn reason(&self) -> &'static str {
        match self {
            Self::Cluster => "no_cluster",
            Self::Failed(failure) => failure.reason(),
        }
    }
}

/// A join token that was just made.
pub struct NewToken {
    /// The token with its secret, shown once and kept nowhere.
    pub token: JoinToken,
    /// What the store keeps of it.
    pub record: TokenRecord,
    /// At which revision.
    pub revision: Revision,
}

/// Says which worker a token's record is for, if it is for one.
pub fn worker_of(record: &TokenRecord) -> Option<&str> {
    record.node.strip_prefix(WORKER)
}

/// Makes a join token on behalf of `who`, who must hold a permit for the
/// cluster. The text of the returned token is shown once and kept nowhere.
///
/// # Errors
///
/// When the cluster does not exist or the token cannot be recorded.
pub async fn create(
    changes: &Changes,
    authorities: &Authorities,
    terms: &TokenTerms,
    (who, reason): (&str, Option<&str>),
    rng: &mut (dyn rand_core::CryptoRng + Send),
) -> Result<NewToken, TokenError> {
    let now = changes.now();
    let token = JoinToken::generate(authorities.root_sha256(), now, rng);
    let row = rows::token(&token.hash());
    let record = terms.record(who, now);
    let cluster = live_cluster(changes, &terms.cluster).await?.ok_or(TokenError::Cluster)?;
    let intent =
        audit_trail::token_create(who, (terms.cluster, &cluster.name), &token.hash(), &record).reason(reason);
    let prepare = || async {
        live_cluster(changes, &terms.cluster).await?.ok_or(TokenError::Cluster)?;
        let mut changeset: Changeset = changes.ledger().changeset();
        changeset.insert(row.clone(), &record);
        Ok::<_, TokenError>((changeset, ()))
    };
    let run = changes.run_with_revision(intent, prepare).await;
    let ((), revision) = run.map_err(IssueFailure::flatten::<TokenError>)?;
    Ok(NewToken { token, record, revision })
}

/// Reads a cluster that exists and is not retired.
pub(super) async fn live_cluster(
    changes: &Changes,
    cluster: &ClusterId,
) -> Result<Option<ClusterRecord>, IssueFailure> {
    let record = changes.ledger().read::<ClusterRecord>(&rows::cluster(cluster)).await?;
    Ok(record.map(|record| record.payload).filter(|cluster| cluster.retired_ms == 0))
}

/// Why a token does not help the node that shows it. The text goes to the node.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum TokenRefused {
    /// Never made, or revoked.
    #[error("the agent does not know this join token; was it made for this fleet, and copied whole?")]
    Unknown,
    /// Its time is over.
    #[error("this join token has expired; ask for a new one")]
    Expired,
    /// All its uses are spent, by other keys.
    #[error("this join token has been used up; ask for a new one")]
    UsedUp,
    /// Shown from outside its network.
    #[error("this join token may not be used from this address")]
    Address,
    /// It names no node, and the caller named none either.
    #[error("this join token names no node; say which node this is")]
    NodeMissing,
    /// It does not make nodes of that name.
    #[error("this join token is not for a node of this name")]
    Node,
    /// The wanted name has no allowed form.
    #[error("this node name is not allowed: use a-z, 0-9, '.' and '-', at most 63 characters")]
    NodeForm,
    /// The stored token does not parse.
    #[error("this join token's record is damaged; ask for a new one")]
    Damaged,
}

impl TokenRefused {
    /// Returns the closed metric and audit label.
    pub fn reason(self) -> &'static str {
        match self {
            Self::Unknown => "token_unknown",
            Self::Expired => "token_expired",
            Self::UsedUp => "token_used_up",
            Self::Address => "token_address",
            Self::NodeMissing => "token_node_missing",
            Self::Node => "token_node",
            Self::NodeForm => "node_form",
            Self::Damaged => "token_damaged",
        }
    }
}

/// The identity that a token would make.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Claim {
    pub(super) cluster: ClusterId,
    pub(super) name: Name,
    /// It makes a worker, not a node.
    pub(super) is_worker: bool,
    /// The token is bound to this very name, so it may replace its identity.
    pub(super) may_replace: bool,
}

impl Claim {
    /// Returns whom the token makes.
    pub(super) fn subject(&self) -> Subject {
        let (cluster, name) = (ClusterUuid::from_bytes(*self.cluster.as_bytes()), self.name.clone());
        match self.is_worker {
            true => Subject::Worker { cluster, name },
            false => Subject::Node { cluster, name },
        }
    }
}

/// Says whom `token` would make of a node that wants to be `wanted` (empty: as
/// the token says). Neither dates nor uses nor address are judged yet.
pub(super) fn claim(token: &TokenRecord, wanted: &str) -> Result<Claim, TokenRefused> {
    let cluster = token.cluster.as_slice().try_into().map_err(|_| TokenRefused::Damaged)?;
    let cluster = ClusterId::from_bytes(cluster);
    let wanted = match wanted {
        "" => None,
        name => Some(name.parse::<Name>().map_err(|_| TokenRefused::NodeForm)?),
    };
    let names = names(token)?;
    let is_worker = matches!(names, NodeNames::Worker(_));
    let (name, may_replace) = match (names, wanted) {
        (NodeNames::Exact(name) | NodeNames::Worker(name), None) => (name, true),
        (NodeNames::Exact(name) | NodeNames::Worker(name), Some(wanted)) if name == wanted => (name, true),
        (NodeNames::Matching(_) | NodeNames::Any, None) => return Err(TokenRefused::NodeMissing),
        (NodeNames::Matching(pattern), Some(wanted)) if pattern.matches(&wanted) => (wanted, false),
        (NodeNames::Any, Some(wanted)) => (wanted, false),
        (NodeNames::Exact(_) | NodeNames::Worker(_) | NodeNames::Matching(_), Some(_)) => {
            return Err(TokenRefused::Node);
        }
    };
    Ok(Claim { cluster, name, is_worker, may_replace })
}

/// Says whether `token` may be used once more, from `address`.
pub(super) fn judge(token: &TokenRecord, address: IpAddr, now: SystemTime) -> Result<(), TokenRefused> {
    if !token.cidr.is_empty() {
        let network: Cidr = token.cidr.parse().map_err(|_| TokenRefused::Damaged)?;
        if !network.contains(address) {
            return Err(TokenRefused::Address);
        }
    }
    if now >= from_ms(token.expires_ms) {
        return Err(TokenRefused::Expired);
    }
    if token.uses_left == 0 {
        return Err(TokenRefused::UsedUp);
    }
    Ok(())
}

/// Returns the token's record after one more use.
pub(super) fn consume(
    token: &TokenRecord,
    identity: String,
    spki_sha256: &[u8; 32],
    now: SystemTime,
) -> TokenRecord {
    let mut used = token.clone();
    used.uses_left = used.uses_left.saturating_sub(1);
    let surplus = (used.used.len() + 1).saturating_sub(USES_KEPT);
    used.used.drain(..surplus);
    used.used.push(TokenUse { identity, spki_sha256: spki_sha256.to_vec(), used_ms: to_ms(now) });
    used
}

fn names(token: &TokenRecord) -> Result<NodeNames, TokenRefused> {
    match (token.node.as_str(), token.pattern.as_str()) {
        ("", "") => Ok(NodeNames::Any),
        (node, "") if node.starts_with(WORKER) => {
            let name = node.strip_prefix(WORKER).unwrap_or_default();
            Ok(NodeNames::Worker(name.parse().map_err(|_| TokenRefused::Damaged)?))
        }
        (node, "") => Ok(NodeNames::Exact(node.parse().map_err(|_| TokenRefused::Damaged)?)),
        ("", pattern) => {
            Ok(NodeNames::Matching(pattern.parse::<Pattern>().map_err(|_| TokenRefused::Damaged)?))
        }
        (_, _) => Err(TokenRefused::Damaged),
    }
}

#[cfg(test)]
mod tests;
