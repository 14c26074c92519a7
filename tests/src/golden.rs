//! Golden databases: stores of this and of earlier releases, kept in `tests/test-data` with their root key and with
//! what was wrapped under their versions. They never change; every later release opens them
//! (docs/store-format.md).
//!
//! The keys in them protect nothing.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, anyhow, ensure};
use data_encoding::BASE64;
use fleet_kms_agent::records::{keyring, rows};
use fleet_kms_agent::root::Root;
use fleet_kms_agent::storage;
use fleet_kms_keyring::{MIN_DESTRUCTION_WAIT, Version};
use fleet_kms_process::clock;
use serde_json::{Value, json};

use crate::child;
use crate::fleet::{Cluster, Fleet, Sidecar};
use crate::kms_client::{Api, KmsClient};
use crate::peers::ClientVersion;

/// Opens the second root slot of every golden database.
pub const PASSPHRASE: &str = "golden passphrase of the tests";
/// What was wrapped, and in which state its version was left.
const RECORDED: &str = "recorded.json";

/// One wrapped DEK of a golden database.
#[derive(Clone, Debug)]
pub struct Recorded {
    /// The cluster's name.
    pub cluster: String,
    /// The version in the wrapped DEK's header.
    pub version: u64,
    /// The state of that version, as `kmsctl key versions` says it.
    pub state: String,
    /// What `kms-client encrypt` printed.
    pub answer: String,
}

/// A golden database in the tree.
#[derive(Clone, Debug)]
pub struct Golden {
    directory: PathBuf,
    /// The clusters.
    pub clusters: Vec<Cluster>,
    /// The wrapped DEKs.
    pub wrapped: Vec<Recorded>,
}

impl Golden {
    /// Reads what is recorded beside the database of a format.
    ///
    /// # Errors
    /// When a file is missing or is not what this wrote.
    pub fn of_format(format: u8) -> anyhow::Result<Self> {
        let directory =
            Path::new(env!("CARGO_MANIFEST_DIR")).join("test-data").join(format!("store-format-{format}"));
        let recorded: Value = serde_json::from_slice(&fs::read(directory.join(RECORDED))?)?;
        let list = |name: &str| recorded.get(name).and_then(Value::as_array).cloned().context("a list");
        let clusters = list("clusters")?;
        let clusters = clusters.iter().map(|it| Ok(Cluster { name: text(it, "name")?, id: text(it, "id")? }));
        let wrapped = list("wrapped")?;
        let wrapped = wrapped.iter().map(|it| {
            Ok(Recorded {
                cluster: text(it, "cluster")?,
                version: it.get("version").and_then(Value::as_u64).context("a version")?,
                state: text(it, "state")?,
                answer: it.get("answer").context("an answer")?.to_string(),
            })
        });
        let clusters = clusters.collect::<anyhow::Result<_>>()?;
        let wrapped = wrapped.collect::<anyhow::Result<_>>()?;
        Ok(Self { directory, clusters, wrapped })
    }

    /// Puts a copy of the database and its root key in the place of an agent's, which must not run.
    ///
    /// # Errors
    /// When a file cannot be copied.
    pub fn put_in_place(&self, agent_directory: &Path) -> anyhow::Result<()> {
        for (name, mode) in [("store.db", 0o600), ("root.key", 0o400)] {
            let to = agent_directory.join(name);
            if to.exists() {
                fs::remove_file(&to)?;
            }
            fs::copy(self.directory.join(name), &to)?;
            fs::set_permissions(&to, fs::Permissions::from_mode(mode))?;
        }
        // The audit and the witness in it are those of the store that was there.
        let audit = agent_directory.join("audit");
        fs::remove_dir_all(&audit)?;
        Ok(fs::create_dir(&audit)?)
    }

    /// The database in the tree.
    pub fn store(&self) -> PathBuf {
        self.directory.join("store.db")
    }
}

