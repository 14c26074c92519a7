//! Every verb of the real `kmsctl`, taken from its own command tree, with whatever can be wrong: a message, what to do
//! about it, and the exit code that scripts go by.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "tests: what is not there fails them"
)]

use std::ffi::{OsStr, OsString};
use std::fs;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use clap::CommandFactory as _;
use fleet_kms_agent::authz::{Role, TABLE, Who};
use fleet_kms_ctl::cli::Cli;
use fleet_kms_tests::faketime::FakeClock;
use fleet_kms_tests::fleet::Fleet;
use fleet_kms_tests::peer::Identity;
use fleet_kms_tests::ports::free_port;
use fleet_kms_tests::programs::Program;
use fleet_kms_tests::tools::said;

/// What `kmsctl` ends with (docs/kmsctl.md).
const USAGE: i32 = 2;
const DENIED: i32 = 3;
const CONFLICT: i32 = 4;
const UNAVAILABLE: i32 = 5;
const NOT_FOUND: i32 = 6;

/// One verb and what it takes.
struct Verb {
    words: Vec<String>,
    /// Positional arguments and options that it cannot do without, by id.
    needs: Vec<(String, Option<String>)>,
    options: Vec<String>,
}

impl Verb {
    fn name(&self) -> String {
        self.words.join(" ")
    }

    fn takes(&self, id: &str) -> bool {
        self.needs.iter().any(|(needed, _)| needed == id)
    }

    fn has(&self, option: &str) -> bool {
        self.options.iter().any(|known| known == option)
    }

    /// Whether it talks to an agent.
    fn asks(&self) -> bool {
        self.operations().is_some()
    }

    /// The operations that it cannot do without; a new verb must say which.
    fn operations(&self) -> Option<&'static [&'static str]> {
        Some(match self.name().as_str() {
            "cluster create" => &["cluster_create"],
            "cluster list" | "key list" => &["cluster_list"],
            "cluster show" => &["cluster_show"],
            "cluster set" => &["max_offline_set"],
            "cluster retire" => &["cluster_retire"],
            "cluster restore" => &["cluster_restore"],
            "cluster rename" => &["cluster_rename"],
            "key show" => &["cluster_show", "key_versions"],
            "key versions" => &["key_versions"],
            "key rotate" => &["key_rotate"],
            "key set-period" => &["rotation_set"],
            "key disable" => &["key_disable"],
            "key enable" => &["key_enable"],
            "key destroy" => &["key_destroy"],
            "key cancel-destroy" => &["key_cancel_destroy"],
            "key explain" => &["key_explain"],
            "node token" => &["token_create"],
            "node tokens" => &["token_list"],
            "node revoke-token" => &["token_revoke"],
            "node list" => &["node_list"],
            "node ban" => &["node_ban"],
            "node unban" => &["node_unban"],
            "node remove" => &["node_remove"],
            "worker token" => &["token_create"],
            "worker list" => &["worker_list"],
            "worker ban" => &["worker_ban"],
            "worker unban" => &["worker_unban"],
            "worker remove" => &["worker_remove"],
            "admin list" => &["admin_list"],
            "admin show" => &["admin_show"],
            "admin set-role" => &["admin_set_role"],
            "admin set-scope" => &["admin_set_scope"],
            "admin remove" => &["admin_remove"],
            "slot list" => &["slot_list"],
            "status" => &["status_show"],
            "audit search" | "audit tail" => &["audit_search"],
            "audit heads" => &["audit_heads"],
            "ca show" => &["ca_show"],
            "ca rotate" => &["ca_rotate"],
            // Reads files, and asks nobody unless told to.
            "audit verify" => return None,
            // On the worker's host, without a context.
            "worker enrol" | "worker renew" => return None,
            "context list" | "context use" | "context show" | "completions" | "man" | "version" => {
                return None;
            }
            other => panic!("say in this test what `kmsctl {other}` asks for"),
        })
    }

    /// The command line with good values, but for those given here.
    fn line(&self, other: &[(&str, &OsStr)]) -> Vec<OsString> {
        let mut line: Vec<OsString> = self.words.iter().map(OsString::from).collect();
        for (id, option) in &self.needs {
            line.extend(option.iter().map(|option| OsString::from(format!("--{option}"))));
            let given = other.iter().find(|(known, _)| known == id).map(|(_, value)| (*value).to_owned());
            line.push(given.unwrap_or_else(|| self.good(id).into()));
        }
        // One of two, which clap calls no requirement of either.
        if self.name() == "admin set-scope" {
            line.push("--all".into());
        }
        if self.has("yes") {
            line.push("--yes".into());
        }
        line
    }

    /// A value that [`Rig::start`] has made right, but for the token's.
    fn good(&self, id: &str) -> &'static str {
        match id {
            "cluster" if self.name() == "cluster restore" => "gone",
            "cluster" => "tested",
            "name" => "another",
            "node" => "node-1",
            "worker" => "census",
            "admin" => "spare",
            "roles" => "auditor",
            "max_offline" => "90d",
            "agent" => "127.0.0.1:1",
            "version" => "1",
            "period" => "30d",
            "token" => "00000000000000000000000000000000",
            "shell" => "bash",
            "folder" | "directory" => "/nonexistent",
            other => panic!("say in this test what a good {other} is"),
        }
    }
}

