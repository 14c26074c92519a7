//! The agent's configuration: defaults here, one TOML file, the environment
//! (`FLEET_KMS_AGENT__SECTION__KEY`). `deploy/config/agent.toml` explains each
//! key.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use fleet_kms_identity::{Name, TrustDomain};
use fleet_kms_keyring::rotation::RotationPolicy;
use fleet_kms_process::config::InvalidKey;
use fleet_kms_process::logging;
use fleet_kms_proto::agent::AgentAddress;
use serde::Deserialize;

mod audit;

pub use audit::AuditOptions;
use audit::RawAudit;

use crate::root::Root;
use crate::rotation::Pace;

/// The prefix of the agent's environment variables.
pub const PREFIX: &str = "FLEET_KMS_AGENT";

/// How often a backup is made unless the configuration says otherwise.
const BACKUP_EVERY: Duration = Duration::from_secs(24 * 60 * 60);
/// More often would be a load, not a protection.
const SHORTEST_BACKUP_EVERY: Duration = Duration::from_secs(60);
/// How many backups are kept unless the configuration says otherwise.
const BACKUPS_KEPT: usize = 14;

/// What the agent runs with.
#[derive(Debug)]
pub struct Config {
    /// This agent's name, the last part of its SPIFFE ID.
    pub name: Name,
    /// The fleet's trust domain.
    pub trust_domain: TrustDomain,
    /// Where sidecars find the agents.
    pub addresses: Vec<AgentAddress>,
    /// Where this agent listens.
    pub listen: Listen,
    /// The store's file.
    pub store: PathBuf,
    /// Where the root key comes from.
    pub root: Root,
    /// The audit's directory.
    pub audit: PathBuf,
    /// How the audit works.
    pub audit_options: AuditOptions,
    /// Scheduled backups; `None` when none are made.
    pub backup: Option<Backup>,
    /// The rotation period of new clusters.
    pub rotation: RotationPolicy,
    /// How many clusters are rotated in a second.
    pub pace: Pace,
    /// How a log line looks.
    pub log_format: logging::Format,
    /// Which log lines are written.
    pub log_filter: logging::Filter,
}

/// Scheduled backups.
#[derive(Debug, Clone)]
pub struct Backup {
    /// Where they are kept.
    pub directory: PathBuf,
    /// How often one is made.
    pub every: Duration,
    /// How many are kept.
    pub keep: usize,
    /// Making a cluster, or a fresh rotation, waits for one.
    pub required: bool,
}

/// Where an agent listens.
#[derive(Debug, Clone, Copy)]
pub struct Listen {
    /// Wrap, Unwrap, Status.
    pub data: SocketAddr,
    /// Enrol, Renew, Time.
    pub enrolment: SocketAddr,
    /// The admin API.
    pub admin: SocketAddr,
    /// Health and metrics.
    pub ops: SocketAddr,
}

