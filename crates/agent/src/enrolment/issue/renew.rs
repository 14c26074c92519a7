//! Renewal: a certificate and a new key become the next certificate.

use std::time::{Duration, SystemTime};

use fleet_kms_identity::{Certificate, Csr, CsrError, SpiffeId, Subject};

use super::{
    Certified, IssueFailure, Issuer, Prepared, certified, has_key, has_serial, promoted, write_identity,
};
use crate::authz::{Denied, Permit, actions};
use crate::enrolment::audit_trail;
use crate::enrolment::limits::Limited;
use crate::ledger::Changeset;
use crate::records::Record;
use crate::records::payload::{IdentityRecord, IssuedCertificate};
use crate::times::to_ms;

/// Why a certificate may not be renewed. The text goes to the node.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum RenewRefused {
    /// The store has no such identity.
    #[error("the fleet does not know this identity; enrol it with a join token")]
    Unknown,
    /// An operator banned it.
    #[error("this identity is banned")]
    Banned,
    /// Neither current nor next: an old copy, or a clone's.
    #[error(
        "this certificate was superseded by a newer one of the same identity; enrol this node with a join token"
    )]
    Superseded,
    /// The serial is right and the key is not.
    #[error("this certificate's key is not the one on record")]
    ForeignKey,
    /// Expired for longer than `max_offline`.
    #[error("this certificate expired too long ago to be renewed; enrol this node with a join token")]
    OffTooLong,
    /// Expired, and not a node's.
    #[error("only a node's certificate may be renewed after it has expired")]
    ExpiredKind,
    /// The CSR has a key that already has a certificate.
    #[error("a renewal needs a new key; the certificate request has the current one")]
    SameKey,
}

impl RenewRefused {
    /// Returns the closed metric and audit label.
    pub fn reason(self) -> &'static str {
        match self {
            Self::Unknown => "unknown_identity",
            Self::Banned => "banned",
            Self::Superseded => "superseded",
            Self::ForeignKey => "foreign_key",
            Self::OffTooLong => "off_too_long",
            Self::ExpiredKind => "expired",
            Self::SameKey => "same_key",
        }
    }
}

