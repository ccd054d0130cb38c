//! Named points at which a daemon under test kills itself with SIGKILL
//! (docs/decisions/0019-fault-points.md).
//!
//! Each [`Step`] of a pod's or container's life has two points, `STEP.before` and
//! `STEP.after`. One of them can be armed, once, when the process starts; unarmed, a
//! point is one load of an atomic. The crash test walks all that [`points`] names, so
//! a new step is tested by itself.

use std::sync::atomic::{AtomicU32, Ordering};

/// The point that is armed; 0 is none.
static ARMED: AtomicU32 = AtomicU32::new(0);
/// How often the armed point is still passed unharmed.
static PASSES: AtomicU32 = AtomicU32::new(0);

macro_rules! steps {
    ($($(#[$doc:meta])* $step:ident = $name:literal),+ $(,)?) => {
        /// A step after or before which a daemon may die.
        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        pub enum Step {
            $($(#[$doc])* $step,)+
        }

        impl Step {
            const ALL: &'static [Step] = &[$(Step::$step),+];

            fn name(self) -> &'static str {
                match self { $(Step::$step => $name),+ }
            }
        }
    };
}

steps! {
    /// A sandbox's directories are made.
    SandboxDirectories = "sandbox.directories",
    /// Its namespaces are made and pinned.
    SandboxNamespaces = "sandbox.namespaces",
    /// One of them is bound to its pin, whose file is there already.
    SandboxBind = "sandbox.bind",
    /// Its files are written.
    SandboxFiles = "sandbox.files",
    /// Its /dev/shm is mounted.
    SandboxShm = "sandbox.shm",
    /// The root file system of its init is made.
    SandboxInitRootfs = "sandbox.init-rootfs",
    /// The pid namespace of its init is pinned.
    SandboxPinInit = "sandbox.pin-init",
    /// The root file system of its init is removed.
    UnmakeInitRootfs = "unmake.init-rootfs",
    /// Its /dev/shm is unmounted.
    UnmakeShm = "unmake.shm",
    /// Its files are removed.
    UnmakeFiles = "unmake.files",
    /// Its namespaces are unpinned.
    UnmakeNamespaces = "unmake.namespaces",
    /// Its directories are removed.
    UnmakeDirectories = "unmake.directories",
    /// A pod's addresses are claimed, for the built-in network.
    NetworkClaim = "network.claim",
    /// Its link is made.
    NetworkLink = "network.link",
    /// Its host ports, which are claimed by then, are led to it.
    NetworkPorts = "network.ports",
    /// They are led no more.
    NetworkUnports = "network.unports",
    /// Its link is removed.
    NetworkUnlink = "network.unlink",
    /// Its addresses are freed.
    NetworkFree = "network.free",
    /// A pod's bundle is made.
    ShimBundle = "shim.bundle",
    /// The shim's `start` is run.
    ShimStart = "shim.start",
    /// Its answer is stored.
    ShimBootstrap = "shim.bootstrap",
    /// The shim is dialled.
    ShimConnect = "shim.connect",
    /// A dead shim's tasks are ended.
    ShimBury = "shim.bury",
    /// A shim's tasks are ended before it is.
    ShimEndTasks = "shim.end-tasks",
    /// A shim is shut down.
    ShimShutdown = "shim.shutdown",
    /// A pod's bundle is removed.
    ShimUnbundle = "shim.unbundle",
    /// A task's bundle is made.
    TaskBundle = "task.bundle",
    /// A task is created in the shim.
    TaskCreate = "task.create",
    /// It is started.
    TaskStart = "task.start",
    /// It is sent a signal.
    TaskKill = "task.kill",
    /// It is deleted in the shim.
    TaskDelete = "task.delete",
    /// Its bundle is removed.
    TaskUnbundle = "task.unbundle",
    /// A container's snapshot is prepared.
    ContainerSnapshot = "container.snapshot",
    /// Its spec is made.
    ContainerSpec = "container.spec",
    /// Its files are written.
    ContainerFiles = "container.files",
    /// Its FIFO of stdin is made.
    ContainerStdin = "container.stdin",
    /// A removed container's task is deleted.
    RemoveTask = "remove.task",
    /// Its snapshot is removed.
    RemoveSnapshot = "remove.snapshot",
    /// Its files are removed.
    RemoveFiles = "remove.files",
    /// The record of a snapshot is made.
    SnapshotRecord = "snapshot.record",
    /// Its directory is made.
    SnapshotDirectory = "snapshot.directory",
    /// Its directory is removed.
    SnapshotUnmake = "snapshot.unmake",
    /// Its record is removed.
    SnapshotForget = "snapshot.forget",
    /// A new pod is recorded.
    RecordPod = "record.pod",
    /// A pod's change is recorded.
    RecordPodState = "record.pod-state",
    /// A pod is forgotten.
    ForgetPod = "forget.pod",
    /// A new container is recorded.
    RecordContainer = "record.container",
    /// A container's change, its exit above all, is recorded.
    RecordContainerState = "record.container-state",
    /// A container is forgotten.
    ForgetContainer = "forget.container",
    /// Any transaction of the database is committed.
    StoreCommit = "store.commit",
    /// A new daemon reads the records.
    RecoverLoad = "recover.load",
    /// It visits the bundles.
    RecoverBundles = "recover.bundles",
    /// It brings records in line with what runs.
    RecoverAdopt = "recover.adopt",
    /// It removes what no record names.
    RecoverSweep = "recover.sweep",
    /// It has recorded what it found.
    RecoverRecord = "recover.record",
}

impl Step {
    fn point(self, after: bool) -> u32 {
        self as u32 * 2 + 1 + u32::from(after)
    }
}

/// The names of all points.
pub fn points() -> Vec<String> {
    Step::ALL.iter().flat_map(|s| [format!("{}.before", s.name()), format!("{}.after", s.name())]).collect()
}

/// Arms the point that `spec` names: `POINT`, or `POINT:N` for the N-th time that it
/// is passed.
///
/// # Errors
/// Says what is wrong with `spec`.
pub fn arm(spec: &str) -> Result<(), String> {
    let (name, nth) = match spec.rsplit_once(':') {
        Some((name, n)) => (name, n.parse().map_err(|_| format!("{n:?} in the fault point {spec:?} is no number"))?),
        None => (spec, 1u32),
    };
    let at = points().iter().position(|p| p == name).and_then(|at| u32::try_from(at).ok());
    let at = at.ok_or_else(|| format!("{name:?} is no fault point: 'longshore fault-points' lists them"))?;
    PASSES.store(nth.saturating_sub(1), Ordering::SeqCst);
    ARMED.store(at + 1, Ordering::SeqCst);
    Ok(())
}

fn pass(point: u32) {
    if ARMED.load(Ordering::Relaxed) == point {
        die();
    }
}

#[cold]
fn die() {
    let spared = PASSES.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |n| n.checked_sub(1)).is_ok();
    if spared {
        return;
    }
    let _ = rustix::process::kill_process(rustix::process::getpid(), rustix::process::Signal::KILL);
    loop {
        std::thread::park();
    }
}

/// Dies here where the point before `step` is armed.
pub fn before(step: Step) {
    pass(step.point(false));
}

/// Dies here where the point after `step` is armed.
pub fn after(step: Step) {
    pass(step.point(true));
}

/// A step between its two points.
pub fn during<T>(step: Step, work: impl FnOnce() -> T) -> T {
    before(step);
    let out = work();
    after(step);
    out
}

/// A step that is awaited, between its two points.
pub async fn around<T>(step: Step, work: impl Future<Output = T>) -> T {
    before(step);
    let out = work.await;
    after(step);
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_point_has_a_name_of_its_own_and_is_found_by_it() {
        let names = points();
        let mut unique = names.clone();
        unique.sort();
        unique.dedup();
        assert_eq!(unique.len(), names.len());
        for (at, step) in Step::ALL.iter().enumerate() {
            assert_eq!(names[at * 2], format!("{}.before", step.name()));
            assert_eq!(usize::try_from(step.point(false)).unwrap(), at * 2 + 1);
            assert_eq!(usize::try_from(step.point(true)).unwrap(), at * 2 + 2);
        }
        assert!(arm("nowhere.before").unwrap_err().contains("nowhere"));
        assert!(arm("store.commit.before:x").is_err());
        // Unarmed, a point is passed.
        during(Step::StoreCommit, || ());
    }
}
