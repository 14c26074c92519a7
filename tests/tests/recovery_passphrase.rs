//! The second root slot that `kms-agent init` makes: its passphrase is printed once, is kept nowhere, and opens the
//! store when the root key is gone.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test")]

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};

use data_encoding::{BASE64, HEXLOWER, HEXUPPER};
use fleet_kms_tests::child::run;
use fleet_kms_tests::fleet::Fleet;
use fleet_kms_tests::golden::with_passphrase;
use fleet_kms_tests::programs::Program;
use fleet_kms_tests::refusal::refusal;

const LINE: &str = "recovery passphrase: ";
const REFUSED: &str = "does not open the store; use a root key or passphrase of one of its slots";
/// The exit status for bad configuration.
const CONFIG: i32 = 64;

/// A fleet that was initialised as an operator does, and what init printed. Its agent does not run.
fn initialised() -> (Fleet, String) {
    let mut fleet = Fleet::start().unwrap();
    fleet.agent.stop().unwrap();
    let directory = &fleet.agent.directory;
    for name in ["audit", "admin"] {
        fs::remove_dir_all(directory.join(name)).unwrap();
    }
    for entry in fs::read_dir(directory).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_none_or(|extension| extension != "toml") && path.is_file() {
            fs::remove_file(path).unwrap();
        }
    }
    let admin = directory.join("admin");
    let printed = fleet.host(&["init", "--admin-directory", admin.to_str().unwrap()]).unwrap();
    (fleet, printed)
}

fn passphrase(printed: &str) -> String {
    let mut lines = printed.lines().filter_map(|line| line.strip_prefix(LINE));
    let (passphrase, more) = (lines.next().unwrap(), lines.next());
    assert_eq!((more, printed.matches(passphrase).count()), (None, 1), "it is printed once");
    passphrase.to_owned()
}

/// Every file below a directory that has one of these texts in it.
fn files_with(directory: &Path, texts: &[Vec<u8>]) -> Vec<String> {
    let mut found = Vec::new();
    for entry in fs::read_dir(directory).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            found.extend(files_with(&path, texts));
        } else if path.is_file() {
            let bytes = fs::read(&path).unwrap();
            if texts.iter().any(|text| bytes.windows(text.len()).any(|window| window == text)) {
                found.push(path.display().to_string());
            }
        }
    }
    found
}

#[test]
fn the_printed_passphrase_opens_the_store_without_the_root_key_and_is_in_no_file() {
    let (mut fleet, printed) = initialised();
    let passphrase = passphrase(&printed);
    let words = passphrase.replace(['-', ' '], "");
    let texts = [passphrase.clone(), words.clone()].map(String::into_bytes);
    let coded = [&passphrase, &words].map(|text| {
        let text = text.as_bytes();
        [BASE64.encode(text), HEXLOWER.encode(text), HEXUPPER.encode(text)].map(String::into_bytes)
    });
    let texts: Vec<Vec<u8>> = texts.into_iter().chain(coded.into_iter().flatten()).collect();

    fleet.agent.start().unwrap();
    let cluster = fleet.cluster("alpha").unwrap();
    drop(fleet.sidecar(&cluster, "cp-1").unwrap());
    let listed = fleet.host(&["slot", "list"]).unwrap();
    assert_eq!(listed.matches("passphrase").count(), 1, "{listed}");
    assert!(!listed.contains(&passphrase));
    fleet.agent.stop().unwrap();
    assert_eq!(files_with(fleet.path(), &texts), [""; 0]);
    // The search finds what is there.
    fs::write(fleet.path().join("note"), format!("I wrote down {passphrase}")).unwrap();
    assert_eq!(files_with(fleet.path(), &texts).len(), 1);

    fs::remove_file(fleet.agent.directory.join("root.key")).unwrap();
    let config = fleet.agent.config.to_str().unwrap();
    refusal(Program::Agent, ["run", "--config", config], &[]).unwrap().must_be(CONFIG, &["root key file"]);
    let credentials = fleet.path().join("credentials");
    fs::create_dir(&credentials).unwrap();
    fs::write(credentials.join("passphrase"), &passphrase).unwrap();
    let text = fs::read_to_string(config).unwrap();
    let root = format!("file = \"{}/root.key\"", fleet.agent.directory.display());
    assert!(text.contains(&root), "{text}");
    fs::write(config, text.replace(&root, "passphrase_credential = \"passphrase\"")).unwrap();
    fleet.agent.respec(|spec| spec.env("CREDENTIALS_DIRECTORY", &credentials));
    fleet.agent.start().unwrap();
    assert_eq!(fleet.kmsctl_json(&["cluster", "show", "alpha"]).unwrap()["id"], cluster.id.as_str());
    let opened = with_passphrase(&fleet, &passphrase, &["slot", "test", "--passphrase-fd", "3"]).unwrap();
    assert!(!opened.contains(&passphrase), "{opened}");
}

#[test]
fn every_wrong_passphrase_is_refused_in_the_same_words_and_after_a_delay() {
    let (fleet, printed) = initialised();
    let right = passphrase(&printed);
    let store = fleet.agent.directory.join("store.db");
    let verify = ["backup", "verify", store.to_str().unwrap(), "--passphrase-fd", "3"];
    with_passphrase(&fleet, &right, &verify).unwrap();
    let mut other = right.clone();
    other.pop();
    for wrong in ["x", "a wrong passphrase that is long enough", &other, &format!("{right}x")] {
        let refused = with_passphrase(&fleet, wrong, &verify).unwrap_err().to_string();
        assert!(refused.contains(REFUSED) && !refused.contains(&right), "{refused}");
        let said = refused.split("kms-agent: ").nth(1).unwrap_or_default().trim().to_owned();
        let expected = format!(
            "{}: the passphrase {REFUSED}; if it is one, the store was altered: restore a backup: no slot opens with this passphrase",
            store.display()
        );
        assert_eq!(said.lines().next().unwrap(), expected, "{wrong}");
    }
    // Time that the program neither worked nor waited for a core would be none without the delay.
    assert!(idle(&fleet, "a wrong passphrase", &verify) >= 0.9);
}

/// Seconds of a command that it did not compute.
fn idle(fleet: &Fleet, passphrase: &str, args: &[&str]) -> f64 {
    let file = fleet.path().join("typed");
    fs::write(&file, passphrase).unwrap();
    let agent = fleet.host_command(args).unwrap();
    let script = r#"TIMEFORMAT='%R %U %S'; time "$@" 3<"$0" 2>/dev/null || true"#;
    let mut shell = Command::new("bash");
    shell.args(["-c", &format!("{{ {script}; }} 2>&1")]).arg(&file);
    shell.arg(agent.get_program()).args(agent.get_args());
    let timed = run(shell.stdin(Stdio::null())).unwrap();
    let last = timed.lines().last().unwrap();
    let seconds: Vec<f64> = last.split(' ').map(|number| number.parse().unwrap()).collect();
    let [real, user, system] = seconds.as_slice() else { panic!("{timed}") };
    real - user - system
}
