//! An agent without its ports: ledger, keyrings, changes and control plane
//! over a store that the test holds.

use std::cell::RefCell;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant, SystemTime};

use fleet_kms_audit::ChangeLog;
use fleet_kms_keyring::rotation::RotationPolicy;
use fleet_kms_keyring::{ClusterId, StoreId};
use fleet_kms_seal::StoreKey;
use fleet_kms_store::{RowName, Store};
use fleet_kms_transport::Clock;
use rand_chacha::ChaCha8Rng;
use rand_core::{CryptoRng, Rng as _, SeedableRng as _};

use crate::agent::find_out_if_confirmed;
use crate::authz::{FleetPermit, Permit, actions};
use crate::changes::{ChangeError, Changes};
use crate::clusters::Clusters;
use crate::control_plane::{ControlPlane, CreateError, NewCluster};
use crate::ledger::Ledger;
use crate::live_keyrings::{LiveKeyrings, StoreKeys};
use crate::records::payload::IssuedRecord;
use crate::records::{Codec, rows};
use crate::times::{from_ms, to_ms};
use crate::witness::Witness;

const STORE: StoreId = StoreId::from_bytes([5; 16]);
const EPOCH: u32 = 1;
pub(crate) const DAY: Duration = Duration::from_secs(86_400);

thread_local! {
    static RNG: RefCell<ChaCha8Rng> = RefCell::new(ChaCha8Rng::from_seed([0; 32]));
}

/// Makes everything that this thread draws from now on follow from `number`.
pub(crate) fn seed(number: u64) {
    let mut bytes = [0; 32];
    bytes[..8].copy_from_slice(&number.to_be_bytes());
    RNG.set(ChaCha8Rng::from_seed(bytes));
}

/// The generator of every agent of this thread.
pub(crate) fn generator() -> Box<dyn CryptoRng + Send> {
    let mut bytes = [0; 32];
    RNG.with_borrow_mut(|rng| rng.fill_bytes(&mut bytes));
    Box::new(ChaCha8Rng::from_seed(bytes))
}

/// The wall clock and the monotonic clock of a simulation.
#[derive(Clone)]
pub(crate) struct Clocks {
    wall_ms: Arc<AtomicU64>,
    start: Instant,
    passed_ms: Arc<AtomicU64>,
}

impl Clocks {
    pub(crate) fn new() -> Self {
        Self {
            wall_ms: Arc::new(AtomicU64::new(1_800_000_000_000)),
            start: fleet_kms_process::clock::monotonic(),
            passed_ms: Arc::default(),
        }
    }

    pub(crate) fn wall(&self) -> SystemTime {
        from_ms(self.wall_ms.load(Ordering::SeqCst))
    }

    pub(crate) fn monotonic(&self) -> Instant {
        self.start + Duration::from_millis(self.passed_ms.load(Ordering::SeqCst))
    }

    /// Time passes: both clocks go on.
    pub(crate) fn pass(&self, time: Duration) {
        let ms = u64::try_from(time.as_millis()).unwrap();
        self.wall_ms.fetch_add(ms, Ordering::SeqCst);
        self.passed_ms.fetch_add(ms, Ordering::SeqCst);
    }

    /// Somebody sets the wall clock.
    pub(crate) fn set_wall(&self, wall: SystemTime) {
        self.wall_ms.store(to_ms(wall), Ordering::SeqCst);
    }

    pub(crate) fn clock(&self) -> Clock {
        let clocks = self.clone();
        Arc::new(move || clocks.wall())
    }
}

/// An agent without its ports.
pub(crate) struct Desk {
    pub(crate) ledger: Arc<Ledger>,
    pub(crate) keyrings: Arc<LiveKeyrings>,
    pub(crate) changes: Arc<Changes>,
    pub(crate) control_plane: Arc<ControlPlane>,
}

fn store_key() -> StoreKey {
    StoreKey::danger_from_bytes(STORE, EPOCH, &mut [9; 32])
}

pub(crate) fn codec() -> Codec {
    Codec::new(STORE, EPOCH, store_key().mac_key())
}

/// Writes the first transaction of an empty store.
pub(crate) async fn initialise(store: &dyn Store) {
    initialise_with(store, Vec::new()).await;
}

/// As [`initialise`], with rows that are plain bytes.
pub(crate) async fn initialise_with(store: &dyn Store, mut rows: Vec<(RowName, Vec<u8>)>) {
    let issued = rows::fixed(rows::ISSUED);
    let bytes = codec().encode(&issued, 1, &IssuedRecord { last: 1 });
    rows.push((issued, bytes));
    Ledger::create(store, codec(), store_key().head_key(), rows, generator).await.unwrap();
}

impl Desk {
    /// Starts over a store, as `kms-agent run` does.
    pub(crate) async fn open(store: Arc<dyn Store>, audit: &Path, clocks: &Clocks) -> Self {
        let key = store_key();
        let ledger = Ledger::open(store, codec(), key.head_key(), "agent-1".to_owned(), generator);
        let ledger = Arc::new(ledger.await.unwrap());
        let (keyrings, damaged) = LiveKeyrings::load(&ledger, StoreKeys::new(key), generator).await.unwrap();
        assert_eq!(damaged, [], "every stored key opens");
        let (keyrings, clusters) = (Arc::new(keyrings), Arc::new(Clusters::load(&ledger).await.unwrap()));
        let log = ChangeLog::open(audit).unwrap();
        assert_eq!(log.opened().broken, None);
        let witness = Witness::new(audit);
        let unconfirmed = find_out_if_confirmed(&ledger, audit).await.unwrap();
        let clock = clocks.clock();
        let changes = Changes::new(Arc::clone(&ledger), log, witness, unconfirmed, clock, generator);
        let changes = Arc::new(changes);
        changes.close_open_intents().await.unwrap();
        let policy = RotationPolicy::default();
        let control_plane =
            ControlPlane::new(Arc::clone(&changes), Arc::clone(&keyrings), clusters, policy, generator);
        Self { ledger, keyrings, changes, control_plane: Arc::new(control_plane) }
    }

    pub(crate) async fn create(
        &self,
        name: &str,
        period: Option<Duration>,
    ) -> Result<ClusterId, ChangeError<CreateError>> {
        let permit = FleetPermit::<actions::ClusterCreate>::danger_for_test();
        let new = NewCluster { name, period, max_offline: None };
        self.control_plane.create_cluster(&permit, new, None).await.map(|created| created.id)
    }
}

/// A permit that nobody gave.
pub(crate) fn permit<A: crate::authz::Action>(cluster: ClusterId) -> Permit<A> {
    Permit::danger_for_test(cluster)
}

/// A new cluster, of the default period.
pub(crate) async fn create(desk: &Desk, number: usize) -> ClusterId {
    desk.create(&format!("edge-{number}"), None).await.unwrap()
}
