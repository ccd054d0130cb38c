//! Pods and containers whose records can't be read: they run on, nothing is done to them
//! unasked, and by their ids they can be stopped and removed.
//!
//! ```text
//!  bad record ──► Held ──StopPodSandbox──► its processes, network, namespaces are ended
//!                  │  └──RemovePodSandbox, RemoveContainer──► and its files, snapshots, record
//!                  └─ its name stays taken: whoever makes the pod anew is told of the old one
//! ```

use crate::health::{Check, Trouble};
use crate::journal::Write;
use crate::shared::Shared;
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use types::{Error, Result, ResultExt, Signal};

/// What is held of one pod.
#[derive(Debug, Clone, Default)]
pub struct Held {
    /// The pod's own record is bad; else only those of containers are.
    pub whole: bool,
    /// Its name, where that is known.
    pub key: Option<String>,
    /// Containers that are held: all of a whole pod, else the bad ones.
    pub containers: BTreeSet<String>,
    /// What is wrong, an object and its reason each.
    pub reasons: Vec<(String, String)>,
}

/// All that is held, by pod. Clones share it.
#[derive(Debug, Clone, Default)]
pub struct Quarantine(Arc<Mutex<BTreeMap<String, Held>>>);

impl Quarantine {
    fn table(&self) -> MutexGuard<'_, BTreeMap<String, Held>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Holds a container whose record is bad.
    pub(crate) fn hold_container(&self, pod: &str, id: &str, why: String) {
        let mut table = self.table();
        let held = table.entry(pod.to_string()).or_default();
        held.containers.insert(id.to_string());
        held.reasons.push((format!("container {id}"), why));
    }

    /// Holds a pod with all its containers.
    pub(crate) fn hold_pod(&self, id: &str, key: Option<String>, containers: Vec<String>, why: String) {
        let mut table = self.table();
        let held = table.entry(id.to_string()).or_default();
        (held.whole, held.key) = (true, key);
        held.containers.extend(containers);
        held.reasons.push((format!("pod {id}"), why));
    }

    /// A pod that is held as a whole, by id or unique prefix.
    pub(crate) fn pod(&self, id: &str) -> Option<(String, Held)> {
        let table = self.table();
        let mut found = table.iter().filter(|(known, held)| held.whole && !id.is_empty() && known.starts_with(id));
        match (found.next(), found.next()) {
            (Some((id, held)), None) => Some((id.clone(), held.clone())),
            _ => None,
        }
    }

    /// A container that is held, by id or unique prefix: its pod and its whole id.
    pub(crate) fn container(&self, id: &str) -> Option<(String, String)> {
        let table = self.table();
        let all = table.iter().flat_map(|(pod, held)| held.containers.iter().map(move |c| (pod, c)));
        let mut found = all.filter(|(_, c)| !id.is_empty() && c.starts_with(id));
        match (found.next(), found.next()) {
            (Some((pod, c)), None) => Some((pod.clone(), c.clone())),
            _ => None,
        }
    }

    /// Everything that is held, by pod.
    pub(crate) fn all(&self) -> BTreeMap<String, Held> {
        self.table().clone()
    }

    /// Lets go of a pod with all of it: its record is gone.
    pub(crate) fn release_pod(&self, id: &str) {
        self.table().remove(id);
    }

    /// Lets go of a container.
    pub(crate) fn release_container(&self, pod: &str, id: &str) {
        let mut table = self.table();
        if let Some(held) = table.get_mut(pod) {
            held.containers.remove(id);
            held.reasons.retain(|(object, _)| *object != format!("container {id}"));
            if held.reasons.is_empty() {
                table.remove(pod);
            }
        }
    }

    /// For people, each with its remedy.
    pub fn troubles(&self) -> Vec<Trouble> {
        let mut all = Vec::new();
        for (pod, held) in self.table().iter() {
            for (object, why) in &held.reasons {
                let remedy = if held.whole {
                    format!("stop and remove the pod by its id ({pod}): longshore rm {pod}")
                } else {
                    format!("remove the container by its id, or its pod ({pod}); the pod's other containers are well")
                };
                let found = format!("{object} is left alone: {why}");
                all.push(Trouble { check: Check::Quarantine, found, remedy });
            }
        }
        all
    }
}

