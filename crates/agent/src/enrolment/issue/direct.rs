//! Certificates that the agent makes on its own host, for admins: no token, no
//! CSR, the key is made here and handed to whoever runs the command.

use std::time::SystemTime;

use data_encoding::BASE64;
use fleet_kms_identity::{Certificate, KeyPair, KeyPairError, Name, Renewal, SpiffeId, Subject, renewal_due};
use x509_parser::prelude::{FromDer, X509Certificate};

use super::{Certified, IssueFailure, Issuer, certified, has_key, has_serial, write_identity};
use crate::authz::{Role, Scope};
use crate::ca::{LEAF_LIFE, Port};
use crate::enrolment::audit_trail;
use crate::ledger::Changeset;
use crate::records::Record;
use crate::records::payload::{IdentityRecord, IssuedCertificate};
use crate::times::to_ms;

/// A certificate with its key, and the roots to trust.
pub struct Bundle {
    /// The private key.
    pub key: KeyPair,
    /// The certificate.
    pub certified: Certified,
    /// Trusted roots, DER, the active one first.
    pub roots: Vec<Vec<u8>>,
}

impl Bundle {
    /// Returns the chain as PEM.
    pub fn chain_pem(&self) -> String {
        certificates_pem(&self.certified.chain)
    }

    /// Returns the roots as PEM.
    pub fn roots_pem(&self) -> String {
        certificates_pem(&self.roots)
    }
}

/// Why no such certificate was made.
#[derive(Debug, thiserror::Error)]
pub enum DirectError {
    /// The key could not be made.
    #[error(transparent)]
    Key(#[from] KeyPairError),
    /// An operator banned the identity.
    #[error("this identity is banned; lift the ban first")]
    Banned,
    /// An admin needs a role.
    #[error("an admin needs at least one role")]
    NoRole,
    /// A scope without a cluster would read as "all" once it is stored.
    #[error("a scope names at least one cluster")]
    EmptyScope,
    /// Store, audit or CA failed.
    #[error(transparent)]
    Failed(#[from] IssueFailure),
}

impl DirectError {
    /// Returns the closed metric and audit label.
    pub fn reason(&self) -> &'static str {
        match self {
            Self::Key(_) => "key",
            Self::Banned => "banned",
            Self::NoRole => "no_role",
            Self::EmptyScope => "empty_scope",
            Self::Failed(failure) => failure.reason(),
        }
    }
}

/// Why an admin's certificate was not made again.
#[derive(Debug, thiserror::Error)]
pub enum AgainError {
    /// A forgery, or superseded meanwhile.
    #[error("this certificate and its key are not the ones on record")]
    NotOnRecord,
    /// Store, audit or CA failed.
    #[error(transparent)]
    Failed(#[from] IssueFailure),
}

/// Says whether the agent's own certificate is to be renewed: less than two
/// thirds of its life is left.
pub fn agent_certificate_due(not_after: SystemTime, now: SystemTime) -> bool {
    renewal_due(not_after, LEAF_LIFE, now, 0) == Renewal::Due
}

impl Issuer {
    /// Makes an admin's identity and certificate, on behalf of `who` on the
    /// agent's own host. An admin of that name gets a new certificate, these
    /// roles and this scope; its old certificates are superseded.
    ///
    /// # Errors
    ///
    /// When the admin is banned, or store, audit or CA say no.
    pub async fn issue_admin(
        &self,
        who: &str,
        name: &Name,
        roles: &[Role],
        scope: &Scope,
    ) -> Result<Bundle, DirectError> {
        if roles.is_empty() {
            return Err(DirectError::NoRole);
        }
        if matches!(scope, Scope::Clusters(clusters) if clusters.is_empty()) {
            return Err(DirectError::EmptyScope);
        }
        let id = SpiffeId::new(self.trust_domain(), Subject::Admin { name: name.clone() });
        let grant = Grant {
            roles: roles.iter().map(|role| role.name().to_owned()).collect(),
            scope: match scope {
                Scope::All => Vec::new(),
                Scope::Clusters(clusters) => clusters.iter().map(|id| id.as_bytes().to_vec()).collect(),
            },
        };
        self.issue_direct(who, &id, &grant).await
    }

