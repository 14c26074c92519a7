//! What the shipped manifests and units must have for a node to come back from power-off by itself, and that the
//! programs they are written for take every shipped file.
#![expect(clippy::indexing_slicing, reason = "a test: a wrong index fails it")]

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::Context;
use fleet_kms_tests::child::run;
use fleet_kms_tests::control_plane::ControlPlane;
use fleet_kms_tests::encryption_config::EncryptionConfig;
use fleet_kms_tests::fleet::Fleet;
use fleet_kms_tests::kms_client::{Api, KmsClient, Outcome};
use fleet_kms_tests::peers::ClientVersion;
use fleet_kms_tests::programs::Program;
use fleet_kms_tests::wait;
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

const PODS: [&str; 2] = ["kms-sidecar.static-pod.yaml", "kube-apiserver.native-sidecar.yaml"];

fn shipped(path: &str) -> String {
    let file = PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../deploy")).join(path);
    fs::read_to_string(file).expect("a shipped file")
}

fn yaml(name: &str) -> Value {
    serde_saphyr::from_str(&shipped(&format!("kubernetes/{name}"))).expect("YAML")
}

fn list(value: &Value) -> impl Iterator<Item = &Value> {
    value.as_array().into_iter().flatten()
}

fn containers(pod: &Value) -> impl Iterator<Item = &Value> {
    list(&pod["spec"]["initContainers"]).chain(list(&pod["spec"]["containers"]))
}

#[test]
fn the_pods_need_nothing_that_only_a_running_api_server_could_give() {
    for name in PODS {
        let pod = yaml(name);
        let spec = &pod["spec"];
        assert_eq!(spec["hostNetwork"], true, "{name}: there is no CNI yet");
        assert_eq!(spec["priorityClassName"], "system-node-critical", "{name}");
        assert!(spec["serviceAccountName"].is_null(), "{name}");
        let kinds: BTreeSet<&str> = list(&spec["volumes"])
            .flat_map(|volume| volume.as_object().expect("a volume").keys())
            .map(String::as_str)
            .collect();
        assert_eq!(
            kinds.difference(&BTreeSet::from(["name", "hostPath", "emptyDir"])).next(),
            None,
            "{name}"
        );
        for container in containers(&pod) {
            assert_eq!(container["imagePullPolicy"], "IfNotPresent", "{name}: the image is on the node");
            assert!(container["envFrom"].is_null() && container["env"].is_null(), "{name}");
        }
    }
}

#[test]
fn every_probe_names_the_loopback_address() {
    for name in PODS {
        for container in containers(&yaml(name)) {
            for probe in ["startupProbe", "livenessProbe", "readinessProbe"] {
                if !container[probe].is_null() {
                    assert_eq!(container[probe]["httpGet"]["host"], "127.0.0.1", "{name}: {probe}");
                }
            }
        }
    }
}

#[test]
fn the_api_server_starts_while_the_agents_are_away() {
    let pod = yaml(PODS[1]);
    let sidecar = containers(&pod).find(|container| container["name"] == "kms-sidecar").expect("the sidecar");
    assert_eq!(sidecar["restartPolicy"], "Always");
    assert_eq!(sidecar["startupProbe"]["httpGet"]["path"], "/livez");
}

#[test]
fn the_sidecar_runs_without_root_and_without_capabilities() {
    for name in PODS {
        let pod = yaml(name);
        let sidecar =
            containers(&pod).find(|container| container["name"] == "kms-sidecar").expect("the sidecar");
        let context = &sidecar["securityContext"];
        assert_eq!(context["runAsNonRoot"], true, "{name}");
        assert_eq!(context["allowPrivilegeEscalation"], false, "{name}");
        assert_eq!(context["readOnlyRootFilesystem"], true, "{name}");
        assert_eq!(context["capabilities"], serde_json::json!({ "drop": ["ALL"] }), "{name}");
    }
}

