//! Where kube-apiserver's flags are: in its static pod's manifest, or in a
//! process's command line.

use std::fs;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use serde::Deserialize;
use zeroize::Zeroizing;

use super::super::report::{Check, CheckId};
use super::{Apiserver, Files, Mount};
use crate::errors::chain;

/// Where kubeadm puts the manifest.
const MANIFEST: &str = "/etc/kubernetes/manifests/kube-apiserver.yaml";

/// The most bytes of a manifest or of an EncryptionConfiguration.
const MAX_FILE: u64 = 1 << 20;

/// Finds kube-apiserver: in the manifest if there is one, else among the
/// processes.
pub(in crate::doctor) fn find(manifest: Option<&Path>, processes: &Path) -> Result<Vec<Apiserver>, Check> {
    let path = manifest.unwrap_or(Path::new(MANIFEST));
    let found = from_manifest(path);
    match found {
        Ok(apiserver) => return Ok(vec![apiserver]),
        Err(message) if manifest.is_some() => {
            let remedy = "correct --apiserver-manifest";
            return Err(Check::fail(CheckId::Apiserver, path.display(), message, remedy));
        }
        Err(_) => {}
    }
    let running = running(processes);
    if running.is_empty() {
        let message =
            "no kube-apiserver is seen from here: its flags and its EncryptionConfiguration are not checked";
        let remedy = "run doctor as root on the node itself, or name the static pod's manifest with --apiserver-manifest";
        return Err(Check::warn(CheckId::Apiserver, path.display(), message, remedy));
    }
    Ok(running)
}

/// Reads a whole file of at most [`MAX_FILE`] bytes. An EncryptionConfiguration
/// may hold keys.
pub(in crate::doctor) fn read(path: &Path) -> io::Result<Zeroizing<String>> {
    let mut text = Zeroizing::new(String::new());
    fs::File::open(path)?.take(MAX_FILE).read_to_string(&mut text)?;
    Ok(text)
}

#[derive(Deserialize)]
struct Pod {
    spec: Spec,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Spec {
    containers: Vec<Container>,
    #[serde(default)]
    volumes: Vec<Volume>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase", default)]
#[derive(Default)]
struct Container {
    name: String,
    image: String,
    command: Vec<String>,
    args: Vec<String>,
    volume_mounts: Vec<VolumeMount>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct VolumeMount {
    name: String,
    mount_path: PathBuf,
    sub_path: Option<PathBuf>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Volume {
    name: String,
    host_path: Option<HostPath>,
}

#[derive(Deserialize)]
struct HostPath {
    path: PathBuf,
}

fn from_manifest(path: &Path) -> Result<Apiserver, String> {
    let text = read(path).map_err(|error| chain(&error))?;
    let pod: Pod = serde_saphyr::from_str(&text).map_err(|error| {
        let line = error.location().map(|location| location.line()).unwrap_or_default();
        format!("is no pod: line {line} cannot be parsed")
    })?;
    let is_apiserver = |container: &Container| {
        container.name == "kube-apiserver"
            || container.command.first().is_some_and(|program| is_program(program))
    };
    let container =
        pod.spec.containers.into_iter().find(is_apiserver).ok_or("has no kube-apiserver container")?;
    let outside = |mount: &VolumeMount| {
        let volume = pod.spec.volumes.iter().find(|volume| volume.name == mount.name)?;
        let path = &volume.host_path.as_ref()?.path;
        Some(mount.sub_path.as_ref().map_or_else(|| path.clone(), |below| path.join(below)))
    };
    let mounts = container.volume_mounts.iter();
    let mounts =
        mounts.map(|mount| Mount { inside: mount.mount_path.clone(), outside: outside(mount) }).collect();
    Ok(Apiserver {
        name: path.display().to_string(),
        minor: minor_version(&container.image),
        args: container.command.into_iter().chain(container.args).collect(),
        files: Files::Pod(mounts),
    })
}

/// Looks through `/proc`. A process whose command line is another's business
/// is passed over.
fn running(processes: &Path) -> Vec<Apiserver> {
    let Ok(entries) = fs::read_dir(processes) else { return Vec::new() };
    let mut found: Vec<(u32, Apiserver)> = entries
        .filter_map(|entry| {
            let directory = entry.ok()?.path();
            let pid: u32 = directory.file_name()?.to_str()?.parse().ok()?;
            let line = fs::read(directory.join("cmdline")).ok()?;
            let args: Vec<String> =
                line.split(|byte| *byte == 0).map(|arg| String::from_utf8_lossy(arg).into_owned()).collect();
            is_program(args.first()?).then(|| {
                let files = Files::Process(directory.join("root"));
                (pid, Apiserver { name: format!("process {pid}"), args, minor: None, files })
            })
        })
        .collect();
    found.sort_by_key(|(pid, _)| *pid);
    found.into_iter().map(|(_, apiserver)| apiserver).collect()
}

fn is_program(path: &str) -> bool {
    Path::new(path).file_name().is_some_and(|name| name == "kube-apiserver")
}

/// Reads 37 from `registry.k8s.io/kube-apiserver:v1.37.2@sha256:…`.
fn minor_version(image: &str) -> Option<u32> {
    let image = image.split('@').next()?;
    let (_, tag) = image.rsplit('/').next()?.split_once(':')?;
    let mut numbers = tag.strip_prefix('v').unwrap_or(tag).split('.');
    (numbers.next()? == "1").then(|| numbers.next()?.parse().ok())?
}

#[cfg(test)]
mod tests {
    use super::super::super::report::Status;
    use super::super::Place;
    use super::*;

    #[test]
    fn a_process_is_found_by_its_program_and_its_files_by_its_root() {
        let proc = tempfile::tempdir().unwrap();
        for (pid, line) in [
            ("12", &b"/usr/bin/kube-apiserver\0--encryption-provider-config\0/etc/e.yaml\0"[..]),
            ("13", &b"/usr/bin/kubelet\0"[..]),
            ("self", &b"kube-apiserver\0"[..]),
        ] {
            fs::create_dir(proc.path().join(pid)).unwrap();
            fs::write(proc.path().join(pid).join("cmdline"), line).unwrap();
        }
        let found = running(proc.path());
        assert_eq!(found.len(), 1);
        assert_eq!(found[0].flag("encryption-provider-config"), Some("/etc/e.yaml"));
        assert_eq!(
            found[0].locate(Path::new("/etc/e.yaml")),
            Place::InRoot(proc.path().join("12/root/etc/e.yaml"))
        );
    }

    #[test]
    fn without_a_kube_apiserver_nothing_fails_unless_one_was_named() {
        let directory = tempfile::tempdir().unwrap();
        let missing = directory.path().join("missing.yaml");
        assert_eq!(find(Some(&missing), directory.path()).unwrap_err().status, Status::Fail);
    }
}
