//! The control plane: what an operator or the schedule changes about clusters
//! and their keys.
//!
//! Each operation takes its permit, decides on what the store says now,
//! commits, and only then publishes to the data path.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use fleet_kms_keyring::rotation::{InvalidPolicy, RotationPolicy, Step};
use fleet_kms_keyring::{ClusterId, KeyId, Keyring, Rotate, RotateError, TransitionError, Version};
use fleet_kms_store::Revision;

use crate::authz::{Action, FleetPermit, Permit, actions, internal};
use crate::backup::{BackupError, Backups};
use crate::changes::{ChangeError, Changes};
use crate::clusters::{ClusterName, Clusters, InvalidClusterName, LiveClusterName};
use crate::ledger::{Changeset, Generator, LedgerError};
use crate::live_keyrings::{KeysError, LiveKeyrings, MakesKeks, SealedKek, Snapshot};
use crate::records::keyring::{self, KeyringError};
use crate::records::payload::{ClusterRecord, KeyringRecord, NameRecord};
use crate::records::rows;
use crate::times::to_ms;
use crate::trail::Intent;

mod key_changes;

pub use key_changes::{ChangesVersion, DESTRUCTION_WAIT, DestructionGuard, VersionChange, Wish, guards};

/// Why a cluster was not made.
#[derive(Debug, thiserror::Error)]
pub enum CreateError {
    /// The name is not one.
    #[error(transparent)]
    Name(#[from] InvalidClusterName),
    /// The period is out of bounds.
    #[error(transparent)]
    Period(#[from] InvalidPolicy),
    /// A live cluster has the name.
    #[error("a cluster named {0} exists already")]
    Exists(ClusterName),
    /// It was made, but `backup.required` asks for a backup and there is none.
    #[error(
        "the cluster was made, but no verified backup holds its first key: do not use it before one does"
    )]
    NoBackup(#[source] Box<BackupError>),
    /// The keys cannot be used.
    #[error(transparent)]
    Keys(#[from] KeysError),
    /// The store cannot be read.
    #[error(transparent)]
    Ledger(#[from] LedgerError),
}

/// Why a keyring was not changed.
#[derive(Debug, thiserror::Error)]
pub enum KeyChangeError {
    /// The cluster is gone from the store.
    #[error("there is no such cluster")]
    UnknownCluster,
    /// The keyring does not allow it.
    #[error(transparent)]
    Rotate(#[from] RotateError),
    /// The version's state does not allow it.
    #[error(transparent)]
    Transition(#[from] TransitionError),
    /// A guard refuses the destruction.
    #[error("version {version} may not be destroyed: {why}")]
    Guarded { version: Version, why: String },
    /// The caller decided on an older state.
    #[error("the cluster is at revision {}, not {}", now.0, wished.0)]
    Revision { now: Revision, wished: Revision },
    /// The keyring record is damaged.
    #[error(transparent)]
    Keyring(#[from] KeyringError),
    /// The keys cannot be used.
    #[error(transparent)]
    Keys(#[from] KeysError),
    /// The store cannot be read.
    #[error(transparent)]
    Ledger(#[from] LedgerError),
    /// It was rotated, but `backup.required` asks for a backup and there is
    /// none.
    #[error("the cluster was rotated, but no verified backup holds its new key; make one now")]
    NoBackup(#[source] Box<BackupError>),
    /// What the schedule was to do, somebody else did first.
    #[error("the cluster is no longer due")]
    NotDue,
}

/// What a change of a keyring left behind.
#[derive(Debug, Clone, Copy)]
pub struct Rotated {
    /// The active version now.
    pub active: Version,
    /// Its key id.
    pub key_id: KeyId,
}

/// A cluster that was made.
#[derive(Debug, Clone)]
pub struct Created {
    /// Its id.
    pub id: ClusterId,
    /// Its name.
    pub name: ClusterName,
    /// When.
    pub created: SystemTime,
}

/// Changes clusters and keyrings.
pub struct ControlPlane {
    changes: Arc<Changes>,
    keyrings: Arc<LiveKeyrings>,
    clusters: Arc<Clusters>,
    default_policy: RotationPolicy,
    /// What a new cluster and a fresh rotation wait for, if so configured.
    backups: Option<Arc<Backups>>,
    generator: Generator,
}

impl ControlPlane {
    /// Makes the control plane over the store and its images in memory.
    pub fn new(
        changes: Arc<Changes>,
        keyrings: Arc<LiveKeyrings>,
        clusters: Arc<Clusters>,
        default_policy: RotationPolicy,
        generator: Generator,
    ) -> Self {
        Self { changes, keyrings, clusters, default_policy, backups: None, generator }
    }

    /// Returns this control plane with the backups that new keys may have to
    /// wait for.
    #[must_use]
    pub fn with_backups(self, backups: Arc<Backups>) -> Self {
        Self { backups: Some(backups), ..self }
    }

    /// Makes a cluster with its first key: version 1 active, version 2 next.
    ///
    /// # Errors
    ///
    /// When name or period are bad, the name is taken, or the store refuses.
    pub async fn create_cluster(
        &self,
        permit: &FleetPermit<actions::ClusterCreate>,
        name: &str,
        period: Option<Duration>,
        reason: Option<&str>,
    ) -> Result<Created, ChangeError<CreateError>> {
        let (name, policy) = self.parse_new(name, period).map_err(ChangeError::Refused)?;
        let id = ClusterId::generate(&mut *(self.generator)());
        let permit = permit.for_new_cluster(id);
        let intent = Intent::new("cluster_create", permit.who()).cluster(id, name.as_str()).reason(reason);
        let prepare = || self.prepare_cluster(&permit, &name, policy);
        let publish = |(snapshot, created), revision| {
            self.keyrings.publish(id, Snapshot { revision, ..snapshot });
            self.clusters.publish(LiveClusterName { id, name: name.clone(), created });
            created
        };
        let created = self.changes.run_applied(intent, prepare, publish).await?;
        let backed = self.backup().await;
        backed.map_err(|error| ChangeError::Refused(CreateError::NoBackup(Box::new(error))))?;
        Ok(Created { id, name, created })
    }

    /// Says whether a cluster could be made, and makes none.
    ///
    /// # Errors
    ///
    /// As [`Self::create_cluster`].
    pub async fn check_new_cluster(&self, name: &str, period: Option<Duration>) -> Result<(), CreateError> {
        let (name, _) = self.parse_new(name, period)?;
        let taken = self.changes.ledger().read::<NameRecord>(&rows::cluster_name(name.as_str())).await?;
        taken.map_or(Ok(()), |_| Err(CreateError::Exists(name)))
    }

    /// Rotates a cluster now.
    ///
    /// # Errors
    ///
    /// When the cluster is unknown or the store refuses.
    pub async fn rotate(
        &self,
        permit: &Permit<actions::KeyRotate>,
        how: Rotate,
        wish: Wish<'_>,
    ) -> Result<Rotated, ChangeError<KeyChangeError>> {
        let rotated = self.rotate_as("key_rotate", permit, how, wish, &|_, _| Ok(())).await?;
        if how != Rotate::Regular {
            let backed = self.backup().await;
            backed.map_err(|error| ChangeError::Refused(KeyChangeError::NoBackup(Box::new(error))))?;
        }
        Ok(rotated)
    }

    /// Rotates a cluster fresh, with a jump of its version numbers, because the
    /// store was, or turned out to be, an old copy.
    ///
    /// # Errors
    ///
    /// When the cluster is unknown or the store refuses.
    pub async fn rotate_recovered(
        &self,
        permit: &Permit<actions::Recovery>,
    ) -> Result<Rotated, ChangeError<KeyChangeError>> {
        self.rotate_as_recovery(permit, Rotate::AfterRestore).await
    }

    /// Rotates a cluster for the agent's own reasons: its store was an old copy,
    /// or a root key of it is known to others.
    ///
    /// # Errors
    ///
    /// When the cluster is unknown or the store refuses.
    pub async fn rotate_as_recovery(
        &self,
        permit: &Permit<actions::Recovery>,
        how: Rotate,
    ) -> Result<Rotated, ChangeError<KeyChangeError>> {
        self.rotate_as("key_rotate_recovered", permit, how, Wish::default(), &|_, _| Ok(())).await
    }

    /// Rotates a cluster whose active version `from` is due; does nothing if
    /// that is no longer so, because an operator or another agent came first.
    ///
    /// # Errors
    ///
    /// When it is no longer due or the store refuses.
    pub async fn rotate_due(
        &self,
        permit: &Permit<actions::ScheduledRotation>,
        from: Version,
    ) -> Result<Rotated, ChangeError<KeyChangeError>> {
        let cluster = permit.cluster();
        // The version too: a clock that jumps between decision and commit could make the next one look due.
        let still_due = move |keyring: &Keyring, now| {
            let due = keyring.active().version == from && keyring.next_step(&cluster, now) == Step::Rotate;
            due.then_some(()).ok_or(KeyChangeError::NotDue)
        };
        self.rotate_as("key_rotate_scheduled", permit, Rotate::Regular, Wish::default(), &still_due).await
    }

    /// Rewrites an activation time that lies in the future to now.
    ///
    /// # Errors
    ///
    /// When the activation is no longer in the future or the store refuses.
    pub async fn reanchor(
        &self,
        permit: &Permit<actions::ScheduledRotation>,
    ) -> Result<(), ChangeError<KeyChangeError>> {
        let intent = self.key_intent("clock_reanchor", permit);
        let prepare = || {
            self.prepare_keyring(permit.cluster(), Wish::default(), |keyring, now| {
                keyring.reanchor(now).then(Vec::new).ok_or(KeyChangeError::NotDue)
            })
        };
        self.changes.run_applied(intent, prepare, |snapshot, at| self.publish(permit, snapshot, at)).await
    }

    async fn rotate_as<A: MakesKeks>(
        &self,
        action: &'static str,
        permit: &Permit<A>,
        how: Rotate,
        wish: Wish<'_>,
        check: &(dyn Fn(&Keyring, SystemTime) -> Result<(), KeyChangeError> + Send + Sync),
    ) -> Result<Rotated, ChangeError<KeyChangeError>> {
        let intent = self.key_intent(action, permit).reason(wish.reason);
        let prepare = || {
            self.prepare_keyring(permit.cluster(), wish, |keyring, now| {
                check(keyring, now)?;
                let mut key_ids = |_| KeyId::generate(&mut *(self.generator)());
                let made = keyring.rotate(how, now, &mut key_ids)?;
                made.into_iter()
                    .map(|version| Ok((version, self.keyrings.make_kek(permit, version)?)))
                    .collect()
            })
        };
        let publish = |snapshot: Snapshot, revision| {
            let active = snapshot.keyring.active();
            let rotated = Rotated { active: active.version, key_id: active.key_id };
            self.publish(permit, snapshot, revision);
            rotated
        };
        self.changes.run_applied(intent, prepare, publish).await
    }

    /// Makes a keyring visible that is durable as of `revision`.
    fn publish<A: Action>(&self, permit: &Permit<A>, snapshot: Snapshot, revision: Revision) {
        self.keyrings.publish(permit.cluster(), Snapshot { revision, ..snapshot });
    }

    /// Waits for a verified backup if one is required.
    async fn backup(&self) -> Result<(), BackupError> {
        match &self.backups {
            Some(backups) => backups.wait_if_required().await,
            None => Ok(()),
        }
    }

    fn parse_new(
        &self,
        name: &str,
        period: Option<Duration>,
    ) -> Result<(ClusterName, RotationPolicy), CreateError> {
        let policy = period.map(RotationPolicy::try_new).transpose()?;
        Ok((name.parse()?, policy.unwrap_or(self.default_policy)))
    }

    async fn prepare_cluster(
        &self,
        permit: &Permit<actions::ClusterCreate>,
        name: &ClusterName,
        policy: RotationPolicy,
    ) -> Result<(Changeset, (Snapshot, SystemTime)), CreateError> {
        let ledger = self.changes.ledger();
        let name_row = rows::cluster_name(name.as_str());
        if ledger.read::<NameRecord>(&name_row).await?.is_some() {
            return Err(CreateError::Exists(name.clone()));
        }
        let (id, now) = (permit.cluster(), self.changes.now());
        let mut key_ids = |_| KeyId::generate(&mut *(self.generator)());
        let keyring = Keyring::create(policy, now, &mut key_ids);
        let cluster = ClusterRecord {
            id: id.as_bytes().to_vec(),
            name: name.to_string(),
            created_ms: to_ms(now),
            retired_ms: 0,
        };
        let mut changeset = ledger.changeset();
        changeset.insert(rows::cluster(&id), &cluster);
        changeset.insert(name_row, &NameRecord { cluster: id.as_bytes().to_vec() });
        changeset.insert(rows::keyring(&id), &keyring::payload(&keyring));
        let mut keks = std::collections::HashMap::new();
        for version in keyring.versions() {
            let kek = self.keyrings.make_kek(permit, version.version)?;
            changeset.insert_sealed(kek.row.clone(), kek.bytes.clone());
            keks.insert(version.version, kek);
        }
        Ok((changeset, (Snapshot { revision: Revision::ABSENT, keyring, keks }, now)))
    }

    /// Reads a cluster's keyring, changes it, and adds the new KEKs.
    async fn prepare_keyring(
        &self,
        cluster: ClusterId,
        wish: Wish<'_>,
        change: impl FnOnce(&mut Keyring, SystemTime) -> Result<Vec<(Version, SealedKek)>, KeyChangeError>,
    ) -> Result<(Changeset, Snapshot), KeyChangeError> {
        let ledger = self.changes.ledger();
        let record = ledger
            .read::<KeyringRecord>(&rows::keyring(&cluster))
            .await?
            .ok_or(KeyChangeError::UnknownCluster)?;
        wish.check(record.revision)?;
        let mut keyring = keyring::parse(&record)?;
        let made = change(&mut keyring, self.changes.now())?;
        let mut changeset = ledger.changeset();
        changeset.update(&record, &keyring::payload(&keyring));
        // Never just what is in memory: after a lost reply it has not seen the newest keys.
        let mut keks = self.keyrings.keks_of(&internal::load(cluster), ledger, &record, &keyring).await?;
        for (version, kek) in made {
            changeset.insert_sealed(kek.row.clone(), kek.bytes.clone());
            keks.insert(version, kek);
        }
        Ok((changeset, Snapshot { revision: record.revision, keyring, keks }))
    }

    fn key_intent<A: Action>(&self, action: &'static str, permit: &Permit<A>) -> Intent {
        let cluster = permit.cluster();
        let name = self.clusters.name_of(&cluster).map_or_else(String::new, |name| name.to_string());
        Intent::new(action, permit.who()).cluster(cluster, &name)
    }
}
