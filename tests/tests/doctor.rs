//! `kms-sidecar doctor` on nodes that are well, and on nodes with one thing wrong.
//!
//! All tests but one name kube-apiserver's manifest: this machine may run API servers of others.

#![expect(clippy::indexing_slicing, reason = "a test: a wrong index fails it")]

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use anyhow::{Context, ensure};
use fleet_kms_tests::control_plane::ControlPlane;
use fleet_kms_tests::encryption_config::EncryptionConfig;
use fleet_kms_tests::fleet::{Cluster, Fleet, Sidecar};
use fleet_kms_tests::programs::Program;
use serde_json::Value;

const LIBFAKETIME: [&str; 2] = [
    "/usr/lib/x86_64-linux-gnu/faketime/libfaketimeMT.so.1",
    "/usr/lib/aarch64-linux-gnu/faketime/libfaketimeMT.so.1",
];

/// A node, and what its kubelet was given.
struct Node {
    sidecar: Sidecar,
    manifest: PathBuf,
    encryption: PathBuf,
}

impl Node {
    /// Enrolled, running, with the EncryptionConfiguration that we ship.
    fn healthy(fleet: &Fleet) -> anyhow::Result<Self> {
        Self::of(fleet.sidecar(&fleet.cluster("alpha")?, "node")?)
    }

    /// Laid out, and nothing more.
    fn bare(fleet: &Fleet) -> anyhow::Result<(Self, Cluster)> {
        let cluster = fleet.cluster("alpha")?;
        Ok((Self::of(fleet.unenrolled_sidecar(&cluster, "node")?)?, cluster))
    }

    fn of(sidecar: Sidecar) -> anyhow::Result<Self> {
        let directory = sidecar.config.parent().context("a directory")?.to_owned();
        let run = sidecar.socket.parent().context("a directory")?;
        let (manifest, encryption) =
            (directory.join("kube-apiserver.yaml"), directory.join("encryption.yaml"));
        // In the pod the paths are other ones, as on a real node.
        let socket = Path::new("/run/fleet-kms/kms.sock");
        fs::write(&encryption, EncryptionConfig::shipped("v1", socket)?.to_yaml())?;
        fs::write(&manifest, manifest_of(run, &directory))?;
        Ok(Self { sidecar, manifest, encryption })
    }

    fn command(&self) -> anyhow::Result<Command> {
        let mut doctor = Command::new(Program::Sidecar.path()?);
        doctor.arg("doctor").arg("--config").arg(&self.sidecar.config);
        doctor.arg("--apiserver-manifest").arg(&self.manifest).stdin(Stdio::null());
        Ok(doctor)
    }

    fn examine(&self) -> anyhow::Result<Report> {
        Report::of(self.command()?.args(["-o", "json"]))
    }

    fn change(&self, file: &Path, from: &str, to: &str) -> anyhow::Result<()> {
        let text = fs::read_to_string(file)?;
        ensure!(text.contains(from), "no {from:?} in {text}");
        Ok(fs::write(file, text.replacen(from, to, 1))?)
    }
}

fn manifest_of(run: &Path, directory: &Path) -> String {
    format!(
        "apiVersion: v1\nkind: Pod\nmetadata: {{name: kube-apiserver, namespace: kube-system}}\nspec:\n  containers:\n\
         \x20 - name: kube-apiserver\n    image: kube-apiserver:v1.37.2\n    command:\n    - kube-apiserver\n\
         \x20   - --encryption-provider-config=/etc/kms/encryption.yaml\n    - --feature-gates=KMSv1=true\n\
         \x20   volumeMounts:\n    - {{name: run, mountPath: /run/fleet-kms}}\n\
         \x20   - {{name: enc, mountPath: /etc/kms}}\n  volumes:\n\
         \x20 - {{name: run, hostPath: {{path: {}}}}}\n  - {{name: enc, hostPath: {{path: {}}}}}\n",
        run.display(),
        directory.display()
    )
}

/// Lets a program believe that it is `ahead` seconds later.
fn faketime(ahead: i64) -> anyhow::Result<Vec<(&'static str, String)>> {
    let library = LIBFAKETIME.into_iter().find(|path| Path::new(path).exists());
    Ok(vec![
        ("LD_PRELOAD", library.context("install faketime (Debian)")?.to_owned()),
        ("FAKETIME", format!("{ahead:+}")),
        ("FAKETIME_DONT_FAKE_MONOTONIC", "1".to_owned()),
        ("FAKETIME_DISABLE_SHM", "1".to_owned()),
    ])
}

struct Report {
    code: Option<i32>,
    json: Value,
}

impl Report {
    fn of(doctor: &mut Command) -> anyhow::Result<Self> {
        let output: Output = doctor.output()?;
        let text = String::from_utf8_lossy(&output.stdout);
        println!("{text}{}", String::from_utf8_lossy(&output.stderr));
        Ok(Self { code: output.status.code(), json: serde_json::from_str(&text)? })
    }

