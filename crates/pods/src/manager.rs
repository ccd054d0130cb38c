//! The door to pods: what the CRI surface calls.
//!
//! Every call that changes something is carried out by the pod's owner or by a
//! task of its own; a caller that goes away changes nothing about it. ExecSync is
//! the exception by rule: a caller that goes away ends its command.

use crate::admission;
use crate::events::{EventKind, PodEvent};
use crate::handlers::Handlers;
use crate::health::{Rounds, Trouble};
use crate::ops::{self, NewPod};
use crate::owner::{Msg, Owner};
use crate::quarantine;
use crate::registry::{NameHolder, PodHandle};
use crate::sandbox::{self, NamespacePlan};
use crate::shared::Shared;
use crate::state::{ContainerInfo, ContainerState, PodInfo, PodPhase, PodView, pod_name};
use proto::cri::{ContainerConfig, LinuxContainerResources, PodSandboxConfig};
use runtime::{ExecOutput, Operation, RuntimeEvent, SandboxKind, TaskState};
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};
use telemetry::Span;
use tokio::sync::{broadcast, mpsc, oneshot, watch};
use types::{Error, Result, ResultExt};

/// All pods of this node. Clones share them.
#[derive(Clone)]
pub struct Pods {
    pub(crate) shared: Arc<Shared>,
    rounds: mpsc::UnboundedSender<crate::reconcile::Asked>,
}

/// Which pods to list; empty fields match all.
#[derive(Debug, Default, Clone)]
pub struct PodFilter {
    /// An id or a prefix of one.
    pub id: String,
    /// Ready or not.
    pub phase: Option<PodPhase>,
    /// Labels that must be there with these values.
    pub labels: BTreeMap<String, String>,
}

/// Which containers to list; empty fields match all.
#[derive(Debug, Default, Clone)]
pub struct ContainerFilter {
    /// An id or a prefix of one.
    pub id: String,
    /// CRI's name of the state, as [`ContainerState::name`] gives it.
    pub state: Option<&'static str>,
    /// A pod's id or a prefix of one.
    pub pod_id: String,
    /// Labels that must be there with these values.
    pub labels: BTreeMap<String, String>,
}

impl Pods {
    /// Finds again what was there before, then follows the runtime's events.
    ///
    /// # Errors
    /// When the database can't be read.
    pub async fn start(shared: Arc<Shared>, mut events: mpsc::UnboundedReceiver<RuntimeEvent>) -> Result<Self> {
        // Events that come meanwhile wait in the channel for the owners to exist.
        crate::recovery::recover(&shared).await?;
        let registry = shared.registry.clone();
        tokio::spawn(async move {
            while let Some(event) = events.recv().await {
                let (pod, msg) = match event {
                    RuntimeEvent::Exited { pod, container, certificate } => {
                        (pod, Msg::Exited { id: container, certificate })
                    }
                    RuntimeEvent::ShimGone { pod } => (pod, Msg::ShimGone),
                };
                // A pod that is just being made or is gone has nobody to tell.
                if let Ok(handle) = registry.pod(&pod) {
                    let _ = handle.send(msg);
                }
            }
        });
        let (rounds, asked) = mpsc::unbounded_channel();
        tokio::spawn(crate::reconcile::run(shared.clone(), asked));
        Ok(Self { shared, rounds })
    }

    /// Compares what exists on the node with what should now, and removes what is
    /// nobody's. It goes on if its caller leaves.
    pub async fn reconcile(&self) {
        let (tx, rx) = oneshot::channel();
        // A round that is never answered is the daemon's end.
        if self.rounds.send(tx).is_ok() {
            let _ = rx.await;
        }
    }

    /// What an operator should know: what the reconciliation did, and what is amiss.
    pub fn rounds(&self) -> Rounds {
        self.shared.health.rounds()
    }

    /// What is amiss with the database, and what is in quarantine.
    pub fn troubles(&self) -> Vec<Trouble> {
        self.shared.health.database().into_iter().chain(self.shared.quarantine.troubles()).collect()
    }

