//! Enrolments that go wrong half-way: the reply is lost, the agent or the client is killed. Every node ends with a
//! working identity by running the same command again, and nothing is issued twice.
#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::panic,
    reason = "tests: what is not there fails them"
)]

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::thread;
use std::time::Duration;

use fleet_kms_identity::Directory;
use fleet_kms_process::runtime;
use fleet_kms_tests::fleet::{Cluster, Fleet, Ports, Sidecar};
use fleet_kms_tests::member::Member;
use fleet_kms_tests::opened_store::issued_serials;
use fleet_kms_tests::programs::Program;
use fleet_kms_tests::proxy::{Cut, Proxy};
use rand_core::{TryRng, UnwrapErr};
use serde_json::Value;

/// Nodes that enrol at the same time.
const AT_A_TIME: usize = 10;
/// The same command again without a fault: once would do, but for a machine that is busy.
const TRIES: usize = 5;
/// Bytes of a whole enrolment, each way, and a little more: a cut may fall anywhere in it, or not happen.
const REPLY_BYTES: u64 = 6_000;
const REQUEST_BYTES: u64 = 3_000;
/// About as long as an enrolment takes here.
const MOMENT: Duration = Duration::from_millis(400);

/// A number that a longer run makes larger.
fn number(name: &str, default: usize) -> usize {
    std::env::var(name).map_or(default, |text| text.parse().unwrap())
}

/// A number below `limit`.
fn random(limit: u64) -> u64 {
    UnwrapErr(getrandom::SysRng).try_next_u64().unwrap() % limit
}

/// One node on its way into the fleet.
struct Node {
    name: String,
    sidecar: Sidecar,
    token: PathBuf,
}

/// How the first try ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum First {
    Enrolled,
    Failed,
    Killed,
}

impl Node {
    fn new(fleet: &Fleet, cluster: &Cluster, name: String, proxy: u16) -> Self {
        let directory = fleet.path().join(&name);
        let sidecar =
            Sidecar::lay_out(&directory, &[Ports { enrolment: proxy, ..fleet.agent.ports }]).unwrap();
        let token = directory.join("token");
        fs::write(&token, fleet.token(cluster, &name).unwrap()).unwrap();
        Self { name, sidecar, token }
    }

    fn command(&self) -> Command {
        let mut enrol = Command::new(Program::Sidecar.path().unwrap());
        enrol.arg("enrol").arg("--config").arg(&self.sidecar.config);
        enrol.arg("--token-file").arg(&self.token).stdin(Stdio::null());
        enrol
    }

    /// Runs the command; a client that is to die is killed after a moment.
    fn try_first(&self, kill_after: Option<Duration>) -> First {
        let mut command = self.command();
        let mut child = command.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
        if let Some(moment) = kill_after {
            thread::sleep(moment);
            if child.try_wait().unwrap().is_none() {
                child.kill().unwrap();
                child.wait().unwrap();
                return First::Killed;
            }
        }
        let output = child.wait_with_output().unwrap();
        if output.status.success() {
            return First::Enrolled;
        }
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(1), "{}: {text}", self.name);
        assert!(text.starts_with("kms-sidecar: no agent gave a certificate: "), "{}: {text}", self.name);
        First::Failed
    }

    /// Runs the same command with the same token again, unless there is an identity by now; returns how often.
    fn enrol_after_all(&self) -> usize {
        // Also of a client that was killed once the certificate was on disk.
        let identity = Directory::open(&self.sidecar.identity).unwrap();
        if identity.load().unwrap().is_some() {
            return 0;
        }
        let mut said = String::new();
        for tries in 1..=TRIES {
            let output = self.command().output().unwrap();
            if output.status.success() {
                return tries;
            }
            said = String::from_utf8_lossy(&output.stderr).into_owned();
        }
        panic!("{}: {said}", self.name);
    }
}

