//! ExecSync through a monitor (behaviours.md sections 1 and 2).
//!
//! ```text
//!  dir, process.json ─► conmon -e --sync ─► {"data":PID} ─► {"data":STATUS} ─► drained
//!     our pipes, handed down by `-l passthrough`: the process writes to us, so
//!     nothing lies between, and the cap, the drain and the holders' names are ours
//!     a log file, with a monitor that can't: read back when it has told the status
//!  late, caller gone, monitor gone ─► the process, its group, the monitor killed
//! ```
//!
//! The exec's directory stands as long as anything of it may run: what a dead daemon
//! left is found by it and killed.

use super::Inner;
use super::create::runtime_error;
use super::log;
use super::monitor::{
    ExecArgs, LOG_BOUND_SINCE, Launch, PASSTHROUGH_SINCE, Started, Version, ended, runtime_log, version_of,
};
use super::process::{Process, kill_tree, parent, with_argument};
use super::sync::Line;
use super::task::{Pod, Task};
use crate::api::{ExecOutput, ExecSyncSpec};
use crate::bundle::{self, blocking, write_atomic};
use crate::holders::{self, Node};
use crate::ops::step;
use bytes::Bytes;
use std::collections::HashSet;
use std::future::pending;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;
use stdio::Capped;
use tokio::sync::{SemaphorePermit, oneshot};
use tokio::time::Instant;
use types::{Error, ErrorKind, ExitStatus, Result, ResultExt, Signal};

/// How much of a random id names an exec.
const ID_LENGTH: usize = 16;
/// How long what a dead command has written is read, where others may hold its streams.
const LAST_WORDS: Duration = Duration::from_secs(1);

/// One command, from its directory to its end.
struct Exec {
    inner: Arc<Inner>,
    pod: Arc<Pod>,
    task: Arc<Task>,
    id: String,
    dir: PathBuf,
}

/// How its run has ended.
enum Turn {
    Exited(ExitStatus),
    Late(Duration),
    Held,
    CallerGone,
    /// The monitor has gone, or said what makes no sense.
    Lost(String),
}

/// Our ends of the pipes that were handed down.
struct Pipes {
    out: OwnedFd,
    err: OwnedFd,
    nodes: HashSet<Node>,
}

/// The end of a time from now; one that lies beyond what can be told never comes.
fn after(time: Option<Duration>) -> Option<Instant> {
    time.and_then(|t| Instant::now().checked_add(t))
}

async fn at(deadline: Option<Instant>) {
    match deadline {
        Some(t) => tokio::time::sleep_until(t).await,
        None => pending().await,
    }
}

async fn gone(process: Option<&Process>) {
    if let Some(p) = process {
        p.ended().await;
    }
}

/// What the monitor says of the command's end.
fn turn_of(line: Result<Option<Line>>, timeout: Option<Duration>) -> Turn {
    match line {
        Ok(Some(Line { number, message: None })) if number >= 0 => {
            Turn::Exited(u32::try_from(number).map_or(ExitStatus::Unknown(255), ExitStatus::from_code))
        }
        // The monitor's own timeout, which stands behind ours.
        Ok(Some(Line { number: -1, message: Some(_) })) if timeout.is_some() => Turn::Late(timeout.unwrap_or_default()),
        Ok(Some(line)) => Turn::Lost(format!("it says {} {}", line.number, line.message.unwrap_or_default())),
        Ok(None) => Turn::Lost("it has gone without telling the exit status".into()),
        Err(e) => Turn::Lost(e.to_string()),
    }
}

