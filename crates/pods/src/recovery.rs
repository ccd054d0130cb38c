//! What a new daemon finds: the database on one side, what runs on the other.
//!
//! ```text
//!  stored pods ──┬─ the node was restarted ──► NOTREADY, containers exited with 255
//!                └─ else runtime.recover ────► found running: adopted
//!                                              found dead: its exit is recorded
//!                                              half made: undone
//!  what belongs to no stored pod ────────────► swept
//! ```
//!
//! One bad record never stops the rest: it goes into quarantine, and what it names is
//! left alone.

use crate::journal::Write;
use crate::owner::Owner;
use crate::quarantine::Held;
use crate::reconcile::Known;
use crate::shared::Shared;
use crate::state::{ContainerInfo, ContainerRecord, ContainerState, PodInfo, PodPhase, PodState};
use fault::Step as Fault;
use runtime::{PodSpec, RecoverPod, RecoveredPod, TaskState};
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};
use types::{Result, ResultExt};

/// In the state directory while the node is up; gone after a restart even where the
/// boot id stays, as in a node that is itself a container.
const TOKEN: &str = "up";
/// After how long a pod that could not be examined is tried again: first, and at most.
const EXAMINE: (Duration, Duration) = (Duration::from_secs(2), Duration::from_secs(60));

/// A stored pod and its containers.
struct Stored {
    key: String,
    pod: PodInfo,
    containers: Vec<ContainerInfo>,
}

/// Finds everything again and starts the owners of all pods.
///
/// # Errors
/// Only when the database can't be read; every other trouble is logged by name.
pub async fn recover(shared: &Arc<Shared>) -> Result<()> {
    let mut stored = fault::around(Fault::RecoverLoad, load(shared)).await?;
    hold_strangers(shared, &stored).await;
    let aside = shared.quarantine.all();
    let boot = Boot::look(shared).await?;
    // Networks before namespaces, which plugins look into; and after a restart of the
    // node all of them.
    let live = stored.iter().filter(|s| !boot.rebooted && !s.pod.state.torn_down).map(|s| s.pod.id.clone());
    for e in shared.network.collect(&live.chain(aside.keys().cloned()).collect()).await {
        tracing::warn!("freeing networks that a former daemon left: {e}");
    }
    if boot.rebooted {
        tracing::warn!("the node was restarted: all pods are NOTREADY, all containers have exited");
        for s in &mut stored {
            // The sweep looks into the state directory, which may be empty now; pinned
            // elsewhere, a network namespace outlives that where the kernel goes on.
            if !s.pod.state.torn_down
                && let Err(e) = shared.sandboxes.teardown(&s.pod.id).await
            {
                tracing::warn!("pod {} ({:.12}): {e}", s.pod.name(), s.pod.id);
            }
            end_all(shared, s, "the node was restarted");
        }
        // The mark only after what follows from it: a daemon that dies in between
        // must find out again.
        shared.journal.flush().await;
    }
    boot.note(shared).await?;
    let mut ready: Vec<RecoverPod> =
        stored.iter().filter(|s| !s.pod.state.torn_down).map(|s| asked(shared, s, &aside)).collect();
    // What a bad record names is left alone: it is asked for, and the answer ignored.
    ready.extend(aside.iter().filter(|(_, held)| held.whole).map(|(id, held)| {
        let spec = PodSpec { id: id.clone(), handler: String::new(), annotations: BTreeMap::new(), bundle_gid: None };
        RecoverPod { spec, containers: held.containers.iter().cloned().collect() }
    }));
    let mut found = BTreeMap::new();
    for result in fault::around(Fault::RecoverBundles, shared.runtime.recover(ready)).await {
        match result {
            Ok(pod) => {
                found.insert(pod.id.clone(), pod);
            }
            Err(e) => tracing::error!("recovery: {e}"),
        }
    }
    let mut old_tasks: BTreeMap<String, Vec<String>> = BTreeMap::new();
    let mut unexamined = Vec::new();
    fault::before(Fault::RecoverAdopt);
    for s in &mut stored {
        if !s.pod.state.torn_down {
            match found.remove(&s.pod.id) {
                Some(pod) => {
                    old_tasks.insert(s.pod.id.clone(), adopt(shared, s, pod));
                }
                None => {
                    let (name, id) = (s.pod.name(), &s.pod.id);
                    tracing::error!("pod {name} ({id:.12}) could not be examined; it is tried again");
                    unexamined.push(id.clone());
                }
            }
        }
    }
    fault::after(Fault::RecoverAdopt);
    fault::around(Fault::RecoverSweep, crate::reconcile::first_round(shared, &known(shared, &stored))).await;
    check_networks(shared, &stored);
    // Before owners take down the tasks of ended containers, whose bundles know the ends too.
    fault::around(Fault::RecoverRecord, shared.journal.flush()).await;
    for s in stored {
        match shared.store.timeline(&s.pod.id).await {
            Ok(Some(json)) => {
                if let Err(e) = shared.timelines.restore(&s.pod.id, &json) {
                    tracing::warn!("the timeline of pod {:.12} can't be read: {e}", s.pod.id);
                }
            }
            Ok(None) => {}
            Err(e) => tracing::warn!("the timeline of pod {:.12}: {e}", s.pod.id),
        }
        let old = old_tasks.remove(&s.pod.id).unwrap_or_default();
        Owner::start(shared.clone(), s.pod, s.key, s.containers, &old);
    }
    for pod in unexamined {
        tokio::spawn(examine_later(shared.clone(), pod));
    }
    Ok(())
}

