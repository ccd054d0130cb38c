//! What the backends have in common: every call is worked off in a task of its own,
//! so that a caller may drop its future at any await; and after a restart all pods are
//! visited at the same time, each alone with its failure.
//!
//! ```text
//!  trait Runtime ─► runtime_by!(Manager) ─► Ops::detached ─► task: inner.call(…)
//!  recover ─► visit_pods ─┬─ a task per asked pod ─► visit_containers ─► a task per container
//!                         └─ bundles of no asked pod are taken down, bounded
//! ```

use crate::api::{RecoverPod, RecoveredPod, TaskState};
use crate::ops::Ops;
use std::collections::{BTreeSet, HashSet};
use std::time::Duration;
use tokio::task::JoinSet;
use types::{Error, Result};

impl Ops {
    /// Runs `work` to its end, whether or not the caller stays to hear of it; listed as
    /// `what` while it goes on.
    ///
    /// # Errors
    /// Those of the work.
    pub(crate) async fn detached<T: Send + 'static>(
        &self,
        what: String,
        work: impl Future<Output = Result<T>> + Send + 'static,
    ) -> Result<T> {
        let op = self.begin(what.clone());
        match tokio::spawn(op.scope(work)).await {
            Ok(r) => r,
            Err(e) => Err(Error::internal(format!("{what}: it ended early")).because(e)),
        }
    }
}

/// Each call clones what it names and works in a task of its own.
macro_rules! detach {
    ($self:ident, $what:expr, $inner:ident, [$($name:ident),*], $work:expr) => {{
        let $inner = $self.inner.clone();
        $(let $name = $name.to_owned();)*
        $self.inner.ops.detached($what, async move { $work.await }).await
    }};
}