impl Inner {
    pub(super) async fn exec_sync(
        self: &Arc<Self>,
        pod: &str,
        container: &str,
        spec: ExecSyncSpec,
        caller: oneshot::Receiver<()>,
    ) -> Result<ExecOutput> {
        let task = self.task(pod, container)?;
        if task.exit().is_some() || task.init().is_none_or(Process::has_ended) {
            return Err(Error::precondition(format!("exec in container {container}: its init does not run")));
        }
        let pod = self.find_or_insert(pod);
        let mut id = types::new_id()?;
        id.truncate(ID_LENGTH);
        let dir = self.layout.exec(&pod.id, container, &id);
        let exec = Exec { inner: self.clone(), pod, task, id, dir };
        let (d, process) = (exec.dir.clone(), spec.process_json.clone());
        let prepared = blocking(move || {
            std::fs::create_dir(&d).context(|| format!("create {}: is the container there?", d.display()))?;
            write_atomic(&d.join("process.json"), process.as_bytes())
        });
        let out = match prepared.await {
            Ok(()) => exec.run(spec, caller).await,
            Err(e) => Err(e),
        };
        let d = exec.dir.clone();
        if let Err(e) = blocking(move || bundle::remove_tree(&d)).await {
            tracing::warn!(container, error = %e, "the directory of an exec stays behind");
        }
        out
    }

    /// A monitor's version; asked once.
    async fn version(&self, monitor: &Path) -> Option<Version> {
        let known = || self.versions.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        if let Some(version) = known().get(monitor).copied() {
            return version;
        }
        let version = version_of(monitor).await;
        // One that was slow to say it says it next time.
        if version.is_some() {
            known().insert(monitor.to_path_buf(), version);
        }
        version
    }

    /// The execs of a container that a daemon has begun and not ended: killed.
    pub(super) async fn end_old_execs(&self, pod: &str, container: &str) {
        let execs = self.bundle(pod, container).join("execs");
        for id in bundle::list(&execs) {
            let dir = execs.join(&id);
            // Its command line names the file, whose name is random.
            for pid in with_argument(&dir.join("process.json")) {
                let spec = dir.join("process.json");
                match Process::open(pid, || with_argument(&spec).contains(&pid)) {
                    Ok(Some(monitor)) => {
                        kill_tree(&monitor, super::Timeouts::default().cleanup).await;
                    }
                    Ok(None) => {}
                    Err(e) => tracing::warn!(container, error = %e, "an old exec may live on"),
                }
            }
            if let Err(e) = blocking(move || bundle::remove_tree(&dir)).await {
                tracing::warn!(container, error = %e, "the directory of an old exec stays behind");
            }
        }
    }
}

impl Exec {
    fn what(&self, call: &str) -> String {
        format!("{call} exec in container {}", self.task.id)
    }

    fn caller_gone(&self) -> Error {
        Error::new(ErrorKind::Cancelled, format!("{}: the caller has gone", self.what("run")))
    }

    async fn run(&self, spec: ExecSyncSpec, mut caller: oneshot::Receiver<()>) -> Result<ExecOutput> {
        let begun = Instant::now();
        let permit = self.queue(begun, &mut caller).await?;
        let handler = &self.task.record.handler;
        let version = self.inner.version(&handler.monitor).await;
        if version.is_none() {
            let what = format!("{}: {} does not tell its version", self.what("start"), handler.monitor.display());
            return Err(Error::unavailable(what).hint("without it the command's output could not be bounded"));
        }
        let by_log = handler.exec_by_log || version.is_none_or(|v| v < PASSTHROUGH_SINCE);
        // What is kept of both streams, which is all that anybody reads.
        let bound = (by_log && version.is_some_and(|v| v >= LOG_BOUND_SINCE)).then_some(spec.keep as u64 * 2);
        let (mut started, pipes) = self.launch(&spec, by_log, bound)?;
        let process = match self.started(&mut started, begun, &mut caller).await {
            Ok(process) => process,
            Err(e) => {
                // What nobody waits for any more must not come up.
                if matches!(e.kind(), ErrorKind::Cancelled | ErrorKind::DeadlineExceeded) {
                    self.kill_monitor(&mut started).await;
                }
                self.kill(&mut started, None).await;
                return Err(self.say_why(e, pipes).await);
            }
        };
        drop(permit);
        let out = match pipes {
            Some(pipes) => {
                let ended = self.by_pipes(&spec, &mut started, process.as_ref(), pipes, &mut caller);
                step("the command's end", ended).await
            }
            None => {
                let ended = self.by_log(&spec, &mut started, process.as_ref(), &mut caller);
                step("the command's end", ended).await
            }
        };
        self.kill(&mut started, process.as_ref().filter(|_| out.is_err())).await;
        out
    }

