//! The harness itself: a real etcd and kube-apiserver without any KMS plugin.

use fleet_kms_tests::apiserver::ApiServer;
use fleet_kms_tests::encryption_config::EncryptionConfig;
use fleet_kms_tests::etcd::Etcd;

#[test]
fn a_control_plane_stores_in_clear_without_a_plugin_and_survives_a_restart() {
    let dir = tempfile::tempdir().unwrap();
    let mut etcd = Etcd::start(&dir.path().join("etcd")).unwrap();
    let mut server =
        ApiServer::start(&dir.path().join("kube"), &etcd, &EncryptionConfig::identity()).unwrap();

    server.create_secret("first", "seen by every thief").unwrap().ok().unwrap();
    let stored = String::from_utf8_lossy(&etcd.secret("default", "first").unwrap()).into_owned();
    assert!(stored.contains("seen by every thief"), "{stored}");
    assert_eq!(etcd.keys("/registry/secrets/default/").unwrap(), ["/registry/secrets/default/first"]);

    etcd.restart().unwrap();
    server.restart().unwrap();
    assert_eq!(server.read_secret("first").unwrap(), "seen by every thief");
    assert!(server.kubectl(["get", "secrets", "-A", "-o", "name"]).unwrap().contains("secret/first"));
    let replaced = server.shell("kubectl get secrets -A -o json | kubectl replace -f -").unwrap();
    assert!(replaced.contains("secret/first replaced"), "{replaced}");
}

#[test]
fn a_control_plane_with_its_plugin_away_starts_and_says_what_is_missing() {
    let dir = tempfile::tempdir().unwrap();
    let etcd = Etcd::start(&dir.path().join("etcd")).unwrap();
    let nobody = EncryptionConfig::v1(&dir.path().join("nobody.sock"));
    let server = ApiServer::start_unready(&dir.path().join("kube"), &etcd, &nobody).unwrap();

    let refused = server.create_secret("first", "never stored").unwrap();
    assert_eq!(refused.status, 500, "{}", refused.body);
    assert!(refused.body.contains("DeadlineExceeded"), "{}", refused.body);
    assert!(etcd.secret("default", "first").is_err());
}
