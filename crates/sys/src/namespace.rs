//! Namespaces: made, furnished and entered on threads that are then thrown away.
//!
//! ```text
//! without a user namespace          with one
//!   daemon                            daemon ──spawn──► helper (this binary, one thread)
//!     └─ thread: unshare                │  ◄── in a user namespace ──┤ unshare(user)
//!          hostname, lo, sysctls        │  uid_map, gid_map          │
//!          caller pins                  │  ── what is wanted ──────► │ uid 0, unshare(net,ipc,uts)
//!          /proc/thread-self/ns/*       │  ◄── done ─────────────────┤ hostname, lo, sysctls
//!          thread ends                  │  caller pins /proc/PID/ns/*, helper ends
//! ```
//!
//! A thread may leave its process's net, ipc and uts namespaces, but not its user
//! namespace: that takes a process with one thread, see [`crate::ns_helper`].
//! Only a [`ThisThread`] can unshare and enter, and only a thread that ends after
//! its work has one, so that no worker is left in a pod's namespaces.

use rustix::fd::{AsFd, BorrowedFd, OwnedFd};
use rustix::thread::{LinkNameSpaceType, UnshareFlags};
use std::io::Write;
use std::marker::PhantomData;
use std::path::{Path, PathBuf};
use types::{Error, ErrorKind, Result, ResultExt};

/// A kind of namespace that a pod can have of its own or share.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Kind {
    /// Interfaces, routes, sockets, `net.*` sysctls.
    Net,
    /// System V IPC and POSIX message queues with their sysctls.
    Ipc,
    /// The host name.
    Uts,
    /// Users and capabilities.
    User,
    /// Process ids.
    Pid,
}

impl Kind {
    /// Its name in `/proc/PID/ns`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Net => "net",
            Self::Ipc => "ipc",
            Self::Uts => "uts",
            Self::User => "user",
            Self::Pid => "pid",
        }
    }

    fn unshare_flag(self) -> UnshareFlags {
        match self {
            Self::Net => UnshareFlags::NEWNET,
            Self::Ipc => UnshareFlags::NEWIPC,
            Self::Uts => UnshareFlags::NEWUTS,
            Self::User => UnshareFlags::NEWUSER,
            Self::Pid => UnshareFlags::NEWPID,
        }
    }

    fn link_type(self) -> LinkNameSpaceType {
        match self {
            Self::Net => LinkNameSpaceType::Network,
            Self::Ipc => LinkNameSpaceType::InterProcessCommunication,
            Self::Uts => LinkNameSpaceType::HostNameAndNISDomainName,
            Self::User => LinkNameSpaceType::User,
            Self::Pid => LinkNameSpaceType::ProcessID,
        }
    }
}

/// The right to change the calling thread's namespaces.
#[derive(Debug)]
pub struct ThisThread(PhantomData<*const ()>);

impl ThisThread {
    /// For the helper, whose only thread is as good as thrown away.
    pub(crate) fn of_a_process_that_ends() -> Self {
        Self(PhantomData)
    }

    /// New namespaces of these kinds for this thread.
    ///
    /// # Errors
    /// `ResourceExhausted` when the node's limit of namespaces is reached.
    pub fn unshare(&self, kinds: &[Kind]) -> Result<()> {
        let flags = kinds.iter().fold(UnshareFlags::empty(), |all, k| all | k.unshare_flag());
        // SAFETY: the flags are namespaces' only; CLONE_FILES, which would part this
        // thread from its process's descriptors, is not among them.
        unsafe { rustix::thread::unshare_unsafe(flags) }
            .context(|| format!("make namespaces ({})", kinds.iter().map(|k| k.name()).collect::<Vec<_>>().join(", ")))
            .map_err(|e| match e.kind() {
                ErrorKind::ResourceExhausted => e.hint("the limits are in /proc/sys/user/max_*_namespaces"),
                _ => e,
            })
    }

    /// Enters the namespace that `fd` refers to.
    ///
    /// # Errors
    /// `InvalidArgument` when it is of another kind.
    pub fn enter(&self, fd: BorrowedFd<'_>, kind: Kind) -> Result<()> {
        rustix::thread::move_into_link_name_space(fd, Some(kind.link_type()))
            .context(|| format!("enter a {} namespace", kind.name()))
    }
}

/// Runs `work` on a thread of its own, which ends with it, and waits for it.
///
/// # Errors
/// Those of `work`; `Internal` when it panics or no thread can be made.
pub fn on_own_thread<T: Send>(name: &str, work: impl FnOnce(&ThisThread) -> Result<T> + Send) -> Result<T> {
    std::thread::scope(|scope| {
        std::thread::Builder::new()
            .name(name.to_owned())
            .spawn_scoped(scope, || work(&ThisThread(PhantomData)))
            .context_kind(ErrorKind::ResourceExhausted, || format!("start the thread {name}"))?
            .join()
            .unwrap_or_else(|_| Err(Error::internal(format!("the thread {name} panicked"))))
    })
}