/// Asks for the tasks of a pod whose shim did not answer at the start, until it does: only
/// then their ends are heard of. The owner does with the answers what `adopt` does.
async fn examine_later(shared: Arc<Shared>, pod: String) {
    let (mut wait, longest) = EXAMINE;
    loop {
        tokio::time::sleep(wait).await;
        wait = (wait * 2).min(longest);
        let Ok(handle) = shared.registry.pod(&pod) else { return };
        let view = handle.view();
        if view.pod.state.torn_down {
            return;
        }
        let mut again = false;
        for c in &view.containers {
            match examine(&shared, &pod, &c.id).await {
                Ok(task) => {
                    let (id, was) = (c.id.clone(), c.state().clone());
                    let _ = handle.send(crate::owner::Msg::Examined { id, was, task });
                }
                Err(_) => again = true,
            }
        }
        if view.pod.state.init && view.pod.state.phase == PodPhase::Ready {
            let certificate = match examine(&shared, &pod, &pod).await {
                Ok(Some(TaskState::Stopped(certificate))) => Some(certificate),
                Ok(None) => Some(crate::state::lost_certificate()),
                Ok(Some(_)) => None,
                Err(_) => {
                    again = true;
                    None
                }
            };
            if let Some(certificate) = certificate {
                let _ = handle.send(crate::owner::Msg::Exited { id: pod.clone(), certificate });
            }
        }
        if !again {
            return;
        }
    }
}

/// A task's state; `None` where there is none.
async fn examine(shared: &Shared, pod: &str, id: &str) -> Result<Option<TaskState>> {
    match shared.runtime.task_state(pod, id).await {
        Ok(state) => Ok(Some(state)),
        Err(e) if e.is_not_found() => Ok(None),
        Err(e) => Err(e),
    }
}

/// Whether the node was restarted since the last daemon.
struct Boot {
    id: String,
    rebooted: bool,
}

impl Boot {
    async fn look(shared: &Shared) -> Result<Self> {
        let id = tokio::fs::read_to_string("/proc/sys/kernel/random/boot_id");
        let id = id.await.context(|| "read the boot id".into())?.trim().to_string();
        let up = tokio::fs::try_exists(shared.config.state.join(TOKEN)).await.unwrap_or(false);
        let known = shared.store.boot_id().await?;
        Ok(Self { rebooted: known.is_some_and(|k| k != id || !up), id })
    }

