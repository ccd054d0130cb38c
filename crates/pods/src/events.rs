//! What happens to pods and containers, for GetContainerEvents.

use crate::state::PodView;
use std::sync::Arc;
use std::time::SystemTime;
use tokio::sync::broadcast;

/// How many events a slow reader may lag behind before it misses some; it is told
/// so and lists anew, as a kubelet does.
const BACKLOG: usize = 1024;

/// What happened.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum EventKind {
    /// It was made.
    Created,
    /// It runs.
    Started,
    /// It ended.
    Stopped,
    /// It is gone.
    Deleted,
}

/// One event of a container, or of a pod's sandbox under the pod's own id.
#[derive(Debug, Clone)]
pub struct PodEvent {
    /// The container's id, or the pod's.
    pub id: String,
    /// What happened.
    pub kind: EventKind,
    /// When.
    pub at: SystemTime,
    /// The pod and its containers right after it; `None` once the pod is gone.
    pub view: Option<Arc<PodView>>,
}

/// Where events go out. Clones share it.
#[derive(Clone)]
pub struct Events(broadcast::Sender<Arc<PodEvent>>);

impl Default for Events {
    fn default() -> Self {
        Self(broadcast::channel(BACKLOG).0)
    }
}

impl Events {
    /// Sends an event to whoever listens now.
    pub fn send(&self, id: &str, kind: EventKind, view: Option<Arc<PodView>>) {
        // No listener is the usual case.
        let _ = self.0.send(Arc::new(PodEvent { id: id.to_string(), kind, at: SystemTime::now(), view }));
    }

    /// All events from now on.
    pub fn subscribe(&self) -> broadcast::Receiver<Arc<PodEvent>> {
        self.0.subscribe()
    }
}
