//! The one task that owns a pod's state.
//!
//! ```text
//!   RPC handlers ──Msg──► Owner::handle ──► decides at once, purely
//!   runtime events ─────►      │
//!                              ├─► spawns an operation (ops/), which ends in a Done
//!   Done of operations ◄───────┘
//!   readers ◄── PodHandle::view, published after each change
//! ```
//!
//! The owner awaits nothing but its mailbox, so that a Stop overtakes a start that
//! hangs. Whoever asks gets a reply channel; asking twice joins what runs already.

mod containers;
mod pod;

use crate::events::EventKind;
use crate::journal::Write;
use crate::ops;
use crate::registry::{Making, PodHandle};
use crate::shared::Shared;
use crate::state::{ContainerInfo, ContainerState, PodInfo, PodView};
use proto::cri::{ContainerConfig, LinuxContainerResources};
use std::collections::{BTreeMap, VecDeque};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Weak};
use std::time::Duration;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::Instant;
use types::{Certificate, Result};

/// Where an answer goes. Nobody need be there any more.
pub type Reply<T> = oneshot::Sender<Result<T>>;

/// What an owner is asked or told.
pub enum Msg {
    /// Make a container.
    Create {
        /// As it came over CRI.
        config: Box<ContainerConfig>,
        /// Gets the new id.
        reply: Reply<String>,
    },
    /// Start a created container.
    Start {
        /// Its whole id.
        id: String,
        /// Answered when it runs.
        reply: Reply<()>,
    },
    /// End a container.
    Stop {
        /// Its whole id.
        id: String,
        /// Between its stop signal and SIGKILL.
        grace: Duration,
        /// Who wants it, for the death certificate.
        why: &'static str,
        /// Answered when it is dead.
        reply: Reply<()>,
    },
    /// Remove a container, by force where it still runs.
    Remove {
        /// Its whole id.
        id: String,
        /// Answered when nothing of it is left.
        reply: Reply<()>,
    },
    /// Change a container's limits.
    Update {
        /// Its whole id.
        id: String,
        /// The limits, merged into what stands.
        resources: Box<LinuxContainerResources>,
        /// Answered when they hold.
        reply: Reply<()>,
    },
    /// End all containers and give the node's resources back.
    StopPod {
        /// Answered when it is NOTREADY.
        reply: Reply<()>,
    },
    /// Stop the pod and forget it.
    RemovePod {
        /// Answered when nothing of it is left.
        reply: Reply<()>,
    },
    /// A container's init has ended.
    Exited {
        /// Its whole id.
        id: String,
        /// How.
        certificate: Certificate,
    },
    /// What was found of a container that could not be examined at the daemon's start.
    Examined {
        /// Its whole id.
        id: String,
        /// Its state when its task was asked for.
        was: ContainerState,
        /// Its task, where there is one.
        task: Option<runtime::TaskState>,
    },
    /// The pod's shim is gone.
    ShimGone,
    /// The pod's shim runs under another pid now.
    ShimStarted(runtime::PodProcess),
    /// An operation has ended.
    Done(Done),
}

/// How an operation ended.
pub enum Done {
    /// CreateContainer, under the container's name key.
    Created(String, Result<Box<ContainerInfo>>),
    /// Create and start of a task; init's pid.
    Started(String, Result<u32>),
    /// A stop: the container is dead, or not even SIGKILL could end it.
    StopEnded(String, Result<()>),
    /// A container's exit stands in the database, or does not; how often it was offered
    /// to it before.
    ExitSaved(String, Result<()>, u32),
    /// It is time to offer it once more, after so many times.
    SaveExitAgain(String, u32),
    /// A container's record is gone, or is not.
    Forgotten(String, Result<()>),
    /// A dead container's task, mounts and bundle are gone.
    TaskDeleted(String, Result<()>),
    /// A container's snapshot and files are gone.
    Removed(String, Result<()>),
    /// An update of limits, with the limits that hold if it succeeded.
    Updated(String, Box<LinuxContainerResources>, Result<()>),
    /// The pod's shim, namespaces and files are gone.
    PodStopped(Result<()>),
    /// What a stop may have left of the pod is gone.
    PodRemoved(Result<()>),
    /// The pod's record is gone, or is not.
    PodForgotten(Result<()>),
}

/// A start that runs.
struct StartOp {
    /// Cancels it; what is sent becomes its error.
    cancel: Option<oneshot::Sender<String>>,
    waiters: Vec<Reply<()>>,
    /// The exit of a process that ended before its start was answered.
    exit: Option<Certificate>,
}

