//! A real control plane while our programs are away, killed, or lose their socket's directory.

use std::collections::hash_map::RandomState;
use std::fs;
use std::hash::{BuildHasher, Hasher};
use std::os::unix::fs::{PermissionsExt, chown};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;
use std::time::Duration;

use anyhow::{Context, bail, ensure};
use fleet_kms_tests::apiserver::ApiServer;
use fleet_kms_tests::child::run;
use fleet_kms_tests::control_plane::{ControlPlane, value_of};
use fleet_kms_tests::encryption_config::EncryptionConfig;
use fleet_kms_tests::fleet::{Fleet, Sidecar};
use fleet_kms_tests::programs::Program;
use fleet_kms_tests::wait;
use serde_json::Value;

/// How long kube-apiserver's KMS check may say the old thing: it remembers a success for 20 s.
const HEALTH_LAG: Duration = Duration::from_secs(30);

/// How soon after the agent's return a write succeeds.
const RECOVERY_LIMIT: Duration = Duration::from_secs(5);

/// The first in the order of names, and so the first to start: it waits for a minute.
#[test]
fn a_minute_without_an_agent_fails_writes_with_a_reason_and_they_work_again_within_five_seconds()
-> anyhow::Result<()> {
    let mut fleet = Fleet::start()?;
    let plane = ControlPlane::start(&fleet, "alpha", EncryptionConfig::v1)?;
    fleet.agent.stop()?;
    let mut message = String::new();
    wait::keep_doing(Duration::from_secs(60), || {
        let answer = plane.api.create_secret("refused", "never stored")?;
        ensure!(answer.status == 500, "HTTP {}: {}", answer.status, answer.body);
        message = answer.body;
        thread::sleep(Duration::from_millis(500));
        Ok(())
    })?;
    // What a person reads who ran kubectl: what is missing, not just that time ran out.
    let refused = plane.api.kubectl(["create", "secret", "generic", "refused", "--from-literal=key=x"]);
    let person_reads = format!("{:#}", refused.err().context("the write succeeded")?);
    for text in [message, person_reads] {
        assert!(text.contains("Unavailable") && text.contains("no kms-agent could be reached"), "{text}");
        assert!(!text.contains("context deadline exceeded"), "{text}");
    }
    assert!(plane.etcd.secret("default", "refused").is_err());

    fleet.agent.start()?;
    wait::until("a write to succeed", RECOVERY_LIMIT, || Ok(plane.create("accepted").ok()))?;
    plane.read("accepted")?;
    wait::until("a green /readyz", HEALTH_LAG, || Ok((plane.api.raw("/readyz")?.status == 200).then_some(())))
}

#[test]
fn an_agent_that_is_away_for_up_to_two_seconds_costs_the_api_server_no_error() -> anyhow::Result<()> {
    let mut fleet = Fleet::start()?;
    let v1 = Watched::new(ControlPlane::start(&fleet, "alpha", EncryptionConfig::v1_without_cache)?);
    let v2 = Watched::new(ControlPlane::start(&fleet, "beta", EncryptionConfig::v2)?);
    thread::scope(|scope| {
        let watchers: Vec<_> = [&v1, &v2]
            .into_iter()
            .flat_map(|watched| {
                [scope.spawn(|| watched.create_and_read()), scope.spawn(|| watched.watch_health())]
            })
            .collect();
        let disturbed = [0, 1, 2].into_iter().try_for_each(|gap| {
            let before = v1.created();
            fleet.agent.restart_after(Duration::from_secs(gap))?;
            // Until it is sure that calls of after the restart were among those that succeeded.
            wait::until("Secrets created after the restart", wait::START_LIMIT, || {
                let stopped = watchers.iter().any(thread::ScopedJoinHandle::is_finished);
                Ok((stopped || v1.created() > before + 50).then_some(()))
            })
        });
        v1.done.store(true, Ordering::Relaxed);
        v2.done.store(true, Ordering::Relaxed);
        for watcher in watchers {
            watcher.join().map_err(|_| anyhow::anyhow!("a watcher panicked"))??;
        }
        disturbed
    })?;
    assert!(v1.created() > 150 && v2.created() > 50);
    Ok(())
}

/// A control plane at work, until an error or until it is done.
struct Watched {
    plane: ControlPlane,
    created: AtomicUsize,
    done: AtomicBool,
}

