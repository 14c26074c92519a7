//! No key, plaintext or token in anything that the programs write, at the most talkative log level.
#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "tests: what is not there fails them")]

use std::fs;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::os::unix::fs::{MetadataExt, chown};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;

use data_encoding::{BASE64, BASE64URL, HEXLOWER, HEXUPPER};
use fleet_kms_identity::JoinToken;
use fleet_kms_tests::child::Spec;
use fleet_kms_tests::fleet::{Agent, Fleet, Sidecar};
use fleet_kms_tests::kms_client::{Api, KmsClient};
use fleet_kms_tests::opened_store::OpenedStore;
use fleet_kms_tests::peers::ClientVersion;
use fleet_kms_tests::programs::Program;
use fleet_kms_tests::wait::START_LIMIT;

/// Names of files that hold secrets by their purpose. Everything else is searched, the store included.
const HOLDERS: [&str; 5] = ["root.key", "first.key", "key.pem", "key.pem.previous", "key.pem.next"];

/// What must be found nowhere, in every form in which a program might write bytes.
#[derive(Default)]
struct Secrets(Vec<(String, Vec<u8>)>);

impl Secrets {
    fn text(&mut self, name: &str, text: &str) {
        self.0.push((name.to_owned(), text.as_bytes().to_vec()));
    }

    fn bytes(&mut self, name: &str, bytes: &[u8]) {
        assert!(bytes.len() >= 16, "{name} is too short to be told from chance");
        let unpadded = |text: String| text.trim_end_matches('=').to_owned();
        let list = format!("{bytes:?}");
        self.0.push((format!("{name}, raw"), bytes.to_vec()));
        for (form, text) in [
            ("hex", HEXLOWER.encode(bytes)),
            ("upper hex", HEXUPPER.encode(bytes)),
            ("base64url", unpadded(BASE64URL.encode(bytes))),
            ("a list", list.trim_matches(['[', ']']).to_owned()),
            ("escaped", bytes.escape_ascii().to_string()),
            // Inside of something longer the first and last characters depend on the neighbours.
            ("base64", unpadded(BASE64.encode(bytes))),
            ("base64, one off", inner(&BASE64.encode(&[&[0], bytes].concat()))),
            ("base64, two off", inner(&BASE64.encode(&[&[0, 0], bytes].concat()))),
        ] {
            self.text(&format!("{name}, {form}"), &text);
        }
    }

    /// The secrets that occur in `content`.
    fn found_in(&self, content: &[u8]) -> Vec<&str> {
        let occurs = |secret: &[u8]| content.windows(secret.len()).any(|window| window == secret);
        self.0.iter().filter(|(_, secret)| occurs(secret)).map(|(name, _)| name.as_str()).collect()
    }
}

fn inner(text: &str) -> String {
    text[4..text.len() - 4].to_owned()
}

/// All regular files below a directory.
fn files(directory: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(directory).unwrap() {
        let path = entry.unwrap().path();
        let kind = fs::symlink_metadata(&path).unwrap().file_type();
        if kind.is_dir() {
            found.extend(files(&path));
        } else if kind.is_file() {
            found.push(path);
        }
    }
    found
}

/// What the programs said to whoever asked.
#[derive(Default)]
struct Said(Vec<(String, Vec<u8>)>);

impl Said {
    fn note(&mut self, what: &str, bytes: impl Into<Vec<u8>>) {
        self.0.push((what.to_owned(), bytes.into()));
    }

    fn kmsctl(&mut self, fleet: &Fleet, args: &[&str]) {
        let output = fleet.kmsctl_output(args).unwrap();
        self.note(&format!("kmsctl {args:?}"), [output.stdout, output.stderr].concat());
    }

    fn ops(&mut self, agent: &Agent, sidecar: &Sidecar) {
        for path in ["/metrics", "/readyz", "/livez"] {
            self.note(&format!("agent {path}"), agent.ops(path).unwrap().body);
            self.note(&format!("sidecar {path}"), sidecar.ops(path).unwrap().body);
        }
    }
}

