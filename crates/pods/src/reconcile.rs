//! What exists on the node against what should: at the daemon's start, every few minutes,
//! and when asked.
//!
//! ```text
//!  1. list   bundles, shims, namespaces, attachments, snapshots, directories
//!  2. look   who is known now: pods and containers there are, are being made, are held
//!  3. once more after a moment, beside running calls
//!  4. remove what was found each time and nobody knows
//! ```
//!
//! In this order it races with no call: whatever is made belongs to an id that was
//! announced before, and an id that is gone never comes back. Looked for is only where
//! nobody but us has anything: in our own directories, and by names that begin there. What
//! looks strange there is reported and left alone.

use crate::health::{Check, Trouble};
use crate::shared::Shared;
use runtime::Holdings;
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinSet;
use types::{Error, Result};

/// How often it is done.
const EVERY: Duration = Duration::from_secs(300);
/// The bound on one leftover's end; what it began goes on.
const BOUND: Duration = Duration::from_secs(30);

/// How long what is just going may take to go.
const PATIENCE: Duration = Duration::from_secs(1);

/// Whose things may exist.
#[derive(Debug, Clone, Default)]
pub(crate) struct Known {
    /// Pods that have something on the node, or may get it.
    pub pods: BTreeSet<String>,
    /// Containers, of whatever pod.
    pub containers: BTreeSet<String>,
}

impl Known {
    /// Who is there now.
    pub(crate) fn of(shared: &Shared) -> Self {
        let mut known = Self::default();
        // First: who has just been made is registered before it is no longer in the making.
        let making = shared.registry.in_the_making();
        for handle in shared.registry.pods() {
            let view = handle.view();
            if !view.pod.state.torn_down {
                known.pods.insert(view.pod.id.clone());
            }
            known.containers.extend(view.containers.iter().map(|c| c.id.clone()));
        }
        known.hold(&shared.quarantine);
        known.pods.extend(making.iter().cloned());
        known.containers.extend(making);
        known
    }

    /// What is in quarantine, too.
    pub(crate) fn hold(&mut self, quarantine: &crate::quarantine::Quarantine) {
        for (pod, held) in quarantine.all() {
            self.containers.extend(held.containers);
            // A container that is held keeps its pod from nothing else.
            self.pods.insert(pod);
        }
    }
}

/// A request for a round at once; answered when it has ended.
pub(crate) type Asked = oneshot::Sender<()>;

/// Does it every few minutes, and when asked, one round at a time; until nobody can ask.
pub(crate) async fn run(shared: Arc<Shared>, mut asked: mpsc::UnboundedReceiver<Asked>) {
    loop {
        let waiting = tokio::select! {
            () = tokio::time::sleep(EVERY) => None,
            request = asked.recv() => match request {
                Some(answer) => Some(answer),
                None => return,
            },
        };
        patient_round(&shared).await;
        if let Some(answer) = waiting {
            let _ = answer.send(());
        }
    }
}

/// What one round did.
#[derive(Default)]
struct Outcome {
    removed: Vec<String>,
    left: Vec<Trouble>,
}

impl Outcome {
    fn add(&mut self, what: String, errors: Vec<Error>) {
        match Error::join(&what, errors) {
            Ok(()) => self.removed.push(what),
            Err(e) => self.stays(&e),
        }
    }

    fn stays(&mut self, e: &Error) {
        let remedy =
            "it is tried again every five minutes, and by longshore doctor --fix; else see to its cause".into();
        self.left.push(Trouble { check: Check::Leftovers, found: e.to_string(), remedy });
    }

    fn strange(&mut self, held: &Holdings) {
        for path in &held.strange {
            let found = format!("{} is no bundle of ours and is left alone", path.display());
            let remedy = "remove it by hand if nobody needs it".into();
            self.left.push(Trouble { check: Check::Quarantine, found, remedy });
        }
    }

    fn listed<T: Default>(&mut self, outcome: Result<T>) -> T {
        outcome.unwrap_or_else(|e| {
            self.stays(&e);
            T::default()
        })
    }
}

/// What exists.
struct Found {
    held: Holdings,
    /// Pods that have namespaces, files, or an attachment to a network.
    pods: BTreeSet<String>,
    /// By key.
    snapshots: BTreeSet<String>,
    dirs: BTreeSet<String>,
    fifos: BTreeSet<String>,
}

/// What exists of nobody.
#[derive(Debug, Default, PartialEq, Eq)]
struct Unknown {
    pods: BTreeSet<String>,
    /// Each with its pod.
    tasks: BTreeSet<(String, String)>,
    orphans: BTreeSet<String>,
    snapshots: BTreeSet<String>,
    dirs: BTreeSet<String>,
    fifos: BTreeSet<String>,
}

