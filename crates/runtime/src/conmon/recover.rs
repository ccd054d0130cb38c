//! Containers found again after a restart of the daemon: from pid files, exit files
//! and the runtime's `state`.
//!
//! Every bundle is visited at the same time as all others, each under its own
//! bounds; what fails is that pod's result alone.
//!
//! ```text
//!  certificate or exit file ──────────────► stopped
//!  state says created, running, paused ───► its pid is held, and asked for once more
//!     monitor alive ──► watched on          monitor dead ──► killed, 137
//!  no such container ─► an attempt to create it: ended, undone
//! ```

use super::Inner;
use super::create::monitor_of;
use super::monitor;
use super::persist::Record;
use super::process::{Process, pid_file};
use super::task::{EXIT_BOUND, Pod, Task};
use crate::api::{PodProcess, RecoverPod, RecoveredPod, TaskState};
use crate::bundle::{self, blocking};
use crate::detach::{visit_containers, visit_pods};
use oci::Runtime as _;
use std::path::Path;
use std::sync::Arc;
use tokio::sync::watch;
use types::{Error, Result};

/// Where the containers of a pod wait until all have been looked at and are held: one
/// that is then killed may be the init of the others, whose ends nobody else would see.
struct Gate {
    looking: Arc<watch::Sender<()>>,
    looked: watch::Receiver<()>,
}

impl Gate {
    /// Goes on when nobody looks any more; who gives up lets the others go on.
    async fn pass(self) {
        let Self { looking, mut looked } = self;
        drop(looking);
        while looked.changed().await.is_ok() {}
    }
}

impl Inner {
    pub(super) async fn recover(self: &Arc<Self>, pods: Vec<RecoverPod>) -> Vec<Result<RecoveredPod>> {
        if let Some(parent) = self.cfg.monitor_cgroup.clone() {
            let swept = blocking(move || {
                monitor::sweep_cgroups(&parent);
                Ok(())
            });
            tokio::spawn(swept);
        }
        let lie = self.holdings().await.unwrap_or_default().pods;
        let (finder, ender) = (self.clone(), self.clone());
        let find = move |pod| {
            let inner = finder.clone();
            async move { inner.recover_pod(pod).await }
        };
        let end = move |id: String| {
            let inner = ender.clone();
            async move { inner.stop_pod(&id).await }
        };
        visit_pods(lie, pods, super::Timeouts::default().cleanup, find, end).await
    }

    async fn recover_pod(self: &Arc<Self>, asked: RecoverPod) -> Result<RecoveredPod> {
        let id = asked.spec.id;
        if !self.layout.pod(&id).exists() {
            let containers = asked.containers.into_iter().map(|c| (c, None)).collect();
            return Ok(RecoveredPod { id, process: None, containers });
        }
        let pod = self.find_or_insert(&id);
        let (looking, looked) = watch::channel(());
        let (me, looking) = (self.clone(), Arc::new(looking));
        let visit = move |container: String, wanted| {
            let (inner, pod) = (me.clone(), pod.clone());
            let gate = Gate { looking: looking.clone(), looked: looked.clone() };
            async move { inner.recover_task(&pod, &container, wanted, gate).await }
        };
        let containers = visit_containers(&id, self.known_tasks(&id), &asked.containers, visit).await?;
        let monitor = self.cfg.handler(&asked.spec.handler).map(|h| h.monitor.clone()).unwrap_or_default();
        Ok(RecoveredPod { id, process: Some(PodProcess::Monitors { monitor }), containers })
    }

