//! An old copy of the store in its place: served, changed by nobody, confirmed.

use std::sync::Arc;

use fleet_kms_keyring::{RESTORE_JUMP, Rotate};

use super::{Ended, World};
use crate::bans::Bans;
use crate::identities::LiveIdentities;
use crate::promises::model::truth;
use crate::recovery::Recovery;
use crate::witness::Witness;

/// DEKs that an unconfirmed agent is asked for.
const ASKED: usize = 12;

impl World {
    /// The last backup takes the store's place and is confirmed. If anything
    /// has changed since it was made, the agent notices that by itself.
    pub(in crate::promises) async fn restore(&mut self) {
        let Some(backup) = self.backup.take() else { return };
        let newest = self.witnessed();
        self.processes.clear();
        self.model.restored(&backup).await;
        self.store = Arc::new(backup.fork());
        let process = self.start(0).await;
        let seen = Witness::new(&self.audit(0)).read().unwrap().map_or(0, |seen| seen.count);
        let is_older = seen > process.desk.ledger.head_count().await;
        assert_eq!(process.desk.changes.unconfirmed().is_some(), is_older, "an old copy is noticed");
        self.processes.push(process);
        if is_older {
            self.rollbacks += 1;
            self.unconfirmed().await;
        }
        self.confirm(newest).await;
        let process = self.start(1).await;
        assert_eq!(process.desk.changes.unconfirmed(), None, "confirmed once is confirmed for all");
        self.processes.push(process);
        self.backup = Some(self.store.fork());
    }

    /// It serves what it has, and changes nothing.
    async fn unconfirmed(&mut self) {
        for cluster in self.model.clusters.clone() {
            let before = truth(&self.store, &cluster).await.unwrap();
            assert_eq!(self.rotate(0, cluster, Rotate::Regular).await, Ended::NotDone);
            assert_eq!(self.rotate(0, cluster, Rotate::Fresh).await, Ended::NotDone);
            let after = truth(&self.store, &cluster).await.unwrap();
            assert_eq!(before.revision, after.revision, "nothing is changed before it is confirmed");
            self.wrap(0, cluster, None, [0x77; 32]);
        }
        let asked = self.model.acknowledged.len().saturating_sub(ASKED);
        for acknowledged in &self.model.acknowledged[asked..] {
            self.unwrap(0, acknowledged).await;
        }
    }

    /// An operator says that the copy is all there is.
    async fn confirm(&mut self, newest: u64) {
        let mut before = Vec::new();
        for cluster in self.model.clusters.clone() {
            before.push((cluster, truth(&self.store, &cluster).await.unwrap().keyring));
        }
        let desk = &self.processes[0].desk;
        let identities = Arc::new(LiveIdentities::default());
        let recovery = Recovery {
            changes: &desk.changes,
            keyrings: &desk.keyrings,
            control_plane: &desk.control_plane,
            identities: &identities,
        };
        let recovered = recovery.run(&Bans::default(), newest).await.unwrap();
        assert!(recovered.count > newest, "the head is above all that was seen");
        assert_eq!(desk.changes.unconfirmed(), None);
        for (cluster, before) in before {
            let after = truth(&self.store, &cluster).await.unwrap().keyring;
            let lost = before.next().version.plus(RESTORE_JUMP).unwrap();
            assert!(after.active().version > lost, "no lost version can be the active one");
            self.acknowledged.insert(cluster);
        }
    }

    fn witnessed(&self) -> u64 {
        let seen = |number| Witness::new(&self.audit(number)).read().unwrap();
        (0..2).filter_map(seen).map(|seen| seen.count).max().unwrap_or_default()
    }
}
