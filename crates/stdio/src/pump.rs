//! Bytes from one descriptor to another on the asynchronous side: terminals and
//! FIFOs. They stay in the kernel where it can splice them. A slow reader holds
//! up its own pump and nothing else.

use crate::watch::watch;
use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::io::Errno;
use rustix::pipe::{SpliceFlags, splice};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
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
    stalled: Arc<AtomicBool>,
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
            stalled: Arc::default(),
        })
    }

    /// True while there are bytes that the target does not take.
    pub fn stalled(&self) -> Arc<AtomicBool> {
        self.stalled.clone()
    }

    fn note(&self, stalled: bool) {
        self.stalled.store(stalled, Ordering::Relaxed);
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

    /// After EAGAIN nobody says which side it was: a source that has bytes means
    /// that the target was full, or that they have come since.
    async fn wait_for_either(&self) -> Result<(), Errno> {
        let (source, target) = (self.from.get_ref(), self.to.get_ref());
        let waited = if poll(source, PollFlags::IN) {
            self.note(!poll(target, PollFlags::OUT));
            self.to.async_io(Interest::WRITABLE, |_| ready(target, PollFlags::OUT)).await
        } else {
            self.from.async_io(Interest::READABLE, |_| ready(source, PollFlags::IN)).await
        };
        self.note(false);
        waited.map_err(|_| Errno::IO)
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
            self.note(true);
            while !rest.is_empty() {
                let w = self
                    .to
                    .async_io(Interest::WRITABLE, |fd| Ok(rustix::io::retry_on_intr(|| rustix::io::write(fd, rest))?))
                    .await?;
                rest = &rest[w..];
                *total += w as u64;
            }
            self.note(false);
        }
    }
}

/// Whether a descriptor is ready now; an end or an error counts as ready.
fn poll(fd: impl AsFd, what: PollFlags) -> bool {
    let mut fds = [PollFd::new(&fd, what)];
    let now = Timespec { tv_sec: 0, tv_nsec: 0 };
    matches!(rustix::event::poll(&mut fds, Some(&now)), Ok(n) if n > 0)
}

/// For `async_io`, which forgets a descriptor's readiness only when this says no:
/// the reactor tells edges, so what is forgotten while the descriptor is ready is
/// never told again.
fn ready(fd: impl AsFd, what: PollFlags) -> io::Result<()> {
    if poll(fd, what) { Ok(()) } else { Err(io::ErrorKind::WouldBlock.into()) }
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

    /// The source is empty when splice looks and has a byte when poll does: then it
    /// is the target's turn, which is and was ready, and no edge of it will come.
    #[tokio::test]
    async fn waiting_for_what_is_ready_ends_each_time() {
        let (r1, w1) = crate::fifo::pipe().unwrap();
        let (_r2, w2) = crate::fifo::pipe().unwrap();
        File::from(w1.try_clone().unwrap()).write_all(b"x").unwrap();
        let pump = Pump::new(r1, w2).unwrap();
        for _ in 0..3 {
            let waited = tokio::time::timeout(std::time::Duration::from_secs(10), pump.wait_for_either()).await;
            waited.expect("the target is ready").unwrap();
        }
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
