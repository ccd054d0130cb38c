//! The trait and the words of its contract.

use async_trait::async_trait;
use bytes::Bytes;
use serde::{Deserialize, Serialize};
use std::path::PathBuf;
use std::time::{Duration, SystemTime};
use types::{Certificate, ExitStatus, Result, Signal};

/// A pod as the runtime sees it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PodSpec {
    /// The pod's id; the shim's `-id`.
    pub id: String,
    /// The name of the handler that runs it; empty is the default one.
    #[serde(default)]
    pub handler: String,
    /// What the shim reads of the pod: the `io.kubernetes.cri.*` annotations. They
    /// make the pod bundle's config.json.
    pub annotations: std::collections::BTreeMap<String, String>,
    /// The group that must be able to pass through the bundle (a user-namespaced
    /// pod's mapped root); then bundles are 0710 with that group, else 0700.
    pub bundle_gid: Option<u32>,
}

/// What is the pod's own process.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum SandboxKind {
    /// None but where its containers share a pid namespace: its namespaces are pinned.
    #[default]
    Pinned,
    /// A pause task in the shim: what VM runtimes make their VM for.
    Pause,
    /// The shim itself, by the sandbox API.
    Shim,
}

/// What runs a pod, once it has started.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum PodProcess {
    /// One process for all of its containers.
    Shim {
        /// The shim's pid in the daemon's pid namespace.
        pid: u32,
        /// True for a shim with our private service (cri:// logs, certificates).
        own: bool,
    },
    /// None of the pod's own: each container has a monitor.
    Monitors {
        /// The monitors' binary.
        monitor: PathBuf,
    },
}

impl PodProcess {
    /// The pid of the pod's shim, where it has one.
    pub fn shim_pid(&self) -> Option<u32> {
        match self {
            Self::Shim { pid, .. } => Some(*pid),
            Self::Monitors { .. } => None,
        }
    }
}

/// One mount of a container's root file system, as `mount(8)` would be told.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RootfsMount {
    /// "overlay", "bind", …
    pub kind: String,
    /// The source; "overlay" for an overlay.
    pub source: String,
    /// Options, as in fstab.
    pub options: Vec<String>,
}

/// Where a task's standard streams go.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TaskIo {
    /// The CRI log file; `None` discards the output.
    pub log_path: Option<PathBuf>,
    /// The longest log line in bytes before it is split.
    pub log_limit: u32,
    /// A terminal instead of pipes; stderr is then part of stdout.
    pub terminal: bool,
    /// The FIFO that the shim reads stdin from, made by the caller.
    pub stdin: Option<PathBuf>,
}

/// A container's task, before it exists.
#[derive(Debug, Clone)]
pub struct TaskSpec {
    /// The container's id.
    pub id: String,
    /// The OCI runtime specification, as the text of config.json.
    pub config_json: String,
    /// The root file system.
    pub rootfs: Vec<RootfsMount>,
    /// Its streams.
    pub io: TaskIo,
}

/// A command to run in a container and to collect the output of.
#[derive(Debug, Clone)]
pub struct ExecSyncSpec {
    /// The process, an OCI `process` object as JSON.
    pub process_json: String,
    /// The bound from after the process has started; `None` is no bound.
    pub timeout: Option<Duration>,
    /// How long the output is drained after the process has exited; `None` is for ever.
    pub drain_timeout: Option<Duration>,
    /// How many bytes are kept of each stream.
    pub keep: usize,
}

/// What a command said and how it ended.
#[derive(Debug, Clone)]
pub struct ExecOutput {
    /// The kept part of stdout.
    pub stdout: Bytes,
    /// The kept part of stderr.
    pub stderr: Bytes,
    /// How it ended.
    pub status: ExitStatus,
}

/// Where a task is in its life.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum TaskState {
    /// Made, not started.
    Created,
    /// Its init runs.
    Running {
        /// Its init's pid.
        pid: u32,
    },
    /// Frozen.
    Paused {
        /// Its init's pid.
        pid: u32,
    },
    /// Its init is gone.
    Stopped(Certificate),
}

/// What the runtime reports unasked. Duplicates are legal; consumers are idempotent.
#[derive(Debug, Clone)]
pub enum RuntimeEvent {
    /// A container's init has ended; its execs have been reported before.
    Exited {
        /// The pod.
        pod: String,
        /// The container.
        container: String,
        /// How it ended.
        certificate: Certificate,
    },
    /// The pod's shim is gone. Each of its tasks that had not ended has been
    /// killed and reported (137, or what its bundle knows) before this.
    ShimGone {
        /// The pod.
        pod: String,
    },
}

/// A pod to find again after a restart of the daemon.
#[derive(Debug, Clone)]
pub struct RecoverPod {
    /// The pod.
    pub spec: PodSpec,
    /// Its containers whose end is not recorded.
    pub containers: Vec<String>,
}