    async fn note(&self, shared: &Shared) -> Result<()> {
        let token = shared.config.state.join(TOKEN);
        tokio::fs::write(&token, "").await.context(|| format!("write {}", token.display()))?;
        shared.store.set_boot_id(&self.id).await
    }
}

/// Whose things may exist before there are owners.
fn known(shared: &Shared, stored: &[Stored]) -> Known {
    let mut known = Known::default();
    known.pods.extend(stored.iter().filter(|s| !s.pod.state.torn_down).map(|s| s.pod.id.clone()));
    known.containers.extend(stored.iter().flat_map(|s| s.containers.iter().map(|c| c.id.clone())));
    known.hold(&shared.quarantine);
    known
}

/// After the loss of the database, what runs has no records: it is left alone, and goes
/// into quarantine.
async fn hold_strangers(shared: &Shared, stored: &[Stored]) {
    let Some(lost) = shared.store.restored() else { return };
    shared.health.database_was(lost);
    if lost.complete {
        return;
    }
    let held = match shared.runtime.holdings().await {
        Ok(held) => held,
        Err(e) => return tracing::error!("what runs without a record: {e}"),
    };
    let sandboxes = shared.sandboxes.found().await.unwrap_or_default();
    for id in held.pods.union(&sandboxes).filter(|id| !stored.iter().any(|s| s.pod.id == **id)) {
        let containers = held.tasks.iter().filter(|(pod, c)| pod == id && c != id).map(|(_, c)| c.clone()).collect();
        shared.quarantine.hold_pod(id, None, containers, "its record was lost with the database".into());
    }
}

/// The readable pods; the others go into quarantine.
async fn load(shared: &Shared) -> Result<Vec<Stored>> {
    let mut containers: BTreeMap<String, Vec<ContainerInfo>> = BTreeMap::new();
    for record in shared.store.containers().await? {
        let (id, pod) = (record.id.clone(), record.pod_id.clone());
        match container(record) {
            Ok(c) => containers.entry(pod).or_default().push(c),
            Err(e) => {
                tracing::error!("the record of container {id} is left aside: {e}");
                shared.quarantine.hold_container(&pod, &id, format!("its record can't be read: {e}"));
            }
        }
    }
    let mut stored = Vec::new();
    for record in shared.store.pods().await? {
        let (id, key) = (record.id.clone(), record.name_key.clone());
        let own = containers.remove(&id).unwrap_or_default();
        match pod(record) {
            Ok(pod) => stored.push(Stored { key, containers: own, pod }),
            Err(e) => {
                tracing::error!("the record of pod {id} is left aside: {e}");
                let why = format!("its record can't be read: {e}");
                shared.registry.hold_name(&key, &id);
                shared.quarantine.hold_pod(&id, Some(key), own.into_iter().map(|c| c.id).collect(), why);
            }
        }
    }
    for orphan in containers.into_values().flatten() {
        tracing::warn!("container {:.12} has no pod any more: its record goes", orphan.id);
        shared.journal.note(Write::DeleteContainer(orphan.id));
    }
    Ok(stored)
}

fn pod(record: store::PodRecord) -> Result<PodInfo> {
    let state: PodState = serde_json::from_str(&record.state_json).context(|| "read its state".into())?;
    let config = serde_json::from_str(&record.config_json).context(|| "read its configuration".into())?;
    Ok(PodInfo { id: record.id, config: Arc::new(config), created_at: at(record.created_at_ns), state })
}

fn container(record: store::ContainerRecord) -> Result<ContainerInfo> {
    let state: ContainerRecord = serde_json::from_str(&record.state_json).context(|| "read its state".into())?;
    let config = serde_json::from_str(&record.config_json).context(|| "read its configuration".into())?;
    Ok(ContainerInfo {
        id: record.id,
        pod_id: record.pod_id,
        config: Arc::new(config),
        created_at: at(record.created_at_ns),
        record: state,
    })
}

