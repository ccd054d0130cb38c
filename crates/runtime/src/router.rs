//! The runtime of a node with several handlers: each call goes to the backend of
//! the pod that it is about.
//!
//! ```text
//!  start_pod, create_task ── the pod is known ──► its backend
//!                         └─ else ──────────────► that of its handler
//!  recover ── a backend has made something of it ──► that one
//!          └─ else ────────────────────────────────► that of its handler, else the default
//!  all others ── the pod is known ──► its backend
//!             └─ else ──────────────► NotFound; done already, for what ends things
//! ```
//!
//! A pod stays with the backend that it began with. So the pods of a handler that is
//! no longer configured, or that is another kind now, can still be stopped and removed.

use crate::api::{
    ExecOutput, ExecSyncSpec, Holdings, PodProcess, PodSpec, RecoverPod, RecoveredPod, Runtime, TaskSpec, TaskState,
};
use async_trait::async_trait;
use std::collections::{BTreeSet, HashMap};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use types::{Error, Result, Signal};

/// One kind of runtime, and the handlers that it serves.
struct Backend {
    handlers: BTreeSet<String>,
    runtime: Arc<dyn Runtime>,
}

/// Several runtimes as one.
pub struct Runtimes {
    /// The first one serves the default handler.
    backends: Vec<Backend>,
    /// Each known pod's place in `backends`.
    pods: Mutex<HashMap<String, usize>>,
}

impl Runtimes {
    /// Begins with the backend that serves the default handler.
    pub fn new(runtime: Arc<dyn Runtime>, handlers: impl IntoIterator<Item = String>) -> Self {
        let first = Backend { handlers: handlers.into_iter().collect(), runtime };
        Self { backends: vec![first], pods: Mutex::default() }
    }

    /// Adds a backend with the handlers that it serves.
    #[must_use]
    pub fn with(mut self, runtime: Arc<dyn Runtime>, handlers: impl IntoIterator<Item = String>) -> Self {
        self.backends.push(Backend { handlers: handlers.into_iter().collect(), runtime });
        self
    }

    fn pods(&self) -> MutexGuard<'_, HashMap<String, usize>> {
        self.pods.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn of_handler(&self, handler: &str) -> Option<usize> {
        if handler.is_empty() {
            return Some(0);
        }
        self.backends.iter().position(|b| b.handlers.contains(handler))
    }

    /// The backend of a pod that may be new.
    fn begin(&self, pod: &PodSpec) -> Result<&Arc<dyn Runtime>> {
        let mut pods = self.pods();
        let at = match pods.get(&pod.id) {
            Some(at) => *at,
            None => {
                let at = self.of_handler(&pod.handler).ok_or_else(|| unknown_handler(&pod.id, &pod.handler))?;
                pods.insert(pod.id.clone(), at);
                at
            }
        };
        Ok(&self.backends[at].runtime)
    }

    fn find(&self, pod: &str) -> Option<&Arc<dyn Runtime>> {
        let at = *self.pods().get(pod)?;
        Some(&self.backends[at].runtime)
    }

    fn known(&self, pod: &str) -> Result<&Arc<dyn Runtime>> {
        self.find(pod).ok_or_else(|| Error::not_found(format!("pod {pod} has no shim and no monitor")))
    }

    /// Which backend a recovered pod belongs to.
    fn owner_of(&self, pod: &PodSpec) -> usize {
        let made = self.backends.iter().position(|b| b.runtime.owns(&pod.id));
        made.or_else(|| self.of_handler(&pod.handler)).unwrap_or(0)
    }
}

fn unknown_handler(pod: &str, handler: &str) -> Error {
    Error::precondition(format!("pod {pod}: its handler {handler:?} is no longer configured"))
        .hint("add it to the configuration again, or stop and remove the pod")
}

#[async_trait]
impl Runtime for Runtimes {
    async fn start_pod(&self, pod: &PodSpec) -> Result<PodProcess> {
        self.begin(pod)?.start_pod(pod).await
    }

    async fn stop_pod(&self, pod: &str) -> Result<()> {
        // One that was never begun may still have been found by nobody.
        let backends: Vec<_> = match self.find(pod) {
            Some(backend) => vec![backend],
            None => self.backends.iter().map(|b| &b.runtime).filter(|r| r.owns(pod)).collect(),
        };
        for backend in backends {
            backend.stop_pod(pod).await?;
        }
        self.pods().remove(pod);
        Ok(())
    }

    async fn create_task(&self, pod: &PodSpec, task: &TaskSpec) -> Result<u32> {
        self.begin(pod)?.create_task(pod, task).await
    }

    async fn start_task(&self, pod: &str, id: &str) -> Result<()> {
        self.known(pod)?.start_task(pod, id).await
    }

    async fn kill_task(&self, pod: &str, id: &str, signal: Signal, all: bool, why: &str) -> Result<()> {
        match self.find(pod) {
            Some(backend) => backend.kill_task(pod, id, signal, all, why).await,
            None => Ok(()),
        }
    }

    async fn condemn_task(&self, pod: &str, id: &str) -> Result<()> {
        match self.find(pod) {
            Some(backend) => backend.condemn_task(pod, id).await,
            None => Ok(()),
        }
    }

    async fn delete_task(&self, pod: &str, id: &str) -> Result<()> {
        match self.find(pod) {
            Some(backend) => backend.delete_task(pod, id).await,
            None => Ok(()),
        }
    }

    async fn task_state(&self, pod: &str, id: &str) -> Result<TaskState> {
        self.known(pod)?.task_state(pod, id).await
    }

