//! The issuing CA's private key while the agent runs.
//!
//! What lives long is the P-256 scalar, 32 bytes in the locked arena. For one
//! signature it becomes a PKCS #8 document and from that AWS-LC's own key; the
//! document is wiped here, rcgen's copy by its `zeroize` feature, AWS-LC's by
//! its allocator, which clears everything that it frees. AWS-LC's memory is
//! neither locked nor guarded, so core dumps must stay off. The extra parse
//! costs a few tens of microseconds beside a transaction of milliseconds.

use arc_swap::ArcSwapOption;
use fleet_kms_seal::LockedKey;
use rcgen::{CertificateParams, Issuer, KeyPair, PKCS_ECDSA_P256_SHA256, PublicKeyData};
use rustls_pki_types::{CertificateDer, PrivatePkcs8KeyDer};
use zeroize::Zeroizing;

use super::SignError;

/// PKCS #8 of a P-256 key (RFC 5208, RFC 5915) is fixed but for two fields: the
/// scalar follows this,
const BEFORE_SCALAR: &[u8] = &[
    0x30, 0x81, 0x87, 0x02, 0x01, 0x00, 0x30, 0x13, 0x06, 0x07, 0x2a, 0x86, 0x48, 0xce, 0x3d, 0x02, 0x01,
    0x06, 0x08, 0x2a, 0x86, 0x48, 0xce, 0x3d, 0x03, 0x01, 0x07, 0x04, 0x6d, 0x30, 0x6b, 0x02, 0x01, 0x01,
    0x04, 0x20,
];
/// and the uncompressed point this.
const BEFORE_POINT: &[u8] = &[0xa1, 0x44, 0x03, 0x42, 0x00];
const SCALAR: usize = 32;
const POINT: usize = 65;

/// A private key of which only the scalar stays in memory.
pub(super) struct CaKey {
    /// `None` once the agent is locked.
    scalar: ArcSwapOption<LockedKey>,
    point: [u8; POINT],
}

impl CaKey {
    /// Takes a key from its stored PKCS #8 document.
    pub(super) fn from_pkcs8(document: &[u8]) -> Result<Self, SignError> {
        let (scalar, point) = split(document).ok_or(SignError::Key)?;
        let scalar = LockedKey::from_zeroizing(Zeroizing::new(*scalar));
        let key = Self { scalar: ArcSwapOption::from_pointee(scalar), point: *point };
        // AWS-LC checks that the point is the scalar's.
        key.open().map(|_| key)
    }

    /// Returns the public key, DER SubjectPublicKeyInfo.
    pub(super) fn spki(&self) -> Result<Vec<u8>, SignError> {
        Ok(self.open()?.subject_public_key_info())
    }

    /// Makes the key usable; drop it after the signature.
    pub(super) fn open(&self) -> Result<Zeroizing<KeyPair>, SignError> {
        let scalar = self.scalar.load_full().ok_or(SignError::Locked)?;
        let document = Zeroizing::new(
            [BEFORE_SCALAR, scalar.expose_secret().as_slice(), BEFORE_POINT, &self.point].concat(),
        );
        let document = PrivatePkcs8KeyDer::from(document.as_slice());
        // The cause is dropped: it might quote the document.
        let key = KeyPair::from_pkcs8_der_and_sign_algo(&document, &PKCS_ECDSA_P256_SHA256);
        key.map(Zeroizing::new).map_err(|_| SignError::Key)
    }

    /// Wipes the key: it signs nothing from then on.
    pub(super) fn wipe(&self) {
        self.scalar.store(None);
    }

    /// Signs a certificate whose issuer is `issuer` (DER); returns its DER.
    pub(super) fn sign_certificate(
        &self,
        issuer: &[u8],
        params: &CertificateParams,
        public_key: &impl PublicKeyData,
    ) -> Result<Vec<u8>, SignError> {
        let key = self.open()?;
        let issuer =
            Issuer::from_ca_cert_der(&CertificateDer::from(issuer), &*key).map_err(SignError::Sign)?;
        let certificate = params.signed_by(public_key, &issuer).map_err(SignError::Sign)?;
        Ok(certificate.der().to_vec())
    }
}

fn split(document: &[u8]) -> Option<(&[u8; SCALAR], &[u8; POINT])> {
    let (scalar, rest) = document.strip_prefix(BEFORE_SCALAR)?.split_first_chunk::<SCALAR>()?;
    Some((scalar, rest.strip_prefix(BEFORE_POINT)?.try_into().ok()?))
}

#[cfg(test)]
mod tests {
    use static_assertions::assert_not_impl_any;

    use super::*;

    assert_not_impl_any!(CaKey: Clone, std::fmt::Debug);

    #[test]
    fn a_key_signs_as_the_document_it_was_taken_from() {
        let generated = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).unwrap();
        let key = CaKey::from_pkcs8(generated.serialized_der()).unwrap();
        assert_eq!(key.spki().unwrap(), generated.subject_public_key_info());
        assert_eq!(key.open().unwrap().serialized_der(), generated.serialized_der());
    }

    #[test]
    fn a_document_of_another_kind_or_with_a_foreign_point_is_refused() {
        let other = KeyPair::generate_for(&rcgen::PKCS_ECDSA_P384_SHA384).unwrap();
        assert!(CaKey::from_pkcs8(other.serialized_der()).is_err());
        let (one, two) = (KeyPair::generate().unwrap(), KeyPair::generate().unwrap());
        let mixed = [&one.serialized_der()[..73], &two.serialized_der()[73..]].concat();
        assert!(matches!(CaKey::from_pkcs8(&mixed), Err(SignError::Key)));
        assert!(matches!(CaKey::from_pkcs8(&[]), Err(SignError::Key)));
    }
}
