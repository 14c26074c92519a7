//! Compares the workspace's normal dependencies, direct and transitive, with the table of crates in
//! ARCHITECTURE.md. A new edge needs a decision record, then a line here.
#![expect(clippy::indexing_slicing, reason = "a test: a wrong index fails it")]

use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet};
use std::process::Command;

/// Who may use whom, by folder. A crate that is not here fails the test.
const TABLE: [(&str, &[&str]); 12] = [
    ("proto", &[]),
    ("keyring", &[]),
    ("seal", &["keyring"]),
    ("store", &[]),
    ("audit", &[]),
    ("identity", &[]),
    ("transport", &["identity"]),
    ("process", &["transport", "identity"]),
    ("admin-api", &[]),
    ("sidecar", &["proto", "identity", "transport", "process"]),
    (
        "agent",
        &["proto", "keyring", "seal", "store", "audit", "identity", "transport", "process", "admin-api"],
    ),
    ("ctl", &["admin-api", "audit", "identity", "proto", "keyring", "transport", "process"]),
];

/// May use everything, and nothing may use it.
const TESTS: &str = "fleet-kms-tests";
const PREFIX: &str = "fleet-kms-";

/// What the sidecar must not even link: keys, the store, and the ciphers and key derivations they use.
const NEVER_IN_THE_SIDECAR: [&str; 9] = [
    "rusqlite",
    "libsqlite3-sys",
    "aes-gcm",
    "xaes-256-gcm",
    "argon2",
    "memsec",
    "fleet-kms-keyring",
    "fleet-kms-seal",
    "fleet-kms-store",
];

/// Crates of others that only these crates of ours may name themselves.
const NAMED_ONLY_BY: [(&str, &[&str]); 6] = [
    ("rustls", &["transport"]),
    ("tokio-rustls", &["transport"]),
    ("aes-gcm", &["keyring"]),
    ("xaes-256-gcm", &["keyring"]),
    ("memsec", &["seal"]),
    ("rusqlite", &["store"]),
];

/// The resolved graph of normal dependencies, by package name.
struct Graph {
    edges: BTreeMap<String, BTreeSet<String>>,
    members: BTreeSet<String>,
}

impl Graph {
    fn of_the_workspace() -> Self {
        let output = Command::new(env!("CARGO"))
            .args([
                "metadata",
                "--format-version=1",
                "--locked",
                "--filter-platform=x86_64-unknown-linux-gnu",
            ])
            .arg(concat!("--manifest-path=", env!("CARGO_MANIFEST_DIR"), "/../Cargo.toml"))
            .output()
            .expect("cargo runs");
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        Self::parse(&serde_json::from_slice(&output.stdout).expect("cargo metadata is JSON"))
    }

    fn parse(metadata: &Value) -> Self {
        let names: BTreeMap<&str, &str> = list(&metadata["packages"])
            .map(|package| (text(&package["id"]), text(&package["name"])))
            .collect();
        let edges = list(&metadata["resolve"]["nodes"])
            .map(|node| {
                let normal = list(&node["deps"])
                    .filter(|dep| list(&dep["dep_kinds"]).any(|kind| kind["kind"].is_null()))
                    .map(|dep| names[text(&dep["pkg"])].to_owned());
                (names[text(&node["id"])].to_owned(), normal.collect())
            })
            .fold(BTreeMap::new(), |mut edges: BTreeMap<String, BTreeSet<String>>, (from, to)| {
                // Two versions of a crate count as one.
                edges.entry(from).or_default().extend::<BTreeSet<_>>(to);
                edges
            });
        let members = list(&metadata["workspace_members"]).map(|id| names[text(id)].to_owned()).collect();
        Self { edges, members }
    }

    fn crates(&self) -> impl Iterator<Item = (&str, &str)> {
        self.members
            .iter()
            .filter(|name| *name != TESTS)
            .map(|name| (name.as_str(), name.strip_prefix(PREFIX).unwrap_or(name)))
    }