/// A stop that runs.
struct StopOp {
    /// When SIGKILL comes; a second Stop may only bring it nearer.
    deadline: watch::Sender<Instant>,
    waiters: Vec<Reply<()>>,
}

/// A container and what is being done to it.
struct Slot {
    info: Arc<ContainerInfo>,
    start: Option<StartOp>,
    stop: Option<StopOp>,
    /// Stops that wait for a cancelled start.
    stop_after_start: Vec<Reply<()>>,
    /// Its task is being deleted after its end.
    deleting_task: bool,
    /// Updates of limits, the first of which runs.
    updates: VecDeque<(Box<LinuxContainerResources>, Reply<()>)>,
    /// Removal was asked for.
    remove: Option<Vec<Reply<()>>>,
    removing: bool,
    /// The last stop failed: a process that not even SIGKILL ends.
    unkillable: bool,
    /// Becomes true once the exit stands in the database.
    ended: watch::Sender<bool>,
}

impl Slot {
    fn new(info: Arc<ContainerInfo>) -> Self {
        let ended = matches!(info.state(), ContainerState::Exited { .. });
        Self {
            info,
            start: None,
            stop: None,
            stop_after_start: Vec::new(),
            deleting_task: false,
            updates: VecDeque::new(),
            remove: None,
            removing: false,
            unkillable: false,
            ended: watch::channel(ended).0,
        }
    }

    fn is_running(&self) -> bool {
        matches!(self.info.state(), ContainerState::Running { .. })
    }

    /// Nothing runs in it and nothing is being done to it.
    fn is_quiet(&self) -> bool {
        let busy = self.start.is_some() || self.stop.is_some() || self.deleting_task || !self.updates.is_empty();
        !busy && !self.is_running()
    }
}

/// A CreateContainer that runs.
struct Creating {
    id: String,
    waiters: Vec<Reply<String>>,
    /// Until the container is registered, or undone.
    _making: Making,
}

/// The owner.
pub struct Owner {
    shared: Arc<Shared>,
    pod: Arc<PodInfo>,
    key: String,
    handle: Weak<PodHandle>,
    mailbox: mpsc::UnboundedSender<Msg>,
    init_ended: watch::Sender<bool>,
    slots: BTreeMap<String, Slot>,
    /// CreateContainer calls that run, by name key.
    creating: BTreeMap<String, Creating>,
    stop: Option<Vec<Reply<()>>>,
    stopping: bool,
    stop_errors: Vec<types::Error>,
    remove: Option<Vec<Reply<()>>>,
    removing: bool,
    gone: bool,
    /// The pod's state is not in the database, or not yet.
    unsaved: Arc<AtomicBool>,
}

impl Owner {
    /// Starts the owner of a pod that exists, registers it, and returns its handle.
    /// Of `old_tasks`, containers all, it deletes what an earlier daemon left.
    pub fn start(
        shared: Arc<Shared>,
        pod: PodInfo,
        key: String,
        containers: Vec<ContainerInfo>,
        old_tasks: &[String],
    ) -> Arc<PodHandle> {
        let (mailbox, rx) = mpsc::unbounded_channel();
        let no_init = pod.state.init_pid == 0;
        let pod = Arc::new(pod);
        let view = PodView { pod: pod.clone(), containers: Vec::new() };
        let handle = Arc::new(PodHandle::new(mailbox.clone(), view));
        shared.registry.add_pod(&key, &handle);
        let mut slots = BTreeMap::new();
        for container in containers {
            shared.registry.add_container(&container.id, &handle);
            slots.insert(container.id.clone(), Slot::new(Arc::new(container)));
        }
        let mut owner = Self {
            shared,
            pod,
            key,
            handle: Arc::downgrade(&handle),
            mailbox,
            init_ended: watch::channel(no_init).0,
            slots,
            creating: BTreeMap::new(),
            stop: None,
            stopping: false,
            stop_errors: Vec::new(),
            remove: None,
            removing: false,
            gone: false,
            unsaved: Arc::default(),
        };
        for id in old_tasks {
            owner.delete_old_task(id);
        }
        owner.publish();
        tokio::spawn(owner.run(rx));
        handle
    }

    async fn run(mut self, mut rx: mpsc::UnboundedReceiver<Msg>) {
        while let Some(msg) = rx.recv().await {
            self.handle(msg);
            self.progress();
            if self.gone {
                break;
            }
        }
    }

