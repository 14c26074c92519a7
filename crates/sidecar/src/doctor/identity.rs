//! Who this node is: the identity directory.
//!
//! The key is read to see whether it belongs to the certificate; nothing of it
//! is ever in a message.

use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use fleet_kms_identity::{Directory, JoinToken, LoadError, StoredIdentity};
use rustls_pki_types::CertificateDer;

use super::AS_ROOT;
use super::report::{Check, CheckId};
use super::socket::{Listener, mode};
use crate::believed_time::BelievedTime;
use crate::config::Config;
use crate::errors::chain;
use crate::node_identity::NodeIdentity;

/// What a node without a usable identity needs.
pub(super) const ENROL: &str = "make a join token (`kmsctl node token --cluster CLUSTER --node NODE`) and give it to \
     `kms-sidecar enrol` on this node, or put it into the identity directory as the file `token`";

/// Files that nobody else may read.
const PRIVATE: [&str; 4] = ["key.pem", "key.pem.next", "key.pem.previous", "token"];
/// Files that the sidecar must be able to read.
const FILES: [&str; 8] = [
    "key.pem",
    "key.pem.next",
    "key.pem.previous",
    "chain.pem",
    "chain.pem.previous",
    "roots.pem",
    "state.json",
    "token",
];

/// What the identity directory holds.
#[derive(Default)]
pub(super) struct Node {
    /// Who this node is, if it is enrolled.
    pub(super) identity: Option<NodeIdentity>,
    /// Its chain, leaf first.
    pub(super) chain: Vec<CertificateDer<'static>>,
    /// The SHA-256 of the root that a waiting join token names.
    pub(super) token_root: Option<[u8; 32]>,
}

/// Reads the identity directory.
pub(super) fn examine(
    config: &Config,
    listener: Option<&Listener>,
    time: &BelievedTime,
) -> (Vec<Check>, Node) {
    let path = &config.identity_directory;
    let directory = match Directory::open(path) {
        Ok(directory) => directory,
        Err(error) => {
            let (id, message) = (CheckId::IdentityDirectory, chain(&error));
            let remedy = match error.source.kind() {
                io::ErrorKind::PermissionDenied => AS_ROOT.to_owned(),
                _ => format!(
                    "create it for the sidecar's user (install -d -m 0700 -o USER {})",
                    path.display()
                ),
            };
            return (vec![Check::fail(id, path.display(), message, remedy)], Node::default());
        }
    };
    let mut checks = vec![directory_access(path, listener)];
    checks.extend(file_access(path));
    let stored = directory.load();
    checks.push(enrolment(&directory, &stored));
    if let Err(error) = directory.state() {
        let remedy = "delete that file: all in it is learnt again from an agent";
        checks.push(Check::warn(CheckId::IdentityState, path.display(), chain(&error), remedy));
    }
    let mut node = Node { token_root: token_root(&directory), ..Node::default() };
    if let Ok(Some(stored)) = stored {
        node.chain = stored.chain;
        match NodeIdentity::load(&directory, &config.agents, time) {
            Ok(identity) => node.identity = identity,
            Err(error) => {
                checks.retain(|check| check.id != CheckId::Identity);
                checks.push(Check::fail(CheckId::Identity, path.display(), chain(&error), ENROL));
            }
        }
    }
    (checks, node)
}

fn directory_access(path: &Path, listener: Option<&Listener>) -> Check {
    let (id, subject) = (CheckId::IdentityDirectory, path.display());
    let metadata = match path.metadata() {
        Ok(metadata) => metadata,
        Err(error) => return Check::warn(id, subject, chain(&error), AS_ROOT),
    };
    let found = format!("mode {:04o}, owner {}", mode(&metadata), metadata.uid());
    if metadata.mode() & 0o022 != 0 {
        let message = format!("{found}: others can replace this node's key and roots");
        return Check::fail(id, &subject, message, format!("chmod go-w {subject}"));
    }
    let user = listener.filter(|listener| !listener.is_systemd()).map(|listener| listener.uid);
    match user.filter(|user| *user != 0 && *user != metadata.uid()) {
        Some(user) => {
            let message =
                format!("{found}, but the sidecar runs as user {user}: it cannot renew its certificate");
            Check::fail(id, &subject, message, format!("chown -R {user} {subject}"))
        }
        None => Check::ok(id, subject, found),
    }
}

