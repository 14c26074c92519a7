//! A leaf certificate as fleet-kms reads it: one SPIFFE ID, a serial with an issue number, dates, key usages.
//!
//! Reading is no verification: the chain is checked by `transport`, and whether the serial may be used by the store's
//! list. Dates are judged at a time that the caller names, never by a clock read here.

use std::{
    fmt,
    time::{Duration, SystemTime},
};

use rustls_pki_types::{CertificateDer, pem::PemObject};
use sha2::{Digest, Sha256};
use thiserror::Error;
use x509_parser::{
    certificate::X509Certificate,
    extensions::{GeneralName, ParsedExtension},
    oid_registry::OID_X509_EXT_EXTENDED_KEY_USAGE,
    prelude::FromDer,
    time::ASN1Time,
};

use crate::spiffe_id::{SpiffeId, SpiffeIdError};

/// A leaf of the fleet CA is about 600 bytes.
const MAX_CERTIFICATE: usize = 8 * 1_024;
/// Leaf, issuing CA, cross-signed roots of a rollover and the roots themselves.
const MAX_CHAIN: usize = 8;

/// A certificate's serial: an issue number that only rises (8 bytes) ‖ 8 random bytes.
///
/// The issue number lets a restored store tell certificates that were issued after its backup from forgotten ones.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Serial([u8; 16]);

impl Serial {
    /// Makes a serial; `None` when `issue_number` is 2^63 or more, which DER would read as a negative serial.
    pub fn new(issue_number: u64, random: [u8; 8]) -> Option<Self> {
        let mut bytes = [0; 16];
        let (head, tail) = bytes.split_at_mut(8);
        head.copy_from_slice(&issue_number.to_be_bytes());
        tail.copy_from_slice(&random);
        (issue_number < 1 << 63).then_some(Self(bytes))
    }

    /// Takes the 16 bytes of a stored serial; `None` when its top bit is set.
    pub fn from_bytes(bytes: [u8; 16]) -> Option<Self> {
        (bytes[0] < 0x80).then_some(Self(bytes))
    }

    /// Returns the serial's 16 bytes, leading zeros kept.
    pub fn as_bytes(&self) -> &[u8; 16] {
        &self.0
    }

    /// Returns the issue number.
    pub fn issue_number(&self) -> u64 {
        let [a, b, c, d, e, f, g, h, ..] = self.0;
        u64::from_be_bytes([a, b, c, d, e, f, g, h])
    }

    /// Reads the content of a DER INTEGER, which drops leading zeros and adds one before a top bit.
    fn from_der_integer(content: &[u8]) -> Result<Self, CertificateError> {
        let digits = match content {
            [0, rest @ ..] => rest,
            whole => whole,
        };
        let mut bytes = [0; 16];
        let start = bytes.len().checked_sub(digits.len()).ok_or(CertificateError::Serial)?;
        bytes.get_mut(start..).ok_or(CertificateError::Serial)?.copy_from_slice(digits);
        let negative = content.first().is_none_or(|first| *first >= 0x80);
        if negative {
            Err(CertificateError::Serial)
        } else {
            Self::from_bytes(bytes).ok_or(CertificateError::Serial)
        }
    }
}

impl fmt::Display for Serial {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&data_encoding::HEXLOWER.encode(&self.0))
    }
}

impl fmt::Debug for Serial {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// How a certificate's dates stand at one moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Standing {
    /// Within its validity.
    Valid,
    /// Its notBefore is still to come.
    NotYetValid {
        /// How long until notBefore.
        by: Duration,
    },
    /// Its notAfter has passed.
    Expired {
        /// How long ago notAfter was.
        by: Duration,
    },
}

impl Standing {
    /// Judges the validity `not_before..=not_after` at `now`.
    pub fn at(now: SystemTime, not_before: SystemTime, not_after: SystemTime) -> Self {
        if let Ok(by) = now.duration_since(not_after)
            && !by.is_zero()
        {
            return Self::Expired { by };
        }
        match not_before.duration_since(now) {
            Ok(by) if !by.is_zero() => Self::NotYetValid { by },
            _ => Self::Valid,
        }
    }
}

/// A parsed leaf certificate with exactly one SPIFFE ID.
#[derive(Clone, PartialEq, Eq)]
pub struct Certificate {
    id: SpiffeId,
    serial: Serial,
    not_before: SystemTime,
    not_after: SystemTime,
    spki_sha256: [u8; 32],
    server_auth: bool,
    client_auth: bool,
}

impl Certificate {
    /// Reads a DER certificate. Nothing is verified but its form.
    ///
    /// # Errors
    ///
    /// Refuses CA certificates, other than exactly one URI SAN (of whatever kind), an ID that is none of ours, a serial
    /// that does not fit 16 bytes, and trailing bytes. DNS, IP and other names are ignored: they mean nothing here.
    pub fn from_der(der: &[u8]) -> Result<Self, CertificateError> {
        if der.len() > MAX_CERTIFICATE {
            return Err(CertificateError::TooLong);
        }
        let (rest, parsed) = X509Certificate::from_der(der).map_err(|_| CertificateError::Malformed)?;
        if !rest.is_empty() {
            return Err(CertificateError::Malformed);
        }
        if parsed.is_ca() {
            return Err(CertificateError::Authority);
        }
        let (server_auth, client_auth) = extended_key_usages(&parsed)?;
        Ok(Self {
            id: only_uri(&parsed)?.parse()?,
            serial: Serial::from_der_integer(parsed.raw_serial())?,
            not_before: system_time(parsed.validity().not_before)?,
            not_after: system_time(parsed.validity().not_after)?,
            spki_sha256: Sha256::digest(parsed.public_key().raw).into(),
            server_auth,
            client_auth,
        })
    }

