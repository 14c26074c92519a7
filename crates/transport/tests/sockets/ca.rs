//! A small certificate authority: root, issuing CA, leaves of every kind, right and wrong.

use std::{
    sync::Arc,
    time::{Duration, SystemTime},
};

use fleet_kms_identity::KeyPair;
use fleet_kms_transport::{Clock, LiveIdentity, Roots};
use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, DnType, ExtendedKeyUsagePurpose, IsCa, SanType,
    SerialNumber,
};
use rustls_pki_types::CertificateDer;

pub(crate) const DAY: Duration = Duration::from_secs(86_400);
pub(crate) const NODE: &str = "spiffe://fleet.example/cluster/0b5e1a52-7c1f-4f0e-9a36-5d0c3a1f2e44/node/cp-1";
pub(crate) const AGENT: &str = "spiffe://fleet.example/agent/a";
pub(crate) const SERVER: [ExtendedKeyUsagePurpose; 1] = [ExtendedKeyUsagePurpose::ServerAuth];
pub(crate) const CLIENT: [ExtendedKeyUsagePurpose; 1] = [ExtendedKeyUsagePurpose::ClientAuth];

/// The present of all tests.
pub(crate) fn now() -> SystemTime {
    SystemTime::UNIX_EPOCH + 20_600 * DAY
}

pub(crate) fn clock_at(time: SystemTime) -> Clock {
    Arc::new(move || time)
}

pub(crate) fn clock() -> Clock {
    clock_at(now())
}

type Issuer = CertifiedIssuer<'static, rcgen::KeyPair>;

pub(crate) struct TestCa {
    pub(crate) root: Issuer,
    pub(crate) issuing: Issuer,
}

/// A chain, leaf first, and the leaf's key.
pub(crate) type Leaf = (Vec<CertificateDer<'static>>, KeyPair);

impl TestCa {
    /// Every CA of the same `generation` has the same names, and another key.
    pub(crate) fn new(generation: &str) -> Self {
        Self::with_issuing_until(generation, now() + 180 * DAY)
    }

    pub(crate) fn with_issuing_until(generation: &str, not_after: SystemTime) -> Self {
        let root = CertifiedIssuer::self_signed(Self::params(&format!("root {generation}")), key()).unwrap();
        let mut params = Self::params(&format!("issuing {generation}"));
        params.not_after = not_after.into();
        let issuing = CertifiedIssuer::signed_by(params, key(), &root).unwrap();
        Self { root, issuing }
    }

    fn params(name: &str) -> CertificateParams {
        let mut params = CertificateParams::default();
        params.distinguished_name.push(DnType::CommonName, name);
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.not_before = (now() - 360 * DAY).into();
        params.not_after = (now() + 3_600 * DAY).into();
        params
    }

    /// This CA's root, signed by another CA's: what agents send during a rollover.
    pub(crate) fn root_signed_by(&self, old: &Self, generation: &str) -> CertificateDer<'static> {
        Self::params(&format!("root {generation}"))
            .signed_by(self.root.key(), &old.root)
            .unwrap()
            .der()
            .clone()
    }

    pub(crate) fn root_der(&self) -> CertificateDer<'static> {
        self.root.der().clone()
    }

    pub(crate) fn roots(&self) -> Arc<Roots> {
        Arc::new(Roots::new(vec![self.root_der()]).unwrap())
    }

    /// A leaf that is valid for a week from the issuing CA's notBefore to `not_after`.
    pub(crate) fn leaf_until(
        &self,
        uris: &[&str],
        usages: &[ExtendedKeyUsagePurpose],
        not_after: SystemTime,
    ) -> Leaf {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::default();
        params.subject_alt_names = uris.iter().map(|uri| SanType::URI((*uri).try_into().unwrap())).collect();
        params.extended_key_usages = usages.to_vec();
        params.serial_number = Some(SerialNumber::from_slice(&[1; 16]));
        params.not_before = (now() - 360 * DAY).into();
        params.not_after = not_after.into();
        let public = rcgen::KeyPair::from_pem(&key.to_pem()).unwrap();
        let leaf = params.signed_by(&public, &self.issuing).unwrap();
        (vec![leaf.der().clone(), self.issuing.der().clone()], key)
    }

    pub(crate) fn leaf(&self, uris: &[&str], usages: &[ExtendedKeyUsagePurpose]) -> Leaf {
        self.leaf_until(uris, usages, now() + 7 * DAY)
    }

    pub(crate) fn node(&self) -> Arc<LiveIdentity> {
        live(self.leaf(&[NODE], &CLIENT))
    }

    pub(crate) fn agent(&self) -> Arc<LiveIdentity> {
        live(self.leaf(&[AGENT], &SERVER))
    }

    /// An agent's identity as an enrolment port shows it, down to the root.
    pub(crate) fn agent_with_root(&self) -> Arc<LiveIdentity> {
        let (mut chain, key) = self.leaf(&[AGENT], &SERVER);
        chain.push(self.root_der());
        live((chain, key))
    }
}

pub(crate) fn live((chain, key): Leaf) -> Arc<LiveIdentity> {
    Arc::new(LiveIdentity::new(chain, &key).unwrap())
}

fn key() -> rcgen::KeyPair {
    rcgen::KeyPair::generate().unwrap()
}
