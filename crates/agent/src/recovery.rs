//! Making a rolled-back store good: after `restore`, and when an operator
//! confirms a store that was found to be an old copy.
//!
//! Whatever happened since the copy is lost to the store but not to the world:
//! versions and issue numbers were used, nodes got certificates, operators
//! banned some. So every cluster goes on with a fresh version far above the
//! lost ones, issue numbers jump, bans come back from the audit, and for a time
//! certificates from the lost days are good. Running it again does no harm.

use std::sync::Arc;

use fleet_kms_identity::SpiffeId;

use crate::authz::internal;
use crate::bans::{self, Bans};
use crate::changes::{ChangeError, Changes, ConfirmError};
use crate::control_plane::{ControlPlane, KeyChangeError};
use crate::identities::{IdentityError, LiveIdentities, parse};
use crate::ledger::{Changeset, LedgerError};
use crate::live_keyrings::LiveKeyrings;
use crate::records::payload::{IdentityRecord, IssuedRecord, RestoredRecord};
use crate::records::{Record, rows};
use crate::restored::{ISSUE_NUMBER_JUMP, Restored};
use crate::times::to_ms;
use crate::trail::Intent;

/// Why a store was not made good. Running it again goes on.
#[derive(Debug, thiserror::Error)]
pub enum RecoverError {
    /// The store cannot be read.
    #[error(transparent)]
    Ledger(#[from] LedgerError),
    /// Records were left out at the start; nothing here brings them back.
    #[error("row {row} is damaged, and confirming would not repair it; restore a backup")]
    Damaged { row: String },
    /// An identity's record has no meaning to this release.
    #[error(transparent)]
    Identity(#[from] IdentityError),
    /// The row of the last issue number is missing.
    #[error("the store has lost its issue number; restore another backup")]
    NoIssueNumber,
    /// No issue number is left to jump to.
    #[error("no issue number is left")]
    IssueNumbers,
    /// A cluster was not rotated.
    #[error("cluster {cluster} was not rotated")]
    Rotate {
        cluster: String,
        #[source]
        source: Box<ChangeError<KeyChangeError>>,
    },
    /// Another change was not made.
    #[error("{0} was not done: {1}")]
    Change(&'static str, String),
    /// The store could not be confirmed.
    #[error(transparent)]
    Confirm(#[from] ConfirmError),
}

/// What was done to make a store good.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Recovered {
    /// Clusters that have a fresh version.
    pub rotated: usize,
    /// Identities that the audit says are banned.
    pub banned: usize,
    /// The head's count now.
    pub count: u64,
}

/// What a recovery works on.
pub struct Recovery<'a> {
    /// Makes the changes.
    pub changes: &'a Changes,
    /// The keys.
    pub keyrings: &'a LiveKeyrings,
    /// Rotates.
    pub control_plane: &'a ControlPlane,
    /// The image of the identities.
    pub identities: &'a Arc<LiveIdentities>,
}

impl Recovery<'_> {
    /// Makes the store good and confirms it. Its head's count is above `count`
    /// afterwards.
    ///
    /// # Errors
    ///
    /// See [`RecoverError`]; the store is then as unconfirmed as before.
    pub async fn run(&self, bans: &Bans, count: u64) -> Result<Recovered, RecoverError> {
        self.changes.as_recovery(self.recover(bans, count)).await
    }

    async fn recover(&self, bans: &Bans, count: u64) -> Result<Recovered, RecoverError> {
        if let Some(row) = self.changes.ledger().damaged().first() {
            return Err(RecoverError::Damaged { row: row.as_str().to_owned() });
        }
        self.mark_restored().await?;
        let mut recovered = Recovered::default();
        for (id, banned) in &bans.states {
            self.replay(id, *banned).await?;
            recovered.banned += usize::from(*banned);
        }
        for (cluster, _) in self.keyrings.keyrings() {
            let rotated = self.control_plane.rotate_recovered(&internal::recovery(cluster)).await;
            rotated.map_err(|source| {
                let cluster = cluster.to_string();
                RecoverError::Rotate { cluster, source: Box::new(source) }
            })?;
            recovered.rotated += 1;
        }
        recovered.count = self.changes.confirm(count).await?;
        Ok(recovered)
    }

    /// Lets issue numbers jump, and remembers from where to where.
    async fn mark_restored(&self) -> Result<(), RecoverError> {
        let prepare = || async {
            let ledger = self.changes.ledger();
            let mut changeset = ledger.changeset();
            let issued = ledger.read::<IssuedRecord>(&rows::fixed(rows::ISSUED)).await?;
            let issued = issued.ok_or(RecoverError::NoIssueNumber)?;
            let issued_before = issued.payload.last;
            // A run that failed half-way and is run again: nothing was issued since its jump.
            if let Some(record) = ledger.read::<RestoredRecord>(&rows::fixed(rows::RESTORED)).await?
                && record.payload.issued_floor == issued_before
            {
                let again = Restored { at: self.changes.now(), ..Restored::from(&record.payload) };
                changeset.update(&record, &RestoredRecord::from(&again));
                return Ok((changeset, again));
            }
            let floor = issued_before.checked_add(ISSUE_NUMBER_JUMP);
            let issued_floor = floor.filter(|floor| *floor < 1 << 62).ok_or(RecoverError::IssueNumbers)?;
            changeset.update(&issued, &IssuedRecord { last: issued_floor });
            let restored = Restored { at: self.changes.now(), issued_before, issued_floor };
            let row = rows::fixed(rows::RESTORED);
            match ledger.read::<RestoredRecord>(&row).await? {
                Some(record) => changeset.update(&record, &RestoredRecord::from(&restored)),
                None => changeset.insert(row, &RestoredRecord::from(&restored)),
            }
            Ok::<_, RecoverError>((changeset, restored))
        };
        let done = self.changes.run(Intent::new("store_restored", "recovery"), prepare).await;
        self.identities.set_restored(Some(done.map_err(|error| flatten("store_restored", error))?));
        Ok(())
    }

    /// Brings one identity's ban up to what the audit says.
    async fn replay(&self, id: &SpiffeId, banned: bool) -> Result<(), RecoverError> {
        let row = rows::identity(id);
        let read = || self.changes.ledger().read::<IdentityRecord>(&row);
        let known = read().await?;
        if known.map_or(!banned, |record| (record.payload.banned_ms != 0) == banned) {
            return Ok(());
        }
        let action = if banned { bans::BAN } else { bans::UNBAN };
        let intent = Intent::new(action, "recovery").target(id.to_string()).detail("replayed", "true");
        let prepare = || async {
            let mut changeset = self.changes.ledger().changeset();
            let banned_ms = if banned { to_ms(self.changes.now()) } else { 0 };
            let record = ban(&mut changeset, id, read().await?, banned_ms);
            Ok::<_, RecoverError>((changeset, record))
        };
        let done = self.changes.run_with_revision(intent, prepare).await;
        let (record, revision) = done.map_err(|error| flatten(action, error))?;
        self.identities.publish(parse(&Record { revision, ..record })?);
        Ok(())
    }
}

/// Writes an identity with a ban, or without; one that is not known gets a row
/// that says only that it is banned.
fn ban(
    changeset: &mut Changeset,
    id: &SpiffeId,
    known: Option<Record<IdentityRecord>>,
    banned_ms: u64,
) -> Record<IdentityRecord> {
    match known {
        Some(record) => {
            let payload = IdentityRecord { banned_ms, ..record.payload.clone() };
            changeset.update(&record, &payload);
            Record { payload, ..record }
        }
        None => {
            let payload = IdentityRecord {
                id: id.to_string(),
                banned_ms,
                created_ms: banned_ms,
                ..IdentityRecord::default()
            };
            let row = rows::identity(id);
            changeset.insert(row.clone(), &payload);
            Record::new(row, payload)
        }
    }
}

fn flatten(what: &'static str, error: ChangeError<RecoverError>) -> RecoverError {
    match error {
        ChangeError::Refused(error) => error,
        error => RecoverError::Change(what, crate::errors::chain(&error)),
    }
}
