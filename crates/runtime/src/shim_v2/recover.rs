//! Pods found again after a restart of the daemon.
//!
//! Every bundle is visited at the same time as all others, each under its own
//! bounds; what fails is that pod's result alone.

use super::Inner;
use super::bury::Buried;
use super::config::{Handler, Timeouts};
use super::pod::Pod;
use super::rpc::{Fault, call};
use super::shim::Shim;
use super::task::Task;
use crate::api::{PodProcess, RecoverPod, RecoveredPod, TaskState};
use crate::bundle::{self, blocking};
use crate::detach::{visit_containers, visit_pods};
use proto::containerd::task::v3 as wire;
use std::sync::Arc;
use types::{ErrorKind, ExitStatus, Result};

/// After so long a Wait that was refused has been answered.
const SETTLED: std::time::Duration = std::time::Duration::from_millis(500);

impl Inner {
    pub(super) async fn recover(self: &Arc<Self>, pods: Vec<RecoverPod>) -> Vec<Result<RecoveredPod>> {
        let bound = self.cfg.handler("").map_or_else(|_| Timeouts::default().load, |h| h.timeouts.load);
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
        visit_pods(lie, pods, bound, find, end).await
    }

    async fn recover_pod(self: &Arc<Self>, asked: RecoverPod) -> Result<RecoveredPod> {
        let id = asked.spec.id;
        if !self.layout.pod(&id).exists() {
            let containers = asked.containers.into_iter().map(|c| (c, None)).collect();
            return Ok(RecoveredPod { id, process: None, containers });
        }
        let pod = self.find_or_insert(&id);
        let shim = match pod.shim(self).await {
            Ok(shim) => Some(shim),
            Err(e) if e.is_not_found() => None,
            Err(e) => return Err(e),
        };
        let visit = |container: String, wanted| {
            let (inner, pod, shim) = (self.clone(), pod.clone(), shim.clone());
            async move {
                match shim {
                    Some(shim) => inner.recover_task(&pod, &shim, &container, wanted).await,
                    None => Ok(inner.recover_dead(&pod, &container, wanted).await),
                }
            }
        };
        let containers = visit_containers(&id, self.known_tasks(&pod), &asked.containers, visit).await?;
        let process = shim.map(|s| PodProcess::Shim { pid: s.pid, own: s.own() });
        Ok(RecoveredPod { id, process, containers })
    }

    /// Takes over what an earlier daemon made: each task whose bundle lies there
    /// is watched from now on, its log goes on, and execs that nobody waits for
    /// any more are killed.
    pub(super) async fn adopt(self: &Arc<Self>, pod: &Arc<Pod>, shim: &Arc<Shim>) {
        self.adopt_sandbox(pod, shim);
        for id in bundle::list(&self.layout.tasks(&pod.id)) {
            if pod.task(&id).is_some() {
                continue;
            }
            let task = Arc::new(Task::adopted(&id));
            if bundle::is_condemned(&self.layout.task(&pod.id, &id)) {
                task.condemn();
            }
            if !shim.can("cri-log") {
                match self.logs.resume(&self.layout.task(&pod.id, &id)).await {
                    Ok(logger) => task.set_logger(logger),
                    Err(e) => tracing::warn!(container = id, error = %e, "its log does not go on"),
                }
            }
            pod.update(|s| s.tasks.insert(id.clone(), task.clone()));
            self.watch_task(pod, shim, &task);
            let (inner, pod, shim) = (self.clone(), pod.clone(), shim.clone());
            // Listed now: an exec that begins after the recovery is none of these.
            let old = self.old_execs(&pod, &id);
            tokio::spawn(async move { inner.end_old_execs(&pod, &shim, &id, old).await });
        }
    }

    /// Whether the OCI runtime has a container of this name: it keeps a directory for
    /// each, from before the first process to its delete.
    async fn is_known_to_runtime(&self, pod: &str, id: &str) -> bool {
        let Ok(handler) = self.handler_of(pod).await else { return false };
        handler.runtime_root.join(&self.cfg.namespace).join(id).exists()
    }

    /// Whether what has ended with 1 is the OCI runtime's own init, which had not become
    /// the command yet. Go's shim kills its call of `start` when the connection that asked
    /// for it breaks, and an init that meets nobody at its FIFO any more gives up. The
    /// runtime removes that FIFO when a start has gone through.
    fn never_ran(&self, handler: &Handler, id: &str) -> bool {
        handler.runtime_root.join(&self.cfg.namespace).join(id).join("exec.fifo").exists()
    }

