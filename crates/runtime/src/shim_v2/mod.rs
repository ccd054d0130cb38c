//! The shim manager: one shim per pod, over ttrpc or gRPC (behaviours.md section 3).
//!
//! ```text
//!  ShimManager ── Inner ──┬─ pods: id ─► Pod ── watch<PodState{phase, tasks}>
//!  (trait Runtime)        │                      ▲      phase: Absent ─► Starting ─► Up(Shim)
//!                         │                      │             ▲                      │   │
//!                         │                      │             └──── Burying ◄── died ┘   │ stop
//!                         │                      │                    Gone ◄── Stopping ◄─┘
//!   caller ─► detached() ─┴─► start create task exec stop recover ─► Shim (connection.rs) ─► process
//!                                  ▲
//!   Wait, outstanding per task ────┘──► RuntimeEvent::Exited
//!   pidfd of the shim ───► bury ──────► Exited for each, ShimGone
//! ```
//!
//! A caller may drop its future at any await: all work is done in tasks of the
//! manager's own, which go on to their end. A phase changes synchronously; the
//! one who moved it to Starting, Burying or Stopping does that work, everybody
//! else watches. On-disk layout: `bundle.rs`.

mod bootstrap;
mod bury;
mod config;
mod connection;
mod create;
mod events;
mod exec;
mod foreign;
mod launch;
mod pod;
mod recover;
mod rpc;
mod sandbox;
mod shim;
mod start;
mod stop;
mod task;

pub use config::{Handler, ShimConfig, TaskOptions, Timeouts};
pub use events::publish;

use crate::api::{Holdings, RuntimeEvent};
use crate::bundle::{self, Layout};
use crate::cgroup;
use crate::detach::{detach, runtime_by};
use crate::ops::Ops;
use launch::Binary;
use pod::Pod;
use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use tokio::sync::mpsc::UnboundedSender;
use types::Result;

/// Where our own shim puts its sockets, whose paths must be short, and what it may
/// have made above.
const OUR_SOCKETS: [&str; 2] = ["/run/longshore/s", "/run/longshore"];

/// Runs pods through a shim v2 binary.
pub struct ShimManager {
    inner: Arc<Inner>,
}

struct Inner {
    cfg: ShimConfig,
    layout: Layout,
    /// Asked for at our start: once the file is replaced, the kernel calls it deleted.
    own_binary: PathBuf,
    /// Served once the first foreign shim comes up.
    events_served: tokio::sync::OnceCell<()>,
    cgroups: Vec<PathBuf>,
    events: UnboundedSender<RuntimeEvent>,
    pods: Mutex<HashMap<String, Arc<Pod>>>,
    logs: foreign::Logs,
    ops: Ops,
}

impl ShimManager {
    /// Makes the directories and cgroups that all pods share. Pods of an earlier
    /// daemon are found by [`Runtime::recover`], not here.
    ///
    /// # Errors
    /// The state directory can't be made.
    pub async fn new(cfg: ShimConfig, events: UnboundedSender<RuntimeEvent>) -> Result<Arc<Self>> {
        let layout = Layout::new(cfg.state.clone());
        let (l, cgroup) = (layout.clone(), cfg.shim_cgroup.clone());
        let cgroups = bundle::blocking(move || {
            l.prepare()?;
            Ok(cgroup.as_deref().map(cgroup::prepare).unwrap_or_default())
        })
        .await?;
        let inner = Inner {
            cfg,
            layout,
            own_binary: std::env::current_exe().unwrap_or_else(|_| "longshore".into()),
            events_served: tokio::sync::OnceCell::new(),
            cgroups,
            events,
            pods: Mutex::default(),
            logs: foreign::Logs::default(),
            ops: Ops::default(),
        };
        Ok(Arc::new(Self { inner: Arc::new(inner) }))
    }

    /// The pid of the pod's shim, where it runs now.
    pub fn shim_pid(&self, pod: &str) -> Option<u32> {
        self.inner.find(pod)?.up().map(|s| s.pid)
    }

    /// Before the daemon's end: takes back the cgroup `containers`, which runtimes
    /// make for pods that name none, that of the shims, and the directory of our
    /// shims' sockets, where they are empty.
    pub fn release(&self, containers: &str) {
        for dir in OUR_SOCKETS {
            // One that is not there, or not empty: its shims are still up, or others'.
            let _ = std::fs::remove_dir(dir);
        }
        cgroup::release(containers);
        if let Some(cgroup) = &self.inner.cfg.shim_cgroup {
            cgroup::release(cgroup);
        }
    }

    /// The pids of all processes of a container, as the shim knows them.
    ///
    /// # Errors
    /// `NotFound` for an unknown pod or container; those of the shim.
    pub async fn pids(&self, pod: &str, id: &str) -> Result<Vec<u32>> {
        let (inner, pod, id) = (self.inner.clone(), pod.to_string(), id.to_string());
        self.inner
            .ops
            .detached(format!("list the processes of container {id}"), async move { inner.pids(&pod, &id).await })
            .await
    }
}

impl Inner {
    /// The shim's binary of a handler; where it sends events to is served from then on.
    async fn binary(self: &Arc<Self>, handler: &Handler) -> Binary {
        if !handler.bears_our_name()
            && let Err(e) = self.events_served.get_or_try_init(|| events::serve(self)).await
        {
            tracing::error!(error = %e, "no events of shims: an OOM kill below them will not be told from another");
        }
        Binary::new(handler, &self.cfg.namespace, &self.layout.events(), &self.own_binary)
    }

    /// With what a pod that exists was begun.
    async fn handler_of(&self, pod: &str) -> Result<Handler> {
        let (cfg, dir) = (self.cfg.clone(), self.layout.pod(pod));
        bundle::blocking(move || cfg.handler_of(&dir)).await
    }

    fn pods(&self) -> MutexGuard<'_, HashMap<String, Arc<Pod>>> {
        self.pods.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn find(&self, pod: &str) -> Option<Arc<Pod>> {
        self.pods().get(pod).cloned()
    }

    fn find_or_insert(&self, pod: &str) -> Arc<Pod> {
        self.pods().entry(pod.to_string()).or_insert_with(|| Arc::new(Pod::new(pod))).clone()
    }

    /// Strikes a pod from the table, if the table still means this one.
    fn strike(&self, pod: &Arc<Pod>) {
        let mut pods = self.pods();
        if pods.get(&pod.id).is_some_and(|p| Arc::ptr_eq(p, pod)) {
            pods.remove(&pod.id);
        }
    }

    /// Where the OCI runtimes keep what they know of containers.
    fn runtime_roots(&self) -> std::collections::BTreeSet<PathBuf> {
        self.cfg.handlers.iter().map(|h| h.runtime_root.join(&self.cfg.namespace)).collect()
    }

    /// What lies on this node.
    async fn holdings(self: &Arc<Self>) -> Result<Holdings> {
        let inner = self.clone();
        let list = move || Ok(crate::holdings::list(&inner.layout, &inner.cfg.state, &inner.runtime_roots()));
        bundle::blocking(list).await
    }

    fn tell(&self, event: RuntimeEvent) {
        // Nobody listens any more only while the daemon ends.
        let _ = self.events.send(event);
    }
}

runtime_by!(
    ShimManager,
    "start the shim",
    "stop the shim",
    async fn end_orphan(&self, id: &str) -> Result<()> {
        types::check_identifier("id", id)?;
        detach!(self, format!("end {id}, whose bundle is gone"), inner, [id], inner.end_orphan(&id))
    }
);
