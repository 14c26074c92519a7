//! The audit of a real agent, by the real kmsctl: verified, searched, followed, removed behind checkpoints, full.
#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "a test")]

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::time::Duration;

use fleet_kms_tests::child::run;
use fleet_kms_tests::crash::shim::{DiskError, Fault, Shim, Where};
use fleet_kms_tests::fleet::{Fleet, until_true};
use fleet_kms_tests::kms_client::{Api, KmsClient};
use fleet_kms_tests::peers::{ClientVersion, kms_client};
use serde_json::Value;

const LIMIT: Duration = Duration::from_secs(60);

fn verify(fleet: &Fleet, directory: &Path, more: &[&str]) -> Output {
    let mut args = vec!["audit", "verify", directory.to_str().unwrap()];
    args.extend(more);
    fleet.kmsctl_output(&args).unwrap()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// What kmsctl names as the place; `None` when all holds.
fn place(output: &Output) -> Option<String> {
    let error = text(&output.stderr);
    let code = output.status.code();
    assert!(matches!(code, Some(0 | 1)), "{code:?} {error}");
    (code == Some(1))
        .then(|| error.split_once("the audit does not hold: ").unwrap().1.lines().next().unwrap().to_owned())
}

fn copy(from: &Path, to: &Path) -> PathBuf {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        fs::copy(entry.path(), to.join(entry.file_name())).unwrap();
    }
    to.to_owned()
}

fn edit(path: &Path, change: impl FnOnce(&mut Vec<&str>)) {
    let whole = fs::read_to_string(path).unwrap();
    let mut lines: Vec<&str> = whole.split_inclusive('\n').collect();
    change(&mut lines);
    fs::write(path, lines.concat()).unwrap();
}

#[test]
fn every_attack_on_the_files_is_named_by_kmsctl() {
    let fleet = Fleet::start_with("file_mib = 1").unwrap();
    let cluster = fleet.cluster("alpha").unwrap();
    for _ in 0..4 {
        fleet.kmsctl(&["key", "rotate", &cluster.name]).unwrap();
    }
    let audit = fleet.agent.directory.join("audit");
    let heads = fleet.path().join("heads.json");
    until_true("the store has the changes' head", LIMIT, || {
        let text = fleet.kmsctl(&["audit", "heads", "-o", "json"])?;
        fs::write(&heads, &text)?;
        let found: Value = serde_json::from_str(&text)?;
        let last = fleet.agent.audit("changes")?.len() as u64;
        Ok(found.as_array().unwrap().iter().any(|head| head["chain"] == "changes" && head["seq"] == last))
    })
    .unwrap();
    let kept = ["--heads-file", heads.to_str().unwrap()];
    assert_eq!(place(&verify(&fleet, &audit, &["--heads"])), None, "asked from the agent");
    let alone = verify(&fleet, &audit, &[]);
    assert_eq!(place(&alone), None);
    assert!(text(&alone.stderr).contains("promises only to find accidents"));

    let attack = |name: &str, attack: &dyn Fn(&Path)| {
        let files = copy(&audit, &fleet.path().join(name));
        attack(&files.join("changes-000001.jsonl"));
        (place(&verify(&fleet, &files, &[])), place(&verify(&fleet, &files, &kept)))
    };
    let (alone, against) = attack("one-byte", &|file| {
        let changed = fs::read_to_string(file).unwrap().replacen("key_rotate", "key_rotatf", 1);
        fs::write(file, changed).unwrap();
    });
    assert!(alone.as_ref().is_some_and(|place| place.contains("changes-000001.jsonl line")), "{alone:?}");
    assert_eq!(alone, against);
    let (alone, _) = attack("line-removed", &|file| edit(file, |lines| _ = lines.remove(3)));
    assert_eq!(alone.unwrap(), "changes-000001.jsonl line 4: the line has number 5 where 4 should be");
    let (alone, _) = attack("lines-swapped", &|file| edit(file, |lines| lines.swap(2, 3)));
    assert_eq!(alone.unwrap(), "changes-000001.jsonl line 3: the line has number 4 where 3 should be");
    let (alone, against) = attack("tail-cut", &|file| edit(file, |lines| lines.truncate(lines.len() - 2)));
    assert_eq!(alone, None, "this is what heads are for");
    assert!(against.unwrap().contains("changes-000001.jsonl: the chain ends here, before its kept head"));
    let (_, against) = attack("file-removed", &|file| fs::remove_file(file).unwrap());
    assert!(against.unwrap().contains("the chain ends here, before its kept head"));
    let (alone, against) = attack("chain-recomputed", &|file| {
        let log = Path::new(file).parent().unwrap();
        recompute(log, "key_rotate", "key_rotats");
    });
    assert_eq!(alone, None, "whoever can write the files can write a chain anew");
    assert!(against.unwrap().contains("the line is not the one that was kept as head"));

    // The agent itself notices at its start that its changes were cut, and says so.
    let mut fleet = fleet;
    fleet.agent.stop().unwrap();
    edit(&audit.join("changes-000001.jsonl"), |lines| lines.truncate(lines.len() - 3));
    fleet.agent.start().unwrap();
    let status = fleet.kmsctl(&["status"]).unwrap();
    assert!(status.contains("audit_cut") || status.contains("end before what the store"), "{status}");
    assert!(fleet.agent.audit("changes").unwrap().iter().any(|line| line["action"] == "audit_cut"));
}

