//! What pods and containers are, as values: states own their data.
//!
//! [`PodView`] is what readers see; the pod's owner ([`crate::owner`]) publishes a
//! new one after each change, so that listing waits for nobody.

use proto::cri::{ContainerConfig, LinuxContainerResources, PodSandboxConfig};
use runtime::PodProcess;
use serde::{Deserialize, Serialize};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::SystemTime;
use types::{Certificate, ExitStatus};

/// The exit code of a container whose process could not be started.
pub const START_ERROR_CODE: u8 = 128;

/// Whether a pod can run containers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PodPhase {
    /// Its namespaces stand.
    Ready,
    /// It was stopped, or its sandbox died, or the node was restarted.
    NotReady,
}

/// A pod's changing part, stored as JSON.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct PodState {
    /// Ready or not.
    pub phase: PodPhase,
    /// The runtime handler that was asked for; empty is the default one.
    pub handler: String,
    /// The handler that it was started with, by name; empty in old records, and then
    /// as `handler` says.
    #[serde(default)]
    pub runtime: String,
    /// Its shim; `None` for a pod without a process.
    pub process: Option<PodProcess>,
    /// Namespaces, files and mounts on the node.
    pub sandbox: crate::sandbox::SandboxState,
    /// What it is attached to; nothing in the node's network, and once it was stopped.
    #[serde(default)]
    pub network: network::PodNetwork,
    /// Nothing of it is left on the node but its record: a stop went through.
    #[serde(default)]
    pub torn_down: bool,
    /// True where an init task runs the pod's shared pid namespace.
    pub init: bool,
    /// That init's pid; 0 without one.
    #[serde(default)]
    pub init_pid: u32,
}

/// A pod, as readers see it.
#[derive(Debug, Clone)]
pub struct PodInfo {
    /// 64 hex digits.
    pub id: String,
    /// As it came over CRI.
    pub config: Arc<PodSandboxConfig>,
    /// When RunPodSandbox began.
    pub created_at: SystemTime,
    /// The changing part.
    pub state: PodState,
}

impl PodState {
    /// The name of the handler that runs it.
    pub fn handler_name(&self) -> &str {
        if self.runtime.is_empty() { &self.handler } else { &self.runtime }
    }
}

impl PodInfo {
    /// The pod's name, for messages.
    pub fn name(&self) -> String {
        pod_name(&self.config)
    }
}

/// "namespace/name" of a pod's configuration, for messages.
pub fn pod_name(config: &PodSandboxConfig) -> String {
    match &config.metadata {
        Some(m) => format!("{}/{}", m.namespace, m.name),
        None => "(unnamed)".to_string(),
    }
}

/// Why a container ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ExitReason {
    /// Exit code 0.
    Completed,
    /// Another exit code or a signal.
    Error,
    /// The kernel's OOM killer struck.
    OomKilled,
    /// The process could not be started.
    StartError,
    /// Nobody saw it end: the node was restarted, or its record was lost.
    Unknown,
}

impl ExitReason {
    /// The word that kubelet and people know it by.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Completed => "Completed",
            Self::Error => "Error",
            Self::OomKilled => "OOMKilled",
            Self::StartError => "StartError",
            Self::Unknown => "Unknown",
        }
    }

    /// The reason behind a death certificate (behaviours.md section 6).
    pub fn of(certificate: &Certificate) -> Self {
        match certificate.status {
            // An OOM kill of a child that init survived is no OOM death of the container.
            status if certificate.oom_killed && status.code() == 137 => Self::OomKilled,
            ExitStatus::Code(0) => Self::Completed,
            ExitStatus::Unknown(_) => Self::Unknown,
            _ => Self::Error,
        }
    }
}

/// Where a container is in its life.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "state", rename_all = "snake_case")]
pub enum ContainerState {
    /// Snapshot and spec exist; no task does.
    Created,
    /// Its init runs.
    Running {
        /// In the daemon's pid namespace.
        pid: u32,
        /// When start succeeded.
        started_at: SystemTime,
    },
    /// Its init is gone, for good.
    Exited {
        /// `None` where it never started.
        started_at: Option<SystemTime>,
        /// How it ended.
        certificate: Certificate,
        /// Why.
        reason: ExitReason,
        /// For people; empty where there is nothing to add.
        message: String,
    },
}

