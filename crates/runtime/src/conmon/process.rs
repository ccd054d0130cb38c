//! Processes that are not our children: held by pidfd, and confirmed before they
//! are trusted to be who a file says.

use crate::bundle::blocking;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use std::path::{Path, PathBuf};
use std::time::Duration;
use sys::pidfd::PidFd;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use types::{Error, ErrorKind, ExitStatus, Result, ResultExt, Signal};

/// A process that can't be mistaken for another that has taken over its number.
#[derive(Debug)]
pub(crate) struct Process {
    pid: u32,
    fd: AsyncFd<PidFd>,
}

impl Process {
    /// Holds the process that has the number `pid` now, if `confirm` still says so
    /// once it is held. `None` where there is none, or another.
    ///
    /// # Errors
    /// Where descriptors have run out.
    pub(crate) fn open(pid: u32, confirm: impl FnOnce() -> bool) -> Result<Option<Self>> {
        let raw = i32::try_from(pid).unwrap_or(-1);
        let fd = match PidFd::open(raw) {
            Ok(fd) => fd,
            Err(e) if e.raw_os_error() == Some(rustix::io::Errno::SRCH.raw_os_error()) => return Ok(None),
            Err(e) => return Err(e).context(|| format!("hold process {pid}")),
        };
        if !confirm() {
            return Ok(None);
        }
        let fd = watch(fd).context(|| format!("watch process {pid}"))?;
        Ok(Some(Self { pid, fd }))
    }

    /// Its number.
    pub(crate) fn pid(&self) -> u32 {
        self.pid
    }

    /// Sends a signal; one that is gone is success.
    ///
    /// # Errors
    /// What the kernel refuses.
    pub(crate) fn signal(&self, signal: Signal) -> Result<()> {
        match self.fd.get_ref().signal(signal) {
            Ok(()) => Ok(()),
            Err(e) if e.raw_os_error() == Some(rustix::io::Errno::SRCH.raw_os_error()) => Ok(()),
            Err(e) => Err(Error::new(ErrorKind::Internal, format!("send {signal} to process {}", self.pid)).because(e)),
        }
    }

    /// Whether it has ended, reaped or not.
    pub(crate) fn has_ended(&self) -> bool {
        let mut fds = [PollFd::new(self.fd.get_ref(), PollFlags::IN)];
        matches!(poll(&mut fds, Some(&Timespec { tv_sec: 0, tv_nsec: 0 })), Ok(n) if n > 0)
    }

    /// Waits until it has ended.
    pub(crate) async fn ended(&self) {
        // Never cleared: the dead stay dead, for all who wait.
        let _ = self.fd.readable().await;
    }

    /// The same under a bound. True where it has ended.
    pub(crate) async fn ended_within(&self, bound: Duration) -> bool {
        tokio::time::timeout(bound, self.ended()).await.is_ok()
    }

    /// How it ended, where that can be known: from /proc as long as nobody has reaped it,
    /// afterwards from newer kernels.
    pub(crate) fn status(&self) -> Option<ExitStatus> {
        self.status_of_zombie().or_else(|| self.fd.get_ref().reaped_status())
    }

    /// How it ended, where nobody has reaped it yet.
    fn status_of_zombie(&self) -> Option<ExitStatus> {
        let before = stat(self.pid)?;
        // Held and ended: as long as it is a zombie the number is still its own.
        (self.has_ended() && before.zombie).then_some(before.status)
    }
}

#[expect(deprecated, reason = "its successor is unsafe; a PidFd owns its descriptor and never exchanges it")]
fn watch(fd: PidFd) -> std::io::Result<AsyncFd<PidFd>> {
    AsyncFd::with_interest(fd, Interest::READABLE)
}

/// What /proc says of a process.
struct Stat {
    zombie: bool,
    parent: u32,
    status: ExitStatus,
}

fn stat(pid: u32) -> Option<Stat> {
    parse_stat(&std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?)
}

fn parse_stat(text: &str) -> Option<Stat> {
    // The name in brackets may contain anything.
    let fields: Vec<&str> = text.get(text.rfind(')')? + 1..)?.split_whitespace().collect();
    let code: u32 = fields.last()?.parse().ok()?;
    let status = match code & 0x7f {
        0 => ExitStatus::Code(u8::try_from((code >> 8) & 0xff).unwrap_or(255)),
        signal => ExitStatus::Signal(u8::try_from(signal).unwrap_or(0)),
    };
    Some(Stat { zombie: *fields.first()? == "Z", parent: fields.get(1)?.parse().ok()?, status })
}

