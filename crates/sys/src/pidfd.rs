//! A process by descriptor: it can't be mistaken for another that has taken
//! over its number.

use rustix::process::{Pid, PidfdFlags, WaitId, WaitIdOptions, WaitIdStatus};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use types::{ExitStatus, Signal};

/// A process, held by its pidfd. Readable (in the sense of poll) once it has ended.
#[derive(Debug)]
pub struct PidFd {
    fd: OwnedFd,
    pid: i32,
}

/// What a look at a process has shown.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Waited {
    /// It has not ended yet.
    Running,
    /// It has ended.
    Ended(ExitStatus),
    /// It is no child of ours, or somebody else has reaped it.
    NotOurs,
}

impl PidFd {
    /// Opens the process that has the number `pid` now.
    ///
    /// A zombie can be opened too, and as long as it is not reaped its number is
    /// nobody else's.
    ///
    /// # Errors
    /// ESRCH where there is none.
    pub fn open(pid: i32) -> io::Result<Self> {
        let raw = number(pid).ok_or_else(|| io::Error::from_raw_os_error(libc::ESRCH))?;
        Ok(Self { fd: rustix::process::pidfd_open(raw, PidfdFlags::empty())?, pid })
    }

    /// Its number while it was alive or unreaped.
    pub fn pid(&self) -> i32 {
        self.pid
    }

    /// Sends a signal, real-time ones too.
    ///
    /// # Errors
    /// ESRCH once it has been reaped (a zombie takes any signal in silence).
    pub fn signal(&self, signal: Signal) -> io::Result<()> {
        // SAFETY: the descriptor is ours and open; no pointer is passed but null.
        let r = unsafe {
            libc::syscall(
                libc::SYS_pidfd_send_signal,
                self.fd.as_raw_fd(),
                libc::c_int::from(signal.number()),
                std::ptr::null::<libc::siginfo_t>(),
                0,
            )
        };
        if r == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
    }

    /// Reaps it if it has ended; never blocks.
    ///
    /// # Errors
    /// Those of `waitid`, but for ECHILD.
    pub fn try_wait(&self) -> io::Result<Waited> {
        look(WaitId::PidFd(self.fd.as_fd()), WaitIdOptions::EXITED | WaitIdOptions::NOHANG)
    }

    /// Blocks until it has ended, whosever child it is, at most `bound`. True when it has.
    pub fn ended_within(&self, bound: std::time::Duration) -> bool {
        let deadline = std::time::Instant::now() + bound;
        loop {
            let left = deadline.saturating_duration_since(std::time::Instant::now());
            let left = rustix::event::Timespec::try_from(left).unwrap_or_default();
            let mut fds = [rustix::event::PollFd::new(&self.fd, rustix::event::PollFlags::IN)];
            match rustix::event::poll(&mut fds, Some(&left)) {
                Err(rustix::io::Errno::INTR) => {}
                Ok(ready) => return ready > 0,
                Err(_) => return false,
            }
        }
    }

    /// How it ended, once whoever was its parent has reaped it. `None` before that, and
    /// on kernels before 6.15, which keep no record for those who hold a pidfd.
    pub fn reaped_status(&self) -> Option<ExitStatus> {
        // SAFETY: the structure is made of integers, for which all zeroes is a value.
        let mut info: libc::pidfd_info = unsafe { std::mem::zeroed() };
        info.mask = u64::from(libc::PIDFD_INFO_EXIT);
        // SAFETY: the descriptor is ours and open; the request's number carries the size of
        // the structure that the kernel may write to, and it outlives the call.
        let r = unsafe { libc::ioctl(self.fd.as_raw_fd(), libc::PIDFD_GET_INFO, &raw mut info) };
        (r == 0 && info.mask & u64::from(libc::PIDFD_INFO_EXIT) != 0).then(|| wait_status(info.exit_code))
    }

    /// Looks whether it has ended, and leaves it unreaped.
    ///
    /// # Errors
    /// Those of `waitid`, but for ECHILD.
    pub fn peek(&self) -> io::Result<Waited> {
        look(WaitId::PidFd(self.fd.as_fd()), WaitIdOptions::EXITED | WaitIdOptions::NOHANG | WaitIdOptions::NOWAIT)
    }
}

impl AsRawFd for PidFd {
    fn as_raw_fd(&self) -> RawFd {
        self.fd.as_raw_fd()
    }
}

impl AsFd for PidFd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// Whether the child `pid` is a zombie; it stays one.
///
/// # Errors
/// Those of `waitid`, but for ECHILD.
pub fn peek_child(pid: i32) -> io::Result<Waited> {
    match number(pid) {
        Some(p) => look(WaitId::Pid(p), WaitIdOptions::EXITED | WaitIdOptions::NOHANG | WaitIdOptions::NOWAIT),
        None => Ok(Waited::NotOurs),
    }
}

