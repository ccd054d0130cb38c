//! A pod's shim is found again, or started.

use super::Inner;
use super::bootstrap::Bootstrap;
use super::launch;
use super::shim::Shim;
use crate::api::PodSpec;
use crate::bundle::{self, blocking};
use fault::Step;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;
use tokio::net::unix::pipe::Receiver;
use types::{Error, ErrorKind, Result};

/// How long the death of a shim is awaited after SIGKILL.
pub(super) const AFTER_KILL: Duration = Duration::from_secs(2);

/// Connects to the shim that the pod's bundle names, and opens its log. `None` where it
/// names none, or one that is dead; then what it left is cleaned up.
pub(super) async fn load(inner: &Arc<Inner>, pod: &str) -> Result<Option<(Shim, Option<Receiver>)>> {
    let dir = inner.layout.pod(pod);
    let d = dir.clone();
    let Some(bootstrap) = blocking(move || Bootstrap::load(&d)).await? else { return Ok(None) };
    let handler = inner.handler_of(pod).await?;
    if !handler.bears_our_name() {
        inner.binary(&handler).await;
    }
    // Before anything is asked: Go's shim opens its log before it serves, and waits there
    // for a reader where the daemon that began it has died.
    let log = launch::open_log(&dir).inspect_err(|e| tracing::warn!(pod, error = %e, "the shim's log is lost"));
    match Shim::connect(pod, bootstrap.clone(), handler).await {
        Ok(shim) => Ok(Some((shim, log.ok()))),
        Err(e) if e.kind() == ErrorKind::Unavailable => {
            tracing::info!(pod, reason = %e, "the pod's shim is dead");
            Bootstrap::forget(&dir);
            bundle::remove_socket(&bootstrap.address);
            Ok(None)
        }
        Err(e) => Err(e.within(format!("find the shim of pod {pod} again"))),
    }
}

/// Makes the bundle, starts the shim and connects; all of it or nothing.
pub(super) async fn launch_pod(inner: &Arc<Inner>, spec: &PodSpec) -> Result<(Shim, Receiver)> {
    let dir = inner.layout.pod(&spec.id);
    let handler = inner.cfg.handler(&spec.handler)?.clone();
    let (d, s, h) = (dir.clone(), spec.clone(), handler.clone());
    let started = async {
        // Opened before the shim is: it may write before it answers.
        let log = blocking(move || {
            fault::during(Step::ShimBundle, || bundle::make_pod(&d, &s).and_then(|()| h.store(&d)))?;
            Ok(d)
        })
        .await
        .and_then(|d| launch::open_log(&d))?;
        let binary = inner.binary(&handler).await;
        let bootstrap = fault::around(Step::ShimStart, binary.start(&dir, &spec.id, handler.timeouts.launch)).await?;
        let (b, d) = (bootstrap.clone(), dir.clone());
        let stored = blocking(move || fault::during(Step::ShimBootstrap, || b.store(&d)));
        let connected = fault::around(Step::ShimConnect, Shim::connect(&spec.id, bootstrap, handler));
        let (stored, shim) = tokio::join!(stored, connected);
        stored?;
        Ok((shim?, log))
    };
    match started.await {
        Ok(started) => Ok(started),
        Err(e) => {
            let mut errors = vec![e];
            errors.extend(undo_launch(inner, &spec.id, &dir).await);
            let e = errors.remove(0).within(format!("start the shim of pod {}", spec.id));
            match Error::join("cleaning up", errors) {
                Ok(()) => Err(e),
                Err(more) => Err(e.hint(more.to_string())),
            }
        }
    }
}

/// Moves a shim into the shims' cgroup, where it is not there yet: the daemon that
/// began it may have died before it came to that.
pub(super) fn place(inner: &Arc<Inner>, pid: u32) {
    let Some(cgroup) = inner.cfg.shim_cgroup.clone().filter(|_| !inner.cgroups.is_empty()) else { return };
    let inner = inner.clone();
    // Not awaited: moving a process waits for an RCU grace period.
    tokio::task::spawn_blocking(move || {
        if !crate::cgroup::is_placed(&cgroup, pid) {
            crate::cgroup::place(&inner.cgroups, pid);
        }
    });
}

/// After a failed start: no shim and no bundle stays, but the bundles of tasks
/// whose end has not been asked for yet.
async fn undo_launch(inner: &Arc<Inner>, pod: &str, dir: &Path) -> Option<Error> {
    if let Ok(Some(b)) = Bootstrap::load(dir) {
        bundle::remove_socket(&b.address);
    }
    kill_strays(dir, pod).await;
    Bootstrap::forget(dir);
    if inner.find(pod).is_some_and(|p| p.look(|s| !s.tasks.is_empty())) {
        return None;
    }
    let d = dir.to_path_buf();
    blocking(move || bundle::remove_pod(&d)).await.err()
}

/// Kills shims that can't be reached.
pub(super) async fn kill_strays(bundle: &Path, pod: &str) {
    let (dir, pod) = (bundle.to_path_buf(), pod.to_string());
    let found = blocking(move || Ok(crate::holders::shims_in(&dir, &pod))).await.unwrap_or_default();
    for process in found {
        tracing::warn!(pid = process.pid, bundle = %bundle.display(), "kills a shim that can't be reached");
        process.kill();
        process.gone(AFTER_KILL).await;
    }
}
