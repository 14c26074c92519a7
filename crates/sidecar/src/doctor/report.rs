//! What doctor found: text for people, JSON for programs.
//!
//! Ids and statuses are part of the program's interface: they never change
//! their meaning, and texts may change with every version.

use std::fmt;

use serde::{Serialize, Serializer};

/// What is said as soon as anything fails.
const NOT_LOST: &str = "while a KMS call fails, kube-apiserver calls intact objects `corrupt object … not \
    transformable`. They are not lost: once this report is ok they can be read again. Do not delete them, do not \
    rewrite etcd, and never delete with ignoreStoreReadErrorWithClusterBreakingPotential (feature \
    AllowUnsafeMalformedObjectDeletion, on in Kubernetes 1.37): that destroys live data";

/// The width of the longest id.
const ID_WIDTH: usize = 25;

/// How a check ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Status {
    /// As it should be.
    Ok,
    /// Works now, or cannot be told from here.
    Warn,
    /// Secrets cannot be read or written, or soon cannot, or are not protected.
    Fail,
}

impl Status {
    fn as_str(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::Warn => "warn",
            Self::Fail => "fail",
        }
    }
}

macro_rules! check_ids {
    ($($variant:ident = $name:literal, $what:literal;)*) => {
        /// Names one check. docs/operations/doctor.md says what to do about each.
        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        pub enum CheckId {
            $(#[doc = $what] $variant,)*
        }

        impl CheckId {
            /// All of them.
            pub const ALL: &'static [Self] = &[$(Self::$variant,)*];

            /// Returns the stable id.
            pub fn as_str(self) -> &'static str {
                match self {
                    $(Self::$variant => $name,)*
                }
            }
        }
    };
}

check_ids! {
    SocketDirectory = "socket_directory", "The socket's directory exists and is not for everyone to write.";
    SocketPath = "socket_path", "There is a socket at the path.";
    SocketListener = "socket_listener", "Somebody accepts on it.";
    SocketLock = "socket_lock", "Who has the right to the path.";
    SocketAccess = "socket_access", "Mode, owner and group are the configured ones.";
    IdentityDirectory = "identity_directory", "The identity directory is the sidecar's alone to write.";
    IdentityFiles = "identity_files", "The files in it have the right owner, and keys are private.";
    Identity = "identity", "This node is enrolled.";
    IdentityState = "identity_state", "The state beside the identity can be read.";
    AgentTime = "agent_time", "An agent proves the time.";
    Clock = "clock", "This node's clock agrees with the agents'.";
    CertificateDates = "certificate_dates", "The certificate is valid now, and is being renewed.";
    CertificateChain = "certificate_chain", "The certificate chains to a pinned root.";
    Agents = "agents", "At least one agent is known.";
    AgentDns = "agent_dns", "An agent's name can be resolved.";
    AgentTcp = "agent_tcp", "An agent can be reached.";
    AgentTls = "agent_tls", "What answers is an agent of this fleet.";
    AgentAdmission = "agent_admission", "The agent lets this node's certificate in.";
    AgentAuthorization = "agent_authorization", "The agent serves this node.";
    AgentWrap = "agent_wrap", "A random DEK can be wrapped.";
    AgentUnwrap = "agent_unwrap", "It can be unwrapped again.";
    Apiserver = "apiserver", "kube-apiserver's flags can be read.";
    ApiserverFlag = "apiserver_flag", "kube-apiserver is told to encrypt.";
    ApiserverKmsV1 = "apiserver_kms_v1", "kube-apiserver may speak KMS v1, if it is to.";
    ApiserverUnsafeDelete = "apiserver_unsafe_delete", "Objects that cannot be decrypted cannot be deleted.";
    EncryptionConfig = "encryption_config", "The EncryptionConfiguration can be read.";
    EncryptionResources = "encryption_resources", "It is about Secrets.";
    EncryptionEndpoint = "encryption_endpoint", "It names this socket.";
    EncryptionOrder = "encryption_order", "What is written is encrypted here.";
    EncryptionCache = "encryption_cache", "kube-apiserver keeps enough DEKs.";
}

impl Serialize for CheckId {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(self.as_str())
    }
}

/// One line of the report.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Check {
    /// Which check it is.
    pub id: CheckId,
    /// How it ended.
    pub status: Status,
    /// What was looked at: a path, an address, a process.
    pub subject: String,
    /// What was found.
    pub message: String,
    /// What to do; only `None` if all is well.
    pub remedy: Option<String>,
}

impl Check {
    /// All is well.
    pub fn ok(id: CheckId, subject: impl fmt::Display, message: impl Into<String>) -> Self {
        let subject = subject.to_string();
        Self { id, status: Status::Ok, subject, message: message.into(), remedy: None }
    }

