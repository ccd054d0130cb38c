//! Hearing of changes that others make to the rule set.

use ::types::{Result, ResultExt};
use rustix::fd::OwnedFd;
use rustix::io::Errno;
use rustix::net::RecvFlags;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// The kernel's announcements; what they say doesn't matter, since the table is
/// looked at then.
#[derive(Debug)]
pub(super) struct Events {
    fd: AsyncFd<OwnedFd>,
}

impl Events {
    #[expect(deprecated, reason = "its successor is unsafe; an OwnedFd never exchanges its descriptor")]
    pub(super) fn open() -> Result<Self> {
        let fd = sys::netlink::nftables_events()?;
        let fd = AsyncFd::with_interest(fd, Interest::READABLE);
        Ok(Self { fd: fd.context(|| "listen to changes of nftables".into())? })
    }

    /// Waits for a change, and takes all that have come so far as one.
    pub(super) async fn next(&self) -> Result<()> {
        let what = || "listen to changes of nftables".to_owned();
        let mut ready = self.fd.readable().await.context(what)?;
        let mut rest = [0; 64];
        loop {
            match rustix::net::recv(ready.get_inner(), &mut rest, RecvFlags::DONTWAIT) {
                // More came than the socket holds: a change all the same.
                Ok(_) | Err(Errno::NOBUFS | Errno::INTR) => {}
                Err(Errno::AGAIN) => break,
                Err(e) => return Err(e).context(what),
            }
        }
        ready.clear_ready();
        Ok(())
    }
}
