//! The join tokens that the store keeps: listed and revoked, by their public
//! names. Nothing here can show a secret.

use data_encoding::HEXLOWER;

use crate::authz::{Action, Permit, actions};
use crate::changes::{ChangeError, Changes};
use crate::control_plane::{Stale, Wish};
use crate::enrolment::audit_trail::token_name;
use crate::ledger::LedgerError;
use crate::records::Record;
use crate::records::payload::TokenRecord;
use crate::records::rows;
use crate::times::to_ms;
use crate::trail::Intent;

/// A token of the store and the hash that is its row's name.
#[derive(Debug, Clone)]
pub struct KeptToken {
    /// SHA-256 of its secret.
    pub hash: [u8; 32],
    /// What it is good for.
    pub record: Record<TokenRecord>,
}

/// Why a token was not found or not revoked.
#[derive(Debug, thiserror::Error)]
pub enum TokenChangeError {
    /// There is none of that name in the cluster.
    #[error("the cluster has no such join token")]
    Unknown,
    /// The caller decided on an older state.
    #[error(transparent)]
    Stale(#[from] Stale),
    /// The store cannot be read.
    #[error(transparent)]
    Ledger(#[from] LedgerError),
}

/// Actions whose permit allows to revoke a token: a retired cluster keeps none.
pub trait RevokesTokens: Action {}
impl RevokesTokens for actions::TokenRevoke {}
impl RevokesTokens for actions::ClusterRetire {}
impl RevokesTokens for actions::ClusterRestore {}

impl KeptToken {
    /// Its public name, as the audit has it: finds its row, opens nothing.
    pub fn name(&self) -> String {
        token_name(&self.hash)
    }
}

/// Lists the permit's cluster's tokens that can still be used, by name.
///
/// # Errors
///
/// When the store cannot be read.
pub async fn usable<A: Action>(changes: &Changes, permit: &Permit<A>) -> Result<Vec<KeptToken>, LedgerError> {
    let now = to_ms(changes.now());
    let mut kept = of_cluster(changes, permit).await?;
    kept.retain(|token| token.record.payload.uses_left > 0 && token.record.payload.expires_ms > now);
    kept.sort_by_key(|token| token.hash);
    Ok(kept)
}

/// Finds one of the permit's cluster's tokens by its name.
///
/// # Errors
///
/// When there is none, or the store cannot be read.
pub async fn find<A: Action>(
    changes: &Changes,
    permit: &Permit<A>,
    name: &str,
) -> Result<KeptToken, TokenChangeError> {
    let kept = of_cluster(changes, permit).await?;
    kept.into_iter().find(|token| token.name() == name).ok_or(TokenChangeError::Unknown)
}

/// Takes a token back. Nodes that it made stay.
///
/// # Errors
///
/// When there is none of that name, or the store refuses.
pub async fn revoke<A: RevokesTokens>(
    changes: &Changes,
    permit: &Permit<A>,
    name: &str,
    cluster_name: &str,
    wish: Wish<'_>,
) -> Result<KeptToken, ChangeError<TokenChangeError>> {
    let intent = Intent::new("token_revoke", permit.who())
        .cluster(permit.cluster(), cluster_name)
        .target(name)
        .reason(wish.reason);
    let prepare = || async {
        let token = find(changes, permit, name).await?;
        wish.check_row(token.record.revision)?;
        let mut changeset = changes.ledger().changeset();
        changeset.delete(&token.record);
        Ok((changeset, token))
    };
    changes.run(intent, prepare).await
}

/// Takes all tokens of the permit's cluster back, one change each.
///
/// # Errors
///
/// At the first that cannot be revoked; running it again goes on.
pub async fn revoke_all<A: RevokesTokens>(
    changes: &Changes,
    permit: &Permit<A>,
    cluster_name: &str,
    reason: Option<&str>,
) -> Result<(), ChangeError<TokenChangeError>> {
    let kept = of_cluster(changes, permit).await;
    for token in kept.map_err(|error| ChangeError::Refused(error.into()))? {
        match revoke(changes, permit, &token.name(), cluster_name, Wish { reason, at: None }).await {
            Ok(_) | Err(ChangeError::Refused(TokenChangeError::Unknown)) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

async fn of_cluster<A: Action>(changes: &Changes, permit: &Permit<A>) -> Result<Vec<KeptToken>, LedgerError> {
    let records = changes.ledger().scan::<TokenRecord>(rows::TOKENS).await?;
    let mine = records.into_iter().filter(|record| record.payload.cluster == permit.cluster().as_bytes());
    Ok(mine.filter_map(kept).collect())
}

/// A row whose name is no hash is none of ours.
fn kept(record: Record<TokenRecord>) -> Option<KeptToken> {
    let name = record.row.as_str().strip_prefix(rows::TOKENS)?;
    let hash = HEXLOWER.decode(name.as_bytes()).ok()?.try_into().ok()?;
    Some(KeptToken { hash, record })
}
