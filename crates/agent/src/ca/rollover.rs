//! Replaces CA generations by the next ones, each time in one transaction: a
//! crash leaves the old ones or the new ones, never a mixture.
//!
//! A new issuing CA may be used at once: each leaf comes with its issuer, and
//! all that anybody pins is the root. A new root is signed by the one before,
//! and agents show that too, so that who knows only the old one can follow. The
//! private key of what was replaced is deleted: it signs nothing more. A root's
//! key is open for this and no longer.

use std::time::SystemTime;

use fleet_kms_identity::{TrustDomain, validity};
use fleet_kms_store::RowName;
use zeroize::Zeroizing;

use super::generation::{
    Generation, ISSUING, ISSUING_LIFE, MAX_RETIRING, ROOT, ROOT_LIFE, activates, due, new_issuing, new_root,
    next_root,
};
use super::load::{key_of, only_active, prefix};
use super::{LEAF_LIFE, LoadError, SignError};
use crate::changes::{ChangeError, Changes};
use crate::enrolment::issue::MAX_OFFLINE;
use crate::ledger::{Changeset, Generator};
use crate::records::payload::{AuthorityRecord, AuthorityState};
use crate::records::{Record, rows};
use crate::times::{from_ms, optional, to_ms};
use crate::trail::Intent;

/// What is replaced.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Roll {
    /// The issuing CA, if half of its life is over.
    IssuingIfDue,
    /// The issuing CA, now.
    Issuing,
    /// Nothing yet: the next root is made, for everybody to learn, if half of
    /// the active one's life is over.
    PrepareRoot,
    /// Root and issuing CA, by the prepared root if it was known for long enough.
    RootIfPrepared,
    /// Root and issuing CA, now.
    Root,
    /// Root and issuing CA, now, because the old ones' keys may be known to
    /// others: nothing leads from the old ones to the new ones.
    Compromised,
}

impl Roll {
    /// Returns the action's name in the audit when the agent does it by itself.
    pub fn action(self) -> &'static str {
        match self {
            Self::IssuingIfDue | Self::Issuing => "ca_issuing_renew",
            Self::PrepareRoot => "ca_root_prepare",
            Self::RootIfPrepared | Self::Root => "ca_root_renew",
            Self::Compromised => "ca_replace",
        }
    }
}

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
    /// Another agent was first.
    #[error("no CA is due for renewal")]
    NotDue,
    /// A chain cannot lead to more roots.
    #[error("{MAX_RETIRING} roots before the active one are still trusted, which is the most")]
    Retiring,
    /// 2^32 generations were made.
    #[error("no CA generation is left")]
    Generations,
}

impl From<fleet_kms_store::ReadError> for RolloverError {
    fn from(error: fleet_kms_store::ReadError) -> Self {
        Self::Load(error.into())
    }
}

/// Replaces what `what` says. Load the [`Authorities`](super::Authorities) again
/// afterwards, also when another agent was first.
///
/// # Errors
///
/// When it is not due, the root's key does not open, or store or audit say no.
pub async fn roll<O, S>(
    changes: &Changes,
    trust_domain: &TrustDomain,
    (what, intent): (Roll, Intent),
    open: impl Fn(&RowName, &[u8]) -> Result<Zeroizing<Vec<u8>>, O> + Send + Sync,
    seal: impl Fn(&RowName, &[u8]) -> Result<Vec<u8>, S> + Send + Sync,
    generator: Generator,
) -> Result<(), ChangeError<RolloverError>>
where
    O: std::error::Error + Send + Sync + 'static,
    S: std::error::Error + Send + Sync + 'static,
{
    let open = &|row: &RowName, bytes: &[u8]| open(row, bytes);
    let prepare = async || -> Result<(Changeset, ()), RolloverError> {
        let ledger = changes.ledger();
        let before = Generations {
            roots: ledger.scan(&prefix(ROOT)).await.map_err(LoadError::from)?,
            issuing: ledger.scan(&prefix(ISSUING)).await.map_err(LoadError::from)?,
        };
        let now = changes.now();
        before.allow(what, now)?;
        let signer = match what {
            Roll::Compromised => None,
            Roll::RootIfPrepared | Roll::Root => Some(before.prepared().map_or(before.root(), Ok)?),
            Roll::IssuingIfDue | Roll::Issuing | Roll::PrepareRoot => Some(before.root()?),
        };
        let key = match signer {
            Some(root) => Some((root, key_of(ROOT, root.payload.generation, ledger, open).await?)),
            None => None,
        };
        let signer = key.as_ref().map(|(root, key)| (&root.payload, key.as_slice()));
        let made = before.next(what, trust_domain, signer, now, &mut *generator())?;

        let mut changeset = ledger.changeset();
        before.retire(what, now, &mut changeset);
        for row in before.keys_to_delete(what) {
            if let Some(row) = ledger.read_row(&row).await? {
                changeset.delete_sealed(&row);
            }
        }
        for generation in made {
            generation.write_to(&mut changeset, &mut |row, key| {
                seal(row, key).map_err(|error| RolloverError::Seal(error.into()))
            })?;
        }
        Ok((changeset, ()))
    };
    changes.run(intent, prepare).await
}

/// What is on record before a rollover.
struct Generations {
    roots: Vec<Record<AuthorityRecord>>,
    issuing: Vec<Record<AuthorityRecord>>,
}

