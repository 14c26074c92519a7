//! Gives up, for good, what a program does not need once its listeners are bound and its files are open.
//!
//! Order: capabilities, no-new-privileges, core dumps off, Landlock, seccomp. Landlock and capabilities belong
//! to a *thread*: [`apply`] must run while the process has only one, before the runtime and the log writer.
//! It must never stop a start: what this kernel cannot do is returned as a [`Warning`], to be logged later.

mod landlock;
mod syscalls;

use caps::{CapSet, CapsHashSet};
use rustix::process::{DumpableBehavior, Resource, Rlimit};
use std::fmt;
use std::path::PathBuf;

pub use caps::Capability;

/// What a program keeps. Everything else is given up.
///
/// A path must exist, and its rule holds what is there *now* (an inode): name the parent of a directory that
/// may be removed and made again while the program runs.
#[derive(Debug, Default)]
pub struct Plan {
    /// Files and directories to read below.
    pub read: Vec<PathBuf>,
    /// Directories to read, write, create, rename and remove below, and files to write.
    pub write: Vec<PathBuf>,
    /// Capabilities to keep, where the process has them.
    pub capabilities: Vec<Capability>,
}

/// A step that this kernel or this environment refused.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Warning {
    /// The step.
    pub step: &'static str,
    /// What the system said.
    pub reason: String,
}

impl fmt::Display for Warning {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.step, self.reason)
    }
}

/// Applies `plan` to this thread and all that it starts.
///
/// After it no TCP port can be bound and no program started. Returns what could not be done.
#[must_use = "log the warnings: they say which protection this machine lacks"]
pub fn apply(plan: &Plan) -> Vec<Warning> {
    let mut warnings = Vec::new();
    let mut step = |name: &'static str, done: Result<(), String>| {
        if let Err(reason) = done {
            warnings.push(Warning { step: name, reason });
        }
    };
    step("single thread", only_one_thread());
    step("capabilities", drop_capabilities(&plan.capabilities));
    step("no_new_privs", rustix::thread::set_no_new_privs(true).map_err(text));
    step("core dumps", no_core_dumps());
    step("landlock", landlock::restrict(plan));
    step("seccomp", syscalls::restrict());
    warnings
}

fn text(error: impl fmt::Display) -> String {
    error.to_string()
}

fn only_one_thread() -> Result<(), String> {
    match std::fs::read_dir("/proc/self/task").map(Iterator::count) {
        Ok(1) => Ok(()),
        Ok(threads) => Err(format!("{threads} threads run already, and only this one is confined")),
        Err(error) => Err(format!("cannot count the threads: {error}")),
    }
}

fn drop_capabilities(keep: &[Capability]) -> Result<(), String> {
    let permitted = caps::read(None, CapSet::Permitted).map_err(text)?;
    // Only its holder may shrink the bounding set; without it no_new_privs keeps the set from mattering.
    if permitted.contains(&Capability::CAP_SETPCAP) {
        for capability in caps::runtime::thread_all_supported() {
            if !keep.contains(&capability) {
                caps::drop(None, CapSet::Bounding, capability).map_err(text)?;
            }
        }
    }
    let kept: CapsHashSet = permitted.into_iter().filter(|capability| keep.contains(capability)).collect();
    let mut failed = Ok(());
    // Kernels before 4.3 have no ambient set, and so nothing to clear in it.
    for (set, value) in [
        (CapSet::Ambient, CapsHashSet::new()),
        (CapSet::Inheritable, CapsHashSet::new()),
        (CapSet::Effective, kept.clone()),
        (CapSet::Permitted, kept),
    ] {
        if let Err(error) = caps::set(None, set, &value) {
            failed = Err(text(error));
        }
    }
    failed
}

/// A core dump or a debugger of the same user would see DEKs in transit.
fn no_core_dumps() -> Result<(), String> {
    rustix::process::set_dumpable_behavior(DumpableBehavior::NotDumpable).map_err(text)?;
    let none = Rlimit { current: Some(0), maximum: Some(0) };
    rustix::process::setrlimit(Resource::Core, none).map_err(text)
}