#[test]
fn an_enrolment_that_goes_wrong_half_way_is_repeated_with_the_same_token() {
    let mut fleet = Fleet::start().unwrap();
    let cluster = fleet.cluster("one").unwrap();
    let proxy = Proxy::start(fleet.agent.ports.enrolment).unwrap();
    let rounds = number("ENROLMENTS", 40).div_ceil(AT_A_TIME);
    let mut first = BTreeMap::<(&str, First), usize>::new();
    let mut repeats = BTreeMap::<usize, usize>::new();
    let mut nodes = Vec::new();
    for round in 0..rounds {
        let some: Vec<Node> = (0..AT_A_TIME)
            .map(|n| Node::new(&fleet, &cluster, format!("node-{}", round * AT_A_TIME + n), proxy.port()))
            .collect();
        let fault = ["reply cut", "client killed", "agent killed"][round % 3];
        if fault == "reply cut" {
            proxy.cut(|| match random(3) {
                0 => Cut { request: random(REQUEST_BYTES), reply: u64::MAX },
                _ => Cut { request: u64::MAX, reply: random(REPLY_BYTES) },
            });
        }
        let ended = thread::scope(|scope| {
            let tries: Vec<_> = some
                .iter()
                .map(|node| {
                    let moment = Duration::from_micros(random(MOMENT.as_micros() as u64));
                    scope.spawn(move || node.try_first((fault == "client killed").then_some(moment)))
                })
                .collect();
            if fault == "agent killed" {
                thread::sleep(Duration::from_micros(random(MOMENT.as_micros() as u64)));
                fleet.agent.kill9().unwrap();
                fleet.agent.start().unwrap();
            }
            tries.into_iter().map(|node| node.join().unwrap()).collect::<Vec<_>>()
        });
        ended.into_iter().for_each(|end| *first.entry((fault, end)).or_default() += 1);
        proxy.cut(Cut::never);
        // No honest try is a guess: its address would run out of them.
        let lines = fleet.agent.audit("changes").unwrap();
        let refused: Vec<_> = lines.iter().filter(|line| line["action"] == "enrol_refused").collect();
        assert!(refused.is_empty(), "{fault}: {refused:?}");
        thread::scope(|scope| {
            let again: Vec<_> = some.iter().map(|node| scope.spawn(|| node.enrol_after_all())).collect();
            for tries in again {
                *repeats.entry(tries.join().unwrap()).or_default() += 1;
            }
        });
        nodes.extend(some);
        println!("{} enrolments; the first tries: {first:?}; repeated so often: {repeats:?}", nodes.len());
    }
    let serials = working_identities(&fleet, &nodes);
    fleet.agent.stop().unwrap();
    issued_once(&fleet, &nodes, &serials);
}

#[test]
fn the_command_run_again_after_it_succeeded_says_that_the_node_is_enrolled() {
    let fleet = Fleet::start().unwrap();
    let cluster = fleet.cluster("one").unwrap();
    let node = Node::new(&fleet, &cluster, "node-1".to_owned(), fleet.agent.ports.enrolment);
    assert!(node.command().output().unwrap().status.success());
    let again = node.command().output().unwrap();
    let said = String::from_utf8_lossy(&again.stderr).into_owned();
    assert_eq!(again.status.code(), Some(1), "{said}");
    assert!(said.contains("token_used_up"), "{said}");
    assert!(said.contains("this node has an identity already, spiffe://fleet.test/cluster/"), "{said}");
    working_identities(&fleet, &[node]);
}

/// Calls with each identity; returns the serials.
fn working_identities(fleet: &Fleet, nodes: &[Node]) -> BTreeSet<String> {
    let runtime = runtime::multi_thread().unwrap();
    let serials = nodes.iter().map(|node| {
        let member = Member::of_node(&node.sidecar.identity).unwrap();
        runtime.block_on(async {
            let mut link = member.data(fleet.agent.ports).await.unwrap();
            let wrapped = link.wrap(&[7; 32]).await.unwrap();
            link.unwrap(&wrapped).await.unwrap();
        });
        member.certificate().unwrap().serial().to_string()
    });
    serials.collect()
}

/// The store knows each node by the certificate that it has, and the audit one enrolment of each.
fn issued_once(fleet: &Fleet, nodes: &[Node], serials: &BTreeSet<String>) {
    assert_eq!(serials.len(), nodes.len(), "two nodes have one serial");
    let stored = issued_serials(&fleet.agent.directory).unwrap();
    let of_nodes: Vec<_> = stored.iter().filter(|(id, _)| id.contains("/node/")).collect();
    assert_eq!(of_nodes.len(), nodes.len());
    assert_eq!(&of_nodes.iter().map(|(_, serial)| serial.to_string()).collect::<BTreeSet<_>>(), serials);
    let numbers: BTreeSet<_> = stored.iter().map(|(_, serial)| serial.issue_number()).collect();
    assert_eq!(numbers.len(), stored.len(), "an issue number was given out twice");
    let lines = fleet.agent.audit("changes").unwrap();
    let change = |line: &Value| line["change"].as_str().unwrap_or_default().to_owned();
    let done: BTreeSet<_> = lines.iter().filter(|line| line["outcome"] == "done").map(&change).collect();
    let mut enrolled = BTreeMap::<String, usize>::new();
    for line in lines.iter().filter(|line| line["action"] == "enrol" && done.contains(&change(line))) {
        *enrolled.entry(line["target"].as_str().unwrap().to_owned()).or_default() += 1;
    }
    assert_eq!(enrolled.len(), nodes.len());
    assert!(enrolled.values().all(|times| *times == 1), "{enrolled:?}");
}