/// Writes the chain of changes anew with one word replaced, as whoever knows the format can.
fn recompute(directory: &Path, from: &str, to: &str) {
    use sha2::{Digest as _, Sha256};
    let path = directory.join("changes-000001.jsonl");
    let mut prev = data_encoding::HEXLOWER.encode(&Sha256::digest("fleet-kms/audit/1/changes"));
    let mut anew = String::new();
    for line in fs::read_to_string(&path).unwrap().lines() {
        let old = &line[line.find("\"prev\":\"").unwrap() + 8..][..64];
        let line = line.replace(old, &prev).replace(from, to);
        prev = data_encoding::HEXLOWER.encode(&Sha256::digest(&line));
        anew.push_str(&line);
        anew.push('\n');
    }
    fs::write(path, anew).unwrap();
}

#[test]
fn a_search_and_a_tail_say_who_did_what_and_how_it_ended() {
    let fleet = Fleet::start().unwrap();
    let cluster = fleet.cluster("alpha").unwrap();
    fleet.cluster("beta").unwrap();
    fleet.token(&cluster, "node-1").unwrap();
    fleet.kmsctl(&["key", "rotate", "alpha", "--reason", "a drill"]).unwrap();
    let taken = fleet.kmsctl_output(&["cluster", "create", "alpha"]).unwrap();
    assert!(!taken.status.success());

    let search = |more: &[&str]| -> Vec<Value> {
        let args: Vec<&str> = ["audit", "search"].iter().chain(more).copied().collect();
        fleet.kmsctl_json(&args).unwrap().as_array().unwrap().clone()
    };
    let rotations = search(&["--action", "key_rotate"]);
    assert_eq!(rotations.len(), 1, "{rotations:?}");
    let rotation = &rotations[0];
    assert_eq!(rotation["who"], "spiffe://fleet.test/admin/first");
    assert_eq!((&rotation["outcome"], &rotation["cluster"]), (&"done".into(), &"alpha".into()));
    assert_eq!(rotation["record"]["reason"], "a drill");
    assert_eq!(search(&["--outcome", "not done", "--action", "cluster_create"]).len(), 1);
    assert!(search(&["--cluster", "beta"]).iter().all(|record| record["cluster"] == "beta"));
    assert_eq!(search(&["--cluster", &cluster.id, "--action", "key_rotate"]), rotations);
    assert_eq!(search(&["--who", "nobody-of-that-name"]), [] as [Value; 0]);
    assert_eq!(search(&["--to", "1h"]), [] as [Value; 0]);
    let all = search(&["--from", "1h"]);
    assert_eq!(search(&["-n", "2"]), all[..2]);
    let table = fleet.kmsctl(&["audit", "search", "--action", "key_rotate"]).unwrap();
    assert!(table.contains("a drill") && table.contains("done"), "{table}");

    let tail = fleet.kmsctl(&["audit", "tail", "-n", "1000", "-o", "json"]).unwrap();
    let tail: Vec<Value> = tail.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert!(tail.iter().eq(all.iter().rev()), "the same, the oldest first");
    let unclear = fleet.kmsctl_output(&["audit", "search", "--from", "yesterday"]).unwrap();
    assert_eq!(unclear.status.code(), Some(2));
}

