//! The backend of monitors: one conmon per container, ours or the original
//! (behaviours.md section 2). A pod has no process.
//!
//! ```text
//!  ConmonManager ── Inner ─┬─ pods: id ─► Pod ─► Task ── exit, told once
//!  (trait Runtime)         │                      │
//!   caller ─► detached() ──┴► create exec stop …  ├─ init      pidfd ┐
//!                                  │              ├─ monitor   pidfd ├─► watch.rs ─► RuntimeEvent
//!             conmon ◄── monitor.rs┘              └─ exit file inotify┘
//!             runc   ◄── oci::Command             ctl FIFO, attach socket ◄── control.rs, attach.rs
//! ```
//!
//! A caller may drop its future at any await: all work is done in tasks of the
//! backend's own. On disk:
//!
//! ```text
//! <state>/conmon/
//!   exits/<container>                   the exit status, by the monitor
//!   bundles/<pod>/tasks/<container>/
//!     config.json rootfs/               the OCI bundle
//!     monitored.json                    with what it was begun: survives a restart
//!     conmon.pid pidfile                the monitor and the container's init
//!     attach ctl winsz oom              the monitor's
//!     runtime.log                       the OCI runtime's errors
//!     exit.json                         the death certificate, before it is told
//!     execs/<exec>/                     process.json pid runtime.log log of a running
//!                                       ExecSync; what stands here after a restart is killed
//! ```

mod attach;
mod config;
mod control;
mod create;
mod exec;
mod exits;
mod log;
mod monitor;
mod persist;
mod process;
mod recover;
mod stdin;
mod stop;
mod sync;
mod task;
mod watch;

pub use config::{ConmonConfig, Handler, Timeouts};

use crate::api::{
    ExecOutput, ExecSyncSpec, Holdings, PodProcess, PodSpec, RecoverPod, RecoveredPod, Runtime, RuntimeEvent, TaskSpec,
    TaskState,
};
use crate::bundle::{self, Layout, blocking};
use crate::ops::Ops;
use async_trait::async_trait;
use exits::Exits;
use oci::Children;
use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use task::{Pod, Task};
use tokio::sync::mpsc::UnboundedSender;
use types::{Error, Result, Signal};

/// Runs pods through monitors.
pub struct ConmonManager {
    inner: Arc<Inner>,
}

struct Inner {
    cfg: ConmonConfig,
    layout: Layout,
    exits: Arc<Exits>,
    /// Monitors and runtime calls that we have borne; each is reaped by who waits
    /// for it.
    children: Children,
    events: UnboundedSender<RuntimeEvent>,
    pods: Mutex<HashMap<String, Arc<Pod>>>,
    /// Which monitors can hand our streams down to an exec.
    passing: Mutex<HashMap<PathBuf, bool>>,
    ops: Ops,
}

impl ConmonManager {
    /// Makes the directories that all pods share. Pods of an earlier daemon are
    /// found by [`Runtime::recover`], not here.
    ///
    /// # Errors
    /// The directories can't be made or watched.
    pub async fn new(cfg: ConmonConfig, events: UnboundedSender<RuntimeEvent>) -> Result<Arc<Self>> {
        let state = cfg.state.join("conmon");
        let layout = Layout::new(state.clone());
        let l = layout.clone();
        blocking(move || l.prepare()).await?;
        let inner = Inner {
            cfg,
            layout,
            exits: Exits::watch(state.join("exits"))?,
            children: Children::new(),
            events,
            pods: Mutex::default(),
            passing: Mutex::default(),
            ops: Ops::default(),
        };
        Ok(Arc::new(Self { inner: Arc::new(inner) }))
    }

    /// What the backend does now, a sentence each with its age: for people who
    /// wonder what is stuck.
    pub fn waiting(&self) -> Vec<String> {
        self.inner.ops.list()
    }

