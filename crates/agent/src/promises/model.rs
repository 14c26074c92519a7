//! The reference model: it remembers every DEK that was ever acknowledged and
//! every state that the store was ever seen in, and says what may come next.

use std::collections::{BTreeMap, BTreeSet};
use std::time::SystemTime;

use fleet_kms_keyring::wrapped_dek::Header;
use fleet_kms_keyring::{ClusterId, KeyId, Keyring, State, Version};
use fleet_kms_store::{MemoryStore, Revision, Row, Store as _};

use super::rig;
use crate::records::{keyring, rows};

/// A DEK whose wrap was acknowledged.
#[derive(Clone)]
pub(super) struct Acknowledged {
    pub(super) cluster: ClusterId,
    pub(super) header: Header,
    pub(super) dek: [u8; 32],
    pub(super) wrapped: Vec<u8>,
}

/// What the store holds of one cluster.
#[derive(Clone)]
pub(super) struct Truth {
    pub(super) revision: Revision,
    pub(super) keyring: Keyring,
}

/// Everything that was promised so far.
#[derive(Default)]
pub(super) struct Model {
    pub(super) acknowledged: Vec<Acknowledged>,
    /// Wrapped under versions that a restored backup does not have.
    pub(super) lost: Vec<Acknowledged>,
    pub(super) clusters: Vec<ClusterId>,
    /// Every version that any store ever had, restored ones included.
    ids: BTreeMap<(ClusterId, Version), KeyId>,
    all_ids: BTreeSet<KeyId>,
    kek_rows: BTreeMap<String, Vec<u8>>,
    known: BTreeMap<ClusterId, Truth>,
}

/// Reads what the store holds, past every agent.
pub(super) async fn truth(store: &MemoryStore, cluster: &ClusterId) -> Option<Truth> {
    let row = store.get(&rows::keyring(cluster)).await.unwrap()?;
    let record = rig::codec().decode(row).unwrap();
    let keyring = keyring::parse(&record).expect("one Active, one Next, versions ascend");
    Some(Truth { revision: record.revision, keyring })
}

impl Model {
    /// Looks at every cluster and checks that each went only where it may.
    /// Returns those that changed since the last time.
    pub(super) async fn observe(&mut self, store: &MemoryStore) -> BTreeSet<ClusterId> {
        let mut changed = BTreeSet::new();
        for cluster in self.clusters.clone() {
            let now = truth(store, &cluster).await.expect("no cluster disappears");
            if let Some(before) = self.known.get(&cluster)
                && before.revision == now.revision
            {
                continue;
            }
            self.check_evolution(&cluster, &now.keyring);
            let keks = store.page_rows(&rows::keks(&cluster), None, 1_000).await.unwrap();
            self.check_keks(&cluster, &now.keyring, keks);
            self.known.insert(cluster, now);
            changed.insert(cluster);
        }
        changed
    }

    fn check_evolution(&mut self, cluster: &ClusterId, now: &Keyring) {
        for version in now.versions() {
            match self.ids.insert((*cluster, version.version), version.key_id) {
                Some(known) => assert_eq!(known, version.key_id, "a version keeps its key id"),
                None => assert!(self.all_ids.insert(version.key_id), "no key id is given twice"),
            }
        }
        let Some(before) = self.known.get(cluster) else { return };
        for old in before.keyring.versions() {
            let new = now.by_version(old.version).expect("no version is lost");
            assert!(may_follow(old.state, new.state), "{} → {}", old.state, new.state);
        }
        let (was, is) = (before.keyring.active().version, now.active().version);
        assert!(was <= is, "the active version never goes back");
    }

    fn check_keks(&mut self, cluster: &ClusterId, now: &Keyring, keks: Vec<Row>) {
        let names: BTreeSet<String> = keks.iter().map(|row| row.name.as_str().to_owned()).collect();
        for version in now.versions() {
            let has_kek = names.contains(rows::kek(cluster, version.version).as_str());
            assert_eq!(
                has_kek,
                version.state != State::Destroyed,
                "every version but a tombstone has its KEK"
            );
        }
        for row in keks {
            let known = self.kek_rows.entry(row.name.as_str().to_owned()).or_insert(row.bytes.clone());
            assert_eq!(*known, row.bytes, "a KEK row is written once");
        }
    }

    /// The store was put back to a backup and is about to be rotated fresh.
    pub(super) async fn restored(&mut self, backup: &MemoryStore) {
        let mut kept = BTreeMap::new();
        for cluster in &self.clusters {
            if let Some(truth) = truth(backup, cluster).await {
                kept.insert(*cluster, truth.keyring);
            }
        }
        self.clusters.retain(|cluster| kept.contains_key(cluster));
        self.known.clear();
        let kept_row = |row: &str| kept.keys().any(|cluster| row.starts_with(&rows::keks(cluster)));
        self.kek_rows.retain(|row, _| kept_row(row));
        for acknowledged in std::mem::take(&mut self.acknowledged) {
            let keyring = kept.get(&acknowledged.cluster);
            let found = keyring.and_then(|keyring| keyring.by_key_id(&acknowledged.header.key_id));
            if found.is_some() {
                self.acknowledged.push(acknowledged);
                continue;
            }
            // A backup at most one scheduled rotation old reads everything: what it cannot read
            // was wrapped under a version after its Next.
            let next = keyring.map(|keyring| keyring.next().version);
            assert!(next.is_none_or(|next| acknowledged.header.version > next), "lost too early");
            self.lost.push(acknowledged);
        }
    }

    pub(super) fn state_of(&self, truth: &Truth, header: &Header) -> State {
        let version = truth.keyring.by_version(header.version).expect("an acknowledged version exists");
        assert_eq!(version.key_id, header.key_id);
        version.state
    }
}

/// Says whether one state can follow another, in any number of allowed moves.
fn may_follow(old: State, new: State) -> bool {
    use State::{Active, DecryptOnly, DestroyScheduled, Destroyed, Disabled, Next};
    match (old, new) {
        (Next, Next) | (Next | Active, Active) | (Destroyed, Destroyed) => true,
        (Destroyed, _) | (_, Next | Active) => false,
        (_, DecryptOnly | Disabled | DestroyScheduled { .. } | Destroyed) => true,
    }
}

/// Says whether a rotation on schedule was due at `now`.
pub(super) fn was_due(before: &Keyring, now: SystemTime) -> bool {
    let (period, activated) = (before.policy().period(), before.active().activated.unwrap());
    now.duration_since(activated).is_ok_and(|age| age >= period - period / 20)
}
