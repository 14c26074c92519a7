//! Our own programs, as cargo built them.

use std::path::PathBuf;

use anyhow::{Context, ensure};

/// One of our programs.
#[derive(Debug, Clone, Copy)]
pub enum Program {
    /// `kms-agent`.
    Agent,
    /// `kms-sidecar`.
    Sidecar,
    /// `kmsctl`.
    Ctl,
}

impl Program {
    /// Where it is: `FLEET_KMS_BIN`, or beside the test program that cargo built in the same run.
    ///
    /// # Errors
    /// When it was not built.
    pub fn path(self) -> anyhow::Result<PathBuf> {
        let name = match self {
            Self::Agent => "kms-agent",
            Self::Sidecar => "kms-sidecar",
            Self::Ctl => "kmsctl",
        };
        let directory = match std::env::var_os("FLEET_KMS_BIN") {
            Some(directory) => PathBuf::from(directory),
            None => {
                let own = std::env::current_exe()?;
                let folder = own.parent().context("a program lives in a folder")?;
                // A test lives in target/<profile>/deps, a benchmark beside the programs.
                let profile = if folder.ends_with("deps") { folder.parent() } else { Some(folder) };
                profile.context("a test lives in target/<profile>/deps")?.to_owned()
            }
        };
        let path = directory.join(name);
        ensure!(path.exists(), "{} is not there; run cargo build --workspace first", path.display());
        Ok(path)
    }
}
