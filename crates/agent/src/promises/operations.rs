//! The world of the random operations: two agents on one store that loses
//! replies, and what can be done to them. Old copies of the store, and the end
//! of versions, have files of their own.

use std::collections::{BTreeSet, HashMap};
use std::future::Future;
use std::path::PathBuf;
use std::pin::pin;
use std::sync::Arc;
use std::task::Poll;
use std::time::{Duration, Instant};

use fleet_kms_keyring::{ClusterId, KeyId, Rotate, State, Version};
use fleet_kms_store::contract::{Fault, Flaky};
use fleet_kms_store::{MemoryStore, Store};
use tempfile::TempDir;

use super::model::{Acknowledged, Model, truth, was_due};
use super::rig::{Clocks, Desk, initialise, permit};
use crate::authz::{actions, internal};
use crate::changes::ChangeError;
use crate::control_plane::{KeyChangeError, Wish};
use crate::ledger::{Integrity, WriteError};
use crate::live_keyrings::{UnwrapError, WrapError};
use crate::rotation::{Due, Seen, carry_out};
use crate::wraps;

mod destruction;
mod rollback;

/// One agent process.
pub(super) struct Process {
    pub(super) desk: Desk,
    pub(super) flaky: Arc<Flaky>,
    seen: Seen,
    /// A caller of this process was told that nobody knows, or went away.
    unclear: bool,
    /// The model's own memory of what this process saw.
    changes_seen: HashMap<ClusterId, (Version, Option<Instant>)>,
}

/// Two agents, a store, clocks and the model.
pub(super) struct World {
    directory: TempDir,
    pub(super) clocks: Clocks,
    pub(super) store: Arc<MemoryStore>,
    pub(super) processes: Vec<Process>,
    pub(super) model: Model,
    pub(super) backup: Option<MemoryStore>,
    pub(super) rotations: u64,
    /// Old copies that were noticed and confirmed.
    pub(super) rollbacks: u64,
    /// Versions that became tombstones.
    pub(super) destroyed: u64,
    /// Clusters whose change was acknowledged in this step.
    acknowledged: BTreeSet<ClusterId>,
    names: u32,
}

/// How an operation on a keyring ended, as its caller sees it.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Ended {
    Done,
    NotDone,
    Unknown,
}