/// Good and bad calls with `marker` in them; what comes back in clear is the caller's own.
fn calls(sidecar: &Sidecar, marker: &[u8], said: &mut Said) {
    let plain = BASE64.encode(marker);
    let long = BASE64.encode(&marker.repeat(40));
    for api in Api::ALL {
        let client = KmsClient::new(ClientVersion::V0_37_2, api, &sidecar.socket).unwrap();
        let wrapped = client.call(&["encrypt", "-plain", &plain]).unwrap().last().unwrap();
        let back = client.call(&["decrypt", "-answer", &wrapped.to_string()]).unwrap().last().unwrap();
        assert_eq!(back["plain"], plain.as_str());
        said.note("a wrapped DEK", wrapped.to_string());
        let refused = client.call(&["encrypt", "-plain", &long]).unwrap().refused().unwrap();
        said.note("a refused plaintext", refused.error);
        let mut marked = wrapped.clone();
        let mut cipher = BASE64.decode(wrapped["cipher"].as_str().unwrap().as_bytes()).unwrap();
        cipher[45..45 + marker.len()].copy_from_slice(marker);
        marked["cipher"] = BASE64.encode(&cipher).into();
        let refused = client.call(&["decrypt", "-answer", &marked.to_string()]).unwrap().refused().unwrap();
        said.note("a refused DEK", refused.error);
    }
    // The marker where no frame and no message should have it.
    for garbage in [marker.repeat(8), [b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", &marker.repeat(8)[..]].concat()] {
        let mut stream = UnixStream::connect(&sidecar.socket).unwrap();
        let _ = stream.write_all(&garbage);
        let mut answer = Vec::new();
        let _ = stream.read_to_end(&mut answer);
        said.note("the answer to garbage", answer);
    }
    let client = KmsClient::new(ClientVersion::V0_37_2, Api::V1, &sidecar.socket).unwrap();
    // Field 1 is a text: as bytes that are none it does not decode.
    let message = BASE64.encode(&[&[0x0a, 32], marker].concat());
    let raw = ["raw", "-method", "/v1beta1.KeyManagementService/Encrypt", "-message", &message];
    said.note("a message that does not decode", client.call(&raw).unwrap().last().unwrap().to_string());
}

/// Commands of an operator, some of which are refused.
const COMMANDS: [&[&str]; 9] = [
    &["key", "rotate", "leaks"],
    &["key", "rotate", "leaks", "--fresh", "--yes"],
    &["key", "versions", "leaks", "-o", "json"],
    &["cluster", "show", "leaks", "-o", "yaml"],
    &["cluster", "create", "leaks"],
    &["node", "list", "--cluster", "leaks", "-o", "json"],
    &["node", "tokens", "--cluster", "leaks", "-o", "json"],
    &["status", "-o", "json"],
    &["context", "show"],
];

#[test]
fn no_key_plaintext_or_token_is_in_any_log_audit_error_or_metric_at_trace_level() {
    let mut marker = [0_u8; 32];
    fs::File::open("/dev/urandom").unwrap().read_exact(&mut marker).unwrap();
    let mut secrets = Secrets::default();
    secrets.bytes("the plaintext", &marker);
    let mut said = Said::default();

    let mut fleet = Fleet::start_with("[log]\nfilter = \"trace\"").unwrap();
    let mut sidecars = enrolled(&fleet, &mut secrets, &mut said);
    for sidecar in &mut sidecars {
        sidecar.wait_ready().unwrap();
        calls(sidecar, &marker, &mut said);
        said.ops(&fleet.agent, sidecar);
    }
    for args in COMMANDS {
        said.kmsctl(&fleet, args);
    }
    calls(&sidecars[0], &marker, &mut said);
    let ports = fleet.agent.ports;
    for port in [ports.data, ports.enrolment, ports.admin, ports.ops] {
        let mut stream = TcpStream::connect(("127.0.0.1", port)).unwrap();
        let _ = stream.write_all(&marker.repeat(4));
        let mut answer = Vec::new();
        let _ = stream.read_to_end(&mut answer);
        said.note("an agent's answer to garbage", answer);
    }
    for sidecar in &mut sidecars {
        sidecar.stop().unwrap();
        let log = sidecar.log().unwrap();
        assert!(log.contains("DEBUG") && log.contains("a connection broke"), "not talkative: {log}");
    }
    fleet.agent.stop().unwrap();
    let log = fleet.agent.log().unwrap();
    assert!(log.contains("DEBUG") && log.contains("a connection was refused"), "not talkative: {log}");
    keys(&fleet, &sidecars, &mut secrets);
    control(&fleet, &secrets);
    search(&fleet, &secrets, said);
}

/// Two running nodes: one enrolled by hand, one by a file, both after tokens that were refused.
fn enrolled(fleet: &Fleet, secrets: &mut Secrets, said: &mut Said) -> [Sidecar; 2] {
    let cluster = fleet.cluster("leaks").unwrap();
    let [used, other] = ["node-1", "node-2"].map(|node| {
        let token = fleet.token(&cluster, node).unwrap();
        secrets.text("a token", &token);
        secrets.bytes("a token's secret", token.parse::<JoinToken>().unwrap().expose_secret());
        token
    });
    let mut sidecars = ["node-1", "node-2"].map(|node| fleet.unenrolled_sidecar(&cluster, node).unwrap());
    for sidecar in &mut sidecars {
        sidecar.respec(|spec| spec.env("FLEET_KMS_SIDECAR__LOG__FILTER", "trace"));
    }
    let [by_hand, by_file] = &mut sidecars;
    by_hand.respec(|spec| spec.env("FLEET_KMS_SIDECAR__LOG__FORMAT", "json"));
    for (token, what) in [(used.as_str(), "enrol"), (&used, "a used token"), (&other[..60], "a cut one")] {
        let output = by_hand.enrol_output(token).unwrap();
        said.note(what, [output.stdout, output.stderr].concat());
    }
    by_hand.start().unwrap();
    // A token that is refused stays in its place and is tried again, with a line in the log.
    let file = by_file.identity.join("token");
    fs::write(&file, &used).unwrap();
    by_file.start().unwrap();
    by_file.running().unwrap().wait_for_line("cannot enrol; the token stays", START_LIMIT).unwrap();
    by_file.stop().unwrap();
    fs::write(&file, &other).unwrap();
    by_file.start().unwrap();
    sidecars
}

/// Shows that each secret would be found, in each of its forms, and that files are read.
fn control(fleet: &Fleet, secrets: &Secrets) {
    for (name, secret) in &secrets.0 {
        let planted = [b"level=TRACE value=", secret.as_slice(), b"\n"].concat();
        assert!(secrets.found_in(&planted).contains(&name.as_str()), "{name}");
    }
    let held = files(fleet.path()).into_iter().filter(|path| is_holder(path));
    let found = held.filter(|path| !secrets.found_in(&fs::read(path).unwrap()).is_empty()).count();
    assert_eq!(found, 4, "the root key, the admin's and the nodes'");
}

/// Looks into every file of the fleet, and into all that was said.
fn search(fleet: &Fleet, secrets: &Secrets, said: Said) {
    let mut searched = Vec::new();
    let mut leaks = Vec::new();
    let everything = files(fleet.path()).into_iter().filter(|path| !is_holder(path));
    let written = everything.map(|path| (path.display().to_string(), fs::read(&path).unwrap()));
    for (place, content) in written.chain(said.0) {
        leaks.extend(secrets.found_in(&content).into_iter().map(|secret| format!("{secret} in {place}")));
        searched.push(place);
    }
    assert!(leaks.is_empty(), "{leaks:#?}");
    for must in [
        "kms-agent.stderr",
        "kms-sidecar.stderr",
        "changes-",
        "data-",
        "store.db",
        "state.json",
        "agent /metrics",
    ] {
        assert!(searched.iter().any(|place| place.contains(must)), "{must} is not in {searched:#?}");
    }
}

fn is_holder(path: &Path) -> bool {
    path.file_name().is_some_and(|name| HOLDERS.iter().any(|holder| name == *holder))
}

/// The keys of the fleet: root, KEKs, CAs, the admin's and the nodes'.
fn keys(fleet: &Fleet, sidecars: &[Sidecar], secrets: &mut Secrets) {
    let agent = &fleet.agent.directory;
    let root = fs::read_to_string(agent.join("root.key")).unwrap();
    secrets.bytes("the root key", &HEXLOWER.decode(root.trim().as_bytes()).unwrap());
    let mut pems = vec![("the admin's key", agent.join("admin/first.key"))];
    pems.extend(sidecars.iter().map(|sidecar| ("a node's key", sidecar.identity.join("key.pem"))));
    for (name, pem) in pems {
        let text = fs::read_to_string(pem).unwrap();
        let body: String = text.lines().filter(|line| !line.starts_with("-----")).collect();
        // The first line of PEM; the public key, which anyone may see, is in the later ones.
        secrets.text(name, text.lines().nth(1).unwrap());
        secrets.bytes(name, scalar(&BASE64.decode(body.as_bytes()).unwrap()));
    }
    let opened = OpenedStore::of(agent).unwrap();
    assert!(opened.keks.len() >= 5, "two of the start and one or two of each rotation");
    for kek in &opened.keks {
        secrets.bytes("a KEK", kek);
    }
    for key in &opened.derived {
        secrets.bytes("a key of the store", key);
    }
    for (row, key) in &opened.authorities {
        secrets.bytes(row, scalar(key));
    }
}

/// The private number of a P-256 key in PKCS #8: the 32 bytes after SEC 1's `version 1, OCTET STRING (32)`.
fn scalar(pkcs8: &[u8]) -> &[u8] {
    let mark = [2, 1, 1, 4, 32];
    let at = pkcs8.windows(mark.len()).position(|window| window == mark).unwrap() + mark.len();
    &pkcs8[at..at + 32]
}

/// The user `nobody`: a process of it that may be looked into belongs to it in /proc too.
const NOBODY: u32 = 65_534;

#[test]
fn no_program_can_be_dumped_or_looked_into() {
    let mut fleet = Fleet::start().unwrap();
    let mut sidecar = fleet.sidecar(&fleet.cluster("dumps").unwrap(), "node-1").unwrap();
    for pid in [fleet.agent.running().unwrap().pid(), sidecar.running().unwrap().pid()] {
        let limits = fs::read_to_string(format!("/proc/{pid}/limits")).unwrap();
        let core = limits.lines().find(|line| line.starts_with("Max core file size")).unwrap();
        assert_eq!(core.split_whitespace().collect::<Vec<_>>()[4..6], ["0", "0"], "{core}");
    }

    // A process that cannot be dumped belongs to root in /proc. Only as another user than root does that show.
    fleet.agent.stop().unwrap();
    sidecar.stop().unwrap();
    let is_root = fs::metadata("/proc/self").unwrap().uid() == 0;
    if is_root {
        for path in all_below(fleet.path()) {
            chown(path, Some(NOBODY), Some(NOBODY)).unwrap();
        }
    }
    let control =
        as_other_user(Path::new("/bin/sleep"), is_root, fleet.path(), "control").arg("60").start().unwrap();
    assert_ne!(owner_once(control.pid(), "sleep"), 0);
    let (agent, node) = (fleet.agent.config.clone(), sidecar.config.clone());
    for (program, name, config) in
        [(Program::Agent, "kms-agent", agent), (Program::Sidecar, "kms-sidecar", node)]
    {
        let copy = fleet.path().join(name);
        fs::copy(program.path().unwrap(), &copy).unwrap();
        let spec = as_other_user(&copy, is_root, fleet.path(), &format!("{name}-as-other"));
        let mut child = spec.args(["run", "--config"]).arg(config).start().unwrap();
        child.wait_for_line("serving", START_LIMIT).unwrap();
        assert_eq!(owner_once(child.pid(), name), 0, "{name} may be dumped");
    }
}

/// A program as `nobody`, or as we are where that is not root.
fn as_other_user(program: &Path, is_root: bool, logs: &Path, name: &str) -> Spec {
    if !is_root {
        return Spec::new(name, program, logs);
    }
    let id = NOBODY.to_string();
    let setpriv = Spec::new(name, &which("setpriv"), logs);
    setpriv.args(["--reuid", &id, "--regid", &id, "--clear-groups"]).arg(program)
}

/// Who owns the process in /proc, once it runs `name`.
fn owner_once(pid: u32, name: &str) -> u32 {
    fleet_kms_tests::wait::until(name, START_LIMIT, || {
        let runs = fs::read_to_string(format!("/proc/{pid}/comm"))?.trim() == name;
        Ok(runs.then_some(()))
    })
    .unwrap();
    fs::metadata(format!("/proc/{pid}/environ")).unwrap().uid()
}

fn which(name: &str) -> PathBuf {
    let output = Command::new("sh").args(["-c", &format!("command -v {name}")]).output().unwrap();
    PathBuf::from(String::from_utf8(output.stdout).unwrap().trim())
}

fn all_below(directory: &Path) -> Vec<PathBuf> {
    let mut all = vec![directory.to_owned()];
    for entry in fs::read_dir(directory).unwrap() {
        let path = entry.unwrap().path();
        match fs::symlink_metadata(&path).unwrap().is_dir() {
            true => all.extend(all_below(&path)),
            false => all.push(path),
        }
    }
    all
}