/// Reaps the child `pid` if it is a zombie. Only for children that nobody
/// watches: for all others there is [`PidFd::try_wait`].
///
/// # Errors
/// Those of `waitid`, but for ECHILD.
pub fn reap_child(pid: i32) -> io::Result<Waited> {
    match number(pid) {
        Some(p) => look(WaitId::Pid(p), WaitIdOptions::EXITED | WaitIdOptions::NOHANG),
        None => Ok(Waited::NotOurs),
    }
}

/// A number that can be a process's: 0 and below mean groups elsewhere.
fn number(pid: i32) -> Option<Pid> {
    if pid > 0 { Pid::from_raw(pid) } else { None }
}

fn look(id: WaitId<'_>, options: WaitIdOptions) -> io::Result<Waited> {
    match rustix::process::waitid(id, options) {
        Ok(Some(status)) => Ok(Waited::Ended(exit_status(&status))),
        Ok(None) => Ok(Waited::Running),
        Err(rustix::io::Errno::CHILD) => Ok(Waited::NotOurs),
        Err(e) => Err(e.into()),
    }
}

/// What a status as of `wait(2)` says.
fn wait_status(raw: i32) -> ExitStatus {
    match raw & 0x7f {
        0 => ExitStatus::Code(u8::try_from((raw >> 8) & 0xff).unwrap_or(255)),
        signal => ExitStatus::Signal(u8::try_from(signal).unwrap_or(0)),
    }
}

fn exit_status(status: &WaitIdStatus) -> ExitStatus {
    if let Some(code) = status.exit_status() {
        // The kernel keeps the low byte only.
        return ExitStatus::Code(u8::try_from(code & 0xff).unwrap_or(255));
    }
    match status.terminating_signal().and_then(|s| u8::try_from(s).ok()) {
        Some(signal) => ExitStatus::Signal(signal),
        None => ExitStatus::Unknown(255),
    }
}

#[cfg(test)]
#[expect(clippy::zombie_processes, reason = "they are reaped by pidfd: that is what is tested")]
mod tests {
    use super::*;
    use std::process::Command;

    fn wait(p: &PidFd) -> Waited {
        for _ in 0..6000 {
            match p.try_wait().unwrap() {
                Waited::Running => std::thread::sleep(std::time::Duration::from_millis(10)),
                other => return other,
            }
        }
        Waited::Running
    }

    #[test]
    fn a_child_is_signalled_and_reaped_by_descriptor() {
        let child = Command::new("/bin/sleep").arg("60").spawn().unwrap();
        let p = PidFd::open(child.id() as i32).unwrap();
        assert_eq!(p.try_wait().unwrap(), Waited::Running);
        p.signal(Signal::TERM).unwrap();
        assert_eq!(wait(&p), Waited::Ended(ExitStatus::Signal(15)));
        assert_eq!(p.try_wait().unwrap(), Waited::NotOurs, "reaped once only");
        assert!(p.signal(Signal::KILL).is_err());
    }

    #[test]
    fn a_zombie_can_still_be_opened_and_keeps_its_code() {
        let child = Command::new("/bin/sh").args(["-c", "exit 7"]).spawn().unwrap();
        let pid = child.id() as i32;
        while peek_child(pid).unwrap() == Waited::Running {
            std::thread::sleep(std::time::Duration::from_millis(5));
        }
        let p = PidFd::open(pid).unwrap();
        assert_eq!(p.peek().unwrap(), Waited::Ended(ExitStatus::Code(7)));
        assert_eq!(p.try_wait().unwrap(), Waited::Ended(ExitStatus::Code(7)));
    }

    #[test]
    fn the_kernel_remembers_how_a_reaped_process_ended() {
        let release = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap();
        let mut numbers = release.split(['.', '-']).map(|n| n.parse::<u32>().unwrap_or(0));
        let remembers = (numbers.next(), numbers.next()) >= (Some(6), Some(15));
        for (script, status) in [("exit 7", ExitStatus::Code(7)), ("kill -9 $$", ExitStatus::Signal(9))] {
            let mut child = Command::new("/bin/sh").args(["-c", script]).spawn().unwrap();
            let p = PidFd::open(child.id() as i32).unwrap();
            while p.peek().unwrap() == Waited::Running {
                std::thread::sleep(std::time::Duration::from_millis(5));
            }
            assert_eq!(p.reaped_status(), None, "not reaped yet");
            child.wait().unwrap();
            assert_eq!(p.reaped_status(), remembers.then_some(status), "{release}");
        }
        assert_eq!(wait_status(0x8b), ExitStatus::Signal(11), "with a core");
    }

    #[test]
    fn there_is_no_process_zero() {
        assert!(PidFd::open(0).is_err());
        assert!(PidFd::open(-1).is_err());
        assert_eq!(peek_child(1).unwrap(), Waited::NotOurs);
    }
}