    /// What is not ok, as `status id`.
    fn problems(&self) -> Vec<String> {
        let field = |check: &Value, name: &str| check[name].as_str().unwrap_or_default().to_owned();
        let checks = self.json["checks"].as_array().into_iter().flatten();
        checks
            .filter(|check| check["status"] != "ok")
            .inspect(|check| assert!(check["remedy"].is_string(), "{check}"))
            .map(|check| format!("{} {}", field(check, "status"), field(check, "id")))
            .collect()
    }

    fn message(&self, id: &str) -> String {
        let checks = self.json["checks"].as_array().into_iter().flatten();
        let found = checks.filter(|check| check["id"] == id).filter_map(|check| check["message"].as_str());
        found.collect::<Vec<_>>().join("\n")
    }
}

#[test]
fn a_healthy_node_is_ok_in_every_line_and_nothing_secret_is_printed() -> anyhow::Result<()> {
    let fleet = Fleet::start()?;
    let node = Node::healthy(&fleet)?;
    let report = node.examine()?;
    assert_eq!(report.problems(), [""; 0]);
    assert_eq!((report.code, report.json["status"].as_str()), (Some(0), Some("ok")));
    for id in ["socket_access", "clock", "certificate_chain", "agent_unwrap", "encryption_endpoint"] {
        assert!(!report.message(id).is_empty(), "no line {id}");
    }

    let output = node.command()?.output()?;
    let text = String::from_utf8(output.stdout)?;
    assert!(output.status.success() && text.contains("0 warn, 0 fail"), "{text}");
    for file in ["key.pem", "chain.pem", "roots.pem"] {
        let secret = fs::read_to_string(node.sidecar.identity.join(file))?;
        let line = secret.lines().nth(1).context("a PEM file")?;
        assert!(!text.contains(line) && !report.json.to_string().contains(line), "{file} is printed");
    }
    Ok(())
}

#[test]
fn a_stopped_agent_fails_at_its_port_and_nobody_is_told_to_delete_anything() -> anyhow::Result<()> {
    let mut fleet = Fleet::start()?;
    let node = Node::healthy(&fleet)?;
    fleet.agent.stop()?;
    let report = node.examine()?;
    assert_eq!(report.problems(), ["fail agent_time", "warn clock", "fail agent_tcp"]);
    assert_eq!(report.code, Some(1));
    assert!(report.json["notes"].to_string().contains("Do not delete them"));
    assert!(report.message("agent_dns").contains("an IP address"));
    Ok(())
}

#[test]
fn a_banned_node_is_told_so() -> anyhow::Result<()> {
    let fleet = Fleet::start()?;
    let node = Node::healthy(&fleet)?;
    fleet.kmsctl(&["node", "ban", "node", "--cluster", "alpha", "--yes"])?;
    let report = node.examine()?;
    assert!(report.problems().contains(&"fail agent_authorization".to_owned()), "{:?}", report.problems());
    assert!(report.message("agent_authorization").contains("banned"));
    Ok(())
}

#[test]
fn a_wrong_clock_is_a_warning_because_the_agents_are_believed() -> anyhow::Result<()> {
    let fleet = Fleet::start()?;
    let node = Node::healthy(&fleet)?;
    for (ahead, said) in [(400 * 86_400, "400 days ahead"), (-7_210, "2 hours behind")] {
        // By this clock the certificate has expired or is yet to come; by the believed time it is valid.
        let report = Report::of(node.command()?.args(["-o", "json"]).envs(faketime(ahead)?))?;
        assert_eq!(report.problems(), ["warn clock"]);
        assert!(report.message("clock").contains(said), "{}", report.message("clock"));
        assert_eq!(report.code, Some(0));
    }
    Ok(())
}

#[test]
fn an_expired_certificate_is_told_with_its_age() -> anyhow::Result<()> {
    let mut fleet = Fleet::start()?;
    let (node, cluster) = Node::bare(&fleet)?;
    node.sidecar.enrol(&fleet.token(&cluster, "node")?)?;
    fleet.agent.stop()?;
    // The whole fleet is 30 days later; this node's sidecar was off.
    let later = faketime(30 * 86_400)?;
    fleet.agent.respec(|spec| later.iter().fold(spec, |spec, (name, value)| spec.env(name, value)));
    fleet.agent.start()?;
    let report = Report::of(node.command()?.args(["-o", "json"]).envs(later.clone()))?;
    let problems = report.problems();
    assert!(problems.contains(&"fail certificate_dates".to_owned()), "{problems:?}");
    assert!(problems.contains(&"fail agent_admission".to_owned()), "{problems:?}");
    assert!(!problems.iter().any(|problem| problem.ends_with("clock")), "{problems:?}");
    assert!(
        report.message("certificate_dates").contains("expired 23 days ago"),
        "{report}",
        report = report.json
    );
    Ok(())
}