/// One line about all files; none if there are none yet.
fn file_access(directory: &Path) -> Option<Check> {
    let (id, subject) = (CheckId::IdentityFiles, directory.display());
    let owner = directory.metadata().ok()?.uid();
    let (mut seen, mut open, mut foreign) = (0, Vec::new(), Vec::new());
    for name in FILES {
        let Ok(metadata) = directory.join(name).symlink_metadata() else { continue };
        seen += 1;
        if PRIVATE.contains(&name) && metadata.mode() & 0o077 != 0 {
            open.push(name);
        }
        if metadata.uid() != owner {
            foreign.push(name);
        }
    }
    if !open.is_empty() {
        let files = open.join(" ");
        let remedy = format!(
            "cd {subject} && chmod 0600 {files}; if others could have read a key, enrol this node again"
        );
        return Some(Check::fail(id, &subject, format!("{files}: others may read what is secret"), remedy));
    }
    if !foreign.is_empty() {
        let files = foreign.join(" ");
        let message = format!(
            "{files}: not the directory's owner {owner}, so the sidecar may not read or replace them"
        );
        return Some(Check::fail(id, &subject, message, format!("cd {subject} && chown {owner} {files}")));
    }
    (seen > 0).then(|| Check::ok(id, subject, "keys are private, and all files are the directory's owner's"))
}

fn enrolment(directory: &Directory, stored: &Result<Option<StoredIdentity>, LoadError>) -> Check {
    let (id, subject) = (CheckId::Identity, directory.path().display());
    match stored {
        Ok(Some(stored)) if stored.is_previous => {
            let message =
                format!("{}, by the certificate before the newest: that one is damaged", name(stored));
            Check::warn(id, subject, message, "keep the sidecar running: its next renewal repairs it")
        }
        Ok(Some(stored)) => Check::ok(id, subject, format!("enrolled as {}", name(stored))),
        Ok(None) => match directory.token() {
            Ok(Some(_)) => {
                let remedy =
                    "start kms-sidecar: it uses the token by itself, and its log says why it could not";
                Check::fail(id, subject, "not enrolled; a join token waits here", remedy)
            }
            Ok(None) => Check::fail(id, subject, "this node is not enrolled", ENROL),
            Err(error) => Check::fail(id, subject, chain(&error), AS_ROOT),
        },
        Err(LoadError::File(error)) if error.source.kind() == io::ErrorKind::PermissionDenied => {
            Check::fail(id, subject, chain(error), AS_ROOT)
        }
        Err(error) => Check::fail(id, subject, chain(error), ENROL),
    }
}

fn name(stored: &StoredIdentity) -> String {
    format!("{}, serial {}", stored.certificate.id(), stored.certificate.serial())
}

fn token_root(directory: &Directory) -> Option<[u8; 32]> {
    let token: JoinToken = directory.token().ok()??.trim().parse().ok()?;
    Some(*token.root_sha256())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::super::report::Status;
    use super::*;

    #[test]
    fn a_key_that_others_may_read_and_a_directory_that_others_may_write_fail() {
        let directory = tempfile::tempdir().unwrap();
        assert_eq!(file_access(directory.path()), None);
        let key = directory.path().join("key.pem");
        std::fs::write(&key, "x").unwrap();
        std::fs::set_permissions(&key, std::fs::Permissions::from_mode(0o640)).unwrap();
        let check = file_access(directory.path()).unwrap();
        assert_eq!(check.status, Status::Fail);
        assert!(check.remedy.unwrap().contains("chmod 0600 key.pem"));
        std::fs::set_permissions(&key, std::fs::Permissions::from_mode(0o600)).unwrap();
        assert_eq!(file_access(directory.path()).unwrap().status, Status::Ok);

        assert_eq!(directory_access(directory.path(), None).status, Status::Ok);
        std::fs::set_permissions(directory.path(), std::fs::Permissions::from_mode(0o770)).unwrap();
        assert_eq!(directory_access(directory.path(), None).status, Status::Fail);
    }
}
