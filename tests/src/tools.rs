//! Pinned tools of others that tests check our output with. The scripts in `tests/tools` install what is not there.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::LazyLock;

use anyhow::anyhow;

use crate::child::run;

/// promtool, which checks metrics, alert rules and their tests.
///
/// # Errors
/// When it is not there and cannot be installed.
pub fn promtool() -> anyhow::Result<PathBuf> {
    static FOUND: LazyLock<Result<PathBuf, String>> = LazyLock::new(|| installed("promtool.sh"));
    FOUND.clone().map_err(|error| anyhow!(error))
}

/// schemathesis, which tries an HTTP API by its OpenAPI document.
///
/// # Errors
/// When it is not there and cannot be installed.
pub fn schemathesis() -> anyhow::Result<PathBuf> {
    static FOUND: LazyLock<Result<PathBuf, String>> = LazyLock::new(|| installed("schemathesis.sh"));
    FOUND.clone().map_err(|error| anyhow!(error))
}

fn installed(script: &str) -> Result<PathBuf, String> {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tools").join(script);
    let path = run(&mut Command::new(script)).map_err(|error| format!("{error:#}"))?;
    Ok(PathBuf::from(path.trim()))
}

/// What a program printed, both streams, for a message.
pub fn said(output: &Output) -> String {
    let text = |bytes| String::from_utf8_lossy(bytes).into_owned();
    format!("{}\n{}{}", output.status, text(&output.stdout), text(&output.stderr))
}
