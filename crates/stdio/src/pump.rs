//! Bytes from one descriptor to another on the asynchronous side: terminals and
//! FIFOs. They stay in the kernel where it can splice them. A slow reader holds
//! up its own pump and nothing else.

use crate::watch::watch;
use rustix::io::Errno;
use rustix::pipe::{SpliceFlags, splice};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use types::{Result, ResultExt};

const CHUNK: usize = 64 << 10;
const BUFFER: usize = 8 << 10;

/// Two descriptors about to be joined; both are made non-blocking.
#[derive(Debug)]
pub struct Pump {
    from: AsyncFd<OwnedFd>,
    to: AsyncFd<OwnedFd>,
}

impl Pump {
    /// Joins `from` to `to`.
    ///
    /// # Errors
    /// Where a descriptor can't be watched (a plain file can't).
    pub fn new(from: OwnedFd, to: OwnedFd) -> Result<Self> {
        Ok(Self {
            from: watch(from, Interest::READABLE).context(|| "watch the source of a stream".into())?,
            to: watch(to, Interest::WRITABLE).context(|| "watch the target of a stream".into())?,
        })
    }

    /// Copies until the source ends or the target is gone; returns how many
    /// bytes went through. Both ends are closed when the future is dropped.
    pub async fn run(self) -> u64 {
        let mut total = 0;
        match self.splice_all(&mut total).await {
            Ok(()) => total,
            // One of them is a terminal or a file that can't be spliced.
            Err(Errno::INVAL) => {
                let _ = self.copy_all(&mut total).await;
                total
            }
            Err(_) => total,
        }
    }

    async fn splice_all(&self, total: &mut u64) -> Result<(), Errno> {
        loop {
            let flags = SpliceFlags::NONBLOCK | SpliceFlags::MOVE;
            match splice(self.from.get_ref(), None, self.to.get_ref(), None, CHUNK, flags) {
                Ok(0) | Err(Errno::IO) => return Ok(()),
                Ok(n) => {
                    *total += n as u64;
                    tokio::task::coop::consume_budget().await;
                }
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => self.wait_for_either().await?,
                Err(e) => return Err(e),
            }
        }
    }

    /// After EAGAIN nobody says which side it was: wait for the source, then for
    /// the target.
    async fn wait_for_either(&self) -> Result<(), Errno> {
        let readable = poll(self.from.get_ref(), rustix::event::PollFlags::IN);
        if readable {
            self.to.writable().await.map_err(|_| Errno::IO)?.clear_ready();
            // The edge may have come between the splice and the clearing.
            if !poll(self.to.get_ref(), rustix::event::PollFlags::OUT) {
                let _ = self.to.writable().await.map_err(|_| Errno::IO)?;
            }
        } else {
            self.from.readable().await.map_err(|_| Errno::IO)?.clear_ready();
            if !poll(self.from.get_ref(), rustix::event::PollFlags::IN) {
                let _ = self.from.readable().await.map_err(|_| Errno::IO)?;
            }
        }
        Ok(())
    }

    async fn copy_all(&self, total: &mut u64) -> io::Result<()> {
        let mut buffer = vec![0u8; BUFFER];
        loop {
            let n = self
                .from
                .async_io(Interest::READABLE, |fd| {
                    Ok(rustix::io::retry_on_intr(|| rustix::io::read(fd, &mut *buffer))?)
                })
                .await?;
            if n == 0 {
                return Ok(());
            }
            let mut rest = &buffer[..n];
            while !rest.is_empty() {
                let w = self
                    .to
                    .async_io(Interest::WRITABLE, |fd| Ok(rustix::io::retry_on_intr(|| rustix::io::write(fd, rest))?))
                    .await?;
                rest = &rest[w..];
                *total += w as u64;
            }
        }
    }
}

/// Whether a descriptor is ready now; an end or an error counts as ready.
fn poll(fd: impl AsFd, what: rustix::event::PollFlags) -> bool {
    let mut fds = [rustix::event::PollFd::new(&fd, what)];
    let now = rustix::event::Timespec { tv_sec: 0, tv_nsec: 0 };
    matches!(rustix::event::poll(&mut fds, Some(&now)), Ok(n) if n > 0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::File;
    use std::io::{Read, Write};

    #[tokio::test]
    async fn a_slow_reader_gets_every_byte() {
        let (r1, w1) = crate::fifo::pipe().unwrap();
        let (r2, w2) = crate::fifo::pipe().unwrap();
        let writer = std::thread::spawn(move || {
            let mut w = File::from(w1);
            for i in 0..4000u32 {
                w.write_all(&[i.to_le_bytes(); 64].concat()).unwrap();
            }
        });
        let reader = std::thread::spawn(move || {
            let (mut r, mut all) = (File::from(r2), Vec::new());
            std::thread::sleep(std::time::Duration::from_millis(100));
            r.read_to_end(&mut all).unwrap();
            all
        });
        let n = Pump::new(r1, w2).unwrap().run().await;
        writer.join().unwrap();
        let all = reader.join().unwrap();
        assert_eq!(n, 4000 * 256);
        assert!(all.chunks(256).enumerate().all(|(i, c)| c == [(i as u32).to_le_bytes(); 64].concat()));
    }

    #[tokio::test]
    async fn a_target_that_is_gone_ends_the_pump() {
        let (r1, w1) = crate::fifo::pipe().unwrap();
        let (r2, w2) = crate::fifo::pipe().unwrap();
        drop(r2);
        File::from(w1).write_all(b"x").unwrap();
        assert_eq!(Pump::new(r1, w2).unwrap().run().await, 0);
    }
}
