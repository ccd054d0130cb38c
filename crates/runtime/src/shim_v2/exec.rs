//! ExecSync (behaviours.md section 1).
//!
//! ```text
//!  its turn ─► FIFOs ─► Exec ─► Wait (registered) ─► Start ─► exited ─► drained ─► Delete ─► answer
//!                                                     │         │         └ late: name who holds it, Delete
//!                                                     │         └ timeout: SIGKILL, wait, Delete
//!                                                     └ failed: Delete
//!  the caller has gone, at any of them: SIGKILL, wait, Delete
//! ```
//!
//! It runs in a task of the manager's, so it always comes to its Delete. The
//! FIFOs' directory stands in the container's bundle as long as the shim may know
//! the exec: what a dead daemon left is found by it and killed.

use super::Inner;
use super::pod::Pod;
use super::rpc::{Fault, call};
use super::shim::Shim;
use super::task::{PROCESS_URL, kill};
use crate::api::{ExecOutput, ExecSyncSpec};
use crate::bundle::{self, blocking};
use crate::holders::{self, Node};
use bytes::Bytes;
use proto::containerd::task::v3 as wire;
use std::collections::HashSet;
use std::future::pending;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;
use stdio::Capped;
use tokio::sync::oneshot::error::TryRecvError;
use tokio::sync::{SemaphorePermit, oneshot};
use tokio::time::Instant;
use types::{Error, ErrorKind, ExitStatus, Result, ResultExt, Signal};

/// How much of a random id names an exec: FIFO paths and the shim's lines stay short.
const ID_LENGTH: usize = 16;
/// What a call gets at least; zero would mean that it has no bound.
const LEAST: Duration = Duration::from_millis(1);
/// How long an error may be held up by the search for who holds the output.
const LOOK_FOR_HOLDERS: Duration = Duration::from_secs(3);

/// Between two attempts to end a start.
const KILL_AGAIN: Duration = Duration::from_millis(500);

/// One command, from its FIFOs to its Delete.
struct Exec {
    inner: Arc<Inner>,
    pod: Arc<Pod>,
    shim: Arc<Shim>,
    container: String,
    id: String,
    dir: PathBuf,
    /// Its Delete has failed.
    stays: AtomicBool,
}

/// Why the command is not waited for any longer.
enum Turn {
    Exited(Ended),
    Late(Duration),
    CallerGone,
}

/// The answer of Wait.
type Ended = std::result::Result<wire::WaitResponse, Fault>;

struct Readers {
    out: OwnedFd,
    err: OwnedFd,
    nodes: HashSet<Node>,
}

impl Inner {
    pub(super) async fn exec_sync(
        self: &Arc<Self>,
        pod: &str,
        container: &str,
        spec: ExecSyncSpec,
        mut caller: oneshot::Receiver<()>,
    ) -> Result<ExecOutput> {
        let (pod, shim) = self.reach(pod).await?;
        let mut id = types::new_id()?;
        id.truncate(ID_LENGTH);
        let dir = self.layout.exec(&pod.id, container, &id);
        let container_id = container.to_string();
        let exec =
            Exec { inner: self.clone(), pod, shim, container: container_id, id, dir, stays: AtomicBool::default() };
        // Before anything is done for it: what many execs at once do on threads of
        // their own would keep the CPUs from the daemon's other calls.
        let begun = Instant::now();
        let permit = exec.queue(begun, &mut caller).await?;
        let d = exec.dir.clone();
        let readers = blocking(move || open(&d)).await;
        let out = match readers {
            Ok(readers) => exec.run(spec, readers, begun, permit, caller).await,
            Err(e) => Err(e),
        };
        if exec.stays.load(Ordering::Relaxed) {
            return out;
        }
        let d = exec.dir.clone();
        if let Err(e) = blocking(move || bundle::remove_tree(&d)).await {
            tracing::warn!(container, error = %e, "the FIFOs of an exec stay behind");
        }
        out
    }
}

/// Makes the FIFOs and opens their reading ends, before the shim opens the others.
fn open(dir: &std::path::Path) -> Result<Readers> {
    std::fs::create_dir(dir).context(|| format!("create {}: is the container there?", dir.display()))?;
    let mut nodes = HashSet::new();
    let mut one = |name: &str| {
        let path = dir.join(name);
        bundle::make_fifo(&path)?;
        let fd = stdio::fifo::open_reader(&path)?;
        let stat = rustix::fs::fstat(&fd).context(|| format!("stat {}", path.display()))?;
        nodes.insert((stat.st_dev, stat.st_ino));
        Ok::<_, Error>(fd)
    };
    let (out, err) = (one("out")?, one("err")?);
    Ok(Readers { out, err, nodes })
}

