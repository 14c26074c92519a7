//! kube-apiserver's own KMS clients, as the program `kms-client` of `tests/peers`.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, bail};
use serde_json::Value;

use crate::child::{Child, Spec};
use crate::peers::{ClientVersion, kms_client};

/// Which of the two APIs a client speaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Api {
    /// `v1beta1.KeyManagementService`.
    V1,
    /// `v2.KeyManagementService`.
    V2,
}

impl Api {
    /// Both.
    pub const ALL: [Self; 2] = [Self::V1, Self::V2];

    fn as_str(self) -> &'static str {
        match self {
            Self::V1 => "v1",
            Self::V2 => "v2",
        }
    }
}

/// A client of one version and API towards one socket. Each call is a process, thus a connection, of its own.
#[derive(Clone, Debug)]
pub struct KmsClient {
    program: PathBuf,
    api: Api,
    socket: PathBuf,
}

impl KmsClient {
    /// Builds the client if need be.
    ///
    /// # Errors
    /// When it cannot be built.
    pub fn new(version: ClientVersion, api: Api, socket: &Path) -> anyhow::Result<Self> {
        Ok(Self { program: kms_client(version)?, api, socket: socket.to_owned() })
    }

    /// Runs one command to its end, for example `["round-trip", "-sizes", "4,32"]`.
    ///
    /// # Errors
    /// When the client could not run at all; a call that it reports as failed is an [`Outcome`].
    pub fn call(&self, args: &[&str]) -> anyhow::Result<Outcome> {
        let output = Command::new(&self.program)
            .args(self.arguments(args)?)
            .stdin(Stdio::null())
            .output()
            .with_context(|| self.program.display().to_string())?;
        let stderr = String::from_utf8_lossy(&output.stderr);
        match output.status.code() {
            Some(0 | 1) => Outcome::parse(&String::from_utf8_lossy(&output.stdout)),
            _ => bail!("kms-client {args:?} ended with {}: {stderr}", output.status),
        }
    }

    /// Starts a command that the test acts beside (`loop`, `late-start`), with its logs under `log_dir`.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn start(&self, args: &[&str], log_dir: &Path) -> anyhow::Result<Child> {
        Spec::new("kms-client", &self.program, log_dir).args(self.arguments(args)?).start()
    }

    fn arguments(&self, args: &[&str]) -> anyhow::Result<Vec<String>> {
        let (command, rest) = args.split_first().context("kms-client needs a command")?;
        let socket = self.socket.to_str().context("a socket path in UTF-8")?;
        Ok([*command, "-socket", socket, "-api", self.api.as_str()]
            .iter()
            .chain(rest)
            .map(|arg| (*arg).to_owned())
            .collect())
    }
}

/// What a client printed.
#[derive(Debug)]
pub struct Outcome {
    lines: Vec<Value>,
    failure: Option<Failure>,
}

/// Why a call failed, as kube-apiserver would see it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Failure {
    /// The gRPC code's name, for example `InvalidArgument`.
    pub code: String,
    /// The whole text.
    pub error: String,
}

impl Outcome {
    /// Reads what a client printed, one JSON object a line.
    ///
    /// # Errors
    /// When that is something else.
    pub fn parse(stdout: &str) -> anyhow::Result<Self> {
        let mut lines = Vec::new();
        let mut failure = None;
        for line in stdout.lines() {
            let value: Value = serde_json::from_str(line).with_context(|| line.to_owned())?;
            if value.get("ok") == Some(&Value::Bool(false)) {
                failure = Some(Failure { code: text(&value, "code")?, error: text(&value, "error")? });
            } else {
                lines.push(value);
            }
        }
        Ok(Self { lines, failure })
    }

    /// The results that were printed before any failure.
    pub fn results(&self) -> &[Value] {
        &self.lines
    }

    /// The results of a command that succeeded.
    ///
    /// # Errors
    /// When it failed, with all that it printed.
    pub fn ok(self) -> anyhow::Result<Vec<Value>> {
        match self.failure {
            None => Ok(self.lines),
            Some(failure) => bail!("{failure:?} after {:?}", self.lines),
        }
    }

    /// The last result of a command that succeeded.
    ///
    /// # Errors
    /// As [`Outcome::ok`].
    pub fn last(self) -> anyhow::Result<Value> {
        self.ok()?.pop().context("no result")
    }

    /// The failure of a command that failed.
    ///
    /// # Errors
    /// When it succeeded.
    pub fn refused(self) -> anyhow::Result<Failure> {
        self.failure.with_context(|| format!("the call succeeded: {:?}", self.lines))
    }
}

fn text(value: &Value, key: &str) -> anyhow::Result<String> {
    let found = value.get(key).and_then(Value::as_str);
    Ok(found.with_context(|| format!("no {key} in {value}"))?.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn results_and_the_failure_are_told_apart() {
        let printed =
            "{\"size\":4}\n{\"command\":\"x\",\"ok\":false,\"code\":\"Internal\",\"error\":\"why\"}\n";
        let failure = Outcome::parse(printed).unwrap().refused().unwrap();
        assert_eq!(failure, Failure { code: "Internal".to_owned(), error: "why".to_owned() });
        assert!(Outcome::parse(printed).unwrap().ok().is_err());

        assert_eq!(
            Outcome::parse("{\"size\":4}\n").unwrap().last().unwrap(),
            serde_json::json!({ "size": 4 })
        );
        assert!(Outcome::parse("{\"size\":4}\n").unwrap().refused().is_err());
        assert!(Outcome::parse("not JSON").is_err());
    }
}
