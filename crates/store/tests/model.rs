//! Random transactions against a model that is too simple to be wrong, for every backend.

#![allow(clippy::unwrap_used, clippy::indexing_slicing, clippy::panic, reason = "a test")]

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use fleet_kms_store::{CommitError, MemoryStore, Revision, RowName, SqliteStore, Store, Txn};
use proptest::prelude::*;

const NAMES: [&str; 6] = ["a", "a/", "a/1", "a/2", "a0", "b"];

#[derive(Clone, Debug)]
enum Step {
    Commit { conditions: Vec<(usize, Seen)>, puts: Vec<(usize, Option<Vec<u8>>)> },
    Restart,
}

/// What a caller believes about a row.
#[derive(Clone, Copy, Debug)]
enum Seen {
    Truth,
    Absent,
    Revision(u64),
}

#[derive(Default)]
struct Model {
    revision: u64,
    rows: BTreeMap<&'static str, (u64, Vec<u8>)>,
}

impl Model {
    fn revision_of(&self, name: &str) -> u64 {
        self.rows.get(name).map_or(0, |(revision, _)| *revision)
    }

    fn believed(&self, name: &str, seen: Seen) -> u64 {
        match seen {
            Seen::Truth => self.revision_of(name),
            Seen::Absent => 0,
            Seen::Revision(revision) => revision,
        }
    }

    /// Applies a step and returns the transaction and the outcome that a store owes.
    fn commit(&mut self, conditions: &[(usize, Seen)], puts: &[(usize, Option<Vec<u8>>)]) -> (Txn, bool) {
        let mut txn = Txn::new();
        let mut holds = true;
        for (index, seen) in conditions {
            let believed = self.believed(NAMES[*index], *seen);
            holds &= believed == self.revision_of(NAMES[*index]);
            txn = txn.expect(row_name(NAMES[*index]), Revision(believed));
        }
        let distinct: BTreeMap<_, _> = puts.iter().cloned().collect();
        self.revision += u64::from(holds);
        for (index, bytes) in distinct {
            let name = NAMES[index];
            txn = match &bytes {
                Some(bytes) => txn.put(row_name(name), bytes.clone()),
                None => txn.delete(row_name(name)),
            };
            match bytes.filter(|_| holds) {
                Some(bytes) => drop(self.rows.insert(name, (self.revision, bytes))),
                None if holds => drop(self.rows.remove(name)),
                None => {}
            }
        }
        (txn, holds)
    }
}

fn row_name(name: &str) -> RowName {
    RowName::try_from(name).unwrap()
}

fn step() -> impl Strategy<Value = Step> {
    let seen = prop_oneof![
        4 => Just(Seen::Truth),
        1 => Just(Seen::Absent),
        1 => (1..20_u64).prop_map(Seen::Revision),
    ];
    let bytes = proptest::option::weighted(0.7, proptest::collection::vec(any::<u8>(), 0..40));
    let commit = (
        proptest::collection::vec((0..NAMES.len(), seen), 0..3),
        proptest::collection::vec((0..NAMES.len(), bytes), 1..5),
    )
        .prop_map(|(conditions, puts)| Step::Commit { conditions, puts });
    prop_oneof![8 => commit, 1 => Just(Step::Restart)]
}

async fn compare(store: &dyn Store, model: &Model) -> Result<(), TestCaseError> {
    for prefix in ["", "a", "a/", "b", "c"] {
        let expected: Vec<_> = model.rows.iter().filter(|(name, _)| name.starts_with(prefix)).collect();
        let found = store.page_rows(prefix, None, 100).await.unwrap();
        let found: Vec<_> = found.iter().map(|row| (row.name.as_str(), row.revision.0, &row.bytes)).collect();
        let expected: Vec<_> = expected.iter().map(|(name, (revision, b))| (**name, *revision, b)).collect();
        prop_assert_eq!(found, expected);
    }
    for name in NAMES {
        let found = store.get(&row_name(name)).await.unwrap();
        prop_assert_eq!(found.map_or(0, |row| row.revision.0), model.revision_of(name));
    }
    Ok(())
}

/// Walks the steps; `restart` gives the store back as a new process would find it.
async fn walk(
    mut store: Arc<dyn Store>,
    restart: impl Fn(Arc<dyn Store>) -> Arc<dyn Store>,
    steps: &[Step],
    restart_always: bool,
) -> Result<(), TestCaseError> {
    let mut model = Model::default();
    for step in steps {
        match step {
            Step::Restart => store = restart(store),
            Step::Commit { conditions, puts } => {
                let (txn, holds) = model.commit(conditions, puts);
                match store.commit(txn).await {
                    Ok(revision) => prop_assert!(holds && revision.0 == model.revision),
                    Err(CommitError::Conflict) => prop_assert!(!holds),
                    Err(other) => return Err(TestCaseError::fail(format!("{other:?}"))),
                }
            }
        }
        if restart_always {
            store = restart(store);
        }
        compare(&*store, &model).await?;
    }
    Ok(())
}

fn reopen(path: &Path) -> impl Fn(Arc<dyn Store>) -> Arc<dyn Store> {
    move |store| {
        drop(store);
        Arc::new(SqliteStore::open(path).unwrap())
    }
}

fn block_on<T>(future: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_current_thread().build().unwrap().block_on(future)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 256, failure_persistence: None, ..ProptestConfig::default() })]
    #[test]
    fn the_memory_store_does_what_the_model_does(steps in proptest::collection::vec(step(), 1..60)) {
        block_on(walk(Arc::new(MemoryStore::new()), |store| store, &steps, false))?;
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, failure_persistence: None, ..ProptestConfig::default() })]
    #[test]
    fn the_sqlite_store_does_what_the_model_does(steps in proptest::collection::vec(step(), 1..60)) {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("store.db");
        let store = Arc::new(SqliteStore::create(&path).unwrap());
        block_on(walk(store, reopen(&path), &steps, false))?;
    }

    #[test]
    fn a_restart_after_any_step_changes_nothing(steps in proptest::collection::vec(step(), 1..12)) {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("store.db");
        let store = Arc::new(SqliteStore::create(&path).unwrap());
        block_on(walk(store, reopen(&path), &steps, true))?;
    }
}