    fn handle(&mut self, msg: Msg) {
        match msg {
            Msg::Create { config, reply } => self.create(*config, reply),
            Msg::Start { id, reply } => self.start_container(&id, reply),
            Msg::Stop { id, grace, why, reply } => self.stop_container(&id, grace, why, Some(reply)),
            Msg::Remove { id, reply } => self.remove_container(&id, reply),
            Msg::Update { id, resources, reply } => self.update(&id, resources, reply),
            Msg::StopPod { reply } => self.stop_pod(reply),
            Msg::RemovePod { reply } => self.remove_pod(reply),
            Msg::Exited { id, certificate } => self.exited(&id, certificate),
            Msg::Examined { id, was, task } => self.examined(&id, &was, task),
            Msg::ShimGone => self.shim_gone(),
            Msg::ShimStarted(process) => self.shim_started(process),
            Msg::Done(done) => self.done(done),
        }
    }

    fn done(&mut self, done: Done) {
        match done {
            Done::Created(key, result) => self.created(&key, result),
            Done::Started(id, result) => self.started(&id, result),
            Done::StopEnded(id, result) => self.stop_ended(&id, result),
            Done::ExitSaved(id, saved, tries) => self.exit_saved(&id, saved, tries),
            Done::SaveExitAgain(id, tries) => self.save_exit_again(&id, tries),
            Done::Forgotten(id, saved) => self.forgotten(&id, saved),
            Done::TaskDeleted(id, result) => self.task_deleted(&id, result),
            Done::Removed(id, result) => self.removed(&id, result),
            Done::Updated(id, resources, result) => self.updated(&id, *resources, result),
            Done::PodStopped(result) => self.pod_stopped(result),
            Done::PodRemoved(result) => self.pod_removed(result),
            Done::PodForgotten(saved) => self.pod_forgotten(saved),
        }
    }

    /// Runs an operation on a task of its own; its end comes back as a message.
    fn spawn<F>(&self, operation: F)
    where
        F: Future<Output = Done> + Send + 'static,
    {
        let mailbox = self.mailbox.clone();
        tokio::spawn(async move {
            let done = operation.await;
            // The mailbox closes only after the last operation.
            let _ = mailbox.send(Msg::Done(done));
        });
    }

    /// What operations need to know of the pod.
    fn context(&self) -> ops::PodContext {
        ops::PodContext {
            shared: self.shared.clone(),
            pod: self.pod.clone(),
            mailbox: self.mailbox.clone(),
            init_ended: self.init_ended.subscribe(),
        }
    }

    fn view(&self) -> Arc<PodView> {
        let mut containers: Vec<_> = self.slots.values().map(|slot| slot.info.clone()).collect();
        containers.sort_by_key(|c| c.created_at);
        Arc::new(PodView { pod: self.pod.clone(), containers })
    }

    fn publish(&self) {
        if let Some(handle) = self.handle.upgrade() {
            handle.publish(self.view());
        }
    }

    /// Publishes the present view and sends an event with it.
    fn announce(&self, id: &str, kind: EventKind) {
        self.publish();
        self.shared.events.send(id, kind, Some(self.view()));
    }

    /// Puts a container into another state: for readers at once, for the database
    /// in order; `then` runs once it is stored.
    fn set_container(&mut self, id: &str, next: ContainerInfo, then: impl FnOnce(Result<()>) + Send + 'static) {
        let json = serde_json::to_string(&next.record);
        if let Some(slot) = self.slots.get_mut(id) {
            slot.info = Arc::new(next);
        }
        // First: whoever is answered by `then` may look at once.
        self.publish();
        match json {
            Ok(json) => self.shared.journal.submit(Write::ContainerState(id.to_string(), json), then),
            Err(e) => then(Err(types::Error::internal(format!("encode container {id}")).because(e))),
        }
    }

    fn set_pod(&mut self, next: PodInfo, then: impl FnOnce(Result<()>) + Send + 'static) {
        let json = serde_json::to_string(&next.state);
        self.pod = Arc::new(next);
        self.publish();
        let id = &self.pod.id;
        let unsaved = self.unsaved.clone();
        unsaved.store(true, Ordering::Release);
        let then = move |saved: Result<()>| {
            unsaved.store(saved.is_err(), Ordering::Release);
            then(saved);
        };
        match json {
            Ok(json) => self.shared.journal.submit(Write::PodState(id.clone(), json), then),
            Err(e) => then(Err(types::Error::internal(format!("encode pod {id}")).because(e))),
        }
    }
}

/// Answers all who wait with one outcome.
fn answer(waiters: Vec<Reply<()>>, outcome: &Result<()>) {
    for reply in waiters {
        let copy = match outcome {
            Ok(()) => Ok(()),
            Err(e) => Err(e.copy()),
        };
        // Whoever has gone needs no answer.
        let _ = reply.send(copy);
    }
}
