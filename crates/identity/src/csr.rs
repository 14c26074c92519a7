//! A certificate request as the agent reads it: a public key, and the proof that the sender holds its private half.
//!
//! Nothing else of it is ever used, whatever it asks for: names come from the token or the old certificate. Attack: a
//! request that asks for an admin's name. It would get its own name all the same, and it is refused, because no node of
//! ours asks: whoever sends it must be seen.

use sha2::{Digest, Sha256};
use thiserror::Error;
use x509_parser::{
    certification_request::X509CertificationRequest,
    extensions::ParsedExtension,
    oid_registry::{OID_EC_P256, OID_KEY_TYPE_EC_PUBLIC_KEY},
    prelude::FromDer,
};

/// A request of a P-256 key is about 250 bytes.
pub const MAX_CSR: usize = 4 * 1_024;

/// A certificate request whose signature has been checked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Csr {
    spki_der: Vec<u8>,
}

impl Csr {
    /// Reads a DER PKCS#10 request and checks that its own key signed it.
    ///
    /// # Errors
    ///
    /// Refuses requests over [`MAX_CSR`] bytes, malformed ones, keys that are not on P-256 and wrong signatures.
    pub fn from_der(der: &[u8]) -> Result<Self, CsrError> {
        if der.len() > MAX_CSR {
            return Err(CsrError::TooLong);
        }
        let (rest, parsed) = X509CertificationRequest::from_der(der).map_err(|_| CsrError::Malformed)?;
        if !rest.is_empty() {
            return Err(CsrError::Malformed);
        }
        let spki = &parsed.certification_request_info.subject_pki;
        let curve = spki.algorithm.parameters.as_ref().and_then(|parameters| parameters.as_oid().ok());
        if spki.algorithm.algorithm != OID_KEY_TYPE_EC_PUBLIC_KEY || curve != Some(OID_EC_P256) {
            return Err(CsrError::Key);
        }
        let asked = parsed.requested_extensions().into_iter().flatten();
        if asked.into_iter().any(|extension| matches!(extension, ParsedExtension::SubjectAlternativeName(_)))
        {
            return Err(CsrError::AsksForName);
        }
        parsed.verify_signature().map_err(|_| CsrError::Signature)?;
        Ok(Self { spki_der: spki.raw.to_vec() })
    }

    /// Returns the public key as DER SubjectPublicKeyInfo.
    pub fn spki_der(&self) -> &[u8] {
        &self.spki_der
    }

    /// Returns the SHA-256 of the SubjectPublicKeyInfo: the name of the key.
    pub fn spki_sha256(&self) -> [u8; 32] {
        Sha256::digest(&self.spki_der).into()
    }
}

/// Why a certificate request is refused.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum CsrError {
    /// Longer than any honest request.
    #[error("the certificate request is longer than {MAX_CSR} bytes")]
    TooLong,
    /// Not DER of PKCS#10.
    #[error("the certificate request is malformed")]
    Malformed,
    /// Another kind of key than P-256.
    #[error("the certificate request's key is not on P-256")]
    Key,
    /// It asks for a subject alternative name.
    #[error("the certificate request asks for a name; leave it out, names come from the token")]
    AsksForName,
    /// The sender does not hold the key.
    #[error("the certificate request is not signed by its own key")]
    Signature,
}

#[cfg(test)]
mod tests {
    use rcgen::{CertificateParams, PKCS_ECDSA_P384_SHA384};

    use super::*;
    use crate::key_pair::KeyPair;

    #[test]
    fn a_request_yields_the_key_that_signed_it() {
        let key = KeyPair::generate().unwrap();
        let csr = Csr::from_der(&key.csr_der().unwrap()).unwrap();
        assert_eq!(csr.spki_der(), key.spki_der());
        assert_eq!(csr.spki_sha256(), key.spki_sha256());
    }

    #[test]
    fn a_request_for_an_admins_name_is_refused() {
        let key = rcgen::KeyPair::generate().unwrap();
        let mut params = CertificateParams::default();
        params.subject_alt_names = vec![rcgen::SanType::URI("spiffe://f/admin/root".try_into().unwrap())];
        let asked = Csr::from_der(params.serialize_request(&key).unwrap().der());
        assert_eq!(asked, Err(CsrError::AsksForName));
    }

    #[test]
    fn a_request_that_another_key_signed_is_refused() {
        let (honest, other) = (KeyPair::generate().unwrap(), KeyPair::generate().unwrap());
        let mut der = honest.csr_der().unwrap();
        let at = der.windows(91).position(|window| window == honest.spki_der()).unwrap();
        der[at..at + 91].copy_from_slice(&other.spki_der());
        assert_eq!(Csr::from_der(&der), Err(CsrError::Signature));
    }

    #[test]
    fn other_curves_rubbish_and_trailing_bytes_are_refused() {
        let other = rcgen::KeyPair::generate_for(&PKCS_ECDSA_P384_SHA384).unwrap();
        let der = CertificateParams::default().serialize_request(&other).unwrap().der().to_vec();
        assert_eq!(Csr::from_der(&der), Err(CsrError::Key));
        let mut der = KeyPair::generate().unwrap().csr_der().unwrap();
        der.push(0);
        assert_eq!(Csr::from_der(&der), Err(CsrError::Malformed));
        assert_eq!(Csr::from_der(&[0x30]), Err(CsrError::Malformed));
        assert_eq!(Csr::from_der(&vec![0; MAX_CSR + 1]), Err(CsrError::TooLong));
    }
}
