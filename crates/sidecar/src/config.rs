//! The configuration: what an operator writes ([`RawConfig`]) and what the
//! program sees ([`Config`]).

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use fleet_kms_identity::{AgentAddress, Name};
use fleet_kms_process::config::InvalidKey;
use fleet_kms_process::logging::{Filter, Format};
use serde::Deserialize;

use crate::socket::{Account, MAX_PATH, SocketConfig};

/// The prefix of environment variables: `FLEET_KMS_SIDECAR__SOCKET__PATH`.
pub const ENVIRONMENT: &str = "FLEET_KMS_SIDECAR";

/// The longest `hold_for`: calls have a deadline of 10 s at most.
const LONGEST_HOLD: Duration = Duration::from_secs(60);

/// The file as it is written. Keys that are left out have the values shown in
/// `deploy/`.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
#[expect(missing_docs, reason = "the fields of Config say what they are for")]
#[derive(Default)]
pub struct RawConfig {
    pub socket: RawSocket,
    pub identity: RawIdentity,
    pub agents: RawAgents,
    pub ops: RawOps,
    pub timing: RawTiming,
    pub log: RawLog,
}

/// `[socket]`
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
#[expect(missing_docs, reason = "the fields of Config say what they are for")]
pub struct RawSocket {
    pub path: PathBuf,
    pub mode: String,
    pub owner: Option<String>,
    pub group: Option<String>,
}

impl Default for RawSocket {
    fn default() -> Self {
        Self { path: "/run/fleet-kms/kms.sock".into(), mode: "0600".to_owned(), owner: None, group: None }
    }
}

/// `[identity]`
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
#[expect(missing_docs, reason = "the fields of Config say what they are for")]
pub struct RawIdentity {
    pub directory: PathBuf,
    pub node: Option<String>,
}

impl Default for RawIdentity {
    fn default() -> Self {
        Self { directory: "/var/lib/fleet-kms/sidecar".into(), node: None }
    }
}

/// `[agents]`
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
#[expect(missing_docs, reason = "the fields of Config say what they are for")]
pub struct RawAgents {
    pub addresses: Vec<RawAgent>,
}

/// One agent's two ports.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
#[expect(missing_docs, reason = "the fields of Config say what they are for")]
pub struct RawAgent {
    pub data: String,
    pub enrolment: String,
}

/// `[ops]`
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
#[expect(missing_docs, reason = "the fields of Config say what they are for")]
pub struct RawOps {
    pub address: SocketAddr,
}

impl Default for RawOps {
    fn default() -> Self {
        Self { address: SocketAddr::from(([127, 0, 0, 1], 7447)) }
    }
}

/// `[timing]`
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
#[expect(missing_docs, reason = "the fields of Config say what they are for")]
pub struct RawTiming {
    #[serde(with = "humantime_serde")]
    pub hold_for: Duration,
}

impl Default for RawTiming {
    fn default() -> Self {
        Self { hold_for: Duration::from_secs(10) }
    }
}

/// `[log]`
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
#[expect(missing_docs, reason = "the fields of Config say what they are for")]
pub struct RawLog {
    pub format: String,
    pub filter: String,
}

impl Default for RawLog {
    fn default() -> Self {
        Self { format: "text".to_owned(), filter: "info".to_owned() }
    }
}

/// The configuration, every value of it usable.
#[derive(Debug)]
pub struct Config {
    /// kube-apiserver's socket.
    pub socket: SocketConfig,
    /// Where this node's key and certificate live.
    pub identity_directory: PathBuf,
    /// The node's name, asked for at enrolment if the token names none; the
    /// host's name by default.
    pub node: Option<Name>,
    /// Agents to begin with; an enrolled node learns the others.
    pub agents: Vec<AgentAddress>,
    /// Where `/livez`, `/readyz` and `/metrics` are served.
    pub ops_address: SocketAddr,
    /// How young an outage must be for a call to wait for an agent.
    pub hold_for: Duration,
    /// How log lines look.
    pub log_format: Format,
    /// Which log lines are written, as `tracing` filters.
    pub log_filter: Filter,
}

impl TryFrom<RawConfig> for Config {
    type Error = InvalidKey;

    fn try_from(raw: RawConfig) -> Result<Self, InvalidKey> {
        let hold_for = raw.timing.hold_for;
        if hold_for > LONGEST_HOLD {
            return Err(InvalidKey::new("timing.hold_for", "more than 60s", "use at most 60s"));
        }
        let node =
            raw.identity.node.map(|node| node.parse::<Name>()).transpose().map_err(|error| {
                InvalidKey::new("identity.node", error.to_string(), "use the host's name")
            })?;
        let filter = raw.log.filter.parse().map_err(|_| {
            let remedy =
                "write a level, such as info, or levels by module, such as info,fleet_kms_sidecar=debug";
            InvalidKey::new("log.filter", "cannot be parsed", remedy)
        })?;
        let format = raw.log.format.parse::<Format>().map_err(|_| {
            let problem = format!("`{}` is no log format", raw.log.format);
            InvalidKey::new("log.format", problem, "write \"text\" or \"json\"")
        })?;
        Ok(Self {
            socket: socket(raw.socket)?,
            identity_directory: absolute("identity.directory", raw.identity.directory)?,
            node,
            agents: raw.agents.addresses.into_iter().map(agent).collect::<Result<_, _>>()?,
            ops_address: raw.ops.address,
            hold_for,
            log_format: format,
            log_filter: filter,
        })
    }
}