/// [`Runtime`](crate::Runtime) for a manager that has `inner: Arc<Inner>`, whose
/// methods of the same names do the work. `$start` and `$stop` say what becomes of a
/// pod by it; `$more` is what only this one has.
macro_rules! runtime_by {
    ($manager:ty, $start:literal, $stop:literal $(, $($more:tt)+)?) => {
        #[async_trait::async_trait]
        impl $crate::api::Runtime for $manager {
            async fn start_pod(&self, pod: &$crate::api::PodSpec) -> types::Result<$crate::api::PodProcess> {
                types::check_identifier("pod id", &pod.id)?;
                $crate::detach::detach!(
                    self,
                    format!("{} of pod {}", $start, pod.id),
                    inner,
                    [pod],
                    inner.start_pod(&pod)
                )
            }

            async fn stop_pod(&self, pod: &str) -> types::Result<()> {
                types::check_identifier("pod id", pod)?;
                $crate::detach::detach!(self, format!("{} of pod {pod}", $stop), inner, [pod], inner.stop_pod(&pod))
            }

            async fn create_task(
                &self,
                pod: &$crate::api::PodSpec,
                task: &$crate::api::TaskSpec,
            ) -> types::Result<u32> {
                types::check_identifier("pod id", &pod.id)?;
                types::check_identifier("container id", &task.id)?;
                let what = format!("create container {} in pod {}", task.id, pod.id);
                $crate::detach::detach!(self, what, inner, [pod, task], inner.create_task(&pod, task))
            }

            async fn start_task(&self, pod: &str, id: &str) -> types::Result<()> {
                $crate::detach::detach!(
                    self,
                    format!("start container {id}"),
                    inner,
                    [pod, id],
                    inner.start_task(&pod, &id)
                )
            }

            async fn kill_task(
                &self,
                pod: &str,
                id: &str,
                signal: types::Signal,
                all: bool,
                why: &str,
            ) -> types::Result<()> {
                let what = format!("send {signal} to container {id}");
                $crate::detach::detach!(
                    self,
                    what,
                    inner,
                    [pod, id, why],
                    inner.kill_task(&pod, &id, signal, all, &why)
                )
            }

            async fn condemn_task(&self, pod: &str, id: &str) -> types::Result<()> {
                types::check_identifier("pod id", pod)?;
                types::check_identifier("container id", id)?;
                $crate::detach::detach!(
                    self,
                    format!("condemn container {id}"),
                    inner,
                    [pod, id],
                    inner.condemn_task(&pod, &id)
                )
            }

            async fn delete_task(&self, pod: &str, id: &str) -> types::Result<()> {
                types::check_identifier("pod id", pod)?;
                types::check_identifier("container id", id)?;
                $crate::detach::detach!(
                    self,
                    format!("delete container {id}"),
                    inner,
                    [pod, id],
                    inner.delete_task(&pod, &id)
                )
            }

            async fn task_state(&self, pod: &str, id: &str) -> types::Result<$crate::api::TaskState> {
                $crate::detach::detach!(
                    self,
                    format!("ask the state of container {id}"),
                    inner,
                    [pod, id],
                    inner.task_state(&pod, &id)
                )
            }

            async fn pause_task(&self, pod: &str, id: &str) -> types::Result<()> {
                $crate::detach::detach!(
                    self,
                    format!("pause container {id}"),
                    inner,
                    [pod, id],
                    inner.pause_task(&pod, &id)
                )
            }

            async fn resume_task(&self, pod: &str, id: &str) -> types::Result<()> {
                $crate::detach::detach!(
                    self,
                    format!("resume container {id}"),
                    inner,
                    [pod, id],
                    inner.resume_task(&pod, &id)
                )
            }

            async fn update_task(&self, pod: &str, id: &str, resources_json: &str) -> types::Result<()> {
                let what = format!("update container {id}");
                $crate::detach::detach!(
                    self,
                    what,
                    inner,
                    [pod, id, resources_json],
                    inner.update_task(&pod, &id, resources_json)
                )
            }

            async fn resize_task(&self, pod: &str, id: &str, width: u32, height: u32) -> types::Result<()> {
                let what = format!("resize the terminal of container {id}");
                $crate::detach::detach!(self, what, inner, [pod, id], inner.resize_task(&pod, &id, width, height))
            }

            async fn close_stdin(&self, pod: &str, id: &str) -> types::Result<()> {
                $crate::detach::detach!(
                    self,
                    format!("close stdin of container {id}"),
                    inner,
                    [pod, id],
                    inner.close_stdin(&pod, &id)
                )
            }

            async fn reopen_log(&self, pod: &str, id: &str) -> types::Result<()> {
                $crate::detach::detach!(
                    self,
                    format!("reopen the log of container {id}"),
                    inner,
                    [pod, id],
                    inner.reopen_log(&pod, &id)
                )
            }

            async fn exec_sync(
                &self,
                pod: &str,
                id: &str,
                exec: $crate::api::ExecSyncSpec,
            ) -> types::Result<$crate::api::ExecOutput> {
                // Held by this future alone: when the caller drops it, `caller` fails in
                // the task that runs the command.
                let (_here, caller) = tokio::sync::oneshot::channel::<()>();
                $crate::detach::detach!(
                    self,
                    format!("exec in container {id}"),
                    inner,
                    [pod, id],
                    inner.exec_sync(&pod, &id, exec, caller)
                )
            }

            fn owns(&self, pod: &str) -> bool {
                self.inner.layout.pod(pod).exists()
            }

            async fn holdings(&self) -> types::Result<$crate::api::Holdings> {
                self.inner.holdings().await
            }

            $($($more)+)?

            fn operations(&self) -> Vec<$crate::api::Operation> {
                self.inner.ops.list()
            }

            async fn recover(
                &self,
                pods: Vec<$crate::api::RecoverPod>,
            ) -> Vec<types::Result<$crate::api::RecoveredPod>> {
                let inner = self.inner.clone();
                let found = async move { Ok(inner.recover(pods).await) };
                match self.inner.ops.detached("find the pods again".into(), found).await {
                    Ok(found) => found,
                    Err(e) => vec![Err(e)],
                }
            }
        }
    };
}

pub(crate) use {detach, runtime_by};

/// Visits the asked pods, each in a task of its own, with `find`, whose own bounds hold;
/// of those that `lie` on the node, who is not asked for is taken down by `end`, which is
/// waited for no longer than `bound`. In the order of `pods`.
pub(crate) async fn visit_pods<F, E>(
    lie: BTreeSet<String>,
    pods: Vec<RecoverPod>,
    bound: Duration,
    find: impl Fn(RecoverPod) -> F,
    end: impl Fn(String) -> E,
) -> Vec<Result<RecoveredPod>>
where
    F: Future<Output = Result<RecoveredPod>> + Send + 'static,
    E: Future<Output = Result<()>> + Send + 'static,
{
    let asked: HashSet<String> = pods.iter().map(|p| p.spec.id.clone()).collect();
    let mut strangers = JoinSet::new();
    for id in lie.into_iter().filter(|id| !asked.contains(id)) {
        let ended = end(id.clone());
        strangers.spawn(async move {
            tracing::info!(pod = id, "cleans up a bundle of no known pod");
            if let Err(e) = ended.await {
                tracing::warn!(pod = id, error = %e, "a bundle of no known pod stays");
            }
        });
    }
    let running: Vec<_> = pods.into_iter().map(|p| (p.spec.id.clone(), tokio::spawn(find(p)))).collect();
    let mut results = Vec::with_capacity(running.len());
    for (id, task) in running {
        results.push(match task.await {
            Ok(r) => r.map_err(|e| e.within(format!("find pod {id} again"))),
            Err(e) => Err(Error::internal(format!("find pod {id} again")).because(e)),
        });
    }
    // Their own bounds hold; but a stuck one must not hold up the start.
    if tokio::time::timeout(bound, async { while strangers.join_next().await.is_some() {} }).await.is_err() {
        strangers.detach_all();
    }
    results
}