    /// All of it, for Status.
    pub fn health_json(&self) -> serde_json::Value {
        self.shared.health.json(&self.shared.quarantine.troubles())
    }

    /// Makes a pod and gives its id. A retry while the first attempt still runs
    /// joins it [containerd#10828].
    ///
    /// # Errors
    /// `InvalidArgument` for a configuration that can't be; `AlreadyExists` while a
    /// pod of that name, uid, namespace and attempt exists; else what failed.
    pub async fn run_pod(&self, config: PodSandboxConfig, handler: &str) -> Result<String> {
        let key = pod_key(&config)?;
        let handlers = &self.shared.handlers;
        let handler_of = handlers.admit(handlers.choose(handler, &config))?;
        let (runtime, pause) = (handler_of.name.clone(), handler_of.sandbox != SandboxKind::Pinned);
        let plan = sandbox::plan(&config, |id| self.target_pid(id)).map_err(|e| e.within(pod_name(&config)))?;
        let plan = NamespacePlan { pause, ..plan };
        spec::check_pod(&config)?;
        crate::network::request("", &config, std::path::Path::new("")).map_err(|e| e.within(pod_name(&config)))?;
        let id = types::new_id()?;
        let (tx, mut attempt) = watch::channel(None);
        match self.shared.registry.reserve(&key, attempt.clone()) {
            Ok(()) => {
                let new = NewPod { id, key, config: Arc::new(config), handler: handler.to_string(), runtime, plan };
                let (shared, making) = (self.shared.clone(), self.shared.registry.begin(&new.id));
                tokio::spawn(async move {
                    let outcome = make_pod(shared, new).await;
                    drop(making);
                    let _ = tx.send(Some(outcome.map_err(Arc::new)));
                });
            }
            Err(NameHolder::Starting(other)) => attempt = other,
            Err(NameHolder::Pod(id)) => {
                return Err(Error::exists(format!("pod {} exists already, as {id:.12}", pod_name(&config)))
                    .hint("stop and remove it first, or use the next attempt number"));
            }
        }
        let outcome = attempt.wait_for(Option::is_some).await.map(|o| o.clone());
        match outcome {
            Ok(Some(Ok(id))) => Ok(id),
            Ok(Some(Err(e))) => Err(e.copy()),
            _ => Err(Error::internal("the task that made the pod was lost")),
        }
    }

    /// A pod that was removed while it was asked is stopped and removed; any other
    /// failure is one, "not found" of some file among them.
    fn unless_gone(&self, pod: &PodHandle, outcome: Result<()>) -> Result<()> {
        match outcome {
            Err(_) if self.shared.registry.pod(&pod.id).is_err() => Ok(()),
            other => other,
        }
    }

    fn target_pid(&self, id: &str) -> Result<u32> {
        let container = self.container(id)?;
        admission::exec(&container)
    }

    /// Ends all containers of a pod and gives the node's resources back. An unknown
    /// pod is stopped already.
    ///
    /// # Errors
    /// All that failed, joined; the pod is then still READY and may be stopped again.
    pub async fn stop_pod(&self, id: &str) -> Result<()> {
        match self.shared.registry.pod(id) {
            Ok(pod) => self.unless_gone(&pod, ask(&pod, |reply| Msg::StopPod { reply }).await),
            Err(e) => match self.shared.quarantine.pod(id) {
                Some((id, held)) => quarantine::end_pod(&self.shared, id, held, false).await,
                None => gone_is_done(e),
            },
        }
    }

    /// Stops a pod and forgets it and its containers. An unknown pod is gone already.
    ///
    /// # Errors
    /// All that failed, joined; it may be removed again.
    pub async fn remove_pod(&self, id: &str) -> Result<()> {
        match self.shared.registry.pod(id) {
            Ok(pod) => self.unless_gone(&pod, ask(&pod, |reply| Msg::RemovePod { reply }).await),
            Err(e) => match self.shared.quarantine.pod(id) {
                Some((id, held)) => quarantine::end_pod(&self.shared, id, held, true).await,
                None => gone_is_done(e),
            },
        }
    }