    /// Returns the one identity that the certificate names.
    pub fn id(&self) -> &SpiffeId {
        &self.id
    }

    /// Returns the serial.
    pub fn serial(&self) -> Serial {
        self.serial
    }

    /// Returns the first moment of validity. It is the issuer's, and says nothing about when the leaf was issued.
    pub fn not_before(&self) -> SystemTime {
        self.not_before
    }

    /// Returns the last moment of validity.
    pub fn not_after(&self) -> SystemTime {
        self.not_after
    }

    /// Returns the SHA-256 of the SubjectPublicKeyInfo: the name of the key.
    pub fn spki_sha256(&self) -> &[u8; 32] {
        &self.spki_sha256
    }

    /// Tells whether the extended key usage serverAuth is *present*; a certificate without any has none.
    pub fn has_server_auth(&self) -> bool {
        self.server_auth
    }

    /// Tells whether the extended key usage clientAuth is *present*; a certificate without any has none.
    pub fn has_client_auth(&self) -> bool {
        self.client_auth
    }

    /// Judges the dates at `now`.
    pub fn judge(&self, now: SystemTime) -> Standing {
        Standing::at(now, self.not_before, self.not_after)
    }
}

impl fmt::Debug for Certificate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Certificate")
            .field("id", &self.id)
            .field("serial", &self.serial)
            .finish_non_exhaustive()
    }
}

/// Returns the validity of any DER certificate, CA or leaf, as notBefore and notAfter.
///
/// # Errors
///
/// `Malformed` when the bytes are no certificate.
pub fn validity(der: &[u8]) -> Result<(SystemTime, SystemTime), CertificateError> {
    let (_, parsed) = X509Certificate::from_der(der).map_err(|_| CertificateError::Malformed)?;
    Ok((system_time(parsed.validity().not_before)?, system_time(parsed.validity().not_after)?))
}

/// Returns the SHA-256 of a DER certificate: how a join token names the root.
pub fn fingerprint(der: &[u8]) -> [u8; 32] {
    Sha256::digest(der).into()
}

/// Reads the certificates of a PEM text in their order; other sections are ignored.
///
/// # Errors
///
/// `Malformed` when a section is broken, `TooLong` beyond 8 certificates, `Empty` when there is none.
pub fn split_pem_chain(pem: &[u8]) -> Result<Vec<CertificateDer<'static>>, CertificateError> {
    let mut chain = Vec::new();
    for certificate in CertificateDer::pem_slice_iter(pem) {
        if chain.len() == MAX_CHAIN {
            return Err(CertificateError::TooLong);
        }
        chain.push(certificate.map_err(|_| CertificateError::Malformed)?);
    }
    if chain.is_empty() { Err(CertificateError::Empty) } else { Ok(chain) }
}

/// Why a certificate cannot be anyone's in a fleet.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum CertificateError {
    /// No certificate where one must be.
    #[error("there is no certificate")]
    Empty,
    /// Larger, or a longer chain, than any the fleet CA makes.
    #[error("the certificate or its chain is too long")]
    TooLong,
    /// Not DER of X.509, or an extension is broken or doubled.
    #[error("the certificate is malformed")]
    Malformed,
    /// A CA's certificate in the place of a leaf.
    #[error("the certificate is a certificate authority's")]
    Authority,
    /// None, or more than one, URI among the subject's alternative names.
    #[error("the certificate has {0} URI names instead of exactly one")]
    UriNames(usize),
    /// The URI is no ID of a fleet.
    #[error("the certificate's URI name is no fleet identity")]
    Id(#[from] SpiffeIdError),
    /// Negative, or longer than 16 bytes.
    #[error("the certificate's serial is not one of a fleet CA")]
    Serial,
}

/// Returns the only URI among the subject's alternative names.
fn only_uri<'a>(parsed: &X509Certificate<'a>) -> Result<&'a str, CertificateError> {
    let names = parsed.subject_alternative_name().map_err(|_| CertificateError::Malformed)?;
    let names = names.map_or(&[][..], |extension| extension.value.general_names.as_slice());
    let uris: Vec<&'a str> = names
        .iter()
        .filter_map(|name| match name {
            GeneralName::URI(uri) => Some(*uri),
            _ => None,
        })
        .collect();
    match uris.as_slice() {
        [uri] => Ok(uri),
        other => Err(CertificateError::UriNames(other.len())),
    }
}

/// Returns whether serverAuth and clientAuth are named. `anyExtendedKeyUsage` names neither.
fn extended_key_usages(parsed: &X509Certificate<'_>) -> Result<(bool, bool), CertificateError> {
    let extension = parsed
        .get_extension_unique(&OID_X509_EXT_EXTENDED_KEY_USAGE)
        .map_err(|_| CertificateError::Malformed)?;
    match extension.map(|extension| extension.parsed_extension()) {
        None => Ok((false, false)),
        Some(ParsedExtension::ExtendedKeyUsage(usage)) => Ok((usage.server_auth, usage.client_auth)),
        Some(_) => Err(CertificateError::Malformed),
    }
}

fn system_time(time: ASN1Time) -> Result<SystemTime, CertificateError> {
    let seconds = time.timestamp();
    let distance = Duration::from_secs(seconds.unsigned_abs());
    let moment = if seconds < 0 {
        SystemTime::UNIX_EPOCH.checked_sub(distance)
    } else {
        SystemTime::UNIX_EPOCH.checked_add(distance)
    };
    moment.ok_or(CertificateError::Malformed)
}

#[cfg(test)]
mod tests;
