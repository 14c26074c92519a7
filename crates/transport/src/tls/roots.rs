//! The roots that peers must chain to, replaceable at any time.

use std::{fmt, sync::Arc};

use arc_swap::ArcSwap;
use rustls::{
    RootCertStore,
    server::{VerifierBuilderError, WebPkiClientVerifier, danger::ClientCertVerifier},
};
use rustls_pki_types::CertificateDer;
use thiserror::Error;

use super::provider;

/// The roots that are trusted now. Two ports that forget an old root at different times have two of these.
pub struct Roots(ArcSwap<RootSet>);

pub(super) struct RootSet {
    certificates: Vec<CertificateDer<'static>>,
    pub(super) anchors: Arc<RootCertStore>,
    /// webpki's judgement of client chains, made once per set.
    pub(super) clients: Arc<dyn ClientCertVerifier>,
}

impl Roots {
    /// Trusts `certificates`.
    ///
    /// # Errors
    ///
    /// `Empty` when there is none, `Malformed` when one is no certificate.
    pub fn new(certificates: Vec<CertificateDer<'static>>) -> Result<Self, RootsError> {
        RootSet::new(certificates).map(|set| Self(ArcSwap::from_pointee(set)))
    }

    /// Trusts `certificates`, and nothing else, from now on. Live connections are not touched: after a compromise the
    /// caller closes them too.
    ///
    /// # Errors
    ///
    /// As for [`Roots::new`]; then the old roots stay.
    pub fn replace(&self, certificates: Vec<CertificateDer<'static>>) -> Result<(), RootsError> {
        self.0.store(Arc::new(RootSet::new(certificates)?));
        Ok(())
    }

    /// Returns the roots that are trusted now.
    pub fn certificates(&self) -> Vec<CertificateDer<'static>> {
        self.0.load().certificates.clone()
    }

    pub(super) fn current(&self) -> Arc<RootSet> {
        self.0.load_full()
    }
}

impl RootSet {
    fn new(certificates: Vec<CertificateDer<'static>>) -> Result<Self, RootsError> {
        let mut anchors = RootCertStore::empty();
        for certificate in &certificates {
            anchors.add(certificate.clone()).map_err(RootsError::Malformed)?;
        }
        if anchors.is_empty() {
            return Err(RootsError::Empty);
        }
        let anchors = Arc::new(anchors);
        let clients =
            WebPkiClientVerifier::builder_with_provider(Arc::clone(&anchors), provider()).build()?;
        Ok(Self { certificates, anchors, clients })
    }
}

impl fmt::Debug for Roots {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Roots({})", self.0.load().certificates.len())
    }
}

/// Why certificates cannot be trusted as roots.
#[derive(Debug, Error)]
pub enum RootsError {
    /// There is none: everyone would be refused.
    #[error("there is no root certificate")]
    Empty,
    /// Not a certificate.
    #[error("a root certificate is malformed")]
    Malformed(#[source] rustls::Error),
    /// The TLS provider refuses the set.
    #[error("the root certificates cannot be used")]
    Verifier(#[from] VerifierBuilderError),
}
