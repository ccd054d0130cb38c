//! The default system call filter: what programs need is allowed, what needs a
//! capability is allowed with it, everything else fails with EPERM.
//!
//! It lets through what containerd's default filter does, so that an image runs
//! alike under both. Names that a libseccomp doesn't know are skipped by the OCI
//! runtime. 32-bit ABIs are in the same table, as one process may use several.

use oci_spec::runtime::{
    Arch, Capabilities, Capability, LinuxSeccomp, LinuxSeccompAction, LinuxSeccompArg, LinuxSeccompArgBuilder,
    LinuxSeccompBuilder, LinuxSeccompOperator, LinuxSyscall, LinuxSyscallBuilder,
};
use types::{Result, ResultExt};

const ENOSYS: u32 = 38;
const AF_ALG: u64 = 38;
const AF_VSOCK: u64 = 40;
/// CLONE_NEWNS, NEWCGROUP, NEWUTS, NEWIPC, NEWUSER, NEWPID, NEWNET.
const CLONE_NAMESPACES: u64 =
    0x0002_0000 | 0x0200_0000 | 0x0400_0000 | 0x0800_0000 | 0x1000_0000 | 0x2000_0000 | 0x4000_0000;
/// PER_LINUX, PER_LINUX32, UNAME26, both, and the query.
const PERSONALITIES: [u64; 5] = [0x0, 0x8, 0x2_0000, 0x2_0008, 0xffff_ffff];

