//! Logging binaries: a program that takes the streams of one process
//! (behaviours.md section 4).
//!
//! ```text
//!                      write        read
//! process's stdout  ---[pipe]----+--> 3  logging binary
//! process's stderr  ---[pipe]--+-+--> 4  (CONTAINER_ID, CONTAINER_NAMESPACE)
//!                              | |    5 --[pipe]--> ready?
//!                        ours, |-+
//!                              +-> read by nobody while the binary lives,
//!                                  into /dev/null after its death
//!
//! start -> wait until ready -> Logger -> close -> end of input -> TERM -> KILL
//!    `-- any error: kill, reap, close everything, report all of it
//! ```
//!
//! The process writes into the pipe itself: no byte passes through us. Because
//! we hold the reading ends too, it gets no SIGPIPE when the binary dies; because
//! they are then emptied, it isn't blocked either. A binary that lives but reads
//! nothing holds up its writer, as a slow reader of a FIFO does. The process that
//! was started is the binary: if it leaves its work to a child and ends, it has
//! died.

mod process;
#[cfg(test)]
mod tests;

use crate::{Capped, collect, fifo, watch};
use process::Process;
use rustix::event::{PollFd, PollFlags};
use std::ffi::OsString;
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;
use tokio::io::Interest;
use tokio::sync::oneshot;
use types::{Error, ExitStatus, Result, ResultExt, Signal};

/// When a logging binary counts as ready.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Handshake {
    /// It has written a byte to descriptor 5 or closed it: `binary://`.
    ByteOrEnd,
    /// It has written a byte: `binary-v2://`.
    Byte,
}

/// A logging binary and how it is called.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Binary {
    /// The program, an absolute path.
    pub path: PathBuf,
    /// Its arguments: each of the URI's keys and its first value, in the order
    /// of the URI.
    pub args: Vec<OsString>,
    /// When it is ready.
    pub handshake: Handshake,
}

/// How long a logging binary may take for what.
#[derive(Debug, Clone, Copy)]
pub struct Bounds {
    /// To say that it is ready.
    pub ready: Duration,
    /// To end by itself once its input has.
    pub end: Duration,
    /// To end after SIGTERM.
    pub terminate: Duration,
    /// To be gone after SIGKILL; after that it is reaped whenever it goes, but
    /// nobody waits for it.
    pub kill: Duration,
}

impl Default for Bounds {
    fn default() -> Self {
        let seconds = Duration::from_secs;
        Self { ready: seconds(10), end: seconds(2), terminate: seconds(12), kill: seconds(2) }
    }
}

/// Keeps a child from being reaped by anybody but its logger while it is held.
pub type Claim = Box<dyn std::any::Any + Send + Sync>;

/// What a logger needs to know of the one who starts it.
#[derive(Clone)]
pub struct Host<'a> {
    /// CONTAINER_ID: the container's id, for an exec the exec's.
    pub id: &'a str,
    /// CONTAINER_NAMESPACE.
    pub namespace: &'a str,
    /// Told of the child before anything is awaited, so that a reaper of all
    /// children can leave this one alone.
    pub claim: &'a (dyn Fn(i32) -> Result<Claim> + Send + Sync),
    /// Told of what goes wrong with a running logger, each thing once. None of
    /// it is a reason to fail the container's Delete.
    pub report: Arc<dyn Fn(Error) + Send + Sync>,
    /// Usually the defaults.
    pub bounds: Bounds,
}

/// A running logging binary. Dropped, it is closed in the background.
#[derive(Debug)]
pub struct Logger {
    close: oneshot::Sender<()>,
    closed: oneshot::Receiver<()>,
}

/// The reading ends of both streams, which are not read while the binary lives.
type Ends = [OwnedFd; 2];

