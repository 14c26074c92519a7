//! Makes CA generations: keys and certificates, for the store to keep.
//!
//! The private keys leave here as PKCS #8, to be sealed by the caller before
//! they reach any disk.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use fleet_kms_identity::{TrustDomain, validity};
use fleet_kms_store::RowName;
use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, IsCa, KeyPair, KeyUsagePurpose,
    PKCS_ECDSA_P256_SHA256, SerialNumber,
};
use time::OffsetDateTime;
use zeroize::Zeroizing;

use super::SignError;
use super::key::CaKey;
use crate::ledger::Changeset;
use crate::records::payload::{AuthorityRecord, AuthorityState, IssuedRecord};
use crate::records::rows;
use crate::times::to_ms;

const DAY: Duration = Duration::from_secs(86_400);

/// How long a root CA lives.
pub const ROOT_LIFE: Duration = Duration::from_secs(10 * 365 * DAY.as_secs());
/// How long nodes are told of a new root before it is used by itself: by then
/// every node that is on has renewed, and knows it.
pub(super) const PREPARED_FOR: Duration = super::LEAF_LIFE;
/// Roots before the active one that a chain may lead to: leaf, issuing CA, two
/// cross-signed roots and three roots are what a peer takes.
pub(super) const MAX_RETIRING: usize = 2;
/// CAs below a root: an issuing CA, and what later roots are cross-signed as.
const BELOW_ROOT: u8 = 1 + MAX_RETIRING as u8;
/// How long an issuing CA lives.
pub const ISSUING_LIFE: Duration = Duration::from_secs(365 * DAY.as_secs());
/// A new fleet's certificates begin this much before the agent's present, for
/// the clocks of operators and agents that are a little behind it.
const CLOCK_SLACK: Duration = Duration::from_secs(3_600);

/// The row kind of root CAs.
pub(super) const ROOT: &str = "root";
/// The row kind of issuing CAs.
pub(super) const ISSUING: &str = "issuing";

/// A new fleet's CA: not in use before its rows are in the store.
pub struct NewAuthorities {
    root: Generation,
    issuing: Generation,
}

/// One CA generation before it is stored.
pub(super) struct Generation {
    kind: &'static str,
    pub(super) record: AuthorityRecord,
    /// PKCS #8.
    pub(super) key: Zeroizing<Vec<u8>>,
}

/// Makes root and issuing CA of a new fleet, both of generation 1.
///
/// # Errors
///
/// When the clock is absurd or AWS-LC fails.
pub fn create(
    trust_domain: &TrustDomain,
    now: SystemTime,
    rng: &mut dyn rand_core::CryptoRng,
) -> Result<NewAuthorities, SignError> {
    let not_before = now.checked_sub(CLOCK_SLACK).ok_or(SignError::Clock)?;
    let root = new_root(trust_domain, 1, not_before, now, rng)?.0;
    let issuing = new_issuing(trust_domain, 1, (&root.record, &root.key), now, rng)?;
    Ok(NewAuthorities { root, issuing })
}

impl NewAuthorities {
    /// Adds the rows of the new CA: both certificates, both keys as `seal`
    /// returns them for their row, and the issue number 0.
    ///
    /// # Errors
    ///
    /// When `seal` fails.
    pub fn write_to<E>(
        &self,
        changeset: &mut Changeset,
        mut seal: impl FnMut(&RowName, &[u8]) -> Result<Vec<u8>, E>,
    ) -> Result<(), E> {
        self.root.write_to(changeset, &mut seal)?;
        self.issuing.write_to(changeset, &mut seal)?;
        changeset.insert(rows::fixed(rows::ISSUED), &IssuedRecord { last: 0 });
        Ok(())
    }
}

impl Generation {
    pub(super) fn write_to<E>(
        &self,
        changeset: &mut Changeset,
        seal: &mut impl FnMut(&RowName, &[u8]) -> Result<Vec<u8>, E>,
    ) -> Result<(), E> {
        let number = self.record.generation;
        let row = rows::authority_key(self.kind, number);
        let sealed = seal(&row, &self.key)?;
        changeset.insert(rows::authority(self.kind, number), &self.record);
        changeset.insert_sealed(row, sealed);
        Ok(())
    }
}

/// A root and how it was described, for [`cross_sign`].
pub(super) fn new_root(
    trust_domain: &TrustDomain,
    generation: u32,
    not_before: SystemTime,
    now: SystemTime,
    rng: &mut dyn rand_core::CryptoRng,
) -> Result<(Generation, CertificateParams), SignError> {
    let not_after = now.checked_add(ROOT_LIFE).ok_or(SignError::Clock)?;
    let (key, document) = new_key()?;
    let mut params = params(trust_domain, "root", not_before, not_after, rng)?;
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(BELOW_ROOT));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
    let certificate = params.self_signed(&*key).map_err(SignError::Sign)?;
    let record = AuthorityRecord { generation, ..record(certificate.der().to_vec(), not_after, 0) };
    Ok((Generation { kind: ROOT, record, key: document }, params))
}