fn socket(raw: RawSocket) -> Result<SocketConfig, InvalidKey> {
    let path = absolute("socket.path", raw.path)?;
    if path.as_os_str().len() > MAX_PATH {
        let problem = format!("longer than {MAX_PATH} bytes");
        return Err(InvalidKey::new(
            "socket.path",
            problem,
            "use a shorter path, such as /run/fleet-kms/kms.sock",
        ));
    }
    let mode = u32::from_str_radix(&raw.mode, 8).ok().filter(|mode| *mode <= 0o777).ok_or_else(|| {
        InvalidKey::new("socket.mode", "no permission bits", "use octal digits in quotes, such as \"0600\"")
    })?;
    let account = |text: String| Account::new(&text);
    Ok(SocketConfig { path, mode, owner: raw.owner.map(account), group: raw.group.map(account) })
}

fn absolute(key: &str, path: PathBuf) -> Result<PathBuf, InvalidKey> {
    match path.is_absolute() && path.file_name().is_some() {
        true => Ok(path),
        false => Err(InvalidKey::new(key, "not an absolute path", "begin it with /")),
    }
}

fn agent(raw: RawAgent) -> Result<AgentAddress, InvalidKey> {
    for address in [&raw.data, &raw.enrolment] {
        let port = address.rsplit_once(':').filter(|(host, _)| !host.is_empty());
        if port.and_then(|(_, port)| port.parse::<u16>().ok()).is_none() {
            let problem = format!("`{address}` is not host:port");
            return Err(InvalidKey::new("agents.addresses", problem, "write it like 10.0.0.7:7443"));
        }
    }
    Ok(AgentAddress { data: raw.data, enrolment: raw.enrolment })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<Config, String> {
        let raw: RawConfig = toml::from_str(text).map_err(|error| error.to_string())?;
        Config::try_from(raw).map_err(|error| error.to_string())
    }

    #[test]
    fn an_empty_file_is_the_documented_default() {
        let config = parse("").unwrap();
        assert_eq!(config.socket.path.to_str(), Some("/run/fleet-kms/kms.sock"));
        assert_eq!(config.socket.mode, 0o600);
        assert_eq!(config.hold_for, Duration::from_secs(10));
        assert_eq!(config.ops_address.to_string(), "127.0.0.1:7447");
        assert!(config.agents.is_empty());
    }

    #[test]
    fn every_key_is_read() {
        let config = parse(
            r#"
            socket = { path = "/run/x/kms.sock", mode = "0660", owner = "2000", group = "kube" }
            identity = { directory = "/var/lib/x", node = "cp-1" }
            agents.addresses = [{ data = "10.0.0.7:7443", enrolment = "[fd00::7]:7444" }]
            ops.address = "0.0.0.0:9000"
            timing.hold_for = "3s"
            log = { format = "json", filter = "debug" }
            "#,
        )
        .unwrap();
        assert_eq!(config.socket.owner, Some(Account::Id(2000)));
        assert_eq!(config.socket.group, Some(Account::Name("kube".to_owned())));
        assert_eq!(config.agents[0].enrolment, "[fd00::7]:7444");
        assert_eq!(config.node.unwrap().as_str(), "cp-1");
    }

    #[test]
    fn a_bad_value_names_its_key_and_a_remedy() {
        for (text, key) in [
            ("socket.path = 'kms.sock'", "socket.path"),
            ("socket.mode = '0999'", "socket.mode"),
            ("socket.mode = '7777'", "socket.mode"),
            ("identity.node = 'Upper'", "identity.node"),
            ("timing.hold_for = '2m'", "timing.hold_for"),
            ("log.format = 'xml'", "log.format"),
            ("log.filter = '=='", "log.filter"),
            ("agents.addresses = [{ data = '10.0.0.7', enrolment = 'a:1' }]", "agents.addresses"),
        ] {
            let error = parse(text).unwrap_err();
            assert!(error.starts_with(&format!("key `{key}`")), "{error}");
        }
        let long = format!("socket.path = '/{}'", "x".repeat(MAX_PATH));
        assert!(parse(&long).unwrap_err().contains("longer than"));
        assert!(parse("sockt.path = '/x'").unwrap_err().contains("unknown field `sockt`"));
    }
}
