//! The identity that this process shows, replaceable at any time: new handshakes use the new one, live connections keep
//! the one they began with until their age ends them.

use std::{fmt, sync::Arc};

use arc_swap::ArcSwap;
use fleet_kms_identity::{Certificate, CertificateError, KeyPair};
use rustls::{
    SignatureScheme,
    client::ResolvesClientCert,
    server::{ClientHello, ResolvesServerCert},
    sign::CertifiedKey,
};
use rustls_pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};
use thiserror::Error;

use super::provider;

/// The certificate chain and key that this process shows now.
pub struct LiveIdentity(ArcSwap<Shown>);

struct Shown {
    certified: Arc<CertifiedKey>,
    certificate: Arc<Certificate>,
}

impl LiveIdentity {
    /// Takes a chain, leaf first, and the leaf's key.
    ///
    /// On an enrolment port the chain ends in its root (during a rollover: in the roots), because a first contact knows
    /// nothing but the root's fingerprint.
    ///
    /// # Errors
    ///
    /// `Leaf` when the leaf is nobody's in a fleet, `Key` when the key is not the leaf's.
    pub fn new(chain: Vec<CertificateDer<'static>>, key: &KeyPair) -> Result<Self, LiveIdentityError> {
        Shown::new(chain, key).map(|shown| Self(ArcSwap::from_pointee(shown)))
    }

    /// Shows another chain and key from now on; on an error the old ones stay.
    ///
    /// # Errors
    ///
    /// As for [`LiveIdentity::new`].
    pub fn replace(
        &self,
        chain: Vec<CertificateDer<'static>>,
        key: &KeyPair,
    ) -> Result<(), LiveIdentityError> {
        self.0.store(Arc::new(Shown::new(chain, key)?));
        Ok(())
    }

    /// Returns the leaf that is shown now.
    pub fn certificate(&self) -> Arc<Certificate> {
        Arc::clone(&self.0.load().certificate)
    }

    /// Returns the SHA-256 of the SubjectPublicKeyInfo that is shown now; a `Time` answer is bound to it.
    pub fn live_key_sha256(&self) -> [u8; 32] {
        *self.0.load().certificate.spki_sha256()
    }

    fn certified(&self) -> Arc<CertifiedKey> {
        Arc::clone(&self.0.load().certified)
    }
}

impl Shown {
    fn new(chain: Vec<CertificateDer<'static>>, key: &KeyPair) -> Result<Self, LiveIdentityError> {
        let leaf = chain.first().ok_or(CertificateError::Empty)?;
        let certificate = Arc::new(Certificate::from_der(leaf)?);
        // Compared here too: rustls takes a key whose public half it cannot compute.
        if key.spki_sha256() != *certificate.spki_sha256() {
            return Err(LiveIdentityError::OtherKey);
        }
        let key = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(key.to_pkcs8_der().to_vec()));
        let certified = CertifiedKey::from_der(chain, key, &provider()).map_err(LiveIdentityError::Key)?;
        Ok(Self { certified: Arc::new(certified), certificate })
    }
}

impl ResolvesServerCert for LiveIdentity {
    fn resolve(&self, _hello: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        // Server names mean nothing: an agent is known by its SPIFFE ID.
        Some(self.certified())
    }
}

impl ResolvesClientCert for LiveIdentity {
    fn resolve(&self, _hints: &[&[u8]], _schemes: &[SignatureScheme]) -> Option<Arc<CertifiedKey>> {
        Some(self.certified())
    }

    fn has_certs(&self) -> bool {
        true
    }
}

impl fmt::Debug for LiveIdentity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("LiveIdentity").field(&self.certificate()).finish()
    }
}

/// Why a chain and key cannot be shown.
#[derive(Debug, Error)]
pub enum LiveIdentityError {
    /// The leaf is missing or nobody's in a fleet.
    #[error("the certificate cannot be used")]
    Leaf(#[from] CertificateError),
    /// The key is another leaf's.
    #[error("the key does not belong to the certificate")]
    OtherKey,
    /// The TLS provider refuses the key.
    #[error("the key cannot be used")]
    Key(#[source] rustls::Error),
}
