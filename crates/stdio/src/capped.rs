//! The first N bytes of a stream: memory stays flat however much is written,
//! and the writer is never held up (CVE-2022-1708, CVE-2022-31030).

use crate::watch::watch;
use rustix::io::Errno;
use rustix::pipe::{SpliceFlags, splice};
use std::os::fd::OwnedFd;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use types::{Result, ResultExt};

/// What was kept of a stream.
#[derive(Debug, Default)]
pub struct Capped {
    kept: Vec<u8>,
    limit: usize,
    discarded: u64,
}

impl Capped {
    /// Keeps the first `limit` bytes; memory is taken as they come.
    pub fn new(limit: usize) -> Self {
        Self { kept: Vec::new(), limit, discarded: 0 }
    }

    /// Takes what still fits and counts the rest.
    pub fn push(&mut self, bytes: &[u8]) {
        let fits = bytes.len().min(self.limit - self.kept.len());
        self.kept.extend_from_slice(&bytes[..fits]);
        self.discarded += (bytes.len() - fits) as u64;
    }

    /// The bytes that were kept.
    pub fn kept(&self) -> &[u8] {
        &self.kept
    }

    /// How many bytes were thrown away.
    pub fn discarded(&self) -> u64 {
        self.discarded
    }

    /// The bytes that were kept.
    pub fn into_kept(self) -> Vec<u8> {
        self.kept
    }

    fn room(&self) -> usize {
        self.limit - self.kept.len()
    }
}

/// Reads a pipe or FIFO to its end into `sink`. May be cancelled at any time;
/// what was read until then is in the sink.
///
/// A FIFO that no writer has opened yet is waited for.
///
/// # Errors
/// Where the descriptor can't be watched or read.
pub async fn collect(fd: OwnedFd, sink: &mut Capped) -> Result<()> {
    let fd = watch(fd, Interest::READABLE).context(|| "watch a stream to collect".into())?;
    let mut null: Option<OwnedFd> = None;
    loop {
        // Never read before epoll has spoken: a FIFO without a writer would
        // look like one that has ended.
        let mut ready = fd.readable().await.context(|| "wait for a stream".into())?;
        match read_some(&fd, sink, &mut null) {
            Ok(0) | Err(Errno::IO) => return Ok(()),
            Ok(_) => tokio::task::coop::consume_budget().await,
            Err(Errno::AGAIN) => ready.clear_ready(),
            Err(Errno::INTR) => {}
            Err(e) => return Err(e).context(|| "read a stream".into()),
        }
    }
}

fn read_some(fd: &AsyncFd<OwnedFd>, sink: &mut Capped, null: &mut Option<OwnedFd>) -> Result<usize, Errno> {
    let room = sink.room();
    if room > 0 {
        // Grows by doubling, but never beyond the limit.
        if sink.kept.capacity() == sink.kept.len() {
            sink.kept.reserve_exact(sink.kept.len().clamp(4096, 4 << 20).min(room));
        }
        let spare = rustix::buffer::spare_capacity(&mut sink.kept);
        return rustix::io::read(fd.get_ref(), spare);
    }
    let null = match null {
        Some(n) => n,
        None => {
            let flags = rustix::fs::OFlags::WRONLY | rustix::fs::OFlags::CLOEXEC;
            null.insert(rustix::fs::open("/dev/null", flags, rustix::fs::Mode::empty())?)
        }
    };
    let n = splice(fd.get_ref(), None, null, None, 1 << 20, SpliceFlags::NONBLOCK)?;
    sink.discarded += n as u64;
    Ok(n)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::File;
    use std::io::Write;

    #[tokio::test]
    async fn the_head_is_kept_and_the_writer_never_blocked() {
        let (r, w) = crate::fifo::pipe().unwrap();
        let writer = std::thread::spawn(move || {
            let mut w = File::from(w);
            for _ in 0..64 {
                w.write_all(&vec![b'x'; 1 << 20]).unwrap();
            }
        });
        let mut sink = Capped::new(1 << 20);
        collect(r, &mut sink).await.unwrap();
        writer.join().unwrap();
        assert_eq!(sink.kept().len(), 1 << 20);
        assert_eq!(sink.discarded(), 63 << 20);
        assert!(sink.kept.capacity() <= 1 << 20);
    }

    #[tokio::test]
    async fn a_fifo_without_a_writer_is_waited_for() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("f");
        crate::fifo::make(&path).unwrap();
        let reader = crate::fifo::open_reader(&path).unwrap();
        let writer = std::thread::spawn(move || {
            std::thread::sleep(std::time::Duration::from_millis(50));
            std::fs::write(path, "late").unwrap();
        });
        let mut sink = Capped::new(100);
        collect(reader, &mut sink).await.unwrap();
        writer.join().unwrap();
        assert_eq!(sink.into_kept(), b"late");
    }

    #[test]
    fn pushing_respects_the_limit() {
        let mut s = Capped::new(3);
        s.push(b"ab");
        s.push(b"cd");
        assert_eq!((s.kept(), s.discarded()), (&b"abc"[..], 1));
    }
}