impl Logger {
    /// Starts `binary` and waits until it is ready. Returned with it are the
    /// writing ends for the process's standard output and error; the binary sees
    /// the end of a stream when every copy of its writing end is closed.
    ///
    /// Must be called within a tokio runtime. If the future is dropped, the
    /// binary is killed.
    ///
    /// # Errors
    /// Where it can't be started, `FailedPrecondition` where it ends without
    /// being ready, `DeadlineExceeded` where it isn't ready in time; nothing of
    /// it is left then.
    pub async fn start(binary: &Binary, host: &Host<'_>) -> Result<(Self, OwnedFd, OwnedFd)> {
        let what = format!("logging binary {} of {}", binary.path.display(), host.id);
        let (stdout_read, stdout) = fifo::pipe()?;
        let (stderr_read, stderr) = fifo::pipe()?;
        let (ready, ready_write) = fifo::pipe()?;
        let env = [("CONTAINER_ID", host.id), ("CONTAINER_NAMESPACE", host.namespace)];
        let fds = [stdout_read.as_fd(), stderr_read.as_fd(), ready_write.as_fd()];
        let pid = sys::spawn::spawn(&binary.path, &binary.args, &env, &fds)
            .context(|| format!("start {what}"))
            .map_err(|e| e.hint("the path in the log URI must be an executable on this node"))?;
        // Claimed before the next await: no reaper of this thread's can be faster.
        let mut process = Process::claim(pid, host.claim).map_err(|e| e.within(&what))?;
        // Else the end of this pipe would never be seen.
        drop(ready_write);
        let up = tokio::time::timeout(host.bounds.ready, wait_until_ready(ready, binary.handshake)).await;
        if let Err(e) = up.unwrap_or_else(|_| {
            let text = format!("it did not say within {} s that it is ready", host.bounds.ready.as_secs_f32());
            Err(Error::deadline(text).hint("it has to write a byte to descriptor 5"))
        }) {
            return Err(undo(process, e, host.bounds.kill).await.within(what));
        }
        process.keep();
        let (close, closing) = oneshot::channel();
        let (closed_tx, closed) = oneshot::channel();
        let care = Care { process, what, report: host.report.clone(), bounds: host.bounds, closed: closed_tx };
        tokio::spawn(care.run([stdout_read, stderr_read], closing));
        Ok((Self { close, closed }, stdout, stderr))
    }

    /// Closes our ends and waits until the binary has ended: by itself at the
    /// end of its input, after SIGTERM, or after SIGKILL. What goes wrong is
    /// told to [`Host::report`]. The future may be dropped: the closing goes on.
    ///
    /// The caller closes its writing ends before.
    pub fn close(self) -> impl Future<Output = ()> + Send {
        // It has ended, then, and is being read out.
        let _ = self.close.send(());
        async move {
            // Never sent: its sender is dropped when all is done.
            let _ = self.closed.await;
        }
    }
}

/// Awaits the byte, or what else counts.
async fn wait_until_ready(fd: OwnedFd, handshake: Handshake) -> Result<()> {
    let what = || "wait until it is ready".to_string();
    let fd = watch(fd, Interest::READABLE).context(what)?;
    let mut byte = [0u8; 1];
    let read = |fd: &OwnedFd| Ok(rustix::io::retry_on_intr(|| rustix::io::read(fd, &mut byte[..]))?);
    match (fd.async_io(Interest::READABLE, read).await.context(what)?, handshake) {
        (0, Handshake::Byte) => {
            Err(Error::precondition("it has closed descriptor 5 without writing the byte that says it is ready"))
        }
        _ => Ok(()),
    }
}

/// Kills and reaps a binary that is not to be; returns all that went wrong.
async fn undo(process: Process, why: Error, bound: Duration) -> Error {
    let kind = why.kind();
    let mut errors = vec![why];
    let mut exit = process.ended();
    if exit.is_none() {
        errors.extend(process.signal(Signal::KILL).err());
        exit = tokio::time::timeout(bound, process.wait()).await.ok();
    }
    match exit {
        None => errors.push(Error::deadline("it is still there after SIGKILL")),
        Some(status) if status == ExitStatus::Signal(Signal::KILL.number()) => {}
        // It was on its way out already; this says why.
        Some(status) => errors.push(Error::precondition(describe(status))),
    }
    match errors.len() {
        1 => errors.remove(0),
        _ => {
            let all: Vec<String> = errors.iter().map(ToString::to_string).collect();
            Error::new(kind, all.join("; "))
        }
    }
}