fn verbs() -> Vec<Verb> {
    let mut verbs = Vec::new();
    collect(&Cli::command(), &[], &mut verbs);
    assert!(verbs.len() > 20);
    verbs
}

fn collect(command: &clap::Command, words: &[String], verbs: &mut Vec<Verb>) {
    for sub in command.get_subcommands() {
        let mut words = words.to_vec();
        words.push(sub.get_name().to_owned());
        if sub.has_subcommands() {
            collect(sub, &words, verbs);
            continue;
        }
        let required = sub.get_arguments().filter(|arg| arg.is_required_set());
        let needs =
            required.map(|arg| (arg.get_id().to_string(), arg.get_long().map(str::to_owned))).collect();
        let options = sub.get_arguments().filter_map(|arg| arg.get_long()).map(str::to_owned).collect();
        verbs.push(Verb { words, needs, options });
    }
}

/// A fleet, and `kmsctl` with any context file.
struct Rig {
    fleet: Fleet,
    context: PathBuf,
}

impl Rig {
    fn start() -> Self {
        let fleet = Fleet::start().unwrap();
        let cluster = fleet.cluster("tested").unwrap();
        fleet
            .unenrolled_sidecar(&cluster, "node-1")
            .unwrap()
            .enrol(&fleet.token(&cluster, "node-1").unwrap())
            .unwrap();
        let worker = ["worker", "token", "--cluster", "tested", "--name", "census"];
        Identity::enrol(fleet.agent.ports.enrolment, fleet.kmsctl(&worker).unwrap().trim()).unwrap();
        fleet.cluster("gone").unwrap();
        fleet.kmsctl(&["cluster", "retire", "gone", "--yes"]).unwrap();
        let context = fleet.agent.directory.join("admin/kmsctl.toml");
        let rig = Self { fleet, context };
        rig.admin("spare", Role::Auditor);
        rig
    }

    fn command(&self, context: &Path, line: &[OsString]) -> Command {
        let mut command = Command::new(Program::Ctl.path().unwrap());
        command.args(line).env("KMSCTL_CONFIG", context).stdin(Stdio::null());
        command
    }

    fn run(&self, line: &[OsString]) -> Output {
        self.command(&self.context, line).output().unwrap()
    }

    /// The context of a new admin with one role.
    fn admin(&self, name: &str, role: Role) -> PathBuf {
        let directory = self.fleet.path().join(name);
        fs::create_dir(&directory).unwrap();
        fs::set_permissions(&directory, fs::Permissions::from_mode(0o700)).unwrap();
        let path = directory.display().to_string();
        self.fleet.host(&["admin", "issue", name, "--role", role.name(), "--directory", &path]).unwrap();
        directory.join("kmsctl.toml")
    }
}

/// The refusal has a message, says what to do, prints no answer, and ends as scripts expect.
fn refused(line: &[OsString], output: &Output, exit: i32, code: &str) {
    let error = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(exit), "{line:?}: {}", said(output));
    assert!(output.stdout.is_empty(), "{line:?}: {}", said(output));
    assert!(error.contains("kmsctl: ") && error.contains("\n  remedy: "), "{line:?}: {error}");
    assert!(error.contains(code), "{line:?}: {error}");
}

