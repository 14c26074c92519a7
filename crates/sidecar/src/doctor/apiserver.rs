//! How kube-apiserver is started on this node: by its static pod's manifest, or
//! as a process.
//!
//! A path in a flag is one inside kube-apiserver's container. Where that is on
//! this node is found by the pod's mounts, or through `/proc/PID/root`.

mod find;

use std::path::{Component, Path, PathBuf};

pub(super) use self::find::{find, read};

use super::report::{Check, CheckId};

/// The first minor version that refuses KMS v1 unless it is told otherwise.
const V1_OFF_SINCE: u32 = 29;

/// The first minor version whose unsafe deletion is on by default.
const UNSAFE_DELETE_SINCE: u32 = 37;

/// One kube-apiserver of this node.
#[derive(Debug)]
pub(super) struct Apiserver {
    /// The manifest or the process.
    pub(super) name: String,
    args: Vec<String>,
    /// The minor version that the image's tag names.
    minor: Option<u32>,
    files: Files,
}

#[derive(Debug)]
enum Files {
    Pod(Vec<Mount>),
    Process(PathBuf),
}

#[derive(Debug)]
struct Mount {
    inside: PathBuf,
    /// `None`: no file of this node, such as an emptyDir.
    outside: Option<PathBuf>,
}

/// Where a path of kube-apiserver's is on this node.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Place {
    /// At this path.
    Here(PathBuf),
    /// At this path, through the root of the process.
    InRoot(PathBuf),
    /// In a volume that only the pod has.
    PodOnly,
    /// In the container's image: nothing is mounted there.
    Image,
}

impl Apiserver {
    /// Returns a flag's value; the last one counts.
    pub(super) fn flag(&self, name: &'static str) -> Option<&str> {
        self.flags(name).last()
    }

    fn flags(&self, name: &'static str) -> impl Iterator<Item = &str> {
        self.args.iter().enumerate().filter_map(move |(position, arg)| {
            let arg = arg.strip_prefix("--").or_else(|| arg.strip_prefix('-'))?;
            match arg.split_once('=') {
                Some((flag, value)) => is_flag(flag, name).then_some(value),
                None => is_flag(arg, name).then(|| self.args.get(position + 1).map_or("", String::as_str)),
            }
        })
    }

    /// Returns what the flags say about a feature gate; several flags add up.
    fn gate(&self, name: &'static str) -> Option<bool> {
        self.flags("feature-gates")
            .flat_map(|gates| gates.split(','))
            .filter_map(|gate| gate.split_once('='))
            .filter(|(gate, _)| gate.trim() == name)
            .filter_map(|(_, value)| value.trim().parse().ok())
            .last()
    }

    /// Finds a path of kube-apiserver's on this node.
    pub(super) fn locate(&self, path: &Path) -> Place {
        match &self.files {
            Files::Process(root) => {
                let inside = path.components().filter(|part| *part != Component::RootDir);
                Place::InRoot(inside.fold(root.clone(), |root, part| root.join(part)))
            }
            Files::Pod(mounts) => {
                let covering = mounts.iter().filter(|mount| path.starts_with(&mount.inside));
                match covering.max_by_key(|mount| mount.inside.components().count()) {
                    None => Place::Image,
                    Some(Mount { outside: None, .. }) => Place::PodOnly,
                    Some(Mount { inside, outside: Some(outside) }) => {
                        let below = path.strip_prefix(inside).unwrap_or(Path::new(""));
                        // `join` of nothing would add a slash, which makes a file a directory.
                        let is_all = below.as_os_str().is_empty();
                        Place::Here(if is_all { outside.clone() } else { outside.join(below) })
                    }
                }
            }
        }
    }

    /// Judges whether KMS v1 is allowed, where it is used.
    pub(super) fn kms_v1(&self) -> Check {
        let (id, name) = (CheckId::ApiserverKmsV1, &self.name);
        let remedy = "add --feature-gates=KMSv1=true to kube-apiserver's flags";
        match (self.gate("KMSv1"), self.minor) {
            (Some(true), _) => Check::ok(id, name, "the feature gate KMSv1 is on"),
            (Some(false), _) => {
                Check::fail(id, name, "the feature gate KMSv1 is off: it cannot start", remedy)
            }
            (None, Some(minor)) if minor < V1_OFF_SINCE => {
                Check::ok(id, name, format!("Kubernetes 1.{minor} has KMS v1 on"))
            }
            (None, Some(minor)) => {
                let message = format!("Kubernetes 1.{minor} does not start with a KMS v1 provider by itself");
                Check::fail(id, name, message, remedy)
            }
            (None, None) => {
                let message = "the feature gate KMSv1 is not set, and from Kubernetes 1.29 on it must be";
                Check::warn(id, name, message, remedy)
            }
        }
    }

