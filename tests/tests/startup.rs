//! Programs that must not start, with the status and the words that they end with.
#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "tests: what is not there fails them")]

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use fleet_kms_tests::fleet::{Agent, Fleet, Sidecar};
use fleet_kms_tests::ports::free_port;
use fleet_kms_tests::programs::Program;
use fleet_kms_tests::refusal::{Refusal, refusal};
use tempfile::TempDir;

/// Exit statuses of both programs (`process::exit`).
const FAILURE: i32 = 1;
const CONFIG: i32 = 64;
const DATA: i32 = 65;
const BUSY: i32 = 69;

fn run(program: Program, config: &Path) -> Refusal {
    with_environment(program, config, &[])
}

fn with_environment(program: Program, config: &Path, environment: &[(&str, &str)]) -> Refusal {
    refusal(program, ["run", "--config", config.to_str().unwrap()], environment).unwrap()
}

/// A copy of a configuration with one text replaced, which must be there.
fn edited(config: &Path, from: &str, to: &str) -> PathBuf {
    let text = fs::read_to_string(config).unwrap();
    assert!(text.contains(from), "{from:?} is not in {text}");
    let path = config.with_extension("edited.toml");
    fs::write(&path, text.replacen(from, to, 1)).unwrap();
    path
}

/// A copy of an agent's configuration that listens elsewhere.
fn on_other_ports(agent: &Agent) -> PathBuf {
    let mut text = fs::read_to_string(&agent.config).unwrap();
    let ports = agent.ports;
    for port in [ports.data, ports.enrolment, ports.admin, ports.ops] {
        text = text.replace(&format!(":{port}\""), &format!(":{}\"", free_port().unwrap()));
    }
    let path = agent.config.with_extension("other.toml");
    fs::write(&path, text).unwrap();
    path
}

fn agent() -> (TempDir, Agent) {
    let dir = tempfile::tempdir().unwrap();
    let agent = Agent::init(&dir.path().join("agent"), "").unwrap();
    (dir, agent)
}

fn sidecar() -> (TempDir, Sidecar) {
    let dir = tempfile::tempdir().unwrap();
    let sidecar = Sidecar::lay_out(&dir.path().join("node"), &[]).unwrap();
    (dir, sidecar)
}

#[test]
fn a_config_typo_in_a_file_ends_with_64_and_names_place_key_and_remedy() {
    let (_agent_dir, agent) = agent();
    let (_sidecar_dir, sidecar) = sidecar();
    for (program, config, from, to, parts) in [
        (
            Program::Agent,
            &agent.config,
            "trust_domain",
            "trust_domian",
            [":3:1: key `agent.trust_domian`: is unknown; ", "this table knows `name`, `trust_domain`"],
        ),
        (
            Program::Agent,
            &agent.config,
            "[root]\nfile = \"/",
            "[root]\nfile = \"",
            [":13:1: key `root.file`: ", "is not an absolute path; begin it with /"],
        ),
        (
            Program::Agent,
            &agent.config,
            "[store]",
            "[store",
            [":10:7: ", "correct this line, it is not TOML"],
        ),
        (
            Program::Sidecar,
            &sidecar.config,
            "directory =",
            "direktory =",
            [":4:1: key `identity.direktory`: is unknown; ", "this table knows `directory` or `node`"],
        ),
        (
            Program::Sidecar,
            &sidecar.config,
            "[ops]\naddress = \"127.0.0.1:",
            "[ops]\naddress = \"127.0.0.1.",
            [
                ":8:1: key `ops.address`: invalid socket address",
                "; write an IP address and a port, such as 127.0.0.1:7443",
            ],
        ),
    ] {
        run(program, &edited(config, from, to)).must_be(CONFIG, &parts);
    }
    for program in [Program::Agent, Program::Sidecar] {
        let parts = ["cannot read the configuration /nowhere.toml; create it, or name another file"];
        run(program, Path::new("/nowhere.toml")).must_be(CONFIG, &parts);
    }
}