fn at(ns: i64) -> SystemTime {
    UNIX_EPOCH + Duration::from_nanos(u64::try_from(ns).unwrap_or(0))
}

/// Exited containers are asked for too: a daemon that died before it had deleted
/// their tasks left them.
fn asked(shared: &Shared, s: &Stored, aside: &BTreeMap<String, Held>) -> RecoverPod {
    let mut containers: Vec<String> = s.containers.iter().map(|c| c.id.clone()).collect();
    containers.extend(aside.get(&s.pod.id).into_iter().flat_map(|held| held.containers.clone()));
    if s.pod.state.init {
        containers.push(s.pod.id.clone());
    }
    let (pod, state) = (&s.pod, &s.pod.state);
    let spec = crate::ops::pod_spec(shared, &pod.id, &pod.config, state.handler_name(), state.sandbox.bundle_gid());
    RecoverPod { spec, containers }
}

fn end_all(shared: &Shared, s: &mut Stored, why: &str) {
    for c in &mut s.containers {
        let started = match c.state() {
            ContainerState::Running { started_at, .. } => Some(*started_at),
            ContainerState::Created => None,
            ContainerState::Exited { .. } => continue,
        };
        set_container(shared, c, ContainerState::lost(started, why));
    }
    s.pod.state.phase = PodPhase::NotReady;
    s.pod.state.torn_down = true;
    s.pod.state.process = None;
    s.pod.state.init_pid = 0;
    s.pod.state.network = network::PodNetwork::default();
    set_pod(shared, &s.pod);
}

fn set_container(shared: &Shared, c: &mut ContainerInfo, state: ContainerState) {
    c.record.state = state;
    match serde_json::to_string(&c.record) {
        Ok(json) => shared.journal.note(Write::ContainerState(c.id.clone(), json)),
        Err(e) => tracing::error!("encode container {:.12}: {e}", c.id),
    }
}

fn set_pod(shared: &Shared, pod: &PodInfo) {
    match serde_json::to_string(&pod.state) {
        Ok(json) => shared.journal.note(Write::PodState(pod.id.clone(), json)),
        Err(e) => tracing::error!("encode pod {:.12}: {e}", pod.id),
    }
}

/// Brings a pod's stored state in line with what runs, and gives the containers
/// whose tasks must go.
fn adopt(shared: &Arc<Shared>, s: &mut Stored, mut found: RecoveredPod) -> Vec<String> {
    let mut old_tasks = Vec::new();
    let mut tasks: BTreeMap<String, TaskState> =
        found.containers.drain(..).filter_map(|(id, state)| state.map(|st| (id, st))).collect();
    for c in &mut s.containers {
        let task = tasks.remove(&c.id);
        let (next, delete) = reconcile(c.state(), task);
        if let Some(next) = next {
            set_container(shared, c, next);
        }
        if delete {
            old_tasks.push(c.id.clone());
        }
    }
    s.pod.state.process = found.process;
    if s.pod.state.init {
        let lives = matches!(tasks.get(&s.pod.id), Some(TaskState::Running { .. }));
        if !lives {
            s.pod.state.phase = PodPhase::NotReady;
            s.pod.state.init_pid = 0;
        }
    }
    if let Err(e) = s.pod.state.sandbox.check()
        && s.pod.state.phase == PodPhase::Ready
    {
        tracing::error!("pod {} ({:.12}) is NOTREADY: {e}", s.pod.name(), s.pod.id);
        s.pod.state.phase = PodPhase::NotReady;
    }
    set_pod(shared, &s.pod);
    old_tasks
}