impl Found {
    async fn list(shared: &Shared, all: &mut Outcome) -> Self {
        let held = all.listed(shared.runtime.holdings().await);
        let mut pods = all.listed(shared.sandboxes.found().await);
        pods.extend(all.listed(shared.network.attached().await));
        Self {
            held,
            pods,
            snapshots: all.listed(shared.snapshots.list().await).into_iter().collect(),
            dirs: names(&shared.config.root.join("containers")).await,
            fifos: names(&shared.config.state.join("stdin")).await,
        }
    }

    fn unknown(&self, known: &Known) -> Unknown {
        let no_pod = |id: &&String| !known.pods.contains(*id);
        let no_container = |id: &str| !known.containers.contains(id);
        let of = |ids: &BTreeSet<String>| ids.iter().filter(|id| no_container(id)).cloned().collect();
        // The pod's own init bears its id.
        let stray = |(pod, id): &&(String, String)| known.pods.contains(pod) && pod != id && no_container(id);
        // What has a bundle ends with that.
        let bundled = |id: &&String| self.held.pods.contains(*id) || self.held.tasks.iter().any(|(_, c)| c == *id);
        Unknown {
            pods: self.held.pods.iter().chain(&self.pods).filter(no_pod).cloned().collect(),
            tasks: self.held.tasks.iter().filter(stray).cloned().collect(),
            orphans: self
                .held
                .orphans
                .iter()
                .filter(|id| no_pod(id) && no_container(id) && !bundled(id))
                .cloned()
                .collect(),
            snapshots: self.snapshots.iter().filter(|k| no_container(crate::ops::container_of(k))).cloned().collect(),
            dirs: of(&self.dirs),
            fifos: of(&self.fifos),
        }
    }
}

impl Unknown {
    fn and(&self, other: &Self) -> Self {
        Self {
            pods: &self.pods & &other.pods,
            tasks: &self.tasks & &other.tasks,
            orphans: &self.orphans & &other.orphans,
            snapshots: &self.snapshots & &other.snapshots,
            dirs: &self.dirs & &other.dirs,
            fifos: &self.fifos & &other.fifos,
        }
    }
}

/// A round beside running calls: what is just going is given a moment to go by itself.
async fn patient_round(shared: &Arc<Shared>) {
    let mut all = Outcome::default();
    let found = Found::list(shared, &mut all).await;
    let first = found.unknown(&Known::of(shared));
    if first == Unknown::default() {
        all.strange(&found.held);
        return end(shared, first, all).await;
    }
    tokio::time::sleep(PATIENCE).await;
    let mut all = Outcome::default();
    let found = Found::list(shared, &mut all).await;
    let still = found.unknown(&Known::of(shared)).and(&first);
    all.strange(&found.held);
    end(shared, still, all).await;
}

/// The round of the daemon's start, before there are calls.
pub(crate) async fn first_round(shared: &Arc<Shared>, known: &Known) {
    let mut all = Outcome::default();
    let found = Found::list(shared, &mut all).await;
    all.strange(&found.held);
    let mut unknown = found.unknown(known);
    // Those are being detached already, and what hangs there must not hold up the start.
    unknown.pods = &unknown.pods - &shared.network.strays();
    end(shared, unknown, all).await;
}

async fn end(shared: &Arc<Shared>, unknown: Unknown, mut all: Outcome) {
    end_pods(shared, unknown.pods, &mut all).await;
    for (pod, id) in &unknown.tasks {
        let ended = crate::quarantine::end_task(shared, pod, id).await;
        all.add(format!("the task of container {id:.12} in pod {pod:.12}"), ended.err().into_iter().collect());
    }
    for id in &unknown.orphans {
        let ended = shared.bounded("ending it", shared.runtime.end_orphan(id)).await;
        all.add(format!("{id:.12}, whose bundle is gone"), ended.err().into_iter().collect());
    }
    for key in &unknown.snapshots {
        let removed = shared.snapshots.remove(key).await;
        all.add(format!("the snapshot {key:.12}"), removed.err().into_iter().collect());
    }
    for id in &unknown.dirs {
        let removed = remove_container_dir(&shared.container_dir(id)).await;
        all.add(format!("the directory of container {id:.12}"), removed);
    }
    for id in &unknown.fifos {
        let removed = crate::quarantine::remove_path(&shared.config.state.join("stdin").join(id)).await;
        all.add(format!("stdin of container {id:.12}"), removed.err().into_iter().collect());
    }
    let cleared = shared.snapshots.clear_leftovers().await;
    for dir in all.listed(cleared) {
        all.removed.push(format!("the snapshot directory {}", dir.display()));
    }
    for what in &all.removed {
        tracing::warn!("removed a leftover: {what}");
    }
    for trouble in shared.health.note_round(&all.removed, all.left) {
        tracing::warn!("{}", trouble.found);
    }
}

