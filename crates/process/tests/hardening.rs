//! What is left to a hardened process. Its own `main`, because hardening is for a process with one thread.

use fleet_kms_process::hardening::{self, Plan};
use std::fs;
use std::io::ErrorKind;
use std::process::Command;

fn main() {
    let kept = tempfile::tempdir().expect("a directory");
    let other = tempfile::tempdir().expect("a directory");
    let readable = other.path().join("readable");
    fs::write(&readable, "x").expect("a file");

    let plan =
        Plan { read: vec![readable.clone()], write: vec![kept.path().to_owned()], capabilities: Vec::new() };
    let warnings = hardening::apply(&plan);
    let lacks = |step: &str| {
        let found = warnings.iter().find(|warning| warning.step == step);
        if let Some(warning) = found {
            println!("not checked here: {warning}");
        }
        found.is_some()
    };

    if !lacks("landlock") {
        files_outside_the_plan_are_out_of_reach(kept.path(), other.path(), &readable);
        no_port_can_be_bound();
    }
    if !lacks("seccomp") {
        no_program_can_be_started();
    }
    if !lacks("core dumps") {
        no_core_is_dumped();
    }
    if !lacks("capabilities") {
        no_capability_is_left();
    }
    runtime_and_names_still_work();
    println!("test a_hardened_process_keeps_what_it_needs_and_nothing_else ... ok");
    println!("\ntest result: ok. 1 passed; 0 failed; 0 ignored");
}

fn files_outside_the_plan_are_out_of_reach(
    kept: &std::path::Path,
    other: &std::path::Path,
    readable: &std::path::Path,
) {
    fs::write(kept.join("a"), "x").expect("a file in a kept directory");
    fs::rename(kept.join("a"), kept.join("b")).expect("a rename in a kept directory");
    fs::remove_file(kept.join("b")).expect("a removal in a kept directory");
    fs::read(readable).expect("a readable file");
    for refused in
        [fs::write(readable, "y"), fs::write(other.join("new"), "y"), fs::read("/etc/passwd").map(drop)]
    {
        assert_eq!(refused.expect_err("outside the plan").kind(), ErrorKind::PermissionDenied);
    }
}

fn no_port_can_be_bound() {
    let refused = std::net::TcpListener::bind("127.0.0.1:0").expect_err("bound after hardening");
    assert_eq!(refused.kind(), ErrorKind::PermissionDenied);
}

fn no_program_can_be_started() {
    let refused = Command::new("/bin/true").status().expect_err("started a program");
    assert_eq!(refused.kind(), ErrorKind::PermissionDenied);
}

fn no_core_is_dumped() {
    let limit = rustix::process::getrlimit(rustix::process::Resource::Core);
    assert_eq!((limit.current, limit.maximum), (Some(0), Some(0)));
    let dumpable = rustix::process::dumpable_behavior().expect("prctl");
    assert_eq!(dumpable, rustix::process::DumpableBehavior::NotDumpable);
}

fn no_capability_is_left() {
    let status = fs::read_to_string("/proc/self/status").expect("own status");
    for set in ["CapEff", "CapPrm", "CapInh", "CapAmb"] {
        let line = status.lines().find(|line| line.starts_with(set)).expect("a line per set");
        assert!(line.ends_with("\t0000000000000000"), "{line}");
    }
    assert!(status.contains("NoNewPrivs:\t1"));
}

fn runtime_and_names_still_work() {
    let runtime = fleet_kms_process::runtime::multi_thread().expect("a runtime");
    let found = runtime.block_on(tokio::net::lookup_host("localhost:80")).expect("localhost").count();
    assert!(found > 0);
}
