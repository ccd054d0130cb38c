//! A container's task: started, awaited, killed, asked, deleted.

use super::Inner;
use super::bury::created;
use super::foreign::Logger;
use super::pod::Pod;
use super::rpc::{Fault, call};
use super::shim::Shim;
use crate::api::{RuntimeEvent, TaskState};
use crate::bundle::{self, blocking};
use fault::Step;
use proto::containerd::task::v3 as wire;
use proto::containerd::v1::types::Status;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::{Duration, SystemTime};
use types::{Certificate, Error, ErrorKind, ExitStatus, Result, Signal};

/// How containerd names an OCI process in JSON on the wire.
pub(crate) const PROCESS_URL: &str = "types.containerd.io/opencontainers/runtime-spec/1/Process";
const RESOURCES_URL: &str = "types.containerd.io/opencontainers/runtime-spec/1/LinuxResources";
/// Between two attempts to wait where the shim answers with an odd error.
const WAIT_AGAIN: Duration = Duration::from_secs(1);
/// After so many attempts in turn a shim that lives, and where nobody listens, is killed.
const DEAF_AFTER: u32 = 10;

/// How long the log of an ended container may still be on its way.
const LOG_END: Duration = Duration::from_secs(2);

/// A task in the manager's table.
#[derive(Default)]
pub(crate) struct Task {
    pub(crate) id: String,
    /// An earlier daemon has made it, or was about to.
    found: bool,
    /// Create has succeeded; before that its maker alone cleans up.
    made: AtomicBool,
    /// A Wait is outstanding that will tell its end.
    watched: AtomicBool,
    /// It counts as never made: nobody is told of its end.
    condemned: AtomicBool,
    /// Something of it may live on, though its end was told: neither its dead shim's
    /// `delete` nor the OCI runtime could end it.
    left: AtomicBool,
    /// Set once, and then told.
    exit: OnceLock<Certificate>,
    /// The kernel's OOM killer struck, as a foreign shim's event said.
    pub(crate) oom: tokio::sync::watch::Sender<bool>,
    /// The last signal that was sent, and why.
    killed: Mutex<Option<(Signal, String)>>,
    /// Writes a foreign shim's output into the CRI log.
    logger: Mutex<Option<Logger>>,
}

impl Task {
    pub(crate) fn new(id: &str) -> Self {
        Self { id: id.to_string(), ..Self::default() }
    }

    /// A task that an earlier daemon made, or was about to.
    pub(crate) fn adopted(id: &str) -> Self {
        Self { found: true, ..Self::new(id) }
    }

    /// A task that an earlier daemon made.
    pub(crate) fn found(id: &str) -> Self {
        let task = Self::adopted(id);
        task.set_made();
        task
    }

    /// True for what nobody has asked this daemon to make.
    pub(crate) fn is_found(&self) -> bool {
        self.found
    }

    pub(crate) fn is_made(&self) -> bool {
        self.made.load(Ordering::SeqCst)
    }

    pub(crate) fn set_made(&self) {
        self.made.store(true, Ordering::SeqCst);
    }

    /// True while somebody waits for its end.
    pub(crate) fn is_watched(&self) -> bool {
        self.watched.load(Ordering::SeqCst)
    }

    pub(crate) fn exit(&self) -> Option<&Certificate> {
        self.exit.get()
    }

    fn logger(&self) -> std::sync::MutexGuard<'_, Option<Logger>> {
        self.logger.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Where the daemon writes its log.
    pub(crate) fn log(&self) -> Option<Logger> {
        self.logger().clone()
    }

    /// Whether this daemon has sent it a signal.
    pub(crate) fn was_signalled(&self) -> bool {
        self.killed.lock().unwrap_or_else(PoisonError::into_inner).is_some()
    }

    /// Whether it could not be ended when it was buried.
    pub(crate) fn note_left(&self, left: bool) {
        self.left.store(left, Ordering::SeqCst);
    }

    pub(crate) fn is_condemned(&self) -> bool {
        self.condemned.load(Ordering::SeqCst)
    }

    pub(crate) fn condemn(&self) {
        self.condemned.store(true, Ordering::SeqCst);
    }

    pub(crate) fn set_logger(&self, logger: Option<Logger>) {
        *self.logger() = logger;
    }