/// Runs `work` inside namespaces given by their (pinned) paths.
///
/// # Errors
/// Names the path that can't be opened or entered; those of `work`.
pub fn inside<T: Send>(namespaces: &[(Kind, &Path)], work: impl FnOnce(&ThisThread) -> Result<T> + Send) -> Result<T> {
    let opened = namespaces.iter().map(|(kind, path)| Ok((*kind, open(path)?))).collect::<Result<Vec<_>>>()?;
    on_own_thread("in-namespace", |thread| {
        for (kind, fd) in &opened {
            thread.enter(fd.as_fd(), *kind)?;
        }
        work(thread)
    })
}

/// Opens a namespace's path.
///
/// # Errors
/// Names the path.
pub fn open(path: &Path) -> Result<OwnedFd> {
    rustix::fs::open(path, rustix::fs::OFlags::RDONLY | rustix::fs::OFlags::CLOEXEC, rustix::fs::Mode::empty())
        .context(|| format!("open the namespace {}", path.display()))
}

/// Opens a namespace of the process that has the number `pid` now, and that still
/// runs afterwards: a number that was given to another process meanwhile would not
/// be seen otherwise.
///
/// # Errors
/// `FailedPrecondition` when there is no such process or it has ended.
pub fn open_of(pid: u32, kind: Kind) -> Result<OwnedFd> {
    use rustix::event::{PollFd, PollFlags, Timespec, poll};
    use rustix::process::{Pid, PidfdFlags, pidfd_open};
    let what = || format!("open the {} namespace of process {pid}", kind.name());
    let ended = || Error::precondition(what()).because("it has ended");
    let number = i32::try_from(pid).ok().filter(|n| *n > 0).and_then(Pid::from_raw).ok_or_else(ended)?;
    let process = pidfd_open(number, PidfdFlags::empty()).map_err(|e| ended().because(e))?;
    let path = format!("/proc/{pid}/ns/{}", kind.name());
    let fd = open(Path::new(&path)).map_err(|e| if e.is_not_found() { ended() } else { e })?;
    let now = Timespec { tv_sec: 0, tv_nsec: 0 };
    let readable = poll(&mut [PollFd::new(&process, PollFlags::IN)], Some(&now)).context(what)?;
    if readable == 0 { Ok(fd) } else { Err(ended()) }
}

/// The number that tells one namespace from another, as `lsns` shows it.
///
/// # Errors
/// `NotFound` where nothing is; `FailedPrecondition` where a file is that no
/// namespace is mounted on.
pub fn inode(path: &Path) -> Result<u64> {
    /// `NSFS_MAGIC`
    const NSFS: u64 = 0x6e73_6673;
    let fd = open(path)?;
    let what = || format!("look at the namespace {}", path.display());
    let fs = rustix::fs::fstatfs(&fd).context(what)?;
    if u64::try_from(fs.f_type).ok() != Some(NSFS) {
        return Err(Error::precondition(what()).because("no namespace is mounted there"));
    }
    Ok(rustix::fs::fstat(&fd).context(what)?.st_ino)
}

/// What new namespaces are to be and hold.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Wanted {
    /// A net namespace, with `lo` up.
    pub net: bool,
    /// An ipc namespace.
    pub ipc: bool,
    /// A uts namespace.
    pub uts: bool,
    /// Its host name; without one it has the node's.
    pub hostname: Option<String>,
    /// Sysctls by name, written as they stand; those of interfaces that are still to come
    /// are left to [`write_net_sysctls`].
    pub sysctls: Vec<(String, String)>,
}

impl Wanted {
    /// The kinds, but for the user namespace.
    pub fn kinds(&self) -> Vec<Kind> {
        [(self.net, Kind::Net), (self.ipc, Kind::Ipc), (self.uts, Kind::Uts)]
            .into_iter()
            .filter_map(|(wanted, kind)| wanted.then_some(kind))
            .collect()
    }

    /// The sysctls that can be set before the pod has interfaces.
    fn sysctls_of_now(&self) -> impl Iterator<Item = &(String, String)> {
        self.sysctls.iter().filter(|(key, _)| !is_of_an_interface(key))
    }

