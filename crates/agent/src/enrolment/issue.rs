//! Gives identities their certificates, one transaction each.
//!
//! The identity's record in the store says which serials it may use: `current`,
//! and `next` once a newer one was issued and until that is seen in use. A
//! certificate is handed out only after the transaction that records it, with
//! its issue number, is durable; what a lost reply leaves behind is handed out
//! again to whoever holds the same key. Nothing here reads a name from a CSR.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use arc_swap::ArcSwap;
use fleet_kms_identity::{Serial, SpiffeId, TrustDomain};
use fleet_kms_store::Revision;

use super::audit_trail;
use super::limits::Limits;
use crate::ca::{Authorities, SignError};
use crate::changes::{ChangeError, Changes, Unconfirmed};
use crate::identities::{self, IdentityError, LiveIdentities};
use crate::ledger::{Changeset, Generator, Ledger, LedgerError, WriteError};
use crate::records::payload::{IdentityRecord, IssuedCertificate, IssuedRecord};
use crate::records::{Record, rows};
use crate::times::{from_ms, to_ms};

mod ban;
mod direct;
mod join;
mod readopt;
mod renew;

pub use ban::NodeChangeError;
pub use direct::{AgainError, Bundle, DirectError, agent_certificate_due, certificates_pem};
pub(super) use join::Shown;
pub use join::{EnrolError, Join};
pub use renew::{RenewError, RenewRefused};

/// How long after its notAfter a node's certificate may still renew.
pub const MAX_OFFLINE: Duration = Duration::from_secs(180 * 86_400);

/// Issues certificates.
pub struct Issuer {
    changes: Arc<Changes>,
    authorities: Arc<ArcSwap<Authorities>>,
    identities: Arc<LiveIdentities>,
    generator: Generator,
    max_offline: Duration,
    limits: Limits,
    /// All issuing of this agent takes turns, because all of it raises the one
    /// issue number; only another agent's issuing is left to conflict with.
    turn: tokio::sync::Mutex<()>,
}

/// A certificate that is on record.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Certified {
    /// Whom it names.
    pub id: SpiffeId,
    /// Leaf first, then issuing CAs, DER; no root.
    pub chain: Vec<Vec<u8>>,
    /// When the leaf expires.
    pub not_after: SystemTime,
    /// It had been issued before, to the same key.
    pub again: bool,
}

