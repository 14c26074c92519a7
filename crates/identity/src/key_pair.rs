//! The key of an identity: ECDSA on P-256, made on the machine that uses it and never sent anywhere.
//!
//! The generator is the TLS provider's (AWS-LC), as for every handshake: a certificate key is not one of the keys that
//! this project makes with the caller's generator.

use rcgen::{CertificateParams, PKCS_ECDSA_P256_SHA256, PublicKeyData};
use sha2::{Digest, Sha256};
use thiserror::Error;
use zeroize::{Zeroize, Zeroizing};

/// A private key on P-256, wiped when dropped.
pub struct KeyPair(rcgen::KeyPair);

impl KeyPair {
    /// Makes a new key.
    ///
    /// # Errors
    ///
    /// `Generate` when the provider's generator fails.
    pub fn generate() -> Result<Self, KeyPairError> {
        rcgen::KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).map(Self).map_err(KeyPairError::Generate)
    }

    /// Reads a PKCS#8 PEM text.
    ///
    /// # Errors
    ///
    /// `Malformed` when it is no such text, or a key of another kind.
    pub fn from_pem(pem: &str) -> Result<Self, KeyPairError> {
        // The cause is dropped: a parser's message might quote its input.
        rcgen::KeyPair::from_pem_and_sign_algo(pem, &PKCS_ECDSA_P256_SHA256)
            .map(Self)
            .map_err(|_| KeyPairError::Malformed)
    }

    /// Returns the key as PKCS#8 PEM.
    pub fn to_pem(&self) -> Zeroizing<String> {
        Zeroizing::new(self.0.serialize_pem())
    }

    /// Returns the key as PKCS#8 DER.
    pub fn to_pkcs8_der(&self) -> Zeroizing<Vec<u8>> {
        Zeroizing::new(self.0.serialize_der())
    }

    /// Returns the public half as DER SubjectPublicKeyInfo.
    pub fn spki_der(&self) -> Vec<u8> {
        self.0.subject_public_key_info()
    }

    /// Returns the SHA-256 of the SubjectPublicKeyInfo: the name of the key.
    pub fn spki_sha256(&self) -> [u8; 32] {
        Sha256::digest(self.spki_der()).into()
    }

    /// Makes a certificate request, signed by this key. It names nobody: the agent decides who the node is.
    ///
    /// # Errors
    ///
    /// `Request` when signing fails.
    pub fn csr_der(&self) -> Result<Vec<u8>, KeyPairError> {
        let mut params = CertificateParams::default();
        params.distinguished_name = rcgen::DistinguishedName::new();
        params.serialize_request(&self.0).map(|csr| csr.der().to_vec()).map_err(KeyPairError::Request)
    }
}

impl Drop for KeyPair {
    fn drop(&mut self) {
        self.0.zeroize();
    }
}

/// Why a key could not be made, read or used.
#[derive(Debug, Error)]
pub enum KeyPairError {
    /// The generator failed.
    #[error("a new key cannot be made")]
    Generate(#[source] rcgen::Error),
    /// Not a P-256 key in PKCS#8 PEM.
    #[error("the private key is not a P-256 key in PKCS#8 PEM")]
    Malformed,
    /// Signing the request failed.
    #[error("the certificate request cannot be signed")]
    Request(#[source] rcgen::Error),
}

#[cfg(test)]
mod tests {
    use std::fmt;

    use static_assertions::assert_not_impl_any;

    use super::*;

    assert_not_impl_any!(KeyPair: Clone, fmt::Debug, serde::Serialize);

    #[test]
    fn a_key_survives_its_pem_form() {
        let key = KeyPair::generate().unwrap();
        let read = KeyPair::from_pem(&key.to_pem()).unwrap();
        assert_eq!(read.spki_sha256(), key.spki_sha256());
    }

    #[test]
    fn a_key_of_another_curve_is_refused() {
        let other = rcgen::KeyPair::generate_for(&rcgen::PKCS_ECDSA_P384_SHA384).unwrap().serialize_pem();
        assert!(matches!(KeyPair::from_pem(&other), Err(KeyPairError::Malformed)));
        assert!(matches!(KeyPair::from_pem("rubbish"), Err(KeyPairError::Malformed)));
    }
}
