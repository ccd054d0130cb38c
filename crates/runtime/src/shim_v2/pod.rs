//! A pod's shim: started, found again, watched, buried, stopped.

use super::Inner;
use super::bootstrap::Bootstrap;
use super::bundle::{self, blocking};
use super::launch;
use super::shim::Shim;
use super::task::Task;
use crate::api::{PodProcess, PodSpec, RuntimeEvent};
use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;
use tokio::net::unix::pipe::Receiver;
use tokio::sync::{Semaphore, watch};
use tokio::task::JoinSet;
use types::{Certificate, Error, ErrorKind, ExitStatus, Result};

/// How many calls that run the OCI runtime one pod may have under way: more
/// would only make each of them slower.
const RUNTIME_CALLS: usize = 8;
/// How long the death of a shim is awaited after SIGKILL.
const AFTER_KILL: Duration = Duration::from_secs(2);

/// A pod in the manager's table.
pub(crate) struct Pod {
    pub(crate) id: String,
    state: watch::Sender<PodState>,
    /// Passed by exec starts.
    pub(crate) runtime_calls: Semaphore,
}

/// What changes about it.
pub(crate) struct PodState {
    pub(crate) phase: Phase,
    pub(crate) tasks: HashMap<String, Arc<Task>>,
}

/// Where its shim is in its life.
pub(crate) enum Phase {
    /// No shim is known; its bundle may name one to load.
    Absent,
    /// It is being loaded or started.
    Starting,
    /// It runs.
    Up(Arc<Shim>),
    /// It has died; what it left is being cleaned up.
    Burying,
    /// It is being shut down.
    Stopping,
    /// The pod is stopped and no longer in the table.
    Gone,
}

enum Turn<T> {
    Take(T),
    Wait,
}

impl Pod {
    pub(crate) fn new(id: &str) -> Self {
        let state = PodState { phase: Phase::Absent, tasks: HashMap::new() };
        Self { id: id.to_string(), state: watch::Sender::new(state), runtime_calls: Semaphore::new(RUNTIME_CALLS) }
    }

    /// Changes the state and wakes all who watch it.
    pub(crate) fn update<T>(&self, change: impl FnOnce(&mut PodState) -> T) -> T {
        let mut out = None;
        self.state.send_modify(|s| out = Some(change(s)));
        match out {
            Some(t) => t,
            None => unreachable!("send_modify calls its argument"),
        }
    }

    /// Looks at the state.
    pub(crate) fn look<T>(&self, look: impl FnOnce(&PodState) -> T) -> T {
        look(&self.state.borrow())
    }

    pub(crate) fn task(&self, id: &str) -> Option<Arc<Task>> {
        self.look(|s| s.tasks.get(id).cloned())
    }

    pub(crate) fn up(&self) -> Option<Arc<Shim>> {
        self.look(|s| match &s.phase {
            Phase::Up(shim) => Some(shim.clone()),
            _ => None,
        })
    }

    /// Waits until `turn` takes its chance; each change of the state is one.
    async fn turn<T>(&self, mut turn: impl FnMut(&mut PodState) -> Turn<T>) -> T {
        let mut changes = self.state.subscribe();
        loop {
            changes.mark_unchanged();
            let mut taken = None;
            self.state.send_if_modified(|s| match turn(s) {
                Turn::Take(t) => {
                    taken = Some(t);
                    true
                }
                Turn::Wait => false,
            });
            match taken {
                Some(t) => return t,
                // The sender lives in `self`, so this never fails.
                None => drop(changes.changed().await),
            }
        }
    }

    /// The shim that runs, for calls that start none. One that died or changes is
    /// waited for.
    pub(crate) async fn shim(self: &Arc<Self>, inner: &Arc<Inner>) -> Result<Arc<Shim>> {
        self.ensure(inner, None).await
    }

