//! Replaces a CA generation by the next one.
//!
//! A new issuing CA may be used at once: each leaf comes with its issuer, and
//! all that anybody pins is the root. The one before it signs nothing more; its
//! leaves stay good until they end. The root's key is open for this and no
//! longer.

use fleet_kms_identity::TrustDomain;
use fleet_kms_store::RowName;
use zeroize::Zeroizing;

use super::generation::{ISSUING, ROOT, due, new_issuing};
use super::load::{key_of, only_active, prefix};
use super::{LoadError, SignError};
use crate::changes::{ChangeError, Changes};
use crate::ledger::{Changeset, Generator};
use crate::records::payload::{AuthorityRecord, AuthorityState};
use crate::times::{from_ms, to_ms};
use crate::trail::Intent;

/// Why a CA generation was not replaced. The one before it stays in use.
#[derive(Debug, thiserror::Error)]
pub enum RolloverError {
    /// The store cannot be read, or the root's key does not open.
    #[error(transparent)]
    Load(#[from] LoadError),
    /// The root could not sign.
    #[error(transparent)]
    Sign(#[from] SignError),
    /// The new key could not be sealed.
    #[error("the new private key could not be sealed")]
    Seal(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// Another agent renewed it first.
    #[error("the issuing CA is not due for renewal")]
    NotDue,
    /// 2^32 generations were made.
    #[error("no CA generation is left")]
    Generations,
}

/// Makes the next issuing CA active, under the active root, if the one in use is
/// due. Load the [`Authorities`](super::Authorities) again afterwards, also when
/// another agent was first.
///
/// # Errors
///
/// When it is not due, the root's key does not open, or store or audit say no.
pub async fn renew_issuing<O, S>(
    changes: &Changes,
    trust_domain: &TrustDomain,
    open: impl Fn(&RowName, &[u8]) -> Result<Zeroizing<Vec<u8>>, O> + Send + Sync,
    seal: impl Fn(&RowName, &[u8]) -> Result<Vec<u8>, S> + Send + Sync,
    generator: Generator,
) -> Result<(), ChangeError<RolloverError>>
where
    O: std::error::Error + Send + Sync + 'static,
    S: std::error::Error + Send + Sync + 'static,
{
    let prepare = async || -> Result<(Changeset, ()), RolloverError> {
        let ledger = changes.ledger();
        let roots = ledger.scan::<AuthorityRecord>(&prefix(ROOT)).await.map_err(LoadError::from)?;
        let issuing = ledger.scan::<AuthorityRecord>(&prefix(ISSUING)).await.map_err(LoadError::from)?;
        let root = &only_active(ROOT, &roots)?.payload;
        let old = only_active(ISSUING, &issuing)?;
        let now = changes.now();
        if !due(from_ms(old.payload.not_after_ms), now) {
            return Err(RolloverError::NotDue);
        }
        let newest = issuing.iter().map(|record| record.payload.generation).max().unwrap_or(0);
        let generation = newest.checked_add(1).ok_or(RolloverError::Generations)?;
        let root_key = key_of(ROOT, root.generation, ledger, &open).await?;
        let new = new_issuing(trust_domain, generation, (root, &root_key), now, &mut *generator())?;

        let mut changeset = ledger.changeset();
        let retired = AuthorityRecord {
            state: AuthorityState::Retiring.into(),
            retired_ms: to_ms(now),
            ..old.payload.clone()
        };
        changeset.update(old, &retired);
        new.write_to(&mut changeset, &mut |row, key| {
            seal(row, key).map_err(|error| RolloverError::Seal(error.into()))
        })?;
        Ok((changeset, ()))
    };
    changes.run(Intent::new("ca_issuing_renew", "agent"), prepare).await
}