    /// A pod and its containers.
    ///
    /// # Errors
    /// `NotFound`; `InvalidArgument` for a prefix of several ids.
    pub fn pod(&self, id: &str) -> Result<Arc<PodView>> {
        Ok(self.shared.registry.pod(id)?.view())
    }

    /// The pods that a filter lets through, oldest first.
    pub fn pods(&self, filter: &PodFilter) -> Vec<Arc<PodInfo>> {
        let mut found: Vec<_> = self.shared.registry.pods().iter().map(|h| h.view().pod.clone()).collect();
        found.retain(|p| {
            p.id.starts_with(&filter.id)
                && filter.phase.is_none_or(|phase| phase == p.state.phase)
                && filter.labels.iter().all(|(k, v)| p.config.labels.get(k) == Some(v))
        });
        found.sort_by_key(|p| p.created_at);
        found
    }

    /// Makes a container and gives its id.
    ///
    /// # Errors
    /// `NotFound` for an unknown pod or image, `AlreadyExists` for a name in use,
    /// `FailedPrecondition` in a pod that is not ready, else what failed.
    pub async fn create_container(&self, pod: &str, config: ContainerConfig) -> Result<String> {
        let pod = self.shared.registry.pod(pod)?;
        ask(&pod, |reply| Msg::Create { config: Box::new(config), reply }).await
    }

    /// Starts a created container.
    ///
    /// # Errors
    /// `NotFound`, `FailedPrecondition`, or why its process could not be started.
    pub async fn start_container(&self, id: &str) -> Result<()> {
        let (id, pod) = self.shared.registry.container(id)?;
        ask(&pod, |reply| Msg::Start { id, reply }).await
    }

    /// Ends a container: its stop signal, and SIGKILL after `grace`. An unknown or
    /// dead one has ended already.
    ///
    /// # Errors
    /// `DeadlineExceeded` when not even SIGKILL ended it.
    pub async fn stop_container(&self, id: &str, grace: Duration) -> Result<()> {
        match self.shared.registry.container(id) {
            Ok((id, pod)) => {
                self.unless_gone(&pod, ask(&pod, |reply| Msg::Stop { id, grace, why: "StopContainer", reply }).await)
            }
            Err(e) => match self.shared.quarantine.container(id) {
                Some((pod, id)) => quarantine::end_container(&self.shared, pod, id, false).await,
                None => gone_is_done(e),
            },
        }
    }

    /// Removes a container, by force where it runs. An unknown one is gone already.
    ///
    /// # Errors
    /// All that failed, joined; it may be removed again.
    pub async fn remove_container(&self, id: &str) -> Result<()> {
        match self.shared.registry.container(id) {
            Ok((id, pod)) => self.unless_gone(&pod, ask(&pod, |reply| Msg::Remove { id, reply }).await),
            Err(e) => match self.shared.quarantine.container(id) {
                Some((pod, id)) => quarantine::end_container(&self.shared, pod, id, true).await,
                None => gone_is_done(e),
            },
        }
    }

    /// A container.
    ///
    /// # Errors
    /// `NotFound`; `InvalidArgument` for a prefix of several ids.
    pub fn container(&self, id: &str) -> Result<Arc<ContainerInfo>> {
        let (id, pod) = self.shared.registry.container(id)?;
        let view = pod.view();
        view.containers
            .iter()
            .find(|c| c.id == id)
            .cloned()
            .ok_or_else(|| Error::not_found(format!("no container {id:?} exists")))
    }

