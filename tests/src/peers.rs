//! Where the real peers are. The scripts in `tests/peers` find or build them; this asks each script once.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{LazyLock, Mutex};

use anyhow::{Context, anyhow};

use crate::child;

/// Selects another pinned version of kube-apiserver than the default one, for the version matrix.
const VERSION_VARIABLE: &str = "FLEET_KMS_KUBE_VERSION";

/// The programs of a real control plane.
#[derive(Clone, Debug)]
pub struct Peers {
    /// kube-apiserver, exactly the pinned version.
    pub kube_apiserver: PathBuf,
    /// etcd.
    pub etcd: PathBuf,
    /// etcdctl.
    pub etcdctl: PathBuf,
    /// kubectl.
    pub kubectl: PathBuf,
}

/// Finds or builds the programs. The first call on a new machine takes minutes.
///
/// # Errors
/// When a program is missing and cannot be built, with what the build said.
pub fn peers() -> anyhow::Result<Peers> {
    static PEERS: LazyLock<Result<Peers, String>> =
        LazyLock::new(|| find_peers().map_err(|error| format!("{error:?}")));
    PEERS.clone().map_err(|error| anyhow!(error))
}

/// The version of kube-apiserver's client code that `kms-client` is built with.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ClientVersion {
    /// Kubernetes 1.28: names the raw socket path as `:authority`.
    V0_28_3,
    /// Kubernetes 1.31: the percent-encoded socket path, in v2 too.
    V0_31_14,
    /// Kubernetes 1.37: the percent-encoded socket path in v1, `localhost` in v2.
    V0_37_2,
}

impl ClientVersion {
    /// Every version the tests run with.
    pub const ALL: [Self; 3] = [Self::V0_28_3, Self::V0_31_14, Self::V0_37_2];

    fn as_str(self) -> &'static str {
        match self {
            Self::V0_28_3 => "v0.28.3",
            Self::V0_31_14 => "v0.31.14",
            Self::V0_37_2 => "v0.37.2",
        }
    }
}

/// Builds `kms-client` (`tests/peers/kms-client`) unless it is in the cache.
///
/// # Errors
/// When it cannot be built, with what the build said.
pub fn kms_client(version: ClientVersion) -> anyhow::Result<PathBuf> {
    static BUILT: LazyLock<Mutex<HashMap<ClientVersion, PathBuf>>> = LazyLock::new(Mutex::default);
    let mut built = BUILT.lock().map_err(|_| anyhow!("an earlier build panicked"))?;
    if let Some(path) = built.get(&version) {
        return Ok(path.clone());
    }
    let script = scripts().join("kms-client/build.sh");
    let path = PathBuf::from(child::run(Command::new(script).arg(version.as_str()))?.trim());
    built.insert(version, path.clone());
    Ok(path)
}

fn find_peers() -> anyhow::Result<Peers> {
    let mut command = Command::new(scripts().join("build.sh"));
    command.args(std::env::var_os(VERSION_VARIABLE));
    let output = child::run(&mut command)?;
    let path = |name: &str| {
        output
            .lines()
            .find_map(|line| line.strip_prefix(name)?.strip_prefix('='))
            .map(PathBuf::from)
            .with_context(|| format!("build.sh did not name {name}"))
    };
    Ok(Peers {
        kube_apiserver: path("KUBE_APISERVER")?,
        etcd: path("ETCD")?,
        etcdctl: path("ETCDCTL")?,
        kubectl: path("KUBECTL")?,
    })
}

fn scripts() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("peers")
}