    /// Something should be done.
    pub fn warn(
        id: CheckId,
        subject: impl fmt::Display,
        message: impl Into<String>,
        remedy: impl Into<String>,
    ) -> Self {
        let remedy = Some(remedy.into());
        Self { id, status: Status::Warn, subject: subject.to_string(), message: message.into(), remedy }
    }

    /// Something must be done.
    pub fn fail(
        id: CheckId,
        subject: impl fmt::Display,
        message: impl Into<String>,
        remedy: impl Into<String>,
    ) -> Self {
        Self { status: Status::Fail, ..Self::warn(id, subject, message, remedy) }
    }
}

/// The whole report. A check that makes no sense after one that failed is left
/// out.
#[derive(Debug, Default)]
pub struct Report {
    /// The lines, from the socket to the agents, then kube-apiserver.
    pub checks: Vec<Check>,
}

impl Report {
    /// The worst of the lines.
    pub fn status(&self) -> Status {
        self.checks.iter().map(|check| check.status).max().unwrap_or(Status::Ok)
    }

    /// How many lines have this status.
    pub fn count(&self, status: Status) -> usize {
        self.checks.iter().filter(|check| check.status == status).count()
    }

    /// What concerns no single line.
    pub fn notes(&self) -> Vec<&'static str> {
        if self.status() == Status::Fail { vec![NOT_LOST] } else { Vec::new() }
    }

    /// The report for programs.
    pub fn to_json(&self) -> String {
        let document = Document {
            format: 1,
            build: env!("CARGO_PKG_VERSION"),
            status: self.status(),
            checks: &self.checks,
            notes: self.notes(),
        };
        serde_json::to_string_pretty(&document).expect("texts and numbers are JSON")
    }
}

/// The JSON document; `format` rises when a field changes its meaning.
#[derive(Serialize)]
struct Document<'a> {
    format: u32,
    build: &'a str,
    status: Status,
    checks: &'a [Check],
    notes: Vec<&'a str>,
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for Check { id, status, subject, message, remedy } in &self.checks {
            writeln!(f, "{:<4}  {:<ID_WIDTH$}  {subject}: {message}", status.as_str(), id.as_str())?;
            if let Some(remedy) = remedy {
                writeln!(f, "      remedy: {remedy}")?;
            }
        }
        let [ok, warn, fail] = [Status::Ok, Status::Warn, Status::Fail].map(|status| self.count(status));
        write!(f, "{ok} ok, {warn} warn, {fail} fail")?;
        self.notes().iter().try_for_each(|note| write!(f, "\nnote: {note}"))
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    fn report() -> Report {
        Report {
            checks: vec![
                Check::ok(CheckId::SocketPath, "/run/x/kms.sock", "a socket"),
                Check::warn(CheckId::Clock, "this node", "400 days ahead", "set it"),
                Check::fail(CheckId::AgentTcp, "10.0.0.7:7443", "refused", "start kms-agent"),
            ],
        }
    }

    #[test]
    fn the_text_has_a_line_a_remedy_and_a_count() {
        let text = report().to_string();
        assert!(text.starts_with("ok    socket_path                /run/x/kms.sock: a socket\n"), "{text}");
        assert!(
            text.contains("refused\n      remedy: start kms-agent\n1 ok, 1 warn, 1 fail\nnote: "),
            "{text}"
        );
    }

    #[test]
    fn the_json_has_the_worst_status_and_every_field() {
        let json: serde_json::Value = serde_json::from_str(&report().to_json()).unwrap();
        assert_eq!(json["format"], 1);
        assert_eq!(json["status"], "fail");
        assert_eq!(json["checks"][0]["remedy"], serde_json::Value::Null);
        assert_eq!(json["checks"][2]["id"], "agent_tcp");
        assert!(json["notes"][0].as_str().unwrap().contains("not lost"));
    }

    #[test]
    fn without_a_failure_nobody_is_frightened() {
        let mut report = report();
        report.checks.pop();
        assert_eq!((report.status(), report.notes().len()), (Status::Warn, 0));
    }

    #[test]
    fn every_id_is_there_once_fits_its_column_and_is_documented() {
        let names: BTreeSet<_> = CheckId::ALL.iter().map(|id| id.as_str()).collect();
        assert_eq!(names.len(), CheckId::ALL.len());
        let page = include_str!("../../../../docs/operations/doctor.md");
        for name in names {
            assert!(name.len() <= ID_WIDTH, "{name}");
            assert!(page.contains(&format!("`{name}`")), "docs/operations/doctor.md does not explain {name}");
        }
    }
}