    /// Records an end that its caller tells itself; one that was recorded before
    /// stands.
    pub(crate) fn bury(&self, certificate: Certificate) -> Certificate {
        self.set_made();
        self.exit.get_or_init(|| certificate).clone()
    }

    /// Adds what only this side knows: a shim can tell that a signal came through
    /// it, but not why.
    fn complete(&self, mut certificate: Certificate) -> Certificate {
        if *self.oom.borrow() {
            certificate.oom_killed = true;
        }
        if let ExitStatus::Signal(n) = certificate.status
            && let Some((signal, why)) = &*self.killed.lock().unwrap_or_else(PoisonError::into_inner)
            && signal.number() == n
        {
            certificate.killed_by = Some(why.clone());
        }
        certificate
    }
}

/// A timestamp of the wire, where it is one.
pub(crate) fn time(t: &prost_types::Timestamp) -> Option<SystemTime> {
    // Go's zero time is what an unset one looks like.
    SystemTime::try_from(*t).ok().filter(|t| *t > SystemTime::UNIX_EPOCH)
}

impl Inner {
    /// Keeps a Wait outstanding: it alone tells the exit
    /// (docs/decisions/0005-exits-by-wait.md).
    pub(super) fn watch_task(self: &Arc<Self>, pod: &Arc<Pod>, shim: &Arc<Shim>, task: &Arc<Task>) {
        if shim.is_sandbox(&task.id) {
            return self.watch_sandbox(pod, shim, task);
        }
        task.set_made();
        task.watched.store(true, Ordering::SeqCst);
        let (inner, pod, shim, task) = (self.clone(), pod.clone(), shim.clone(), task.clone());
        tokio::spawn(async move {
            let mut unreached = 0;
            loop {
                let request = wire::WaitRequest { id: task.id.clone(), exec_id: String::new() };
                match call(Duration::ZERO, shim.task().wait(Duration::ZERO, request)).await {
                    Ok(answer) => {
                        let certificate =
                            inner.certificate(&pod.id, &task.id, answer.exit_status, answer.exited_at).await;
                        inner.last_words(&pod, &shim, &task, certificate.status).await;
                        inner.ended(&pod, &task, certificate);
                        return;
                    }
                    Err(e) if e.is_not_found() => {
                        // Deleted; or it ended with an earlier shim, and only its
                        // bundle tells how.
                        let dir = inner.layout.task(&pod.id, &task.id);
                        if let Ok(Some(c)) = blocking(move || Ok(bundle::certificate(&dir))).await
                            && pod.task(&task.id).is_some()
                        {
                            inner.ended(&pod, &task, c);
                        }
                        // A create that a former daemon had asked for may end only now:
                        // whoever finds the task then waits for its end again.
                        task.watched.store(false, Ordering::SeqCst);
                        return;
                    }
                    Err(Fault::Closed) => {
                        if shim.is_dead() {
                            return;
                        }
                        match shim.reconnect().await {
                            Ok(()) => unreached = 0,
                            Err(_) if shim.is_dead() => return,
                            // Nobody listens; any other error is no word of the shim's.
                            Err(e) if e.kind() == ErrorKind::Unavailable => {
                                unreached += 1;
                                if unreached == DEAF_AFTER {
                                    tracing::warn!(pod = pod.id, pid = shim.pid, error = %e, "the shim is killed: it lives, but can't be reached");
                                    shim.kill();
                                    return;
                                }
                            }
                            Err(e) => tracing::warn!(pod = pod.id, error = %e, "tries again"),
                        }
                        // One that hangs up at once each time must cost no core.
                        tokio::time::sleep(WAIT_AGAIN).await;
                    }
                    Err(e) => {
                        let e = e.within("wait for its end", Duration::ZERO);
                        tracing::warn!(container = task.id, error = %e, "tries again");
                        tokio::time::sleep(WAIT_AGAIN).await;
                    }
                }
                // A task of the same id may be another one by now.
                if task.exit().is_some() || pod.task(&task.id).is_none_or(|t| !Arc::ptr_eq(&t, &task)) {
                    return;
                }
            }
        });
    }

