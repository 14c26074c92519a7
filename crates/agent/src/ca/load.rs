//! Reads the fleet CA from the store.

use fleet_kms_identity::{TrustDomain, validity};
use fleet_kms_store::{ReadError, RowName};
use x509_parser::prelude::{FromDer, X509Certificate};
use zeroize::Zeroizing;

use super::generation::{ISSUING, ROOT};
use super::key::CaKey;
use super::{Authorities, Authority, SignError};
use crate::ledger::{Ledger, LedgerError};
use crate::records::payload::{AuthorityRecord, AuthorityState};
use crate::records::{Record, rows};

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
        Ok(Self {
            trust_domain,
            root: authority(ROOT, active_root)?,
            trusted_roots: trusted(active_root, &roots),
            issuing: authority(ISSUING, active_issuing)?,
            key,
        })
    }
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

/// Every stored root is trusted, a prepared one so that nodes know it before it
/// is used; a rollover that drops a root deletes its row.
fn trusted(active: &AuthorityRecord, roots: &[Record<AuthorityRecord>]) -> Vec<Vec<u8>> {
    let others = roots.iter().map(|record| &record.payload).filter(|record| !is_active(record));
    std::iter::once(active).chain(others).map(|record| record.certificate.clone()).collect()
}

fn authority(kind: &'static str, record: &AuthorityRecord) -> Result<Authority, LoadError> {
    let (not_before, not_after) = validity(&record.certificate).map_err(|_| LoadError::Certificate(kind))?;
    Ok(Authority {
        certificate: record.certificate.clone(),
        cross_signed: (!record.cross_signed.is_empty()).then(|| record.cross_signed.clone()),
        not_before,
        not_after,
    })
}

fn public_key(certificate: &[u8]) -> Option<Vec<u8>> {
    let (_, certificate) = X509Certificate::from_der(certificate).ok()?;
    Some(certificate.public_key().raw.to_vec())
}