#[test]
fn old_files_go_behind_a_checkpoint_that_the_fleets_ca_has_signed() {
    // The smallest files there can be, and each call in one of them.
    let extra = "file_mib = 1\nkeep_data_mib = 2\ndata = \"each\"";
    let fleet = Fleet::start_with(extra).unwrap();
    let cluster = fleet.cluster("alpha").unwrap();
    let sidecar = fleet.sidecar(&cluster, "node-1").unwrap();
    let audit = fleet.agent.directory.join("audit");
    let client = kms_client(ClientVersion::V0_37_2).unwrap();
    until_true("the first file is removed", LIMIT, || {
        let mut command = Command::new(&client);
        command.args(["bench", "-socket"]).arg(&sidecar.socket);
        run(command.args(["-calls", "2000", "-warmup", "0", "-callers", "16"]))?;
        Ok(audit.join("data.checkpoint").exists() && !audit.join("data-000001.jsonl").exists())
    })
    .unwrap();
    assert!(!audit.join("data-000001.jsonl").exists());
    let judged = verify(&fleet, &audit, &["--heads"]);
    assert_eq!(place(&judged), None, "{}", text(&judged.stderr));
    assert!(text(&judged.stdout).contains("from checkpoint"));
    let events = fleet.agent.audit("changes").unwrap();
    assert!(events.iter().any(|line| line["action"] == "audit_checkpoint" && line["target"] == "data"));

    let forged = copy(&audit, &fleet.path().join("forged"));
    let path = forged.join("data.checkpoint");
    let text = fs::read_to_string(&path).unwrap().replace("agent-1", "agent-2");
    fs::write(&path, text).unwrap();
    let found = place(&verify(&fleet, &forged, &[])).unwrap();
    assert!(
        found.contains("data.checkpoint: the checkpoint proves nothing: the signature is wrong"),
        "{found}"
    );
    fs::remove_file(&path).unwrap();
    let found = place(&verify(&fleet, &forged, &[])).unwrap();
    assert_eq!(found, "data-000001.jsonl: the file is missing");
}

/// A value of the agent's metrics.
fn metric(fleet: &Fleet, name: &str) -> Option<u64> {
    let metrics = fleet.agent.ops("/metrics").ok()?.ok().ok()?;
    let line = metrics.lines().find(|line| line.starts_with(&format!("fleet_kms_agent_{name} ")))?;
    line.rsplit_once(' ')?.1.parse().ok()
}

#[test]
fn a_full_disk_is_served_over_or_refused_as_configured_and_leaves_a_gap() {
    for (on_full, each) in [("serve", "written"), ("refuse", "written"), ("serve", ""), ("refuse", "durable")]
    {
        let data =
            if each.is_empty() { String::new() } else { format!("data = \"each\"\neach = \"{each}\"") };
        let extra = format!("on_full = \"{on_full}\"\nsummary_every = \"1s\"\n{data}");
        let mut fleet = Fleet::start_with(&extra).unwrap();
        let cluster = fleet.cluster("alpha").unwrap();
        fleet.agent.stop().unwrap();
        let shim = Shim::new(&fleet.agent.directory, &fleet.path().join("control"), Fault::None).unwrap();
        fleet.agent.respec(|spec| shim.preload(spec));
        fleet.agent.start().unwrap();
        let sidecar = fleet.sidecar(&cluster, "node-1").unwrap();
        let client = KmsClient::new(ClientVersion::V0_37_2, Api::V1, &sidecar.socket).unwrap();
        let call = || client.call(&["encrypt"]).unwrap();
        call().ok().unwrap();
        shim.fail_now(DiskError::Full, Where::Files("/audit/data-")).unwrap();
        let what = format!("{on_full} {each}");
        until_true(&what, LIMIT, || {
            let outcome = call().ok();
            Ok(metric(&fleet, "audit_data_failing") == Some(1) && outcome.is_ok() == (on_full == "serve"))
        })
        .unwrap();
        let status = fleet.kmsctl(&["status"]).unwrap();
        assert!(status.contains("data calls cannot be recorded"), "{what}: {status}");
        let counted =
            if on_full == "refuse" { "audit_refused_calls_total" } else { "audit_unrecorded_calls_total" };
        assert!(each.is_empty() || metric(&fleet, counted).unwrap() > 0, "{what}");
        shim.heal().unwrap();
        until_true(&what, LIMIT, || {
            Ok(metric(&fleet, "audit_data_failing") == Some(0) && call().ok().is_ok())
        })
        .unwrap();
        fleet.agent.stop().unwrap();
        let lines = fleet.agent.audit("data-0").unwrap();
        assert!(lines.iter().any(|line| line["kind"] == "gap"), "{what}");
        assert_eq!(place(&verify(&fleet, &fleet.agent.directory.join("audit"), &[])), None, "{what}");

        if (on_full, each) != ("serve", "written") {
            continue;
        }
        fleet.agent.start().unwrap();
        shim.fail_now(DiskError::Full, Where::Files("/audit/changes-")).unwrap();
        let refused = fleet.kmsctl_output(&["cluster", "create", "beta"]).unwrap();
        assert_eq!(refused.status.code(), Some(5), "{}", text(&refused.stderr));
        assert_eq!(metric(&fleet, "audit_refused_changes_total"), Some(1), "{what}");
        assert!(fleet.agent.log().unwrap().contains("the audit takes no record: changes are refused"));
    }
}