fn describe(status: ExitStatus) -> String {
    match status {
        ExitStatus::Signal(n) => format!("it was ended by signal {n}"),
        other => format!("it exited with {}", other.code()),
    }
}

/// The one who looks after a running binary.
struct Care {
    process: Process,
    what: String,
    report: Arc<dyn Fn(Error) + Send + Sync>,
    bounds: Bounds,
    /// Dropped at the end.
    closed: oneshot::Sender<()>,
}

impl Care {
    async fn run(self, ends: Ends, mut closing: oneshot::Receiver<()>) {
        let status = tokio::select! {
            biased;
            status = self.process.wait() => status,
            // Also where the logger was dropped.
            _ = &mut closing => {
                drop(ends);
                return self.finish().await;
            }
        };
        if ends.iter().all(has_ended) {
            return self.tell(nonzero(status));
        }
        let text = format!("{}; what is written from now on is discarded", describe(status));
        self.tell(vec![Error::precondition(text)]);
        let Self { process, closed: _closed, .. } = self;
        drop(process);
        let [stdout, stderr] = ends;
        tokio::select! {
            () = async { tokio::join!(discard(stdout), discard(stderr)); } => {}
            _ = &mut closing => {}
        }
    }

    fn tell(&self, errors: Vec<Error>) {
        if let Err(e) = Error::join(&self.what, errors) {
            (self.report)(e);
        }
    }

    /// The ends are closed: waits, terminates, kills.
    async fn finish(self) {
        let signal = |s| self.process.signal(s);
        let (errors, reaped) = finish(&self.process, self.bounds, signal).await;
        self.tell(errors);
        let Self { process, closed, .. } = self;
        drop(closed);
        if !reaped {
            process.wait().await;
        }
    }
}

/// Returns what there is to report, and whether the process has been reaped.
async fn finish(process: &Process, bounds: Bounds, signal: impl Fn(Signal) -> Result<()>) -> (Vec<Error>, bool) {
    if let Ok(status) = tokio::time::timeout(bounds.end, process.wait()).await {
        return (nonzero(status), true);
    }
    let mut errors = Vec::new();
    match signal(Signal::TERM) {
        Ok(()) => {
            if let Ok(status) = tokio::time::timeout(bounds.terminate, process.wait()).await {
                let text = format!("it did not end with its input; after SIGTERM {}", describe(status));
                // That it had to be asked is no fault if it then left in order.
                let orderly = status == ExitStatus::Code(0) || status == ExitStatus::Signal(Signal::TERM.number());
                return (if orderly { Vec::new() } else { vec![Error::precondition(text)] }, true);
            }
            let text = format!("it did not end within {} s of SIGTERM and is killed", bounds.terminate.as_secs_f32());
            errors.push(Error::deadline(text));
        }
        // It has ended at this moment.
        Err(e) if e.is_not_found() => {}
        Err(e) => errors.push(e),
    }
    match signal(Signal::KILL) {
        Err(e) if !e.is_not_found() => errors.push(e),
        _ => {}
    }
    let reaped = tokio::time::timeout(bounds.kill, process.wait()).await.is_ok();
    if !reaped {
        errors.push(Error::deadline(format!("process {} is still there after SIGKILL", process.pid())));
    }
    (errors, reaped)
}

fn nonzero(status: ExitStatus) -> Vec<Error> {
    if status == ExitStatus::Code(0) { Vec::new() } else { vec![Error::precondition(describe(status))] }
}

/// Whether nobody writes any more.
fn has_ended(end: &OwnedFd) -> bool {
    let mut fds = [PollFd::new(end, PollFlags::IN)];
    let now = rustix::event::Timespec { tv_sec: 0, tv_nsec: 0 };
    rustix::event::poll(&mut fds, Some(&now)).is_ok() && fds[0].revents().contains(PollFlags::HUP)
}

/// Empties a stream whose reader has died, until its end. The descriptor becomes
/// non-blocking only now: it shares that with the reader's.
async fn discard(end: OwnedFd) {
    let _ = collect(end, &mut Capped::new(0)).await;
}