#[test]
fn a_node_without_identity_socket_or_flag_hears_of_each() -> anyhow::Result<()> {
    let fleet = Fleet::start()?;
    let (node, cluster) = Node::bare(&fleet)?;
    node.change(&node.manifest, "--encryption-provider-config=", "--something-else=")?;
    let report = node.examine()?;
    assert_eq!(report.problems(), ["fail socket_path", "fail identity", "fail apiserver_flag"]);
    // Without a root there is nothing to judge an agent by, but that it answers.
    assert!(report.message("agent_tls").contains("answers TLS 1.3"), "{}", report.json);

    // With a token there is one; the token itself is not printed.
    let token = fleet.token(&cluster, "node")?;
    let file = node.sidecar.identity.join("token");
    fs::write(&file, &token)?;
    fs::set_permissions(&file, fs::Permissions::from_mode(0o400))?;
    let report = node.examine()?;
    assert!(report.message("identity").contains("a join token waits here"));
    assert!(report.message("agent_tls").contains("/agent/agent-1"), "{}", report.json);
    assert!(!report.json.to_string().contains(&token));
    Ok(())
}

#[test]
fn a_socket_with_another_mode_and_a_key_that_others_can_read_fail() -> anyhow::Result<()> {
    let fleet = Fleet::start()?;
    let node = Node::healthy(&fleet)?;
    fs::set_permissions(&node.sidecar.socket, fs::Permissions::from_mode(0o666))?;
    fs::set_permissions(node.sidecar.identity.join("key.pem"), fs::Permissions::from_mode(0o644))?;
    let report = node.examine()?;
    assert_eq!(report.problems(), ["fail socket_access", "fail identity_files"]);
    Ok(())
}

#[test]
fn each_mistake_in_kube_apiservers_files_is_found() -> anyhow::Result<()> {
    let fleet = Fleet::start()?;
    let node = Node::healthy(&fleet)?;
    let (encryption, manifest) = (fs::read(&node.encryption)?, fs::read(&node.manifest)?);
    for (file, from, to, problem) in [
        (&node.encryption, "kms.sock", "other.sock", "fail encryption_endpoint"),
        (&node.encryption, "cachesize: 20000", "cachesize: 1000", "warn encryption_cache"),
        (&node.encryption, "providers:", "providers:\n      - identity: {}", "fail encryption_order"),
        (&node.encryption, "- secrets", "- configmaps", "fail encryption_resources"),
        (&node.encryption, "providers:", "providers: {", "fail encryption_config"),
        (&node.manifest, "KMSv1=true", "KMSv2=true", "fail apiserver_kms_v1"),
        (&node.manifest, "mountPath: /run/fleet-kms", "mountPath: /run/x", "fail encryption_endpoint"),
        (&node.manifest, "mountPath: /etc/kms", "mountPath: /etc/x", "fail encryption_config"),
    ] {
        node.change(file, from, to)?;
        let report = node.examine()?;
        assert_eq!(report.problems(), [problem], "{from} -> {to}");
        fs::write(&node.encryption, &encryption)?;
        fs::write(&node.manifest, &manifest)?;
    }

    // What cannot be parsed may be a key of another provider.
    let key = "c2VjcmV0IGlzIHNlY3VyZQ==";
    node.change(&node.encryption, "cachesize: 20000", &format!("cachesize: {key}"))?;
    let report = node.examine()?;
    assert_eq!(report.problems(), ["fail encryption_config"]);
    assert!(!report.json.to_string().contains(key));
    Ok(())
}

#[test]
fn a_running_kube_apiserver_is_found_without_a_manifest() -> anyhow::Result<()> {
    let fleet = Fleet::start()?;
    let plane = ControlPlane::start(&fleet, "alpha", EncryptionConfig::v1)?;
    let mut doctor = Command::new(Program::Sidecar.path()?);
    doctor.arg("doctor").arg("--config").arg(&plane.sidecar.config).args(["-o", "json"]);
    let report = Report::of(doctor.stdin(Stdio::null()))?;
    // Only this one has our socket as its endpoint.
    assert!(report.message("encryption_endpoint").contains("has this socket as its endpoint"));
    plane.create("afterwards")
}

#[test]
fn a_wrong_configuration_ends_with_64_before_anything_is_looked_at() -> anyhow::Result<()> {
    let directory = tempfile::tempdir()?;
    let config = directory.path().join("sidecar.toml");
    fs::write(&config, "socket.path = 'relative'")?;
    let output =
        Command::new(Program::Sidecar.path()?).arg("doctor").arg("--config").arg(&config).output()?;
    assert_eq!(output.status.code(), Some(64));
    assert!(output.stdout.is_empty());
    Ok(())
}
