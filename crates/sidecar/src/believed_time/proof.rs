//! Whether an agent's answer to `Time` proves itself.
//!
//! The agent is not judged by dates here: they are what is in doubt. What counts
//! is that an issuing CA under a pinned root signed the nonce, the time and the
//! key that the agent serves this very connection with. So nothing can be
//! relayed, and a key stolen long ago cannot answer.

use std::time::{Duration, SystemTime};

use fleet_kms_proto::agent::TimeResponse;
use rustls_pki_types::CertificateDer;
use x509_parser::asn1_rs::BitString;
use x509_parser::certificate::X509Certificate;
use x509_parser::oid_registry::OID_SIG_ECDSA_WITH_SHA256;
use x509_parser::prelude::FromDer;
use x509_parser::verify::verify_signature;
use x509_parser::x509::AlgorithmIdentifier;

/// What the signature begins with (docs/wire-format.md).
const CONTEXT: &[u8] = b"fleet-kms/time/1";

/// The most CAs between the signer and a root.
const MAX_ISSUERS: usize = 4;

/// Why an answer to `Time` is not believed.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum TimeProofError {
    /// The answer is about another connection's key.
    #[error("the answer is not bound to this connection")]
    OtherKey,
    /// No certificate of an issuing CA, or too many.
    #[error("the answer's issuers are malformed")]
    Issuers,
    /// The issuers do not chain to a pinned root.
    #[error("the answer's signer does not chain to a pinned root")]
    Chain,
    /// The signature is not the issuing CA's.
    #[error("the answer's signature is wrong")]
    Signature,
}

/// Returns the time that the answer proves, for a connection to the agent whose
/// key has the SHA-256 `live_key_sha256`.
pub fn verify(
    answer: &TimeResponse,
    nonce: &[u8; 32],
    live_key_sha256: &[u8; 32],
    roots: &[CertificateDer<'_>],
) -> Result<SystemTime, TimeProofError> {
    if answer.live_key_sha256 != live_key_sha256 {
        return Err(TimeProofError::OtherKey);
    }
    if answer.issuers.is_empty() || answer.issuers.len() > MAX_ISSUERS {
        return Err(TimeProofError::Issuers);
    }
    let issuers: Vec<X509Certificate<'_>> = answer
        .issuers
        .iter()
        .map(|der| authority(der))
        .collect::<Option<_>>()
        .ok_or(TimeProofError::Issuers)?;
    let roots: Vec<X509Certificate<'_>> = roots.iter().filter_map(|der| authority(der)).collect();
    if !chains(&issuers, &roots) {
        return Err(TimeProofError::Chain);
    }
    let signed =
        [CONTEXT, nonce.as_slice(), &answer.unix_ms.to_be_bytes(), live_key_sha256.as_slice()].concat();
    let signer = issuers.first().ok_or(TimeProofError::Issuers)?;
    let algorithm = AlgorithmIdentifier::new(OID_SIG_ECDSA_WITH_SHA256, None);
    let signature = BitString::new(0, &answer.signature);
    verify_signature(signer.public_key(), &algorithm, &signature, &signed)
        .map_err(|_| TimeProofError::Signature)?;
    SystemTime::UNIX_EPOCH.checked_add(Duration::from_millis(answer.unix_ms)).ok_or(TimeProofError::Signature)
}

fn authority(der: &[u8]) -> Option<X509Certificate<'_>> {
    let (rest, certificate) = X509Certificate::from_der(der).ok()?;
    (rest.is_empty() && certificate.is_ca()).then_some(certificate)
}

/// Whether each certificate is signed by the next, until one is signed by a root.
pub(crate) fn chains(issuers: &[X509Certificate<'_>], roots: &[X509Certificate<'_>]) -> bool {
    let signed_by = |subject: &X509Certificate<'_>, issuer: &X509Certificate<'_>| {
        subject.issuer() == issuer.subject() && subject.verify_signature(Some(issuer.public_key())).is_ok()
    };
    for (position, issuer) in issuers.iter().enumerate() {
        if roots.iter().any(|root| signed_by(issuer, root)) {
            return true;
        }
        if !issuers.get(position + 1).is_some_and(|next| signed_by(issuer, next)) {
            return false;
        }
    }
    false
}

#[cfg(test)]
mod tests;
