//! Landlock: which files this process can reach, and that it binds no further TCP port.

use crate::hardening::{Plan, text};
use landlock::{
    ABI, Access, AccessFs, AccessNet, BitFlags, PathBeneath, PathFd, Ruleset, RulesetAttr, RulesetCreated,
    RulesetCreatedAttr, RulesetStatus,
};
use std::path::Path;

/// The newest kernel interface whose rights are restricted; older kernels restrict what they know.
const INTERFACE: ABI = ABI::V5;

/// What the C library reads to resolve names and the runtime to count cores. What is absent is skipped.
const SYSTEM: [&str; 16] = [
    "/dev/urandom",
    "/etc/gai.conf",
    "/etc/host.conf",
    "/etc/hosts",
    "/etc/ld.so.cache",
    "/etc/nsswitch.conf",
    "/etc/resolv.conf",
    "/etc/services",
    "/lib",
    "/lib64",
    "/proc/self",
    "/run/systemd/resolve",
    "/run/resolvconf",
    "/sys/fs/cgroup",
    "/usr/lib",
    "/usr/lib64",
];

/// Restricts this thread to `plan` and the system's own files.
pub(super) fn restrict(plan: &Plan) -> Result<(), String> {
    let mut missing = Vec::new();
    let read = AccessFs::ReadFile | AccessFs::ReadDir;
    let mut rules = Ruleset::default()
        .handle_access(AccessFs::from_all(INTERFACE))
        .map_err(text)?
        .handle_access(AccessNet::BindTcp)
        .map_err(text)?
        .create()
        .map_err(text)?;
    for path in SYSTEM.map(Path::new) {
        // An unusual system lacks some of them; whoever needs one sees its own error.
        rules = allow(rules, path, read)?.0;
    }
    for (paths, access) in [(&plan.read, read), (&plan.write, writing())] {
        for path in paths {
            let (next, found) = allow(rules, path, access)?;
            rules = next;
            if !found {
                missing.push(path.display().to_string());
            }
        }
    }
    let status = rules.restrict_self().map_err(text)?;
    match (status.ruleset, missing.is_empty()) {
        (RulesetStatus::FullyEnforced, true) => Ok(()),
        (RulesetStatus::FullyEnforced, false) => {
            Err(format!("these paths do not exist and stay out of reach: {}", missing.join(", ")))
        }
        (RulesetStatus::PartiallyEnforced, _) => {
            Err("this kernel enforces only a part of the rules (Linux 6.10 enforces all)".to_owned())
        }
        (RulesetStatus::NotEnforced, _) => {
            Err("this kernel has no Landlock, or it is switched off".to_owned())
        }
    }
}

/// Everything but to execute, to talk to devices and to make them.
fn writing() -> BitFlags<AccessFs> {
    AccessFs::from_all(INTERFACE)
        & !(AccessFs::Execute | AccessFs::IoctlDev | AccessFs::MakeChar | AccessFs::MakeBlock)
}

/// Adds a rule for `path`; says whether the path exists.
fn allow(
    rules: RulesetCreated,
    path: &Path,
    access: BitFlags<AccessFs>,
) -> Result<(RulesetCreated, bool), String> {
    let Ok(opened) = PathFd::new(path) else { return Ok((rules, false)) };
    let access = if path.is_dir() { access } else { access & AccessFs::from_file(INTERFACE) };
    Ok((rules.add_rule(PathBeneath::new(opened, access)).map_err(text)?, true))
}