/// Allowed to everybody, by what they act upon.
const ALWAYS: [(&str, &str); 12] = [
    (
        "open files and descriptors",
        "_llseek close close_range copy_file_range creat dup dup2 dup3 fadvise64 fadvise64_64 fallocate fcntl fcntl64 \
         fdatasync flock fsync ftruncate ftruncate64 ioctl lseek memfd_create memfd_secret name_to_handle_at open openat \
         openat2 pipe pipe2 pread64 preadv preadv2 pwrite64 pwritev pwritev2 read readahead readv sendfile sendfile64 \
         splice sync sync_file_range syncfs tee truncate truncate64 umask vmsplice write writev",
    ),
    (
        "names, owners and attributes",
        "access chdir chmod chown chown32 faccessat faccessat2 fchdir fchmod fchmodat fchmodat2 fchown fchown32 fchownat \
         fgetxattr flistxattr fremovexattr fsetxattr fstat fstat64 fstatat64 fstatfs fstatfs64 futimesat getcwd getdents \
         getdents64 getxattr getxattrat lchown lchown32 lgetxattr link linkat listxattr listxattrat llistxattr \
         lremovexattr lsetxattr lstat lstat64 mkdir mkdirat mknod mknodat newfstatat readlink readlinkat removexattr \
         removexattrat rename renameat renameat2 rmdir setxattr setxattrat stat stat64 statfs statfs64 statx symlink \
         symlinkat unlink unlinkat utime utimensat utimensat_time64 utimes",
    ),
    ("mounts, read only", "listmount statmount"),
    (
        "waiting for descriptors",
        "_newselect epoll_create epoll_create1 epoll_ctl epoll_ctl_old epoll_pwait epoll_pwait2 epoll_wait \
         epoll_wait_old eventfd eventfd2 fanotify_mark inotify_add_watch inotify_init inotify_init1 inotify_rm_watch \
         poll ppoll ppoll_time64 pselect6 pselect6_time64 select signalfd signalfd4",
    ),
    (
        "asynchronous io",
        "io_cancel io_destroy io_getevents io_pgetevents io_pgetevents_time64 io_setup io_submit ioprio_get ioprio_set",
    ),
    (
        "memory",
        "brk cachestat madvise map_shadow_stack mincore mlock mlock2 mlockall mmap mmap2 mprotect mremap mseal msync \
         munlock munlockall munmap pkey_alloc pkey_free pkey_mprotect process_mrelease remap_file_pages",
    ),
    (
        "processes and threads",
        "execve execveat exit exit_group fork get_robust_list get_thread_area getcpu getpgid getpgrp getpid getppid \
         getpriority getrlimit getrusage getsid gettid kill membarrier pause pidfd_open pidfd_send_signal prctl \
         prlimit64 restart_syscall rseq sched_get_priority_max sched_get_priority_min sched_getaffinity sched_getattr \
         sched_getparam sched_getscheduler sched_rr_get_interval sched_rr_get_interval_time64 sched_setaffinity \
         sched_setattr sched_setparam sched_setscheduler sched_yield set_robust_list set_thread_area set_tid_address \
         setpgid setpriority setrlimit setsid tgkill tkill ugetrlimit uretprobe vfork wait4 waitid waitpid",
    ),
    (
        "signals",
        "rt_sigaction rt_sigpending rt_sigprocmask rt_sigqueueinfo rt_sigreturn rt_sigsuspend rt_sigtimedwait \
         rt_sigtimedwait_time64 rt_tgsigqueueinfo sigaltstack sigprocmask sigreturn",
    ),
    (
        "credentials and confinement of oneself",
        "capget capset getegid getegid32 geteuid geteuid32 getgid getgid32 getgroups getgroups32 getresgid getresgid32 \
         getresuid getresuid32 getuid getuid32 landlock_add_rule landlock_create_ruleset landlock_restrict_self \
         lsm_get_self_attr lsm_list_modules lsm_set_self_attr seccomp setfsgid setfsgid32 setfsuid setfsuid32 setgid \
         setgid32 setgroups setgroups32 setregid setregid32 setresgid setresgid32 setresuid setresuid32 setreuid \
         setreuid32 setuid setuid32",
    ),
    (
        "time",
        "adjtimex alarm clock_adjtime clock_adjtime64 clock_getres clock_getres_time64 clock_gettime clock_gettime64 \
         clock_nanosleep clock_nanosleep_time64 getitimer gettimeofday nanosleep setitimer time timer_create \
         timer_delete timer_getoverrun timer_gettime timer_gettime64 timer_settime timer_settime64 timerfd_create \
         timerfd_gettime timerfd_gettime64 timerfd_settime timerfd_settime64 times",
    ),
    (
        "sockets, but for making one",
        "accept accept4 bind connect getpeername getsockname getsockopt listen recv recvfrom recvmmsg recvmmsg_time64 \
         recvmsg send sendmmsg sendmsg sendto setsockopt shutdown socketcall socketpair",
    ),
    (
        "System V and POSIX IPC, futexes, the system",
        "futex futex_requeue futex_time64 futex_wait futex_waitv futex_wake getrandom ipc mq_getsetattr mq_notify mq_open \
         mq_timedreceive mq_timedreceive_time64 mq_timedsend mq_timedsend_time64 mq_unlink msgctl msgget msgrcv msgsnd \
         semctl semget semop semtimedop semtimedop_time64 shmat shmctl shmdt shmget sysinfo uname",
    ),
];

/// Since Linux 4.8 a tracer can't get round the filter of its tracee.
const TRACING: &str = "process_vm_readv process_vm_writev ptrace";

/// Allowed together with a capability.
const WITH_CAPABILITY: [(Capability, &str); 13] = [
    (Capability::DacReadSearch, "open_by_handle_at"),
    (
        Capability::SysAdmin,
        "bpf clone clone3 fanotify_init fsconfig fsmount fsopen fspick lookup_dcookie mount mount_setattr move_mount \
         open_tree perf_event_open quotactl quotactl_fd setdomainname sethostname setns syslog umount umount2 unshare",
    ),
    (Capability::SysBoot, "reboot"),
    (Capability::SysChroot, "chroot"),
    (Capability::SysModule, "delete_module finit_module init_module"),
    (Capability::SysPacct, "acct"),
    (Capability::SysPtrace, "kcmp pidfd_getfd process_madvise process_vm_readv process_vm_writev ptrace"),
    (Capability::SysRawio, "ioperm iopl"),
    (Capability::SysTime, "clock_settime clock_settime64 settimeofday stime"),
    (Capability::SysTtyConfig, "vhangup"),
    (Capability::SysNice, "get_mempolicy mbind set_mempolicy set_mempolicy_home_node"),
    (Capability::Bpf, "bpf"),
    (Capability::Perfmon, "perf_event_open"),
];

