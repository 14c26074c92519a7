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
use rcgen::{SigningKey, SubjectPublicKeyInfo};
use sha2::{Digest, Sha256};

mod generation;
mod key;
mod leaf;
mod load;
mod rollover;

pub use generation::{ISSUING_LIFE, NewAuthorities, ROOT_LIFE, create};
pub use leaf::{ADMIN_LIFE, LEAF_LIFE, life};
pub use load::LoadError;
pub use rollover::{RolloverError, renew_issuing};

use generation::whole_seconds;
use key::CaKey;

/// Precedes what the issuing CA signs in a `Time` answer, so that the signature
/// is good for nothing else.
const TIME_CONTEXT: &[u8] = b"fleet-kms/time/1";

/// The CAs in use, as of one moment; a rollover makes a new value.
pub struct Authorities {
    trust_domain: TrustDomain,
    root: Authority,
    /// DER of every root that is still trusted, the active one first.
    trusted_roots: Vec<Vec<u8>>,
    issuing: Authority,
    key: CaKey,
}

/// One CA certificate and what is needed of it.
struct Authority {
    certificate: Vec<u8>,
    /// The same key and name, signed by the previous root.
    cross_signed: Option<Vec<u8>>,
    not_before: SystemTime,
    not_after: SystemTime,
}

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

    /// Returns every trusted root, DER, the active one first.
    pub fn trusted_roots(&self) -> &[Vec<u8>] {
        &self.trusted_roots
    }

    /// Returns the issuing CA's certificate and, after a root rollover, the
    /// root as its predecessor signed it: what follows a leaf in its chain.
    pub fn issuers(&self) -> Vec<Vec<u8>> {
        let mut issuers = vec![self.issuing.certificate.clone()];
        issuers.extend(self.root.cross_signed.clone());
        issuers
    }

    /// Returns when the active root and the issuing CA end.
    pub fn ends(&self) -> [(&'static str, SystemTime); 2] {
        [("root", self.root.not_after), ("issuing", self.issuing.not_after)]
    }

    /// Says whether the issuing CA is to be renewed ([`renew_issuing`]): less
    /// than half of its life is left.
    pub fn issuing_due(&self, now: SystemTime) -> bool {
        generation::due(self.issuing.not_after, now)
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
        chain.extend(self.issuers());
        Ok(Leaf { chain, not_after })
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