/// Why a certificate was not issued, through no fault of who asked.
#[derive(Debug, thiserror::Error)]
pub enum IssueFailure {
    /// The store cannot be read or a row is damaged.
    #[error(transparent)]
    Ledger(#[from] LedgerError),
    /// An identity's record has no meaning to this release.
    #[error(transparent)]
    Identity(#[from] IdentityError),
    /// The CA could not sign.
    #[error(transparent)]
    Sign(#[from] SignError),
    /// The row of the last issue number is missing.
    #[error("the store has lost its issue number; restore a backup")]
    NoIssueNumber,
    /// 2^63 certificates were issued.
    #[error("no issue number is left")]
    IssueNumbers,
    /// Other agents kept getting in first.
    #[error("other changes kept getting in first; try again")]
    Contended,
    /// The store did not take the change, or its reply was lost.
    #[error(transparent)]
    Write(WriteError),
    /// The store may be a copy from before, so that nothing is changed yet.
    #[error("{0}; an operator must confirm the store first")]
    Unconfirmed(Unconfirmed),
    /// The change could not be recorded in the audit.
    #[error("the change cannot be recorded in the audit, so it was refused")]
    Audit(#[source] fleet_kms_audit::LogError),
}

impl IssueFailure {
    /// Returns the closed metric and audit label.
    pub fn reason(&self) -> &'static str {
        match self {
            Self::Ledger(_) | Self::Write(_) | Self::Contended => "store",
            Self::Identity(_) | Self::NoIssueNumber => "store_damaged",
            Self::Sign(_) | Self::IssueNumbers => "ca",
            Self::Unconfirmed(_) => "unconfirmed",
            Self::Audit(_) => "audit",
        }
    }

    /// Takes a change's error apart: a refusal as it is, the rest as a failure.
    pub(super) fn flatten<E>(error: ChangeError<E>) -> E
    where
        E: std::error::Error + From<Self> + 'static,
    {
        match error {
            ChangeError::Refused(refused) => refused,
            ChangeError::Contended => Self::Contended.into(),
            ChangeError::Write(error) => Self::Write(error).into(),
            ChangeError::Unconfirmed(why) => Self::Unconfirmed(why).into(),
            ChangeError::Audit(error) => Self::Audit(error).into(),
        }
    }
}

/// A certificate, and the identity's record if this change writes it; without
/// one the certificate had been issued before.
type Prepared = (IssuedCertificate, Option<Record<IdentityRecord>>);

impl Issuer {
    /// Makes the agent's only issuer.
    pub fn new(
        changes: Arc<Changes>,
        authorities: Arc<ArcSwap<Authorities>>,
        identities: Arc<LiveIdentities>,
        generator: Generator,
        max_offline: Duration,
    ) -> Self {
        Self {
            changes,
            authorities,
            identities,
            generator,
            max_offline,
            limits: Limits::default(),
            turn: tokio::sync::Mutex::default(),
        }
    }

    /// Returns the CAs in use.
    pub fn authorities(&self) -> Arc<Authorities> {
        self.authorities.load_full()
    }

    /// Returns the agent's time.
    pub fn now(&self) -> SystemTime {
        self.changes.now()
    }

    /// Returns the enrolment port's budgets.
    pub fn limits(&self) -> &Limits {
        &self.limits
    }

    /// Makes `next` the current certificate once it was seen in use; the one
    /// before it is superseded from then on. Does nothing when `serial` is not
    /// `next` any more.
    ///
    /// # Errors
    ///
    /// When the store or the audit fails; a later call may try again.
    pub async fn promote(&self, id: &SpiffeId, serial: &Serial) -> Result<(), IssueFailure> {
        if self.promotable(id, serial).await?.is_none() {
            return self.refresh(id).await;
        }
        let intent = audit_trail::promote(id, serial);
        let prepare = || self.prepare_promotion(id, serial);
        let run = self.changes.run_with_revision(intent, prepare).await;
        let (record, revision) = run.map_err(IssueFailure::flatten::<IssueFailure>)?;
        match record {
            Some(record) => self.publish(record, revision),
            None => self.refresh(id).await,
        }
    }

    /// Brings the identity in memory up to what the store says.
    ///
    /// # Errors
    ///
    /// When the store cannot be read or the record is damaged.
    pub async fn refresh(&self, id: &SpiffeId) -> Result<(), IssueFailure> {
        // Before the store is read: what is published meanwhile is newer and stays.
        let known = self.identities.find(id).map_or(Revision::ABSENT, |identity| identity.revision);
        match self.identity(id).await? {
            Some(record) => {
                let revision = record.revision;
                self.publish(record, revision)
            }
            None => {
                // Gone at a revision that only its remover knows.
                self.identities.remove(id, known);
                Ok(())
            }
        }
    }

    fn ledger(&self) -> &Ledger {
        self.changes.ledger()
    }

    fn trust_domain(&self) -> TrustDomain {
        self.authorities().trust_domain().clone()
    }

    async fn identity(&self, id: &SpiffeId) -> Result<Option<Record<IdentityRecord>>, IssueFailure> {
        Ok(self.ledger().read(&rows::identity(id)).await?)
    }

    async fn promotable(
        &self,
        id: &SpiffeId,
        serial: &Serial,
    ) -> Result<Option<Record<IdentityRecord>>, IssueFailure> {
        Ok(self.identity(id).await?.filter(|record| has_serial(&record.payload.next, serial)))
    }

    async fn prepare_promotion(
        &self,
        id: &SpiffeId,
        serial: &Serial,
    ) -> Result<(Changeset, Option<Record<IdentityRecord>>), IssueFailure> {
        let mut changeset = self.ledger().changeset();
        let Some(before) = self.promotable(id, serial).await? else {
            return Ok((changeset, None));
        };
        let after = promoted(&before.payload);
        let record = write_identity(&mut changeset, id, Some(&before), after);
        Ok((changeset, Some(record)))
    }

    /// Makes a certificate and adds its issue number to the changeset.
    async fn certify(
        &self,
        changeset: &mut Changeset,
        id: &SpiffeId,
        spki: &[u8],
        spki_sha256: &[u8; 32],
        now: SystemTime,
    ) -> Result<IssuedCertificate, IssueFailure> {
        let row = rows::fixed(rows::ISSUED);
        let last = self.ledger().read::<IssuedRecord>(&row).await?.ok_or(IssueFailure::NoIssueNumber)?;
        let number = last.payload.last.checked_add(1).ok_or(IssueFailure::IssueNumbers)?;
        changeset.update(&last, &IssuedRecord { last: number });
        let mut random = [0; 8];
        (self.generator)().fill_bytes(&mut random);
        let serial = Serial::new(number, random).ok_or(IssueFailure::IssueNumbers)?;
        let leaf = self.authorities().issue(id, &serial, spki, now)?;
        Ok(IssuedCertificate {
            serial: serial.as_bytes().to_vec(),
            spki_sha256: spki_sha256.to_vec(),
            not_after_ms: to_ms(leaf.not_after),
            chain: leaf.chain,
        })
    }

    /// Makes a committed record visible to the next call.
    fn publish(&self, record: Record<IdentityRecord>, revision: Revision) -> Result<(), IssueFailure> {
        self.identities.publish(identities::parse(&Record { revision, ..record })?);
        Ok(())
    }
}

/// Puts an identity's new record into the changeset. Returns it as it will be,
/// but for its revision.
fn write_identity(
    changeset: &mut Changeset,
    id: &SpiffeId,
    before: Option<&Record<IdentityRecord>>,
    after: IdentityRecord,
) -> Record<IdentityRecord> {
    match before {
        Some(record) => {
            changeset.update(record, &after);
            Record { seq: record.seq + 1, payload: after, ..record.clone() }
        }
        None => {
            let row = rows::identity(id);
            changeset.insert(row.clone(), &after);
            Record { row, revision: Revision::ABSENT, seq: 1, payload: after, stored: Vec::new() }
        }
    }
}

fn promoted(record: &IdentityRecord) -> IdentityRecord {
    IdentityRecord { current: record.next.clone(), next: None, ..record.clone() }
}

fn certified(id: &SpiffeId, issued: &IssuedCertificate, again: bool) -> Certified {
    let not_after = from_ms(issued.not_after_ms);
    Certified { id: id.clone(), chain: issued.chain.clone(), not_after, again }
}

fn has_serial(issued: &Option<IssuedCertificate>, serial: &Serial) -> bool {
    issued.as_ref().is_some_and(|issued| issued.serial == serial.as_bytes())
}

fn has_key(issued: &Option<IssuedCertificate>, spki_sha256: &[u8; 32]) -> bool {
    issued.as_ref().is_some_and(|issued| issued.spki_sha256 == spki_sha256)
}

#[cfg(test)]
mod tests;
