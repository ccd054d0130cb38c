//! Waiting for the OOM killer's next strike, in tokio.

use oci::cgroup::Cgroup;
use oci::oom::{self, Kills};
use std::os::fd::OwnedFd;
use std::time::Duration;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use types::{Result, ResultExt};

/// The killer has counted its victim only some time after it has spoken: so long, in
/// milliseconds, until the next look. The first are short, since systemd removes a
/// scope's cgroup, and the count with it, as soon as the victim has gone.
const PAUSES: [u64; 7] = [1, 2, 5, 10, 20, 40, 40];

/// What a watch has seen: the count of strikes, and that the cgroup is gone.
#[derive(Debug, Clone, Copy, Default)]
pub struct Seen {
    pub kills: u64,
    pub gone: bool,
}

/// A watch on one container's cgroup.
pub struct Watch {
    fd: AsyncFd<OwnedFd>,
    kills: Kills,
}

impl Watch {
    /// Begins to watch.
    ///
    /// # Errors
    /// Where the container has no memory cgroup of its own.
    pub fn new(cgroup: &Cgroup) -> Result<Self> {
        let fd =
            stdio::watch(oom::descriptor(cgroup)?, Interest::READABLE).context(|| "watch for the OOM killer".into())?;
        Ok(Self { fd, kills: Kills::from_now(cgroup) })
    }

    /// Waits for the next strike; returns how many there have been. `None`: the cgroup
    /// is gone.
    pub async fn next(&mut self) -> Option<u64> {
        loop {
            {
                let mut ready = self.fd.readable().await.ok()?;
                oom::acknowledge(self.fd.get_ref());
                ready.clear_ready();
            }
            for pause in PAUSES {
                if self.kills.struck() {
                    return Some(self.kills.seen());
                }
                // What it counted goes with it.
                if self.kills.gone() {
                    return None;
                }
                tokio::time::sleep(Duration::from_millis(pause)).await;
            }
            // The removal of the cgroup wakes us as well.
            if self.kills.gone() {
                return None;
            }
        }
    }
}