    /// The containers that a filter lets through, oldest first.
    pub fn containers(&self, filter: &ContainerFilter) -> Vec<Arc<ContainerInfo>> {
        let mut found: Vec<Arc<ContainerInfo>> = self
            .shared
            .registry
            .pods()
            .iter()
            .filter(|p| p.id.starts_with(&filter.pod_id))
            .flat_map(|p| p.view().containers.clone())
            .collect();
        found.retain(|c| {
            c.id.starts_with(&filter.id)
                && filter.state.is_none_or(|s| s == c.state().name())
                && filter.labels.iter().all(|(k, v)| c.config.labels.get(k) == Some(v))
        });
        found.sort_by_key(|c| c.created_at);
        found
    }

    /// Changes a container's limits; what is not set stays.
    ///
    /// # Errors
    /// `NotFound`, `FailedPrecondition`, or the runtime's refusal.
    pub async fn update_container(&self, id: &str, resources: LinuxContainerResources) -> Result<()> {
        let (id, pod) = self.shared.registry.container(id)?;
        ask(&pod, |reply| Msg::Update { id, resources: Box::new(resources), reply }).await
    }

    /// Opens a running container's log file anew.
    ///
    /// # Errors
    /// `NotFound`; `FailedPrecondition` when it does not run.
    pub async fn reopen_log(&self, id: &str) -> Result<()> {
        let container = self.container(id)?;
        admission::exec(&container)?;
        let shared = self.shared.clone();
        let reopen = tokio::spawn(async move {
            shared.bounded("reopening the log", shared.runtime.reopen_log(&container.pod_id, &container.id)).await
        });
        reopen.await.context(|| "reopen the log".into())?
    }

    /// Runs a command in a container to its end; see [`crate::exec`].
    ///
    /// # Errors
    /// See [`crate::exec::exec_sync`].
    pub async fn exec_sync(&self, id: &str, cmd: Vec<String>, timeout: Option<Duration>) -> Result<ExecOutput> {
        let container = self.container(id)?;
        crate::exec::exec_sync(&self.shared, &container, cmd, timeout).await
    }

    /// Closes a running container's stdin.
    ///
    /// # Errors
    /// `NotFound`; `FailedPrecondition` when it does not run or has no stdin.
    pub async fn close_stdin(&self, id: &str) -> Result<()> {
        let container = self.container(id)?;
        admission::exec(&container)?;
        if container.record.stdin.is_none() {
            return Err(Error::precondition(format!("container {:.12} has no stdin", container.id)));
        }
        self.shared.runtime.close_stdin(&container.pod_id, &container.id).await
    }

    /// The spec that a container was or will be started with, as JSON.
    ///
    /// # Errors
    /// When its file can't be read.
    pub async fn spec_json(&self, id: &str) -> Result<String> {
        let path: PathBuf = self.shared.container_dir(id).join("config.json");
        tokio::fs::read_to_string(&path).await.context(|| format!("read {}", path.display()))
    }

    /// All events from now on.
    pub fn events(&self) -> broadcast::Receiver<Arc<PodEvent>> {
        self.shared.events.subscribe()
    }

    /// What is under way of pods, and in the runtimes below them.
    pub fn operations(&self) -> Vec<Operation> {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let age = |s: &Span| now.saturating_sub(Duration::from_nanos(u64::try_from(s.started_at).unwrap_or(0)));
        let mut all: Vec<Operation> = Vec::new();
        // A step follows the operation that it belongs to.
        for (pod, span) in self.shared.timelines.open() {
            let of =
                if span.container.is_empty() { String::new() } else { format!("container {} in ", span.container) };
            let what = format!("{} of {of}pod {pod}", span.operation);
            match all.iter_mut().find(|o| o.what == what) {
                Some(whole) if !span.step.is_empty() => whole.waits_for.push((span.step.clone(), age(&span))),
                _ => {
                    let step = Some((span.step.clone(), age(&span))).filter(|(step, _)| !step.is_empty());
                    all.push(Operation { what, age: age(&span), waits_for: step.into_iter().collect() });
                }
            }
        }
        all.extend(self.shared.runtime.operations());
        all
    }

