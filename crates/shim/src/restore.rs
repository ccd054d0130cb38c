//! Restore: a container whose processes come from a checkpoint. As with
//! containerd's shim, Create only gets everything ready and Start restores, so that
//! nothing runs before Start; until then init has no pid.

use crate::checkpoint::criu;
use crate::container::{Msg, Owner, Reply, Starting};
use crate::exit::Last;
use crate::shared::Shared;
use crate::streams::{Io, Prepared};
use crate::{log, persist, undo};
use oci::cgroup::Cgroup;
use oci::{Child, Command, Launch, Restore, Runtime, Status};
use proto::containerd::runc::v1::Options;
use proto::containerd::task::v3::CreateTaskRequest;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::SystemTime;
use tokio::sync::watch;
use types::{Error, ErrorKind, ExitStatus, Result, ResultExt, Signal};

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
        let (abort, aborted) = watch::channel(false);
        self.init.starting = Some(Starting { abort, killers: Vec::new() });
        tokio::spawn(async move {
            let up = restore(&shared, &runtime, &id, &bundle, restoring, aborted).await;
            let _ = tx.send(Msg::Restored(up, reply));
        });
    }

    pub(crate) fn restored(&mut self, result: Result<(Child, Io)>, reply: Reply<i32>) {
        let killers = self.init.starting.take().map(|s| s.killers).unwrap_or_default();
        let killed = !killers.is_empty();
        if killed && result.is_err() {
            self.never_ran();
        }
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
            // It has come up as it was killed.
            if killed {
                let _ = self.init.signal("an init that was restored", Signal::KILL);
            }
            self.watch_init();
            self.watch_oom();
        });
        self.init_started(started, reply);
        for killer in killers {
            let _ = killer.send(Ok(()));
        }
    }

    /// Kill of a container whose processes are still in their checkpoint: there is nobody
    /// to be sent a signal, but SIGKILL is its end all the same.
    pub(crate) fn kill_unrestored(&mut self, signal: Signal, reply: Reply<()>) {
        let id = &self.id;
        if self.init.exit.borrow().is_some() {
            let _ = reply.send(Err(Error::not_found(format!("container {id}: process already finished"))));
        } else if signal != Signal::KILL {
            let text = format!("container {id} has not been restored: there is no process for {signal}");
            let _ = reply.send(Err(Error::precondition(text).hint("SIGKILL ends it")));
        } else if let Some(starting) = &mut self.init.starting {
            starting.end(reply);
        } else {
            self.restoring = None;
            self.never_ran();
            let _ = reply.send(Ok(()));
        }
    }

    /// Its exit, which nobody can be asked for.
    fn never_ran(&mut self) {
        self.init.killed_by = Some(Signal::KILL);
        let status = Status { status: ExitStatus::Signal(9), at: SystemTime::now() };
        self.init_reaped(status, Last::default());
    }
}

/// Lets the runtime restore the container; early to its end once `aborted` is true. A
/// failure leaves nothing of it.
async fn restore(
    shared: &Shared,
    runtime: &Command,
    id: &str,
    bundle: &Path,
    restoring: Restoring,
    mut aborted: watch::Receiver<bool>,
) -> Result<(Child, Io)> {
    let Restoring { mut prepared, from } = restoring;
    let (calls, made) = undo::until(runtime, aborted.clone());
    // For what undoes it, too.
    let _turn = tokio::select! {
        turn = shared.turn() => turn?,
        Ok(_) = aborted.wait_for(|a| *a) => {
            return Err(Error::new(ErrorKind::Cancelled, "it was killed before the OCI runtime was called"));
        }
    };
    let launch = Launch {
        stdio: std::mem::take(&mut prepared.stdio),
        console_socket: prepared.console.as_ref().map(|c| c.path.clone()),
        pid_file: bundle.join(persist::PID),
    };
    let up = async {
        let child = calls.restore(id, bundle, &from, launch).await?;
        match prepared.attach(&shared.writer).await {
            Ok(io) => Ok((child, io)),
            Err(e) => Err(e),
        }
    };
    let up = up.await;
    if up.is_err() {
        undo::undo(runtime, id, bundle, made.take()).await;
    }
    up
}