/// The file as written.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RawConfig {
    agent: RawAgent,
    #[serde(default)]
    listen: RawListen,
    store: RawStore,
    root: RawRoot,
    audit: RawAudit,
    backup: Option<RawBackup>,
    #[serde(default)]
    rotation: RawRotation,
    #[serde(default)]
    log: RawLog,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct RawAgent {
    name: String,
    trust_domain: String,
    addresses: Vec<RawAddress>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct RawAddress {
    data: String,
    enrolment: String,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct RawListen {
    data: SocketAddr,
    enrolment: SocketAddr,
    admin: SocketAddr,
    ops: SocketAddr,
}

impl Default for RawListen {
    fn default() -> Self {
        let everywhere = |port| SocketAddr::from(([0, 0, 0, 0], port));
        Self {
            data: everywhere(7443),
            enrolment: everywhere(7444),
            admin: everywhere(7445),
            ops: SocketAddr::from(([127, 0, 0, 1], 7446)),
        }
    }
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct RawStore {
    path: PathBuf,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct RawRoot {
    file: Option<PathBuf>,
    credential: Option<String>,
    passphrase_credential: Option<String>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct RawBackup {
    directory: PathBuf,
    #[serde(default, with = "humantime_serde")]
    every: Option<Duration>,
    #[serde(default)]
    keep: Option<usize>,
    #[serde(default)]
    required: bool,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct RawRotation {
    #[serde(with = "humantime_serde")]
    period: Option<Duration>,
    per_second: Option<u32>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct RawLog {
    format: String,
    filter: String,
}

impl Default for RawLog {
    fn default() -> Self {
        Self { format: "text".to_owned(), filter: "info".to_owned() }
    }
}

impl TryFrom<RawConfig> for Config {
    type Error = InvalidKey;

    fn try_from(raw: RawConfig) -> Result<Self, Self::Error> {
        let rotation = raw.rotation.period.map(RotationPolicy::try_new).transpose();
        let pace = raw.rotation.per_second.map_or(Some(Pace::default()), Pace::per_second);
        let log = raw.log;
        Ok(Self {
            name: raw
                .agent
                .name
                .parse()
                .map_err(|error| invalid("agent.name", error, "use a host name's label, such as agent-1"))?,
            trust_domain: raw.agent.trust_domain.parse().map_err(|error| {
                invalid("agent.trust_domain", error, "use a DNS name in lower case, such as fleet.example")
            })?,
            addresses: addresses(raw.agent.addresses)?,
            listen: Listen {
                data: raw.listen.data,
                enrolment: raw.listen.enrolment,
                admin: raw.listen.admin,
                ops: raw.listen.ops,
            },
            store: absolute("store.path", raw.store.path)?,
            root: root(raw.root)?,
            audit_options: raw.audit.options()?,
            audit: absolute("audit.directory", raw.audit.directory)?,
            backup: raw.backup.map(backup).transpose()?,
            rotation: rotation
                .map_err(|error| invalid("rotation.period", error, "use 1h to 3650days, such as 30days"))?
                .unwrap_or_default(),
            pace: pace.ok_or_else(|| {
                let problem = format!("is not 1 to {}", Pace::MAX);
                InvalidKey::new("rotation.per_second", problem, "use 50 unless the disk is slow")
            })?,
            log_format: log.format.parse().map_err(|_| {
                let problem = format!("`{}` is no log format", log.format);
                InvalidKey::new("log.format", problem, "write \"text\" or \"json\"")
            })?,
            log_filter: log.filter.parse().map_err(|_| {
                let remedy =
                    "write a level, such as info, or levels by module, such as info,fleet_kms_agent=debug";
                InvalidKey::new("log.filter", "cannot be parsed", remedy)
            })?,
        })
    }
}

fn addresses(raw: Vec<RawAddress>) -> Result<Vec<AgentAddress>, InvalidKey> {
    const KEY: &str = "agent.addresses";
    if raw.is_empty() {
        let problem = "no address: sidecars could not find this agent";
        return Err(InvalidKey::new(KEY, problem, "give at least one { data, enrolment } pair of host:port"));
    }
    raw.into_iter()
        .map(|address| {
            for part in [&address.data, &address.enrolment] {
                let port = part.rsplit_once(':').filter(|(host, _)| !host.is_empty());
                if port.and_then(|(_, port)| port.parse::<u16>().ok()).is_none() {
                    let problem = format!("{part:?} is not host:port");
                    return Err(InvalidKey::new(KEY, problem, "write it like 10.0.0.5:7443"));
                }
            }
            Ok(AgentAddress { data: address.data, enrolment: address.enrolment })
        })
        .collect()
}

fn root(raw: RawRoot) -> Result<Root, InvalidKey> {
    match (raw.file, raw.credential, raw.passphrase_credential) {
        (Some(file), None, None) => Ok(Root::File(absolute("root.file", file)?)),
        (None, Some(name), None) => Ok(Root::Credential(name)),
        (None, None, Some(name)) => Ok(Root::PassphraseCredential(name)),
        _ => Err(InvalidKey::new(
            "root",
            "the root key comes from exactly one place",
            "set one of root.file, root.credential and root.passphrase_credential",
        )),
    }
}

fn backup(raw: RawBackup) -> Result<Backup, InvalidKey> {
    let (every, keep) = (raw.every.unwrap_or(BACKUP_EVERY), raw.keep.unwrap_or(BACKUPS_KEPT));
    if every < SHORTEST_BACKUP_EVERY {
        return Err(InvalidKey::new("backup.every", "too often", "use 1m or more, such as 1day"));
    }
    if keep == 0 {
        return Err(InvalidKey::new("backup.keep", "no backup would be left", "use 1 or more"));
    }
    let directory = absolute("backup.directory", raw.directory)?;
    Ok(Backup { directory, every, keep, required: raw.required })
}

fn absolute(key: &'static str, path: PathBuf) -> Result<PathBuf, InvalidKey> {
    if path.is_absolute() {
        return Ok(path);
    }
    let problem = format!("{} is not an absolute path", path.display());
    Err(InvalidKey::new(key, problem, "begin it with /"))
}

fn invalid(key: &'static str, error: impl std::fmt::Display, remedy: &'static str) -> InvalidKey {
    InvalidKey::new(key, error.to_string(), remedy)
}