    /// How a task ended: what its bundle says, where the shim writes that, or the
    /// wire's code and time.
    pub(super) async fn certificate(
        &self,
        pod: &str,
        id: &str,
        code: u32,
        at: Option<prost_types::Timestamp>,
    ) -> Certificate {
        let dir = self.layout.task(pod, id);
        let written = blocking(move || Ok(bundle::certificate(&dir))).await.ok().flatten();
        written.unwrap_or_else(|| Certificate {
            status: ExitStatus::from_code(code),
            exited_at: at.as_ref().and_then(time).unwrap_or_else(crate::now),
            oom_killed: false,
            oom_cgroup: None,
            killed_by: None,
            peak_memory: None,
        })
    }

    /// Records a task's end and tells it, once.
    pub(super) fn ended(&self, pod: &Pod, task: &Task, certificate: Certificate) {
        let certificate = task.complete(certificate);
        if task.exit.set(certificate.clone()).is_ok() && !task.is_condemned() {
            self.tell(RuntimeEvent::Exited { pod: pod.id.clone(), container: task.id.clone(), certificate });
        }
    }

    /// The pod's entry and its shim, for calls to a container.
    pub(super) async fn reach(self: &Arc<Self>, pod: &str) -> Result<(Arc<Pod>, Arc<Shim>)> {
        let entry = self.find(pod).ok_or_else(|| Error::not_found(format!("pod {pod} has no shim")))?;
        let shim = entry.shim(self).await?;
        Ok((entry, shim))
    }

    pub(super) async fn start_task(self: &Arc<Self>, pod: &str, id: &str) -> Result<()> {
        let (entry, shim) = self.reach(pod).await?;
        if shim.is_sandbox(id) {
            return self.start_sandbox(&entry, &shim).await;
        }
        let bound = shim.timeouts().create;
        let request = wire::StartRequest { id: id.to_string(), exec_id: String::new() };
        match fault::around(Step::TaskStart, call(bound, shim.task().start(bound, request))).await {
            Ok(_) => Ok(()),
            Err(e) => Err(e.within(&format!("start container {id}"), bound)),
        }
    }

    pub(super) async fn kill_task(
        self: &Arc<Self>,
        pod: &str,
        id: &str,
        signal: Signal,
        all: bool,
        why: &str,
    ) -> Result<()> {
        let Some(entry) = self.find(pod) else { return Ok(()) };
        // First the shim: one that is only found now brings its tasks along.
        let shim = match entry.shim(self).await {
            Ok(shim) => shim,
            Err(e) if e.is_not_found() => return Ok(()),
            Err(e) => return Err(e),
        };
        let Some(task) = entry.task(id) else { return Ok(()) };
        if task.exit().is_some() {
            return Ok(());
        }
        *task.killed.lock().unwrap_or_else(PoisonError::into_inner) = Some((signal, why.to_string()));
        if shim.is_sandbox(id) {
            return self.stop_sandbox(&entry, &shim).await;
        }
        let bound = shim.timeouts().call;
        match fault::around(Step::TaskKill, kill(&shim, id, "", signal, all, bound)).await {
            Ok(()) => Ok(()),
            // It died of what is being cleaned up now.
            Err(Fault::Closed) if shim.is_dead() => Ok(()),
            Err(_) if task.exit().is_some() => Ok(()),
            Err(e) => Err(e.within(&format!("send {signal} to container {id}"), bound)),
        }
    }

    /// The mark in memory and in the bundle, before anything of it is undone.
    pub(super) async fn condemn_task(&self, pod: &str, id: &str) -> Result<()> {
        if let Some(task) = self.find(pod).and_then(|p| p.task(id)) {
            task.condemn();
        }
        let dir = self.layout.task(pod, id);
        blocking(move || bundle::condemn(&dir)).await
    }