/// Makes the root that succeeds `old`: also signed by the old one, so that who
/// knows only that can follow. It begins when the old one did: a node whose
/// clock is behind never sees a root that is not yet valid.
pub(super) fn next_root(
    trust_domain: &TrustDomain,
    generation: u32,
    (old, old_key): (&AuthorityRecord, &[u8]),
    now: SystemTime,
    rng: &mut dyn rand_core::CryptoRng,
) -> Result<Generation, SignError> {
    let (not_before, old_end) = validity(&old.certificate).map_err(|_| SignError::Root)?;
    let (mut root, mut params) = new_root(trust_domain, generation, not_before, now, rng)?;
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(BELOW_ROOT - 1));
    params.serial_number = Some(serial(rng));
    params.not_after = to_x509(old_end.min(now.checked_add(ROOT_LIFE).ok_or(SignError::Clock)?))?;
    params.use_authority_key_identifier_extension = true;
    let key = CaKey::from_pkcs8(&root.key)?.open()?;
    root.record.cross_signed =
        CaKey::from_pkcs8(old_key)?.sign_certificate(&old.certificate, &params, &*key)?;
    Ok(root)
}

/// Makes an issuing CA under a root, given as its record and its key (PKCS #8).
pub(super) fn new_issuing(
    trust_domain: &TrustDomain,
    generation: u32,
    (root, root_key): (&AuthorityRecord, &[u8]),
    now: SystemTime,
    rng: &mut dyn rand_core::CryptoRng,
) -> Result<Generation, SignError> {
    let (not_before, root_end) = validity(&root.certificate).map_err(|_| SignError::Root)?;
    let not_after = now.checked_add(ISSUING_LIFE).ok_or(SignError::Clock)?.min(root_end);
    let (key, document) = new_key()?;
    let mut params = params(trust_domain, "issuing", not_before, not_after, rng)?;
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    // It also signs `Time` answers.
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::DigitalSignature];
    params.use_authority_key_identifier_extension = true;
    let root_key = CaKey::from_pkcs8(root_key)?;
    let certificate = root_key.sign_certificate(&root.certificate, &params, &*key)?;
    let record = AuthorityRecord { generation, ..record(certificate, not_after, root.generation) };
    Ok(Generation { kind: ISSUING, record, key: document })
}

/// Says whether a CA that ends at `not_after` is to be renewed: less than half
/// of its configured life is left.
pub(super) fn due(not_after: SystemTime, life: Duration, now: SystemTime) -> bool {
    not_after.duration_since(now).unwrap_or_default() < life / 2
}

/// When a prepared root becomes active by itself. It was made a life before its
/// end.
pub(super) fn activates(root_not_after: SystemTime) -> SystemTime {
    root_not_after.checked_sub(ROOT_LIFE - PREPARED_FOR).unwrap_or(UNIX_EPOCH)
}

fn new_key() -> Result<(Zeroizing<KeyPair>, Zeroizing<Vec<u8>>), SignError> {
    let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).map(Zeroizing::new).map_err(SignError::Sign)?;
    let document = Zeroizing::new(key.serialize_der());
    Ok((key, document))
}

fn record(certificate: Vec<u8>, not_after: SystemTime, signed_by: u32) -> AuthorityRecord {
    AuthorityRecord {
        generation: 1,
        certificate,
        state: AuthorityState::Active.into(),
        not_after_ms: to_ms(whole_seconds(not_after)),
        signed_by,
        cross_signed: Vec::new(),
        retired_ms: 0,
    }
}

fn params(
    trust_domain: &TrustDomain,
    kind: &str,
    not_before: SystemTime,
    not_after: SystemTime,
    rng: &mut dyn rand_core::CryptoRng,
) -> Result<CertificateParams, SignError> {
    let serial = serial(rng);
    // The random part is in the name too: two CAs of one name and different
    // keys confuse whoever looks certificates up by name.
    let mark: String = serial.as_ref().iter().skip(1).take(4).map(|byte| format!("{byte:02x}")).collect();
    let mut params = CertificateParams::default();
    params.distinguished_name = distinguished_name(trust_domain);
    params.distinguished_name.push(DnType::CommonName, format!("fleet-kms {kind} CA {mark}"));
    params.serial_number = Some(serial);
    params.not_before = to_x509(not_before)?;
    params.not_after = to_x509(not_after)?;
    Ok(params)
}

fn serial(rng: &mut dyn rand_core::CryptoRng) -> SerialNumber {
    let mut serial = [0; 16];
    rng.fill_bytes(&mut serial);
    // An ASN.1 INTEGER with the top bit set is negative; RFC 5280 wants none.
    serial[0] = serial[0] & 0x7f | 0x40;
    SerialNumber::from_slice(&serial)
}

/// The part of the name that all certificates of a fleet share.
pub(super) fn distinguished_name(trust_domain: &TrustDomain) -> DistinguishedName {
    let mut name = DistinguishedName::new();
    name.push(DnType::OrganizationName, trust_domain.as_str());
    name
}

/// Returns a certificate's date, which has whole seconds.
pub(super) fn to_x509(time: SystemTime) -> Result<OffsetDateTime, SignError> {
    let seconds = time.duration_since(UNIX_EPOCH).map_err(|_| SignError::Clock)?.as_secs();
    let seconds = i64::try_from(seconds).map_err(|_| SignError::Clock)?;
    OffsetDateTime::from_unix_timestamp(seconds).map_err(|_| SignError::Clock)
}

/// Drops what a certificate's date cannot hold.
pub(super) fn whole_seconds(time: SystemTime) -> SystemTime {
    let since = time.duration_since(UNIX_EPOCH).unwrap_or_default();
    UNIX_EPOCH + Duration::from_secs(since.as_secs())
}
