//! The end of a version. The control plane lets nobody begin it before a census
//! exists, so the steps that it refuses are made below it, as it will make
//! them: the keyring decides, one transaction stores.

use fleet_kms_keyring::{ClusterId, Keyring, MIN_DESTRUCTION_WAIT, State, TransitionError, Version};

use super::{Ended, World, ended};
use crate::authz::actions;
use crate::changes::ChangeError;
use crate::control_plane::{KeyChangeError, Wish};
use crate::promises::model::truth;
use crate::promises::rig::permit;
use crate::records::payload::KeyringRecord;
use crate::records::{keyring, rows};
use crate::trail::Intent;

impl World {
    /// Takes a disabled version one step towards its end, or back.
    pub(in crate::promises) async fn end(
        &mut self,
        by: usize,
        cluster: ClusterId,
        version: Version,
        back: bool,
    ) -> Ended {
        let state = truth(&self.store, &cluster).await.unwrap().keyring.by_version(version).unwrap().state;
        let now = self.clocks.wall();
        let result = match state {
            State::DestroyScheduled { .. } if back => {
                let permit = permit::<actions::KeyCancelDestroy>(cluster);
                let desk = &self.processes[by].desk;
                desk.control_plane.change_version(&permit, version, Wish::default()).await.map(drop)
            }
            State::DestroyScheduled { not_before } => {
                let destroy = |keyring: &mut Keyring| keyring.destroy(version, now);
                let result = self.below(by, cluster, destroy, Some(version)).await;
                assert!(now >= not_before || result.is_err(), "nothing is destroyed before its date");
                self.destroyed += u64::from(result.is_ok());
                result
            }
            _ => {
                let permit = permit::<actions::KeyDestroy>(cluster);
                let desk = &self.processes[by].desk;
                let result = desk.control_plane.change_version(&permit, version, Wish::default()).await;
                assert!(result.is_err(), "without a census nothing is destroyed");
                let schedule =
                    |keyring: &mut Keyring| keyring.schedule_destruction(version, now, MIN_DESTRUCTION_WAIT);
                self.below(by, cluster, schedule, None).await
            }
        };
        self.note(by, cluster, ended(&result))
    }

    /// Changes a keyring, and removes the KEK of a version that is a tombstone then.
    async fn below(
        &self,
        by: usize,
        cluster: ClusterId,
        change: impl Fn(&mut Keyring) -> Result<(), TransitionError> + Send + Sync,
        tombstone: Option<Version>,
    ) -> Result<(), ChangeError<KeyChangeError>> {
        let desk = &self.processes[by].desk;
        let prepare = || async {
            let record = desk.ledger.read::<KeyringRecord>(&rows::keyring(&cluster)).await?;
            let record = record.ok_or(KeyChangeError::UnknownCluster)?;
            let mut keyring = keyring::parse(&record)?;
            change(&mut keyring)?;
            let mut changeset = desk.ledger.changeset();
            changeset.update(&record, &keyring::payload(&keyring));
            if let Some(version) = tombstone {
                let row = desk.ledger.read_row(&rows::kek(&cluster, version)).await;
                let row = row.map_err(crate::ledger::LedgerError::from)?;
                changeset.delete_sealed(&row.expect("a version that is no tombstone has its KEK"));
            }
            Ok::<_, KeyChangeError>((changeset, ()))
        };
        desk.changes.run(Intent::new("key_end", "test"), prepare).await?;
        desk.keyrings.catch_up(&desk.ledger).await.expect("the store can be read");
        Ok(())
    }
}