/// Makes a golden database with the programs as they are now: two clusters, versions in the states that the product
/// gives, a banned node, a token, two root slots. The caller may do more to the store before it is recorded.
///
/// # Errors
/// When a program refuses, or the directory is there already.
pub fn make(to: &Path, more: impl FnOnce(&Fleet, &Cluster) -> anyhow::Result<()>) -> anyhow::Result<()> {
    fs::create_dir(to)?;
    let mut fleet = Fleet::start()?;
    let (alpha, beta) = (fleet.cluster("alpha")?, fleet.cluster("beta")?);
    let (node, other) = (fleet.sidecar(&alpha, "cp-1")?, fleet.sidecar(&beta, "cp-1")?);
    let mut answers = vec![(&alpha, encrypt(&node)?), (&beta, encrypt(&other)?)];
    let backup = fleet.path().join("backup.db");
    fleet.host(&["backup", backup.to_str().context("a path in UTF-8")?])?;
    for fresh in [false, false, true, false] {
        fleet.kmsctl(if fresh {
            &["key", "rotate", "alpha", "--fresh", "--yes"]
        } else {
            &["key", "rotate", "alpha"]
        })?;
        answers.push((&alpha, encrypt(&node)?));
    }
    fleet.kmsctl(&["key", "rotate", "beta"])?;
    answers.push((&beta, encrypt(&other)?));
    for version in ["1", "2", "3"] {
        fleet.kmsctl(&["key", "disable", "alpha", version, "--yes"])?;
    }
    fleet.kmsctl(&["key", "set-period", "beta", "12h"])?;
    fleet.kmsctl(&["cluster", "set", "beta", "--max-offline", "400d"])?;
    drop(fleet.sidecar(&beta, "banned")?);
    fleet.kmsctl(&["node", "ban", "--cluster", "beta", "banned", "--yes"])?;
    fleet.kmsctl(&["node", "token", "--cluster", "alpha", "--pattern", "spare-*", "--ttl", "365d"])?;
    with_passphrase(&fleet, PASSPHRASE, &["slot", "add", "passphrase", "--passphrase-fd", "3"])?;
    fleet.agent.stop()?;
    more(&fleet, &alpha)?;
    fleet.agent.start()?;
    let mut wrapped = Vec::new();
    for (cluster, answer) in answers {
        let version = version_of(&answer)?;
        let state = state_of(&fleet, cluster, version)?;
        wrapped.push(json!({"cluster": cluster.name, "version": version, "state": state, "answer": answer}));
    }
    fleet.agent.stop()?;
    for name in ["store.db", "root.key"] {
        fs::copy(fleet.agent.directory.join(name), to.join(name))?;
    }
    let left = fs::metadata(fleet.agent.directory.join("store.db-wal")).map_or(0, |log| log.len());
    ensure!(left == 0, "the database's log still has {left} bytes");
    let clusters = [&alpha, &beta].map(|cluster| json!({"name": cluster.name, "id": cluster.id}));
    let recorded = json!({"clusters": clusters, "wrapped": wrapped});
    Ok(fs::write(to.join(RECORDED), serde_json::to_string_pretty(&recorded)? + "\n")?)
}

/// What the product refuses until there is a census: version 2 of a cluster is destroyed, and version 3 is to be. Both
/// must be disabled, and the agent must not run.
///
/// # Errors
/// When the store or the keyring refuses.
pub async fn destroy_some(fleet: &Fleet, cluster: &str) -> anyhow::Result<()> {
    let directory = &fleet.agent.directory;
    let root = Root::File(directory.join("root.key"));
    let ledger = storage::open(&directory.join("store.db"), &root, "a-test", generator).await?.ledger;
    let cluster = cluster.parse().map_err(|_| anyhow!("{cluster} is no cluster id"))?;
    let row = rows::keyring(&cluster);
    let record = ledger.read(&row).await?.context("a keyring")?;
    let mut keyring = keyring::parse(&record)?;
    let (now, wait) = (clock::now(), MIN_DESTRUCTION_WAIT);
    let number = |number| Version::new(number).context("a version");
    let (second, third) = (number(2)?, number(3)?);
    keyring.schedule_destruction(second, now, wait)?;
    keyring.destroy(second, now + wait)?;
    keyring.schedule_destruction(third, now, wait)?;
    let mut changeset = ledger.changeset();
    changeset.update(&record, &keyring::payload(&keyring));
    let kek = ledger.read_row(&rows::kek(&cluster, second)).await?.context("a KEK")?;
    changeset.delete_sealed(&kek);
    ledger.commit_counts(changeset).await?;
    Ok(())
}

fn generator() -> Box<dyn rand_core::CryptoRng + Send> {
    Box::new(rand_core::UnwrapErr(getrandom::SysRng))
}

/// Runs a command of kms-agent with a passphrase on descriptor 3.
///
/// # Errors
/// When it ends with another status than 0.
pub fn with_passphrase(fleet: &Fleet, passphrase: &str, args: &[&str]) -> anyhow::Result<String> {
    let file = fleet.path().join("passphrase");
    fs::write(&file, passphrase)?;
    let agent = fleet.host_command(args)?;
    let mut shell = std::process::Command::new("sh");
    shell.arg("-c").arg(r#"exec "$@" 3<"$0""#).arg(&file).arg(agent.get_program()).args(agent.get_args());
    let done = child::run(shell.stdin(std::process::Stdio::null()));
    fs::remove_file(&file)?;
    done
}

/// The state of a version, as kmsctl says it.
///
/// # Errors
/// When there is no such version.
pub fn state_of(fleet: &Fleet, cluster: &Cluster, version: u64) -> anyhow::Result<String> {
    let versions = fleet.kmsctl_json(&["key", "versions", &cluster.name])?;
    let items = versions.as_array().context("a list of versions")?;
    let found = items.iter().find(|item| item.get("version").and_then(Value::as_u64) == Some(version));
    text(found.with_context(|| format!("version {version}: {versions}"))?, "state")
}

fn encrypt(sidecar: &Sidecar) -> anyhow::Result<Value> {
    KmsClient::new(ClientVersion::V0_37_2, Api::V1, &sidecar.socket)?.call(&["encrypt"])?.last()
}

/// The version in the header of a wrapped DEK.
fn version_of(answer: &Value) -> anyhow::Result<u64> {
    let cipher = BASE64.decode(text(answer, "cipher")?.as_bytes())?;
    let version = cipher.get(1..5).context("a header")?;
    Ok(u32::from_be_bytes(version.try_into()?).into())
}

fn text(value: &Value, name: &str) -> anyhow::Result<String> {
    let text = value.get(name).and_then(Value::as_str);
    Ok(text.with_context(|| format!("no {name} in {value}"))?.to_owned())
}