    /// SIGKILL, wait, delete: for what must go. An unknown task is success.
    pub(super) async fn kill_and_delete(self: &Arc<Self>, pod: &Arc<Pod>, shim: &Shim, id: &str) -> Result<()> {
        if shim.is_sandbox(id) {
            return self.delete_sandbox(pod, shim).await;
        }
        let bound = shim.timeouts().cleanup;
        let within = |e: Fault, what: &str| e.within(&format!("{what} container {id}"), bound);
        let until = tokio::time::Instant::now() + shim.timeouts().create;
        let ended = loop {
            kill(shim, id, "", Signal::KILL, true, bound).await.map_err(|e| within(e, "kill"))?;
            let request = wire::WaitRequest { id: id.to_string(), exec_id: String::new() };
            match call(bound, shim.task().wait(bound, request)).await {
                Ok(answer) => break answer,
                // A foreign shim knows a container only once its Create has ended.
                Err(e) if e.is_not_found() && !shim.own() && created(id, bound).await => {
                    if tokio::time::Instant::now() > until {
                        let what = format!("the call of the OCI runtime that makes container {id} does not end");
                        return Err(Error::deadline(what).hint("it may hang in the kernel: look for state D in ps"));
                    }
                }
                Err(e) if e.is_not_found() => {
                    let dir = self.layout.task(&pod.id, id);
                    if !shim.own() {
                        let _ = blocking(move || {
                            crate::cgroup::scrub(&dir);
                            Ok(())
                        })
                        .await;
                    }
                    return Ok(());
                }
                Err(e) => return Err(within(e, "wait for")),
            }
        };
        if let Some(task) = pod.task(id) {
            let certificate = self.certificate(&pod.id, id, ended.exit_status, ended.exited_at).await;
            self.ended(pod, &task, certificate);
        }
        if !shim.own() {
            self.remove_own_binary(&shim.handler, id).await;
        }
        let request = wire::DeleteRequest { id: id.to_string(), exec_id: String::new() };
        match call(bound, shim.task().delete(bound, request)).await {
            Ok(_) => {}
            Err(e) if e.is_not_found() => {}
            Err(e) => return Err(within(e, "delete")),
        }
        if let Some(task) = pod.update(|s| s.tasks.remove(id)) {
            self.finish_log(&task).await;
        }
        let dir = self.layout.task(&pod.id, id);
        blocking(move || bundle::remove_task(&dir)).await
    }

    pub(super) async fn delete_task(self: &Arc<Self>, pod: &str, id: &str) -> Result<()> {
        let dir = self.layout.task(pod, id);
        let Some(entry) = self.find(pod) else {
            if dir.exists()
                && let Some(left) = self.bury_task(pod, id).await.left
            {
                return Err(left);
            }
            return blocking(move || bundle::remove_task(&dir)).await;
        };
        let task = entry.task(id);
        if !task.as_ref().is_none_or(|t| t.is_made()) {
            return Err(Error::precondition(format!("delete container {id}: its task is being made")));
        }
        let left = task.as_ref().is_some_and(|t| t.left.load(Ordering::SeqCst));
        // No shim knows it; or there is none, and what is not recorded yet ended with it.
        let unburied = left
            || !self.delete_in_shim(&entry, id, task.as_deref()).await?
                && task.as_ref().is_none_or(|t| t.exit().is_none());
        if unburied && dir.exists() {
            let buried = self.bury_task(pod, id).await;
            if let Some(task) = &task {
                task.note_left(buried.left.is_some());
                self.ended(&entry, task, buried.certificate);
            }
            if let Some(left) = buried.left {
                return Err(left);
            }
        }
        if let Some(task) = &task {
            self.finish_log(task).await;
        }
        entry.update(|s| s.tasks.remove(id));
        blocking(move || fault::during(Step::TaskUnbundle, || bundle::remove_task(&dir))).await
    }

    /// Deletes a task in the pod's shim. False where the pod has none.
    async fn delete_in_shim(self: &Arc<Self>, pod: &Arc<Pod>, id: &str, task: Option<&Task>) -> Result<bool> {
        loop {
            let shim = match pod.shim(self).await {
                Ok(shim) => shim,
                Err(e) if e.is_not_found() => return Ok(false),
                Err(e) => return Err(e),
            };
            if shim.is_sandbox(id) {
                self.delete_sandbox(pod, &shim).await?;
                return Ok(true);
            }
            if !shim.own() {
                self.remove_own_binary(&shim.handler, id).await;
            }
            let bound = shim.timeouts().create;
            let request = wire::DeleteRequest { id: id.to_string(), exec_id: String::new() };
            match fault::around(Step::TaskDelete, call(bound, shim.task().delete(bound, request))).await {
                Ok(answer) => {
                    if let Some(task) = task
                        && task.exit().is_none()
                    {
                        let certificate = self.certificate(&pod.id, id, answer.exit_status, answer.exited_at).await;
                        self.ended(pod, task, certificate);
                    }
                    return Ok(true);
                }
                Err(e) if e.is_not_found() => return Ok(true),
                // Once it is buried, `shim` says that there is none.
                Err(Fault::Closed) if shim.is_dead() => {}
                Err(e) => return Err(e.within(&format!("delete container {id}"), bound)),
            }
        }
    }