/// The parent of a process.
pub(crate) fn parent(pid: u32) -> Option<u32> {
    stat(pid).map(|s| s.parent)
}

/// The command line of a process.
pub(crate) fn arguments(pid: u32) -> Vec<String> {
    let raw = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    raw.split(|b| *b == 0).filter(|a| !a.is_empty()).map(|a| String::from_utf8_lossy(a).into_owned()).collect()
}

/// All processes one of whose arguments is `path`.
pub(crate) fn with_argument(path: &Path) -> Vec<u32> {
    let wanted = path.to_string_lossy();
    let all = std::fs::read_dir("/proc").into_iter().flatten().flatten();
    all.filter_map(|e| e.file_name().to_str()?.parse().ok())
        .filter(|pid| arguments(*pid).iter().any(|a| *a == wanted))
        .collect()
}

/// Kills a process with all that descends from it, none of which goes on for a step
/// meanwhile, and awaits their deaths: what they were about to make would come after
/// whoever takes it away. True where all have died within `bound`.
pub(crate) async fn kill_tree(root: &Process, bound: Duration) -> bool {
    let pid = i32::try_from(root.pid()).unwrap_or(-1);
    if root.has_ended() {
        return true;
    }
    let killed = blocking(move || {
        let held = oci::kill_call(pid, |_| {});
        let until = std::time::Instant::now() + bound;
        Ok(held.iter().all(|p| p.ended_within(until.saturating_duration_since(std::time::Instant::now()))))
    });
    killed.await.unwrap_or(false)
}

/// The number in a pid file; `None` where there is none.
pub(crate) fn pid_file(path: &PathBuf) -> Option<u32> {
    std::fs::read_to_string(path).ok()?.trim().parse().ok().filter(|pid| *pid > 1)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::Command;

    #[test]
    fn a_stat_line_is_read_whatever_the_name() {
        let line = |state: &str, code: u32| format!("12 (a) b (c) {state} 7 12 12 0 -1 4194304 {code}\n");
        let s = parse_stat(&line("Z", 7 << 8)).unwrap();
        assert!(s.zombie && s.parent == 7 && s.status == ExitStatus::Code(7));
        assert_eq!(parse_stat(&line("Z", 9)).unwrap().status, ExitStatus::Signal(9));
        assert_eq!(parse_stat(&line("Z", 11 | 0x80)).unwrap().status, ExitStatus::Signal(11), "with a core");
        assert!(!parse_stat(&line("S", 0)).unwrap().zombie);
        assert!(parse_stat("").is_none());
    }

    #[tokio::test]
    async fn one_that_is_not_who_it_should_be_is_nobody() {
        let mut child = Command::new("/bin/sleep").arg("60").spawn().unwrap();
        assert!(Process::open(child.id(), || false).unwrap().is_none());
        let p = Process::open(child.id(), || true).unwrap().unwrap();
        assert!(!p.has_ended() && p.status_of_zombie().is_none());
        assert!(!p.ended_within(Duration::from_millis(20)).await);
        p.signal(Signal::TERM).unwrap();
        assert!(p.ended_within(Duration::from_secs(10)).await && p.has_ended());
        assert_eq!(p.status_of_zombie(), Some(ExitStatus::Signal(15)));
        child.wait().unwrap();
        assert_eq!(p.status_of_zombie(), None, "reaped");
        p.signal(Signal::KILL).unwrap();
        assert!(Process::open(child.id(), || true).unwrap().is_none());
    }

    /// The children of a process, whichever of its threads bore them.
    fn children(pid: u32) -> Vec<u32> {
        let mut all = Vec::new();
        for task in std::fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten() {
            let text = std::fs::read_to_string(task.path().join("children")).unwrap_or_default();
            all.extend(text.split_ascii_whitespace().filter_map(|p| p.parse::<u32>().ok()));
        }
        all
    }

    #[tokio::test]
    async fn a_tree_dies_as_a_whole() {
        let script = "sleep 61 & sleep 62 & wait";
        let mut child = Command::new("/bin/sh").args(["-c", script]).spawn().unwrap();
        while children(child.id()).len() < 2 {
            std::thread::sleep(Duration::from_millis(5));
        }
        let below: Vec<_> =
            children(child.id()).into_iter().map(|p| Process::open(p, || true).unwrap().unwrap()).collect();
        let root = Process::open(child.id(), || true).unwrap().unwrap();
        assert!(kill_tree(&root, Duration::from_secs(10)).await);
        child.wait().unwrap();
        for p in below {
            assert!(p.ended_within(Duration::from_secs(10)).await);
        }
    }
}
