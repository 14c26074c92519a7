//! `docs/operations/`: whatever a user can meet leads to a page, and every page is reachable.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "tests: what is not there fails them"
)]

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use fleet_kms_admin_api::Code;
use serde_json::Value;

fn file(path: &str) -> PathBuf {
    Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/..")).join(path)
}

fn text(path: &str) -> String {
    fs::read_to_string(file(path)).unwrap()
}

/// What stands between backquotes in the first cell of each row of one section's table that has a page in its last.
fn indexed(section: &str) -> BTreeSet<String> {
    let index = text("docs/operations/README.md");
    let (_, rest) = index.split_once(&format!("\n## {section}")).unwrap();
    let section = rest.split("\n## ").next().unwrap();
    let rows = section.lines().filter(|line| line.starts_with("| `"));
    let mut found = BTreeSet::new();
    for row in rows {
        let cells: Vec<&str> = row.trim_matches('|').split('|').collect();
        assert!(cells[1].contains("](") && cells[1].contains(".md)"), "no page: {row}");
        found.extend(cells[0].split('`').skip(1).step_by(2).map(str::to_owned));
    }
    assert!(!found.is_empty());
    found
}

fn set<'a>(names: impl IntoIterator<Item = &'a str>) -> BTreeSet<String> {
    names.into_iter().map(str::to_owned).collect()
}

#[test]
fn every_problem_code_leads_to_a_page() {
    assert_eq!(indexed("Problem codes"), set(Code::KNOWN.iter().copied()));
}

#[test]
fn every_reason_of_an_agent_leads_to_a_page() {
    // A unit test of the agent compares this document with the code.
    let document = text("docs/wire-format.md");
    let (_, section) = document.split_once("## `fleet-kms-reason`").unwrap();
    let rows = section.lines().filter_map(|line| line.strip_prefix("| `"));
    let mut reasons = set(rows.map(|row| row.split('`').next().unwrap()));
    // Admins only, and on no gRPC port.
    reasons.extend(set(["role", "scope"]));
    assert_eq!(indexed("Reasons of kms-agent"), reasons);
}

#[test]
fn every_warning_of_the_status_leads_to_a_page() {
    let source = text("crates/agent/src/admin/status.rs");
    let (_, warnings) = source.split_once("\nfn warnings(").unwrap();
    let warnings = warnings.split("\n#[cfg(test)]").next().unwrap();
    let calls = warnings.split("warning(").skip(1).filter_map(|call| call.trim_start().strip_prefix('"'));
    let codes = set(calls.map(|call| call.split('"').next().unwrap()));
    assert!(codes.len() > 5, "{codes:?}");
    assert_eq!(indexed("Warnings"), codes);
}

#[test]
fn every_alert_leads_to_a_page() {
    let rules: Value = serde_saphyr::from_str(&text("deploy/prometheus/fleet-kms.rules.yaml")).unwrap();
    let groups = rules["groups"].as_array().unwrap();
    let rules = groups.iter().flat_map(|group| group["rules"].as_array().unwrap());
    let names = set(rules.map(|rule| rule["alert"].as_str().unwrap()));
    assert_eq!(indexed("Alerts"), names);
}

#[test]
fn every_exit_status_of_the_programs_is_explained() {
    let source = text("crates/process/src/exit.rs");
    let page = text("docs/operations/exit-statuses.md");
    let statuses: Vec<&str> =
        source.lines().filter_map(|line| line.strip_prefix("pub const ")?.split("= ").nth(1)).collect();
    assert!(statuses.len() > 3, "{statuses:?}");
    for status in statuses {
        assert!(page.contains(&format!("\n| {} |", status.trim_end_matches(';'))), "{status}");
    }
}

#[test]
fn every_page_is_linked_from_the_index_and_every_link_has_its_page() {
    let directory = file("docs/operations");
    let pages: BTreeSet<String> = fs::read_dir(&directory)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().to_string_lossy().into_owned())
        .filter(|name| name != "README.md")
        .collect();
    let index = text("docs/operations/README.md");
    for page in &pages {
        assert!(index.contains(&format!("({page})")), "{page} is not linked from the index");
    }
    for page in pages.iter().map(String::as_str).chain(["README.md"]) {
        let text = fs::read_to_string(directory.join(page)).unwrap();
        for link in text.split("](").skip(1) {
            let link = link.split(')').next().unwrap().split('#').next().unwrap();
            let inside = !link.is_empty() && !link.contains("://");
            assert!(!inside || directory.join(link).exists(), "{page}: {link} is not there");
        }
    }
}