/// The reading ends of an exec that another daemon began, where they are there.
fn open_again(dir: &std::path::Path) -> [Option<OwnedFd>; 2] {
    ["out", "err"].map(|name| stdio::fifo::open_reader(&dir.join(name)).ok())
}

/// Reads what nobody wants to know any more.
async fn drain(fd: Option<OwnedFd>) -> Result<()> {
    match fd {
        Some(fd) => stdio::collect(fd, &mut Capped::new(0)).await,
        None => Ok(()),
    }
}

/// Goes on with `io` while `work` is awaited; `io` ends at most once.
async fn alongside<T>(
    io: &mut Pin<&mut impl Future<Output = Result<()>>>,
    work: impl Future<Output = T>,
    done: &mut Option<Result<()>>,
) -> T {
    let mut work = pin!(work);
    loop {
        tokio::select! {
            biased;
            t = &mut work => return t,
            r = io.as_mut(), if done.is_none() => *done = Some(r),
        }
    }
}

/// Waits for the first of the ways in which a command's run can end.
async fn ends(
    early: Option<Ended>,
    wait: &mut Pin<&mut impl Future<Output = Ended>>,
    timeout: Option<Duration>,
    caller: &mut oneshot::Receiver<()>,
) -> Turn {
    if let Some(ended) = early {
        return Turn::Exited(ended);
    }
    tokio::select! {
        biased;
        ended = wait.as_mut() => Turn::Exited(ended),
        () = at(after(timeout)) => Turn::Late(timeout.unwrap_or_default()),
        _ = caller => Turn::CallerGone,
    }
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

impl Exec {
    fn what(&self, call: &str) -> String {
        format!("{call} exec in container {}", self.container)
    }

    async fn run(
        &self,
        spec: ExecSyncSpec,
        readers: Readers,
        begun: Instant,
        permit: SemaphorePermit<'_>,
        mut caller: oneshot::Receiver<()>,
    ) -> Result<ExecOutput> {
        self.make(spec.process_json).await?;
        if !matches!(caller.try_recv(), Err(TryRecvError::Empty)) {
            self.delete().await;
            return Err(self.caller_gone());
        }
        let mut wait = pin!(async {
            let request = wire::WaitRequest { id: self.container.clone(), exec_id: self.id.clone() };
            call(Duration::ZERO, self.shim.task().wait(Duration::ZERO, request)).await
        });
        let (pid, early) = self.start(begun, &mut wait, &mut caller).await?;
        drop(permit);
        let Readers { out, err, mut nodes } = readers;
        // A foreign shim puts pipes between the process and our FIFOs.
        if !self.shim.own() {
            nodes = holders::outputs(pid);
        }
        let (mut stdout, mut stderr) = (Capped::new(spec.keep), Capped::new(spec.keep));
        let mut drained = None;
        let turn = {
            let mut io = pin!(async {
                let both = tokio::join!(stdio::collect(out, &mut stdout), stdio::collect(err, &mut stderr));
                both.0.and(both.1)
            });
            let ends = ends(early, &mut wait, spec.timeout, &mut caller);
            let mut turn = alongside(&mut io, ends, &mut drained).await;
            if drained.is_none() && matches!(turn, Turn::Exited(Ok(_))) {
                tokio::select! {
                    biased;
                    done = io.as_mut() => drained = Some(done),
                    () = at(after(spec.drain_timeout)) => {}
                    _ = &mut caller => turn = Turn::CallerGone,
                }
            }
            turn
        };
        match turn {
            Turn::Exited(Ok(ended)) => {
                let output = match drained {
                    Some(Ok(())) => Ok(ExecOutput {
                        stdout: Bytes::from(stdout.into_kept()),
                        stderr: Bytes::from(stderr.into_kept()),
                        status: ExitStatus::from_code(ended.exit_status),
                    }),
                    Some(Err(e)) => Err(e.within(self.what("read the output of"))),
                    None => Err(self.held(spec.drain_timeout.unwrap_or_default(), nodes).await),
                };
                self.delete().await;
                output
            }
            Turn::Exited(Err(e)) => {
                self.give_up(&e).await;
                Err(e.within(&self.what("wait for"), Duration::ZERO))
            }
            Turn::Late(t) => {
                self.kill_and_delete().await;
                Err(Error::deadline(format!("{}: timeout {t:?} exceeded", self.what("run")))
                    .hint("the command was killed; its output is dropped"))
            }
            Turn::CallerGone => {
                self.kill_and_delete().await;
                Err(self.caller_gone())
            }
        }
    }

    fn caller_gone(&self) -> Error {
        Error::new(ErrorKind::Cancelled, format!("{}: the caller has gone", self.what("run")))
    }

    /// Tells the shim of the command.
    async fn make(&self, process_json: String) -> Result<()> {
        let bound = self.shim.timeouts().create;
        let request = wire::ExecProcessRequest {
            id: self.container.clone(),
            exec_id: self.id.clone(),
            terminal: false,
            stdin: String::new(),
            stdout: self.dir.join("out").to_string_lossy().into_owned(),
            stderr: self.dir.join("err").to_string_lossy().into_owned(),
            spec: Some(prost_types::Any { type_url: PROCESS_URL.into(), value: process_json.into_bytes() }),
        };
        match call(bound, self.shim.task().exec(bound, request)).await {
            Ok(()) => Ok(()),
            Err(e) => {
                if matches!(e, Fault::Late | Fault::Closed) {
                    self.give_up(&e).await;
                }
                Err(e.within(&self.what("make"), bound))
            }
        }
    }

    /// Waits for its turn to call the OCI runtime.
    async fn queue(&self, begun: Instant, caller: &mut oneshot::Receiver<()>) -> Result<SemaphorePermit<'_>> {
        let bound = self.shim.timeouts().create;
        tokio::select! {
            permit = self.pod.runtime_calls.acquire() => {
                permit.map_err(|e| Error::internal(self.what("queue")).because(e))
            }
            () = at(Some(begun + bound)) => {
                Err(Error::deadline(format!("{}: other execs took longer than {bound:?}", self.what("start"))))
            }
            _ = caller => Err(self.caller_gone()),
        }
    }

    /// Starts it, its Wait first. Returns its pid, and its end where that has
    /// come already.
    async fn start(
        &self,
        begun: Instant,
        wait: &mut Pin<&mut impl Future<Output = Ended>>,
        caller: &mut oneshot::Receiver<()>,
    ) -> Result<(u32, Option<Ended>)> {
        // Queueing counts: what is left of the bound is the start's.
        let left = self.shim.timeouts().create.saturating_sub(begun.elapsed()).max(LEAST);
        let mut early = None;
        let mut start = pin!(async {
            let request = wire::StartRequest { id: self.container.clone(), exec_id: self.id.clone() };
            call(left, self.shim.task().start(left, request)).await
        });
        let started = loop {
            tokio::select! {
                biased;
                // Polled first: it goes out first.
                ended = wait.as_mut(), if early.is_none() => early = Some(ended),
                started = &mut start => break Some(started),
                _ = &mut *caller => break None,
            }
        };
        let gone = started.is_none();
        let started = match started {
            Some(started) => started,
            None => self.break_off(&mut start).await,
        };
        match started {
            Ok(answer) if !gone => return Ok((answer.pid, early)),
            Ok(_) => self.kill_and_delete().await,
            Err(e) => {
                if matches!(e, Fault::Late | Fault::Closed) {
                    self.give_up(&e).await;
                } else {
                    self.delete().await;
                }
                if !gone {
                    return Err(e.within(&self.what("start"), left));
                }
            }
        }
        Err(self.caller_gone())
    }

    /// Ends a start that nobody waits for any more: our shim breaks it off at a SIGKILL,
    /// which has nothing to end where it comes before the start.
    async fn break_off<T>(&self, start: &mut Pin<&mut impl Future<Output = T>>) -> T {
        let bound = self.shim.timeouts().cleanup;
        loop {
            let again = async {
                let _ = kill(&self.shim, &self.container, &self.id, Signal::KILL, false, bound).await;
                tokio::time::sleep(KILL_AGAIN).await;
            };
            tokio::select! {
                biased;
                started = start.as_mut() => return started,
                () = again => {}
            }
        }
    }

    /// The error of a command that has ended while somebody else still holds its
    /// output.
    async fn held(&self, drain: Duration, nodes: HashSet<Node>) -> Error {
        let (shim, us) = (self.shim.pid, std::process::id());
        let (foreign, known) = (!self.shim.own(), nodes);
        let init = self.init_pid().await;
        let named = blocking(move || {
            let nodes = if known.is_empty() && foreign {
                // It had ended before its pipes could be seen: what the shim still
                // reads from, but for what the container's own init writes to.
                let of_init = init.map(holders::outputs).unwrap_or_default();
                &holders::read_ends(shim) - &of_init
            } else {
                known
            };
            Ok(holders::writers(&nodes, &[shim, us]))
        });
        // A process that hangs in the kernel can hold up who looks at it.
        let named = tokio::time::timeout(LOOK_FOR_HOLDERS, named).await.ok().and_then(Result::ok).unwrap_or_default();
        let by = if named.is_empty() { "other processes".to_string() } else { format!("other processes: {named}") };
        Error::internal(format!(
            "{}: the command has ended, but {drain:?} later its io is still held by {by}",
            self.what("drain the output of")
        ))
        .hint("let what the command leaves running redirect its stdout and stderr")
    }

    async fn init_pid(&self) -> Option<u32> {
        match self.inner.ask_state(&self.pod, &self.shim, &self.container).await {
            Ok(crate::TaskState::Running { pid } | crate::TaskState::Paused { pid }) => Some(pid),
            _ => None,
        }
    }

    /// Takes the exec out of the shim, under a bound of its own.
    async fn delete(&self) {
        let bound = self.shim.timeouts().cleanup;
        let mut again = !self.shim.own();
        loop {
            let request = wire::DeleteRequest { id: self.container.clone(), exec_id: self.id.clone() };
            match call(bound, self.shim.task().delete(bound, request)).await {
                Ok(_) => return,
                Err(Fault::Closed) if self.shim.is_dead() => return,
                Err(e) if e.is_not_found() => return,
                // Go's (1.7 and later) waits up to 10 s for whoever holds the output; cut
                // short by the bound it deletes all the same, just when we stop listening.
                Err(Fault::Late) if again => again = false,
                Err(e) => {
                    // Its directory leads the next daemon to it.
                    self.stays.store(true, Ordering::Relaxed);
                    let e = e.within(&self.what("delete"), bound);
                    tracing::warn!(error = %e, "an exec stays in the shim until its container ends");
                    return;
                }
            }
        }
    }

    /// Ends a command whose call has failed so. Where the connection broke, the shim may
    /// live, and the command with it: a new one leads to them.
    async fn give_up(&self, fault: &Fault) {
        if matches!(fault, Fault::Closed) {
            if !self.shim.outlives_connection().await {
                return;
            }
            if let Err(e) = self.shim.reconnect().await {
                self.stays.store(true, Ordering::Relaxed);
                let e = e.within(self.what("end"));
                tracing::warn!(error = %e, "an exec stays in the shim until its container ends");
                return;
            }
        }
        self.kill_and_delete().await;
    }

    async fn kill_and_delete(&self) {
        self.inner.kill_exec(&self.shim, &self.container, &self.id).await;
        self.delete().await;
    }
}