/// Wrong before anything is sent: clap's own words, which show the usage.
fn usage(line: &[OsString], output: &Output) {
    let error = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(USAGE), "{line:?}: {}", said(output));
    assert!(output.stdout.is_empty() && error.contains("error: "), "{line:?}: {}", said(output));
    assert!(error.contains("Usage: ") || error.contains("try '--help'"), "{line:?}: {error}");
}

#[test]
fn every_verb_refuses_names_that_do_not_exist_or_cannot() {
    let rig = Rig::start();
    let long = "a".repeat(64);
    let not_utf8 = OsStr::from_bytes(b"a\xff");
    for verb in verbs() {
        for (id, code) in [
            ("cluster", "cluster_not_found"),
            ("version", "version_not_found"),
            ("node", "node_not_found"),
            ("worker", "worker_not_found"),
            ("admin", "admin_not_found"),
            ("token", "token_not_found"),
        ] {
            if !verb.takes(id) || !verb.asks() {
                continue;
            }
            let unknown = if id == "version" { "4000000000" } else { "no-such" };
            for unknown in [unknown, if id == "version" { "0" } else { &long }] {
                let line = verb.line(&[(id, OsStr::new(unknown))]);
                refused(&line, &rig.run(&line), NOT_FOUND, code);
            }
        }
        // What is retired has no name but for who brings it back.
        if verb.takes("cluster") && verb.asks() && verb.name() != "cluster restore" {
            let line = verb.line(&[("cluster", OsStr::new("gone"))]);
            refused(&line, &rig.run(&line), NOT_FOUND, "cluster_not_found");
        }
        for (id, _) in &verb.needs {
            // A folder's name may be any bytes.
            if !["folder", "directory"].contains(&id.as_str()) {
                let line = verb.line(&[(id, not_utf8)]);
                usage(&line, &rig.run(&line));
            }
        }
        let mut line = verb.line(&[]);
        line.push("--no-such-option".into());
        usage(&line, &rig.run(&line));
    }
}

#[test]
fn a_cluster_needs_a_name_that_is_one_and_its_own() {
    let rig = Rig::start();
    let create = verbs().into_iter().find(|verb| verb.name() == "cluster create").unwrap();
    for bad in ["a".repeat(64).as_str(), "", "Upper", "under_score", "-a", "ü", "a/../b", "a b", "a\nb"] {
        let mut line = create.line(&[("name", OsStr::new("x"))]);
        line.pop();
        line.extend(["--".into(), bad.into()]);
        refused(&line, &rig.run(&line), USAGE, "invalid_field");
    }
    let line = create.line(&[("name", OsStr::new("tested"))]);
    refused(&line, &rig.run(&line), CONFLICT, "already_exists");
    let mut line = create.line(&[]);
    line.extend(["--period".into(), "59m".into()]);
    refused(&line, &rig.run(&line), USAGE, "invalid_field");
    let longest = create.line(&[("name", OsStr::new(&"a".repeat(63)))]);
    assert!(rig.run(&longest).status.success());
}

#[test]
fn every_change_refuses_a_stale_revision_or_says_that_it_knows_none() {
    let rig = Rig::start();
    rig.fleet.token_for("tested", "node-2").unwrap();
    let tokens = rig.fleet.kmsctl_json(&["node", "tokens", "--cluster", "tested"]).unwrap();
    let token = OsStr::new(tokens[0]["id"].as_str().unwrap());
    let seen = || {
        let cluster = rig.fleet.kmsctl_json(&["cluster", "show", "tested"]).unwrap();
        (cluster["revision"].clone(), rig.fleet.kmsctl_json(&["ca", "show"]).unwrap())
    };
    let before = seen();
    let (mut stale, mut without) = (Vec::new(), Vec::new());
    for verb in verbs().iter().filter(|verb| verb.has("if-revision")) {
        let mut lines = vec![verb.line(&[("token", token)])];
        if verb.name() == "ca rotate" {
            lines.push([lines[0].clone(), vec!["--compromised".into()]].concat());
        }
        for mut line in lines {
            line.extend(["--if-revision".into(), "1".into()]);
            let output = rig.run(&line);
            if output.status.code() == Some(USAGE) {
                refused(
                    &line,
                    &output,
                    USAGE,
                    "--if-revision: this change has nothing that could be at a revision",
                );
                without.push(verb.name());
            } else {
                refused(&line, &output, CONFLICT, "revision_mismatch");
                stale.push(verb.name());
            }
        }
    }
    assert_eq!(without, ["cluster create", "node token", "worker token", "ca rotate", "ca rotate"]);
    let changes = verbs().into_iter().filter(|verb| verb.has("dry-run"));
    let all: Vec<String> = changes.map(|verb| verb.name()).filter(|name| !without.contains(name)).collect();
    assert_eq!(stale, all, "every change takes a revision");
    assert!(stale.len() > 15, "{stale:?}");
    assert_eq!(seen(), before, "nothing was done");
}