/// Ends all that pods have on the node which nobody knows, all at once.
async fn end_pods(shared: &Arc<Shared>, pods: BTreeSet<String>, all: &mut Outcome) {
    let mut ends = JoinSet::new();
    for id in pods {
        let shared = shared.clone();
        ends.spawn(async move {
            let work = tokio::time::timeout(BOUND, end_pod(&shared, &id)).await;
            let late = || vec![Error::deadline(format!("it has not ended after {} s", BOUND.as_secs()))];
            (format!("what pod {id:.12} had"), work.unwrap_or_else(|_| late()))
        });
    }
    while let Some(done) = ends.join_next().await {
        match done {
            Ok((what, errors)) => all.add(what, errors),
            Err(e) => all.stays(&Error::internal("end a pod of no record").because(e)),
        }
    }
}

async fn end_pod(shared: &Shared, id: &str) -> Vec<Error> {
    let mut errors = Vec::new();
    errors.extend(shared.runtime.stop_pod(id).await.err());
    // A pod that can't be detached keeps its namespace, because plugins need it.
    match shared.network.detach(id).await {
        Ok(()) => errors.extend(shared.sandboxes.clear(id).await.err()),
        Err(e) => errors.push(e),
    }
    errors
}

/// The names in a directory that may be ids; none where it can't be read.
async fn names(dir: &Path) -> BTreeSet<String> {
    let mut found = BTreeSet::new();
    let Ok(mut entries) = tokio::fs::read_dir(dir).await else { return found };
    while let Ok(Some(entry)) = entries.next_entry().await {
        found.extend(entry.file_name().into_string().ok());
    }
    found
}

/// Removes a container's directory, and the cgroup that its spec names, if that is empty.
async fn remove_container_dir(dir: &Path) -> Vec<Error> {
    let spec = tokio::fs::read_to_string(dir.join("config.json")).await.unwrap_or_default();
    let spec: serde_json::Value = serde_json::from_str(&spec).unwrap_or_default();
    let cgroup = spec["linux"]["cgroupsPath"].as_str().unwrap_or_default().to_string();
    let id = dir.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
    // Only one that bears the container's id is its own.
    if cgroup.ends_with(&format!("/{id}")) && !cgroup.contains("..") {
        let gone = tokio::task::spawn_blocking(move || {
            for hierarchy in hierarchies() {
                // The kernel removes none that has a process or a child.
                let _ = std::fs::remove_dir(hierarchy.join(cgroup.trim_start_matches('/')));
            }
        });
        let _ = gone.await;
    }
    crate::quarantine::remove_path(dir).await.err().into_iter().collect()
}

fn hierarchies() -> Vec<PathBuf> {
    let mounts = std::fs::read_to_string("/proc/self/mounts").unwrap_or_default();
    let of = |line: &str| {
        let mut words = line.split(' ').skip(1);
        let (at, kind) = (words.next()?, words.next()?);
        kind.starts_with("cgroup").then(|| PathBuf::from(at))
    };
    mounts.lines().filter_map(of).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_known_made_or_held_is_no_leftover() {
        let set = |ids: &[&str]| ids.iter().map(ToString::to_string).collect::<BTreeSet<_>>();
        let pair = |p: &str, c: &str| (p.to_string(), c.to_string());
        let held = Holdings {
            pods: set(&["p1", "p2"]),
            tasks: [pair("p1", "p1"), pair("p1", "c1"), pair("p1", "c9"), pair("p2", "c8")].into(),
            orphans: set(&["p1", "c1", "c7"]),
            strange: Vec::new(),
        };
        let found = Found {
            held,
            pods: set(&["p1", "p3"]),
            snapshots: set(&["c1", "c1.image-0", "c9", "c9.image-0"]),
            dirs: set(&["c1", "c9"]),
            fifos: set(&["c6"]),
        };
        let known = Known { pods: set(&["p1"]), containers: set(&["c1"]) };
        let unknown = found.unknown(&known);
        // The tasks of an unknown pod end with it.
        let expected = Unknown {
            pods: set(&["p2", "p3"]),
            tasks: [pair("p1", "c9")].into(),
            orphans: set(&["c7"]),
            snapshots: set(&["c9", "c9.image-0"]),
            dirs: set(&["c9"]),
            fifos: set(&["c6"]),
        };
        assert_eq!(unknown, expected);
        let all = Known { pods: set(&["p1", "p2", "p3"]), containers: set(&["c1", "c6", "c7", "c8", "c9"]) };
        assert_eq!(unknown.and(&found.unknown(&all)), Unknown::default());
    }
}
