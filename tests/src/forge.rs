//! Certificates that no agent would make, signed by the fleet's own CA: what an attacker with its key, or a bug in the
//! CA, could show.

use std::path::Path;
use std::sync::Arc;
use std::time::SystemTime;

use anyhow::Context;
use fleet_kms_identity::KeyPair as IdentityKey;
use rcgen::string::Ia5String;
use rcgen::{CertificateParams, ExtendedKeyUsagePurpose, Issuer, KeyPair, SanType};
use rustls_pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};

use crate::member::Member;
use crate::opened_store::OpenedStore;
use crate::tls_probe::Shown;

/// Signs what it is told.
pub struct Forger {
    issuer: Issuer<'static, KeyPair>,
    issuers: Vec<CertificateDer<'static>>,
}

/// What a forged leaf says.
pub struct Leaf<'a> {
    /// URI names.
    pub uris: &'a [&'a str],
    /// DNS names.
    pub dns: &'a [&'a str],
    /// Extended key usages.
    pub usages: &'a [ExtendedKeyUsagePurpose],
    /// The serial.
    pub serial: &'a [u8],
    /// notBefore and notAfter; `None` for dates that are good for long.
    pub validity: Option<(SystemTime, SystemTime)>,
}

impl Default for Leaf<'_> {
    /// A client without a name.
    fn default() -> Self {
        Self {
            uris: &[],
            dns: &[],
            usages: &[ExtendedKeyUsagePurpose::ClientAuth],
            serial: &[1],
            validity: None,
        }
    }
}

impl Forger {
    /// Takes the issuing CA's key out of an agent's store; `member` shows its certificate.
    ///
    /// # Errors
    /// When the store does not open.
    pub fn of(agent_directory: &Path, member: &Member) -> anyhow::Result<Self> {
        let store = OpenedStore::of(agent_directory)?;
        let issuing = member.chain.get(1).context("an issuing CA")?.clone();
        let key = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(store.issuing_key()?.to_vec()));
        let issuer = Issuer::from_ca_cert_der(&issuing, KeyPair::try_from(&key)?)?;
        Ok(Self { issuer, issuers: vec![issuing] })
    }

    /// A CA of an attacker's own.
    ///
    /// # Errors
    /// When no key can be made.
    pub fn stranger() -> anyhow::Result<Self> {
        Ok(Self { issuer: Issuer::new(CertificateParams::default(), KeyPair::generate()?), issuers: vec![] })
    }

    /// Signs a leaf for a new key.
    ///
    /// # Errors
    /// When a name has no form at all.
    pub fn leaf(&self, leaf: &Leaf<'_>) -> anyhow::Result<Forged> {
        let key = KeyPair::generate()?;
        let mut params = CertificateParams::default();
        for uri in leaf.uris {
            params.subject_alt_names.push(SanType::URI(Ia5String::try_from(*uri)?));
        }
        for name in leaf.dns {
            params.subject_alt_names.push(SanType::DnsName(Ia5String::try_from(*name)?));
        }
        params.extended_key_usages = leaf.usages.to_vec();
        params.serial_number = Some(leaf.serial.to_vec().into());
        if let Some((from, to)) = leaf.validity {
            (params.not_before, params.not_after) = (from.into(), to.into());
        }
        let signed = params.signed_by(&key, &self.issuer)?;
        let chain = [signed.der().clone()].into_iter().chain(self.issuers.clone()).collect();
        Ok(Forged { chain, key_pem: key.serialize_pem(), key_der: key.serialize_der() })
    }
}

/// A forged chain with its key.
pub struct Forged {
    chain: Vec<CertificateDer<'static>>,
    key_pem: String,
    key_der: Vec<u8>,
}

impl Forged {
    /// As a TLS client shows it.
    pub fn shown(&self) -> Shown {
        (self.chain.clone(), PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(self.key_der.clone())))
    }

    /// As a member of the fleet, which trusts `roots`.
    ///
    /// # Errors
    /// When the key cannot be read.
    pub fn member(&self, roots: &[CertificateDer<'static>]) -> anyhow::Result<Member> {
        let key = Arc::new(IdentityKey::from_pem(&self.key_pem)?);
        Ok(Member { chain: self.chain.clone(), key, roots: roots.to_vec() })
    }
}
