//! What a monitor is told while its container runs: by the `ctl` FIFO and the
//! attach socket.

use super::Inner;
use super::task::Task;
use crate::bundle::blocking;
use rustix::fs::inotify::{self, CreateFlags, WatchFlags};
use rustix::fs::{Mode, OFlags};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Duration;
use tokio::io::Interest;
use types::{Error, Result, ResultExt};

/// How long a monitor may take to open its log anew.
const REOPEN_BOUND: Duration = Duration::from_secs(5);
/// Between two looks at what the monitor has open, where nothing tells of it.
const LOOK_AGAIN: Duration = Duration::from_millis(100);
/// The original takes nothing beyond.
const LARGEST: u32 = 1000;

/// Writes one line to the `ctl` FIFO.
fn tell(bundle: &Path, line: &str) -> Result<()> {
    let path = bundle.join("ctl");
    let what = || format!("write {:?} to {}", line.trim(), path.display());
    // Not waiting: without a reader there is no monitor.
    let opened = rustix::fs::open(&path, OFlags::WRONLY | OFlags::NONBLOCK | OFlags::CLOEXEC, Mode::empty());
    if matches!(opened, Err(rustix::io::Errno::NXIO)) {
        return Err(Error::precondition(format!("{}: its monitor is gone", what())));
    }
    let fd = opened.context(what)?;
    // Shorter than PIPE_BUF: written as a whole or not at all.
    rustix::io::write(&fd, line.as_bytes()).context(what).map(drop)
}

/// A file as such, whatever its name.
fn node(path: &Path) -> Option<(u64, u64)> {
    path.metadata().ok().map(|m| (m.dev(), m.ino()))
}

/// Whether a process has the file open.
fn holds(pid: u32, wanted: (u64, u64)) -> bool {
    let fds = std::fs::read_dir(format!("/proc/{pid}/fd")).into_iter().flatten().flatten();
    fds.into_iter().any(|fd| node(&fd.path()) == Some(wanted))
}

impl Inner {
    fn running(&self, pod: &str, id: &str, what: &str) -> Result<(std::sync::Arc<Task>, PathBuf)> {
        let task = self.task(pod, id)?;
        if task.exit().is_some() || task.live().is_none() {
            return Err(Error::precondition(format!("{what} container {id}: it does not run")));
        }
        Ok((task, self.bundle(pod, id)))
    }

    pub(super) async fn resize_task(&self, pod: &str, id: &str, width: u32, height: u32) -> Result<()> {
        let (task, dir) = self.running(pod, id, "resize the terminal of")?;
        if !task.record.io.terminal {
            return Err(Error::precondition(format!("container {id} has no terminal")));
        }
        let line = format!("1 {} {}\n", height.min(LARGEST), width.min(LARGEST));
        blocking(move || tell(&dir, &line)).await
    }

    pub(super) async fn close_stdin(&self, pod: &str, id: &str) -> Result<()> {
        let (task, _) = self.running(pod, id, "close the stdin of")?;
        match task.live().and_then(|l| l.stdin.as_ref()) {
            Some(feed) => {
                feed.close();
                Ok(())
            }
            None => Err(Error::precondition(format!("container {id} has no stdin"))),
        }
    }

    /// Lets the monitor open its log anew, and waits until it has.
    ///
    /// The original begins a new file in any case and puts it over whatever has the
    /// log's name. So it is told only where that name is not the file's that it
    /// writes to: what somebody has not moved away is not lost.
    pub(super) async fn reopen_log(&self, pod: &str, id: &str) -> Result<()> {
        let (task, dir) = self.running(pod, id, "reopen the log of")?;
        let Some(log) = task.record.io.log_path.clone() else { return Ok(()) };
        let Some(monitor) = task.monitor().filter(|m| !m.has_ended()) else {
            return Err(Error::precondition(format!("reopen the log of container {id}: its monitor is gone")));
        };
        let pid = monitor.pid();
        let current = {
            let log = log.clone();
            move || node(&log).is_some_and(|n| holds(pid, n))
        };
        if current() {
            return Ok(());
        }
        let parent = log.parent().unwrap_or(Path::new("/")).to_path_buf();
        let fd = inotify::init(CreateFlags::CLOEXEC | CreateFlags::NONBLOCK)
            .context(|| "make an inotify instance".into())?;
        inotify::add_watch(&fd, &parent, WatchFlags::MOVED_TO | WatchFlags::CREATE)
            .context(|| format!("watch {}", parent.display()))?;
        let fd = stdio::watch(fd, Interest::READABLE).context(|| format!("watch {}", parent.display()))?;
        blocking(move || tell(&dir, "2 0 0\n")).await?;
        let opened = async {
            while !current() {
                // The descriptor may follow the event: looked at again in any case.
                let Ok(woken) = tokio::time::timeout(LOOK_AGAIN, fd.readable()).await else { continue };
                let Ok(mut ready) = woken else { return };
                let mut events = [0u8; 4096];
                while rustix::io::read(fd.get_ref(), &mut events).is_ok() {}
                ready.clear_ready();
            }
        };
        tokio::select! {
            biased;
            done = tokio::time::timeout(REOPEN_BOUND, opened) => done.map_err(|_| {
                Error::deadline(format!(
                    "reopen the log of container {id}: its monitor has not done it within {REOPEN_BOUND:?}"
                ))
                .hint(format!("can it write to {}?", parent.display()))
            }),
            // The container has ended meanwhile, and the monitor hears nobody any more.
            () = monitor.ended() => {
                Err(Error::precondition(format!("reopen the log of container {id}: its monitor has ended")))
            }
        }
    }
}