    /// The shim, loaded or started where none runs. Without a `spec` none is
    /// started.
    pub(crate) async fn ensure(self: &Arc<Self>, inner: &Arc<Inner>, spec: Option<&PodSpec>) -> Result<Arc<Shim>> {
        let found = self
            .turn(|s| match &s.phase {
                // Its watcher has not come to it yet, but will.
                Phase::Up(shim) if shim.is_dead() => Turn::Wait,
                Phase::Up(shim) => Turn::Take(Ok(Some(shim.clone()))),
                Phase::Absent => {
                    s.phase = Phase::Starting;
                    Turn::Take(Ok(None))
                }
                Phase::Starting | Phase::Burying | Phase::Stopping => Turn::Wait,
                Phase::Gone => Turn::Take(Err(Error::not_found(format!("pod {} is stopped", self.id)))),
            })
            .await?;
        if let Some(shim) = found {
            return Ok(shim);
        }
        let guard = StartGuard { pod: self, armed: true };
        let (shim, log) = match (load(inner, &self.id).await?, spec) {
            (Some(shim), _) => {
                let log = launch::open_log(&inner.layout.pod(&self.id))
                    .inspect_err(|e| tracing::warn!(pod = self.id, error = %e, "the shim's log is lost"));
                (Arc::new(shim), log.ok())
            }
            (None, Some(spec)) => {
                let (shim, log) = launch_pod(inner, spec).await?;
                (Arc::new(shim), Some(log))
            }
            (None, None) => return Err(Error::not_found(format!("pod {} has no shim", self.id))),
        };
        guard.done(&shim);
        watch_shim(inner, self, &shim, log);
        Ok(shim)
    }
}

/// Puts the phase back if the start fails or panics.
struct StartGuard<'a> {
    pod: &'a Pod,
    armed: bool,
}

impl StartGuard<'_> {
    fn done(mut self, shim: &Arc<Shim>) {
        self.armed = false;
        self.pod.update(|s| s.phase = Phase::Up(shim.clone()));
    }
}

impl Drop for StartGuard<'_> {
    fn drop(&mut self) {
        if self.armed {
            self.pod.update(|s| s.phase = Phase::Absent);
        }
    }
}

/// Follows the shim's log and its process.
fn watch_shim(inner: &Arc<Inner>, pod: &Arc<Pod>, shim: &Arc<Shim>, log: Option<Receiver>) {
    if let Some(log) = log {
        let shim = shim.clone();
        tokio::spawn(launch::copy_log(pod.id.clone(), log, async move { shim.exited().await }));
    }
    let (inner, pod, shim) = (inner.clone(), pod.clone(), shim.clone());
    tokio::spawn(async move {
        shim.exited().await;
        let died = pod.update(|s| match &s.phase {
            Phase::Up(up) if Arc::ptr_eq(up, &shim) => {
                s.phase = Phase::Burying;
                true
            }
            _ => false,
        });
        if died {
            tracing::warn!(pod = pod.id, pid = shim.pid, "the pod's shim has died");
            bury(&inner, &pod, &shim.bootstrap).await;
            inner.tell(RuntimeEvent::ShimGone { pod: pod.id.clone() });
            pod.update(|s| s.phase = Phase::Absent);
        }
    });
}

/// Cleans up after a dead shim: ends and reports each of its tasks.
async fn bury(inner: &Arc<Inner>, pod: &Arc<Pod>, bootstrap: &Bootstrap) {
    let tasks: Vec<Arc<Task>> = pod.look(|s| s.tasks.values().filter(|t| t.is_made()).cloned().collect());
    let mut all = JoinSet::new();
    for task in tasks {
        let (inner, pod) = (inner.clone(), pod.clone());
        all.spawn(async move {
            let certificate = inner.bury_task(&pod.id, &task.id).await;
            inner.ended(&pod, &task, certificate);
        });
    }
    all.join_all().await;
    let bundle = inner.layout.pod(&pod.id);
    Bootstrap::forget(&bundle);
    bundle::remove_socket(&bootstrap.address);
}

