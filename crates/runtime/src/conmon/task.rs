//! A container in the backend's table: started, killed, asked, deleted.

use super::Inner;
use super::exits;
use super::persist::Record;
use super::process::{Process, kill_tree};
use super::stdin::Feed;
use crate::api::TaskState;
use crate::bundle::{self, blocking};
use crate::ops::step;
use oci::Runtime as _;
use oci::cgroup::Cgroup;
use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;
use tokio::sync::{Notify, Semaphore, watch};
use types::{Certificate, Error, ErrorKind, ExitStatus, Result, Signal};

/// How many execs of a pod may be starting at once: more would only make each of
/// them slower.
const STARTS: usize = 8;
/// How long the exit status is waited for once init is known to be dead: the
/// original's back-off of 500 ms, six times by 1.2, in sum.
pub(crate) const EXIT_BOUND: Duration = Duration::from_millis(3700);

/// A pod in the table.
pub(crate) struct Pod {
    pub(crate) id: String,
    tasks: Mutex<HashMap<String, Arc<Task>>>,
    /// Passed by exec starts.
    pub(crate) starts: Semaphore,
}

impl Pod {
    pub(crate) fn new(id: &str) -> Self {
        Self { id: id.to_string(), tasks: Mutex::default(), starts: Semaphore::new(STARTS) }
    }

    pub(crate) fn tasks(&self) -> MutexGuard<'_, HashMap<String, Arc<Task>>> {
        self.tasks.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn task(&self, id: &str) -> Option<Arc<Task>> {
        self.tasks().get(id).cloned()
    }
}

/// A container.
pub(crate) struct Task {
    pub(crate) id: String,
    pub(crate) record: Record,
    /// Rung to end a create that is under way.
    pub(crate) cancel: Notify,
    /// What there is of it once it has been created.
    live: OnceLock<Live>,
    exit: watch::Sender<Option<Certificate>>,
    /// The last signal that was sent, and why.
    killed: Mutex<Option<(Signal, String)>>,
    paused: AtomicBool,
    /// It counts as never made: nobody is told of its end.
    condemned: AtomicBool,
}

/// The processes of a container that has been created.
pub(crate) struct Live {
    /// Its init; `None` where it was gone before it could be held.
    pub(crate) init: Option<Process>,
    /// Its monitor; `None` where it is dead.
    pub(crate) monitor: Option<Arc<Process>>,
    pub(crate) cgroup: Cgroup,
    pub(crate) stdin: Option<Feed>,
}

impl Task {
    pub(crate) fn new(id: &str, record: Record) -> Self {
        Self {
            id: id.to_string(),
            record,
            cancel: Notify::new(),
            live: OnceLock::new(),
            exit: watch::Sender::new(None),
            killed: Mutex::default(),
            paused: AtomicBool::new(false),
            condemned: AtomicBool::new(false),
        }
    }

    /// What there is of it; `None` while it is being made.
    pub(crate) fn live(&self) -> Option<&Live> {
        self.live.get()
    }

    pub(crate) fn set_live(&self, live: Live) {
        // Set once, by its maker or its finder.
        let _ = self.live.set(live);
    }

    pub(crate) fn init(&self) -> Option<&Process> {
        self.live()?.init.as_ref()
    }

    pub(crate) fn monitor(&self) -> Option<Arc<Process>> {
        self.live()?.monitor.clone()
    }

    pub(crate) fn exit(&self) -> Option<Certificate> {
        self.exit.borrow().clone()
    }

    /// Its end; may be dropped and called again.
    pub(crate) async fn ended(&self) -> Option<Certificate> {
        let mut exit = self.exit.subscribe();
        let found = exit.wait_for(Option::is_some).await.ok()?;
        found.clone()
    }

    /// Records an end. True the first time.
    pub(crate) fn end(&self, certificate: Certificate) -> bool {
        self.exit.send_if_modified(|exit| {
            let first = exit.is_none();
            if first {
                *exit = Some(certificate);
            }
            first
        })
    }

    pub(crate) fn is_condemned(&self) -> bool {
        self.condemned.load(Ordering::SeqCst)
    }

    pub(crate) fn set_paused(&self, paused: bool) {
        self.paused.store(paused, Ordering::SeqCst);
    }

    /// Whether signals would only wait in it.
    fn is_frozen(&self) -> bool {
        let told = |c: &Cgroup| {
            let read = |p: std::path::PathBuf| std::fs::read_to_string(p).unwrap_or_default();
            let v1 = c.v1("freezer").map(|d| read(d.join("freezer.state")));
            let v2 = c.v2().map(|d| read(d.join("cgroup.freeze")));
            v1.is_some_and(|s| s.starts_with("FR")) || v2.is_some_and(|s| s.trim() == "1")
        };
        self.paused.load(Ordering::SeqCst) || self.live().is_some_and(|l| told(&l.cgroup))
    }

