//! The removal of dead containers and stopped pods.

use super::{PodContext, image_mounts};
use crate::state::ContainerInfo;
use fault::Step as Fault;
use types::{Error, Result, ResultExt};

/// Removes a dead container's task, snapshot and files; goes on whatever fails.
///
/// # Errors
/// All that failed, joined; a later removal tries again.
pub async fn remove(ctx: &PodContext, info: &ContainerInfo) -> Result<()> {
    let (shared, id) = (&ctx.shared, &info.id);
    let mut errors = Vec::new();
    errors.extend(
        shared
            .bounded("deleting the task", fault::around(Fault::RemoveTask, shared.runtime.delete_task(&ctx.pod.id, id)))
            .await
            .err(),
    );
    errors.extend(
        shared
            .bounded("removing the snapshot", fault::around(Fault::RemoveSnapshot, shared.snapshots.remove(id)))
            .await
            .err(),
    );
    errors.extend(image_mounts::release(ctx, id, &info.config).await);
    errors.extend(fault::around(Fault::RemoveFiles, remove_dir(&shared.container_dir(id))).await.err());
    errors.extend(shared.sandboxes.unpin_target(&ctx.pod.id, id).await.err());
    if let Some(stdin) = &info.record.stdin {
        errors.extend(remove_file(stdin).await.err());
    }
    Error::join(&format!("remove container {} ({id:.12})", info.name_key()), errors)
}

/// Removes what a stop may have left of a pod; its record goes last, by the owner.
///
/// # Errors
/// All that failed, joined; a later removal tries again.
pub async fn remove_pod(ctx: &PodContext) -> Result<()> {
    let (shared, id) = (&ctx.shared, &ctx.pod.id);
    let mut errors = Vec::new();
    errors.extend(shared.bounded("stopping the shim", shared.runtime.stop_pod(id)).await.err());
    errors.extend(super::stop::end_sandbox(ctx).await.err());
    Error::join(&format!("remove pod {}", ctx.pod.name()), errors)
}

async fn remove_dir(dir: &std::path::Path) -> Result<()> {
    match tokio::fs::remove_dir_all(dir).await {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => Err(e).context(|| format!("remove {}", dir.display())),
        _ => Ok(()),
    }
}

async fn remove_file(file: &std::path::Path) -> Result<()> {
    match tokio::fs::remove_file(file).await {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => Err(e).context(|| format!("remove {}", file.display())),
        _ => Ok(()),
    }
}