impl Watched {
    fn new(plane: ControlPlane) -> Self {
        Self { plane, created: AtomicUsize::new(0), done: AtomicBool::new(false) }
    }

    fn created(&self) -> usize {
        self.created.load(Ordering::Relaxed)
    }

    fn create_and_read(&self) -> anyhow::Result<()> {
        while !self.done.load(Ordering::Relaxed) {
            let name = format!("secret-{}", self.created());
            self.plane.create(&name)?;
            self.plane.read(&name)?;
            self.created.fetch_add(1, Ordering::Relaxed);
        }
        Ok(())
    }

    fn watch_health(&self) -> anyhow::Result<()> {
        while !self.done.load(Ordering::Relaxed) {
            self.plane.api.raw("/readyz?verbose")?.ok()?;
            thread::sleep(Duration::from_millis(100));
        }
        Ok(())
    }
}

#[test]
fn a_socket_directory_that_is_made_anew_as_we_ship_it_needs_no_hand() -> anyhow::Result<()> {
    let fleet = Fleet::start()?;
    let mut sidecar = fleet.unenrolled_sidecar(&fleet.cluster("alpha")?, "node")?;
    sidecar.enrol(&fleet.token_for("alpha", "node")?)?;
    if rustix::process::geteuid().is_root() {
        as_the_shipped_user(&fleet, &mut sidecar)?;
    }
    sidecar.start()?;
    let directory = sidecar.socket.parent().context("a directory")?.to_owned();
    let identity = sidecar.identity.clone();
    let mut plane = ControlPlane::start_unready(sidecar, EncryptionConfig::v1)?;
    plane.api.wait_ready()?;
    let names = plane.create_many(3)?;

    for make_anew in [by_the_tmpfiles_line, by_the_init_container] {
        fs::remove_dir_all(&directory)?;
        // The connection that is open already goes on.
        plane.api.create_secret("meanwhile", "x")?;
        plane.api.stop();
        make_anew(&directory, &identity)?;
        // A new API server has no connection left and must find the socket by its path.
        plane.api.restart()?;
        plane.read_all(&names)?;
        plane.api.kubectl(["delete", "secret", "meanwhile"])?;
    }
    Ok(())
}

/// The user that runs the sidecar in the shipped manifests.
const SHIPPED_USER: u32 = 65_532;

fn as_the_shipped_user(fleet: &Fleet, sidecar: &mut Sidecar) -> anyhow::Result<()> {
    // A program and a path that another user may enter and read.
    let node = sidecar.config.parent().context("a directory")?.to_owned();
    for directory in [fleet.path(), &node] {
        fs::set_permissions(directory, fs::Permissions::from_mode(0o711))?;
    }
    let program = node.join("kms-sidecar");
    fs::copy(Program::Sidecar.path()?, &program)?;
    let run_directory = sidecar.socket.parent().context("a directory")?;
    for path in fs::read_dir(&sidecar.identity)?.map(|entry| entry.map(|entry| entry.path())) {
        chown(path?, Some(SHIPPED_USER), Some(SHIPPED_USER))?;
    }
    chown(&sidecar.identity, Some(SHIPPED_USER), Some(SHIPPED_USER))?;
    chown(run_directory, Some(SHIPPED_USER), Some(SHIPPED_USER))?;
    sidecar.respec(|spec| spec.program(&program).as_user(SHIPPED_USER, SHIPPED_USER));
    Ok(())
}

fn shipped(file: &str) -> anyhow::Result<String> {
    let path = PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../deploy")).join(file);
    fs::read_to_string(&path).with_context(|| path.display().to_string())
}

/// Does what systemd-tmpfiles does with the line of our file; users other than root cannot give a directory away.
fn by_the_tmpfiles_line(directory: &Path, _identity: &Path) -> anyhow::Result<()> {
    let text = shipped("tmpfiles.d/fleet-kms.conf")?;
    let line = text.lines().find_map(|line| line.strip_prefix("d /run/fleet-kms ")).context("no line")?;
    let &[mode, user, group, "-"] = line.split_whitespace().collect::<Vec<_>>().as_slice() else {
        bail!("{line}");
    };
    fs::create_dir(directory)?;
    fs::set_permissions(directory, fs::Permissions::from_mode(u32::from_str_radix(mode, 8)?))?;
    if rustix::process::geteuid().is_root() {
        chown(directory, Some(user.parse()?), Some(group.parse()?))?;
    }
    Ok(())
}