    fn killed(&self) -> MutexGuard<'_, Option<(Signal, String)>> {
        self.killed.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What is recorded of a death that nobody has told the status of: what is known of
    /// it, or that we have killed it.
    pub(crate) fn of_death(&self, known: Option<ExitStatus>) -> ExitStatus {
        let by_us = matches!(&*self.killed(), Some((Signal::KILL, _)));
        known.unwrap_or(if by_us { ExitStatus::Signal(9) } else { ExitStatus::Unknown(255) })
    }

    /// Adds who sent the deadly signal, where that was us.
    pub(crate) fn complete(&self, mut certificate: Certificate) -> Certificate {
        if let ExitStatus::Signal(n) = certificate.status
            && certificate.killed_by.is_none()
            && let Some((signal, why)) = &*self.killed()
            && signal.number() == n
        {
            certificate.killed_by = Some(why.clone());
        }
        certificate
    }
}

impl Inner {
    /// A container's OCI runtime.
    fn runtime_of(&self, pod: &str, task: &Task) -> oci::Command {
        self.runtime(&task.record.handler, &self.bundle(pod, &task.id))
    }

    pub(super) async fn start_task(&self, pod: &str, id: &str) -> Result<()> {
        let task = self.task(pod, id)?;
        step("the runtime's start", self.runtime_of(pod, &task).start(id)).await
    }

    /// Sends a signal to init, held by its pidfd. One that is gone is success.
    pub(super) async fn kill_task(&self, pod: &str, id: &str, signal: Signal, all: bool, why: &str) -> Result<()> {
        let Ok(task) = self.task(pod, id) else { return Ok(()) };
        if task.exit().is_some() {
            return Ok(());
        }
        let live = task.live().or_else(|| {
            *task.killed() = Some((signal, why.to_string()));
            // Still being created: what can be ended of it is the attempt.
            if signal == Signal::KILL {
                task.cancel.notify_one();
            }
            // Nobody takes that from an attempt that has succeeded meanwhile.
            task.live()
        });
        let Some(live) = live else { return Ok(()) };
        if live.init.as_ref().is_none_or(Process::has_ended) {
            return Ok(());
        }
        *task.killed() = Some((signal, why.to_string()));
        // A frozen process would not even die of SIGKILL.
        if task.is_frozen()
            && let Err(e) = step("the runtime's resume", self.runtime_of(pod, &task).resume(id)).await
        {
            tracing::warn!(container = id, error = %e, "can't be thawed for {signal}");
        }
        task.set_paused(false);
        if let Some(init) = &live.init {
            init.signal(signal)?;
        }
        if all {
            live.cgroup.signal_all(signal);
        }
        Ok(())
    }

    /// The mark in memory and in the bundle, before anything of it is undone.
    pub(super) async fn condemn_task(&self, pod: &str, id: &str) -> Result<()> {
        if let Ok(task) = self.task(pod, id) {
            task.condemned.store(true, Ordering::SeqCst);
        }
        let dir = self.bundle(pod, id);
        blocking(move || bundle::condemn(&dir)).await
    }

    /// The state by the runtime's word, and by that of init's pidfd.
    pub(super) async fn task_state(&self, pod: &str, id: &str) -> Result<TaskState> {
        let task = self.task(pod, id)?;
        if let Some(exit) = task.exit() {
            return Ok(TaskState::Stopped(exit));
        }
        let Some(live) = task.live() else {
            return Err(Error::precondition(format!("container {id} is being created")));
        };
        let state = step("the runtime's state", self.runtime_of(pod, &task).state(id)).await;
        let alive = live.init.as_ref().filter(|p| !p.has_ended()).map(Process::pid);
        match (state, alive) {
            (Ok(state), Some(pid)) => match state.status.as_str() {
                "creating" | "created" => Ok(TaskState::Created),
                "paused" => Ok(TaskState::Paused { pid }),
                _ => Ok(TaskState::Running { pid }),
            },
            // A runtime that can't be asked has killed nobody.
            (Err(e), Some(pid)) => {
                tracing::warn!(container = id, error = %e, "the state is taken from its process");
                Ok(TaskState::Running { pid })
            }
            // It has stopped: its watcher waits for the exit status, bounded.
            (_, None) => match step("its exit file", task.ended()).await {
                Some(exit) => Ok(TaskState::Stopped(exit)),
                None => Err(Error::internal(format!("container {id} is being removed"))),
            },
        }
    }

