//! The tour in `docs/tour.md`, typed into a fleet as `make demo` makes it: what the document shows is what is printed.
//!
//! `UPDATE_TOUR=1` writes the document anew; look at the diff.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "tests: what is not there fails them"
)]

use std::fs;
use std::path::Path;
use std::process::Command;

use fleet_kms_tests::fleet::{Fleet, TRUST_DOMAIN};
use fleet_kms_tests::programs::Program;

const DOCUMENT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/tour.md");
/// What a block that is run begins with.
const BLOCK: &str = "```console\n";
/// The trust domain of the demo.
const DEMO_DOMAIN: &str = "fleet.example";

#[test]
fn the_tour_shows_what_its_commands_print() {
    let fleet = Fleet::start().unwrap();
    let cluster = fleet.cluster("demo").unwrap();
    let node = fleet.sidecar(&cluster, "node-1").unwrap();
    fs::copy(&node.config, fleet.path().join("sidecar.toml")).unwrap();

    let document = fs::read_to_string(DOCUMENT).unwrap();
    let mut printed = String::new();
    let mut rest = document.as_str();
    while let Some((before, block)) = rest.split_once(BLOCK) {
        let (block, after) = block.split_once("```\n").unwrap();
        printed.push_str(before);
        printed.push_str(BLOCK);
        for command in block.lines().filter_map(|line| line.strip_prefix("$ ")) {
            printed.push_str(&format!("$ {command}\n{}", typed(&fleet, command)));
        }
        printed.push_str("```\n");
        rest = after;
    }
    printed.push_str(rest);
    if std::env::var_os("UPDATE_TOUR").is_some() {
        fs::write(DOCUMENT, &printed).unwrap();
    }
    let now = fs::read_to_string(DOCUMENT).unwrap();
    for (shown, printed) in now.lines().zip(printed.lines()) {
        assert_eq!(stable(shown), stable(printed), "run this test with UPDATE_TOUR=1 and look at the diff");
    }
    assert_eq!(now.lines().count(), printed.lines().count(), "run this test with UPDATE_TOUR=1");
    assert!(!now.contains("fkjt1."), "no token is shown");
}

/// Types one line into the demo's shell, and returns both streams as a person would see them.
fn typed(fleet: &Fleet, line: &str) -> String {
    let programs = Program::Ctl.path().unwrap();
    let path = format!("{}:{}", programs.parent().unwrap().display(), std::env::var("PATH").unwrap());
    let output = Command::new("bash")
        .args(["-c", &format!("set -o pipefail; {{ {line}; }} 2>&1")])
        .current_dir(fleet.path())
        .env("PATH", path)
        .env("KMSCTL_CONFIG", fleet.agent.directory.join("admin/kmsctl.toml"))
        .output()
        .unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(output.status.success(), "{line}: {text}");
    let text = shortened(&text, fleet.path()).replace(TRUST_DOMAIN, DEMO_DOMAIN);
    text.lines().map(|line| format!("{}\n", line.trim_end())).collect()
}

/// Without the directory of this run.
fn shortened(text: &str, directory: &Path) -> String {
    text.replace(&format!("{}/", directory.display()), "")
}

/// A line without what differs from run to run: times, ids, ages, ports, and the width of columns that hold them.
fn stable(line: &str) -> String {
    let part_of_word = |c: char| c.is_ascii_alphanumeric() || "-:.".contains(c);
    let mut words = Vec::new();
    for piece in line.split_whitespace() {
        let mut text = String::new();
        for part in piece.split_inclusive(|c| !part_of_word(c)) {
            let word = part.trim_end_matches(|c| !part_of_word(c));
            text.push_str(placeholder(word));
            text.push_str(part.get(word.len()..).unwrap_or_default());
        }
        words.push(text);
    }
    // Counts whatever the fleet does beside the tour.
    if let [key, value] = words.as_mut_slice()
        && key == "revision:"
    {
        *value = "NUMBER".to_owned();
    }
    words.join(" ")
}

fn placeholder(word: &str) -> &str {
    let hex = |text: &str| text.bytes().all(|byte| byte.is_ascii_hexdigit());
    let digit = word.starts_with(|c: char| c.is_ascii_digit());
    if word.len() == 36 && word.split('-').count() == 5 && hex(&word.replace('-', "")) {
        "UUID"
    } else if word.len() >= 16 && hex(word) {
        "HEX"
    } else if digit && word.contains('T') && word.ends_with('Z') {
        "TIME"
    } else if word
        .strip_prefix(':')
        .is_some_and(|rest| !rest.is_empty() && rest.bytes().all(|b| b.is_ascii_digit()))
    {
        ":NUMBER"
    } else if word.starts_with("127.0.0.1:") {
        "ADDRESS"
    } else if digit
        && word.ends_with(['d', 'h', 'm', 's'])
        && word.chars().all(|c| "0123456789dhms".contains(c))
    {
        "AGE"
    } else {
        word
    }
}

#[test]
fn only_what_differs_from_run_to_run_is_left_out_of_the_comparison() {
    let one =
        "plant-7  v2  in 29d23h  2026-11-24T12:00:00Z {\"id\":\"0b5e1a52-7c1f-4f0e-9a36-5d0c3a1f2e44\"}";
    let other =
        "plant-7   v2 in 28d   2026-11-25T12:00:01.5Z {\"id\":\"1b5e1a52-7c1f-4f0e-9a36-5d0c3a1f2e44\"}";
    assert_eq!(stable(one), stable(other));
    assert_eq!(stable(one), "plant-7 v2 in AGE TIME {\"id\":\"UUID\"}");
    assert_ne!(stable(one), stable(&other.replace("v2", "v3")));
}
