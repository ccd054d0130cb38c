//! Descriptors in tokio's reactor.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// Makes a descriptor non-blocking and watches it.
///
/// # Errors
/// Where it can't be polled (a plain file can't), or outside a tokio runtime.
#[expect(deprecated, reason = "its successor is unsafe; an OwnedFd never exchanges its descriptor")]
pub fn watch(fd: OwnedFd, interest: Interest) -> io::Result<AsyncFd<OwnedFd>> {
    set_nonblocking(&fd)?;
    AsyncFd::with_interest(fd, interest)
}

pub(crate) fn set_nonblocking(fd: impl AsFd) -> io::Result<()> {
    let flags = rustix::fs::fcntl_getfl(&fd)?;
    Ok(rustix::fs::fcntl_setfl(&fd, flags | rustix::fs::OFlags::NONBLOCK)?)
}