    /// The timed steps of pods.
    pub fn timelines(&self) -> &telemetry::Timelines {
        &self.shared.timelines
    }

    /// The handlers that RunPodSandbox may name; the first is the default one.
    pub fn handlers(&self) -> &Handlers {
        &self.shared.handlers
    }

    /// Whether pods can be attached to a network.
    pub async fn network_status(&self) -> network::Readiness {
        self.shared.network.status().await
    }

    /// Takes the networks that this node's pods get their addresses from.
    ///
    /// # Errors
    /// `InvalidArgument` for what is none, or can't be used.
    pub async fn set_pod_cidr(&self, told: &str) -> Result<()> {
        self.shared.network.set_pod_cidr(told).await
    }

    /// How pods are attached, for people.
    pub fn network_info(&self) -> serde_json::Value {
        self.shared.network.info()
    }

    /// Before the daemon's end: waits until all changes are in the database, and
    /// takes back the mounts that only pods need, where there are none.
    pub async fn close(&self) {
        self.shared.journal.flush().await;
        for e in
            [self.shared.network.release().await.err(), self.shared.sandboxes.release().err()].into_iter().flatten()
        {
            tracing::warn!("at the end: {e}");
        }
    }
}

async fn make_pod(shared: Arc<Shared>, new: NewPod) -> Result<String> {
    let (id, key) = (new.id.clone(), new.key.clone());
    let whole = shared.timelines.timed(&id, "RunPodSandbox", "", "", ops::run_pod(&shared, new)).await;
    match whole {
        Ok(info) => {
            let init = info.state.init;
            let handle = Owner::start(shared.clone(), info, key, Vec::new(), &[]);
            if init {
                // Its end may have been told before there was an owner to tell.
                let certificate = match shared.runtime.task_state(&id, &id).await {
                    Ok(TaskState::Stopped(certificate)) => Some(certificate),
                    Err(e) if e.is_not_found() => Some(crate::state::lost_certificate()),
                    _ => None,
                };
                if let Some(certificate) = certificate {
                    let _ = handle.send(Msg::Exited { id: id.clone(), certificate });
                }
            }
            let view = handle.view();
            shared.events.send(&id, EventKind::Created, Some(view.clone()));
            shared.events.send(&id, EventKind::Started, Some(view));
            shared.save_timeline(&id);
            Ok(id)
        }
        Err(e) => {
            shared.timelines.remove(&id);
            shared.registry.release(&key);
            Err(e)
        }
    }
}

/// "namespace/name/uid/attempt", which is unique among pods.
fn pod_key(config: &PodSandboxConfig) -> Result<String> {
    let Some(meta) = &config.metadata else {
        return Err(Error::invalid("the pod's configuration has no metadata"));
    };
    for (what, value) in [("name", &meta.name), ("namespace", &meta.namespace), ("uid", &meta.uid)] {
        if value.is_empty() {
            return Err(Error::invalid(format!("the pod's metadata has no {what}")));
        }
    }
    Ok(format!("{}/{}/{}/{}", meta.namespace, meta.name, meta.uid, meta.attempt))
}

async fn ask<T>(pod: &PodHandle, msg: impl FnOnce(oneshot::Sender<Result<T>>) -> Msg) -> Result<T> {
    let (tx, rx) = oneshot::channel();
    pod.send(msg(tx))?;
    rx.await.map_err(|_| Error::not_found(format!("pod {} has just been removed", pod.id)))?
}

/// Stop and Remove of what is not there are success (behaviours.md section 6).
fn gone_is_done(e: Error) -> Result<()> {
    if e.is_not_found() { Ok(()) } else { Err(e) }
}

/// A running container, for callers that need its pid.
pub fn running_pid(container: &ContainerInfo) -> Option<u32> {
    match container.state() {
        ContainerState::Running { pid, .. } => Some(*pid),
        _ => None,
    }
}