    async fn issue_direct(&self, who: &str, id: &SpiffeId, grant: &Grant) -> Result<Bundle, DirectError> {
        let key = KeyPair::generate()?;
        let now = self.now();
        let _turn = self.turn.lock().await;
        let intent = audit_trail::admin_issue(who, id, &grant.roles);
        let prepare = || self.prepare_direct(id, grant, &key, now);
        let run = self.changes.run_with_revision(intent, prepare).await;
        let ((issued, record), revision) = run.map_err(IssueFailure::flatten)?;
        self.publish(record, revision)?;
        let roots = self.authorities().trusted_roots(Port::Enrolment, now);
        Ok(Bundle { key, certified: certified(id, &issued, false), roots })
    }

    /// Makes the next certificate of an admin whose CA was replaced, for the key
    /// that it has: `shown` was good on the connection that asks.
    ///
    /// # Errors
    ///
    /// When `shown` and its key are not those on record, or store, audit or CA
    /// say no.
    pub async fn issue_again(&self, who: &str, shown: &Certificate) -> Result<Certified, AgainError> {
        let (id, now) = (shown.id(), self.now());
        let _turn = self.turn.lock().await;
        let prepare = || async {
            let before = self.identity(id).await.map_err(AgainError::from)?;
            let on_record = |issued: &Option<IssuedCertificate>| {
                has_serial(issued, &shown.serial()) && has_key(issued, shown.spki_sha256())
            };
            let before =
                before.filter(|record| record.payload.banned_ms == 0 && on_record(&record.payload.current));
            let before = before.ok_or(AgainError::NotOnRecord)?;
            let leaf = before.payload.current.as_ref().and_then(|issued| issued.chain.first());
            let spki = leaf.and_then(|leaf| spki_of(leaf)).ok_or(AgainError::NotOnRecord)?;
            let mut changeset = self.ledger().changeset();
            let issued = self.certify(&mut changeset, id, &spki, shown.spki_sha256(), now).await?;
            let after =
                IdentityRecord { current: Some(issued.clone()), next: None, ..before.payload.clone() };
            let record = write_identity(&mut changeset, id, Some(&before), after);
            Ok::<_, AgainError>((changeset, (issued, record)))
        };
        let intent = audit_trail::admin_issue_again(who, id);
        let run = self.changes.run_with_revision(intent, prepare).await;
        let ((issued, record), revision) = run.map_err(IssueFailure::flatten::<AgainError>)?;
        self.publish(record, revision)?;
        Ok(certified(id, &issued, false))
    }

    async fn prepare_direct(
        &self,
        id: &SpiffeId,
        grant: &Grant,
        key: &KeyPair,
        now: SystemTime,
    ) -> Result<(Changeset, (IssuedCertificate, Record<IdentityRecord>)), DirectError> {
        let mut changeset = self.ledger().changeset();
        let before = self.identity(id).await?;
        if before.as_ref().is_some_and(|record| record.payload.banned_ms != 0) {
            return Err(DirectError::Banned);
        }
        let issued = self.certify(&mut changeset, id, &key.spki_der(), &key.spki_sha256(), now).await?;
        let after = IdentityRecord {
            id: id.to_string(),
            current: Some(issued.clone()),
            next: None,
            banned_ms: 0,
            created_ms: before.as_ref().map_or(to_ms(now), |record| record.payload.created_ms),
            roles: grant.roles.clone(),
            scope: grant.scope.clone(),
            token: Vec::new(),
            readopted_ms: 0,
        };
        let record = write_identity(&mut changeset, id, before.as_ref(), after);
        Ok((changeset, (issued, record)))
    }
}

/// The SubjectPublicKeyInfo of a certificate, both DER.
fn spki_of(certificate: &[u8]) -> Option<Vec<u8>> {
    let (_, certificate) = X509Certificate::from_der(certificate).ok()?;
    Some(certificate.public_key().raw.to_vec())
}

/// What an identity may do, in the words of its record.
struct Grant {
    roles: Vec<String>,
    scope: Vec<Vec<u8>>,
}

/// Returns certificates (DER) as PEM.
pub fn certificates_pem(certificates: &[Vec<u8>]) -> String {
    certificates.iter().map(|der| certificate_pem(der)).collect()
}

/// RFC 7468: base64 in lines of 64.
fn certificate_pem(der: &[u8]) -> String {
    let text = BASE64.encode(der);
    let mut pem = String::from("-----BEGIN CERTIFICATE-----\n");
    let mut rest = text.as_str();
    while !rest.is_empty() {
        let (line, after) = rest.split_at(rest.len().min(64));
        pem.push_str(line);
        pem.push('\n');
        rest = after;
    }
    pem + "-----END CERTIFICATE-----\n"
}

#[cfg(test)]
mod tests;