/// What was found of a pod.
#[derive(Debug)]
pub struct RecoveredPod {
    /// The pod's id.
    pub id: String,
    /// What runs it; `None` where its shim has died.
    pub process: Option<PodProcess>,
    /// Each asked container: its state now. A container of a dead shim has been
    /// killed and cleaned up and is `Stopped`; `None` means that no task exists.
    pub containers: Vec<(String, Option<TaskState>)>,
}

/// What is under way, for people who wonder what is stuck.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Operation {
    /// A few words with its object: "stop the shim of pod x".
    pub what: String,
    /// Since it began.
    pub age: Duration,
    /// What it awaits now ("the shim's Delete"), and since when.
    pub waits_for: Vec<(String, Duration)>,
}

/// What lies on this node of a backend's pods, whoever knows of them.
#[derive(Debug, Clone, Default)]
pub struct Holdings {
    /// Pods that have a bundle.
    pub pods: std::collections::BTreeSet<String>,
    /// Containers that have a bundle, each as pod and container.
    pub tasks: std::collections::BTreeSet<(String, String)>,
    /// Pods and containers that an OCI runtime or a shim knows, with or without a bundle.
    pub orphans: std::collections::BTreeSet<String>,
    /// What lies among the bundles and is none.
    pub strange: Vec<PathBuf>,
}

/// Runs pods. Each call has a deadline of its own, may be dropped at any await,
/// and then goes on inside to its end.
#[async_trait]
pub trait Runtime: Send + Sync + 'static {
    /// Makes the pod's bundle and starts its shim, where the backend has shims. A pod
    /// that has one gets it.
    async fn start_pod(&self, pod: &PodSpec) -> Result<PodProcess>;

    /// Shuts the shim down, awaits its end and removes the bundle, whatever state
    /// they are in. Unknown pods are success.
    async fn stop_pod(&self, pod: &str) -> Result<()>;

    /// Makes a container's task: bundle, mounts, `create` of the OCI runtime.
    /// Starts the pod's shim anew where it died. Returns init's pid. On failure
    /// nothing is left.
    async fn create_task(&self, pod: &PodSpec, task: &TaskSpec) -> Result<u32>;

    /// Starts a created task.
    async fn start_task(&self, pod: &str, id: &str) -> Result<()>;

    /// Sends a signal to init, or to all of the container's processes. A process
    /// that is gone is success. `why` goes into the death certificate.
    async fn kill_task(&self, pod: &str, id: &str, signal: Signal, all: bool, why: &str) -> Result<()>;

    /// Notes that the task counts as never made: its end is not told any more, and
    /// `recover` undoes what is left of it and finds none. It comes before the undoing:
    /// whoever follows a daemon that died in between would take the kill for the
    /// container's own end. Unknown tasks are success.
    async fn condemn_task(&self, pod: &str, id: &str) -> Result<()>;

    /// Deletes a stopped task, its mounts and its bundle. Unknown tasks are success.
    async fn delete_task(&self, pod: &str, id: &str) -> Result<()>;

    /// The task's state.
    async fn task_state(&self, pod: &str, id: &str) -> Result<TaskState>;

    /// Freezes a task.
    async fn pause_task(&self, pod: &str, id: &str) -> Result<()>;

    /// Thaws a task.
    async fn resume_task(&self, pod: &str, id: &str) -> Result<()>;

    /// Applies OCI `LinuxResources` JSON to a task.
    async fn update_task(&self, pod: &str, id: &str, resources_json: &str) -> Result<()>;

    /// Resizes a task's terminal; columns and rows.
    async fn resize_task(&self, pod: &str, id: &str, width: u32, height: u32) -> Result<()>;

    /// Closes a task's stdin.
    async fn close_stdin(&self, pod: &str, id: &str) -> Result<()>;

    /// Opens a task's log file anew.
    async fn reopen_log(&self, pod: &str, id: &str) -> Result<()>;

    /// Runs a command to its end (behaviours.md section 1). Dropping the future
    /// kills the command and frees all that belongs to it.
    async fn exec_sync(&self, pod: &str, id: &str, exec: ExecSyncSpec) -> Result<ExecOutput>;

    /// True where something of the pod lies on this node that this backend made: it
    /// then belongs to it, whatever the configuration says today.
    fn owns(&self, pod: &str) -> bool;

    /// What is under way: for people who wonder what is stuck.
    fn operations(&self) -> Vec<Operation> {
        Vec::new()
    }

    /// Lists what lies on this node of its pods.
    async fn holdings(&self) -> Result<Holdings> {
        Ok(Holdings::default())
    }

    /// Ends what an OCI runtime or a shim still has under this id, and no bundle.
    async fn end_orphan(&self, _id: &str) -> Result<()> {
        Ok(())
    }

    /// Finds pods again after a restart of the daemon, in parallel, each bounded;
    /// what failed is in the one pod's result and stops no other. Bundles of no
    /// asked pod are cleaned up.
    async fn recover(&self, pods: Vec<RecoverPod>) -> Vec<Result<RecoveredPod>>;
}

/// When an event or a state has no better time.
pub fn now() -> SystemTime {
    SystemTime::now()
}