    async fn finish_log(&self, task: &Task) {
        let logger = task.logger().take();
        if let Some(logger) = logger {
            logger.finish(LOG_END).await;
        }
    }

    pub(super) async fn task_state(self: &Arc<Self>, pod: &str, id: &str) -> Result<TaskState> {
        if let Some(exit) = self.find(pod).and_then(|p| p.task(id)).and_then(|t| t.exit().cloned()) {
            return Ok(TaskState::Stopped(exit));
        }
        let asked = match self.reach(pod).await {
            Ok((entry, shim)) => self.ask_state(&entry, &shim, id).await,
            Err(e) if e.is_not_found() => match self.end_without_shim(pod, id).await {
                Some(end) => Ok(end),
                None => Err(e),
            },
            Err(e) => Err(e),
        };
        match asked {
            Err(e) if e.is_not_found() => {
                // It ended with an earlier shim, and only its bundle tells how.
                let dir = self.layout.task(pod, id);
                let told = blocking(move || Ok(bundle::certificate(&dir))).await?;
                told.map(TaskState::Stopped).ok_or(e)
            }
            asked => asked,
        }
    }

    /// How a task ended that an earlier daemon made, whose shim has died since, and that
    /// no recovery has found.
    async fn end_without_shim(self: &Arc<Self>, pod: &str, id: &str) -> Option<TaskState> {
        let entry = self.find(pod)?;
        if entry.task(id).is_some() {
            return None;
        }
        self.recover_dead(&entry, id, true).await
    }

    pub(super) async fn ask_state(&self, pod: &Pod, shim: &Shim, id: &str) -> Result<TaskState> {
        if shim.is_sandbox(id) {
            return self.ask_sandbox(pod, shim).await;
        }
        let bound = shim.timeouts().state;
        let what = || format!("ask the state of container {id}");
        let request = wire::StateRequest { id: id.to_string(), exec_id: String::new() };
        let mut answer = call(bound, shim.task().state(bound, request.clone())).await;
        if matches!(answer, Err(Fault::Closed)) {
            if !shim.outlives_connection().await {
                return Err(Fault::Closed.within(&what(), bound).with_kind(ErrorKind::NotFound));
            }
            shim.reconnect().await.map_err(|e| e.within(what()))?;
            answer = call(bound, shim.task().state(bound, request)).await;
        }
        let answer = answer.map_err(|e| e.within(&what(), bound))?;
        let pid = answer.pid;
        Ok(match answer.status() {
            Status::Created => TaskState::Created,
            Status::Running => TaskState::Running { pid },
            Status::Paused | Status::Pausing => TaskState::Paused { pid },
            Status::Stopped => {
                let c = self.certificate(&pod.id, id, answer.exit_status, answer.exited_at).await;
                TaskState::Stopped(pod.task(id).map_or(c.clone(), |t| t.exit().cloned().unwrap_or(t.complete(c))))
            }
            Status::Unknown => return Err(Error::internal(format!("{}: the shim doesn't know it", what()))),
        })
    }

    pub(super) async fn pause_task(self: &Arc<Self>, pod: &str, id: &str) -> Result<()> {
        let (_, shim) = self.reach(pod).await?;
        let bound = shim.timeouts().call;
        let done = call(bound, shim.task().pause(bound, wire::PauseRequest { id: id.to_string() })).await;
        done.map(|_| ()).map_err(|e| e.within(&format!("pause container {id}"), bound))
    }

    pub(super) async fn resume_task(self: &Arc<Self>, pod: &str, id: &str) -> Result<()> {
        let (_, shim) = self.reach(pod).await?;
        let bound = shim.timeouts().call;
        let done = call(bound, shim.task().resume(bound, wire::ResumeRequest { id: id.to_string() })).await;
        done.map(|_| ()).map_err(|e| e.within(&format!("resume container {id}"), bound))
    }

