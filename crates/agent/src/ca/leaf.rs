//! What a leaf looks like. Everything follows from the name it is for.

use std::time::{Duration, SystemTime};

use fleet_kms_identity::{Serial, SpiffeId, Subject};
use rcgen::{
    CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, KeyUsagePurpose, SanType, SerialNumber,
};

use super::SignError;
use super::generation::{distinguished_name, to_x509};

const DAY: Duration = Duration::from_secs(86_400);

/// How long a node's, worker's or agent's certificate lives.
pub const LEAF_LIFE: Duration = Duration::from_secs(7 * DAY.as_secs());
/// How long an admin's certificate lives.
pub const ADMIN_LIFE: Duration = Duration::from_secs(30 * DAY.as_secs());

/// Returns how long a certificate of this subject lives.
pub fn life(subject: &Subject) -> Duration {
    match subject {
        Subject::Node { .. } | Subject::Worker { .. } | Subject::Agent { .. } => LEAF_LIFE,
        Subject::Admin { .. } => ADMIN_LIFE,
    }
}

/// Only agents may serve: any other leaf with serverAuth could pose as one.
fn extended_key_usages(subject: &Subject) -> Vec<ExtendedKeyUsagePurpose> {
    match subject {
        Subject::Agent { .. } => {
            vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth]
        }
        Subject::Node { .. } | Subject::Worker { .. } | Subject::Admin { .. } => {
            vec![ExtendedKeyUsagePurpose::ClientAuth]
        }
    }
}

/// Describes the leaf of `id`. `not_before` is the issuing CA's: a node whose
/// clock is behind never sees a certificate that is not yet valid.
pub(super) fn params(
    id: &SpiffeId,
    serial: &Serial,
    not_before: SystemTime,
    not_after: SystemTime,
) -> Result<CertificateParams, SignError> {
    let name = SanType::URI(id.to_string().try_into().map_err(SignError::Sign)?);
    let mut params = CertificateParams::default();
    params.serial_number = Some(SerialNumber::from_slice(serial.as_bytes()));
    params.not_before = to_x509(not_before)?;
    params.not_after = to_x509(not_after)?;
    params.distinguished_name = distinguished_name(&id.trust_domain);
    params.distinguished_name.push(DnType::CommonName, id.subject.name().as_str());
    params.subject_alt_names = vec![name];
    params.is_ca = IsCa::ExplicitNoCa;
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.extended_key_usages = extended_key_usages(&id.subject);
    params.use_authority_key_identifier_extension = true;
    Ok(params)
}