#[test]
fn one_path_and_one_user_run_through_all_files() {
    for version in ["v1", "v2"] {
        let config = yaml(&format!("encryption-configuration.{version}.yaml"));
        let providers = &config["resources"][0]["providers"];
        let kms = &providers[0]["kms"];
        assert_eq!(kms["apiVersion"], version);
        assert_eq!(kms["name"], "kms-plugin");
        assert_eq!(kms["endpoint"], "unix:///run/fleet-kms/kms.sock");
        assert_eq!(
            providers[1],
            serde_json::json!({ "identity": {} }),
            "the last one reads what is still in clear"
        );
        assert_eq!(kms["cachesize"].is_null(), version == "v2", "v2 refuses a cache size");
    }
    assert!(shipped("systemd/kms-sidecar.socket").contains("ListenStream=/run/fleet-kms/kms.sock\n"));
    assert!(shipped("config/sidecar.toml").contains("path = \"/run/fleet-kms/kms.sock\"\n"));
    assert!(
        shipped("tmpfiles.d/fleet-kms.conf").contains("d /run/fleet-kms               0750 65532 65532 -\n")
    );
    assert!(shipped("sysusers.d/fleet-kms.conf").contains("u kms-sidecar 65532 "));
}

#[test]
fn the_units_restart_for_ever_but_not_on_a_wrong_configuration() {
    for unit in ["systemd/kms-agent.service", "systemd/kms-sidecar.service"] {
        let text = shipped(unit);
        for line in ["StartLimitIntervalSec=0", "Restart=always", "LimitCORE=0", "CapabilityBoundingSet="] {
            assert!(text.lines().any(|found| found == line), "{unit}: {line}");
        }
        assert!(text.contains("RestartPreventExitStatus=64"), "{unit}");
    }
}

#[test]
fn the_programs_take_the_shipped_configurations_and_none_with_a_misspelt_key() {
    let dir = tempfile::tempdir().expect("a directory");
    for (program, name) in [(Program::Agent, "agent.toml"), (Program::Sidecar, "sidecar.toml")] {
        let text = shipped(&format!("config/{name}"));
        // What is commented out has to be right as well.
        let whole: String = text.lines().map(uncommented).collect();
        // How each call is recorded may stand there only if each call is.
        let whole = whole.replace("data = \"summary\"", "data = \"each\"");
        let misspelt = text.replace("[log]", "[lgo]");
        for (text, exit) in [(&text, 0), (&whole, 0), (&misspelt, 64)] {
            let file = dir.path().join(name);
            fs::write(&file, text).expect("written");
            let mut check = Command::new(program.path().expect("built"));
            let output = check.args(["check-config", "--config"]).arg(&file).output().expect("run");
            let said = String::from_utf8_lossy(&output.stderr);
            assert_eq!(output.status.code(), Some(exit), "{name}: {said}\n{text}");
            assert!(exit == 0 || said.contains("lgo"), "{said}");
        }
    }
}

/// `# key = value` as `key = value`, and `# [section]` as `[section]`.
fn uncommented(line: &str) -> String {
    let is_section = |code: &str| code.starts_with('[') && code.ends_with(']');
    let code = line.strip_prefix("# ").filter(|code| {
        is_section(code)
            || code
                .split_once(" = ")
                .is_some_and(|(key, _)| key.chars().all(|c| c.is_ascii_lowercase() || c == '_'))
    });
    format!("{}\n", code.unwrap_or(line))
}

