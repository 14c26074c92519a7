//! Enrolment: a join token and a key become an identity.

use std::net::IpAddr;
use std::time::SystemTime;

use fleet_kms_identity::{Csr, CsrError, SpiffeId, Subject};
use sha2::{Digest, Sha256};

use super::{Certified, IssueFailure, Issuer, Prepared, certified, has_key, write_identity};
use crate::enrolment::audit_trail;
use crate::enrolment::limits::Limited;
use crate::enrolment::tokens::{self, TokenRefused};
use crate::ledger::Changeset;
use crate::records::payload::{IdentityRecord, IssuedCertificate, TokenRecord};
use crate::records::{Record, rows};
use crate::times::to_ms;

/// What a node shows to get its first certificate, parsed.
#[derive(Debug, Clone)]
pub struct Join {
    shown: Shown,
    csr: Csr,
}

/// What the audit says of a node that shows a token.
#[derive(Debug, Clone)]
pub(in crate::enrolment) struct Shown {
    /// The token's name in the store.
    pub(in crate::enrolment) token_sha256: [u8; 32],
    /// The wanted node name, as sent.
    pub(in crate::enrolment) node: String,
    /// Where it came from.
    pub(in crate::enrolment) address: IpAddr,
}

/// Why a node was not enrolled. The text goes to the node.
#[derive(Debug, thiserror::Error)]
pub enum EnrolError {
    /// The CSR is malformed or not signed by its own key.
    #[error(transparent)]
    Csr(#[from] CsrError),
    /// The token does not help.
    #[error(transparent)]
    Token(#[from] TokenRefused),
    /// The token's cluster was retired.
    #[error("this join token's cluster is retired")]
    Retired,
    /// A node of that name exists and the token is not bound to it.
    #[error(
        "a node of this name exists already; to replace its identity, use a token that is bound to this node name"
    )]
    NameTaken,
    /// An operator banned the node.
    #[error("this node is banned; an operator must lift the ban before it can enrol again")]
    Banned,
    /// Too many enrolments, or too many wrong tokens from this address.
    #[error(transparent)]
    Limited(#[from] Limited),
    /// Store, audit or CA failed.
    #[error(transparent)]
    Failed(#[from] IssueFailure),
}

impl EnrolError {
    /// Returns the closed metric and audit label.
    pub fn reason(&self) -> &'static str {
        match self {
            Self::Csr(_) => "csr",
            Self::Token(refused) => refused.reason(),
            Self::Retired => "cluster_retired",
            Self::NameTaken => "name_taken",
            Self::Banned => "banned",
            Self::Limited(_) => "rate_limited",
            Self::Failed(failure) => failure.reason(),
        }
    }

    /// The caller's fault, which costs its address a guess.
    fn is_refusal(&self) -> bool {
        match self {
            Self::Csr(_) | Self::Token(_) | Self::Retired | Self::NameTaken | Self::Banned => true,
            Self::Limited(_) | Self::Failed(_) => false,
        }
    }
}

/// What is to be done about a join.
enum Plan {
    /// The same token and key were here before.
    Again(IssuedCertificate),
    /// Judged and found good.
    New(Box<Fresh>),
}

/// A good token, and the identity that it would replace.
struct Fresh {
    token: Record<TokenRecord>,
    identity: Option<Record<IdentityRecord>>,
}

impl Join {
    /// Parses what a node sent: the token's secret, the CSR (its signature is
    /// checked here) and the node name it wants, empty if the token has it.
    ///
    /// # Errors
    ///
    /// When the CSR is malformed or not signed by its own key.
    pub fn parse(secret: &[u8], csr: &[u8], node: String, address: IpAddr) -> Result<Self, CsrError> {
        let csr = Csr::from_der(csr)?;
        Ok(Self { shown: Shown { token_sha256: Sha256::digest(secret).into(), node, address }, csr })
    }

    /// Returns what the audit says of it.
    pub(in crate::enrolment) fn shown(&self) -> &Shown {
        &self.shown
    }
}

impl Issuer {
    /// As [`Join::parse`], once the address may still show tokens: the
    /// signature of a request costs more than the look-up of a token.
    ///
    /// # Errors
    ///
    /// When the address has shown too many wrong tokens or requests, or this
    /// request is one of them. Refusals are audited.
    pub async fn read_join(
        &self,
        secret: &[u8],
        csr: &[u8],
        node: String,
        address: IpAddr,
    ) -> Result<Join, EnrolError> {
        let now = self.now();
        let shown = Shown { token_sha256: Sha256::digest(secret).into(), node, address };
        let read = self.limits.may_show_token(address, now).map_err(EnrolError::from);
        match read.and_then(|()| Ok(Csr::from_der(csr)?)) {
            Ok(csr) => Ok(Join { shown, csr }),
            Err(error) => {
                self.note_refused(&shown, &error, now).await;
                Err(error)
            }
        }
    }