/// A machine's ABIs and the calls that only it has.
fn machine(arch: &str) -> (&'static [Arch], &'static str) {
    match arch {
        "x86_64" => (&[Arch::ScmpArchX86_64, Arch::ScmpArchX86, Arch::ScmpArchX32], "arch_prctl modify_ldt"),
        "x86" => (&[Arch::ScmpArchX86], "modify_ldt"),
        "aarch64" => (
            &[Arch::ScmpArchAarch64, Arch::ScmpArchArm],
            "arm_fadvise64_64 arm_sync_file_range breakpoint cacheflush set_tls sync_file_range2",
        ),
        "arm" => (
            &[Arch::ScmpArchArm],
            "arm_fadvise64_64 arm_sync_file_range breakpoint cacheflush set_tls sync_file_range2",
        ),
        "s390x" => {
            (&[Arch::ScmpArchS390x, Arch::ScmpArchS390], "s390_pci_mmio_read s390_pci_mmio_write s390_runtime_instr")
        }
        "powerpc64" => (&[Arch::ScmpArchPpc64le], "swapcontext sync_file_range2"),
        "riscv64" => (&[Arch::ScmpArchRiscv64], "riscv_flush_icache riscv_hwprobe"),
        "loongarch64" => (&[Arch::ScmpArchLoongarch64], ""),
        // Without a list the runtime filters the native ABI only.
        _ => (&[], ""),
    }
}

/// The default filter for a container with this bounding set.
///
/// # Errors
/// `Internal` only, if a rule can't be built.
pub fn default_profile(bounding: &Capabilities, arch: &str) -> Result<LinuxSeccomp> {
    let (arches, own) = machine(arch);
    let mut rules = Vec::new();
    let mut names: Vec<&str> = ALWAYS.iter().flat_map(|(_, calls)| calls.split_whitespace()).collect();
    names.extend(TRACING.split_whitespace());
    names.extend(own.split_whitespace());
    for (capability, calls) in WITH_CAPABILITY {
        if bounding.contains(&capability) {
            names.extend(calls.split_whitespace());
        }
    }
    if bounding.contains(&Capability::Syslog) {
        names.push("syslog");
    }
    names.sort_unstable();
    names.dedup();
    rules.push(rule(&names, None)?);

    // Each rule has one condition: a runtime splits several on one argument into
    // rules of their own, which together would allow everything. So AF_ALG and
    // AF_VSOCK are left out by allowing below, between and above them.
    rules.push(rule(&["socket"], Some((0, AF_ALG, LinuxSeccompOperator::ScmpCmpLt, None)))?);
    for family in AF_ALG + 1..AF_VSOCK {
        rules.push(rule(&["socket"], Some((0, family, LinuxSeccompOperator::ScmpCmpEq, None)))?);
    }
    rules.push(rule(&["socket"], Some((0, AF_VSOCK, LinuxSeccompOperator::ScmpCmpGt, None)))?);
    for value in PERSONALITIES {
        rules.push(rule(&["personality"], Some((0, value, LinuxSeccompOperator::ScmpCmpEq, None)))?);
    }
    if !bounding.contains(&Capability::SysAdmin) {
        // No new namespaces. clone3's flags are behind a pointer that no filter can
        // read: ENOSYS makes C libraries fall back to clone.
        let flags = usize::from(arch == "s390x");
        let masked = LinuxSeccompOperator::ScmpCmpMaskedEq;
        rules.push(rule(&["clone"], Some((flags, CLONE_NAMESPACES, masked, Some(0))))?);
        let clone3 = LinuxSyscallBuilder::default()
            .names(vec!["clone3".to_string()])
            .action(LinuxSeccompAction::ScmpActErrno)
            .errno_ret(ENOSYS)
            .build()
            .context(|| "seccomp rule for clone3".into())?;
        rules.push(clone3);
    }
    let mut profile = LinuxSeccompBuilder::default()
        .default_action(LinuxSeccompAction::ScmpActErrno)
        .syscalls(rules)
        .build()
        .context(|| "default seccomp profile".into())?;
    profile.set_architectures((!arches.is_empty()).then(|| arches.to_vec()));
    Ok(profile)
}