/// Connects to the shim that the pod's bundle names. `None` where it names none,
/// or one that is dead; then what it left is cleaned up.
async fn load(inner: &Arc<Inner>, pod: &str) -> Result<Option<Shim>> {
    let dir = inner.layout.pod(pod);
    let d = dir.clone();
    let Some(bootstrap) = blocking(move || Bootstrap::load(&d)).await? else { return Ok(None) };
    let bound = inner.cfg.timeouts.load;
    match Shim::connect(pod, bootstrap.clone(), bound).await {
        Ok(shim) => Ok(Some(shim)),
        Err(e) if e.kind() == ErrorKind::Unavailable => {
            tracing::info!(pod, reason = %e, "the pod's shim is dead");
            Bootstrap::forget(&dir);
            bundle::remove_socket(&bootstrap.address);
            Ok(None)
        }
        Err(e) => Err(e.within(format!("find the shim of pod {pod} again"))),
    }
}

/// Makes the bundle, starts the shim and connects; all of it or nothing.
async fn launch_pod(inner: &Arc<Inner>, spec: &PodSpec) -> Result<(Shim, Receiver)> {
    let dir = inner.layout.pod(&spec.id);
    let (d, s) = (dir.clone(), spec.clone());
    let started = async {
        // Opened before the shim is: it may write before it answers.
        let log = blocking(move || {
            bundle::make_pod(&d, &s)?;
            Ok(d)
        })
        .await
        .and_then(|d| launch::open_log(&d))?;
        let bootstrap = inner.binary.start(&dir, &spec.id, inner.cfg.timeouts.launch).await?;
        let (b, d) = (bootstrap.clone(), dir.clone());
        let (stored, shim) =
            tokio::join!(blocking(move || b.store(&d)), Shim::connect(&spec.id, bootstrap, inner.cfg.timeouts.load));
        stored?;
        Ok((shim?, log))
    };
    match started.await {
        Ok((shim, log)) => {
            if !inner.cgroups.is_empty() {
                let (inner, pid) = (inner.clone(), shim.pid);
                // Not awaited: moving a process waits for an RCU grace period.
                tokio::task::spawn_blocking(move || super::cgroup::place(&inner.cgroups, pid));
            }
            Ok((shim, log))
        }
        Err(e) => {
            let mut errors = vec![e];
            errors.extend(undo_launch(inner, &spec.id, &dir).await);
            let e = errors.remove(0).within(format!("start the shim of pod {}", spec.id));
            match Error::join("cleaning up", errors) {
                Ok(()) => Err(e),
                Err(more) => Err(e.hint(more.to_string())),
            }
        }
    }
}

/// After a failed start: no shim and no bundle stays, but the bundles of tasks
/// whose end has not been asked for yet.
async fn undo_launch(inner: &Arc<Inner>, pod: &str, dir: &Path) -> Option<Error> {
    if let Ok(Some(b)) = Bootstrap::load(dir) {
        bundle::remove_socket(&b.address);
    }
    kill_strays(dir, pod).await;
    Bootstrap::forget(dir);
    if inner.find(pod).is_some_and(|p| p.look(|s| !s.tasks.is_empty())) {
        return None;
    }
    let d = dir.to_path_buf();
    blocking(move || bundle::remove_pod(&d)).await.err()
}

/// Kills shims that can't be reached.
async fn kill_strays(bundle: &Path, pod: &str) {
    let (dir, pod) = (bundle.to_path_buf(), pod.to_string());
    let found = blocking(move || Ok(super::holders::shims_in(&dir, &pod))).await.unwrap_or_default();
    for process in found {
        tracing::warn!(pid = process.pid, bundle = %bundle.display(), "kills a shim that can't be reached");
        process.kill();
        process.gone(AFTER_KILL).await;
    }
}

impl Inner {
    pub(super) async fn start_pod(self: &Arc<Self>, spec: &PodSpec) -> Result<PodProcess> {
        let pod = self.find_or_insert(&spec.id);
        match pod.ensure(self, Some(spec)).await {
            Ok(shim) => Ok(PodProcess { pid: shim.pid, own: shim.own() }),
            Err(e) => {
                self.strike_unused(&pod);
                Err(e)
            }
        }
    }