    /// Refuses what would change the node instead of the new namespaces.
    ///
    /// # Errors
    /// `InvalidArgument`, naming the sysctl or the host name.
    pub fn check(&self) -> Result<()> {
        if let Some(name) = self.hostname.as_deref().filter(|_| !self.uts) {
            return Err(Error::invalid(format!("the host name {name:?} needs a uts namespace of its own")));
        }
        for (key, value) in &self.sysctls {
            let Some(kind) = sysctl_namespace(key) else {
                return Err(Error::invalid(format!("sysctl {key:?} belongs to no namespace of a pod"))
                    .hint("only net.*, kernel.shm*, kernel.msg*, kernel.sem and fs.mqueue.* do"));
            };
            if !self.kinds().contains(&kind) {
                return Err(Error::invalid(format!(
                    "sysctl {key} would be set on the node: the pod has no {} namespace of its own",
                    kind.name()
                )));
            }
            if value.bytes().any(|b| b == b'\n' || b == 0) {
                return Err(Error::invalid(format!("the value {value:?} of sysctl {key} is not one line")));
            }
        }
        Ok(())
    }
}

/// The namespace that a sysctl, in either notation, belongs to; `None` for the
/// node's own and for a name that is none.
pub fn sysctl_namespace(key: &str) -> Option<Kind> {
    let path = sysctl_path(key)?;
    let path = path.strip_prefix("/proc/sys").ok()?.to_str()?;
    if path.starts_with("net/") {
        Some(Kind::Net)
    } else if path.starts_with("kernel/shm")
        || path.starts_with("kernel/msg")
        || path == "kernel/sem"
        || path == "kernel/auto_msgmni"
        || path.starts_with("fs/mqueue/")
    {
        Some(Kind::Ipc)
    } else {
        None
    }
}

/// Whether it is a setting of an interface that its network only gives the pod.
pub(crate) fn is_of_an_interface(key: &str) -> bool {
    let path = sysctl_path(key);
    let mut parts = path.iter().flat_map(|p| p.iter().skip(3)).map(|part| part.to_str().unwrap_or_default());
    matches!((parts.next(), parts.next()), (Some("net"), Some("ipv4" | "ipv6" | "mpls")))
        && matches!(parts.next(), Some("conf" | "neigh"))
        && parts.next().is_some_and(|interface| !["all", "default", "lo"].contains(&interface))
}

/// Writes those of `sysctls` that are the net namespace's into the one pinned at `netns`.
///
/// # Errors
/// Those of [`write_sysctl`], and a path that is no namespace.
pub fn write_net_sysctls(netns: &Path, sysctls: &[(String, String)]) -> Result<()> {
    let mut net = sysctls.iter().filter(|(key, _)| sysctl_namespace(key) == Some(Kind::Net)).peekable();
    if net.peek().is_none() {
        return Ok(());
    }
    inside(&[(Kind::Net, netns)], |_| net.try_for_each(|(key, value)| write_sysctl(key, value)))
}

/// `net.ipv4.conf.eth0/1.x` or `net/ipv4/conf/eth0.1/x`, as `sysctl(8)` reads
/// them: the first separator decides, and the other one stands for it inside a
/// part. `None` for a name with an empty part or one of dots.
fn sysctl_path(key: &str) -> Option<PathBuf> {
    let dotted = key.find(['.', '/']).is_some_and(|at| key[at..].starts_with('.'));
    let relative: String = if dotted {
        key.chars()
            .map(|c| match c {
                '.' => '/',
                '/' => '.',
                c => c,
            })
            .collect()
    } else {
        key.to_owned()
    };
    let whole = relative.split('/').all(|part| !matches!(part, "" | "." | ".."));
    (whole && !relative.contains('\0')).then(|| Path::new("/proc/sys").join(relative))
}

/// Writes one sysctl in the calling thread's namespaces.
///
/// # Errors
/// `InvalidArgument` for a value or a name that the kernel refuses,
/// `PermissionDenied` where this user may not set it; names both.
pub fn write_sysctl(key: &str, value: &str) -> Result<()> {
    let what = || format!("set sysctl {key} to {value:?}");
    let path = sysctl_path(key).ok_or_else(|| Error::invalid(what()).because("no such name can exist"))?;
    std::fs::OpenOptions::new().write(true).open(&path).and_then(|mut f| f.write_all(value.as_bytes())).map_err(|e| {
        let kind = match e.kind() {
            std::io::ErrorKind::PermissionDenied => ErrorKind::PermissionDenied,
            _ => ErrorKind::InvalidArgument,
        };
        let missing = e.kind() == std::io::ErrorKind::NotFound;
        let e = Error::new(kind, what()).because(e);
        if missing { e.hint("this kernel has no such sysctl in a namespace of its own") } else { e }
    })
}

