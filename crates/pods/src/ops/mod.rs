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
pub use stop::{delete_task, end_task, end_task_of, stop, stop_pod};
pub use update::{merge_resources, update};

use crate::handlers::Handler;
use crate::owner::Msg;
use crate::shared::Shared;
use crate::state::PodInfo;
use proto::cri::PodSandboxConfig;
use runtime::PodSpec;
use std::sync::Arc;
use tokio::sync::{mpsc, watch};
use types::Result;

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

/// The pod as the runtime is told of it: its handler, and the annotations that may
/// reach a shim.
pub fn pod_spec(
    shared: &Shared,
    id: &str,
    config: &PodSandboxConfig,
    handler: &str,
    bundle_gid: Option<u32>,
) -> PodSpec {
    let of_handler = shared.handlers.find(handler).unwrap_or_else(|_| shared.handlers.default_one());
    let annotations = spec::pod_annotations(id, config, &of_handler.policy).into_iter().collect();
    PodSpec { id: id.to_string(), handler: handler.to_string(), annotations, bundle_gid }
}

impl PodContext {
    /// The pod as the runtime is told of it.
    pub fn pod_spec(&self) -> PodSpec {
        let state = &self.pod.state;
        pod_spec(&self.shared, &self.pod.id, &self.pod.config, state.handler_name(), state.sandbox.bundle_gid())
    }

    /// The handler of its containers.
    pub fn handler(&self) -> Result<&Handler> {
        self.shared.handlers.of_pod(self.pod.state.handler_name())
    }
}
