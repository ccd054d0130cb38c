//! Who is there: pods and containers by id, by unique prefix of an id, by name.
//!
//! Only maps behind a lock that is held for no IO; a pod's content belongs to its
//! owner.

use crate::owner::Msg;
use crate::state::PodView;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};
use tokio::sync::{mpsc, watch};
use types::{Error, Result};

/// How to reach a pod: its owner's mailbox, and its last published view.
pub struct PodHandle {
    /// The pod's id.
    pub id: String,
    mailbox: mpsc::UnboundedSender<Msg>,
    view: RwLock<Arc<PodView>>,
}

impl PodHandle {
    /// A handle on the owner that reads `mailbox`.
    pub fn new(mailbox: mpsc::UnboundedSender<Msg>, view: PodView) -> Self {
        Self { id: view.pod.id.clone(), mailbox, view: RwLock::new(Arc::new(view)) }
    }

    /// The pod at this moment.
    pub fn view(&self) -> Arc<PodView> {
        self.view.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Publishes a new view; only the owner does.
    pub fn publish(&self, view: Arc<PodView>) {
        *self.view.write().unwrap_or_else(PoisonError::into_inner) = view;
    }

    /// Sends the owner a message.
    ///
    /// # Errors
    /// `NotFound` when the pod was removed meanwhile.
    pub fn send(&self, msg: Msg) -> Result<()> {
        self.mailbox.send(msg).map_err(|_| Error::not_found(format!("pod {} has just been removed", self.id)))
    }
}

/// The outcome of a RunPodSandbox that a retry may join.
pub type Attempt = watch::Receiver<Option<Result<String, Arc<Error>>>>;

/// Who holds a pod's name.
#[derive(Clone)]
pub enum NameHolder {
    /// A RunPodSandbox that still runs.
    Starting(Attempt),
    /// A pod that exists.
    Pod(String),
}

#[derive(Default)]
struct Tables {
    pods: BTreeMap<String, Arc<PodHandle>>,
    containers: BTreeMap<String, Arc<PodHandle>>,
    names: BTreeMap<String, NameHolder>,
    /// Pods and containers that are not in the other tables yet, while they are made.
    making: BTreeSet<String>,
}

/// Says that a pod or container of this id is being made, until it is dropped.
pub struct Making {
    registry: Registry,
    id: String,
}

impl Drop for Making {
    fn drop(&mut self) {
        self.registry.tables().making.remove(&self.id);
    }
}

/// The tables. Clones share them.
#[derive(Clone, Default)]
pub struct Registry(Arc<Mutex<Tables>>);

impl Registry {
    fn tables(&self) -> MutexGuard<'_, Tables> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes a pod's name for an attempt, or tells who holds it.
    ///
    /// # Errors
    /// The holder, when the name is taken.
    pub fn reserve(&self, key: &str, attempt: Attempt) -> Result<(), NameHolder> {
        let mut tables = self.tables();
        if let Some(holder) = tables.names.get(key) {
            return Err(holder.clone());
        }
        tables.names.insert(key.to_string(), NameHolder::Starting(attempt));
        Ok(())
    }

    /// Announces an id before anything of it is made.
    pub fn begin(&self, id: &str) -> Making {
        self.tables().making.insert(id.to_string());
        Making { registry: self.clone(), id: id.to_string() }
    }

    /// The ids that were announced and are neither registered nor given up yet.
    pub fn in_the_making(&self) -> BTreeSet<String> {
        self.tables().making.clone()
    }

    /// Keeps a pod's name taken for one that has no owner.
    pub fn hold_name(&self, key: &str, id: &str) {
        self.tables().names.insert(key.to_string(), NameHolder::Pod(id.to_string()));
    }

    /// Gives a pod's name back.
    pub fn release(&self, key: &str) {
        self.tables().names.remove(key);
    }

    /// Adds a pod under its name.
    pub fn add_pod(&self, key: &str, pod: &Arc<PodHandle>) {
        let mut tables = self.tables();
        tables.names.insert(key.to_string(), NameHolder::Pod(pod.id.clone()));
        tables.pods.insert(pod.id.clone(), pod.clone());
    }

    /// Removes a pod and its name.
    pub fn remove_pod(&self, key: &str, id: &str) {
        let mut tables = self.tables();
        tables.names.remove(key);
        tables.pods.remove(id);
    }

    /// Adds a container.
    pub fn add_container(&self, id: &str, pod: &Arc<PodHandle>) {
        self.tables().containers.insert(id.to_string(), pod.clone());
    }

    /// Removes a container.
    pub fn remove_container(&self, id: &str) {
        self.tables().containers.remove(id);
    }

    /// All pods.
    pub fn pods(&self) -> Vec<Arc<PodHandle>> {
        self.tables().pods.values().cloned().collect()
    }

    /// A pod by id or unique prefix of it.
    ///
    /// # Errors
    /// `NotFound`, or `InvalidArgument` when several ids begin so.
    pub fn pod(&self, id: &str) -> Result<Arc<PodHandle>> {
        find(&self.tables().pods, "pod", id).map(|(_, pod)| pod)
    }

    /// A container's whole id and its pod, by id or unique prefix of it.
    ///
    /// # Errors
    /// `NotFound`, or `InvalidArgument` when several ids begin so.
    pub fn container(&self, id: &str) -> Result<(String, Arc<PodHandle>)> {
        find(&self.tables().containers, "container", id)
    }
}

fn find(table: &BTreeMap<String, Arc<PodHandle>>, what: &str, id: &str) -> Result<(String, Arc<PodHandle>)> {
    if id.is_empty() {
        return Err(Error::invalid(format!("the id of the {what} is empty")));
    }
    if let Some(pod) = table.get(id) {
        return Ok((id.to_string(), pod.clone()));
    }
    let mut matching = table.range(id.to_string()..).take_while(|(key, _)| key.starts_with(id));
    match (matching.next(), matching.next()) {
        (Some((key, pod)), None) => Ok((key.clone(), pod.clone())),
        (Some((a, _)), Some((b, _))) => Err(Error::invalid(format!(
            "{what} {id:?} is ambiguous: {:.12}… and {:.12}… begin so; give more of the id",
            a, b
        ))),
        _ => Err(Error::not_found(format!("no {what} {id:?} exists"))),
    }
}
