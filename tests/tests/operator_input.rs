//! What an operator may type wrong, at kmsctl and on the agent's host: each refusal names the field and the remedy.
#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "tests: what is not there fails them")]

use std::fs;
use std::os::unix::fs::PermissionsExt;

use fleet_kms_tests::fleet::Fleet;
use fleet_kms_tests::kms_client::{Api, KmsClient};
use fleet_kms_tests::peers::ClientVersion;

/// Exit status and standard error of a kmsctl command that must be refused.
fn refused(fleet: &Fleet, args: &[&str]) -> (i32, String) {
    let output = fleet.kmsctl_output(args).unwrap();
    let text = String::from_utf8(output.stderr).unwrap();
    assert!(!output.status.success(), "{args:?} was done");
    (output.status.code().unwrap(), text)
}

#[test]
fn times_out_of_bounds_and_unknown_names_are_refused_and_change_nothing() {
    let fleet = Fleet::start().unwrap();
    fleet.cluster("alpha").unwrap();
    let before = fleet.kmsctl_json(&["cluster", "show", "alpha"]).unwrap();
    assert_eq!((&before["period"], &before["max_offline"]), (&"30d".into(), &"180d".into()));
    for (args, code, said) in [
        (&["cluster", "create", "beta", "--period", "59m"][..], 2, "use 1h to 3650d"),
        (&["key", "set-period", "alpha", "59m"], 2, "use 1h to 3650d"),
        (&["cluster", "create", "beta", "--max-offline", "6d"], 2, "use 7d to 730d"),
        (&["cluster", "create", "beta", "--max-offline", "731d"], 2, "use 7d to 730d"),
        (&["cluster", "set", "alpha", "--max-offline", "167h"], 2, "use 7d to 730d"),
        (&["cluster", "set", "alpha", "--max-offline", "731d"], 2, "use 7d to 730d"),
        (&["cluster", "set", "beta", "--max-offline", "90d"], 6, "cluster_not_found"),
        (&["cluster", "set", "alpha"], 2, "--max-offline"),
        (&["key", "rotate", "beta"], 6, "cluster_not_found"),
        (&["key", "enable", "alpha", "9", "--yes"], 6, "version_not_found"),
    ] {
        let (found, text) = refused(&fleet, args);
        assert!(found == code && text.contains(said), "{args:?}: {found} {text}");
    }
    assert_eq!(fleet.kmsctl_json(&["cluster", "list"]).unwrap().as_array().unwrap().len(), 1);
    let planned = fleet.kmsctl(&["cluster", "set", "alpha", "--max-offline", "90d", "--dry-run"]).unwrap();
    assert!(planned.contains("up to 90d ago may renew"), "{planned}");
    let after = fleet.kmsctl_json(&["cluster", "show", "alpha"]).unwrap();
    assert_eq!((&before["revision"], &before["max_offline"]), (&after["revision"], &after["max_offline"]));

    fleet.kmsctl(&["cluster", "set", "alpha", "--max-offline", "90d", "--reason", "audit 7"]).unwrap();
    let shown = fleet.kmsctl(&["cluster", "show", "alpha"]).unwrap();
    assert!(shown.lines().any(|line| line.starts_with("max offline") && line.ends_with("90d")), "{shown}");
    let made = fleet.kmsctl_json(&["cluster", "create", "gamma", "--max-offline", "2y"]);
    assert!(made.is_err(), "730 days and a half are too many");
    let made = fleet.kmsctl_json(&["cluster", "create", "gamma", "--max-offline", "730d"]).unwrap();
    assert_eq!(made["result"]["max_offline"], "730d");
    let changes = fleet.agent.audit("changes").unwrap();
    let set: Vec<_> = changes.iter().filter(|line| line["action"] == "max_offline_set").collect();
    assert_eq!(set.len(), 1, "{set:?}");
    assert_eq!(set[0]["details"]["max_offline_seconds"], (90 * 86_400).to_string());
    assert_eq!(set[0]["reason"], "audit 7");
}

#[test]
fn what_was_set_for_a_cluster_outlives_a_restart() {
    let mut fleet = Fleet::start().unwrap();
    fleet.cluster("alpha").unwrap();
    fleet.kmsctl(&["cluster", "set", "alpha", "--max-offline", "8d"]).unwrap();
    fleet.agent.kill9().unwrap();
    fleet.agent.start().unwrap();
    assert_eq!(fleet.kmsctl_json(&["cluster", "show", "alpha"]).unwrap()["max_offline"], "8d");
}