impl Generations {
    fn root(&self) -> Result<&Record<AuthorityRecord>, LoadError> {
        only_active(ROOT, &self.roots)
    }

    fn prepared(&self) -> Option<&Record<AuthorityRecord>> {
        self.roots.iter().find(|root| root.payload.state() == AuthorityState::Prepared)
    }

    /// Says whether it is time, and whether a chain can lead to all roots.
    fn allow(&self, what: Roll, now: SystemTime) -> Result<(), RolloverError> {
        let ends = |record: &Record<AuthorityRecord>| from_ms(record.payload.not_after_ms);
        let is_due = match what {
            Roll::IssuingIfDue => due(ends(only_active(ISSUING, &self.issuing)?), ISSUING_LIFE, now),
            Roll::PrepareRoot => self.prepared().is_none() && due(ends(self.root()?), ROOT_LIFE, now),
            Roll::RootIfPrepared => self.prepared().is_some_and(|root| now >= activates(ends(root))),
            Roll::Issuing | Roll::Root | Roll::Compromised => true,
        };
        if !is_due {
            return Err(RolloverError::NotDue);
        }
        let is_known = |root: &&Record<AuthorityRecord>| {
            let retired = optional(root.payload.retired_ms);
            retired.is_some_and(|retired| now <= retired + LEAF_LIFE + MAX_OFFLINE)
        };
        let makes_one_more = matches!(what, Roll::Root | Roll::RootIfPrepared);
        if makes_one_more && self.roots.iter().filter(is_known).count() >= MAX_RETIRING {
            return Err(RolloverError::Retiring);
        }
        Ok(())
    }

    /// Makes the new generations. `signer` is the root that signs them.
    fn next(
        &self,
        what: Roll,
        trust_domain: &TrustDomain,
        signer: Option<(&AuthorityRecord, &[u8])>,
        now: SystemTime,
        rng: &mut dyn rand_core::CryptoRng,
    ) -> Result<Vec<Generation>, RolloverError> {
        let (root, issuing) = (following(&self.roots)?, following(&self.issuing)?);
        let under =
            |root, rng: &mut dyn rand_core::CryptoRng| new_issuing(trust_domain, issuing, root, now, rng);
        Ok(match (what, signer) {
            (Roll::Compromised, _) | (_, None) => {
                let old = &self.root()?.payload.certificate;
                let (not_before, _) = validity(old).map_err(|_| SignError::Root)?;
                let (root, _) = new_root(trust_domain, root, not_before, now, rng)?;
                let issuing = under((&root.record, &root.key), rng)?;
                vec![root, issuing]
            }
            (Roll::IssuingIfDue | Roll::Issuing, Some(signer)) => vec![under(signer, rng)?],
            (Roll::PrepareRoot, Some(signer)) => {
                let mut root = next_root(trust_domain, root, signer, now, rng)?;
                root.record.state = AuthorityState::Prepared.into();
                vec![root]
            }
            (Roll::Root | Roll::RootIfPrepared, Some(signer)) if self.prepared().is_some() => {
                vec![under(signer, rng)?]
            }
            (Roll::Root | Roll::RootIfPrepared, Some(signer)) => {
                let root = next_root(trust_domain, root, signer, now, rng)?;
                let issuing = under((&root.record, &root.key), rng)?;
                vec![root, issuing]
            }
        })
    }

    /// Writes what becomes of the generations on record.
    fn retire(&self, what: Roll, now: SystemTime, changeset: &mut Changeset) {
        if what == Roll::Compromised {
            self.roots.iter().chain(&self.issuing).for_each(|record| changeset.delete(record));
            return;
        }
        let replaces_root = matches!(what, Roll::Root | Roll::RootIfPrepared);
        let roots = self.roots.iter().filter(|_| replaces_root);
        let issuing = self.issuing.iter().filter(|_| what != Roll::PrepareRoot);
        for record in roots.chain(issuing) {
            let payload = record.payload.clone();
            let after = match payload.state() {
                AuthorityState::Active => AuthorityRecord {
                    state: AuthorityState::Retiring.into(),
                    retired_ms: to_ms(now),
                    ..payload
                },
                AuthorityState::Prepared => {
                    AuthorityRecord { state: AuthorityState::Active.into(), ..payload }
                }
                AuthorityState::Retiring | AuthorityState::Unspecified => continue,
            };
            changeset.update(record, &after);
        }
    }

    /// The rows of the private keys that nothing is signed with any more.
    fn keys_to_delete(&self, what: Roll) -> Vec<RowName> {
        let is_gone = |kind: &str, state| match what {
            Roll::Compromised => true,
            Roll::PrepareRoot => false,
            Roll::IssuingIfDue | Roll::Issuing => kind == ISSUING && state == AuthorityState::Active,
            Roll::Root | Roll::RootIfPrepared => state == AuthorityState::Active,
        };
        let of = |kind: &'static str, records: &[Record<AuthorityRecord>]| -> Vec<RowName> {
            let gone = records.iter().filter(|record| is_gone(kind, record.payload.state()));
            gone.map(|record| rows::authority_key(kind, record.payload.generation)).collect()
        };
        [of(ROOT, &self.roots), of(ISSUING, &self.issuing)].concat()
    }
}

fn following(records: &[Record<AuthorityRecord>]) -> Result<u32, RolloverError> {
    let newest = records.iter().map(|record| record.payload.generation).max().unwrap_or(0);
    newest.checked_add(1).ok_or(RolloverError::Generations)
}