    /// Takes a pod out of the table that has neither a shim nor tasks.
    fn strike_unused(&self, pod: &Arc<Pod>) {
        let mut unused = false;
        pod.update(|s| {
            unused = matches!(s.phase, Phase::Absent) && s.tasks.is_empty();
            if unused {
                s.phase = Phase::Gone;
            }
        });
        if unused {
            self.strike(pod);
        }
    }

    pub(super) async fn stop_pod(self: &Arc<Self>, id: &str) -> Result<()> {
        let pod = match self.find(id) {
            Some(pod) => pod,
            None if self.layout.pod(id).exists() => self.find_or_insert(id),
            None => return Ok(()),
        };
        let before = pod
            .turn(|s| match &s.phase {
                Phase::Gone => Turn::Take(None),
                Phase::Starting | Phase::Burying | Phase::Stopping => Turn::Wait,
                Phase::Up(shim) if shim.is_dead() => Turn::Wait,
                Phase::Absent | Phase::Up(_) => Turn::Take(Some(std::mem::replace(&mut s.phase, Phase::Stopping))),
            })
            .await;
        let shim = match before {
            None => return Ok(()),
            Some(Phase::Up(shim)) => Some(shim),
            Some(_) => match load(self, id).await {
                Ok(shim) => shim.map(Arc::new),
                Err(e) => {
                    tracing::warn!(pod = id, error = %e, "the pod's shim does not answer");
                    None
                }
            },
        };
        let errors = self.teardown(&pod, shim).await;
        match Error::join(&format!("stop pod {id}"), errors) {
            Ok(()) => {
                pod.update(|s| s.phase = Phase::Gone);
                self.strike(&pod);
                Ok(())
            }
            Err(e) => {
                pod.update(|s| s.phase = Phase::Absent);
                Err(e)
            }
        }
    }

    /// Ends the tasks, the shim and the bundle; goes on to the end whatever fails.
    async fn teardown(self: &Arc<Self>, pod: &Arc<Pod>, shim: Option<Arc<Shim>>) -> Vec<Error> {
        let mut errors = Vec::new();
        let dir = self.layout.pod(&pod.id);
        let mut buried = true;
        if let Some(shim) = &shim {
            self.end_tasks(pod, shim).await;
            buried = self.shut_down(shim).await;
        }
        kill_strays(&dir, &pod.id).await;
        for id in self.known_tasks(pod) {
            // Nothing is left of tasks that ended in order; the rest died with
            // the shim.
            if buried || pod.task(&id).is_some() {
                let certificate = self.bury_task(&pod.id, &id).await;
                if let Some(task) = pod.task(&id) {
                    self.ended(pod, &task, certificate);
                    pod.update(|s| s.tasks.remove(&id));
                }
            }
        }
        if let Some(shim) = &shim {
            bundle::remove_socket(&shim.bootstrap.address);
        }
        if let Err(e) = blocking(move || bundle::remove_pod(&dir)).await {
            errors.push(e);
        }
        errors
    }

    /// The tasks in the table and those whose bundles lie there.
    pub(super) fn known_tasks(&self, pod: &Pod) -> Vec<String> {
        let mut ids: Vec<String> = pod.look(|s| s.tasks.keys().cloned().collect());
        for id in bundle::list(&self.layout.tasks(&pod.id)) {
            if !ids.contains(&id) {
                ids.push(id);
            }
        }
        ids
    }

    /// Kills and deletes all that the shim still runs; a shim with tasks does not
    /// shut down.
    async fn end_tasks(self: &Arc<Self>, pod: &Arc<Pod>, shim: &Arc<Shim>) {
        let mut all = JoinSet::new();
        for id in self.known_tasks(pod) {
            let (inner, pod, shim) = (self.clone(), pod.clone(), shim.clone());
            all.spawn(async move {
                if let Err(e) = inner.kill_and_delete(&pod, &shim, &id).await {
                    tracing::warn!(pod = pod.id, container = id, error = %e, "a container outlives its shim's stop");
                }
            });
        }
        all.join_all().await;
    }