/// The host name of the calling thread's uts namespace.
///
/// # Errors
/// `InvalidArgument` for more than 64 bytes.
pub fn set_hostname(name: &str) -> Result<()> {
    rustix::system::sethostname(name.as_bytes()).context(|| format!("set the host name {name:?}"))
}

/// The node's host name.
pub fn hostname() -> String {
    rustix::system::uname().nodename().to_string_lossy().into_owned()
}

/// Host name and `lo`, which new namespaces always need.
pub(crate) fn furnish(wanted: &Wanted) -> Result<()> {
    if let Some(name) = &wanted.hostname {
        set_hostname(name)?;
    }
    if wanted.net {
        crate::link::set_up("lo")?;
    }
    Ok(())
}

/// Makes namespaces in the node's user namespace. `pin` is called with the
/// directory of their links while they live and must keep them alive itself;
/// `mark` hears the name of each step when it ends.
///
/// # Errors
/// `InvalidArgument` as [`Wanted::check`] and [`write_sysctl`], those of `pin`. The
/// namespaces are gone then, what `pin` did is the caller's to undo.
pub fn make<T: Send>(
    wanted: &Wanted,
    mark: &mut (dyn FnMut(&'static str) + Send),
    pin: impl FnOnce(&Path) -> Result<T> + Send,
) -> Result<T> {
    wanted.check()?;
    on_own_thread("namespaces", |thread| {
        thread.unshare(&wanted.kinds())?;
        mark("unshare");
        furnish(wanted)?;
        for (key, value) in wanted.sysctls_of_now() {
            write_sysctl(key, value)?;
        }
        mark("furnish");
        let pinned = pin(Path::new("/proc/thread-self/ns"))?;
        mark("pin");
        Ok(pinned)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sysctls_find_their_namespace_in_both_notations() {
        for (key, kind) in [
            ("net.ipv4.ip_forward", Some(Kind::Net)),
            ("net/ipv4/conf/eth0.100/rp_filter", Some(Kind::Net)),
            ("net.ipv4.conf.eth0/100.rp_filter", Some(Kind::Net)),
            ("kernel.shm_rmid_forced", Some(Kind::Ipc)),
            ("kernel.msgmax", Some(Kind::Ipc)),
            ("kernel.sem", Some(Kind::Ipc)),
            ("fs.mqueue.msg_max", Some(Kind::Ipc)),
            ("kernel.semaphore", None),
            ("net", None),
            ("vm.swappiness", None),
        ] {
            assert_eq!(sysctl_namespace(key), kind, "{key}");
        }
        assert_eq!(sysctl_path("net.ipv4.conf.eth0/100.rp_filter"), sysctl_path("net/ipv4/conf/eth0.100/rp_filter"));
    }

    #[test]
    fn sysctls_of_interfaces_to_come_are_known() {
        for key in ["net.ipv4.conf.eth0.rp_filter", "net/ipv6/conf/eth0.100/mtu", "net.ipv4.neigh.net1.locktime"] {
            assert!(is_of_an_interface(key), "{key}");
        }
        for key in ["net.ipv4.conf.all.rp_filter", "net.ipv6.conf.lo.mtu", "net.core.somaxconn", "net.ipv4.conf", "net"]
        {
            assert!(!is_of_an_interface(key), "{key}");
        }
    }

    #[test]
    fn cve_2022_0811_only_namespaced_sysctls_are_ever_written() {
        for key in [
            "kernel.core_pattern",
            "net/../kernel/core_pattern",
            "net.//.kernel.core_pattern",
            "kernel/shm/../core_pattern",
            "net..ipv4",
            "/net/ipv4",
            "",
            ".",
        ] {
            let all = Wanted {
                net: true,
                ipc: true,
                uts: true,
                sysctls: vec![(key.into(), "|/x".into())],
                ..Wanted::default()
            };
            assert_eq!(all.check().unwrap_err().kind(), ErrorKind::InvalidArgument, "{key}");
        }
        let two_lines = vec![("kernel.shm_rmid_forced".into(), "1\nx".into())];
        assert!(Wanted { ipc: true, sysctls: two_lines, ..Wanted::default() }.check().is_err());
    }

    #[test]
    fn cve_2022_0532_a_sysctl_of_a_namespace_of_the_node_is_refused() {
        for (net, ipc, key) in [(false, true, "net.ipv4.ip_forward"), (true, false, "kernel.msgmax")] {
            let wanted = Wanted { net, ipc, sysctls: vec![(key.into(), "1".into())], ..Wanted::default() };
            let e = wanted.check().unwrap_err().to_string();
            assert!(e.contains(key) && e.contains("on the node"), "{e}");
            wanted.sysctls.iter().for_each(|(k, _)| assert!(sysctl_namespace(k).is_some()));
        }
    }
}
