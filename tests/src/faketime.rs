//! A program that believes another wall clock: Debian's libfaketime, whose offset can be changed while the program runs.
//! Monotonic time stays real.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::LazyLock;

use anyhow::{Context, bail};

use crate::child::{Spec, run};

const LIBRARIES: [&str; 2] = [
    "/usr/lib/x86_64-linux-gnu/faketime/libfaketimeMT.so.1",
    "/usr/lib/aarch64-linux-gnu/faketime/libfaketimeMT.so.1",
];

static LIBRARY: LazyLock<Result<PathBuf, String>> =
    LazyLock::new(|| library().map_err(|error| format!("{error:#}")));

/// The wall clock of one program.
#[derive(Debug, Clone)]
pub struct FakeClock {
    file: PathBuf,
}

impl FakeClock {
    /// Makes a clock that goes right, kept in `directory`, which the program must be able to read.
    ///
    /// # Errors
    /// When libfaketime is neither there nor can be installed.
    pub fn new(directory: &Path) -> anyhow::Result<Self> {
        let clock = Self { file: directory.join("offset") };
        clock.set(0)?;
        LIBRARY.as_ref().map_err(|error| anyhow::anyhow!("{error}"))?;
        Ok(clock)
    }

    /// Sets how far the clock is ahead, in seconds.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn set(&self, ahead: i64) -> anyhow::Result<()> {
        // Replaced, not rewritten: the program must never read half an offset.
        let new = self.file.with_extension("new");
        fs::write(&new, format!("{ahead:+}\n"))?;
        Ok(fs::rename(&new, &self.file)?)
    }

    /// Makes a program believe this clock from its next start on.
    ///
    /// # Errors
    /// When libfaketime is not there.
    pub fn apply(&self, spec: Spec) -> anyhow::Result<Spec> {
        Ok(variables(&self.file)?.iter().fold(spec, |spec, (name, value)| spec.env(name, value)))
    }

    /// As [`FakeClock::apply`], for a command that runs to its end.
    ///
    /// # Errors
    /// When libfaketime is not there.
    pub fn apply_to(&self, mut command: Command) -> anyhow::Result<Command> {
        command.envs(variables(&self.file)?);
        Ok(command)
    }
}

/// What makes a program believe the clock in `file`.
fn variables(file: &Path) -> anyhow::Result<[(&'static str, PathBuf); 5]> {
    let library = LIBRARY.as_ref().map_err(|error| anyhow::anyhow!("{error}"))?;
    Ok([
        ("LD_PRELOAD", library.clone()),
        ("FAKETIME_TIMESTAMP_FILE", file.to_owned()),
        ("FAKETIME_DONT_FAKE_MONOTONIC", "1".into()),
        ("FAKETIME_NO_CACHE", "1".into()),
        ("FAKETIME_DISABLE_SHM", "1".into()),
    ])
}

/// Finds libfaketime, and installs it where it is missing.
fn library() -> anyhow::Result<PathBuf> {
    if let Some(found) = installed() {
        return Ok(found);
    }
    if !rustix::process::geteuid().is_root() {
        bail!("install faketime (Debian), which these tests preload");
    }
    run(Command::new("apt-get")
        .args(["install", "-y", "-qq", "faketime"])
        .env("DEBIAN_FRONTEND", "noninteractive"))?;
    installed().context("apt-get installed faketime, and its library is not where Debian has it")
}

fn installed() -> Option<PathBuf> {
    LIBRARIES.iter().map(PathBuf::from).find(|path| path.exists())
}