    /// The pid of a container's monitor, where it runs now.
    pub fn monitor_pid(&self, pod: &str, id: &str) -> Option<u32> {
        self.inner.find(pod)?.task(id)?.monitor().filter(|m| !m.has_ended()).map(|m| m.pid())
    }

    /// Runs `work` to its end, whether or not the caller stays to hear of it.
    async fn detached<T: Send + 'static>(
        &self,
        what: String,
        work: impl Future<Output = Result<T>> + Send + 'static,
    ) -> Result<T> {
        let op = self.inner.ops.begin(what);
        let work = async move {
            let _op = op;
            work.await
        };
        match tokio::spawn(work).await {
            Ok(r) => r,
            Err(e) => Err(Error::internal("an operation of the monitors' backend ended early").because(e)),
        }
    }
}

impl Inner {
    fn pods(&self) -> MutexGuard<'_, HashMap<String, Arc<Pod>>> {
        self.pods.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn find(&self, pod: &str) -> Option<Arc<Pod>> {
        self.pods().get(pod).cloned()
    }

    fn find_or_insert(&self, pod: &str) -> Arc<Pod> {
        self.pods().entry(pod.to_string()).or_insert_with(|| Arc::new(Pod::new(pod))).clone()
    }

    /// A container's task, for calls that need one.
    fn task(&self, pod: &str, id: &str) -> Result<Arc<Task>> {
        let found = self.find(pod).and_then(|p| p.task(id));
        found.ok_or_else(|| Error::not_found(format!("container {id} has no task")))
    }

    fn bundle(&self, pod: &str, id: &str) -> PathBuf {
        self.layout.task(pod, id)
    }

    /// The OCI runtime's state directory.
    fn runtime_root(&self, handler: &Handler) -> PathBuf {
        handler.runtime_root.join(&self.cfg.namespace)
    }

    /// The OCI runtime of a handler; its short-lived files go to `scratch`.
    fn runtime(&self, handler: &Handler, scratch: &Path) -> oci::Command {
        let config = oci::Config {
            root: Some(self.runtime_root(handler)),
            systemd_cgroup: handler.systemd_cgroup,
            deadline: handler.timeouts.call,
            ..oci::Config::new(&handler.runtime_binary, scratch)
        };
        oci::Command::new(config, self.children.clone())
    }

    fn tell(&self, event: RuntimeEvent) {
        // Nobody listens any more only while the daemon ends.
        let _ = self.events.send(event);
    }

    /// Makes the pod's bundle, where it isn't there.
    async fn start_pod(&self, pod: PodSpec) -> Result<PodProcess> {
        let monitor = self.cfg.handler(&pod.handler)?.monitor.clone();
        let dir = self.layout.pod(&pod.id);
        blocking(move || bundle::make_plain_pod(&dir, pod.bundle_gid)).await?;
        Ok(PodProcess::Monitors { monitor })
    }
}

/// Each method clones what it names and works in a task of its own.
macro_rules! detach {
    ($self:ident, $what:expr, $inner:ident, [$($name:ident),*], $work:expr) => {{
        let $inner = $self.inner.clone();
        $(let $name = $name.to_owned();)*
        let what = $what;
        $self.detached(what, async move { $work.await }).await
    }};
}

#[async_trait]
impl Runtime for ConmonManager {
    async fn start_pod(&self, pod: &PodSpec) -> Result<PodProcess> {
        types::check_identifier("pod id", &pod.id)?;
        detach!(self, format!("make the bundle of pod {}", pod.id), inner, [pod], inner.start_pod(pod))
    }

    async fn stop_pod(&self, pod: &str) -> Result<()> {
        types::check_identifier("pod id", pod)?;
        detach!(self, format!("stop pod {pod}"), inner, [pod], inner.stop_pod(&pod))
    }

    async fn create_task(&self, pod: &PodSpec, task: &TaskSpec) -> Result<u32> {
        types::check_identifier("pod id", &pod.id)?;
        types::check_identifier("container id", &task.id)?;
        let what = format!("create container {} in pod {}", task.id, pod.id);
        detach!(self, what, inner, [pod, task], inner.create_task(pod, task))
    }

