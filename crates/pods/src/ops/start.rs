//! StartContainer: create and start of the task, so that a process that can't be
//! started is an exit and not a lost call.

use super::{PodContext, end_task};
use crate::owner::Msg;
use crate::state::ContainerInfo;
use runtime::{TaskIo, TaskSpec};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::oneshot;
use types::{Error, Result, ResultExt, Signal};

/// How long a cancelled start may go on before it is killed once more.
const KILL_AGAIN: Duration = Duration::from_secs(1);

/// Creates and starts a container's task; gives init's pid. A message on
/// `cancelled` ends it early. On failure no task is left.
///
/// # Errors
/// That of the step that failed; the container then counts as exited with 128.
pub async fn start(ctx: PodContext, info: Arc<ContainerInfo>, mut cancelled: oneshot::Receiver<String>) -> Result<u32> {
    let mut work = tokio::spawn({
        let (ctx, info) = (ctx.clone(), info.clone());
        async move { run(&ctx, &info).await }
    });
    let lost = |e| Error::internal(format!("start container {:.12}", info.id)).because(e);
    let outcome = tokio::select! {
        done = &mut work => done.map_err(lost)?,
        Ok(why) = &mut cancelled => {
            // Whatever it waits for ends sooner without its process; its own bounds
            // hold. A task that came up after the undoing would be nobody's, so one
            // that the first kill came too early for gets another.
            loop {
                let why = "a cancelled start";
                let _ = ctx.shared.runtime.kill_task(&ctx.pod.id, &info.id, Signal::KILL, true, why).await;
                if tokio::time::timeout(KILL_AGAIN, &mut work).await.is_ok() {
                    break;
                }
            }
            Err(Error::precondition(why))
        }
    };
    match outcome {
        Ok(pid) => Ok(pid),
        Err(e) => {
            if let Err(undo) = end_task(&ctx, &info.id, "a failed start").await {
                tracing::warn!("after the failed start of container {:.12}: {undo}", info.id);
            }
            Err(e.within(format!("start container {} ({:.12})", info.name_key(), info.id)))
        }
    }
}

async fn run(ctx: &PodContext, info: &ContainerInfo) -> Result<u32> {
    const OP: &str = "StartContainer";
    let shared = &ctx.shared;
    let name = info.config.metadata.as_ref().map_or("", |m| m.name.as_str());
    let spec_path = shared.container_dir(&info.id).join("config.json");
    let config_json =
        tokio::fs::read_to_string(&spec_path).await.context(|| format!("read the spec {}", spec_path.display()))?;
    let mounts = shared.snapshots.mounts(&info.id).await?;
    let task = TaskSpec {
        id: info.id.clone(),
        config_json,
        rootfs: mounts
            .into_iter()
            .map(|m| runtime::RootfsMount { kind: m.kind, source: m.source, options: m.options })
            .collect(),
        io: TaskIo {
            log_path: info.record.log_path.clone(),
            log_limit: shared.config.log_line_limit,
            terminal: info.config.tty,
            stdin: info.record.stdin.clone(),
        },
    };
    let pod = ctx.pod_spec();
    let timelines = &shared.timelines;
    let pid = timelines
        .timed(
            &pod.id,
            OP,
            "create",
            name,
            shared.bounded("creating the task", shared.runtime.create_task(&pod, &task)),
        )
        .await?;
    // A shim that had died was started anew just now.
    if let Ok(process) = shared.runtime.start_pod(&pod).await {
        let _ = ctx.mailbox.send(Msg::ShimStarted(process));
    }
    timelines
        .timed(
            &pod.id,
            OP,
            "start",
            name,
            shared.bounded("starting the task", shared.runtime.start_task(&pod.id, &info.id)),
        )
        .await?;
    Ok(pid)
}