    /// Enrols a node: uses its token once, records the identity and hands out
    /// its certificate. The same token with the same key gets the same
    /// certificate again, so a lost reply costs nothing.
    ///
    /// # Errors
    ///
    /// When the token does not make this node, or budgets, store, audit or CA
    /// say no; the token is then as good as before. Refusals are audited.
    pub async fn enrol(&self, join: &Join) -> Result<Certified, EnrolError> {
        let now = self.now();
        let result = self.try_enrol(join, now).await;
        if let Err(error) = &result {
            self.note_refused(&join.shown, error, now).await;
        }
        result
    }

    /// Charges a refusal to its address and writes it to the audit.
    async fn note_refused(&self, shown: &Shown, error: &EnrolError, now: SystemTime) {
        if error.is_refusal() {
            self.limits.charge_guess(shown.address, now);
        }
        if let Some(event) = audit_trail::enrol_refused(shown, error) {
            self.changes.event(event).await;
        }
    }

    async fn try_enrol(&self, join: &Join, now: SystemTime) -> Result<Certified, EnrolError> {
        self.limits.may_show_token(join.shown.address, now)?;
        let (id, plan) = self.plan(join, now).await?;
        if let Plan::Again(issued) = plan {
            // The agent that issued it may have been another one.
            self.refresh(&id).await?;
            return Ok(certified(&id, &issued, true));
        }
        self.limits.enrolment(now)?;
        let _turn = self.turn.lock().await;
        let intent = audit_trail::enrol(join, &id);
        let prepare = || self.prepare_join(join, now);
        let run = self.changes.run_with_revision(intent, prepare).await;
        let ((issued, record), revision) = run.map_err(IssueFailure::flatten)?;
        let again = record.is_none();
        record.map_or(Ok(()), |record| self.publish(record, revision))?;
        Ok(certified(&id, &issued, again))
    }

    /// Judges everything, writes nothing.
    async fn plan(&self, join: &Join, now: SystemTime) -> Result<(SpiffeId, Plan), EnrolError> {
        let row = rows::token(&join.shown.token_sha256);
        let token = self.ledger().read::<TokenRecord>(&row).await.map_err(IssueFailure::from)?;
        let token = token.ok_or(TokenRefused::Unknown)?;
        let claim = tokens::claim(&token.payload, &join.shown.node)?;
        tokens::live_cluster(&self.changes, &claim.cluster).await?.ok_or(EnrolError::Retired)?;
        let subject = Subject::Node { cluster: claim.cluster_uuid(), name: claim.name.clone() };
        let id = SpiffeId::new(self.trust_domain(), subject);
        let identity = self.identity(&id).await?;
        if let Some(identity) = &identity {
            if identity.payload.banned_ms != 0 {
                return Err(EnrolError::Banned);
            }
            // Before the token is judged: by now it may be used up, by this very node.
            if let Some(issued) = issued_for(&identity.payload, join) {
                return Ok((id, Plan::Again(issued.clone())));
            }
        }
        tokens::judge(&token.payload, join.shown.address, now)?;
        if identity.is_some() && !claim.may_replace {
            return Err(EnrolError::NameTaken);
        }
        Ok((id, Plan::New(Box::new(Fresh { token, identity }))))
    }

    async fn prepare_join(&self, join: &Join, now: SystemTime) -> Result<(Changeset, Prepared), EnrolError> {
        let mut changeset = self.ledger().changeset();
        let (id, plan) = self.plan(join, now).await?;
        let Fresh { token, identity: before } = match plan {
            Plan::Again(issued) => return Ok((changeset, (issued, None))),
            Plan::New(fresh) => *fresh,
        };
        let key = join.csr.spki_sha256();
        let issued = self.certify(&mut changeset, &id, join.csr.spki_der(), &key, now).await?;
        changeset.update(&token, &tokens::consume(&token.payload, id.to_string(), &key, now));
        // Replaces the serials of the identity that was there before: they are
        // superseded with this commit.
        let after = IdentityRecord {
            id: id.to_string(),
            current: Some(issued.clone()),
            next: None,
            banned_ms: 0,
            created_ms: before.as_ref().map_or(to_ms(now), |record| record.payload.created_ms),
            roles: Vec::new(),
            scope: Vec::new(),
            token: join.shown.token_sha256.to_vec(),
            readopted_ms: 0,
        };
        let record = write_identity(&mut changeset, &id, before.as_ref(), after);
        Ok((changeset, (issued, Some(record))))
    }
}

/// Finds the certificate that this token and this key got before.
fn issued_for<'a>(identity: &'a IdentityRecord, join: &Join) -> Option<&'a IssuedCertificate> {
    let key = join.csr.spki_sha256();
    let mut issued = [&identity.current, &identity.next].into_iter();
    let found = issued.find(|issued| has_key(issued, &key))?;
    found.as_ref().filter(|_| identity.token == join.shown.token_sha256)
}
