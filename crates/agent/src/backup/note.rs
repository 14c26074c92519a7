//! Notes a verified backup in the store: its time, and that the versions in it
//! are backed up.

use std::path::Path;
use std::sync::PoisonError;

use fleet_kms_keyring::{ClusterId, Version};

use super::{Backups, Verified};
use crate::authz::internal;
use crate::changes::ChangeError;
use crate::ledger::{Changeset, LedgerError};
use crate::live_keyrings::Snapshot;
use crate::records::keyring::{self, KeyringError};
use crate::records::payload::{BackupRecord, KeyringRecord};
use crate::records::rows;
use crate::times::to_ms;
use crate::trail::Intent;

/// Keyrings marked by one transaction: a keyring of 480 versions has 30 kB.
const PER_CHANGE: usize = 25;

/// Why a backup could not be noted.
#[derive(Debug, thiserror::Error)]
pub enum NoteError {
    /// A keyring or the backup's record cannot be read.
    #[error(transparent)]
    Ledger(#[from] LedgerError),
    /// A keyring is damaged.
    #[error(transparent)]
    Keyring(#[from] KeyringError),
    /// The change was not made.
    #[error("the change was not made: {0}")]
    Change(String),
}

impl Backups {
    /// Notes a verified backup.
    pub(super) async fn note(&self, verified: &Verified) -> Result<(), NoteError> {
        // Good even if the store does not take the note.
        let last = Some((verified.at, verified.file.clone()));
        *self.last.lock().unwrap_or_else(PoisonError::into_inner) = last;
        let unbacked: Vec<_> = verified.held.highest.iter().filter(|held| self.is_unbacked(held)).collect();
        let mut batches: Vec<&[&(ClusterId, Version)]> = unbacked.chunks(PER_CHANGE).collect();
        if batches.is_empty() {
            batches.push(&[]);
        }
        for batch in batches {
            let intent = Intent::new("backup", "backup")
                .target(verified.file.display().to_string())
                .detail("clusters", verified.held.highest.len().to_string())
                .detail("versions", verified.held.versions.to_string());
            let prepare = || self.prepare_note(batch, verified);
            let publish = |snapshots: Vec<_>, revision| {
                for (cluster, snapshot) in snapshots {
                    self.keyrings.publish(cluster, Snapshot { revision, ..snapshot });
                }
            };
            match self.changes.run_applied(intent, prepare, publish).await {
                Ok(()) => {}
                Err(ChangeError::Refused(error)) => return Err(error),
                Err(error) => return Err(NoteError::Change(crate::errors::chain(&error))),
            }
        }
        Ok(())
    }

    fn is_unbacked(&self, (cluster, highest): &(ClusterId, Version)) -> bool {
        self.keyrings.keyring(cluster).is_some_and(|live| {
            let mut versions = live.keyring.versions().iter();
            versions.any(|version| version.unbacked && version.version <= *highest)
        })
    }

    async fn prepare_note(
        &self,
        batch: &[&(ClusterId, Version)],
        verified: &Verified,
    ) -> Result<(Changeset, Vec<(ClusterId, Snapshot)>), NoteError> {
        let ledger = self.changes.ledger();
        let mut changeset = ledger.changeset();
        let note = record(verified.at, &verified.file);
        match ledger.read::<BackupRecord>(&rows::fixed(rows::BACKUP)).await? {
            Some(record) => changeset.update(&record, &note),
            None => changeset.insert(rows::fixed(rows::BACKUP), &note),
        }
        let mut snapshots = Vec::new();
        for (cluster, highest) in batch {
            let Some(record) = ledger.read::<KeyringRecord>(&rows::keyring(cluster)).await? else { continue };
            let mut keyring = keyring::parse(&record)?;
            keyring.mark_backed(*highest);
            changeset.update(&record, &keyring::payload(&keyring));
            // From the store: a rotation that was committed just before may not be in memory yet.
            let keks = self.keyrings.keks_of(&internal::load(*cluster), ledger, &record, &keyring).await?;
            snapshots.push((*cluster, Snapshot { revision: record.revision, keyring, keks }));
        }
        Ok((changeset, snapshots))
    }
}

fn record(at: std::time::SystemTime, file: &Path) -> BackupRecord {
    BackupRecord { verified_ms: to_ms(at), file: file.display().to_string() }
}