#[test]
fn a_slot_file_of_31_bytes_or_with_a_wrong_mode_is_refused_on_the_host() {
    let fleet = Fleet::start().unwrap();
    let file = fleet.path().join("second.key");
    let path = file.to_str().unwrap();
    let set = |bytes: &[u8], mode| {
        if file.exists() {
            fs::remove_file(&file).unwrap();
        }
        fs::write(&file, bytes).unwrap();
        fs::set_permissions(&file, fs::Permissions::from_mode(mode)).unwrap();
    };
    for (length, mode, said) in [
        (31, 0o400, "has 31 bytes; it must hold 32 raw bytes, 64 hex digits"),
        (32, 0o644, "has mode 0644; run chmod 0400"),
        (32, 0o440, "has mode 0440; run chmod 0400"),
    ] {
        set(&vec![7; length], mode);
        for args in [&["slot", "add", "file", path][..], &["slot", "test", "--root-file", path]] {
            let refused = fleet.host(args).unwrap_err().to_string();
            assert!(refused.contains(said) && refused.contains(path), "{args:?}: {refused}");
        }
    }
    assert_eq!(fleet.host(&["slot", "list"]).unwrap().lines().count(), 2, "a title and the first slot");
    set(&[7; 32], 0o400);
    fleet.host(&["slot", "add", "file", path]).unwrap();
}

#[test]
fn key_explain_lists_every_guard_and_destroy_is_refused_with_the_first_that_says_no() {
    let fleet = Fleet::start().unwrap();
    let cluster = fleet.cluster("alpha").unwrap();
    let sidecar = fleet.sidecar(&cluster, "cp-1").unwrap();
    let client = KmsClient::new(ClientVersion::V0_37_2, Api::V1, &sidecar.socket).unwrap();
    let value = client.call(&["encrypt"]).unwrap().last().unwrap().to_string();
    let explain = || {
        let explained = fleet.kmsctl_json(&["key", "explain", "alpha", "1"]).unwrap();
        assert_eq!(explained["destroyable"], false);
        let guards = explained["guards"].as_array().unwrap().clone();
        guards.into_iter().map(|guard| {
            let text = |name: &str| guard[name].as_str().unwrap().to_owned();
            (text("name"), guard["ok"].as_bool().unwrap(), text("why"))
        })
    };
    let says = |name: &str| explain().find(|(found, ..)| found == name).unwrap();
    let names: Vec<String> = explain().map(|(name, ..)| name).collect();
    let all = ["disabled", "census", "unused", "no_hit", "etcd_backups", "backup", "waiting"];
    assert_eq!(names, all);
    assert!(says("unused").2.starts_with("unknown: it has unwrapped nothing since this agent started"));
    assert!(!says("backup").1 && !says("disabled").1);

    client.call(&["decrypt", "-answer", &value]).unwrap().ok().unwrap();
    assert!(says("unused").2.starts_with("it unwrapped "), "{:?}", says("unused"));
    fleet.kmsctl(&["key", "rotate", "alpha"]).unwrap();
    fleet.kmsctl(&["key", "disable", "alpha", "1", "--yes"]).unwrap();
    assert!(says("disabled").1);
    assert!(says("no_hit").2.starts_with("it has been disabled for "), "{:?}", says("no_hit"));
    client.call(&["decrypt", "-answer", &value]).unwrap().refused().unwrap();
    assert!(says("no_hit").2.starts_with("somebody asked for what it wrapped "), "{:?}", says("no_hit"));
    let backup = fleet.path().join("backup.db");
    fleet.host(&["backup", backup.to_str().unwrap()]).unwrap();
    assert!(says("backup").1, "{:?}", says("backup"));
    assert_eq!(says("census"), ("census".to_owned(), false, "no census".to_owned()));

    let table = fleet.kmsctl(&["key", "explain", "alpha", "1"]).unwrap();
    assert!(table.starts_with("version 1 of alpha (disabled) may not be destroyed"), "{table}");
    for name in all {
        let line = table.lines().find(|line| line.starts_with(name)).unwrap();
        let ok = line.split_whitespace().nth(1).unwrap();
        assert_eq!(ok == "yes", says(name).1, "{line}");
    }
    let (code, text) = refused(&fleet, &["key", "destroy", "alpha", "1", "--yes"]);
    assert!(code == 4 && text.contains("may not be destroyed: no census"), "{code} {text}");
}