/// Visits the containers of a pod at the same time: those that were `asked` for and the
/// others that are `known`, told apart by `visit`'s second argument. The states of the
/// asked ones, in order.
///
/// # Errors
/// What one that was asked for has failed with.
pub(crate) async fn visit_containers<V>(
    pod: &str,
    mut known: Vec<String>,
    asked: &[String],
    visit: impl Fn(String, bool) -> V,
) -> Result<Vec<(String, Option<TaskState>)>>
where
    V: Future<Output = Result<Option<TaskState>>> + Send + 'static,
{
    known.extend(asked.iter().filter(|c| !known.contains(c)).cloned().collect::<Vec<_>>());
    let mut all = JoinSet::new();
    for (at, container) in known.into_iter().enumerate() {
        let wanted = asked.contains(&container);
        let state = visit(container.clone(), wanted);
        all.spawn(async move { (at, container, wanted, state.await) });
    }
    // What it holds is held by none but the tasks from here on.
    drop(visit);
    let mut found = all.join_all().await;
    found.sort_by_key(|f| f.0);
    let mut containers = Vec::new();
    for (_, container, wanted, state) in found {
        match state {
            Ok(state) if wanted => containers.push((container, state)),
            Ok(_) => {}
            Err(e) if wanted => return Err(e),
            Err(e) => tracing::warn!(pod, container, error = %e, "a left-over container stays"),
        }
    }
    Ok(containers)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::PodSpec;
    use std::sync::{Arc, Mutex};

    #[tokio::test]
    async fn work_goes_on_without_its_caller_and_is_listed() {
        let ops = Ops::default();
        let (go, wait) = tokio::sync::oneshot::channel::<()>();
        let (done, ended) = tokio::sync::oneshot::channel();
        let work = async move {
            let _ = wait.await;
            let _ = done.send(());
            Ok(())
        };
        let call = ops.detached("stop pod x".into(), work);
        assert!(tokio::time::timeout(Duration::from_millis(20), call).await.is_err(), "the caller goes");
        assert_eq!(ops.list()[0].what, "stop pod x");
        go.send(()).unwrap();
        ended.await.unwrap();
    }

    fn pod(id: &str) -> RecoverPod {
        RecoverPod {
            spec: PodSpec { id: id.into(), handler: String::new(), annotations: Default::default(), bundle_gid: None },
            containers: Vec::new(),
        }
    }

    #[tokio::test]
    async fn a_pod_that_fails_stops_no_other_and_strangers_hold_nothing_up() {
        let lie = ["a", "stranger", "stuck"].map(String::from).into();
        let ended = Arc::new(Mutex::new(Vec::new()));
        let told = ended.clone();
        let find = |p: RecoverPod| async move {
            assert_ne!(p.spec.id, "panics");
            match p.spec.id.as_str() {
                "bad" => Err(Error::internal("no")),
                id => Ok(RecoveredPod { id: id.into(), process: None, containers: Vec::new() }),
            }
        };
        let end = move |id: String| {
            let told = told.clone();
            async move {
                if id == "stuck" {
                    std::future::pending::<()>().await;
                }
                told.lock().unwrap().push(id);
                Ok(())
            }
        };
        let pods = ["a", "bad", "panics", "b"].map(pod).to_vec();
        let found = visit_pods(lie, pods, Duration::from_millis(200), find, end).await;
        let ids: Vec<_> = found.iter().map(|r| r.as_ref().map(|p| p.id.as_str()).unwrap_or("-")).collect();
        assert_eq!(ids, ["a", "-", "-", "b"]);
        assert!(found[1].as_ref().unwrap_err().to_string().contains("pod bad"));
        assert_eq!(*ended.lock().unwrap(), ["stranger"]);
    }

    #[tokio::test]
    async fn containers_come_in_order_and_only_those_asked_for_can_fail() {
        let visit = |id: String, wanted: bool| async move {
            match id.as_str() {
                "left-over" if !wanted => Err(Error::internal("it stays")),
                "broken" => Err(Error::internal("broken")),
                _ => Ok(wanted.then_some(TaskState::Created)),
            }
        };
        let known = || vec!["b".to_string(), "left-over".to_string()];
        let found = visit_containers("p", known(), &["a".into(), "b".into()], visit).await.unwrap();
        let made = Some(TaskState::Created);
        assert_eq!(found, [("b".into(), made.clone()), ("a".into(), made)]);
        assert!(visit_containers("p", known(), &["broken".into()], visit).await.is_err());
    }
}
