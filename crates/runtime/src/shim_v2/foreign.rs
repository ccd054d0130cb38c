//! Containers of a foreign shim: it writes into FIFOs, and the daemon makes CRI
//! log lines of that.
//!
//! The FIFOs are opened for reading before Create, without waiting. The shim
//! holds both of their ends until its copy ends, so a restart of the daemon is
//! no hang-up; what to log where is kept in the bundle's io.json.

use super::Inner;
use super::pod::Pod;
use super::shim::Shim;
use super::task::Task;
use crate::api::TaskIo;
use crate::bundle::{blocking, make_fifo, write_atomic};
use oci::cgroup::Cgroup;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};
use std::time::Duration;
use stdio::{Format, Log, Stream, Writer};
use types::{ErrorKind, ExitStatus, Result, ResultExt};

/// How long an exit is held back for what belongs to it, as our own shim does.
const LAST_WORDS: Duration = Duration::from_millis(250);

/// The thread that writes foreign shims' logs; started when the first is needed.
#[derive(Default)]
pub(crate) struct Logs {
    writer: OnceLock<Writer>,
}

/// One container's log.
#[derive(Clone)]
pub(crate) struct Logger {
    log: Arc<Log>,
}

/// The FIFOs of a container's stdout and stderr.
pub(crate) fn fifos(bundle: &Path) -> (PathBuf, PathBuf) {
    (bundle.join("out"), bundle.join("err"))
}

impl Logs {
    fn writer(&self) -> Result<&Writer> {
        if let Some(w) = self.writer.get() {
            return Ok(w);
        }
        // Two at once make two threads, one of which ends at once.
        let fresh = Writer::start()?;
        Ok(self.writer.get_or_init(|| fresh))
    }

    /// Makes the FIFOs and logs what comes through them.
    pub(crate) async fn start(&self, bundle: &Path, io: &TaskIo) -> Result<Option<Logger>> {
        let Some(path) = io.log_path.clone() else { return Ok(None) };
        let text = serde_json::to_vec(io).context_kind(ErrorKind::Internal, || "encode io.json".into())?;
        write_atomic(&bundle.join("io.json"), &text)?;
        let (out, err) = fifos(bundle);
        make_fifo(&out)?;
        let mut sources: Vec<(Stream, OwnedFd)> = vec![(Stream::Stdout, stdio::fifo::open_reader(&out)?)];
        if !io.terminal {
            make_fifo(&err)?;
            sources.push((Stream::Stderr, stdio::fifo::open_reader(&err)?));
        }
        let format = Format::Cri(usize::try_from(io.log_limit).unwrap_or(stdio::DEFAULT_LIMIT));
        let log = self.writer()?.open(path, format, sources).await?;
        Ok(Some(Logger { log: Arc::new(log) }))
    }

    /// Goes on with the log of a container that an earlier daemon made.
    pub(crate) async fn resume(&self, bundle: &Path) -> Result<Option<Logger>> {
        let path = bundle.join("io.json");
        let text = match std::fs::read(&path) {
            Ok(t) => t,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(e) => return Err(e).context(|| format!("read {}", path.display())),
        };
        let io: TaskIo = serde_json::from_slice(&text)
            .context_kind(ErrorKind::Internal, || format!("{} can't be read", path.display()))?;
        self.start(bundle, &io).await
    }
}

impl Logger {
    /// Opens the log file anew.
    pub(crate) async fn reopen(self) -> Result<()> {
        self.log.reopen().await
    }

    /// Waits until all is written, but no longer than `bound`.
    pub(crate) async fn finish(self, bound: Duration) {
        if tokio::time::timeout(bound, self.log.ended()).await.is_err() {
            tracing::debug!("a foreign shim still holds its container's log");
        }
    }
}

impl Inner {
    /// What may still be on its way when a foreign shim tells a container's end: the rest
    /// of its log, for whoever reads that after the exit, and whether the OOM killer
    /// struck, which the shim tells on a connection of its own.
    pub(super) async fn last_words(&self, pod: &Pod, shim: &Shim, task: &Task, status: ExitStatus) {
        if shim.own() {
            return;
        }
        if let Some(logger) = task.log() {
            logger.finish(LAST_WORDS).await;
        }
        let bundle = self.layout.task(&pod.id, &task.id);
        // It is there until Delete, and its count tells all.
        let look = blocking(move || {
            let cgroup = Cgroup::of_bundle(&bundle);
            Ok(cgroup.exists().then(|| cgroup.oom_kills()))
        });
        match look.await {
            Ok(Some(0)) => {}
            Ok(Some(_)) => drop(task.oom.send_replace(true)),
            // One of systemd's goes with its last process.
            _ if status == ExitStatus::Signal(9) && !task.was_signalled() => {
                let _ = tokio::time::timeout(LAST_WORDS, task.oom.subscribe().wait_for(|oom| *oom)).await;
            }
            _ => {}
        }
    }
}