    /// Shuts the shim down and awaits its end. True where it had to be killed.
    async fn shut_down(&self, shim: &Arc<Shim>) -> bool {
        let bound = self.cfg.timeouts.shutdown;
        let request = proto::containerd::task::v3::ShutdownRequest { id: shim.pod.clone(), now: true };
        match shim.task().shutdown(bound, request).await.map_err(super::rpc::Fault::from) {
            Ok(_) | Err(super::rpc::Fault::Closed) => {}
            Err(e) => {
                let e = e.within("shut the shim down", bound);
                tracing::warn!(pod = shim.pod, error = %e, "the shim is killed");
            }
        }
        if tokio::time::timeout(bound, shim.exited()).await.is_ok() {
            return false;
        }
        tracing::warn!(pod = shim.pod, pid = shim.pid, "the shim did not end within {bound:?} and is killed");
        shim.kill();
        if tokio::time::timeout(AFTER_KILL, shim.exited()).await.is_err() {
            tracing::error!(pod = shim.pod, pid = shim.pid, "the shim does not die of SIGKILL");
        }
        true
    }

    /// Runs `delete` for one task of a dead shim, and says how the task ended:
    /// as its bundle knows, else as `delete` answers (137), else 255.
    pub(super) async fn bury_task(self: &Arc<Self>, pod: &str, id: &str) -> Certificate {
        let dir = self.layout.task(pod, id);
        let bound = self.cfg.timeouts.cleanup;
        let answer = if dir.exists() {
            self.binary.delete(&dir, id, bound).await
        } else {
            Err(Error::not_found(format!("bundle {}", dir.display())))
        };
        let now = crate::now();
        let (status, exited_at) = match answer {
            Ok(reply) => {
                let at = reply.exited_at.and_then(|t| super::task::time(&t)).unwrap_or(now);
                (ExitStatus::from_code(reply.exit_status), at)
            }
            Err(e) => {
                tracing::warn!(pod, container = id, error = %e, "the shim's delete failed");
                self.runtime_delete(id).await;
                (ExitStatus::Unknown(255), now)
            }
        };
        let ours = Certificate {
            status,
            exited_at,
            oom_killed: false,
            oom_cgroup: None,
            killed_by: Some("the death of the pod's shim".into()),
            peak_memory: None,
        };
        blocking(move || {
            if !dir.exists() {
                return Ok(ours);
            }
            if let Err(e) = bundle::unmount_rootfs(&dir) {
                tracing::warn!(error = %e, "a dead container's rootfs stays mounted");
            }
            Ok(bundle::certify(&dir, ours))
        })
        .await
        .unwrap_or(Certificate {
            status: ExitStatus::Unknown(255),
            exited_at: now,
            oom_killed: false,
            oom_cgroup: None,
            killed_by: None,
            peak_memory: None,
        })
    }

    /// The last means: the OCI runtime itself, where the shim's `delete` failed.
    async fn runtime_delete(&self, id: &str) {
        let run = tokio::process::Command::new(&self.cfg.runtime_binary)
            .arg("--root")
            .arg(self.cfg.runtime_root.join(&self.cfg.namespace))
            .args(["delete", "--force", id])
            .stdin(std::process::Stdio::null())
            .kill_on_drop(true)
            .output();
        match tokio::time::timeout(self.cfg.timeouts.cleanup, run).await {
            Ok(Ok(out)) if out.status.success() => {}
            Ok(Ok(out)) => tracing::warn!(
                container = id,
                stderr = %String::from_utf8_lossy(&out.stderr).trim(),
                "the OCI runtime's delete --force failed"
            ),
            Ok(Err(e)) => tracing::warn!(container = id, error = %e, "the OCI runtime can't be run"),
            Err(_) => tracing::warn!(container = id, "the OCI runtime's delete --force took too long"),
        }
    }
}