    pub(super) async fn pause_task(&self, pod: &str, id: &str) -> Result<()> {
        let task = self.task(pod, id)?;
        step("the runtime's pause", self.runtime_of(pod, &task).pause(id)).await?;
        task.set_paused(true);
        Ok(())
    }

    pub(super) async fn resume_task(&self, pod: &str, id: &str) -> Result<()> {
        let task = self.task(pod, id)?;
        step("the runtime's resume", self.runtime_of(pod, &task).resume(id)).await?;
        task.set_paused(false);
        Ok(())
    }

    pub(super) async fn update_task(&self, pod: &str, id: &str, resources: String) -> Result<()> {
        let task = self.task(pod, id)?;
        step("the runtime's update", self.runtime_of(pod, &task).update(id, resources.as_bytes())).await
    }

    /// Frees a dead container; unknown ones are success.
    pub(super) async fn delete_task(self: &Arc<Self>, pod: &str, id: &str) -> Result<()> {
        let Ok(task) = self.task(pod, id) else {
            let dir = self.bundle(pod, id);
            if dir.exists() {
                return self.remove_leftovers(pod, id).await;
            }
            return Ok(());
        };
        if task.live().is_none() && task.exit().is_none() {
            return Err(Error::precondition(format!("delete container {id}: it is being created")));
        }
        if task.exit().is_none() {
            if task.init().is_some_and(|i| !i.has_ended()) {
                return Err(Error::precondition(format!("delete container {id}: it is not stopped")));
            }
            // Its watcher records the end before anything of it goes.
            let _ = step("its exit file", tokio::time::timeout(EXIT_BOUND * 2, task.ended())).await;
        }
        self.free(pod, &task).await?;
        if let Some(pod) = self.find(pod) {
            pod.tasks().remove(id);
        }
        Ok(())
    }

    /// The runtime's delete and the monitor; then mounts and files.
    pub(super) async fn free(&self, pod: &str, task: &Task) -> Result<()> {
        let (id, dir) = (&task.id, self.bundle(pod, &task.id));
        let mut errors = Vec::new();
        match step("the runtime's delete", self.runtime_of(pod, task).delete(id, true)).await {
            Err(e) if !e.is_not_found() => errors.push(e),
            _ => {}
        }
        self.end_monitor(id, &task.record, task.monitor().as_deref()).await;
        // Its files lead the next attempt to a container that the runtime has not deleted.
        if errors.is_empty() {
            errors.extend(self.exits.forget(id).err());
            errors.extend(blocking(move || forget_mounts(&dir)).await.err());
        }
        Error::join(&format!("delete container {id}"), errors)
    }

    /// Awaits a monitor's end, which follows its container's, or makes it; its cgroup
    /// goes afterwards.
    async fn end_monitor(&self, id: &str, record: &Record, monitor: Option<&Process>) {
        let bound = record.handler.timeouts.cleanup;
        if let Some(monitor) = monitor
            && !step("the end of its monitor", monitor.ended_within(bound)).await
        {
            tracing::warn!(
                container = id,
                pid = monitor.pid(),
                "the monitor outlives its container by {bound:?} and is killed"
            );
            if !kill_tree(monitor, bound).await {
                tracing::error!(container = id, pid = monitor.pid(), "the monitor does not die of SIGKILL");
            }
        }
        if !record.handler.systemd_cgroup {
            // Nobody waits for it: as a zombie the monitor is in it still.
            let (parent, id) = (self.cfg.monitor_cgroup.clone(), id.to_string());
            tokio::spawn(async move { super::monitor::remove_cgroup(parent.as_deref(), &id).await });
        }
    }

    /// Waits for the end that init's death brings, for whoever has just killed it.
    ///
    /// # Errors
    /// `DeadlineExceeded` where it doesn't come.
    pub(super) async fn await_end(&self, task: &Task) -> Result<()> {
        let bound = task.record.handler.timeouts.cleanup + EXIT_BOUND;
        match step("its exit file", tokio::time::timeout(bound, task.ended())).await {
            Ok(_) => Ok(()),
            Err(_) => Err(Error::new(
                ErrorKind::DeadlineExceeded,
                format!("container {} has not died {bound:?} after SIGKILL", task.id),
            )),
        }
    }
}

/// The root file system's mounts, its mapped layers, and the bundle.
pub(crate) fn forget_mounts(dir: &std::path::Path) -> Result<()> {
    let mut errors: Vec<Error> = oci::idmap::forget(dir).err().into_iter().collect();
    errors.extend(bundle::remove_task(dir).err());
    Error::join(&format!("remove {}", dir.display()), errors)
}

/// What is said of a container whose monitor has left an exit file that says nothing.
pub(crate) fn no_status(reason: &str) -> String {
    exits::unreadable(reason).to_string()
}