impl World {
    pub(super) async fn new() -> Self {
        let store = Arc::new(MemoryStore::new());
        initialise(&*store).await;
        // Nothing here is about the disk, and a real one would take its time for each sync.
        let directory = tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir()).unwrap();
        let mut world = Self {
            directory,
            clocks: Clocks::new(),
            store,
            processes: Vec::new(),
            model: Model::default(),
            backup: None,
            rotations: 0,
            rollbacks: 0,
            destroyed: 0,
            acknowledged: BTreeSet::new(),
            names: 0,
        };
        for number in 0..2 {
            let process = world.start(number).await;
            world.processes.push(process);
        }
        world
    }

    fn audit(&self, number: usize) -> PathBuf {
        self.directory.path().join(format!("audit-{number}"))
    }

    async fn start(&self, number: usize) -> Process {
        let flaky = Arc::new(Flaky::new(Arc::clone(&self.store) as Arc<dyn Store>));
        let desk = Desk::open(Arc::clone(&flaky) as Arc<dyn Store>, &self.audit(number), &self.clocks).await;
        Process { desk, flaky, seen: Seen::default(), unclear: false, changes_seen: HashMap::new() }
    }

    /// A process dies and starts again.
    pub(super) async fn crash(&mut self, number: usize) {
        drop(self.processes.remove(number));
        let process = self.start(number).await;
        assert_eq!(process.desk.changes.close_open_intents().await.unwrap(), 0, "the start closed them");
        self.processes.insert(number, process);
    }

    pub(super) async fn create(&mut self, by: usize) {
        self.names += 1;
        let desk = &self.processes[by].desk;
        match desk.create(&format!("edge-{}", self.names), None).await {
            Ok(id) => {
                self.model.clusters.push(id);
                self.acknowledged.insert(id);
            }
            // Without its id the model cannot follow the cluster; nobody can use it either.
            Err(ChangeError::Write(_) | ChangeError::Refused(_)) => {}
            Err(error) => panic!("{error}"),
        }
    }

    pub(super) async fn rotate(&mut self, by: usize, cluster: ClusterId, how: Rotate) -> Ended {
        let desk = &self.processes[by].desk;
        let result = desk.control_plane.rotate(&permit(cluster), how, Wish::default()).await;
        if let Ok(rotated) = &result {
            let truth = truth(&self.store, &cluster).await.unwrap();
            assert_eq!(
                truth.keyring.active().version,
                rotated.active,
                "a rotation is durable when it is told"
            );
            let live = self.processes[by].desk.keyrings.keyring(&cluster).unwrap();
            assert_eq!(live.keyring.active().version, rotated.active);
        }
        self.note(by, cluster, ended(&result))
    }

    /// Starts a rotation and goes away before it is done.
    pub(super) async fn rotate_and_leave(&mut self, by: usize, cluster: ClusterId, polls: u64) {
        self.processes[by].unclear = true;
        let desk = &self.processes[by].desk;
        let permit = permit(cluster);
        let rotation = desk.control_plane.rotate(&permit, Rotate::Regular, Wish::default());
        let mut rotation = pin!(rotation);
        let mut left = polls;
        std::future::poll_fn(|context| {
            if left == 0 || rotation.as_mut().poll(context).is_ready() {
                return Poll::Ready(());
            }
            left -= 1;
            Poll::Pending
        })
        .await;
    }

    /// Disables a version that only unwraps, or enables it again.
    pub(super) async fn toggle(&mut self, by: usize, cluster: ClusterId, version: Version) -> Ended {
        let control_plane = &self.processes[by].desk.control_plane;
        let state = truth(&self.store, &cluster).await.unwrap().keyring.by_version(version).unwrap().state;
        let result = if state == State::Disabled {
            let permit = permit::<actions::KeyEnable>(cluster);
            control_plane.change_version(&permit, version, Wish::default()).await
        } else {
            let permit = permit::<actions::KeyDisable>(cluster);
            control_plane.change_version(&permit, version, Wish::default()).await
        };
        self.note(by, cluster, ended(&result))
    }

    fn note(&mut self, by: usize, cluster: ClusterId, ended: Ended) -> Ended {
        match ended {
            Ended::Done => drop(self.acknowledged.insert(cluster)),
            Ended::NotDone => {}
            Ended::Unknown => self.processes[by].unclear = true,
        }
        ended
    }

    /// Looks at the store. What changed was acknowledged in this step, unless
    /// somebody was told that it is unknown whether it did.
    pub(super) async fn observe(&mut self) {
        let changed = self.model.observe(&self.store).await;
        let unclear = self.processes.iter().any(|process| process.unclear);
        let unexplained = changed.difference(&self.acknowledged).next();
        assert!(unclear || unexplained.is_none(), "what was called not applied is never applied");
        self.acknowledged.clear();
    }

    /// One agent's schedule looks once.
    pub(super) async fn look(&mut self, by: usize) {
        let (now, monotonic) = (self.clocks.wall(), self.clocks.monotonic());
        let process = &mut self.processes[by];
        let keyrings = process.desk.keyrings.keyrings();
        for (cluster, snapshot) in &keyrings {
            let active = snapshot.keyring.active().version;
            let known = process.changes_seen.entry(*cluster).or_insert((active, None));
            if known.0 != active {
                *known = (active, Some(monotonic));
            }
        }
        for (cluster, due) in process.seen.plan(&keyrings, now, monotonic).work {
            let before = truth(&self.store, &cluster).await.unwrap().keyring;
            let done = carry_out(&process.desk.control_plane, cluster, due).await;
            process.seen.note_outcome(&cluster, done);
            process.unclear |= !done;
            if done {
                self.acknowledged.insert(cluster);
            }
            let after = truth(&self.store, &cluster).await.unwrap().keyring;
            let Due::Rotate { from } = due else { continue };
            if after.active().version == before.active().version {
                continue;
            }
            self.rotations += 1;
            assert_eq!(before.active().version, from, "what somebody else rotated is left alone");
            assert!(was_due(&before, now), "nothing is rotated before its time");
            assert_eq!(Some(after.active().version), from.next(), "one rotation, however many periods");
            if let Some(seen) = process.changes_seen[&cluster].1 {
                let since = monotonic.saturating_duration_since(seen);
                assert!(since >= before.policy().period() / 2, "a flapping clock is bounded");
            }
        }
        assert!(process.seen.len() <= keyrings.len(), "memory is bounded by the clusters");
    }

    pub(super) fn wrap(&mut self, by: usize, cluster: ClusterId, named: Option<&KeyId>, dek: [u8; 32]) {
        let now = self.clocks.wall();
        match self.processes[by].desk.keyrings.wrap(&permit(cluster), named, &dek, now) {
            Ok(wrapped) => self.model.acknowledged.push(Acknowledged {
                cluster,
                header: wrapped.header,
                dek,
                wrapped: wrapped.bytes,
            }),
            Err(WrapError::Version(_)) if named.is_some() => {}
            // Another agent made the cluster, and this one has not caught up.
            Err(WrapError::Keys(_)) if self.processes[by].desk.keyrings.keyring(&cluster).is_none() => {}
            Err(error) => panic!("{error}"),
        }
    }

    /// Unwraps as the data plane does and compares with what was wrapped.
    pub(super) async fn unwrap(&self, by: usize, acknowledged: &Acknowledged) {
        let Acknowledged { cluster, header, dek, wrapped } = acknowledged;
        let desk = &self.processes[by].desk;
        let permit = permit(*cluster);
        let mut result = desk.keyrings.unwrap(&permit, wrapped);
        if matches!(result, Err(UnwrapError::UnknownKey | UnwrapError::Keys(_))) {
            self.clocks.pass(Duration::from_secs(2));
            let load = internal::load(*cluster);
            desk.keyrings.refresh(&load, &desk.ledger, self.clocks.monotonic()).await.unwrap();
            result = desk.keyrings.unwrap(&permit, wrapped);
        }
        let truth = truth(&self.store, cluster).await.unwrap();
        let state = self.model.state_of(&truth, header);
        let behind = desk.keyrings.keyring(cluster).is_none_or(|live| live.revision < truth.revision);
        let is_disabled = matches!(state, State::Disabled | State::DestroyScheduled { .. });
        match result {
            Ok(unwrapped) => {
                assert_eq!(*unwrapped.dek, dek, "the same DEK comes back");
                assert!(behind || !is_disabled, "a disabled version unwraps nothing");
                assert!(behind || state != State::Destroyed, "nor does a tombstone");
                let alarm = unwrapped.under_next;
                assert!(behind || alarm == (state == State::Next), "the alarm tells of an old copy");
            }
            Err(UnwrapError::Disabled) => assert!(behind || is_disabled, "{state}"),
            Err(UnwrapError::Destroyed) => assert!(state == State::Destroyed, "{state}"),
            Err(error) => panic!("an acknowledged DEK of version {} is gone: {error}", header.version),
        }
    }

    /// Unwraps for the wrong cluster, and what a restored backup cannot know.
    pub(super) fn unwrap_what_must_not(&self, by: usize, acknowledged: &Acknowledged, other: ClusterId) {
        let keyrings = &self.processes[by].desk.keyrings;
        let cluster = if self.model.lost.iter().any(|lost| lost.wrapped == acknowledged.wrapped) {
            acknowledged.cluster
        } else if other == acknowledged.cluster {
            return;
        } else {
            other
        };
        let result = keyrings.unwrap(&permit(cluster), &acknowledged.wrapped);
        assert!(
            matches!(result, Err(UnwrapError::UnknownKey | UnwrapError::Foreign | UnwrapError::Keys(_))),
            "nobody unwraps another cluster's DEK"
        );
    }

    pub(super) fn inject(&self, by: usize, fault: Fault, reads: usize) {
        self.processes[by].flaky.inject(fault);
        self.processes[by].flaky.fail_reads(reads);
    }

    /// What must hold at the end, however it came to it.
    pub(super) async fn settle(&mut self) {
        for number in 0..2 {
            self.crash(number).await;
        }
        self.observe().await;
        assert!(matches!(self.processes[0].desk.ledger.check().await.unwrap(), Integrity::Intact { .. }));
        for acknowledged in &self.model.acknowledged {
            self.unwrap(0, acknowledged).await;
            self.unwrap(1, acknowledged).await;
        }
        // The schedule is armed: a period later every cluster has been rotated.
        self.clocks.pass(Duration::from_secs(31 * 86_400));
        self.look(0).await;
        for cluster in &self.model.clusters {
            let keyring = truth(&self.store, cluster).await.unwrap().keyring;
            assert!(!was_due(&keyring, self.clocks.wall()), "the schedule has rotated what was due");
        }
        wraps::flush(&self.processes[0].desk.keyrings, &self.processes[0].desk.changes).await.unwrap();
    }
}

fn ended<T>(result: &Result<T, ChangeError<KeyChangeError>>) -> Ended {
    match result {
        Ok(_) => Ended::Done,
        Err(ChangeError::Write(WriteError::Unknown(_))) => Ended::Unknown,
        Err(ChangeError::Contended) => panic!("nobody else changes anything"),
        Err(_) => Ended::NotDone,
    }
}
