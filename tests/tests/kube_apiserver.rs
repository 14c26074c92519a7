//! The main job: a real kube-apiserver and a real etcd through kms-sidecar and kms-agent.

#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    reason = "a helper of a test fails by panicking, as the test does"
)]

use std::fs;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;
use std::time::Duration;

use anyhow::{Context, ensure};
use fleet_kms_tests::apiserver::ApiServer;
use fleet_kms_tests::encryption_config::EncryptionConfig;
use fleet_kms_tests::etcd::Etcd;
use fleet_kms_tests::fleet::{Fleet, Sidecar};
use fleet_kms_tests::wait;
use tempfile::TempDir;

const V1_PREFIX: &[u8] = b"k8s:enc:kms:v1:kms-plugin:";
const V2_PREFIX: &[u8] = b"k8s:enc:kms:v2:kms-plugin:";

/// How long kube-apiserver's KMS check may say the old thing: it remembers a success for 20 s.
const HEALTH_LAG: Duration = Duration::from_secs(30);

/// One cluster of a fleet: its node's sidecar, its etcd and its API server.
struct Cluster {
    api: ApiServer,
    etcd: Etcd,
    sidecar: Sidecar,
    _dir: TempDir,
}

impl Cluster {
    fn start(fleet: &Fleet, name: &str, encryption: fn(&Path) -> EncryptionConfig) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let cluster = fleet.cluster(name).unwrap();
        let sidecar = fleet.sidecar(&cluster, &format!("{name}-node")).unwrap();
        let etcd = Etcd::start(&dir.path().join("etcd")).unwrap();
        let encryption = encryption(&sidecar.socket);
        let api = ApiServer::start(&dir.path().join("kube"), &etcd, &encryption).unwrap();
        Self { api, etcd, sidecar, _dir: dir }
    }

    fn create(&self, name: &str) {
        self.api.create_secret(name, &value_of(name)).unwrap().ok().unwrap();
    }

    fn create_many(&self, count: usize) -> Vec<String> {
        let names: Vec<String> = (0..count).map(|number| format!("secret-{number}")).collect();
        names.iter().for_each(|name| self.create(name));
        names
    }

    fn expect_readable<'a>(&self, names: impl IntoIterator<Item = &'a String>) {
        for name in names {
            assert_eq!(self.api.read_secret(name).unwrap(), value_of(name));
        }
    }
}

/// What a Secret of this name holds: long and strange enough to be found in etcd's bytes if it were there.
fn value_of(name: &str) -> String {
    format!("the value of {name}, 3f9c1d7e")
}

#[test]
fn secrets_are_encrypted_with_kms_v1_and_read_back() {
    let fleet = Fleet::start().unwrap();
    let cluster = Cluster::start(&fleet, "alpha", EncryptionConfig::v1);
    let checks = cluster.api.raw("/readyz?verbose").unwrap().ok().unwrap();
    assert!(checks.contains("[+]kms-providers ok"), "{checks}");

    cluster.create("secret1");
    assert_eq!(cluster.api.read_secret("secret1").unwrap(), value_of("secret1"));
    let stored = cluster.etcd.secret("default", "secret1").unwrap();
    assert!(stored.starts_with(V1_PREFIX), "{}", String::from_utf8_lossy(&stored));
    assert!(!String::from_utf8_lossy(&stored).contains(&value_of("secret1")));

    // The wrapped DEK of 93 bytes, then our header: format 1, key version 1.
    let wrapped = &stored[V1_PREFIX.len()..];
    assert_eq!(wrapped[..7], [0x00, 0x5d, 1, 0, 0, 0, 1]);
}

#[test]
fn secrets_are_encrypted_with_kms_v2_and_read_back() {
    let fleet = Fleet::start().unwrap();
    let mut cluster = Cluster::start(&fleet, "alpha", EncryptionConfig::v2);
    let checks = cluster.api.raw("/readyz?verbose").unwrap().ok().unwrap();
    assert!(checks.contains("[+]kms-providers ok"), "{checks}");

    cluster.create("secret1");
    let stored = cluster.etcd.secret("default", "secret1").unwrap();
    assert!(stored.starts_with(V2_PREFIX), "{}", String::from_utf8_lossy(&stored));
    cluster.api.restart().unwrap();
    assert_eq!(cluster.api.read_secret("secret1").unwrap(), value_of("secret1"));
}

#[test]
fn an_api_server_with_a_cold_cache_reads_everything_and_so_does_one_after_a_restart_of_the_agent() {
    let mut fleet = Fleet::start().unwrap();
    let mut cluster = Cluster::start(&fleet, "alpha", EncryptionConfig::v1);
    let names = cluster.create_many(50);
    cluster.api.restart().unwrap();
    cluster.expect_readable(&names);

    fleet.agent.stop().unwrap();
    fleet.agent.start().unwrap();
    cluster.api.restart().unwrap();
    cluster.expect_readable(&names);
}

