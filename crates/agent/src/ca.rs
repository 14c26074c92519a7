//! The fleet CA: root, issuing CA, and the leaves that they vouch for.
//!
//! Names come from the caller of [`Authorities::issue`], never from a CSR; what
//! a leaf may be used for follows from its name alone. The issuing CA's private
//! key lives in locked memory and leaves it for one signature at a time. The
//! root's is not here at all: it is opened for a rollover and dropped. Nothing
//! here decides who gets a certificate, and nothing here touches the store but
//! [`Authorities::load`].

use std::time::SystemTime;

use fleet_kms_identity::{Serial, SpiffeId, TrustDomain};
use fleet_kms_store::{Revision, RowName};
use rcgen::{SigningKey, SubjectPublicKeyInfo};
use sha2::{Digest, Sha256};

mod generation;
mod key;
mod leaf;
mod load;
mod rollover;
mod trust;

pub use generation::{ISSUING_LIFE, NewAuthorities, ROOT_LIFE, create};
pub use leaf::{ADMIN_LIFE, LEAF_LIFE, life};
pub use load::{LoadError, revisions};
pub use rollover::{Roll, RolloverError, roll};
pub use trust::{Kind, Port, Stored};

use generation::whole_seconds;
use key::CaKey;

/// Precedes what the issuing CA signs in a `Time` answer, so that the signature
/// is good for nothing else.
const TIME_CONTEXT: &[u8] = b"fleet-kms/time/1";

/// The CAs in use, as of one moment; a rollover makes a new value.
pub struct Authorities {
    trust_domain: TrustDomain,
    root: Stored,
    issuing: Stored,
    /// Every generation, roots before issuing CAs, in ascending order.
    stored: Vec<Stored>,
    /// The rows that this was read from.
    revisions: Revisions,
    key: CaKey,
}

/// The rows of all generations, with their revisions.
pub type Revisions = Vec<(RowName, Revision)>;

/// A certificate just made.
#[derive(Debug, Clone)]
pub struct Leaf {
    /// Leaf first, then issuing CAs, DER; no root.
    pub chain: Vec<Vec<u8>>,
    /// When the leaf expires.
    pub not_after: SystemTime,
}