    pub(super) async fn update_task(self: &Arc<Self>, pod: &str, id: &str, resources: String) -> Result<()> {
        let (_, shim) = self.reach(pod).await?;
        let bound = shim.timeouts().call;
        let resources = prost_types::Any { type_url: RESOURCES_URL.into(), value: resources.into_bytes() };
        let request = wire::UpdateTaskRequest { id: id.to_string(), resources: Some(resources), ..Default::default() };
        let done = call(bound, shim.task().update(bound, request)).await;
        done.map(|_| ()).map_err(|e| e.within(&format!("update container {id}"), bound))
    }

    pub(super) async fn resize_task(self: &Arc<Self>, pod: &str, id: &str, width: u32, height: u32) -> Result<()> {
        let (_, shim) = self.reach(pod).await?;
        let bound = shim.timeouts().call;
        let request = wire::ResizePtyRequest { id: id.to_string(), exec_id: String::new(), width, height };
        let done = call(bound, shim.task().resize_pty(bound, request)).await;
        done.map(|_| ()).map_err(|e| e.within(&format!("resize the terminal of container {id}"), bound))
    }

    pub(super) async fn close_stdin(self: &Arc<Self>, pod: &str, id: &str) -> Result<()> {
        let (_, shim) = self.reach(pod).await?;
        let bound = shim.timeouts().call;
        let request = wire::CloseIoRequest { id: id.to_string(), exec_id: String::new(), stdin: true };
        let done = call(bound, shim.task().close_io(bound, request)).await;
        done.map(|_| ()).map_err(|e| e.within(&format!("close stdin of container {id}"), bound))
    }

    pub(super) async fn reopen_log(self: &Arc<Self>, pod: &str, id: &str) -> Result<()> {
        let (entry, shim) = self.reach(pod).await?;
        if !shim.can("reopen-log") {
            let task = entry.task(id).ok_or_else(|| Error::not_found(format!("container {id} has no task")))?;
            let logger = task.logger().clone();
            return match logger {
                Some(logger) => logger.reopen().await,
                None => Ok(()),
            };
        }
        let bound = shim.timeouts().call;
        let request = proto::longshore_shim::ReopenLogRequest { id: id.to_string() };
        let done = call(bound, shim.longshore().reopen_log(bound, request)).await;
        done.map(|_| ()).map_err(|e| e.within(&format!("reopen the log of container {id}"), bound))
    }

    pub(super) async fn pids(self: &Arc<Self>, pod: &str, id: &str) -> Result<Vec<u32>> {
        let (_, shim) = self.reach(pod).await?;
        let bound = shim.timeouts().call;
        match call(bound, shim.task().pids(bound, wire::PidsRequest { id: id.to_string() })).await {
            Ok(answer) => Ok(answer.processes.iter().map(|p| p.pid).collect()),
            Err(e) => Err(e.within(&format!("list the processes of container {id}"), bound)),
        }
    }
}

/// Sends a signal to init or an exec; one that is gone is success.
pub(crate) async fn kill(
    shim: &Shim,
    id: &str,
    exec: &str,
    signal: Signal,
    all: bool,
    bound: Duration,
) -> std::result::Result<(), Fault> {
    let request =
        wire::KillRequest { id: id.to_string(), exec_id: exec.to_string(), signal: u32::from(signal.number()), all };
    match call(bound, shim.task().kill(bound, request)).await {
        Ok(_) => Ok(()),
        Err(e) if e.is_not_found() => Ok(()),
        Err(e) => Err(e),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_signal_of_ours_gets_its_reason() {
        let task = Task::new("x");
        *task.killed.lock().unwrap() = Some((Signal::KILL, "StopContainer".into()));
        let dead = |status| Certificate {
            status,
            exited_at: SystemTime::UNIX_EPOCH,
            oom_killed: false,
            oom_cgroup: None,
            killed_by: None,
            peak_memory: None,
        };
        assert_eq!(task.complete(dead(ExitStatus::Signal(9))).killed_by.as_deref(), Some("StopContainer"));
        assert_eq!(task.complete(dead(ExitStatus::Code(0))).killed_by, None);
        assert_eq!(task.complete(dead(ExitStatus::Signal(15))).killed_by, None);
    }
}
