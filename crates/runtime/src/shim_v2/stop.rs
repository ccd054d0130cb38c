//! A pod's shim is stopped: its tasks, itself, its bundle, in this order, and on
//! to the end whatever fails.

use super::Inner;
use super::pod::{Phase, Pod, Turn, follow_log};
use super::rpc::{Fault, call};
use super::shim::Shim;
use super::start::{AFTER_KILL, kill_strays, load};
use super::task::Task;
use crate::api::SandboxKind;
use crate::bundle::{self, blocking};
use fault::Step;
use proto::containerd::task::v3::ShutdownRequest;
use std::sync::Arc;
use tokio::task::JoinSet;
use types::{Error, Result};

impl Inner {
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
                Ok(found) => found.map(|(shim, log)| {
                    let shim = Arc::new(shim);
                    follow_log(&shim, log);
                    shim
                }),
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
        // Those that only their bundles tell of have ends to report, too.
        for id in self.known_tasks(pod) {
            pod.update(|s| s.tasks.entry(id.clone()).or_insert_with(|| Arc::new(Task::found(&id))).is_made());
        }
        let mut buried = true;
        if let Some(shim) = &shim {
            fault::around(Step::ShimEndTasks, self.end_tasks(pod, shim)).await;
            buried = match fault::around(Step::ShimShutdown, self.shut_down(shim)).await {
                Ok(killed) => killed,
                Err(e) => {
                    errors.push(e);
                    true
                }
            };
        }
        if buried {
            kill_strays(&dir, &pod.id).await;
        }
        for id in self.known_tasks(pod) {
            // Nothing is left of tasks that ended in order; the rest died with
            // the shim.
            if buried || pod.task(&id).is_some() {
                let buried = self.bury_task(&pod.id, &id).await;
                errors.extend(buried.left);
                if let Some(task) = pod.task(&id) {
                    self.ended(pod, &task, buried.certificate);
                    pod.update(|s| s.tasks.remove(&id));
                }
            }
        }
        if let Some(shim) = &shim {
            bundle::remove_socket(&shim.bootstrap.address);
        }
        // The bundle leads the next attempt to what could not be ended.
        if errors.is_empty()
            && let Err(e) = blocking(move || fault::during(Step::ShimUnbundle, || bundle::remove_pod(&dir))).await
        {
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
    ///
    /// # Errors
    /// `DeadlineExceeded` where even that does not end it.
    async fn shut_down(&self, shim: &Arc<Shim>) -> Result<bool> {
        let bound = shim.timeouts().shutdown;
        if shim.handler.sandbox == SandboxKind::Shim {
            self.shut_sandbox_down(shim).await;
        }
        let request = ShutdownRequest { id: shim.pod.clone(), now: true };
        match call(bound, shim.task().shutdown(bound, request)).await {
            Ok(_) | Err(Fault::Closed) => {}
            Err(e) => {
                let e = e.within("shut the shim down", bound);
                tracing::warn!(pod = shim.pod, error = %e, "the shim is killed");
            }
        }
        if tokio::time::timeout(bound, shim.exited()).await.is_ok() {
            return Ok(false);
        }
        tracing::warn!(pod = shim.pod, pid = shim.pid, "the shim did not end within {bound:?} and is killed");
        shim.kill();
        if tokio::time::timeout(AFTER_KILL, shim.exited()).await.is_err() {
            return Err(Error::deadline(format!("the shim, process {}, does not die of SIGKILL", shim.pid))
                .hint("it is probably stuck in the kernel: look for state D in ps"));
        }
        Ok(true)
    }
}
