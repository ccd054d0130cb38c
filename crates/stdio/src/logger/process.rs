//! The process of a logging binary, by its pidfd.

use super::Claim;
use sys::pidfd::{PidFd, Waited};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use types::{Error, ErrorKind, ExitStatus, Result, ResultExt, Signal};

/// A child that is ours to reap.
pub(super) struct Process {
    fd: AsyncFd<PidFd>,
    /// What it gets if it is dropped unreaped.
    last: Signal,
    _claim: Claim,
}

impl Process {
    /// Takes over the child `pid`, which has just been born. If that fails, the
    /// child is killed.
    pub(super) fn claim(pid: i32, claim: &dyn Fn(i32) -> Result<Claim>) -> Result<Self> {
        let taken = claim(pid).and_then(|c| Ok((c, watch(pid)?)));
        taken.map(|(claim, fd)| Self { fd, last: Signal::KILL, _claim: claim }).inspect_err(|_| {
            // Unreaped, so the number is its own; it is gone in a moment.
            if let Some(number) = rustix::process::Pid::from_raw(pid) {
                let _ = rustix::process::kill_process(number, rustix::process::Signal::KILL);
                let _ = rustix::process::waitpid(Some(number), rustix::process::WaitOptions::empty());
            }
        })
    }

    /// It is ready: from now on it has something to flush.
    pub(super) fn keep(&mut self) {
        self.last = Signal::TERM;
    }

    pub(super) fn pid(&self) -> i32 {
        self.fd.get_ref().pid()
    }

    /// Sends it a signal; `NotFound` once it has been reaped.
    pub(super) fn signal(&self, signal: Signal) -> Result<()> {
        self.fd.get_ref().signal(signal).map_err(|e| {
            let gone = e.raw_os_error() == Some(rustix::io::Errno::SRCH.raw_os_error());
            let kind = if gone { ErrorKind::NotFound } else { ErrorKind::Internal };
            Error::new(kind, format!("send {signal} to process {}", self.pid())).because(e)
        })
    }

    /// Reaps it if it has ended.
    pub(super) fn ended(&self) -> Option<ExitStatus> {
        match self.fd.get_ref().try_wait() {
            Ok(Waited::Running) => None,
            Ok(Waited::Ended(status)) => Some(status),
            Ok(Waited::NotOurs) | Err(_) => Some(ExitStatus::Unknown(255)),
        }
    }

    /// Waits until it has ended, and reaps it; the first answer is the true one.
    pub(super) async fn wait(&self) -> ExitStatus {
        loop {
            let Ok(mut ready) = self.fd.readable().await else { return ExitStatus::Unknown(255) };
            match self.ended() {
                Some(status) => return status,
                None => ready.clear_ready(),
            }
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // Where it has been reaped this reaches nobody.
        let _ = self.fd.get_ref().signal(self.last);
    }
}

#[expect(deprecated, reason = "its successor is unsafe; a PidFd owns its descriptor and never exchanges it")]
fn watch(pid: i32) -> Result<AsyncFd<PidFd>> {
    let what = || format!("watch process {pid}");
    AsyncFd::with_interest(PidFd::open(pid).context(what)?, Interest::READABLE).context(what)
}