/// Ends what a held pod has on the node, and with `remove` forgets it. Goes on to its end
/// whatever fails, and whoever stays to hear of it.
///
/// # Errors
/// All that failed, joined; it may be asked for again.
pub(crate) async fn end_pod(shared: &Arc<Shared>, id: String, held: Held, remove: bool) -> Result<()> {
    let shared = shared.clone();
    let work = tokio::spawn(async move {
        let mut errors = Vec::new();
        for c in held.containers.iter().chain([&id]) {
            let _ = shared.runtime.kill_task(&id, c, Signal::KILL, true, "a pod whose record can't be read").await;
        }
        errors.extend(shared.bounded("stopping the shim", shared.runtime.stop_pod(&id)).await.err());
        match shared.network.detach(&id).await {
            Ok(()) => errors.extend(shared.bounded("removing the sandbox", shared.sandboxes.teardown(&id)).await.err()),
            Err(e) => errors.push(e),
        }
        if remove && errors.is_empty() {
            for c in &held.containers {
                errors.extend(remove_files(&shared, c).await);
            }
        }
        if remove && errors.is_empty() {
            match forget(&shared, Write::DeletePod(id.clone())).await {
                Ok(()) => {
                    if let Some(key) = &held.key {
                        shared.registry.release(key);
                    }
                    shared.quarantine.release_pod(&id);
                }
                Err(e) => errors.push(e),
            }
        }
        Error::join(&format!("pod {id:.12}, whose record can't be read"), errors)
    });
    work.await.map_err(|e| Error::internal("end a pod").because(e))?
}

/// The same for one container.
///
/// # Errors
/// All that failed, joined; it may be asked for again.
pub(crate) async fn end_container(shared: &Arc<Shared>, pod: String, id: String, remove: bool) -> Result<()> {
    let shared = shared.clone();
    let work = tokio::spawn(async move {
        let mut errors = Vec::new();
        errors.extend(end_task(&shared, &pod, &id).await.err());
        if remove && errors.is_empty() {
            errors.extend(remove_files(&shared, &id).await);
        }
        if remove && errors.is_empty() {
            match forget(&shared, Write::DeleteContainer(id.clone())).await {
                Ok(()) => shared.quarantine.release_container(&pod, &id),
                Err(e) => errors.push(e),
            }
        }
        Error::join(&format!("container {id:.12}, whose record can't be read"), errors)
    });
    work.await.map_err(|e| Error::internal("end a container").because(e))?
}

/// Kills a task that nobody waits for, and deletes it.
pub(crate) async fn end_task(shared: &Shared, pod: &str, id: &str) -> Result<()> {
    crate::ops::end_task_of(shared, pod, id, "a container without a record").await
}

async fn forget(shared: &Shared, write: Write) -> Result<()> {
    let (tx, rx) = tokio::sync::oneshot::channel();
    shared.journal.submit(write, move |saved| {
        let _ = tx.send(saved);
    });
    rx.await.map_err(|_| Error::unavailable("the database is closed: the daemon is stopping"))?
}

/// Removes a container's snapshots and files.
pub(crate) async fn remove_files(shared: &Shared, id: &str) -> Vec<Error> {
    let mut errors = Vec::new();
    match shared.snapshots.list().await {
        Ok(keys) => {
            for key in keys.iter().filter(|k| crate::ops::container_of(k) == id) {
                errors.extend(shared.snapshots.remove(key).await.err());
            }
        }
        Err(e) => errors.push(e),
    }
    errors.extend(remove_path(&shared.container_dir(id)).await.err());
    errors.extend(remove_path(&shared.config.state.join("stdin").join(id)).await.err());
    errors
}

/// Removes a file or a directory; none is success.
pub(crate) async fn remove_path(path: &Path) -> Result<()> {
    let removed = match tokio::fs::symlink_metadata(path).await {
        Ok(m) if m.is_dir() => tokio::fs::remove_dir_all(path).await,
        Ok(_) => tokio::fs::remove_file(path).await,
        Err(e) => Err(e),
    };
    match removed {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => Err(e).context(|| format!("remove {}", path.display())),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_held_is_found_by_prefix_and_let_go() {
        let q = Quarantine::default();
        q.hold_container("aa11", "c1", "no JSON".into());
        q.hold_pod("bb22", Some("ns/n/u/0".into()), vec!["c2".into(), "c3".into()], "no state".into());
        assert!(q.pod("aa").is_none() && q.pod("").is_none(), "only its container is held");
        assert_eq!(q.pod("bb").unwrap().0, "bb22");
        assert_eq!(q.container("c1"), Some(("aa11".into(), "c1".into())));
        assert_eq!(q.container("c"), None, "ambiguous");
        let found: Vec<String> = q.troubles().into_iter().map(|t| t.found).collect();
        assert_eq!(found, ["container c1 is left alone: no JSON", "pod bb22 is left alone: no state"]);
        q.release_container("aa11", "c1");
        q.release_pod("bb22");
        assert!(q.troubles().is_empty() && q.all().is_empty());
    }
}
