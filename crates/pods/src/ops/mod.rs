//! The operations that pods' owners start: all the IO is here, none of the state.
//!
//! Each undoes itself when it fails, has its bounds, and reports its end to the
//! owner, which alone changes states.

mod create;
mod image_mounts;
mod remove;
mod run_pod;
mod start;
mod stop;
mod update;

pub use create::create;
pub use image_mounts::container_of;
pub use remove::{remove, remove_pod};
pub use run_pod::{NewPod, run_pod};
pub use start::start;
pub use stop::{delete_task, end_task, stop, stop_pod};
pub use update::{merge_resources, update};

use crate::owner::Msg;
use crate::shared::Shared;
use crate::state::PodInfo;
use proto::cri::PodSandboxConfig;
use runtime::PodSpec;
use std::collections::BTreeMap;
use std::sync::Arc;
use tokio::sync::{mpsc, watch};

/// A pod at the moment when an operation began.
#[derive(Clone)]
pub struct PodContext {
    /// What all share.
    pub shared: Arc<Shared>,
    /// The pod.
    pub pod: Arc<PodInfo>,
    /// Its owner.
    pub mailbox: mpsc::UnboundedSender<Msg>,
    /// True once the init of its shared pid namespace has ended, or has none.
    pub init_ended: watch::Receiver<bool>,
}

/// The pod as the runtime is told of it: the annotations that shims, kata and
/// gVisor among them, know pods by.
pub fn pod_spec(id: &str, config: &PodSandboxConfig, bundle_gid: Option<u32>) -> PodSpec {
    let mut annotations: BTreeMap<String, String> =
        config.annotations.iter().map(|(k, v)| (k.clone(), v.clone())).collect();
    let meta = config.metadata.clone().unwrap_or_default();
    for (key, value) in [
        ("io.kubernetes.cri.container-type", "sandbox".to_string()),
        ("io.kubernetes.cri.sandbox-id", id.to_string()),
        ("io.kubernetes.cri.sandbox-name", meta.name),
        ("io.kubernetes.cri.sandbox-namespace", meta.namespace),
        ("io.kubernetes.cri.sandbox-uid", meta.uid),
        ("io.kubernetes.cri.sandbox-log-directory", config.log_directory.clone()),
    ] {
        annotations.insert(key.to_string(), value);
    }
    PodSpec { id: id.to_string(), annotations, bundle_gid }
}

impl PodContext {
    /// The pod as the runtime is told of it.
    pub fn pod_spec(&self) -> PodSpec {
        pod_spec(&self.pod.id, &self.pod.config, self.pod.state.sandbox.bundle_gid())
    }
}
