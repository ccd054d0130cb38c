//! What every pod's owner and every operation share.

use crate::events::Events;
use crate::handlers::Handlers;
use crate::health::Health;
use crate::journal::Journal;
use crate::quarantine::Quarantine;
use crate::registry::Registry;
use crate::sandbox::Sandboxes;
use images::Images;
use network::Network;
use runtime::Runtime;
use snapshots::Snapshotter;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;
use store::Store;
use telemetry::Timelines;
use types::{Error, Result};

/// What an operator can set.
#[derive(Debug, Clone)]
pub struct PodsConfig {
    /// What survives a reboot: container directories.
    pub root: PathBuf,
    /// What does not: namespaces, FIFOs, pod files.
    pub state: PathBuf,
    /// How long an exec's output is drained after its end; `None` is for ever.
    pub drain_exec_sync_io_timeout: Option<Duration>,
    /// The longest line of a container log, in bytes.
    pub log_line_limit: u32,
    /// The static init of pods that share one pid namespace.
    pub pod_init: PathBuf,
    /// The bound on one step of a pod's or container's start or end.
    pub operation_timeout: Duration,
}

/// Shared by owners and operations.
pub struct Shared {
    /// What an operator can set.
    pub config: PodsConfig,
    /// The database.
    pub store: Store,
    /// Writes in order.
    pub journal: Journal,
    /// The seam to shims.
    pub runtime: Arc<dyn Runtime>,
    /// Images.
    pub images: Images,
    /// Root file systems.
    pub snapshots: Arc<dyn Snapshotter>,
    /// Namespaces, files and mounts of pods.
    pub sandboxes: Sandboxes,
    /// Who attaches pods to their networks.
    pub network: Network,
    /// Timed steps.
    pub timelines: Timelines,
    /// What happens, for listeners.
    pub events: Events,
    /// Who is there.
    pub registry: Registry,
    /// What RunPodSandbox may name, with what each can do.
    pub handlers: Handlers,
    /// Whose records can't be read.
    pub quarantine: Quarantine,
    /// What an operator should know.
    pub health: Health,
}

impl Shared {
    /// Bounds one step and names it when it misses its bound.
    ///
    /// # Errors
    /// `DeadlineExceeded`, naming the step; or the step's own error.
    pub async fn bounded<T>(&self, what: &str, step: impl Future<Output = Result<T>>) -> Result<T> {
        let bound = self.config.operation_timeout;
        match tokio::time::timeout(bound, step).await {
            Ok(outcome) => outcome,
            Err(_) => Err(Error::deadline(format!("{what} has not ended after {} s", bound.as_secs()))),
        }
    }

    /// Queues a pod's timeline for the database.
    pub fn save_timeline(&self, pod: &str) {
        match self.timelines.serialize(pod) {
            Ok(json) => self.journal.note(crate::journal::Write::Timeline(pod.to_string(), json)),
            Err(e) => tracing::warn!("the timeline of pod {pod:.12} is not stored: {e}"),
        }
    }

    /// Where a container's spec is kept from its creation to its removal.
    pub fn container_dir(&self, id: &str) -> PathBuf {
        self.config.root.join("containers").join(id)
    }
}