/// Runs the command of our manifest's init container, with the directories of this node.
fn by_the_init_container(directory: &Path, identity: &Path) -> anyhow::Result<()> {
    let pod: Value = serde_saphyr::from_str(&shipped("kubernetes/kms-sidecar.static-pod.yaml")?)?;
    let command = pod.pointer("/spec/initContainers/0/command").and_then(Value::as_array);
    let mut args: Vec<String> = command
        .context("no init container")?
        .iter()
        .map(|arg| match arg.as_str().unwrap_or_default() {
            "/run/fleet-kms" => directory.display().to_string(),
            "/var/lib/fleet-kms/sidecar" => identity.display().to_string(),
            arg => arg.to_owned(),
        })
        .collect();
    if !rustix::process::geteuid().is_root() {
        let own = [rustix::process::geteuid().as_raw(), rustix::process::getegid().as_raw()];
        for (flag, own) in ["-o", "-g"].into_iter().zip(own) {
            let at = args.iter().position(|arg| arg == flag).context("no owner")? + 1;
            *args.get_mut(at).context("no owner")? = own.to_string();
        }
    }
    let (program, args) = args.split_first().context("an empty command")?;
    run(Command::new(program).args(args)).map(drop)
}

#[test]
fn killing_sidecar_and_agent_at_any_moment_loses_nothing_that_was_accepted() -> anyhow::Result<()> {
    const ROUNDS: u64 = 9;
    let mut fleet = Fleet::start()?;
    let mut plane = ControlPlane::start(&fleet, "alpha", EncryptionConfig::v1)?;
    let (mut accepted, mut rotations) = (Vec::new(), 0);
    for round in 0..ROUNDS {
        let moment = Duration::from_millis(random() % 1_500);
        println!("round {round}: killed {moment:?} after its start");
        let names = thread::scope(|scope| {
            let api = &plane.api;
            let writer = scope.spawn(move || create_while_it_lasts(api, round));
            thread::sleep(moment);
            if round % 3 != 0 {
                plane.sidecar.kill9()?;
            }
            if round % 3 != 1 {
                let rotated = rotate_and_kill(&mut fleet)?;
                rotations += u64::from(rotated);
                fleet.agent.start()?;
            }
            if round % 3 != 0 {
                plane.sidecar.start()?;
            }
            writer.join().map_err(|_| anyhow::anyhow!("the writer panicked"))?
        })?;
        accepted.extend(names);
    }
    println!("{} Secrets and {rotations} rotations were accepted", accepted.len());
    plane.api.restart()?;
    plane.read_all(&accepted)?;
    plane.create("afterwards")?;
    assert!(u64::from(plane.header("afterwards")?.version) > rotations);
    Ok(())
}

/// Kills the agent while it rotates; whether kmsctl was told that it had.
fn rotate_and_kill(fleet: &mut Fleet) -> anyhow::Result<bool> {
    let mut rotate = fleet.kmsctl_command(&["key", "rotate", "alpha", "--yes"])?;
    let mut rotate = rotate.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).spawn()?;
    thread::sleep(Duration::from_millis(random() % 400));
    fleet.agent.kill9()?;
    Ok(rotate.wait()?.success())
}

/// Creates Secrets for two seconds and returns the names of those that the API server accepted. Errors are allowed
/// here: a killed process takes the calls in flight with it.
fn create_while_it_lasts(api: &ApiServer, round: u64) -> anyhow::Result<Vec<String>> {
    let mut accepted = Vec::new();
    let mut number = 0;
    wait::keep_doing(Duration::from_secs(2), || {
        let name = format!("round-{round}-{number}");
        number += 1;
        let answer = api.create_secret(&name, &value_of(&name)).context("no answer from the API server")?;
        if answer.status == 201 {
            accepted.push(name);
        }
        Ok(())
    })?;
    ensure!(!accepted.is_empty(), "round {round}: nothing was accepted");
    Ok(accepted)
}

/// Another number each time, from the seed of std's hash maps.
fn random() -> u64 {
    RandomState::new().build_hasher().finish()
}