    /// A container whose bundle may lie there. `None` where it was never made.
    async fn recover_task(
        self: &Arc<Self>,
        pod: &Arc<Pod>,
        id: &str,
        wanted: bool,
        gate: Gate,
    ) -> Result<Option<TaskState>> {
        let dir = self.bundle(&pod.id, id);
        if !dir.exists() {
            return Ok(None);
        }
        if bundle::is_condemned(&dir) {
            gate.pass().await;
            self.remove_leftovers(&pod.id, id).await?;
            return Ok(None);
        }
        let record = match Record::load(&dir) {
            Ok(record) => Record { handler: self.cfg.today(record.handler), ..record },
            Err(e) => {
                if !e.is_not_found() {
                    tracing::warn!(container = id, error = %e, "it is taken down");
                }
                gate.pass().await;
                self.remove_leftovers(&pod.id, id).await?;
                return Ok(None);
            }
        };
        let task = Arc::new(Task::new(id, record));
        if let Some(exit) = bundle::certificate(&dir) {
            task.set_live(self.live(&dir, &task, monitor_of(&dir)?.map(Arc::new), None));
            task.end(exit.clone());
            pod.tasks().insert(id.to_string(), task);
            if !wanted {
                self.delete_task(&pod.id, id).await?;
                return Ok(None);
            }
            return Ok(Some(TaskState::Stopped(exit)));
        }
        let state = self.adopt(pod, &dir, &task, gate).await?;
        if !wanted {
            self.end_task(&pod.id, id, "a container of no record").await?;
            return Ok(None);
        }
        Ok(state)
    }

    /// Takes over a container whose end is not recorded.
    async fn adopt(
        self: &Arc<Self>,
        pod: &Arc<Pod>,
        dir: &Path,
        task: &Arc<Task>,
        gate: Gate,
    ) -> Result<Option<TaskState>> {
        let runtime = self.runtime(&task.record.handler, dir);
        let monitor = monitor_of(dir)?;
        let state = runtime.state(&task.id).await;
        let told = self.exits.look(&task.id).is_some();
        let mut init = None;
        let mut status = String::new();
        match &state {
            Ok(found) => {
                status.clone_from(&found.status);
                if found.status != "stopped" && found.pid > 0 {
                    init = self.hold_again(&runtime, task, u32::try_from(found.pid).unwrap_or(0)).await?;
                }
            }
            // Half made by a daemon that died in between, or deleted already.
            Err(e) if e.is_not_found() && !told => {
                gate.pass().await;
                self.remove_leftovers(&pod.id, &task.id).await?;
                return Ok(None);
            }
            // Stopped, as far as anybody can tell: its exit status is awaited.
            Err(e) => {
                tracing::warn!(container = task.id, error = %e, "its state is taken from its files");
                init = self.hold_by_file(dir, monitor.as_ref())?;
                status = if init.is_some() { "running".into() } else { "stopped".into() };
            }
        }
        gate.pass().await;
        if status == "creating" {
            self.remove_leftovers(&pod.id, &task.id).await?;
            return Ok(None);
        }
        let pid = init.as_ref().map(Process::pid);
        let orphan = monitor.is_none();
        task.set_live(self.live(dir, task, monitor.map(Arc::new), init));
        task.set_paused(status == "paused");
        pod.tasks().insert(task.id.clone(), task.clone());
        self.watch_task(pod, task);
        self.end_old_execs(&pod.id, &task.id).await;
        match pid {
            // Without a monitor its watcher is about to end it.
            Some(pid) if !orphan && !told => Ok(Some(match status.as_str() {
                "created" => TaskState::Created,
                "paused" => TaskState::Paused { pid },
                _ => TaskState::Running { pid },
            })),
            _ => {
                let bound = EXIT_BOUND * 2 + task.record.handler.timeouts.cleanup;
                match tokio::time::timeout(bound, task.ended()).await {
                    Ok(Some(exit)) => Ok(Some(TaskState::Stopped(exit))),
                    _ => Err(Error::deadline(format!("container {} does not end within {bound:?}", task.id))),
                }
            }
        }
    }

    /// Holds init: between two words of the runtime that agree, so that it can be
    /// nobody else.
    async fn hold_again(&self, runtime: &oci::Command, task: &Task, pid: u32) -> Result<Option<Process>> {
        let Some(process) = Process::open(pid, || true)? else { return Ok(None) };
        let again = runtime.state(&task.id).await;
        let same = again.is_ok_and(|s| s.status != "stopped" && u32::try_from(s.pid) == Ok(pid));
        Ok(same.then_some(process))
    }

    /// Holds init by its pid file, where it is the monitor's child.
    fn hold_by_file(&self, dir: &Path, monitor: Option<&Process>) -> Result<Option<Process>> {
        let (Some(pid), Some(monitor)) = (pid_file(&monitor::init_pid_file(dir)), monitor) else { return Ok(None) };
        Process::open(pid, || super::process::parent(pid) == Some(monitor.pid()))
    }
}
