//! Waiting for the OOM killer's next strike, in tokio.

use oci::cgroup::Cgroup;
use oci::oom::{self, Kills};
use std::os::fd::OwnedFd;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use types::{Result, ResultExt};

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

    /// Waits for the next strike. `None`: the cgroup is gone.
    pub async fn next(&mut self) -> Option<()> {
        loop {
            {
                let mut ready = self.fd.readable().await.ok()?;
                oom::acknowledge(self.fd.get_ref());
                ready.clear_ready();
            }
            for _ in 0..oom::RECHECKS {
                if self.kills.struck() {
                    return Some(());
                }
                tokio::time::sleep(oom::RECHECK).await;
            }
            // The removal of the cgroup wakes us as well.
            if self.kills.gone() {
                return None;
            }
        }
    }
}