/// Why the CA could not sign.
#[derive(Debug, thiserror::Error)]
pub enum SignError {
    /// The agent's clock is outside what a certificate can express.
    #[error("the agent's clock is outside the years that a certificate can name; set it")]
    Clock,
    /// The issuing CA's own time is over.
    #[error("the issuing CA has expired; it must be renewed before it can issue")]
    IssuingExpired,
    /// The root's certificate does not parse.
    #[error("the root CA's certificate is malformed")]
    Root,
    /// The public key is of a kind that the fleet does not use.
    #[error("the public key cannot be certified")]
    PublicKey(#[source] rcgen::Error),
    /// The signature itself failed.
    #[error("the fleet CA could not sign")]
    Sign(#[source] rcgen::Error),
    /// `kms-agent lock` wiped the CA's key.
    #[error("the agent is locked; restart it to unlock it")]
    Locked,
    /// A CA's private key is not ECDSA P-256 in PKCS #8.
    #[error("a private key of the fleet CA is not ECDSA P-256 in PKCS #8")]
    Key,
}

impl Authorities {
    /// Returns the trust domain that all names are in.
    pub fn trust_domain(&self) -> &TrustDomain {
        &self.trust_domain
    }

    /// Wipes the issuing CA's key: nothing is signed from then on.
    pub fn lock(&self) {
        self.key.wipe();
    }

    /// Returns the active root's certificate, DER.
    pub fn root(&self) -> &[u8] {
        &self.root.certificate
    }

    /// Returns the fingerprint that join tokens carry: SHA-256 of the active
    /// root's certificate.
    pub fn root_sha256(&self) -> [u8; 32] {
        Sha256::digest(&self.root.certificate).into()
    }

    /// Returns the roots that `port` trusts at `now`, DER, the active one first.
    pub fn trusted_roots(&self, port: Port, now: SystemTime) -> Vec<Vec<u8>> {
        trust::trusted_roots(&self.stored, port, now).iter().map(|root| root.certificate.clone()).collect()
    }

    /// Returns every generation that is on record, roots before issuing CAs.
    pub fn generations(&self) -> &[Stored] {
        &self.stored
    }

    /// Returns the rows that this was read from.
    pub fn revisions(&self) -> &Revisions {
        &self.revisions
    }

    /// Returns the issuing CA's certificate and each root, as its predecessor
    /// signed it, that leads to one which somebody may know alone: what follows
    /// a leaf in its chain.
    pub fn issuers(&self, now: SystemTime) -> Vec<Vec<u8>> {
        let mut issuers = vec![self.issuing.certificate.clone()];
        let lineage = trust::lineage(&self.stored, now);
        let cross_signed = lineage.iter().zip(lineage.iter().skip(1)).map(|(root, _before)| root);
        issuers.extend(cross_signed.filter_map(|root| root.cross_signed.clone()));
        issuers
    }

    /// Returns the roots that a first contact may know by their fingerprint.
    pub fn shown_roots(&self, now: SystemTime) -> Vec<Vec<u8>> {
        trust::lineage(&self.stored, now).iter().map(|root| root.certificate.clone()).collect()
    }

    /// Returns what has to be renewed by itself at `now`, one step at a time.
    pub fn due(&self, now: SystemTime) -> Option<Roll> {
        let prepared = self.stored.iter().find_map(Stored::activates);
        match prepared {
            Some(activates) if now >= activates => Some(Roll::RootIfPrepared),
            None if generation::due(self.root.not_after, ROOT_LIFE, now) => Some(Roll::PrepareRoot),
            _ => self.issuing_due(now).then_some(Roll::IssuingIfDue),
        }
    }

    /// Returns when the active root and the issuing CA end.
    pub fn ends(&self) -> (SystemTime, SystemTime) {
        (self.root.not_after, self.issuing.not_after)
    }

    fn issuing_due(&self, now: SystemTime) -> bool {
        generation::due(self.issuing.not_after, ISSUING_LIFE, now)
    }

    /// Makes a certificate for `id`, `serial` and the public key `spki` (DER),
    /// whose possession the caller has proven.
    ///
    /// # Errors
    ///
    /// When the issuing CA has expired, the clock is absurd or the key is not
    /// one that can be certified.
    pub fn issue(
        &self,
        id: &SpiffeId,
        serial: &Serial,
        spki: &[u8],
        now: SystemTime,
    ) -> Result<Leaf, SignError> {
        if now >= self.issuing.not_after {
            return Err(SignError::IssuingExpired);
        }
        let wanted = now.checked_add(life(&id.subject)).ok_or(SignError::Clock)?;
        let not_after = whole_seconds(wanted.min(self.issuing.not_after));
        let spki = SubjectPublicKeyInfo::from_der(spki).map_err(SignError::PublicKey)?;
        let params = leaf::params(id, serial, self.issuing.not_before, not_after)?;
        let certificate = self.key.sign_certificate(&self.issuing.certificate, &params, &spki)?;
        let mut chain = vec![certificate];
        chain.extend(self.issuers(now));
        Ok(Leaf { chain, not_after })
    }

    /// Signs a checkpoint of the audit; the message has its own context.
    ///
    /// # Errors
    ///
    /// When the signature fails.
    pub fn sign_checkpoint(&self, text: &str) -> Result<Vec<u8>, SignError> {
        self.key.open()?.sign(&fleet_kms_audit::message(text)).map_err(SignError::Sign)
    }

    /// Signs the agent's time for the node that sent `nonce` over a connection
    /// which the agent serves with the key of hash `live_key_sha256`.
    ///
    /// # Errors
    ///
    /// When the signature fails.
    pub fn sign_time(
        &self,
        nonce: &[u8; 32],
        unix_ms: u64,
        live_key_sha256: &[u8; 32],
    ) -> Result<Vec<u8>, SignError> {
        let message =
            [TIME_CONTEXT, nonce, unix_ms.to_be_bytes().as_slice(), live_key_sha256.as_slice()].concat();
        self.key.open()?.sign(&message).map_err(SignError::Sign)
    }
}

#[cfg(test)]
mod tests;
