//! The kernel's word that the OOM killer struck: an eventfd on v1, inotify on
//! v2. Watched from create on; nothing polls.

use oci::cgroup::Cgroup;
use rustix::event::{EventfdFlags, eventfd};
use rustix::fs::inotify;
use std::os::fd::{AsRawFd, OwnedFd};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use types::{Error, Result, ResultExt};

/// A watch on one container's cgroup.
pub struct Watch {
    fd: AsyncFd<OwnedFd>,
    cgroup: Cgroup,
    seen: u64,
}

/// On v1 the eventfd speaks before the killer has counted its victim.
const RECHECKS: u32 = 5;
const RECHECK: std::time::Duration = std::time::Duration::from_millis(20);

impl Watch {
    /// Begins to watch.
    ///
    /// # Errors
    /// Where the container has no memory cgroup of its own.
    pub fn new(cgroup: &Cgroup) -> Result<Self> {
        let fd = if let Some(dir) = cgroup.v2() {
            let fd = inotify::init(inotify::CreateFlags::CLOEXEC | inotify::CreateFlags::NONBLOCK)
                .context(|| "make an inotify instance".into())?;
            let file = dir.join("memory.events");
            inotify::add_watch(&fd, &file, inotify::WatchFlags::MODIFY)
                .context(|| format!("watch {}", file.display()))?;
            fd
        } else if let Some(dir) = cgroup.v1("memory") {
            let fd = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).context(|| "make an eventfd".into())?;
            let file = dir.join("memory.oom_control");
            let control = std::fs::File::open(&file).context(|| format!("open {}", file.display()))?;
            let order = format!("{} {}", fd.as_raw_fd(), control.as_raw_fd());
            let control_file = dir.join("cgroup.event_control");
            std::fs::write(&control_file, order).context(|| format!("write {}", control_file.display()))?;
            fd
        } else {
            return Err(Error::not_found("the container has no memory cgroup of its own"));
        };
        let fd = stdio::watch(fd, Interest::READABLE).context(|| "watch for the OOM killer".into())?;
        Ok(Self { fd, cgroup: cgroup.clone(), seen: cgroup.oom_kills() })
    }

    /// Waits for the next strike. `None`: the cgroup is gone.
    pub async fn next(&mut self) -> Option<()> {
        loop {
            {
                let mut ready = self.fd.readable().await.ok()?;
                let mut buffer = [0u8; 1024];
                // An eventfd's counter or inotify's events: only that they came counts.
                while rustix::io::read(self.fd.get_ref(), &mut buffer).is_ok() {}
                ready.clear_ready();
            }
            for _ in 0..RECHECKS {
                let now = self.cgroup.oom_kills();
                if now > self.seen {
                    self.seen = now;
                    return Some(());
                }
                tokio::time::sleep(RECHECK).await;
            }
            // The removal of the cgroup wakes us as well.
            let dir = self.cgroup.v2().or_else(|| self.cgroup.v1("memory"))?;
            if !dir.exists() {
                return None;
            }
        }
    }
}
