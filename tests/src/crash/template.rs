//! The store that every trial starts from: made once, copied for each.
//!
//! It is made by the agent's own library in this process, because there the clock is a parameter: a cluster whose
//! rotation is due was made 40 days ago.

use std::fs;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, SystemTime};

use anyhow::Context;
use fleet_kms_agent::agent::Agent;
use fleet_kms_agent::authz::actions;
use fleet_kms_agent::caller::Caller;
use fleet_kms_agent::config::{self, Config, RawConfig};
use fleet_kms_agent::control_plane::NewCluster;
use fleet_kms_agent::enrolment::issue::Join;
use fleet_kms_agent::enrolment::tokens::{self, TokenTerms};
use fleet_kms_agent::init;
use fleet_kms_identity::{Certificate, JoinToken, KeyPair, Standing};
use fleet_kms_keyring::{ClusterId, SlotId};
use fleet_kms_seal::FileSlot;
use fleet_kms_transport::{Clock, PeerInfo};
use prometheus_client::registry::Registry;
use tempfile::TempDir;

use super::evidence::StoreView;
use super::node::{Credentials, Wrapped};
use crate::fleet::{Ports, agent_config};

/// When a cluster was made whose rotation is due: longer ago than the period of 30 days.
const LONG_AGO: Duration = Duration::from_secs(40 * 86_400);
/// DEKs that were wrapped before anything happens.
const OLD_DEKS: u8 = 16;
/// The cluster's name.
const CLUSTER: &str = "trial";
/// Each has five rows, and one transaction re-seals 50.
const MORE_CLUSTERS: usize = 12;
/// The file that backups of trials are written to.
pub const SAVED: &str = "saved.db";

/// What a template has beyond one cluster, one node and a token.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scene {
    /// Nothing; the cluster's rotation is far away.
    Plain,
    /// The cluster's rotation is due.
    Due,
    /// A backup, made before the store was last changed.
    WithBackup,
    /// A second root slot, and more rows than one transaction re-seals.
    WithSecondSlot,
}

/// A root slot of which trials have the root key.
pub struct SecondSlot {
    /// Its id.
    pub id: SlotId,
    /// The root key's file.
    pub file: PathBuf,
}

/// A prepared store, with what is known about it.
pub struct Template {
    directory: TempDir,
    /// The second root slot, if there is one.
    pub second: Option<SecondSlot>,
    /// The backup in [`SAVED`], if there is one.
    pub saved: Option<Vec<u8>>,
    /// The cluster.
    pub cluster: ClusterId,
    /// A node of it.
    pub node: Credentials,
    /// A token for one more node.
    pub token: JoinToken,
    /// The key that the token's node will have, PEM.
    pub new_key: String,
    /// DEKs that nodes hold already.
    pub wrapped: Vec<Wrapped>,
    /// What the store holds.
    pub before: StoreView,
}

/// Makes random generators, as the agent's main does.
pub fn generator() -> Box<dyn rand_core::CryptoRng + Send> {
    Box::new(rand_core::UnwrapErr(getrandom::SysRng))
}

/// Where trials write: in memory if there is such a place, since the shim is their disk.
pub fn temporary() -> anyhow::Result<TempDir> {
    let memory = Path::new("/dev/shm");
    let mut builder = tempfile::Builder::new();
    let builder = builder.prefix("fleet-kms-crash-");
    Ok(if memory.is_dir() { builder.tempdir_in(memory)? } else { builder.tempdir()? })
}

/// A clock that is behind by what it is told.
#[derive(Clone, Default)]
struct Behind(Arc<AtomicU64>);

impl Behind {
    fn set(&self, by: Duration) {
        self.0.store(by.as_secs(), Ordering::SeqCst);
    }

    fn now(&self) -> SystemTime {
        fleet_kms_process::clock::now() - Duration::from_secs(self.0.load(Ordering::SeqCst))
    }

    fn clock(&self) -> Clock {
        let own = self.clone();
        Arc::new(move || own.now())
    }
}

impl Template {
    /// Makes a store with one cluster, one node, a token for another and some wrapped DEKs.
    ///
    /// # Errors
    /// When the agent's library refuses.
    pub async fn new(scene: Scene) -> anyhow::Result<Self> {
        let directory = temporary()?;
        let file = lay_out(directory.path(), None)?;
        let config = load(&file)?;
        let behind = Behind::default();
        if scene == Scene::Due {
            behind.set(LONG_AGO);
        }
        let admin_directory = directory.path().join("admin");
        let admin = "first".parse().context("an admin's name")?;
        let options = init::Options { admin, admin_directory: admin_directory.clone(), single_slot: true };
        init::run(&config, &options, behind.clock(), generator).await?;
        let agent = open(&config, behind.clock()).await?;

        let admin =
            peer(&fleet_kms_identity::split_pem_chain(&fs::read(admin_directory.join("first.crt"))?)?)?;
        let permit = agent.policy.permit_fleet::<actions::ClusterCreate>(&admin)?;
        let new = NewCluster { name: CLUSTER, period: None, max_offline: None };
        let cluster = agent.control_plane.create_cluster(&permit, new, None).await?.id;
        let saved = match scene {
            Scene::WithBackup => Some(save(&agent, directory.path()).await?),
            _ => None,
        };
        let mut second = None;
        if scene == Scene::WithSecondSlot {
            for number in 0..MORE_CLUSTERS {
                let name = format!("{CLUSTER}-{number}");
                let more = NewCluster { name: &name, period: None, max_offline: None };
                agent.control_plane.create_cluster(&permit, more, None).await?;
            }
            let file = directory.path().join("second.key");
            let slot = FileSlot::create(&file, &mut *generator())?;
            second = Some(SecondSlot { id: agent.slots.add(&slot, &file.to_string_lossy()).await?, file });
        }
        behind.set(Duration::ZERO);
        let node_token = token(&agent, cluster, "node-1").await?;
        let token = token(&agent, cluster, "node-2").await?;
        let node = enrol(&agent, &node_token).await?;
        let wrapped = wrap(&agent, &node)?;
        drop(agent);
        let before = StoreView::read(&config.store, &config.root).await?;
        let new_key = KeyPair::generate()?.to_pem().to_string();
        Ok(Self { directory, second, saved, cluster, node, token, new_key, wrapped, before })
    }