    /// Takes down what counts as never made, or belongs to no record.
    pub(super) async fn undo(self: &Arc<Self>, pod: &Arc<Pod>, shim: &Arc<Shim>, id: &str) -> Result<()> {
        self.condemn_task(&pod.id, id).await?;
        self.kill_and_delete(pod, shim, id).await?;
        let dir = self.layout.task(&pod.id, id);
        if dir.exists()
            && self.is_known_to_runtime(&pod.id, id).await
            && let Some(left) = self.bury_task(&pod.id, id).await.left
        {
            return Err(left);
        }
        pod.update(|s| s.tasks.remove(id));
        blocking(move || bundle::remove_task(&dir)).await
    }

    /// A container of a shim that lives.
    async fn recover_task(
        self: &Arc<Self>,
        pod: &Arc<Pod>,
        shim: &Arc<Shim>,
        id: &str,
        wanted: bool,
    ) -> Result<Option<TaskState>> {
        let dir = self.layout.task(&pod.id, id);
        if !wanted || bundle::is_condemned(&dir) {
            self.undo(pod, shim, id).await?;
            return Ok(None);
        }
        let state = match self.ask_state(pod, shim, id).await {
            Ok(state) => state,
            Err(e) if e.is_not_found() => return self.recover_unknown(pod, shim, id).await,
            // The shim still creates it for a daemon that has died: nobody has been
            // told that it came up, and whoever asked for its start asks again.
            Err(e) if e.kind() == ErrorKind::FailedPrecondition => {
                self.undo(pod, shim, id).await?;
                return Ok(None);
            }
            Err(e) => return Err(e),
        };
        if let TaskState::Stopped(end) = &state
            && end.status == ExitStatus::Code(1)
            && !shim.own()
            && self.never_ran(&shim.handler, id)
        {
            tracing::info!(pod = pod.id, container = id, "its start was broken off with the daemon that asked for it");
            self.undo(pod, shim, id).await?;
            return Ok(None);
        }
        if let Some(task) = pod.task(id)
            && !matches!(state, TaskState::Stopped(_))
            && !shim.is_sandbox(id)
        {
            // The Wait of `adopt` may have come before the task was there.
            let inner = self.clone();
            let (pod, shim) = (pod.clone(), shim.clone());
            tokio::spawn(async move {
                tokio::time::sleep(SETTLED).await;
                if !task.is_watched() && task.exit().is_none() && pod.task(&task.id).is_some() {
                    inner.watch_task(&pod, &shim, &task);
                }
            });
        }
        Ok(Some(state))
    }

    /// A container of which its shim knows nothing, or whose shim has just died.
    async fn recover_unknown(
        self: &Arc<Self>,
        pod: &Arc<Pod>,
        shim: &Arc<Shim>,
        id: &str,
    ) -> Result<Option<TaskState>> {
        let dir = self.layout.task(&pod.id, id);
        let bound = shim.timeouts().state;
        let request = wire::StateRequest { id: id.to_string(), exec_id: String::new() };
        let dead = match call(bound, shim.task().state(bound, request)).await {
            Err(e @ (Fault::Closed | Fault::Late)) => {
                if shim.outlives_connection().await {
                    return Err(e.within(&format!("ask for container {id}"), bound));
                }
                true
            }
            _ => false,
        };
        // It was deleted, or died with an earlier shim, and only its bundle still tells how.
        if dead || !dir.exists() || bundle::certificate(&dir).is_some() {
            return Ok(self.recover_dead(pod, id, true).await);
        }
        // It was never made; or only now, for the shim had yet to read the Create of a
        // daemon that died.
        self.undo(pod, shim, id).await?;
        Ok(None)
    }

    /// A container whose shim is dead, or that died with an earlier one. `None`
    /// where it was never made.
    pub(super) async fn recover_dead(self: &Arc<Self>, pod: &Arc<Pod>, id: &str, wanted: bool) -> Option<TaskState> {
        let dir = self.layout.task(&pod.id, id);
        if !dir.exists() {
            return None;
        }
        let known = self.is_known_to_runtime(&pod.id, id).await;
        let made = !bundle::is_condemned(&dir) && (known || bundle::certificate(&dir).is_some());
        let Buried { certificate, left } = self.bury_task(&pod.id, id).await;
        if wanted && made {
            return pod.update(|s| {
                let task = s.tasks.entry(id.to_string()).or_insert_with(|| Arc::new(Task::new(id)));
                task.note_left(left.is_some());
                Some(TaskState::Stopped(task.bury(certificate)))
            });
        }
        pod.update(|s| s.tasks.remove(id));
        if left.is_some() {
            // The bundle leads the pod's end to it.
            return None;
        }
        if let Err(e) = blocking(move || bundle::remove_task(&dir)).await {
            tracing::warn!(pod = pod.id, container = id, error = %e, "a dead container's bundle stays");
        }
        None
    }
}