impl Inner {
    /// SIGKILL to an exec, and its end, under a bound.
    async fn kill_exec(&self, shim: &Shim, container: &str, exec: &str) {
        let bound = shim.timeouts().cleanup;
        let killed = kill(shim, container, exec, Signal::KILL, false, bound).await;
        let request = wire::WaitRequest { id: container.to_string(), exec_id: exec.to_string() };
        let ended = call(bound, shim.task().wait(bound, request)).await.map(|_| ());
        match ended.or(killed) {
            Ok(()) | Err(Fault::Closed) => {}
            Err(e) if e.is_not_found() => {}
            Err(e) => {
                let e = e.within(&format!("kill exec {exec} in container {container}"), bound);
                tracing::warn!(error = %e, "an exec can't be killed");
            }
        }
    }

    /// The execs of a container that a daemon has begun and not ended.
    pub(super) fn old_execs(&self, pod: &Pod, container: &str) -> Vec<String> {
        bundle::list(&self.layout.task(&pod.id, container).join("execs"))
    }

    /// Kills the execs of a daemon that died (DESIGN.md, "RPC handlers").
    pub(super) async fn end_old_execs(
        self: &Arc<Self>,
        pod: &Arc<Pod>,
        shim: &Arc<Shim>,
        container: &str,
        old: Vec<String>,
    ) {
        let execs = self.layout.task(&pod.id, container).join("execs");
        for id in old {
            let dir = execs.join(&id);
            let exec = Exec {
                inner: self.clone(),
                pod: pod.clone(),
                shim: shim.clone(),
                container: container.to_string(),
                id,
                dir: dir.clone(),
                stays: AtomicBool::default(),
            };
            // Go's shim waits in Start until somebody reads the FIFOs, and answers neither a
            // Kill of the exec nor the container's Wait until then. A call over gRPC outlives
            // the daemon that made it, so that only a new reader ends this.
            let d = dir.clone();
            let [out, err] = blocking(move || Ok(open_again(&d))).await.unwrap_or_default();
            let mut io = pin!(async {
                let both = tokio::join!(drain(out), drain(err));
                both.0.and(both.1)
            });
            alongside(&mut io, exec.kill_and_delete(), &mut None).await;
            if exec.stays.load(Ordering::Relaxed) {
                continue;
            }
            if let Err(e) = blocking(move || bundle::remove_tree(&dir)).await {
                tracing::warn!(container, error = %e, "the FIFOs of an old exec stay behind");
            }
        }
    }
}
