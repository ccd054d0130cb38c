//! A container's stdin: from the FIFO that CRI's side writes to, to the monitor's
//! attach socket.
//!
//! The original closes the process's stdin when a client that was connected goes, so
//! the connection is made with the first byte, or for the end: a daemon that dies
//! takes no stdin away from a container that has never been written to.

use super::attach::{Attach, PACKET};
use rustix::io::Errno;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use tokio::io::Interest;
use tokio::sync::Notify;
use types::Result;

/// The copy of one container's stdin; dropped, it stops.
pub(crate) struct Feed {
    close: Arc<Notify>,
    copy: tokio::task::JoinHandle<()>,
}

impl Feed {
    pub(crate) fn start(fifo: PathBuf, bundle: PathBuf) -> Self {
        let close = Arc::new(Notify::new());
        let closing = close.clone();
        let copy = tokio::spawn(async move {
            if let Err(e) = copy(&fifo, &bundle, &closing).await {
                tracing::warn!(fifo = %fifo.display(), error = %e, "a container's stdin has ended");
            }
        });
        Self { close, copy }
    }

    /// Passes on what still is in the FIFO, and then the end.
    pub(crate) fn close(&self) {
        self.close.notify_one();
    }
}

impl Drop for Feed {
    fn drop(&mut self) {
        self.copy.abort();
    }
}

async fn copy(fifo: &Path, bundle: &Path, close: &Notify) -> Result<()> {
    let stdio::fifo::In { read, hold } = stdio::fifo::open_in(fifo)?;
    // Ours to let go: while it is open, a writer that goes is no end.
    let mut hold = Some(hold);
    let read =
        types::ResultExt::context(stdio::watch(read, Interest::READABLE), || format!("watch {}", fifo.display()))?;
    let mut attach: Option<Attach> = None;
    let connect = |attach: &mut Option<Attach>| -> Result<()> {
        if attach.is_none() {
            let fresh = Attach::connect(bundle)?;
            fresh.read_nothing();
            *attach = Some(fresh);
        }
        Ok(())
    };
    let mut space = [0u8; PACKET];
    loop {
        let mut ready = tokio::select! {
            ready = read.readable() => types::ResultExt::context(ready, || format!("wait for {}", fifo.display()))?,
            () = close.notified(), if hold.is_some() => {
                hold = None;
                continue;
            }
        };
        match rustix::io::read(read.get_ref(), &mut space) {
            Ok(0) if hold.is_none() => {
                connect(&mut attach)?;
                return attach.as_ref().map_or(Ok(()), Attach::close);
            }
            Ok(0) | Err(Errno::AGAIN) => ready.clear_ready(),
            Ok(n) => {
                connect(&mut attach)?;
                if let Some(attach) = &attach {
                    attach.send(&space[..n]).await?;
                }
            }
            Err(Errno::INTR) => {}
            Err(e) => return types::ResultExt::context(Err(e), || format!("read {}", fifo.display())),
        }
    }
}