#[test]
fn a_real_api_server_takes_the_shipped_files() -> anyhow::Result<()> {
    let fleet = Fleet::start()?;
    let [v1, v2] = ["v1", "v2"].map(|api| {
        let shipped = |socket: &Path| EncryptionConfig::shipped(api, socket).expect("shipped");
        ControlPlane::start(&fleet, &format!("with-{api}"), shipped)
    });
    let (v1, v2) = (v1?, v2?);
    for (plane, prefix) in [(&v1, "k8s:enc:kms:v1:kms-plugin:"), (&v2, "k8s:enc:kms:v2:kms-plugin:")] {
        plane.create("secret1")?;
        plane.read("secret1")?;
        assert!(plane.etcd.secret("default", "secret1")?.starts_with(prefix.as_bytes()));
    }

    let misspelt = fleet.path().join("misspelt.yaml");
    let text = shipped(&format!("kubernetes/{}", PODS[0]));
    fs::write(&misspelt, text.replace("readOnlyRootFilesystem:", "readOnlyRootFileSystem:"))?;
    let dry_run = |file: &str| {
        v1.api.kubectl(["create", "--dry-run=server", "--validate=strict", "-o", "name", "-f", file])
    };
    for (name, pod) in PODS.iter().zip(["pod/kms-sidecar", "pod/kube-apiserver"]) {
        let file = format!("{}/../deploy/kubernetes/{name}", env!("CARGO_MANIFEST_DIR"));
        assert_eq!(dry_run(&file)?.trim(), pod);
    }
    let refused = format!("{:#}", dry_run(&misspelt.display().to_string()).err().context("taken")?);
    assert!(refused.contains("unknown field") && refused.contains("readOnlyRootFileSystem"), "{refused}");
    Ok(())
}

/// As under systemd: the unit owns the listener and names it, and it outlives the sidecar.
#[test]
fn the_sidecar_serves_the_listener_that_the_socket_unit_names() -> anyhow::Result<()> {
    let fleet = Fleet::start()?;
    let sidecar = fleet.unenrolled_sidecar(&fleet.cluster("alpha")?, "node")?;
    sidecar.enrol(&fleet.token_for("alpha", "node")?)?;
    let unit = shipped("systemd/kms-sidecar.socket");
    let name = unit.lines().find_map(|line| line.strip_prefix("FileDescriptorName=")).context("no name")?;
    let listener = UnixListener::bind(&sidecar.socket)?;
    let client = KmsClient::new(ClientVersion::V0_37_2, Api::V1, &sidecar.socket)?;
    let log = fleet.path().join("kms-sidecar.log");
    for _ in 0..2 {
        // systemd passes the listener as descriptor 3 to a process whose id it names.
        let line = "exec 3<&0 </dev/null; LISTEN_PID=$$ exec \"$0\" run --config \"$1\"";
        let mut process = Command::new("/bin/sh")
            .args(["-c", line])
            .args([Program::Sidecar.path()?, sidecar.config.clone()])
            .envs([("LISTEN_FDS", "1"), ("LISTEN_FDNAMES", name)])
            .stdin(OwnedFd::from(listener.try_clone()?))
            .stderr(File::options().create(true).append(true).open(&log)?)
            .spawn()?;
        let served = client.call(&["round-trip", "-timeout", "10s"]).and_then(Outcome::ok);
        kill_process(Pid::from_child(&process), Signal::TERM)?;
        let ended = wait::until("the sidecar to end", wait::START_LIMIT, || Ok(process.try_wait()?))?;
        served.with_context(|| fs::read_to_string(&log).unwrap_or_default())?;
        assert!(ended.success() && sidecar.socket.exists(), "{ended}");
    }
    Ok(())
}

/// `systemd-analyze` is not on every machine; the lines that name a program name the one that takes its arguments.
#[test]
fn the_units_start_the_programs_with_arguments_that_they_take() -> anyhow::Result<()> {
    for (unit, program) in [("kms-agent", Program::Agent), ("kms-sidecar", Program::Sidecar)] {
        let text = shipped(&format!("systemd/{unit}.service"));
        let start = text.lines().find_map(|line| line.strip_prefix("ExecStart=")).context("no ExecStart")?;
        let rest =
            start.strip_prefix(&format!("/usr/bin/{unit} run --config ")).context("another program")?;
        let name = rest.strip_prefix("/etc/fleet-kms/").context("another folder")?;
        let file = format!("{}/../deploy/config/{name}", env!("CARGO_MANIFEST_DIR"));
        run(Command::new(program.path()?).args(["check-config", "--config", &file]))?;
        assert!(run(Command::new(program.path()?).args(["run", "--help"]))?.contains("--config"));
    }
    Ok(())
}