    async fn start_task(&self, pod: &str, id: &str) -> Result<()> {
        detach!(self, format!("start container {id}"), inner, [pod, id], inner.start_task(&pod, &id))
    }

    async fn kill_task(&self, pod: &str, id: &str, signal: Signal, all: bool, why: &str) -> Result<()> {
        let what = format!("send {signal} to container {id}");
        detach!(self, what, inner, [pod, id, why], inner.kill_task(&pod, &id, signal, all, &why))
    }

    async fn condemn_task(&self, pod: &str, id: &str) -> Result<()> {
        types::check_identifier("pod id", pod)?;
        types::check_identifier("container id", id)?;
        detach!(self, format!("condemn container {id}"), inner, [pod, id], inner.condemn_task(&pod, &id))
    }

    async fn delete_task(&self, pod: &str, id: &str) -> Result<()> {
        types::check_identifier("pod id", pod)?;
        types::check_identifier("container id", id)?;
        detach!(self, format!("delete container {id}"), inner, [pod, id], inner.delete_task(&pod, &id))
    }

    async fn task_state(&self, pod: &str, id: &str) -> Result<TaskState> {
        detach!(self, format!("ask the state of container {id}"), inner, [pod, id], inner.task_state(&pod, &id))
    }

    async fn pause_task(&self, pod: &str, id: &str) -> Result<()> {
        detach!(self, format!("pause container {id}"), inner, [pod, id], inner.pause_task(&pod, &id))
    }

    async fn resume_task(&self, pod: &str, id: &str) -> Result<()> {
        detach!(self, format!("resume container {id}"), inner, [pod, id], inner.resume_task(&pod, &id))
    }

    async fn update_task(&self, pod: &str, id: &str, resources_json: &str) -> Result<()> {
        let what = format!("update container {id}");
        detach!(self, what, inner, [pod, id, resources_json], inner.update_task(&pod, &id, resources_json))
    }

    async fn resize_task(&self, pod: &str, id: &str, width: u32, height: u32) -> Result<()> {
        let what = format!("resize the terminal of container {id}");
        detach!(self, what, inner, [pod, id], inner.resize_task(&pod, &id, width, height))
    }

    async fn close_stdin(&self, pod: &str, id: &str) -> Result<()> {
        detach!(self, format!("close stdin of container {id}"), inner, [pod, id], inner.close_stdin(&pod, &id))
    }

    async fn reopen_log(&self, pod: &str, id: &str) -> Result<()> {
        detach!(self, format!("reopen the log of container {id}"), inner, [pod, id], inner.reopen_log(&pod, &id))
    }

    async fn exec_sync(&self, pod: &str, id: &str, exec: ExecSyncSpec) -> Result<ExecOutput> {
        // Held by this future alone: when the caller drops it, `caller` fails in
        // the task that runs the command.
        let (_here, caller) = tokio::sync::oneshot::channel::<()>();
        detach!(self, format!("exec in container {id}"), inner, [pod, id], inner.exec_sync(&pod, &id, exec, caller))
    }

    fn owns(&self, pod: &str) -> bool {
        self.inner.layout.pod(pod).exists()
    }

    async fn holdings(&self) -> Result<Holdings> {
        let layout = self.inner.layout.clone();
        // What the OCI runtime knows beyond bundles is the shim manager's to look at.
        bundle::blocking(move || Ok(crate::holdings::list(&layout, std::path::Path::new("/"), &Default::default())))
            .await
    }

    async fn recover(&self, pods: Vec<RecoverPod>) -> Vec<Result<RecoveredPod>> {
        let inner = self.inner.clone();
        match self.detached("find the pods again".into(), async move { Ok(inner.recover(pods).await) }).await {
            Ok(found) => found,
            Err(e) => vec![Err(e)],
        }
    }
}