    /// Judges how easily live data could be deleted during an outage.
    pub(super) fn unsafe_delete(&self) -> Check {
        const GATE: &str = "AllowUnsafeMalformedObjectDeletion";
        let (id, name) = (CheckId::ApiserverUnsafeDelete, &self.name);
        let danger = "during a KMS outage every encrypted object counts as malformed";
        match (self.gate(GATE), self.minor) {
            (Some(true), _) => {
                let message =
                    format!("{GATE} is on: {danger}, and a frightened operator can delete live data");
                Check::warn(id, name, message, format!("set --feature-gates={GATE}=false until it is needed"))
            }
            (None, Some(minor)) if minor >= UNSAFE_DELETE_SINCE => {
                let message = format!(
                    "{GATE} is on by default in Kubernetes 1.{minor}: {danger}; never delete one then"
                );
                Check::ok(id, name, message)
            }
            (None, None) => {
                let message = format!(
                    "{GATE} is on by default from Kubernetes 1.37 on: {danger}; never delete one then"
                );
                Check::ok(id, name, message)
            }
            (Some(false), _) | (None, Some(_)) => Check::ok(id, name, format!("{GATE} is off")),
        }
    }
}

/// kube-apiserver takes `_` for `-`.
fn is_flag(written: &str, name: &str) -> bool {
    written.replace('_', "-") == name
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::super::report::Status;
    use super::*;

    const POD: &str = "
kind: Pod
spec:
  containers:
  - name: kube-apiserver
    image: registry.k8s.io/kube-apiserver:v1.37.2@sha256:00
    command: [kube-apiserver, --encryption-provider-config=/etc/kubernetes/enc/config.yaml]
    args: [--feature_gates=A=true, --feature-gates, 'KMSv1=true,B=false']
    volumeMounts:
    - {name: enc, mountPath: /etc/kubernetes/enc}
    - {name: enc-file, mountPath: /etc/kubernetes/enc/config.yaml}
    - {name: run, mountPath: /run/fleet-kms}
  volumes:
  - {name: enc, hostPath: {path: /srv/enc}}
  - {name: enc-file, hostPath: {path: /srv/other.yaml, type: File}}
  - {name: run, emptyDir: {}}
";

    fn apiserver(pod: &str) -> Apiserver {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("kube-apiserver.yaml");
        fs::write(&path, pod).unwrap();
        find(Some(&path), Path::new("/nowhere")).unwrap().remove(0)
    }

    #[test]
    fn flags_and_gates_are_read_in_every_spelling() {
        let apiserver = apiserver(POD);
        assert_eq!(apiserver.flag("encryption-provider-config"), Some("/etc/kubernetes/enc/config.yaml"));
        assert_eq!((apiserver.gate("A"), apiserver.gate("B")), (Some(true), Some(false)));
        assert_eq!(apiserver.kms_v1().status, Status::Ok);
        assert_eq!(apiserver.flag("no-such-flag"), None);
    }

    #[test]
    fn a_path_is_found_on_the_node_by_the_innermost_mount() {
        let apiserver = apiserver(POD);
        let locate = |path: &str| apiserver.locate(Path::new(path));
        assert_eq!(locate("/etc/kubernetes/enc/x.yaml"), Place::Here("/srv/enc/x.yaml".into()));
        assert_eq!(locate("/etc/kubernetes/enc/config.yaml"), Place::Here("/srv/other.yaml".into()));
        assert_eq!(locate("/run/fleet-kms/kms.sock"), Place::PodOnly);
        assert_eq!(locate("/run/other/kms.sock"), Place::Image);
    }

    #[test]
    fn the_gate_is_missed_from_1_29_on() {
        let judged = |image: &str| {
            let pod = POD
                .replace("KMSv1=true,", "")
                .replace("registry.k8s.io/kube-apiserver:v1.37.2@sha256:00", image);
            apiserver(&pod).kms_v1().status
        };
        assert_eq!(judged("localhost:5000/kube-apiserver:v1.29.0"), Status::Fail);
        assert_eq!(judged("kube-apiserver:v1.28.15"), Status::Ok);
        assert_eq!(judged("localhost:5000/kube-apiserver"), Status::Warn);
        assert_eq!(apiserver(&POD.replace("KMSv1=true", "KMSv1=false")).kms_v1().status, Status::Fail);
    }

    #[test]
    fn an_unsafe_deletion_that_somebody_switched_on_is_named() {
        assert!(apiserver(POD).unsafe_delete().message.contains("on by default"));
        let on = apiserver(&POD.replace("A=true", "AllowUnsafeMalformedObjectDeletion=true"));
        assert_eq!(on.unsafe_delete().status, Status::Warn);
    }
}
