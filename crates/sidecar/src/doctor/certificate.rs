//! This node's certificate: its dates, and the way from it to a pinned root.

use std::time::{Duration, SystemTime};

use fleet_kms_identity::{Certificate, Renewal, Standing, renewal_due, validity};
use rustls_pki_types::CertificateDer;
use x509_parser::certificate::X509Certificate;
use x509_parser::prelude::FromDer;

use super::identity::{ENROL, Node};
use super::report::{Check, CheckId};
use super::{about, date};
use crate::believed_time::chains;

/// How long after the moment of renewal nothing is said: an agent may be away.
const RENEWAL_GRACE: Duration = Duration::from_secs(3_600);

/// Judges the certificate at `now`, the believed time.
pub(super) fn examine(node: &Node, now: SystemTime) -> Vec<Check> {
    let Some(identity) = &node.identity else { return Vec::new() };
    let certificate = identity.certificate();
    vec![dates(&certificate, identity.leaf_life(), now), to_root(&node.chain, &identity.roots(), now)]
}

fn dates(certificate: &Certificate, life: Duration, now: SystemTime) -> Check {
    let (id, subject) = (CheckId::CertificateDates, certificate.id());
    let until = date(certificate.not_after());
    match certificate.judge(now) {
        Standing::Expired { by } => {
            let message = format!("expired {} ago, at {until}", about(by));
            let remedy = format!(
                "start kms-sidecar: it renews an expired certificate by itself, up to the cluster's max_offline (180 days \
                 by default) after that moment; later, {ENROL}"
            );
            Check::fail(id, subject, message, remedy)
        }
        Standing::NotYetValid { by } => {
            let message =
                format!("valid only in {}: this node's clock is behind, and no agent told it", about(by));
            Check::fail(id, subject, message, "see agent_time; set this node's clock")
        }
        Standing::Valid => {
            let left = certificate.not_after().duration_since(now).unwrap_or_default();
            let message = format!("valid until {until}, for {}", about(left));
            let then = now.checked_sub(RENEWAL_GRACE).unwrap_or(now);
            let due = renewal_due(certificate.not_after(), life, then, u64::MAX);
            match !life.is_zero() && due == Renewal::Due {
                true => {
                    let message = format!("{message}; its renewal is overdue");
                    let remedy = "keep kms-sidecar running; its log and agent_time say why it cannot renew";
                    Check::warn(id, subject, message, remedy)
                }
                false => Check::ok(id, subject, message),
            }
        }
    }
}

/// Walks from the leaf to a root by signatures, and looks at the dates on the
/// way.
fn to_root(chain: &[CertificateDer<'_>], roots: &[CertificateDer<'_>], now: SystemTime) -> Check {
    let (id, subject) = (CheckId::CertificateChain, "chain.pem, roots.pem");
    let parsed: Vec<X509Certificate<'_>> = chain.iter().filter_map(|der| read(der)).collect();
    let anchors: Vec<X509Certificate<'_>> = roots.iter().filter_map(|der| read(der)).collect();
    let issuers_are_authorities = parsed.iter().skip(1).chain(&anchors).all(|issuer| issuer.is_ca());
    if parsed.len() != chain.len() || !issuers_are_authorities || !chains(&parsed, &anchors) {
        return Check::fail(id, subject, "the certificate does not chain to a pinned root", ENROL);
    }
    let authorities = chain.iter().skip(1).chain(roots).filter_map(|der| validity(der).ok());
    let Some(first_end) = authorities.map(|(_, not_after)| not_after).min() else {
        return Check::fail(id, subject, "no issuing CA in the chain", ENROL);
    };
    let message =
        format!("leads to one of {} pinned roots; its CAs are valid until {}", roots.len(), date(first_end));
    match now <= first_end {
        true => Check::ok(id, subject, message),
        false => Check::warn(
            id,
            subject,
            format!("{message}: one has expired"),
            "start kms-sidecar: with its next renewal it gets the chain and the roots of today",
        ),
    }
}