#[test]
fn a_config_typo_in_the_environment_ends_with_64_and_names_variable_key_and_remedy() {
    let (_agent_dir, agent) = agent();
    let (_sidecar_dir, sidecar) = sidecar();
    for (program, config, name, value, parts) in [
        (
            Program::Agent,
            &agent.config,
            "FLEET_KMS_AGENT__ROOT__FIEL",
            "/x",
            ["key `root.fiel`: is unknown; ", "this table knows `file`"],
        ),
        (
            Program::Agent,
            &agent.config,
            "FLEET_KMS_AGENT__LOG__FORMAT",
            "xml",
            ["key `log.format`: `xml` is no log format; ", "write \"text\" or \"json\""],
        ),
        (
            Program::Sidecar,
            &sidecar.config,
            "FLEET_KMS_SIDECAR__LOG__FORMAT",
            "xml",
            ["key `log.format`: `xml` is no log format; ", "write \"text\" or \"json\""],
        ),
        (
            Program::Sidecar,
            &sidecar.config,
            "FLEET_KMS_SIDECAR__TIMING__HOLD_FOR",
            "soon",
            ["key `timing.hold_for`: ", "; write a number and a unit, such as 30s, 12h or 30days"],
        ),
        (
            Program::Sidecar,
            &sidecar.config,
            "FLEET_KMS_SIDECAR__AGENTS__ADDRESSES",
            "10.0.0.7:7443",
            ["key `agents.addresses`: ", "; a list can only be set in the file"],
        ),
    ] {
        let refused = with_environment(program, config, &[(name, value)]);
        refused.must_be(CONFIG, &[&format!("environment variable {name}: ")]);
        refused.must_be(CONFIG, &parts);
    }
}

#[test]
fn a_directory_that_is_missing_is_named_and_not_made() {
    let (dir, sidecar) = sidecar();
    let no_run = edited(&sidecar.config, "/run/kms.sock", "/nowhere/kms.sock");
    let missing = dir.path().join("node/nowhere");
    let named = format!("the socket's directory {} does not exist; create it", missing.display());
    run(Program::Sidecar, &no_run).must_be(FAILURE, &[&named]);
    assert!(!missing.exists());

    let no_identity = edited(&sidecar.config, "/identity\"", "/nowhere\"");
    let parts = ["identity.directory", "create it for this process's user", missing.to_str().unwrap()];
    run(Program::Sidecar, &no_identity).must_be(FAILURE, &parts);
    assert!(!missing.exists());

    let (_agent_dir, agent) = agent();
    let no_audit = edited(&agent.config, "/audit\"", "/nowhere\"");
    let missing = agent.directory.join("nowhere");
    let named = format!("there is no audit directory {} (audit.directory); create it", missing.display());
    run(Program::Agent, &no_audit).must_be(FAILURE, &[&named]);
    assert!(!missing.exists());
}

#[test]
fn a_port_that_is_taken_is_named_with_its_key_and_its_owner_lives_on() {
    let mut fleet = Fleet::start().unwrap();
    let other = on_other_ports(&fleet.agent);
    for port in ["data", "enrolment", "admin", "ops"] {
        let ports = fleet.agent.ports;
        let taken = match port {
            "data" => ports.data,
            "enrolment" => ports.enrolment,
            "admin" => ports.admin,
            _ => ports.ops,
        };
        let variable = format!("FLEET_KMS_AGENT__LISTEN__{}", port.to_uppercase());
        let address = format!("127.0.0.1:{taken}");
        let refused = with_environment(Program::Agent, &other, &[(&variable, &address)]);
        let named = format!("cannot listen on the {port} port (listen.{port}): port {taken} is in use");
        refused.must_be(BUSY, &[&named, "stop its owner", "or configure another port"]);
    }
    let (_dir, sidecar) = sidecar();
    let ops = fleet.agent.ports.ops;
    let address = format!("127.0.0.1:{ops}");
    let refused =
        with_environment(Program::Sidecar, &sidecar.config, &[("FLEET_KMS_SIDECAR__OPS__ADDRESS", &address)]);
    refused.must_be(
        BUSY,
        &[&format!("cannot listen on the ops port (ops.address): port {ops} is in use"), "stop its owner"],
    );
    assert!(fleet.agent.running().unwrap().is_running().unwrap());
    fleet.cluster("still-there").unwrap();
}