/// Why a certificate was not renewed.
#[derive(Debug, thiserror::Error)]
pub enum RenewError {
    /// The CSR is malformed or not signed by its own key.
    #[error(transparent)]
    Csr(#[from] CsrError),
    /// It may not be renewed.
    #[error(transparent)]
    Refused(#[from] RenewRefused),
    /// Too many renewals.
    #[error(transparent)]
    Limited(#[from] Limited),
    /// Store, audit or CA failed.
    #[error(transparent)]
    Failed(#[from] IssueFailure),
}

impl RenewError {
    /// Returns the closed metric and audit label.
    pub fn reason(&self) -> &'static str {
        match self {
            Self::Csr(_) => "csr",
            Self::Refused(refused) => refused.reason(),
            Self::Limited(_) => "rate_limited",
            Self::Failed(failure) => failure.reason(),
        }
    }
}

/// What a judged renewal comes to.
#[derive(Debug, PartialEq)]
enum Verdict {
    /// The same key asked before and its reply was lost.
    Again(IssuedCertificate),
    /// Renew; `next` was shown, so it becomes current first.
    New { promote: bool },
}

impl Issuer {
    /// Renews the caller's certificate for the CSR's key. The permit says that
    /// the caller may renew at all; serial, key and dates are judged here, by
    /// the store. The same CSR key gets the same certificate again.
    ///
    /// # Errors
    ///
    /// When the certificate is not current or next, its key is not on record,
    /// it expired more than `max_offline` ago, the CSR's key is not new, or
    /// budgets, store, audit or CA say no. Refusals are audited.
    pub async fn renew(
        &self,
        permit: &Permit<actions::Renew>,
        shown: &Certificate,
        csr: &Csr,
    ) -> Result<Certified, RenewError> {
        let now = self.now();
        let result = self.try_renew(permit.who(), shown, csr, now).await;
        if let Err(error) = &result {
            self.note_refused_renewal(shown, error).await;
        }
        result
    }

    /// Records that a renewal was refused.
    pub async fn note_refused_renewal(&self, shown: &Certificate, error: &RenewError) {
        if let Some(event) = audit_trail::renew_refused(shown, error) {
            self.changes.event(event).await;
        }
    }

    /// Records that the table or the identity's state kept a caller from
    /// renewing: a ban, a superseded serial, the wrong kind.
    pub async fn note_denied_renewal(&self, shown: &Certificate, denied: Denied) {
        self.changes.event(audit_trail::renew_denied(shown, denied)).await;
    }

    async fn try_renew(
        &self,
        who: &str,
        shown: &Certificate,
        csr: &Csr,
        now: SystemTime,
    ) -> Result<Certified, RenewError> {
        let id = shown.id();
        let (_, verdict) = self.verdict(shown, csr, now).await?;
        if let Verdict::Again(issued) = verdict {
            // The agent that issued it may have been another one.
            self.refresh(id).await?;
            return Ok(certified(id, &issued, true));
        }
        self.limits.renewal(now)?;
        let _turn = self.turn.lock().await;
        let intent = audit_trail::renew(who, shown);
        let prepare = || self.prepare_renewal(shown, csr, now);
        let run = self.changes.run_with_revision(intent, prepare).await;
        let ((issued, record), revision) = run.map_err(IssueFailure::flatten)?;
        let again = record.is_none();
        record.map_or(Ok(()), |record| self.publish(record, revision))?;
        Ok(certified(id, &issued, again))
    }

    async fn verdict(
        &self,
        shown: &Certificate,
        csr: &Csr,
        now: SystemTime,
    ) -> Result<(Record<IdentityRecord>, Verdict), RenewError> {
        let record = self.identity(shown.id()).await?.ok_or(RenewRefused::Unknown)?;
        let verdict = judge(&record.payload, shown, &csr.spki_sha256(), now, self.max_offline)?;
        Ok((record, verdict))
    }

    async fn prepare_renewal(
        &self,
        shown: &Certificate,
        csr: &Csr,
        now: SystemTime,
    ) -> Result<(Changeset, Prepared), RenewError> {
        let mut changeset = self.ledger().changeset();
        let (before, verdict) = self.verdict(shown, csr, now).await?;
        let base = match verdict {
            Verdict::Again(issued) => return Ok((changeset, (issued, None))),
            Verdict::New { promote: true } => promoted(&before.payload),
            Verdict::New { promote: false } => before.payload.clone(),
        };
        let id: &SpiffeId = shown.id();
        let issued = self.certify(&mut changeset, id, csr.spki_der(), &csr.spki_sha256(), now).await?;
        // A `next` that was never used is superseded here: its key was lost.
        let after = IdentityRecord { next: Some(issued.clone()), ..base };
        let record = write_identity(&mut changeset, id, Some(&before), after);
        Ok((changeset, (issued, Some(record))))
    }
}

/// Judges a renewal by the identity's record.
fn judge(
    record: &IdentityRecord,
    shown: &Certificate,
    csr_key: &[u8; 32],
    now: SystemTime,
    max_offline: Duration,
) -> Result<Verdict, RenewRefused> {
    if record.banned_ms != 0 {
        return Err(RenewRefused::Banned);
    }
    let is_next = has_serial(&record.next, &shown.serial());
    let on_record = if is_next { &record.next } else { &record.current };
    if !has_serial(on_record, &shown.serial()) {
        return Err(RenewRefused::Superseded);
    }
    if !has_key(on_record, shown.spki_sha256()) {
        return Err(RenewRefused::ForeignKey);
    }
    let expired_for = now.duration_since(shown.not_after()).unwrap_or_default();
    if !expired_for.is_zero() && !matches!(shown.id().subject, Subject::Node { .. }) {
        return Err(RenewRefused::ExpiredKind);
    }
    if expired_for > max_offline {
        return Err(RenewRefused::OffTooLong);
    }
    if has_key(&record.current, csr_key) || (is_next && has_key(&record.next, csr_key)) {
        return Err(RenewRefused::SameKey);
    }
    match &record.next {
        // An expired one would only have to be renewed at once.
        Some(next) if has_key(&record.next, csr_key) && to_ms(now) < next.not_after_ms => {
            Ok(Verdict::Again(next.clone()))
        }
        _ => Ok(Verdict::New { promote: is_next }),
    }
}

#[cfg(test)]
mod tests;