fn read(der: &[u8]) -> Option<X509Certificate<'_>> {
    X509Certificate::from_der(der)
        .ok()
        .filter(|(rest, _)| rest.is_empty())
        .map(|(_, certificate)| certificate)
}

#[cfg(test)]
mod tests {
    use rcgen::{
        BasicConstraints, CertificateParams, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, SanType,
    };

    use super::super::report::Status;
    use super::*;

    const DAY: Duration = Duration::from_secs(86_400);

    fn now() -> SystemTime {
        SystemTime::UNIX_EPOCH + 20_000 * DAY
    }

    struct Authority(CertificateParams, KeyPair);

    impl Authority {
        fn new(name: &str) -> Self {
            let mut params = CertificateParams::default();
            params.distinguished_name.push(rcgen::DnType::CommonName, name);
            params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
            params.not_before = (now() - DAY).into();
            params.not_after = (now() + 365 * DAY).into();
            Self(params, KeyPair::generate().unwrap())
        }

        fn root(&self) -> CertificateDer<'static> {
            self.0.self_signed(&self.1).unwrap().der().clone()
        }

        fn sign(&self, params: &CertificateParams, key: &KeyPair) -> CertificateDer<'static> {
            params.signed_by(key, &Issuer::from_params(&self.0, &self.1)).unwrap().der().clone()
        }
    }

    /// Leaf, issuing CA, and the root beside them.
    fn fleet() -> (Vec<CertificateDer<'static>>, CertificateDer<'static>) {
        let (root, issuing) = (Authority::new("root"), Authority::new("issuing"));
        let mut leaf = CertificateParams::default();
        let uri = "spiffe://prod/cluster/0f0e0d0c-0b0a-0908-0706-050403020100/node/cp-1";
        leaf.subject_alt_names = vec![SanType::URI(uri.try_into().unwrap())];
        leaf.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
        leaf.serial_number = Some(rcgen::SerialNumber::from_slice(&[7; 16]));
        leaf.not_before = (now() - DAY).into();
        leaf.not_after = (now() + 7 * DAY).into();
        let leaf = issuing.sign(&leaf, &KeyPair::generate().unwrap());
        (vec![leaf, root.sign(&issuing.0, &issuing.1)], root.root())
    }

    #[test]
    fn a_certificate_is_judged_at_the_time_that_is_given() {
        let leaf = Certificate::from_der(&fleet().0[0]).unwrap();
        let judged = |now| dates(&leaf, 7 * DAY, now).status;
        assert_eq!(judged(now()), Status::Ok);
        assert_eq!(judged(now() + 3 * DAY), Status::Warn);
        assert_eq!(judged(now() + 8 * DAY), Status::Fail);
        assert_eq!(judged(now() - 2 * DAY), Status::Fail);
        let expired = dates(&leaf, 7 * DAY, now() + 107 * DAY);
        assert!(expired.message.contains("expired 100 days ago"), "{expired:?}");
    }

    #[test]
    fn without_the_leafs_life_nothing_is_said_about_renewal() {
        let leaf = Certificate::from_der(&fleet().0[0]).unwrap();
        assert_eq!(dates(&leaf, Duration::ZERO, now() + 6 * DAY).status, Status::Ok);
    }

    #[test]
    fn the_chain_must_lead_to_a_pinned_root() {
        let (chain, root) = fleet();
        let (_, other) = fleet();
        let judged = |chain: &[_], root: &_, now| to_root(chain, std::slice::from_ref(root), now).status;
        assert_eq!(judged(&chain, &root, now()), Status::Ok);
        assert_eq!(judged(&chain, &root, now() + 400 * DAY), Status::Warn);
        assert_eq!(judged(&chain, &other, now()), Status::Fail);
        assert_eq!(judged(&chain[..1], &root, now()), Status::Fail);
        assert_eq!(judged(&[], &root, now()), Status::Fail);
    }
}
