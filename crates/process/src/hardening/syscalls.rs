//! seccomp: system calls that none of the programs makes, and that whoever took one over would.
//!
//! A list of what is refused, not of what is allowed: a new C library must never stop a KMS. A refused call
//! fails with EPERM.

use crate::hardening::text;
use seccompiler::{BpfProgram, SeccompAction, SeccompFilter};
use std::collections::BTreeMap;

/// Starting programs, looking into other processes, changing kernel, mounts, namespaces and clocks, and the
/// interfaces in which most local holes were found.
const REFUSED: [libc::c_long; 39] = [
    libc::SYS_execve,
    libc::SYS_execveat,
    libc::SYS_ptrace,
    libc::SYS_process_vm_readv,
    libc::SYS_process_vm_writev,
    libc::SYS_pidfd_getfd,
    libc::SYS_kcmp,
    libc::SYS_kexec_load,
    libc::SYS_init_module,
    libc::SYS_finit_module,
    libc::SYS_delete_module,
    libc::SYS_reboot,
    libc::SYS_swapon,
    libc::SYS_swapoff,
    libc::SYS_acct,
    libc::SYS_mount,
    libc::SYS_umount2,
    libc::SYS_pivot_root,
    libc::SYS_chroot,
    libc::SYS_move_mount,
    libc::SYS_open_tree,
    libc::SYS_fsopen,
    libc::SYS_fsconfig,
    libc::SYS_fsmount,
    libc::SYS_setns,
    libc::SYS_unshare,
    libc::SYS_open_by_handle_at,
    libc::SYS_sethostname,
    libc::SYS_setdomainname,
    libc::SYS_settimeofday,
    libc::SYS_clock_settime,
    libc::SYS_bpf,
    libc::SYS_perf_event_open,
    libc::SYS_userfaultfd,
    libc::SYS_io_uring_setup,
    libc::SYS_io_uring_register,
    libc::SYS_add_key,
    libc::SYS_request_key,
    libc::SYS_keyctl,
];

/// The x32 calling convention reaches the same calls under other numbers.
#[cfg(target_arch = "x86_64")]
fn refused() -> impl Iterator<Item = i64> {
    const X32: i64 = 0x4000_0000;
    // x32's own numbers for execve, ptrace, kexec_load, process_vm_readv, process_vm_writev and execveat.
    const OWN: [i64; 6] = [520, 521, 528, 539, 540, 545];
    REFUSED.into_iter().flat_map(|call| [call, X32 | call]).chain(OWN.map(|call| X32 | call))
}

#[cfg(not(target_arch = "x86_64"))]
fn refused() -> impl Iterator<Item = i64> {
    REFUSED.into_iter()
}

/// Refuses them to every thread of this process.
pub(super) fn restrict() -> Result<(), String> {
    let rules: BTreeMap<i64, Vec<seccompiler::SeccompRule>> =
        refused().map(|call| (call, Vec::new())).collect();
    let refuse = SeccompAction::Errno(libc::EPERM.unsigned_abs());
    let architecture = std::env::consts::ARCH.try_into().map_err(text)?;
    let filter = SeccompFilter::new(rules, SeccompAction::Allow, refuse, architecture).map_err(text)?;
    let program: BpfProgram = filter.try_into().map_err(text)?;
    seccompiler::apply_filter_all_threads(&program).map_err(text)
}