    /// Copies the store to a new directory and writes a configuration for it.
    ///
    /// # Errors
    /// When a file cannot be copied.
    pub fn copy_to(&self, to: &Path, ports: Ports) -> anyhow::Result<PathBuf> {
        fs::create_dir_all(to.join("audit"))?;
        let from = self.directory.path();
        for file in ["store.db", "root.key", SAVED] {
            if file != SAVED || self.saved.is_some() {
                fs::copy(from.join(file), to.join(file)).with_context(|| file.to_owned())?;
            }
        }
        for entry in fs::read_dir(from.join("audit"))? {
            let entry = entry?;
            fs::copy(entry.path(), to.join("audit").join(entry.file_name()))?;
        }
        lay_out(to, Some(ports))
    }
}

/// Reads a configuration file as the program does.
///
/// # Errors
/// When it is bad.
pub fn load(file: &Path) -> anyhow::Result<Config> {
    Ok(fleet_kms_process::config::load_as::<RawConfig, Config>(file, config::PREFIX)?)
}

/// Opens an agent without serving.
async fn open(config: &Config, clock: Clock) -> anyhow::Result<Agent> {
    let monotonic = fleet_kms_process::clock::monotonic;
    Ok(Agent::open(config, &mut Registry::default(), clock, monotonic, generator).await?)
}

fn lay_out(directory: &Path, ports: Option<Ports>) -> anyhow::Result<PathBuf> {
    let ports = ports.unwrap_or(Ports { data: 1, enrolment: 2, admin: 3, ops: 4 });
    let file = directory.join("agent.toml");
    fs::write(&file, agent_config(directory, ports, ""))?;
    Ok(file)
}

/// Makes a backup in [`SAVED`] of which the store does not know.
async fn save(agent: &Agent, directory: &Path) -> anyhow::Result<Vec<u8>> {
    let (_, verified) = agent.backups.hand_over().await?;
    let saved = directory.join(SAVED);
    fs::rename(verified.file, &saved)?;
    Ok(fs::read(saved)?)
}

/// A caller with this certificate, as a connection would make it.
fn peer(chain: &[impl AsRef<[u8]>]) -> anyhow::Result<Caller> {
    let leaf = chain.first().context("a chain has a leaf")?;
    let certificate = Some(Certificate::from_der(leaf.as_ref())?);
    let address = SocketAddr::from((Ipv4Addr::LOCALHOST, 1));
    Ok(Caller::from_peer(&Arc::new(PeerInfo { certificate, standing: Standing::Valid, address }))?)
}

async fn token(agent: &Agent, cluster: ClusterId, node: &str) -> anyhow::Result<JoinToken> {
    let life = Duration::from_secs(86_400);
    let terms = TokenTerms::new(cluster, Some(node), None, None, 1, life)?;
    let authorities = agent.issuer.authorities();
    Ok(tokens::create(&agent.changes, &authorities, &terms, ("test", None), &mut *generator()).await?.token)
}

async fn enrol(agent: &Agent, token: &JoinToken) -> anyhow::Result<Credentials> {
    let key = KeyPair::generate()?;
    let secret = super::node::secret_of(token)?;
    let join = Join::parse(&secret, &key.csr_der()?, String::new(), Ipv4Addr::LOCALHOST.into())?;
    let certified = agent.issuer.enrol(&join).await?;
    let roots = agent.bulletin.roots();
    Ok(Credentials { chain: certified.chain, roots, key: key.to_pem().to_string() })
}

fn wrap(agent: &Agent, node: &Credentials) -> anyhow::Result<Vec<Wrapped>> {
    let permit = agent.policy.permit::<actions::Wrap>(&peer(&node.chain)?)?;
    (0..OLD_DEKS)
        .map(|number| {
            let dek = vec![number; 32];
            let wrapped = agent.keyrings.wrap(&permit, None, &dek, fleet_kms_process::clock::now())?;
            let (version, key_id) = (wrapped.header.version.get(), wrapped.header.key_id);
            Ok(Wrapped { dek, bytes: wrapped.bytes, version, key_id: key_id.as_bytes().to_vec() })
        })
        .collect()
}