type Condition = (usize, u64, LinuxSeccompOperator, Option<u64>);

fn rule(names: &[&str], condition: Option<Condition>) -> Result<LinuxSyscall> {
    let mut builder = LinuxSyscallBuilder::default()
        .names(names.iter().map(ToString::to_string).collect::<Vec<_>>())
        .action(LinuxSeccompAction::ScmpActAllow);
    if let Some(condition) = condition {
        builder = builder.args(vec![argument(condition)?]);
    }
    builder.build().context(|| format!("seccomp rule for {}", names.join(" ")))
}

fn argument((index, value, op, value_two): Condition) -> Result<LinuxSeccompArg> {
    let mut builder = LinuxSeccompArgBuilder::default().index(index).value(value).op(op);
    if let Some(second) = value_two {
        builder = builder.value_two(second);
    }
    builder.build().context(|| "seccomp argument".into())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn allowed(caps: &[Capability], name: &str) -> bool {
        let profile = default_profile(&caps.iter().copied().collect(), "x86_64").unwrap();
        profile.syscalls().iter().flatten().any(|r| {
            r.action() == LinuxSeccompAction::ScmpActAllow && r.args().is_none() && r.names().iter().any(|n| n == name)
        })
    }

    #[test]
    fn calls_follow_the_capabilities() {
        for name in ["read", "openat2", "execve", "futex_waitv", "statx", "rseq", "arch_prctl"] {
            assert!(allowed(&[], name), "{name}");
        }
        for name in [
            "mount",
            "unshare",
            "setns",
            "bpf",
            "keyctl",
            "add_key",
            "userfaultfd",
            "kexec_load",
            "io_uring_setup",
            "socket",
            "clone3",
            "personality",
            "clone",
            "init_module",
            "swapon",
        ] {
            assert!(!allowed(&[], name), "{name}");
        }
        assert!(allowed(&[Capability::SysAdmin], "mount") && allowed(&[Capability::SysAdmin], "clone3"));
        assert!(!allowed(&[Capability::SysTime], "mount") && allowed(&[Capability::SysTime], "clock_settime"));
        assert!(!allowed(&[Capability::SysAdmin], "keyctl"));
    }

    #[test]
    fn clone3_falls_back_and_sockets_exclude_two_families() {
        let profile = default_profile(&Capabilities::new(), "x86_64").unwrap();
        let rules = profile.syscalls().clone().unwrap();
        let clone3 = rules.iter().find(|r| r.names()[0] == "clone3").unwrap();
        assert_eq!((clone3.action(), clone3.errno_ret()), (LinuxSeccompAction::ScmpActErrno, Some(ENOSYS)));
        let socket = |family: u64| {
            rules.iter().filter(|r| r.names()[0] == "socket").any(|r| {
                let a = &r.args().as_ref().unwrap()[0];
                match a.op() {
                    LinuxSeccompOperator::ScmpCmpLt => family < a.value(),
                    LinuxSeccompOperator::ScmpCmpGt => family > a.value(),
                    _ => family == a.value(),
                }
            })
        };
        for family in 0..64 {
            assert_eq!(socket(family), family != AF_ALG && family != AF_VSOCK, "{family}");
        }
    }

    #[test]
    fn it_survives_its_json() {
        let profile = default_profile(&Capabilities::new(), "aarch64").unwrap();
        let text = serde_json::to_string(&profile).unwrap();
        assert!(text.contains("SCMP_ACT_ERRNO") && text.contains("SCMP_ARCH_AARCH64"), "{text}");
        assert_eq!(serde_json::from_str::<LinuxSeccomp>(&text).unwrap(), profile);
    }
}