#[test]
fn an_agent_that_is_away_for_up_to_two_seconds_costs_the_api_server_no_error() {
    let mut fleet = Fleet::start().unwrap();
    let cluster = Cluster::start(&fleet, "alpha", EncryptionConfig::v1_without_cache);
    let (done, created) = (AtomicBool::new(false), AtomicUsize::new(0));

    thread::scope(|scope| {
        let create_and_read = scope.spawn(|| -> anyhow::Result<()> {
            while !done.load(Ordering::Relaxed) {
                let name = format!("secret-{}", created.load(Ordering::Relaxed));
                cluster.api.create_secret(&name, &value_of(&name))?.ok()?;
                created.fetch_add(1, Ordering::Relaxed);
                ensure!(cluster.api.read_secret(&name)? == value_of(&name), "{name} reads differently");
            }
            Ok(())
        });
        let watch_health = scope.spawn(|| -> anyhow::Result<()> {
            while !done.load(Ordering::Relaxed) {
                cluster.api.raw("/readyz?verbose")?.ok()?;
                thread::sleep(Duration::from_millis(100));
            }
            Ok(())
        });
        for gap in [0, 1, 2] {
            let before = created.load(Ordering::Relaxed);
            fleet.agent.restart_after(Duration::from_secs(gap)).unwrap();
            // Until it is sure that calls of after the restart were among those that succeeded.
            let later = wait::until("Secrets created after the restart", wait::START_LIMIT, || {
                let stopped = create_and_read.is_finished() || watch_health.is_finished();
                Ok((stopped || created.load(Ordering::Relaxed) > before + 50).then_some(()))
            });
            if later.is_err() {
                break;
            }
        }
        done.store(true, Ordering::Relaxed);
        create_and_read.join().unwrap().unwrap();
        watch_health.join().unwrap().unwrap();
    });
    assert!(created.load(Ordering::Relaxed) > 150);
}

#[test]
fn without_an_agent_for_a_minute_a_write_fails_with_a_reason_and_works_again_within_five_seconds() {
    let mut fleet = Fleet::start().unwrap();
    let cluster = Cluster::start(&fleet, "alpha", EncryptionConfig::v1);
    fleet.agent.stop().unwrap();

    let mut message = String::new();
    wait::keep_doing(Duration::from_secs(60), || {
        let answer = cluster.api.create_secret("refused", "never stored")?;
        ensure!(answer.status == 500, "HTTP {}: {}", answer.status, answer.body);
        message = answer.body;
        thread::sleep(Duration::from_millis(500));
        Ok(())
    })
    .unwrap();
    // What a person reads who ran kubectl: what is missing, not just that time ran out.
    assert!(message.contains("Unavailable") && message.contains("agent"), "{message}");
    assert!(!message.contains("context deadline exceeded"), "{message}");
    assert!(cluster.etcd.secret("default", "refused").is_err());

    fleet.agent.start().unwrap();
    wait::until("a write to succeed", Duration::from_secs(5), || {
        Ok((cluster.api.create_secret("accepted", &value_of("accepted"))?.status == 201).then_some(()))
    })
    .unwrap();
    assert_eq!(cluster.api.read_secret("accepted").unwrap(), value_of("accepted"));
    wait::until("a green /readyz", HEALTH_LAG, || {
        Ok((cluster.api.raw("/readyz")?.status == 200).then_some(()))
    })
    .unwrap();
}

#[test]
fn a_socket_directory_that_is_made_anew_needs_no_hand() {
    let fleet = Fleet::start().unwrap();
    let mut cluster = Cluster::start(&fleet, "alpha", EncryptionConfig::v1);
    let names = cluster.create_many(3);
    let directory = cluster.sidecar.socket.parent().unwrap().to_owned();
    let permissions = fs::metadata(&directory).unwrap().permissions();
    fs::remove_dir_all(&directory).unwrap();
    cluster.api.stop();

    fs::create_dir(&directory).unwrap();
    fs::set_permissions(&directory, permissions).unwrap();
    // A new API server has no connection left and must find the socket by its path.
    cluster.api.restart().unwrap();
    cluster.expect_readable(&names);
    cluster.create("afterwards");
}

#[test]
fn two_clusters_of_one_agent_cannot_read_each_other_even_with_the_bytes_of_etcd() {
    let fleet = Fleet::start().unwrap();
    let alpha = Cluster::start(&fleet, "alpha", EncryptionConfig::v1);
    let beta = Cluster::start(&fleet, "beta", EncryptionConfig::v1);
    alpha.create("theirs");
    beta.create("ours");

    let key = "/registry/secrets/default/theirs";
    beta.etcd.put(key, &alpha.etcd.value(key).unwrap()).unwrap();
    let answer = beta.api.raw("/api/v1/namespaces/default/secrets/theirs").unwrap();
    assert_eq!(answer.status, 500, "{}", answer.body);
    assert!(!answer.body.contains(&value_of("theirs")));
    assert_eq!(beta.api.read_secret("ours").unwrap(), value_of("ours"));
    assert_eq!(alpha.api.read_secret("theirs").unwrap(), value_of("theirs"));
}

#[test]
fn killing_sidecar_and_agent_at_any_moment_loses_nothing_that_was_accepted() {
    let mut fleet = Fleet::start().unwrap();
    let mut cluster = Cluster::start(&fleet, "alpha", EncryptionConfig::v1);
    let mut accepted = Vec::new();
    for round in 0..6 {
        let names = thread::scope(|scope| {
            let api = &cluster.api;
            let writer = scope.spawn(move || create_while_it_lasts(api, round));
            // Another moment of the writer's work in each round.
            thread::sleep(Duration::from_millis(150 + 70 * round));
            if round % 2 == 0 {
                fleet.agent.kill9().unwrap();
                fleet.agent.start().unwrap();
            } else {
                cluster.sidecar.kill9().unwrap();
                cluster.sidecar.start().unwrap();
            }
            writer.join().unwrap().unwrap()
        });
        accepted.extend(names);
    }
    cluster.api.restart().unwrap();
    cluster.expect_readable(&accepted);
    cluster.create("afterwards");
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
