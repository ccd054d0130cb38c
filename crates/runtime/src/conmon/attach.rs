//! The attach socket of a container (behaviours.md section 2): SOCK_SEQPACKET at
//! `<bundle>/attach`.
//!
//! Out: packets of one byte (2 stdout, 3 stderr) and up to 8192 bytes. In: raw stdin.
//! The monitor writes to each client in turn and waits for it: who connects reads,
//! or says that it won't.

use rustix::io::Errno;
use rustix::net::{
    AddressFamily, RecvFlags, SendFlags, Shutdown, SocketAddrUnix, SocketFlags, SocketType, connect, recv, send,
    shutdown, socket_with,
};
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::Path;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use types::{Result, ResultExt};

/// The most that one packet of stdin carries; the original reads up to 32 KiB.
pub(crate) const PACKET: usize = 8192;

/// A client of a container's attach socket.
pub(crate) struct Attach {
    fd: AsyncFd<OwnedFd>,
}

impl Attach {
    /// Connects to the monitor of a bundle, however long the bundle's path is.
    ///
    /// # Errors
    /// `NotFound` or a refused connection where no monitor listens.
    pub(crate) fn connect(bundle: &Path) -> Result<Self> {
        let what = || format!("attach to {}", bundle.join("attach").display());
        let flags = rustix::fs::OFlags::PATH | rustix::fs::OFlags::DIRECTORY | rustix::fs::OFlags::CLOEXEC;
        let dir = rustix::fs::open(bundle, flags, rustix::fs::Mode::empty()).context(what)?;
        let short = format!("/proc/self/fd/{}/attach", dir.as_raw_fd());
        let address = SocketAddrUnix::new(short).context(what)?;
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let fd = socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None).context(what)?;
        connect(&fd, &address).context(what)?;
        let fd = stdio::watch(fd, Interest::READABLE | Interest::WRITABLE).context(what)?;
        Ok(Self { fd })
    }

    /// Tells the monitor that this client reads no output.
    pub(crate) fn read_nothing(&self) {
        let _ = shutdown(self.fd.get_ref(), Shutdown::Read);
    }

    /// Sends a packet of stdin.
    ///
    /// # Errors
    /// Where the monitor has gone.
    pub(crate) async fn send(&self, bytes: &[u8]) -> Result<()> {
        loop {
            let mut ready = self.fd.writable().await.context(|| "wait for an attach socket".into())?;
            match send(self.fd.get_ref(), bytes, SendFlags::NOSIGNAL | SendFlags::DONTWAIT) {
                Ok(_) => return Ok(()),
                Err(Errno::AGAIN) => ready.clear_ready(),
                Err(Errno::INTR) => {}
                Err(e) => return Err(e).context(|| "send stdin to a monitor".into()),
            }
        }
    }

    /// The next packet: its stream and its bytes. `None` at the end.
    ///
    /// # Errors
    /// Those of the socket.
    #[allow(dead_code, reason = "what streaming will read; used by the tests until then")]
    pub(crate) async fn receive(&self) -> Result<Option<(stdio::Stream, Vec<u8>)>> {
        let mut space = vec![0u8; PACKET + 1];
        loop {
            let mut ready = self.fd.readable().await.context(|| "wait for an attach socket".into())?;
            match recv(self.fd.get_ref(), &mut space[..], RecvFlags::DONTWAIT) {
                Ok((0, _)) => return Ok(None),
                Ok((n, _)) => {
                    let stream = match space[0] {
                        2 => stdio::Stream::Stdout,
                        3 => stdio::Stream::Stderr,
                        // None of a conmon's; not shown as somebody's output.
                        _ => continue,
                    };
                    space.truncate(n);
                    space.remove(0);
                    return Ok(Some((stream, space)));
                }
                Err(Errno::AGAIN) => ready.clear_ready(),
                Err(Errno::INTR) => {}
                Err(e) => return Err(e).context(|| "read an attach socket".into()),
            }
        }
    }

    /// The end of stdin: the monitor closes the process's, once.
    ///
    /// # Errors
    /// Where the monitor has gone.
    pub(crate) fn close(&self) -> Result<()> {
        shutdown(self.fd.get_ref(), Shutdown::Write).context(|| "end a container's stdin".into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::net::{accept, bind, listen};

    #[tokio::test]
    async fn packets_go_both_ways_and_the_end_is_seen() {
        let dir = tempfile::tempdir().unwrap();
        // Longer than a socket's path may be.
        let bundle = dir.path().join("x".repeat(120));
        std::fs::create_dir(&bundle).unwrap();
        assert!(Attach::connect(&bundle).is_err());
        let server = socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None).unwrap();
        let link = dir.path().join("l");
        std::os::unix::fs::symlink(&bundle, &link).unwrap();
        bind(&server, &SocketAddrUnix::new(link.join("attach")).unwrap()).unwrap();
        listen(&server, 1).unwrap();
        let client = Attach::connect(&bundle).unwrap();
        let theirs = accept(&server).unwrap();
        for packet in [&b"\x02out"[..], b"\x09what", b"\x03err"] {
            send(&theirs, packet, SendFlags::empty()).unwrap();
        }
        assert_eq!(client.receive().await.unwrap(), Some((stdio::Stream::Stdout, b"out".to_vec())));
        assert_eq!(client.receive().await.unwrap(), Some((stdio::Stream::Stderr, b"err".to_vec())));
        client.send(b"in").await.unwrap();
        client.close().unwrap();
        let mut got = [0u8; 8];
        assert_eq!(recv(&theirs, &mut got[..], RecvFlags::empty()).unwrap().0, 2);
        assert_eq!(recv(&theirs, &mut got[..], RecvFlags::empty()).unwrap().0, 0);
        drop(theirs);
        assert_eq!(client.receive().await.unwrap(), None);
    }
}
