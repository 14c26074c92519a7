//! The metrics of a running pair against their list, against promtool, and against what ships to watch them.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "tests: what is not there fails them"
)]

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use fleet_kms_tests::fleet::{Fleet, Sidecar};
use fleet_kms_tests::kms_client::{Api, KmsClient};
use fleet_kms_tests::peers::ClientVersion;
use fleet_kms_tests::tls_probe::probe;
use fleet_kms_tests::tools::{promtool, said};
use fleet_kms_tests::wait;
use serde_json::Value;

/// What a histogram's samples end in.
const PARTS: [&str; 3] = ["_bucket", "_sum", "_count"];

fn file(path: &str) -> PathBuf {
    Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/..")).join(path)
}

fn text(path: &str) -> String {
    fs::read_to_string(file(path)).unwrap_or_else(|error| panic!("{path}: {error}"))
}

/// A series: its type, and its labels with the values that are told, or seen.
#[derive(Debug, Default, PartialEq, Eq)]
struct Series {
    kind: String,
    help: String,
    labels: BTreeMap<String, BTreeSet<String>>,
}

/// The rows of `docs/metrics.md`.
fn listed() -> BTreeMap<String, Series> {
    let document = text("docs/metrics.md");
    let rows = document.lines().filter_map(|line| line.strip_prefix("| `fleet_kms_"));
    let mut series = BTreeMap::new();
    for row in rows {
        let cells: Vec<&str> = row.split('|').map(str::trim).collect();
        let name = format!("fleet_kms_{}", cells[0].trim_end_matches('`'));
        let (names, values) = cells[2].split_once(':').unwrap_or((cells[2], ""));
        let values = values.split(',').map(str::trim).filter(|value| !value.is_empty());
        let values: BTreeSet<String> = values.map(str::to_owned).collect();
        let names =
            names.split(',').map(|name| name.trim().trim_matches('`')).filter(|name| !name.is_empty());
        let labels = names.map(|name| (name.to_owned(), values.clone())).collect();
        let listed = Series { kind: cells[1].to_owned(), help: cells[3].to_owned(), labels };
        assert!(!listed.help.is_empty(), "{name} has no meaning");
        assert!(series.insert(name.clone(), listed).is_none(), "{name} is listed twice");
    }
    series
}

/// The series of one exposition in Prometheus text.
fn exposed(page: &str) -> BTreeMap<String, Series> {
    let mut series: BTreeMap<String, Series> = BTreeMap::new();
    for line in page.lines() {
        if let Some((name, help)) = line.strip_prefix("# HELP ").and_then(|rest| rest.split_once(' ')) {
            series.entry(name.to_owned()).or_default().help = help.to_owned();
        } else if let Some((name, kind)) = line.strip_prefix("# TYPE ").and_then(|rest| rest.split_once(' '))
        {
            series.entry(name.to_owned()).or_default().kind = kind.to_owned();
        } else {
            let (name, labels) = line.split_once('{').unwrap_or((line.split(' ').next().unwrap(), "}"));
            let histogram = |part: &&&str| {
                let base = name.strip_suffix(**part);
                base.is_some_and(|base| series.get(base).is_some_and(|series| series.kind == "histogram"))
            };
            let base = PARTS.iter().find(histogram).map_or(name, |part| &name[..name.len() - part.len()]);
            let found = series.get_mut(base).unwrap_or_else(|| panic!("a sample without a type: {line}"));
            let labels = labels.split_once('}').unwrap().0;
            for label in labels.split("\",").filter(|label| !label.is_empty()) {
                let (label, value) = label.split_once("=\"").unwrap();
                if label != "le" {
                    found
                        .labels
                        .entry(label.to_owned())
                        .or_default()
                        .insert(value.trim_matches('"').to_owned());
                }
            }
        }
    }
    series
}

/// A pair that has done a bit of everything: both KMS versions, a rotation, a refused handshake.
struct Pair {
    fleet: Fleet,
    sidecar: Sidecar,
}

impl Pair {
    fn start() -> Self {
        let fleet = Fleet::start().unwrap();
        let cluster = fleet.cluster("watched").unwrap();
        let sidecar = fleet.sidecar(&cluster, "node-1").unwrap();
        for api in Api::ALL {
            let client = KmsClient::new(ClientVersion::V0_37_2, api, &sidecar.socket).unwrap();
            client.call(&["round-trip", "-sizes", "4,32"]).unwrap().ok().unwrap();
            client.call(&["status"]).unwrap().ok().unwrap();
        }
        fleet.kmsctl(&["key", "rotate", "watched"]).unwrap();
        probe(fleet.agent.ports.data, None).unwrap();
        let pair = Self { fleet, sidecar };
        // The node reports once it is up; the refusal is counted when its connection has ended.
        wait::until("the refused handshake", Duration::from_secs(20), || {
            let refused = "fleet_kms_agent_tls_refused_total{port=\"data\",reason=\"no_certificate\"} 1\n";
            Ok(pair.agent().contains(refused).then_some(()))
        })
        .unwrap();
        pair
    }

    fn agent(&self) -> String {
        self.fleet.agent.ops("/metrics").unwrap().ok().unwrap()
    }

    fn sidecar(&self) -> String {
        self.sidecar.ops("/metrics").unwrap().ok().unwrap()
    }
}