    fn direct(&self, package: &str) -> &BTreeSet<String> {
        &self.edges[package]
    }

    fn reach(&self, package: &str) -> BTreeSet<String> {
        let mut found = BTreeSet::new();
        let mut open = vec![package];
        while let Some(next) = open.pop() {
            for dependency in self.direct(next) {
                if found.insert(dependency.clone()) {
                    open.push(dependency);
                }
            }
        }
        found
    }

    /// One path that shows why `from` reaches `to`.
    fn path(&self, from: &str, to: &str) -> String {
        let step = self.direct(from).iter().find(|next| *next == to || self.reach(next).contains(to));
        match step {
            Some(next) if next == to => format!("{from} -> {to}"),
            Some(next) => format!("{from} -> {}", self.path(next, to)),
            None => from.to_owned(),
        }
    }
}

fn list(value: &Value) -> impl Iterator<Item = &Value> {
    value.as_array().expect("a list in cargo metadata").iter()
}

fn text(value: &Value) -> &str {
    value.as_str().expect("a text in cargo metadata")
}

fn allowed(folder: &str) -> Option<&'static [&'static str]> {
    TABLE.iter().find(|(name, _)| *name == folder).map(|(_, allowed)| *allowed)
}

#[test]
fn every_crate_is_in_the_table_and_uses_only_what_the_table_allows() {
    let graph = Graph::of_the_workspace();
    let mut wrong = Vec::new();
    for (package, folder) in graph.crates() {
        let Some(allowed) = allowed(folder) else {
            wrong.push(format!("{package} is not in the table"));
            continue;
        };
        for used in graph.reach(package).iter().filter(|used| graph.members.contains(*used)) {
            if !used.strip_prefix(PREFIX).is_some_and(|used| allowed.contains(&used)) {
                wrong.push(format!("not in the table: {}", graph.path(package, used)));
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn the_sidecar_reaches_no_key_no_store_and_no_cipher_of_ours() {
    let graph = Graph::of_the_workspace();
    let sidecar = "fleet-kms-sidecar";
    if !graph.members.contains(sidecar) {
        return;
    }
    let reach = graph.reach(sidecar);
    let wrong: Vec<_> = NEVER_IN_THE_SIDECAR
        .iter()
        .filter(|name| reach.contains(**name))
        .map(|name| graph.path(sidecar, name))
        .collect();
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn tls_ciphers_locked_memory_and_sqlite_each_have_one_crate_that_names_them() {
    let graph = Graph::of_the_workspace();
    let mut wrong = Vec::new();
    for (package, folder) in graph.crates() {
        for (foreign, ours) in NAMED_ONLY_BY {
            if graph.direct(package).contains(foreign) && !ours.contains(&folder) {
                wrong.push(format!("{package} names {foreign}; only {} may", ours.join(", ")));
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn the_table_is_transitive() {
    for (folder, uses) in TABLE {
        for used in uses {
            for further in allowed(used).expect("the table names only crates that it lists") {
                assert!(uses.contains(further), "{folder} may use {used}, which may use {further}");
            }
        }
    }
}

#[test]
fn a_forbidden_edge_is_found_through_a_crate_of_others() {
    let metadata: Value = serde_json::from_str(
        r#"{"packages":[{"id":"1","name":"a"},{"id":"2","name":"b"},{"id":"3","name":"c"}],"workspace_members":["1"],
        "resolve":{"nodes":[
        {"id":"1","deps":[{"pkg":"2","dep_kinds":[{"kind":null}]}]},
        {"id":"2","deps":[{"pkg":"3","dep_kinds":[{"kind":"dev"},{"kind":null}]},{"pkg":"1","dep_kinds":[{"kind":"dev"}]}]},
        {"id":"3","deps":[]}]}}"#,
    )
    .expect("JSON");
    let graph = Graph::parse(&metadata);
    assert_eq!(graph.reach("a"), BTreeSet::from(["b".to_owned(), "c".to_owned()]));
    assert_eq!(graph.path("a", "c"), "a -> b -> c");
}
