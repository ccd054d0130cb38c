//! What all containers of a shim share.

use crate::container::{Handle, Msg};
use crate::events::Publisher;
use crate::streams::{Place, SharedWriter};
use oci::Children;
use std::collections::{HashMap, HashSet};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::sync::{Notify, Semaphore, SemaphorePermit, oneshot, watch};
use types::{Error, Result};

/// How long a runtime call may wait for its turn.
const QUEUE: Duration = Duration::from_secs(40);

/// How a shim was started.
#[derive(Debug, Clone)]
pub struct Settings {
    /// Its own id: the pod's or the first container's.
    pub id: String,
    /// The caller's namespace.
    pub namespace: String,
    /// Where events go (TTRPC_ADDRESS); empty: nowhere.
    pub events: String,
    /// A short directory, closed to others, for sockets.
    pub sockets: PathBuf,
    /// The socket on which it is found; removed once it takes no more work.
    pub socket: Option<PathBuf>,
}

/// What all containers share.
pub(crate) struct Shared {
    pub settings: Settings,
    pub children: Children,
    pub events: Publisher,
    pub writer: SharedWriter,
    /// Runtime calls at a time: more than the CPUs can run only slow each other.
    permits: Semaphore,
    /// The same for those that take away.
    endings: Semaphore,
    /// Told when the shim shall end.
    pub stop: Notify,
    containers: Mutex<Containers>,
    /// Root file systems that a thread is mounting at this moment.
    mounting: Mutex<HashSet<PathBuf>>,
}

/// A name that is taken.
enum Slot {
    /// By a container on its way up.
    Creating(Arc<Creation>),
    /// By one that has an owner.
    Up(Handle),
}

/// A creation under way: how to end it early, and how to learn of its end.
pub(crate) struct Creation {
    abort: watch::Sender<bool>,
    ended: watch::Sender<bool>,
}

impl Creation {
    /// Becomes true when the creation shall end early.
    pub fn aborted(&self) -> watch::Receiver<bool> {
        self.abort.subscribe()
    }

    /// Ends it early, and waits until it has made its container after all or left
    /// nothing of it. Its own bounds hold.
    async fn end(&self) {
        self.abort.send_replace(true);
        let _ = self.ended.subscribe().wait_for(|e| *e).await;
    }
}

/// A place that is being mounted on.
pub(crate) struct Mounting {
    shared: Arc<Shared>,
    root: PathBuf,
}

impl Drop for Mounting {
    fn drop(&mut self) {
        self.shared.mounts().remove(&self.root);
    }
}

#[derive(Default)]
struct Containers {
    by_id: HashMap<String, Slot>,
    /// No more of them: the shim is ending.
    closed: bool,
    /// No more of them: the sandbox is being stopped, or was.
    stopped: bool,
}

impl Shared {
    pub fn new(settings: Settings, children: Children) -> Self {
        let cpus = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
        let events = Publisher::new(&settings.events, &settings.namespace);
        Self {
            settings,
            children,
            events,
            writer: SharedWriter::default(),
            permits: Semaphore::new((2 * cpus).max(4)),
            endings: Semaphore::new(cpus.max(2)),
            stop: Notify::new(),
            containers: Mutex::default(),
            mounting: Mutex::default(),
        }
    }

    fn containers(&self) -> MutexGuard<'_, Containers> {
        self.containers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Where the streams of the process `id` are made.
    pub fn place<'a>(&'a self, id: &'a str) -> Place<'a> {
        Place {
            id,
            namespace: &self.settings.namespace,
            children: &self.children,
            writer: &self.writer,
            sockets: &self.settings.sockets,
        }
    }