impl ContainerState {
    /// CRI's word for it, for messages.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Created => "CONTAINER_CREATED",
            Self::Running { .. } => "CONTAINER_RUNNING",
            Self::Exited { .. } => "CONTAINER_EXITED",
        }
    }

    /// The end of a container that ran.
    pub fn exited(started_at: Option<SystemTime>, certificate: Certificate) -> Self {
        let reason = ExitReason::of(&certificate);
        let message = match (&certificate.oom_cgroup, &certificate.killed_by) {
            (Some(cgroup), _) if reason == ExitReason::OomKilled => {
                format!("killed by the kernel: cgroup {cgroup} ran out of memory")
            }
            (_, Some(who)) => format!("killed by {who}"),
            _ => String::new(),
        };
        Self::Exited { started_at, certificate, reason, message }
    }

    /// The end of a container whose process could not be started: it has lived no longer
    /// than its creation (behaviours.md section 2).
    pub fn start_error(created_at: SystemTime, message: String) -> Self {
        let certificate = plain_certificate(ExitStatus::Code(START_ERROR_CODE));
        let certificate = Certificate { exited_at: created_at, ..certificate };
        Self::Exited { started_at: None, certificate, reason: ExitReason::StartError, message }
    }

    /// The end that nobody saw: 255.
    pub fn lost(started_at: Option<SystemTime>, message: &str) -> Self {
        let certificate = lost_certificate();
        Self::Exited { started_at, certificate, reason: ExitReason::Unknown, message: message.to_string() }
    }
}

/// The certificate of an end that nobody saw.
pub fn lost_certificate() -> Certificate {
    plain_certificate(ExitStatus::Unknown(255))
}

fn plain_certificate(status: ExitStatus) -> Certificate {
    Certificate {
        status,
        exited_at: SystemTime::now(),
        oom_killed: false,
        oom_cgroup: None,
        killed_by: None,
        peak_memory: None,
    }
}

/// Who a container's process runs as.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct User {
    /// User id.
    pub uid: u32,
    /// Primary group id.
    pub gid: u32,
    /// Supplementary group ids.
    pub groups: Vec<u32>,
}

/// A container's record beside its CRI configuration, stored as JSON.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct ContainerRecord {
    /// The changing part.
    pub state: ContainerState,
    /// The image's id, `sha256:…`.
    pub image_id: String,
    /// What was asked for, resolved to a digest reference where there is one.
    pub image_ref: String,
    /// The image's first tag, for people: a kubelet asks for images by their ids.
    #[serde(default)]
    pub image_name: String,
    /// The image's own stop signal, by name; empty where it has none.
    pub image_stop_signal: String,
    /// The CRI log file; `None` where none was asked for.
    pub log_path: Option<PathBuf>,
    /// The FIFO of stdin, where asked for.
    pub stdin: Option<PathBuf>,
    /// Resolved from configuration and image.
    pub user: User,
    /// The cgroup limits as they stand after updates.
    pub resources: Option<LinuxContainerResources>,
    /// What was changed on the way, such as a clamped oom_score_adj.
    #[serde(default)]
    pub warnings: Vec<String>,
}

/// A container, as readers see it.
#[derive(Debug, Clone)]
pub struct ContainerInfo {
    /// 64 hex digits.
    pub id: String,
    /// Its pod.
    pub pod_id: String,
    /// As it came over CRI.
    pub config: Arc<ContainerConfig>,
    /// When CreateContainer ended.
    pub created_at: SystemTime,
    /// Everything else.
    pub record: ContainerRecord,
}

impl ContainerInfo {
    /// The state.
    pub fn state(&self) -> &ContainerState {
        &self.record.state
    }

    /// A copy in another state.
    #[must_use]
    pub fn in_state(&self, state: ContainerState) -> Self {
        let mut next = self.clone();
        next.record.state = state;
        next
    }

    /// The name and attempt that are unique in its pod.
    pub fn name_key(&self) -> String {
        container_key(&self.config)
    }
}

/// "name/attempt" of a container's configuration.
pub fn container_key(config: &ContainerConfig) -> String {
    match &config.metadata {
        Some(m) => format!("{}/{}", m.name, m.attempt),
        None => "/0".to_string(),
    }
}

/// A pod and its containers at one moment.
#[derive(Debug, Clone)]
pub struct PodView {
    /// The pod.
    pub pod: Arc<PodInfo>,
    /// Its containers, oldest first.
    pub containers: Vec<Arc<ContainerInfo>>,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn certificate(status: ExitStatus, oom: bool) -> Certificate {
        Certificate { oom_killed: oom, ..plain_certificate(status) }
    }

    #[test]
    fn reasons_follow_the_certificate() {
        for (status, oom, reason) in [
            (ExitStatus::Code(0), false, ExitReason::Completed),
            (ExitStatus::Code(1), false, ExitReason::Error),
            (ExitStatus::Signal(9), false, ExitReason::Error),
            (ExitStatus::Signal(9), true, ExitReason::OomKilled),
            (ExitStatus::Code(137), true, ExitReason::OomKilled),
            (ExitStatus::Code(0), true, ExitReason::Completed),
            (ExitStatus::Unknown(255), false, ExitReason::Unknown),
        ] {
            assert_eq!(ExitReason::of(&certificate(status, oom)), reason, "{status:?} {oom}");
        }
    }

    #[test]
    fn a_state_survives_the_database() {
        let state = ContainerState::exited(Some(SystemTime::UNIX_EPOCH), certificate(ExitStatus::Signal(15), false));
        let text = serde_json::to_string(&state).unwrap();
        assert_eq!(serde_json::from_str::<ContainerState>(&text).unwrap(), state);
    }
}
