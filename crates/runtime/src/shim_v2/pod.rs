//! A pod in the table: its phases, and the shim that it has in them.

use super::Inner;
use super::bury::bury;
use super::launch;
use super::shim::Shim;
use super::start::{launch_pod, load, place};
use super::task::Task;
use crate::api::{PodProcess, PodSpec, RuntimeEvent};
use std::collections::HashMap;
use std::sync::Arc;
use tokio::net::unix::pipe::Receiver;
use tokio::sync::{Semaphore, watch};
use types::{Error, Result};

/// How many calls that run the OCI runtime one pod may have under way: more
/// would only make each of them slower.
const RUNTIME_CALLS: usize = 8;

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

/// What someone who waits for a phase does when he looks at it.
pub(crate) enum Turn<T> {
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
    pub(crate) async fn turn<T>(&self, mut turn: impl FnMut(&mut PodState) -> Turn<T>) -> T {
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
            (Some((shim, log)), _) => (Arc::new(shim), log),
            (None, Some(spec)) => {
                let (shim, log) = launch_pod(inner, spec).await?;
                (Arc::new(shim), Some(log))
            }
            (None, None) => return Err(Error::not_found(format!("pod {} has no shim", self.id))),
        };
        place(inner, shim.pid);
        // Before anybody can use the shim, or bury it: both need all tasks to be known.
        inner.adopt(self, &shim).await;
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

/// Copies the shim's log into ours until it ends.
pub(super) fn follow_log(shim: &Arc<Shim>, log: Option<Receiver>) {
    if let Some(log) = log {
        let shim = shim.clone();
        tokio::spawn(launch::copy_log(shim.pod.clone(), log, async move { shim.exited().await }));
    }
}

/// Follows the shim's log and its process.
fn watch_shim(inner: &Arc<Inner>, pod: &Arc<Pod>, shim: &Arc<Shim>, log: Option<Receiver>) {
    follow_log(shim, log);
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
            fault::around(fault::Step::ShimBury, bury(&inner, &pod, &shim.bootstrap)).await;
            inner.tell(RuntimeEvent::ShimGone { pod: pod.id.clone() });
            pod.update(|s| s.phase = Phase::Absent);
        }
    });
}

impl Inner {
    pub(super) async fn start_pod(self: &Arc<Self>, spec: &PodSpec) -> Result<PodProcess> {
        let pod = self.find_or_insert(&spec.id);
        match pod.ensure(self, Some(spec)).await {
            Ok(shim) => Ok(PodProcess::Shim { pid: shim.pid, own: shim.own() }),
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
}
