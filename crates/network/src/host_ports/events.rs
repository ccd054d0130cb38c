//! Hearing of what others take out of our table.

use crate::nft;
use ::types::{Result, ResultExt};
use rustix::fd::OwnedFd;
use rustix::io::Errno;
use rustix::net::RecvFlags;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// The kernel makes an announcement no longer.
const LONGEST: usize = 64 * 1024;

/// What may have been taken out of the table.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Change {
    /// Something, through the sockets with these ports.
    By(Vec<u32>),
    /// Announcements were lost.
    Unknown,
}

/// The kernel's announcements.
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

    /// Waits until something is taken out of `table`, and takes all that has been
    /// announced so far as one.
    pub(super) async fn next(&self, table: &str) -> Result<Change> {
        let what = || "listen to changes of nftables".to_owned();
        let mut announced = vec![0; LONGEST];
        loop {
            let mut ready = self.fd.readable().await.context(what)?;
            let (mut by, mut lost) = (Vec::new(), false);
            loop {
                match rustix::net::recv(ready.get_inner(), &mut announced[..], RecvFlags::DONTWAIT) {
                    Ok((_, length)) => {
                        by.extend(nft::who_took_from(table, announced.get(..length).unwrap_or_default()))
                    }
                    Err(Errno::INTR) => {}
                    // More came than the socket holds.
                    Err(Errno::NOBUFS) => lost = true,
                    Err(Errno::AGAIN) => break,
                    Err(e) => return Err(e).context(what),
                }
            }
            ready.clear_ready();
            if lost {
                return Ok(Change::Unknown);
            }
            if !by.is_empty() {
                return Ok(Change::By(by));
            }
        }
    }
}