    /// Waits for its turn to call the OCI runtime.
    async fn queue(&self, begun: Instant, caller: &mut oneshot::Receiver<()>) -> Result<SemaphorePermit<'_>> {
        let bound = self.task.record.handler.timeouts.create;
        tokio::select! {
            permit = step("its turn among the pod's execs", self.pod.starts.acquire()) => permit.map_err(|e| Error::internal(self.what("queue")).because(e)),
            () = at(Some(begun + bound)) => {
                Err(Error::deadline(format!("{}: other execs took longer than {bound:?}", self.what("start"))))
            }
            _ = caller => Err(self.caller_gone()),
        }
    }

    fn launch(&self, spec: &ExecSyncSpec, by_log: bool, log_bound: Option<u64>) -> Result<(Started, Option<Pipes>)> {
        let handler = &self.task.record.handler;
        let runtime_root = self.inner.runtime_root(handler);
        let log = self.dir.join("log");
        let args = ExecArgs {
            container: &self.task.id,
            exec: &self.id,
            dir: &self.dir,
            runtime_root: &runtime_root,
            log: by_log.then_some(log.as_path()),
            log_bound,
            // One more than ours, which is told of.
            timeout: spec.timeout.map(|t| t.as_secs() + 2),
        };
        let launch = |streams| Launch {
            binary: &handler.monitor,
            arguments: args.arguments(handler),
            directory: &self.dir,
            streams,
            start_pipe: false,
        };
        if by_log {
            return Ok((launch(None).start(&self.inner.children)?, None));
        }
        let ((out, their_out), (err, their_err)) = (stdio::fifo::pipe()?, stdio::fifo::pipe()?);
        let mut nodes = HashSet::new();
        for fd in [&out, &err] {
            let stat = rustix::fs::fstat(fd).context(|| "stat a pipe".into())?;
            nodes.insert((stat.st_dev, stat.st_ino));
        }
        let started = launch(Some((their_out.as_fd(), their_err.as_fd()))).start(&self.inner.children)?;
        Ok((started, Some(Pipes { out, err, nodes })))
    }

    /// Waits until the command runs; `None` where it has ended by then.
    async fn started(
        &self,
        started: &mut Started,
        begun: Instant,
        caller: &mut oneshot::Receiver<()>,
    ) -> Result<Option<Process>> {
        let bound = self.task.record.handler.timeouts.create;
        let line = tokio::select! {
            biased;
            line = started.sync.next() => line,
            () = at(Some(begun + bound)) => {
                return Err(Error::deadline(format!("{}: it took longer than {bound:?}", self.what("start"))));
            }
            _ = caller => return Err(self.caller_gone()),
        };
        let said = match line {
            Ok(Some(line)) => match u32::try_from(line.number) {
                Ok(pid) if pid > 0 => return Process::open(pid, || parent(pid) == Some(started.pid())),
                _ => line.message,
            },
            Ok(None) => None,
            Err(e) => return Err(e.within(self.what("start"))),
        };
        let log = runtime_log(&self.dir);
        let log = blocking(move || Ok(std::fs::read_to_string(log).unwrap_or_default())).await.unwrap_or_default();
        Err(runtime_error(&self.what("start"), &log, said.or_else(|| started.words())))
    }

    /// Adds what was said on the streams that were handed down, where nothing better
    /// is known: the monitor's and the runtime's own words come there, too.
    async fn say_why(&self, e: Error, pipes: Option<Pipes>) -> Error {
        let Some(pipes) = pipes.filter(|_| e.kind() == ErrorKind::Internal) else { return e };
        let mut said = Capped::new(4096);
        let _ = tokio::time::timeout(LAST_WORDS, stdio::collect(pipes.err, &mut said)).await;
        let text = String::from_utf8_lossy(said.kept()).into_owned();
        match text.lines().map(str::trim).rfind(|l| !l.is_empty()) {
            Some(words) => e.hint(format!("it said {words:?}")),
            None => e,
        }
    }

    async fn by_pipes(
        &self,
        spec: &ExecSyncSpec,
        started: &mut Started,
        process: Option<&Process>,
        pipes: Pipes,
        caller: &mut oneshot::Receiver<()>,
    ) -> Result<ExecOutput> {
        let (mut stdout, mut stderr) = (Capped::new(spec.keep), Capped::new(spec.keep));
        let (turn, drained, status) = {
            let mut io = pin!(async {
                let both = tokio::join!(stdio::collect(pipes.out, &mut stdout), stdio::collect(pipes.err, &mut stderr));
                both.0.and(both.1)
            });
            let mut drained = None;
            let (mut ends, mut late) = (None, after(spec.timeout));
            let turn = loop {
                tokio::select! {
                    biased;
                    line = started.sync.next(), if ends.is_none() => match turn_of(line, spec.timeout) {
                        Turn::Exited(status) => {
                            late = None;
                            ends = Some((status, after(spec.drain_timeout)));
                        }
                        turn => break turn,
                    },
                    done = io.as_mut(), if drained.is_none() => drained = Some(done),
                    () = at(late) => break Turn::Late(spec.timeout.unwrap_or_default()),
                    () = at(ends.and_then(|(_, drain)| drain)), if ends.is_some() => break Turn::Held,
                    _ = &mut *caller => break Turn::CallerGone,
                }
                if let (Some((status, _)), Some(_)) = (ends, &drained) {
                    break Turn::Exited(status);
                }
            };
            let status = match &turn {
                Turn::Exited(_) | Turn::Held => None,
                // It dies before the answer; what it has said until then is told.
                Turn::Late(_) | Turn::CallerGone | Turn::Lost(_) => {
                    let status = self.kill(started, process).await;
                    if drained.is_none() && matches!(turn, Turn::Lost(_)) {
                        let _ = tokio::time::timeout(LAST_WORDS, io.as_mut()).await;
                    }
                    status
                }
            };
            (turn, drained, status)
        };
        match turn {
            Turn::Exited(status) => match drained {
                Some(Err(e)) => Err(e.within(self.what("read the output of"))),
                _ => Ok(ExecOutput {
                    stdout: Bytes::from(stdout.into_kept()),
                    stderr: Bytes::from(stderr.into_kept()),
                    status,
                }),
            },
            Turn::Held => Err(self.held(spec, pipes.nodes).await),
            other => Err(self.error(other, status, (stdout.kept(), stderr.kept()))),
        }
    }

    async fn by_log(
        &self,
        spec: &ExecSyncSpec,
        started: &mut Started,
        process: Option<&Process>,
        caller: &mut oneshot::Receiver<()>,
    ) -> Result<ExecOutput> {
        let (mut late, mut drain, mut dead) = (after(spec.timeout), None, false);
        let turn = loop {
            tokio::select! {
                biased;
                line = started.sync.next() => break turn_of(line, spec.timeout),
                // The original reads on until nobody holds the streams any more.
                () = gone(process), if !dead => {
                    dead = true;
                    late = None;
                    drain = after(spec.drain_timeout);
                }
                () = at(late) => break Turn::Late(spec.timeout.unwrap_or_default()),
                () = at(drain), if drain.is_some() => break Turn::Held,
                _ = &mut *caller => break Turn::CallerGone,
            }
        };
        let (path, keep) = (self.dir.join("log"), spec.keep);
        let streams = async {
            let read = blocking(move || log::read(&path, keep)).await?;
            if read.skipped > 0 {
                tracing::warn!(container = self.task.id, lines = read.skipped, "an exec's log has lines that are none");
            }
            Ok::<_, Error>(read)
        };
        match turn {
            Turn::Exited(status) => {
                let read = streams.await?;
                Ok(ExecOutput { stdout: Bytes::from(read.stdout), stderr: Bytes::from(read.stderr), status })
            }
            // Between them and us stands the monitor.
            Turn::Held => Err(self.held(spec, holders::read_ends(started.pid())).await),
            other => {
                let status = self.kill(started, process).await;
                let read = streams.await;
                let (out, err) = read.map(|r| (r.stdout, r.stderr)).unwrap_or_default();
                Err(self.error(other, status, (&out, &err)))
            }
        }
    }

    /// The error of a command whose end was not awaited, or is not known.
    fn error(&self, turn: Turn, status: Option<ExitStatus>, (out, err): (&[u8], &[u8])) -> Error {
        match turn {
            Turn::Late(t) => Error::deadline(format!("{}: timeout {t:?} exceeded", self.what("run")))
                .hint("the command was killed; its output is dropped"),
            Turn::CallerGone => self.caller_gone(),
            Turn::Lost(why) => {
                let shown = |b: &[u8]| String::from_utf8_lossy(&b[..b.len().min(1024)]).into_owned();
                let status = status.map_or_else(|| "it does not die".to_string(), ended);
                Error::internal(format!(
                    "{}: its monitor: {why} ({}); stdout {:?}, stderr {:?}",
                    self.what("run"),
                    status,
                    shown(out),
                    shown(err)
                ))
            }
            Turn::Exited(_) | Turn::Held => Error::internal(self.what("run")),
        }
    }

    /// The error of a command that has ended while somebody else still holds its
    /// output.
    async fn held(&self, spec: &ExecSyncSpec, nodes: HashSet<Node>) -> Error {
        let drain = spec.drain_timeout.unwrap_or_default();
        let us = std::process::id();
        let named = blocking(move || Ok(holders::writers(&nodes, &[us]))).await.unwrap_or_default();
        let by = if named.is_empty() { "other processes".to_string() } else { format!("other processes: {named}") };
        Error::internal(format!(
            "{}: the command has ended, but {drain:?} later its io is still held by {by}",
            self.what("drain the output of")
        ))
        .hint("let what the command leaves running redirect its stdout and stderr")
    }

    /// Kills the monitor with all that it has borne.
    async fn kill_monitor(&self, started: &mut Started) {
        if let Ok(Some(monitor)) = Process::open(started.pid(), || !started.child.has_ended()) {
            kill_tree(&monitor, self.task.record.handler.timeouts.cleanup).await;
        }
    }

    /// Ends the command, its process group and the monitor, and reaps the latter;
    /// gives its status, of which only the first that is given is true.
    async fn kill(&self, started: &mut Started, process: Option<&Process>) -> Option<ExitStatus> {
        let bound = self.task.record.handler.timeouts.cleanup;
        if let Some(process) = process {
            kill_group(process);
            process.ended_within(bound).await;
        }
        // It follows its command; the tree is what of it doesn't.
        let patience = if process.is_some() { bound / 4 } else { bound };
        if let Ok(ended) = tokio::time::timeout(patience, started.child.wait()).await {
            return Some(ended.status);
        }
        self.kill_monitor(started).await;
        match tokio::time::timeout(bound, started.child.wait()).await {
            Ok(ended) => Some(ended.status),
            Err(_) => {
                let pid = started.pid();
                tracing::error!(container = self.task.id, pid, "an exec's monitor does not die of SIGKILL");
                None
            }
        }
    }
}

