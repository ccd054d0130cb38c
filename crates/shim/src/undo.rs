//! What is left of a container whose creation was ended early. runc writes its
//! state only after the last hook: what it was killed before, it does not know, and
//! leaves init, hooks and cgroups.

use crate::log;
use oci::cgroup::Cgroup;
use oci::{Command, Runtime, Unfinished};
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::sync::watch;
use types::{Error, Signal};

/// How long killed processes may take to be gone.
const BOUND: Duration = Duration::from_secs(5);

/// The cgroups that a call had made by the time when it was killed.
#[derive(Clone, Default)]
pub(crate) struct Made(Arc<Mutex<Vec<Cgroup>>>);

impl Made {
    pub fn take(&self) -> Vec<Cgroup> {
        std::mem::take(&mut *self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

/// The same runtime, whose calls end early once `abort` is true; what they had made then
/// is known afterwards.
pub(crate) fn until(runtime: &Command, abort: watch::Receiver<bool>) -> (Command, Made) {
    let made = Made::default();
    let known = made.clone();
    let calls = runtime.until(abort, move |borne| {
        let cgroups = borne.iter().filter_map(|pid| Cgroup::of(*pid).ok());
        known.0.lock().unwrap_or_else(PoisonError::into_inner).extend(cgroups);
    });
    (calls, made)
}

/// Removes whatever the runtime left half made; it is often nothing. What it may
/// not know itself is in `cgroups`. The creation's turn to call the runtime is good for
/// this, too: to wait for a second one while it is held would be to wait for each other.
pub(crate) async fn undo(runtime: &Command, id: &str, bundle: &Path, cgroups: Vec<Cgroup>) {
    let deleted = runtime.delete(id, true).await.err().filter(|e| !e.is_not_found());
    for e in deleted.into_iter().chain(empty(bundle, cgroups).await) {
        log::warn(format_args!("container {id}: after a failed create or restore: {e}"));
    }
}

/// Kills what is in these cgroups and removes them, and those of the bundle that nobody
/// is in yet; returns every failure.
pub(crate) async fn empty(bundle: &Path, cgroups: Vec<Cgroup>) -> Vec<Error> {
    let mut errors = Vec::new();
    for cgroup in cgroups {
        let deadline = tokio::time::Instant::now() + BOUND;
        while cgroup.kill_once() > 0 && tokio::time::Instant::now() < deadline {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        errors.extend(cgroup.remove().err());
    }
    // Its path may be shared: who is in there is not known to be the container's.
    let named = Cgroup::of_bundle(bundle);
    if named.processes().is_empty()
        && let Err(e) = named.remove()
    {
        log::warn(&e);
    }
    errors
}

/// Ends the calls for this bundle's container that a shim has begun and not lived to see
/// the end of: they would make something of it behind its removal. Returns the cgroups
/// that creations have made.
pub(crate) fn end_calls(bundle: &Path) -> Vec<Cgroup> {
    let mut cgroups = Vec::new();
    let mut killed = Vec::new();
    for (unfinished, call) in oci::unfinished_calls(bundle) {
        // Stopped, it can't end, so its number stays its own; nor can it bear more.
        if call.signal(Signal::STOP).is_err() {
            continue;
        }
        let pid = call.pid();
        killed.extend(oci::kill_call(pid, |borne| {
            // The call's own is that of all shims; an exec's, the container's, the
            // runtime knows.
            if unfinished == Unfinished::Container {
                cgroups.extend(borne.iter().filter_map(|p| Cgroup::apart_from(pid, *p).ok()));
            }
        }));
    }
    for process in killed {
        process.ended_within(BOUND);
    }
    cgroups
}
