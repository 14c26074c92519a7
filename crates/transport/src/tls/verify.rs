//! The judgement of certificate chains that both sides share. Signatures and paths are webpki's; which dates count, and
//! what the leaf must be, are ours.

use std::time::SystemTime;

use fleet_kms_identity::{CertificateError, Standing, validity};
use rustls_pki_types::CertificateDer;

use super::error::{CertificateRefused, is_about_dates};

/// Issuing CA, a rollover's cross-signed roots and the roots themselves: more is an attack on our time.
const MAX_ISSUERS: usize = 6;

/// Which dates a chain is judged by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Dates {
    /// The present.
    Judged,
    /// The moment nearest to the present at which leaf and issuers were valid: only their dates are forgiven.
    Clamped,
}

/// Judges a chain by `check`, which verifies it at a given time, and says how its dates stand at `now`.
///
/// # Errors
///
/// Whatever `check` finds at the last moment that was tried; `ChainTooLong` before any of it.
pub(super) fn judge_chain(
    leaf: &CertificateDer<'_>,
    issuers: &[CertificateDer<'_>],
    now: SystemTime,
    dates: Dates,
    check: impl Fn(SystemTime) -> Result<(), rustls::Error>,
) -> Result<Standing, rustls::Error> {
    if issuers.len() > MAX_ISSUERS {
        return Err(CertificateRefused::ChainTooLong.into());
    }
    let mut refused = match check(now) {
        Ok(()) => return Ok(Standing::Valid),
        Err(error) => error,
    };
    if dates == Dates::Judged {
        return Err(refused);
    }
    for moment in moments(leaf, issuers, now).map_err(CertificateRefused::Form)? {
        if !is_about_dates(&refused) {
            break;
        }
        match check(moment) {
            Ok(()) => return Ok(Standing::at(now, moment, moment)),
            Err(error) => refused = error,
        }
    }
    Err(refused)
}

/// Returns the moments to judge a chain at, nearest to `now` first.
///
/// Every path from the leaf is wholly valid at the end (or, for a slow clock, at the beginning) of one of its
/// certificates, if ever. Certificates of the chain that are not on the path, such as a root that was cross-signed after
/// the leaf's end, add moments that do no harm.
fn moments(
    leaf: &CertificateDer<'_>,
    issuers: &[CertificateDer<'_>],
    now: SystemTime,
) -> Result<Vec<SystemTime>, CertificateError> {
    let (not_before, not_after) = validity(leaf)?;
    let mut moments = vec![clamp(now, not_before, not_after)];
    for issuer in issuers {
        let (from, to) = validity(issuer)?;
        let moment = clamp(now, from, to);
        if (not_before..=not_after).contains(&moment) && !moments.contains(&moment) {
            moments.push(moment);
        }
    }
    moments.sort_by_key(|moment| now.duration_since(*moment).unwrap_or_else(|error| error.duration()));
    Ok(moments)
}

/// Unlike `Ord::clamp`, takes a certificate that ends before it begins.
fn clamp(now: SystemTime, from: SystemTime, to: SystemTime) -> SystemTime {
    now.max(from).min(to)
}