#[test]
fn every_series_of_a_running_pair_is_listed_and_every_listed_one_is_there() {
    let pair = Pair::start();
    let (agent, sidecar) = (pair.agent(), pair.sidecar());
    check_values(&agent, &sidecar);
    let mut exposed = exposed(&agent);
    exposed.extend(self::exposed(&sidecar));
    let listed = listed();
    let names = |of: &BTreeMap<String, Series>| of.keys().cloned().collect::<BTreeSet<_>>();
    assert_eq!(names(&exposed), names(&listed), "left: exposed, right: docs/metrics.md");
    for (name, series) in &exposed {
        let listed = &listed[name];
        assert_eq!(series.kind, listed.kind, "{name}");
        let labels = |of: &Series| of.labels.keys().cloned().collect::<Vec<_>>();
        assert_eq!(labels(series), labels(listed), "{name}");
        for (label, values) in &listed.labels {
            assert!(values.is_empty() || *values == series.labels[label], "{name}: {label}");
        }
        assert!(!series.help.is_empty(), "{name}");
    }
    for page in [agent, sidecar] {
        check_with_promtool(&page);
    }
}

/// What this pair has done must show.
fn check_values(agent: &str, sidecar: &str) {
    for line in [
        "fleet_kms_agent_clusters 1\n",
        "fleet_kms_agent_key_versions{state=\"active\"} 1\n",
        "fleet_kms_agent_key_versions{state=\"next\"} 1\n",
        "fleet_kms_agent_key_versions{state=\"decrypt_only\"} 1\n",
        "fleet_kms_agent_nodes{state=\"active\"} 1\n",
        "fleet_kms_agent_rotations_overdue 0\n",
        "fleet_kms_agent_locked 0\n",
        "fleet_kms_agent_changes_total{outcome=\"unknown\"} 0\n",
    ] {
        assert!(agent.contains(line), "{line}{agent}");
    }
    for operation in ["v1_encrypt", "v1_decrypt", "v2_status", "v2_encrypt", "v2_decrypt"] {
        let line = format!(
            "fleet_kms_sidecar_call_duration_seconds_count{{operation=\"{operation}\",outcome=\"ok\"}} "
        );
        assert!(sidecar.contains(&line), "{line}{sidecar}");
    }
    assert!(sidecar.contains("fleet_kms_sidecar_failovers_total 0\n"), "{sidecar}");
    assert!(sidecar.contains("fleet_kms_sidecar_links_up 1\n"), "{sidecar}");
}

fn check_with_promtool(page: &str) {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("metrics");
    fs::write(&path, page).unwrap();
    let mut check = Command::new(promtool().unwrap());
    let checked =
        check.args(["check", "metrics"]).stdin(Stdio::from(File::open(&path).unwrap())).output().unwrap();
    assert!(checked.status.success() && checked.stderr.is_empty(), "{}", said(&checked));
}

#[test]
fn promtool_would_say_what_is_wrong() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("metrics");
    fs::write(&path, "# TYPE a_total gauge\na_total 1\n").unwrap();
    let mut check = Command::new(promtool().unwrap());
    let checked =
        check.args(["check", "metrics"]).stdin(Stdio::from(File::open(&path).unwrap())).output().unwrap();
    assert!(!checked.status.success(), "{}", said(&checked));
}

#[test]
fn the_alerts_fire_on_what_they_must_and_on_nothing_else() {
    for (verb, path) in [("check", "deploy/prometheus/fleet-kms.rules.yaml"), ("test", "tests/alerts.yaml")] {
        let mut promtool = Command::new(promtool().unwrap());
        let checked = promtool.args([verb, "rules"]).arg(file(path)).output().unwrap();
        assert!(checked.status.success(), "{}", said(&checked));
    }
}

/// The series that a query names.
fn series_in(query: &str) -> Vec<String> {
    let words = query.split(|c: char| !c.is_ascii_alphanumeric() && c != '_');
    words.filter(|word| word.starts_with("fleet_kms_")).map(str::to_owned).collect()
}

fn assert_known(query: &str, listed: &BTreeMap<String, Series>) {
    for name in series_in(query) {
        let base = PARTS
            .iter()
            .find_map(|part| name.strip_suffix(part))
            .filter(|base| listed.get(*base).is_some_and(|series| series.kind == "histogram"));
        assert!(listed.contains_key(base.unwrap_or(&name)), "{name} of {query} is not in docs/metrics.md");
    }
}

#[test]
fn alerts_and_dashboard_ask_for_listed_series_only() {
    let listed = listed();
    let rules: Value = serde_saphyr::from_str(&text("deploy/prometheus/fleet-kms.rules.yaml")).unwrap();
    let mut queries = 0;
    for rule in
        rules["groups"].as_array().unwrap().iter().flat_map(|group| group["rules"].as_array().unwrap())
    {
        assert_known(rule["expr"].as_str().unwrap(), &listed);
        queries += 1;
        let page = rule["annotations"]["runbook_url"].as_str().unwrap();
        assert!(file(page).is_file(), "{}: {page} is not there", rule["alert"]);
    }
    let dashboard: Value = serde_json::from_str(&text("deploy/grafana/fleet-kms.json")).unwrap();
    for panel in dashboard["panels"].as_array().unwrap() {
        for target in panel["targets"].as_array().into_iter().flatten() {
            assert_known(target["expr"].as_str().unwrap(), &listed);
            queries += 1;
        }
    }
    assert!(queries > 50, "{queries}");
}