    /// Waits for a turn to call the runtime.
    pub async fn turn(&self) -> Result<SemaphorePermit<'_>> {
        queue(&self.permits).await
    }

    /// The same for a call that takes a container away: it does not wait for those that
    /// make one and hang.
    pub async fn turn_to_end(&self) -> Result<SemaphorePermit<'_>> {
        queue(&self.endings).await
    }

    /// Takes a name for a container that is about to be created. The creation ends
    /// with [`Shared::fill`] or [`Shared::release`].
    pub fn reserve(&self, id: &str) -> Result<Arc<Creation>> {
        let mut all = self.containers();
        if all.closed {
            return Err(Error::unavailable("the shim is ending").hint("start another one"));
        }
        if all.stopped {
            return Err(Error::precondition(format!("container {id} can't be created: the sandbox was stopped")));
        }
        if all.by_id.contains_key(id) {
            return Err(Error::exists(format!("container {id} exists already")));
        }
        let creation = Arc::new(Creation { abort: watch::channel(false).0, ended: watch::channel(false).0 });
        all.by_id.insert(id.to_string(), Slot::Creating(creation.clone()));
        Ok(creation)
    }

    /// The container exists now.
    pub fn fill(&self, id: &str, handle: Handle) {
        if let Some(Slot::Creating(c)) = self.containers().by_id.insert(id.to_string(), Slot::Up(handle)) {
            c.ended.send_replace(true);
        }
    }

    /// The container is gone, or was never made.
    pub fn release(&self, id: &str) {
        let mut all = self.containers();
        let was = all.by_id.remove(id);
        all.by_id.shrink_to_fit();
        drop(all);
        if let Some(Slot::Creating(c)) = was {
            c.ended.send_replace(true);
        }
        sys::malloc::trim();
    }

    /// Ends the shim, if it has no container. From here on it takes none, and is
    /// found no more: a `start` that comes now gets another shim and not this one.
    /// Says whether it ends.
    pub fn close(&self) -> bool {
        let mut all = self.containers();
        if all.closed || !all.by_id.is_empty() {
            return all.closed;
        }
        all.closed = true;
        drop(all);
        if let Some(socket) = &self.settings.socket {
            let _ = std::fs::remove_file(socket);
        }
        self.stop.notify_one();
        true
    }

    /// Takes a place for what is mounted on it until the returned value is dropped: a
    /// thread that hangs in a mount may outlive its container.
    ///
    /// # Errors
    /// `Unavailable` where an earlier mount hangs there.
    pub fn mounting(self: &Arc<Self>, root: &Path) -> Result<Mounting> {
        if !self.mounts().insert(root.to_path_buf()) {
            let text = format!("mount on {}: an earlier mount there has not ended", root.display());
            return Err(Error::unavailable(text).hint("see to the disk or server that its source is on"));
        }
        Ok(Mounting { shared: self.clone(), root: root.to_path_buf() })
    }

    fn mounts(&self) -> MutexGuard<'_, HashSet<PathBuf>> {
        self.mounting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn is_closed(&self) -> bool {
        self.containers().closed
    }

    pub fn find(&self, id: &str) -> Result<Handle> {
        match self.containers().by_id.get(id) {
            Some(Slot::Up(handle)) => Ok(handle.clone()),
            Some(Slot::Creating(_)) => Err(Error::precondition(format!("container {id} is being created"))),
            None => Err(Error::not_found(format!("container {id}"))),
        }
    }

    pub fn handles(&self) -> Vec<Handle> {
        let up = |s: &Slot| if let Slot::Up(handle) = s { Some(handle.clone()) } else { None };
        self.containers().by_id.values().filter_map(up).collect()
    }

    /// Ends a creation early, where one is under way. True where nothing is left of
    /// the container.
    pub async fn end_creation(&self, id: &str) -> bool {
        let creation = match self.containers().by_id.get(id) {
            Some(Slot::Creating(c)) => c.clone(),
            Some(Slot::Up(_)) | None => return false,
        };
        creation.end().await;
        !self.containers().by_id.contains_key(id)
    }

    /// Takes no more containers, and ends the creations that are under way: of each
    /// nothing is left then, or it is among the handles.
    pub async fn end_creations(&self) {
        let creations: Vec<Arc<Creation>> = {
            let mut all = self.containers();
            all.stopped = true;
            let under_way = |s: &Slot| if let Slot::Creating(c) = s { Some(c.clone()) } else { None };
            all.by_id.values().filter_map(under_way).collect()
        };
        for creation in &creations {
            creation.abort.send_replace(true);
        }
        for creation in &creations {
            creation.end().await;
        }
    }

    /// What the shim waits for now, in sentences.
    pub async fn waits(&self) -> Vec<String> {
        let mut waits = Vec::new();
        for handle in self.handles() {
            if let Ok(more) = ask(&handle, "", Msg::Waits).await {
                waits.extend(more);
            }
        }
        let held = self.children.held_back();
        if held > 0 {
            waits.push(format!("{held} unknown zombies wait for runtime calls that may name them"));
        }
        waits
    }

    /// Sends a request to a container's owner and awaits its answer. The caller
    /// may be dropped meanwhile; the owner goes on.
    pub async fn ask<T>(&self, id: &str, request: impl FnOnce(oneshot::Sender<Result<T>>) -> Msg) -> Result<T> {
        ask(&self.find(id)?, id, request).await
    }
}

async fn queue(permits: &Semaphore) -> Result<SemaphorePermit<'_>> {
    match tokio::time::timeout(QUEUE, permits.acquire()).await {
        Ok(Ok(permit)) => Ok(permit),
        Ok(Err(_)) => Err(Error::unavailable("the shim is stopping")),
        Err(_) => {
            let text = format!("{} s in the queue for the OCI runtime were not enough", QUEUE.as_secs());
            Err(Error::deadline(text).hint("earlier calls of the runtime hang"))
        }
    }
}

pub(crate) async fn ask<T>(
    handle: &Handle,
    id: &str,
    request: impl FnOnce(oneshot::Sender<Result<T>>) -> Msg,
) -> Result<T> {
    let (tx, rx) = oneshot::channel();
    let gone = || Error::not_found(format!("container {id}"));
    handle.send(request(tx)).map_err(|_| gone())?;
    rx.await.map_err(|_| gone())?
}
