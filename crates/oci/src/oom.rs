//! The kernel's word that the OOM killer struck in a container's cgroup: an
//! eventfd on v1, inotify on v2. Watched from create on; nothing polls.
//!
//! No reactor is chosen here: the shim waits for the descriptor with tokio, the
//! monitor with its own epoll.

use crate::cgroup::Cgroup;
use rustix::event::{EventfdFlags, eventfd};
use rustix::fs::inotify;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::time::Duration;
use types::{Error, Result, ResultExt};

/// On v1 the eventfd speaks before the killer has counted its victim: so often
/// the count is looked at after each word, [`RECHECK`] apart.
pub const RECHECKS: u32 = 5;
/// See [`RECHECKS`].
pub const RECHECK: Duration = Duration::from_millis(20);

/// A descriptor that becomes readable when the killer may have struck, or when
/// the cgroup is removed; non-blocking.
///
/// # Errors
/// Where the container has no memory cgroup of its own.
pub fn descriptor(cgroup: &Cgroup) -> Result<OwnedFd> {
    if let Some(dir) = cgroup.v2() {
        let fd = inotify::init(inotify::CreateFlags::CLOEXEC | inotify::CreateFlags::NONBLOCK)
            .context(|| "make an inotify instance".into())?;
        let file = dir.join("memory.events");
        inotify::add_watch(&fd, &file, inotify::WatchFlags::MODIFY).context(|| format!("watch {}", file.display()))?;
        return Ok(fd);
    }
    let Some(dir) = cgroup.v1("memory") else {
        return Err(Error::not_found("the container has no memory cgroup of its own"));
    };
    let fd = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).context(|| "make an eventfd".into())?;
    let file = dir.join("memory.oom_control");
    let control = std::fs::File::open(&file).context(|| format!("open {}", file.display()))?;
    let order = format!("{} {}", fd.as_raw_fd(), control.as_raw_fd());
    let control_file = dir.join("cgroup.event_control");
    std::fs::write(&control_file, order).context(|| format!("write {}", control_file.display()))?;
    Ok(fd)
}

/// Takes what made the descriptor readable; only that it came counts.
pub fn acknowledge(fd: impl AsFd) {
    // An eventfd's counter or inotify's events.
    let mut buffer = [0u8; 1024];
    while rustix::io::read(&fd, &mut buffer).is_ok() {}
}

/// The killer's count, compared with the last look.
#[derive(Debug)]
pub struct Kills {
    cgroup: Cgroup,
    seen: u64,
}

impl Kills {
    /// Begins with what has been counted until now.
    pub fn from_now(cgroup: &Cgroup) -> Self {
        Self { cgroup: cgroup.clone(), seen: cgroup.oom_kills() }
    }

    /// Begins with none: what was killed before the first look counts too. For a
    /// cgroup that is as new as its container.
    pub fn from_none(cgroup: &Cgroup) -> Self {
        Self { cgroup: cgroup.clone(), seen: 0 }
    }

    /// Whether it has struck since the last look.
    pub fn struck(&mut self) -> bool {
        let now = self.cgroup.oom_kills();
        let more = now > self.seen;
        self.seen = self.seen.max(now);
        more
    }

    /// The highest count that was seen.
    pub fn seen(&self) -> u64 {
        self.seen
    }

    /// Whether the cgroup has been removed.
    pub fn gone(&self) -> bool {
        self.cgroup.v2().or_else(|| self.cgroup.v1("memory")).is_none_or(|dir| !dir.exists())
    }
}
