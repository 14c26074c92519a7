//! Whether a statement was signed by an issuing CA of the fleet, whatever its dates: an audit's checkpoint is judged
//! years later. It proves the fleet's CA, and nothing about who may read or change anything.

use x509_parser::asn1_rs::BitString;
use x509_parser::certificate::X509Certificate;
use x509_parser::oid_registry::OID_SIG_ECDSA_WITH_SHA256;
use x509_parser::prelude::FromDer;
use x509_parser::verify::verify_signature;
use x509_parser::x509::AlgorithmIdentifier;

/// The most CAs between the signer and a root.
const MAX_ISSUERS: usize = 4;

/// Why a statement is not believed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum StatementError {
    /// No certificate of an issuing CA, or too many.
    #[error("the signer's certificates are malformed")]
    Issuers,
    /// The signer does not chain to a root.
    #[error("the signer does not chain to a root of this fleet")]
    Chain,
    /// The signature is not the signer's.
    #[error("the signature is wrong")]
    Signature,
}

/// Says whether the first of `issuers` (DER, each signed by the next) signed `message` with ECDSA on P-256 and
/// SHA-256, and one of `roots` (DER) answers for it.
///
/// # Errors
///
/// See [`StatementError`].
pub fn verify_statement(
    message: &[u8],
    signature: &[u8],
    issuers: &[impl AsRef<[u8]>],
    roots: &[impl AsRef<[u8]>],
) -> Result<(), StatementError> {
    if issuers.is_empty() || issuers.len() > MAX_ISSUERS {
        return Err(StatementError::Issuers);
    }
    let issuers: Vec<X509Certificate<'_>> = issuers
        .iter()
        .map(|der| authority(der.as_ref()))
        .collect::<Option<_>>()
        .ok_or(StatementError::Issuers)?;
    let roots: Vec<X509Certificate<'_>> = roots.iter().filter_map(|der| authority(der.as_ref())).collect();
    if !chains(&issuers, &roots) {
        return Err(StatementError::Chain);
    }
    let signer = issuers.first().ok_or(StatementError::Issuers)?;
    let algorithm = AlgorithmIdentifier::new(OID_SIG_ECDSA_WITH_SHA256, None);
    let signature = BitString::new(0, signature);
    verify_signature(signer.public_key(), &algorithm, &signature, message)
        .map_err(|_| StatementError::Signature)
}

fn authority(der: &[u8]) -> Option<X509Certificate<'_>> {
    let (rest, certificate) = X509Certificate::from_der(der).ok()?;
    (rest.is_empty() && certificate.is_ca()).then_some(certificate)
}

/// Whether each certificate is signed by the next, until one is signed by a root.
fn chains(issuers: &[X509Certificate<'_>], roots: &[X509Certificate<'_>]) -> bool {
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