/// SIGKILL to a command and to the process group that it leads, never to a group
/// that it doesn't lead.
fn kill_group(process: &Process) {
    let pid = i32::try_from(process.pid()).ok().and_then(rustix::process::Pid::from_raw);
    if let Some(pid) = pid.filter(|p| p.as_raw_nonzero().get() > 1)
        && !process.has_ended()
        && rustix::process::getpgid(Some(pid)) == Ok(pid)
    {
        let _ = rustix::process::kill_process_group(pid, rustix::process::Signal::KILL);
    }
    if let Err(e) = process.signal(Signal::KILL) {
        tracing::warn!(error = %e, "an exec lives on");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_monitor_says_of_the_end_is_understood() {
        let line = |number, message: Option<&str>| Ok(Some(Line { number, message: message.map(str::to_string) }));
        let t = Some(Duration::from_secs(3));
        assert!(matches!(turn_of(line(7, None), t), Turn::Exited(ExitStatus::Code(7))));
        assert!(matches!(turn_of(line(137, None), None), Turn::Exited(ExitStatus::Signal(9))));
        assert!(matches!(turn_of(line(-1, Some("command timed out")), t), Turn::Late(_)));
        assert!(matches!(turn_of(line(-1, None), t), Turn::Lost(_)));
        assert!(matches!(turn_of(Ok(None), t), Turn::Lost(_)));
        assert!(matches!(turn_of(Err(Error::internal("x")), t), Turn::Lost(_)));
    }
}
