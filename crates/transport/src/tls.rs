//! TLS as every fleet port speaks it: 1.3 only, X25519MLKEM768 preferred, both sides known by SPIFFE ID, identity and
//! roots replaceable while connections live.

mod live_identity;
mod roots;
mod verify;
mod error;
mod server;
mod client;

use std::sync::{Arc, LazyLock};

use rustls::crypto::{CryptoProvider, aws_lc_rs};

pub use client::{ClientTls, agent_client_tls, first_contact_tls};
pub use error::{CertificateRefused, TlsError};
pub use live_identity::{LiveIdentity, LiveIdentityError};
pub use roots::{Roots, RootsError};
pub use server::{ClientAuth, ServerTls, agent_tls};

/// HTTP/2 in ALPN.
pub(crate) const H2: &[u8] = b"h2";
/// HTTP/1.1 in ALPN, on the admin port beside HTTP/2.
pub(crate) const HTTP1: &[u8] = b"http/1.1";

/// The one set of algorithms; the first key exchange is the preferred one.
static PROVIDER: LazyLock<Arc<CryptoProvider>> = LazyLock::new(|| {
    use aws_lc_rs::{cipher_suite, kx_group};
    Arc::new(CryptoProvider {
        cipher_suites: vec![
            cipher_suite::TLS13_AES_256_GCM_SHA384,
            cipher_suite::TLS13_AES_128_GCM_SHA256,
            cipher_suite::TLS13_CHACHA20_POLY1305_SHA256,
        ],
        kx_groups: vec![kx_group::X25519MLKEM768, kx_group::X25519, kx_group::SECP256R1],
        ..aws_lc_rs::default_provider()
    })
});

fn provider() -> Arc<CryptoProvider> {
    Arc::clone(&PROVIDER)
}

#[cfg(test)]
mod tests {
    use rustls::{NamedGroup, ProtocolVersion};

    use super::*;

    #[test]
    fn the_hybrid_key_exchange_comes_first_and_nothing_is_older_than_tls_1_3() {
        assert_eq!(PROVIDER.kx_groups.first().unwrap().name(), NamedGroup::X25519MLKEM768);
        let versions = PROVIDER.cipher_suites.iter().map(|suite| suite.version().version);
        assert!(versions.into_iter().all(|version| version == ProtocolVersion::TLSv1_3));
    }
}
