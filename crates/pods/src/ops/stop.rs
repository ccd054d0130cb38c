//! The ends of tasks and pods.

use super::PodContext;
use crate::shared::Shared;
use crate::state::ContainerInfo;
use runtime::TaskState;
use std::time::Duration;
use tokio::sync::watch;
use tokio::time::{Instant, sleep_until, timeout};
use types::{Error, Result, Signal};

/// As it is called in the timeline.
const OP: &str = "StopPodSandbox";
/// How long a death after SIGKILL is waited for.
const KILL_WAIT: Duration = Duration::from_secs(10);

/// The stop signal: CRI's own, else the image's, else SIGTERM.
fn stop_signal(info: &ContainerInfo) -> Signal {
    let asked = proto::cri::Signal::try_from(info.config.stop_signal).ok();
    let by_cri = asked.and_then(crate::signals::from_cri);
    by_cri.or_else(|| info.record.image_stop_signal.parse().ok()).unwrap_or(Signal::TERM)
}

/// Sends the stop signal, waits until the deadline (which may come nearer), then
/// kills. `ended` becomes true once the exit is recorded.
///
/// # Errors
/// `DeadlineExceeded` when not even SIGKILL ended it.
pub async fn stop(
    ctx: &PodContext,
    info: &ContainerInfo,
    mut deadline: watch::Receiver<Instant>,
    mut ended: watch::Receiver<bool>,
    why: &'static str,
) -> Result<()> {
    let (runtime, pod) = (&ctx.shared.runtime, &ctx.pod.id);
    let signal = stop_signal(info);
    let at_once = *deadline.borrow() <= Instant::now();
    if at_once && why != "StopContainer" {
        // Nobody waits for a tidy end of a pod that goes away as a whole.
        return kill(ctx, info, ended, why).await;
    }
    if signal != Signal::KILL {
        let sent = runtime.kill_task(pod, &info.id, signal, false, why).await;
        if let Err(e) = sent {
            tracing::warn!("{signal} to container {:.12}: {e}; SIGKILL is next", info.id);
            return kill(ctx, info, ended, why).await;
        }
    }
    loop {
        let at = *deadline.borrow_and_update();
        tokio::select! {
            gone = ended.wait_for(|e| *e) => {
                if gone.is_ok() {
                    return Ok(());
                }
                return Err(Error::not_found(format!("container {:.12} was removed while it was being stopped", info.id)));
            }
            () = sleep_until(at) => break,
            Ok(()) = deadline.changed() => {}
        }
    }
    kill(ctx, info, ended, why).await
}

async fn kill(
    ctx: &PodContext,
    info: &ContainerInfo,
    mut ended: watch::Receiver<bool>,
    why: &'static str,
) -> Result<()> {
    let sent = ctx.shared.runtime.kill_task(&ctx.pod.id, &info.id, Signal::KILL, false, why).await;
    let died = matches!(timeout(KILL_WAIT, ended.wait_for(|e| *e)).await, Ok(Ok(_)));
    if died {
        return Ok(());
    }
    // No task at all: its end was lost, and waiting would never tell.
    let state = ctx.shared.runtime.task_state(&ctx.pod.id, &info.id).await;
    if state.is_err_and(|e| e.is_not_found()) {
        let certificate = crate::state::lost_certificate();
        let _ = ctx.mailbox.send(crate::owner::Msg::Exited { id: info.id.clone(), certificate });
        if matches!(timeout(KILL_WAIT, ended.wait_for(|e| *e)).await, Ok(Ok(_))) {
            return Ok(());
        }
    }
    let name = info.name_key();
    sent.map_err(|e| e.within(format!("kill container {name} ({:.12})", info.id)))?;
    Err(Error::deadline(format!(
        "container {name} ({:.12}) has not died {} s after SIGKILL",
        info.id,
        KILL_WAIT.as_secs()
    ))
    .hint("its process is probably stuck in the kernel: look for state D in ps, and at its disks and NFS mounts"))
}

/// Frees a dead container's task: its mounts and its bundle.
///
/// # Errors
/// What the runtime could not free; the pod's end tries again.
pub async fn delete_task(ctx: &PodContext, id: &str) -> Result<()> {
    ctx.shared.bounded("deleting the task", ctx.shared.runtime.delete_task(&ctx.pod.id, id)).await
}

/// Undoes a task that nobody shall have been told of: SIGKILL, its death, and then
/// its deletion.
///
/// # Errors
/// What the runtime could not free.
pub async fn end_task(ctx: &PodContext, id: &str, why: &str) -> Result<()> {
    end_task_of(&ctx.shared, &ctx.pod.id, id, why).await
}

/// The same, of a pod that need have no owner.
///
/// # Errors
/// What the runtime could not free.
pub async fn end_task_of(shared: &Shared, pod: &str, id: &str, why: &str) -> Result<()> {
    if let Err(e) = shared.runtime.condemn_task(pod, id).await {
        tracing::warn!("container {id:.12}: {e}");
    }
    let _ = shared.runtime.kill_task(pod, id, Signal::KILL, true, why).await;
    let dead = async {
        // Nobody has told us of this task, so nobody will tell of its end.
        // One that was killed before its start counts as created until it is reaped.
        while let Ok(TaskState::Created | TaskState::Running { .. } | TaskState::Paused { .. }) =
            shared.runtime.task_state(pod, id).await
        {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    let _ = timeout(KILL_WAIT, dead).await;
    shared.bounded("deleting the task", shared.runtime.delete_task(pod, id)).await
}

/// Detaches a pod and takes its namespaces and files down. A pod that can't be
/// detached keeps them, because plugins need them the next time.
///
/// # Errors
/// What failed; it may be asked for again.
pub async fn end_sandbox(ctx: &PodContext) -> Result<()> {
    let (shared, id) = (&ctx.shared, &ctx.pod.id);
    shared.timelines.timed(id, OP, "network", "", shared.network.detach(id)).await?;
    let removed = shared.bounded("removing the sandbox", shared.sandboxes.teardown(id));
    shared.timelines.timed(id, OP, "namespaces", "", removed).await
}

/// Ends a pod whose containers have ended: init, shim, namespaces, files. It goes
/// on to the end whatever fails.
///
/// # Errors
/// All that failed, joined.
pub async fn stop_pod(ctx: &PodContext) -> Result<()> {
    let (shared, id) = (&ctx.shared, &ctx.pod.id);
    let mut errors = Vec::new();
    if ctx.pod.state.init {
        let _ = shared.runtime.kill_task(id, id, Signal::KILL, false, "StopPodSandbox").await;
        let mut ended = ctx.init_ended.clone();
        let _ = timeout(KILL_WAIT, ended.wait_for(|e| *e)).await;
        // One that can't be deleted here goes with its shim, or keeps that from ending.
        if let Err(e) = shared.bounded("deleting the pod's init", shared.runtime.delete_task(id, id)).await {
            tracing::warn!("pod {}: {e}", ctx.pod.name());
        }
    }
    let shim = shared.bounded("stopping the shim", shared.runtime.stop_pod(id));
    let shim = shared.timelines.timed(id, OP, "shim", "", shim);
    let sandbox = end_sandbox(ctx);
    let (shim, sandbox) = tokio::join!(shim, sandbox);
    errors.extend(shim.err());
    errors.extend(sandbox.err());
    Error::join("give back its resources", errors)
}
