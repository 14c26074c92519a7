//! One cluster of a fleet as it runs: its node's sidecar, its etcd and its API server.

use std::path::Path;

use anyhow::ensure;
use tempfile::TempDir;

use crate::apiserver::ApiServer;
use crate::encryption_config::EncryptionConfig;
use crate::etcd::Etcd;
use crate::fleet::{Fleet, Sidecar};
use crate::stored::Header;

/// A cluster whose Secrets go through our two programs.
pub struct ControlPlane {
    /// Its API server.
    pub api: ApiServer,
    /// Its etcd.
    pub etcd: Etcd,
    /// Its node's sidecar.
    pub sidecar: Sidecar,
    _dir: TempDir,
}

impl ControlPlane {
    /// Makes the cluster `name` in the fleet, enrols its node and starts everything.
    ///
    /// # Errors
    /// When something does not get ready.
    pub fn start(
        fleet: &Fleet,
        name: &str,
        encryption: impl FnOnce(&Path) -> EncryptionConfig,
    ) -> anyhow::Result<Self> {
        let sidecar = fleet.sidecar(&fleet.cluster(name)?, "node")?;
        let mut plane = Self::start_unready(sidecar, encryption)?;
        plane.api.wait_ready()?;
        Ok(plane)
    }

    /// Starts etcd and API server on a sidecar of the caller's making, and does not wait until KMS works.
    ///
    /// # Errors
    /// When the API server does not answer.
    pub fn start_unready(
        sidecar: Sidecar,
        encryption: impl FnOnce(&Path) -> EncryptionConfig,
    ) -> anyhow::Result<Self> {
        let dir = tempfile::tempdir()?;
        let etcd = Etcd::start(&dir.path().join("etcd"))?;
        let encryption = encryption(&sidecar.socket);
        let api = ApiServer::start_unready(&dir.path().join("kube"), &etcd, &encryption)?;
        Ok(Self { api, etcd, sidecar, _dir: dir })
    }

    /// Creates a Secret whose value is [`value_of`] its name.
    ///
    /// # Errors
    /// When the API server does not.
    pub fn create(&self, name: &str) -> anyhow::Result<()> {
        self.api.create_secret(name, &value_of(name))?.ok().map(drop)
    }

    /// Creates so many Secrets, and returns their names.
    ///
    /// # Errors
    /// When the API server does not.
    pub fn create_many(&self, count: usize) -> anyhow::Result<Vec<String>> {
        (0..count)
            .map(|number| format!("secret-{number}"))
            .map(|name| self.create(&name).map(|()| name))
            .collect()
    }

    /// Reads Secrets that were made by [`ControlPlane::create`].
    ///
    /// # Errors
    /// When one does not read, or reads differently.
    pub fn read_all<'a>(&self, names: impl IntoIterator<Item = &'a String>) -> anyhow::Result<()> {
        names.into_iter().try_for_each(|name| self.read(name))
    }

    /// Reads a Secret that was made by [`ControlPlane::create`].
    ///
    /// # Errors
    /// When it does not read, or reads differently.
    pub fn read(&self, name: &str) -> anyhow::Result<()> {
        let found = self.api.read_secret(name)?;
        ensure!(found == value_of(name), "{name} reads {found:?}");
        Ok(())
    }

    /// The header of the wrapped DEK of a Secret, from etcd.
    ///
    /// # Errors
    /// When etcd has no such Secret, or it is not encrypted by us.
    pub fn header(&self, name: &str) -> anyhow::Result<Header> {
        Header::of_stored(&self.etcd.secret("default", name)?)
    }
}

/// What a Secret of this name holds: long and strange enough to be found in etcd's bytes if it were there.
pub fn value_of(name: &str) -> String {
    format!("the value of {name}, 3f9c1d7e")
}