    async fn pause_task(&self, pod: &str, id: &str) -> Result<()> {
        self.known(pod)?.pause_task(pod, id).await
    }

    async fn resume_task(&self, pod: &str, id: &str) -> Result<()> {
        self.known(pod)?.resume_task(pod, id).await
    }

    async fn update_task(&self, pod: &str, id: &str, resources_json: &str) -> Result<()> {
        self.known(pod)?.update_task(pod, id, resources_json).await
    }

    async fn resize_task(&self, pod: &str, id: &str, width: u32, height: u32) -> Result<()> {
        self.known(pod)?.resize_task(pod, id, width, height).await
    }

    async fn close_stdin(&self, pod: &str, id: &str) -> Result<()> {
        self.known(pod)?.close_stdin(pod, id).await
    }

    async fn reopen_log(&self, pod: &str, id: &str) -> Result<()> {
        self.known(pod)?.reopen_log(pod, id).await
    }

    async fn exec_sync(&self, pod: &str, id: &str, exec: ExecSyncSpec) -> Result<ExecOutput> {
        self.known(pod)?.exec_sync(pod, id, exec).await
    }

    fn owns(&self, pod: &str) -> bool {
        self.backends.iter().any(|b| b.runtime.owns(pod))
    }

    fn operations(&self) -> Vec<crate::api::Operation> {
        self.backends.iter().flat_map(|b| b.runtime.operations()).collect()
    }

    async fn holdings(&self) -> Result<Holdings> {
        let mut all = Holdings::default();
        for backend in &self.backends {
            let own = backend.runtime.holdings().await?;
            all.pods.extend(own.pods);
            all.tasks.extend(own.tasks);
            all.orphans.extend(own.orphans);
            all.strange.extend(own.strange);
        }
        Ok(all)
    }

    async fn end_orphan(&self, id: &str) -> Result<()> {
        let mut errors = Vec::new();
        for backend in &self.backends {
            errors.extend(backend.runtime.end_orphan(id).await.err());
        }
        Error::join(&format!("end {id}"), errors)
    }

    async fn recover(&self, pods: Vec<RecoverPod>) -> Vec<Result<RecoveredPod>> {
        let mut by_backend: Vec<Vec<RecoverPod>> = self.backends.iter().map(|_| Vec::new()).collect();
        for pod in pods {
            let (id, handler) = (&pod.spec.id, &pod.spec.handler);
            if self.of_handler(handler).is_none() {
                tracing::warn!(pod = %id, handler, "its handler is no longer configured: it can only be stopped and removed");
            }
            let at = self.owner_of(&pod.spec);
            self.pods().insert(id.clone(), at);
            by_backend[at].push(pod);
        }
        // Also the backends that nothing is asked of: each cleans up what no pod names.
        let mut all = tokio::task::JoinSet::new();
        for (backend, pods) in self.backends.iter().zip(by_backend) {
            let runtime = backend.runtime.clone();
            all.spawn(async move { runtime.recover(pods).await });
        }
        let mut found = Vec::new();
        while let Some(done) = all.join_next().await {
            match done {
                Ok(results) => found.extend(results),
                Err(e) => found.push(Err(Error::internal("find the pods of a backend again").because(e))),
            }
        }
        found
    }
}

#[cfg(all(test, feature = "test-util"))]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::fake::{Call, FakeRuntime};
    use std::collections::BTreeMap;

    fn pod(id: &str, handler: &str) -> PodSpec {
        PodSpec { id: id.into(), handler: handler.into(), annotations: BTreeMap::new(), bundle_gid: None }
    }

    fn two() -> (Arc<FakeRuntime>, Arc<FakeRuntime>, Runtimes) {
        let (tx, _) = tokio::sync::mpsc::unbounded_channel();
        let (a, b) = (FakeRuntime::new(tx.clone()), FakeRuntime::new(tx));
        let both = Runtimes::new(a.clone(), ["runc".into()]).with(b.clone(), ["vm".into()]);
        (a, b, both)
    }

    #[tokio::test]
    async fn each_pod_goes_to_the_backend_of_its_handler_and_stays_there() {
        let (a, b, both) = two();
        both.start_pod(&pod("1", "")).await.unwrap();
        both.start_pod(&pod("2", "vm")).await.unwrap();
        assert!(a.owns("1") && !a.owns("2") && b.owns("2"));
        // Known, it stays, whatever its handler is called now.
        both.start_pod(&pod("2", "runc")).await.unwrap();
        assert!(!a.owns("2"));
        let e = both.start_pod(&pod("3", "kata")).await.unwrap_err();
        assert!(e.to_string().contains("\"kata\" is no longer configured"), "{e}");
        both.stop_pod("2").await.unwrap();
        assert!(!b.owns("2"));
        assert!(both.task_state("2", "c").await.unwrap_err().is_not_found());
        both.stop_pod("2").await.unwrap();
        assert_eq!(b.calls().iter().filter(|c| c.0 == Call::StopPod).count(), 1);
    }

    #[tokio::test]
    async fn a_pod_whose_handler_is_gone_is_found_where_it_was_made() {
        let (_, b, both) = two();
        b.start_pod(&pod("2", "vm")).await.unwrap();
        let both = Runtimes { pods: Mutex::default(), ..both };
        let asked = ["gone", ""].map(|handler| RecoverPod { spec: pod("2", handler), containers: Vec::new() });
        let found = both.recover(vec![asked[0].clone()]).await;
        assert!(found.into_iter().flatten().any(|p| p.id == "2" && p.process.is_some()));
        both.stop_pod("2").await.unwrap();
        assert!(!b.owns("2"));
    }
}
