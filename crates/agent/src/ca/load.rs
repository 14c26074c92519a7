//! Reads the fleet CA from the store.

use fleet_kms_identity::{TrustDomain, validity};
use fleet_kms_store::{ReadError, RowName};
use x509_parser::prelude::{FromDer, X509Certificate};
use zeroize::Zeroizing;

use super::generation::{ISSUING, ROOT};
use super::key::CaKey;
use super::{Authorities, Kind, Revisions, SignError, Stored};
use crate::ledger::{Ledger, LedgerError};
use crate::records::payload::{AuthorityRecord, AuthorityState};
use crate::records::{Record, rows};
use crate::times;

/// Why the fleet CA cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// The store cannot be read or a record is damaged.
    #[error(transparent)]
    Ledger(#[from] LedgerError),
    /// A generation that must be there is not, or is there twice.
    #[error("the store has {found} active {kind} CAs instead of one; restore a backup")]
    Active {
        /// Root or issuing.
        kind: &'static str,
        /// How many are there.
        found: usize,
    },
    /// The sealed private key's row is missing.
    #[error("the store has no private key for the active {0} CA; restore a backup")]
    NoKey(&'static str),
    /// The sealed private key does not open.
    #[error("the {kind} CA's private key in row {row} does not open; restore a backup")]
    Open {
        /// Root or issuing.
        kind: &'static str,
        /// The row.
        row: String,
        /// Why.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// What opens is not the certificate's key.
    #[error("the issuing CA's private key is not its certificate's")]
    ForeignKey,
    /// The stored certificate does not parse.
    #[error("the {0} CA's certificate is malformed")]
    Certificate(&'static str),
    /// The private key is of another kind than this release makes.
    #[error(transparent)]
    Key(#[from] SignError),
}

impl From<ReadError> for LoadError {
    fn from(error: ReadError) -> Self {
        Self::Ledger(error.into())
    }
}

impl Authorities {
    /// Reads the CAs from the store. `open` unseals a row's bytes (kind
    /// `CaKey`); it is called for the issuing CA's key only, never for a root's.
    ///
    /// # Errors
    ///
    /// When the store does not hold exactly one active root and issuing CA, or
    /// the issuing CA's key does not open or does not match.
    pub async fn load<E>(
        ledger: &Ledger,
        trust_domain: TrustDomain,
        open: impl Fn(&RowName, &[u8]) -> Result<Zeroizing<Vec<u8>>, E>,
    ) -> Result<Self, LoadError>
    where
        E: std::error::Error + Send + Sync + 'static,
    {
        let roots = ledger.scan::<AuthorityRecord>(&prefix(ROOT)).await?;
        let issuing = ledger.scan::<AuthorityRecord>(&prefix(ISSUING)).await?;
        let active_root = &only_active(ROOT, &roots)?.payload;
        let active_issuing = &only_active(ISSUING, &issuing)?.payload;

        let document = key_of(ISSUING, active_issuing.generation, ledger, &open).await?;
        let key = CaKey::from_pkcs8(&document)?;
        if key.spki()? != public_key(&active_issuing.certificate).ok_or(LoadError::Certificate(ISSUING))? {
            return Err(LoadError::ForeignKey);
        }
        let (root, issuing_ca) = (stored(ROOT, active_root)?, stored(ISSUING, active_issuing)?);
        let revisions = roots.iter().chain(&issuing).map(|record| (record.row.clone(), record.revision));
        let mut revisions: Revisions = revisions.collect();
        revisions.sort();
        let roots = roots.iter().map(|record| stored(ROOT, &record.payload));
        let all = roots.chain(issuing.iter().map(|record| stored(ISSUING, &record.payload)));
        Ok(Self {
            trust_domain,
            root,
            issuing: issuing_ca,
            stored: all.collect::<Result<_, _>>()?,
            revisions,
            key,
        })
    }
}

/// Returns the rows of all generations as the store has them now: others than
/// [`Authorities::revisions`] mean that the CAs have to be read again.
///
/// # Errors
///
/// When the store cannot be read.
pub async fn revisions(ledger: &Ledger) -> Result<Revisions, ReadError> {
    let mut rows = ledger.scan_revisions(rows::AUTHORITIES).await?;
    rows.sort();
    Ok(rows)
}

/// Opens one generation's private key (PKCS #8).
pub(super) async fn key_of<E>(
    kind: &'static str,
    generation: u32,
    ledger: &Ledger,
    open: &impl Fn(&RowName, &[u8]) -> Result<Zeroizing<Vec<u8>>, E>,
) -> Result<Zeroizing<Vec<u8>>, LoadError>
where
    E: std::error::Error + Send + Sync + 'static,
{
    let row = rows::authority_key(kind, generation);
    let sealed = ledger.scan_rows(row.as_str()).await?.into_iter().next();
    let sealed = sealed.ok_or(LoadError::NoKey(kind))?;
    open(&row, &sealed.bytes).map_err(|error| {
        let row = row.as_str().to_owned();
        LoadError::Open { kind, row, source: error.into() }
    })
}

pub(super) fn prefix(kind: &str) -> String {
    format!("{}{kind}/", rows::AUTHORITIES)
}

pub(super) fn only_active<'a>(
    kind: &'static str,
    records: &'a [Record<AuthorityRecord>],
) -> Result<&'a Record<AuthorityRecord>, LoadError> {
    let active: Vec<_> = records.iter().filter(|record| is_active(&record.payload)).collect();
    match active.as_slice() {
        [one] => Ok(one),
        other => Err(LoadError::Active { kind, found: other.len() }),
    }
}

fn is_active(record: &AuthorityRecord) -> bool {
    record.state == i32::from(AuthorityState::Active)
}

fn stored(kind: &'static str, record: &AuthorityRecord) -> Result<Stored, LoadError> {
    let (not_before, not_after) = validity(&record.certificate).map_err(|_| LoadError::Certificate(kind))?;
    Ok(Stored {
        kind: if kind == ROOT { Kind::Root } else { Kind::Issuing },
        generation: record.generation,
        certificate: record.certificate.clone(),
        cross_signed: (!record.cross_signed.is_empty()).then(|| record.cross_signed.clone()),
        state: record.state(),
        not_before,
        not_after,
        retired: times::optional(record.retired_ms),
        signed_by: (kind == ISSUING).then_some(record.signed_by),
    })
}

fn public_key(certificate: &[u8]) -> Option<Vec<u8>> {
    let (_, certificate) = X509Certificate::from_der(certificate).ok()?;
    Some(certificate.public_key().raw.to_vec())
}
