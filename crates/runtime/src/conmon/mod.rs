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

use self::monitor::Version;
use crate::api::{Holdings, PodProcess, PodSpec, RuntimeEvent};
use crate::bundle::{self, Layout, blocking};
use crate::detach::runtime_by;
use crate::ops::Ops;
use exits::Exits;
use oci::Children;
use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use task::{Pod, Task};
use tokio::sync::mpsc::UnboundedSender;
use types::{Error, Result};

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
    /// Those of the monitors that have run an exec.
    versions: Mutex<HashMap<PathBuf, Option<Version>>>,
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
            versions: Mutex::default(),
            ops: Ops::default(),
        };
        Ok(Arc::new(Self { inner: Arc::new(inner) }))
    }

    /// The pid of a container's monitor, where it runs now.
    pub fn monitor_pid(&self, pod: &str, id: &str) -> Option<u32> {
        self.inner.find(pod)?.task(id)?.monitor().filter(|m| !m.has_ended()).map(|m| m.pid())
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

    /// What lies on this node. What the OCI runtime knows beyond bundles is the shim
    /// manager's to look at.
    async fn holdings(&self) -> Result<Holdings> {
        let layout = self.layout.clone();
        blocking(move || Ok(crate::holdings::list(&layout, Path::new("/"), &Default::default()))).await
    }

    fn tell(&self, event: RuntimeEvent) {
        // Nobody listens any more only while the daemon ends.
        let _ = self.events.send(event);
    }

    /// Makes the pod's bundle, where it isn't there.
    async fn start_pod(&self, pod: &PodSpec) -> Result<PodProcess> {
        let monitor = self.cfg.handler(&pod.handler)?.monitor.clone();
        let dir = self.layout.pod(&pod.id);
        let gid = pod.bundle_gid;
        blocking(move || bundle::make_plain_pod(&dir, gid)).await?;
        Ok(PodProcess::Monitors { monitor })
    }
}

runtime_by!(ConmonManager, "make the bundle", "end the containers");