#[test]
fn every_verb_is_denied_to_the_roles_that_the_table_does_not_name() {
    let rig = Rig::start();
    let roles = [Role::Operator, Role::KeyOfficer, Role::Auditor, Role::Enroller];
    let contexts: Vec<(Role, PathBuf)> = roles.map(|role| (role, rig.admin(role.name(), role))).into();
    let mut denied = 0;
    for verb in verbs() {
        let Some(operations) = verb.operations() else { continue };
        for (role, context) in &contexts {
            let may = operations.iter().all(|operation| {
                let row = TABLE.iter().find(|row| row.id == *operation).unwrap();
                row.who.contains(&Who::Admin(*role))
            });
            if !may {
                let line = verb.line(&[]);
                refused(&line, &rig.command(context, &line).output().unwrap(), DENIED, "(denied)");
                denied += 1;
            }
        }
    }
    assert!(denied > 20, "{denied}");
}

#[test]
fn every_verb_says_that_the_agent_is_away_and_that_the_certificate_has_expired() {
    let rig = Rig::start();
    let away = rig.fleet.path().join("away.toml");
    let text = fs::read_to_string(&rig.context).unwrap();
    let admin = rig.context.parent().unwrap();
    let text =
        text.replace(&format!(":{}\"", rig.fleet.agent.ports.admin), &format!(":{}\"", free_port().unwrap()));
    let text = ["certificate", "key", "roots"].iter().fold(text, |text, file| {
        text.replace(&format!("\n{file} = \""), &format!("\n{file} = \"{}/", admin.display()))
    });
    fs::write(&away, text).unwrap();
    fs::set_permissions(&away, fs::Permissions::from_mode(0o600)).unwrap();
    let clock = FakeClock::new(rig.fleet.path()).unwrap();
    clock.set(31 * 86_400).unwrap();
    for verb in verbs().iter().filter(|verb| verb.asks()) {
        let line = verb.line(&[]);
        refused(&line, &rig.command(&away, &line).output().unwrap(), UNAVAILABLE, "no link to 127.0.0.1:");
        let mut late = clock.apply_to(rig.command(&rig.context, &line)).unwrap();
        refused(&line, &late.output().unwrap(), DENIED, "spiffe://fleet.test/admin/first expired 1d");
    }
}

#[test]
fn every_dangerous_verb_wants_a_word_from_somebody() {
    let rig = Rig::start();
    let mut asked = Vec::new();
    for verb in verbs().iter().filter(|verb| verb.has("yes")) {
        let mut line = verb.line(&[]);
        line.pop();
        if verb.name() == "key rotate" {
            line.push("--fresh".into());
        }
        if verb.name() == "ca rotate" {
            line.push("--compromised".into());
        }
        let output = rig.run(&line);
        if !String::from_utf8_lossy(&output.stderr).contains("needs a confirmation") {
            // What undoes a danger is none.
            assert!(
                ["key enable", "key cancel-destroy", "node unban", "worker unban"]
                    .contains(&verb.name().as_str()),
                "{line:?}"
            );
            continue;
        }
        refused(&line, &output, USAGE, "there is no terminal to ask on");
        asked.push(verb.name());
    }
    let dangerous = [
        "cluster retire",
        "key rotate",
        "key disable",
        "key destroy",
        "node ban",
        "node remove",
        "worker ban",
        "worker remove",
        "admin remove",
        "ca rotate",
    ];
    assert_eq!(asked, dangerous);
    let nodes = rig.fleet.kmsctl_json(&["node", "list"]).unwrap();
    assert_eq!(nodes[0]["state"], "active", "nothing was done");
}
