//! Programs that must not start: their exit status and what the operator reads.

use std::ffi::OsStr;
use std::time::Duration;

use anyhow::Context;

use crate::child::Spec;
use crate::programs::Program;

/// A start that is refused is refused at once; the rest is a loaded machine.
const LIMIT: Duration = Duration::from_secs(30);

/// How a program ended by itself.
#[derive(Debug)]
pub struct Refusal {
    /// The exit status.
    pub status: i32,
    /// All of its standard error.
    pub text: String,
}

impl Refusal {
    /// Panics unless the program ended with `status` and said each of `parts`.
    #[track_caller]
    pub fn must_be(&self, status: i32, parts: &[&str]) {
        assert_eq!(self.status, status, "{}", self.text);
        for part in parts {
            assert!(self.text.contains(part), "{part:?} is not in: {}", self.text);
        }
    }
}

/// Runs a program that must end by itself.
///
/// # Errors
/// When it cannot be started, goes on, or is killed by a signal.
pub fn refusal<A: AsRef<OsStr>>(
    program: Program,
    args: impl IntoIterator<Item = A>,
    environment: &[(&str, &str)],
) -> anyhow::Result<Refusal> {
    let logs = tempfile::tempdir()?;
    let mut spec = Spec::new("refused", &program.path()?, logs.path()).args(args);
    for (name, value) in environment {
        spec = spec.env(name, value);
    }
    let mut child = spec.start()?;
    let ended = child.wait_exit(LIMIT)?;
    let status = ended.code().with_context(|| format!("it ended with {ended}"))?;
    Ok(Refusal { status, text: child.stderr()? })
}
