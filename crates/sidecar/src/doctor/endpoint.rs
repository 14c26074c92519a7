//! Whether the endpoint of a KMS provider is this node's socket.

use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use super::apiserver::{Apiserver, Place};

/// Where an endpoint leads.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Leads {
    /// To our socket.
    Here,
    /// To another path of this node.
    Elsewhere,
    /// Nowhere: its directory is not mounted into kube-apiserver's pod.
    Nowhere,
    /// It is no path of a unix socket.
    NoPath,
}

/// Follows an endpoint through kube-apiserver's mounts.
pub(super) fn leads(apiserver: &Apiserver, endpoint: &str, socket: &Path) -> Leads {
    let Some(path) = endpoint_path(endpoint) else { return Leads::NoPath };
    let is_ours = match apiserver.locate(&path) {
        Place::Image => return Leads::Nowhere,
        // Then the sidecar is in the pod too, and both have the same path.
        Place::PodOnly => path == socket,
        Place::Here(here) => here == socket || is_same_file(&here, socket),
        Place::InRoot(here) => {
            is_same_file(&here, socket) || (path == socket && cannot_compare(&here, socket))
        }
    };
    if is_ours { Leads::Here } else { Leads::Elsewhere }
}

/// As Go's URL parser does it: what stands before the first slash is a host,
/// and kube-apiserver ignores it.
pub(super) fn endpoint_path(endpoint: &str) -> Option<PathBuf> {
    let rest = endpoint.strip_prefix("unix:")?;
    let path = match rest.strip_prefix("//") {
        Some(after) => after.get(after.find('/')?..)?,
        None => rest,
    };
    (path.starts_with('/') && !path.starts_with("/@")).then(|| PathBuf::from(path))
}

fn is_same_file(one: &Path, other: &Path) -> bool {
    let id = |path: &Path| path.metadata().ok().map(|metadata| (metadata.dev(), metadata.ino()));
    id(one).is_some_and(|one| id(other) == Some(one))
}

/// Without a socket, or a right to look into the process's root, the paths must
/// do.
fn cannot_compare(here: &Path, socket: &Path) -> bool {
    let is_hidden = |error: io::Error| error.kind() == io::ErrorKind::PermissionDenied;
    !socket.exists() || here.metadata().is_err_and(is_hidden)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn without_a_socket_a_process_is_judged_by_the_path() {
        let root = tempfile::tempdir().unwrap();
        let (here, socket) = (root.path().join("root/kms.sock"), root.path().join("kms.sock"));
        assert!(cannot_compare(&here, &socket));
        std::fs::write(&socket, "").unwrap();
        assert!(!cannot_compare(&here, &socket), "the process does not see what is there");
    }

    #[test]
    fn an_endpoint_is_read_as_kube_apiserver_reads_it() {
        assert_eq!(endpoint_path("unix:///run/kms.sock"), Some("/run/kms.sock".into()));
        assert_eq!(endpoint_path("unix://run/kms.sock"), Some("/kms.sock".into()));
        assert_eq!(endpoint_path("unix:/run/kms.sock"), Some("/run/kms.sock".into()));
        for none in ["unix:///@kms.sock", "unix://", "/run/kms.sock", "http:///run/kms.sock"] {
            assert_eq!(endpoint_path(none), None, "{none}");
        }
    }
}
