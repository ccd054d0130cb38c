//! Restore: a container whose processes come from a checkpoint. As with
//! containerd's shim, Create only gets everything ready and Start restores, so that
//! nothing runs before Start; until then init has no pid.

use crate::checkpoint::criu;
use crate::container::{Msg, Owner, Reply};
use crate::streams::{Io, Prepared};
use crate::{log, persist};
use oci::cgroup::Cgroup;
use oci::{Child, Launch, Restore, Runtime};
use proto::containerd::runc::v1::Options;
use proto::containerd::task::v3::CreateTaskRequest;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use types::{Error, Result, ResultExt};

/// What Start needs.
pub(crate) struct Restoring {
    pub prepared: Prepared,
    pub from: Restore,
}

/// Understands what Create asks for; `None` where it names no checkpoint.
///
/// # Errors
/// `InvalidArgument` for a path that is not absolute or no directory,
/// `FailedPrecondition` without criu, `Unimplemented` for a chain of checkpoints.
pub(crate) fn wanted(req: &CreateTaskRequest, o: &Options, bundle: &Path) -> Result<Option<Restore>> {
    if req.checkpoint.is_empty() {
        return Ok(None);
    }
    if !req.parent_checkpoint.is_empty() {
        return Err(Error::unimplemented("a checkpoint with a parent can't be restored by an OCI runtime"));
    }
    let image = PathBuf::from(&req.checkpoint);
    if !image.is_absolute() || !image.is_dir() {
        return Err(Error::invalid(format!("checkpoint {:?} is no directory with an absolute path", req.checkpoint)));
    }
    criu()?;
    let work = if o.criu_work_path.is_empty() { bundle.join("criu-work") } else { PathBuf::from(&o.criu_work_path) };
    std::fs::create_dir_all(&work).context(|| format!("make {}", work.display()))?;
    Ok(Some(Restore { image, work }))
}

impl Owner {
    pub(crate) fn restore(&mut self, restoring: Restoring, reply: Reply<i32>) {
        let (runtime, id, tx, shared) = (self.runtime.clone(), self.id.clone(), self.tx.clone(), self.shared.clone());
        let bundle = self.bundle.clone();
        tokio::spawn(async move {
            let Restoring { mut prepared, from } = restoring;
            // For what undoes it, too.
            let _turn = match shared.turn().await {
                Ok(turn) => turn,
                Err(e) => {
                    let _ = tx.send(Msg::Restored(Err(e), reply));
                    return;
                }
            };
            let up = async {
                let launch = Launch {
                    stdio: std::mem::take(&mut prepared.stdio),
                    console_socket: prepared.console.as_ref().map(|c| c.path.clone()),
                    pid_file: bundle.join(persist::PID),
                };
                let child = runtime.restore(&id, &bundle, &from, launch).await?;
                match prepared.attach(&shared.writer).await {
                    Ok(io) => Ok((child, io)),
                    Err(e) => Err(e),
                }
            };
            let up = up.await;
            if up.is_err()
                && let Err(e) = runtime.delete(&id, true).await
                && !e.is_not_found()
            {
                log::warn(format_args!("container {id}: after a failed restore: {e}"));
            }
            let _ = tx.send(Msg::Restored(up, reply));
        });
    }

    pub(crate) fn restored(&mut self, result: Result<(Child, Io)>, reply: Reply<i32>) {
        let started = result.map(|(child, io)| {
            self.machine.set_pid(child.pid());
            if let Err(e) = persist::write_pid(&self.bundle, child.pid()) {
                log::warn(format_args!("container {}: {e}", self.id));
            }
            self.cgroup = Cgroup::of(child.pid()).unwrap_or_else(|e| {
                log::warn(format_args!("container {}: its cgroup is unknown: {e}", self.id));
                Cgroup::default()
            });
            self.init.came_up(Arc::new(child), io);
            self.watch_init();
            self.watch_oom();
        });
        self.init_started(started, reply);
    }
}