/// What a container becomes by what its task is, and whether the task must go.
pub(crate) fn reconcile(state: &ContainerState, task: Option<TaskState>) -> (Option<ContainerState>, bool) {
    match (state, task) {
        // An exit never changes; a task that outlived its record of it goes.
        (ContainerState::Exited { .. }, task) => (None, task.is_some()),
        // The daemon died between create and start: undone, and it may be started.
        (ContainerState::Created, Some(TaskState::Created)) => (None, true),
        (ContainerState::Created, None) => (None, false),
        // It died after the start and before it had said so.
        (ContainerState::Created, Some(TaskState::Running { pid } | TaskState::Paused { pid })) => {
            (Some(ContainerState::Running { pid, started_at: SystemTime::now() }), false)
        }
        (ContainerState::Created, Some(TaskState::Stopped(certificate))) => {
            (Some(ContainerState::exited(Some(certificate.exited_at), certificate)), true)
        }
        (ContainerState::Running { .. }, Some(TaskState::Running { .. } | TaskState::Paused { .. })) => (None, false),
        (ContainerState::Running { started_at, .. }, Some(TaskState::Stopped(certificate))) => {
            (Some(ContainerState::exited(Some(*started_at), certificate)), true)
        }
        (ContainerState::Running { started_at, .. }, other) => (
            Some(ContainerState::lost(Some(*started_at), "its task was gone when the daemon came back")),
            other.is_some(),
        ),
    }
}

/// Says of which pods the network has changed meanwhile, or can't be checked: nobody waits
/// for it, and one pod after the other, for each check is a run of every plugin.
fn check_networks(shared: &Arc<Shared>, stored: &[Stored]) {
    let ready = stored.iter().filter(|s| s.pod.state.phase == PodPhase::Ready);
    let pods: Vec<(String, String)> = ready.map(|s| (s.pod.id.clone(), s.pod.name())).collect();
    let shared = shared.clone();
    if pods.is_empty() {
        return;
    }
    tokio::spawn(async move {
        let (all, mut amiss) = (pods.len(), 0);
        for (id, name) in pods {
            if let Err(e) = shared.network.check(&id).await {
                amiss += 1;
                tracing::warn!("pod {name} ({id:.12}), whether its network is as it was made: {e}");
            }
        }
        tracing::info!("the networks of {all} pods were looked at, {amiss} are amiss");
    });
}

#[cfg(test)]
mod tests {
    use super::*;
    use types::{Certificate, ExitStatus};

    fn dead(code: u8) -> TaskState {
        TaskState::Stopped(Certificate {
            status: ExitStatus::Code(code),
            exited_at: UNIX_EPOCH,
            oom_killed: false,
            oom_cgroup: None,
            killed_by: None,
            peak_memory: None,
        })
    }

    #[test]
    fn no_pair_of_record_and_task_loses_an_exit_or_keeps_a_dead_task() {
        let running = || ContainerState::Running { pid: 1, started_at: UNIX_EPOCH };
        let exited = || ContainerState::start_error(UNIX_EPOCH, String::new());
        let alive = || TaskState::Running { pid: 7 };
        // An exit that stands is never changed.
        for task in [None, Some(alive()), Some(dead(0)), Some(TaskState::Created)] {
            let there = task.is_some();
            assert_eq!(reconcile(&exited(), task), (None, there));
        }
        assert_eq!(reconcile(&running(), Some(alive())), (None, false));
        assert!(
            matches!(reconcile(&running(), Some(dead(3))), (Some(ContainerState::Exited { certificate, .. }), true) if certificate.status.code() == 3)
        );
        assert!(
            matches!(reconcile(&running(), None), (Some(ContainerState::Exited { certificate, .. }), false) if certificate.status.code() == 255)
        );
        assert!(matches!(
            reconcile(&ContainerState::Created, Some(alive())),
            (Some(ContainerState::Running { pid: 7, .. }), false)
        ));
        assert_eq!(reconcile(&ContainerState::Created, Some(TaskState::Created)), (None, true));
        assert_eq!(reconcile(&ContainerState::Created, None), (None, false));
    }
}