#[test]
fn a_root_key_file_that_cannot_be_used_is_named_with_a_remedy() {
    let (_dir, agent) = agent();
    let root = agent.directory.join("root.key");
    let kept = fs::read(&root).unwrap();
    let path = root.to_str().unwrap();
    let mode = |mode| fs::set_permissions(&root, fs::Permissions::from_mode(mode)).unwrap();

    mode(0o644);
    let chmod = format!("root key file {path} has mode 0644; run chmod 0400 {path}");
    run(Program::Agent, &agent.config).must_be(CONFIG, &[&chmod]);

    mode(0o600);
    fs::write(&root, &kept[..31]).unwrap();
    let length = format!("root key file {path} has 31 bytes; it must hold 32 raw bytes, 64 hex digits");
    run(Program::Agent, &agent.config).must_be(CONFIG, &[&length]);

    fs::write(&root, [7; 32]).unwrap();
    let other = format!("{path} does not open the store; use a root key or passphrase of one of its slots");
    run(Program::Agent, &agent.config).must_be(DATA, &[&other]);

    fs::remove_file(&root).unwrap();
    let missing = format!("cannot read root key file {path}; check its name");
    run(Program::Agent, &agent.config).must_be(CONFIG, &[&missing]);
}

#[test]
fn an_audit_that_cannot_be_written_keeps_the_agent_from_starting() {
    let (_dir, agent) = agent();
    let audit = agent.directory.join("audit");
    let kept = agent.directory.join("audit.kept");
    fs::rename(&audit, &kept).unwrap();
    fs::create_dir(&audit).unwrap();
    // Root has given up its capabilities by the time it looks.
    fs::set_permissions(&audit, fs::Permissions::from_mode(0o500)).unwrap();
    let named = format!("cannot use the audit in {} (audit.directory)", audit.display());
    run(Program::Agent, &agent.config)
        .must_be(FAILURE, &[&named, "writable for this process's user", "Permission denied"]);

    fs::remove_dir(&audit).unwrap();
    fs::write(&audit, "a file").unwrap();
    let named = format!("there is no audit directory {}", audit.display());
    run(Program::Agent, &agent.config).must_be(FAILURE, &[&named]);
}

#[test]
fn a_second_agent_on_one_store_is_refused_and_names_the_first() {
    let mut fleet = Fleet::start().unwrap();
    let first = fleet.agent.running().unwrap().pid();
    let other = on_other_ports(&fleet.agent);
    let named = format!("the store is in use by process {first}; stop that one first");
    run(Program::Agent, &other).must_be(BUSY, &[&named, "store.db"]);
    fleet.cluster("still-there").unwrap();
}

#[test]
fn a_store_file_that_is_cut_short_or_gone_is_named() {
    let (_dir, agent) = agent();
    let store = agent.directory.join("store.db");
    let whole = fs::read(&store).unwrap();
    let path = store.to_str().unwrap();
    for (length, what) in [
        (0, "the file is no sqlite database; restore the store from a backup"),
        (50, "the file is no sqlite database; restore the store from a backup"),
        (whole.len() / 2, "the store is damaged and must be restored from a backup"),
        (whole.len() - 1, "the store is damaged and must be restored from a backup: the file has"),
    ] {
        fs::write(&store, &whole[..length]).unwrap();
        run(Program::Agent, &agent.config).must_be(DATA, &[path, what]);
        let check = ["check-store", "--config", agent.config.to_str().unwrap()];
        refusal(Program::Agent, check, &[]).unwrap().must_be(DATA, &[path, what]);
    }
    fs::remove_file(&store).unwrap();
    let missing = format!("there is no store {path} (store.path); run kms-agent init, or restore a backup");
    run(Program::Agent, &agent.config).must_be(DATA, &[&missing]);
    assert!(!store.exists());

    rusqlite::Connection::open(&store).unwrap().execute_batch("CREATE TABLE other (a); VACUUM;").unwrap();
    run(Program::Agent, &agent.config)
        .must_be(DATA, &[path, "is a sqlite database but no fleet-kms store; name the right file"]);
}
