//! What a dead shim left is ended, reported and cleaned up.

use super::Inner;
use super::bootstrap::Bootstrap;
use super::config::Handler;
use super::pod::Pod;
use super::task::{self, Task};
use crate::api::SandboxKind;
use crate::bundle::{self, blocking};
use crate::ops::step;
use proto::containerd::task::v3::DeleteResponse;
use std::sync::Arc;
use tokio::task::JoinSet;
use types::{Certificate, Error, ErrorKind, ExitStatus, ResultExt};

/// Cleans up after a dead shim: ends and reports each of its tasks.
pub(super) async fn bury(inner: &Arc<Inner>, pod: &Arc<Pod>, bootstrap: &Bootstrap) {
    let tasks: Vec<Arc<Task>> = pod.look(|s| s.tasks.values().filter(|t| t.is_made()).cloned().collect());
    let mut all = JoinSet::new();
    for task in tasks {
        let (inner, pod) = (inner.clone(), pod.clone());
        all.spawn(async move {
            let buried = inner.bury_task(&pod.id, &task.id).await;
            task.note_left(buried.left.is_some());
            inner.ended(&pod, &task, buried.certificate);
        });
    }
    all.join_all().await;
    let bundle = inner.layout.pod(&pod.id);
    Bootstrap::forget(&bundle);
    bundle::remove_socket(&bootstrap.address);
}

/// Waits for the calls of the OCI runtime that still make a container, at most
/// `bound` each. True where there were any. Our own shim knows of its own.
pub(super) async fn created(id: &str, bound: std::time::Duration) -> bool {
    let container = id.to_string();
    let calls = blocking(move || Ok(crate::holders::creators(&container))).await.unwrap_or_default();
    let any = !calls.is_empty();
    for call in calls {
        call.gone(bound).await;
    }
    any
}

/// What became of a task of a dead shim.
pub(super) struct Buried {
    /// How it ended.
    pub(super) certificate: Certificate,
    /// Why something of it may live on, or stays.
    pub(super) left: Option<Error>,
}

impl Inner {
    /// Runs `delete` for one task of a dead shim, and says how the task ended:
    /// as its bundle knows, else as `delete` answers (137), else 255.
    pub(super) async fn bury_task(self: &Arc<Self>, pod: &str, id: &str) -> Buried {
        let dir = self.layout.task(pod, id);
        let handler = self.handler_of(pod).await;
        if let Ok(handler) = &handler
            && !handler.bears_our_name()
        {
            // What a foreign shim had begun would go on behind its `delete`.
            created(id, handler.timeouts.cleanup).await;
            self.remove_own_binary(handler, id).await;
        }
        let answer = match &handler {
            // It was no task and left none.
            Ok(handler) if handler.sandbox == SandboxKind::Shim && id == pod => {
                Ok(DeleteResponse { exit_status: 137, ..DeleteResponse::default() })
            }
            Ok(handler) if dir.exists() => self.binary(handler).await.delete(&dir, id, handler.timeouts.cleanup).await,
            Ok(_) => Err(Error::not_found(format!("bundle {}", dir.display()))),
            Err(e) => Err(e.copy()),
        };
        let foreign = handler.as_ref().is_ok_and(|h| !h.bears_our_name());
        let now = crate::now();
        let mut left = None;
        let (status, exited_at) = match answer {
            Ok(reply) => {
                let at = reply.exited_at.and_then(|t| task::time(&t)).unwrap_or(now);
                (ExitStatus::from_code(reply.exit_status), at)
            }
            Err(e) => {
                tracing::warn!(pod, container = id, error = %e, "the shim's delete failed");
                if let Ok(handler) = &handler {
                    left = self.runtime_delete(handler, id).await.err();
                }
                (ExitStatus::Unknown(255), now)
            }
        };
        let ours = Certificate {
            status,
            exited_at,
            oom_killed: false,
            oom_cgroup: None,
            killed_by: Some("the death of the pod's shim".into()),
            peak_memory: None,
        };
        let certificate = blocking(move || {
            if !dir.exists() {
                return Ok(ours);
            }
            if foreign {
                crate::cgroup::scrub(&dir);
            }
            if let Err(e) = bundle::unmount_rootfs(&dir) {
                tracing::warn!(error = %e, "a dead container's rootfs stays mounted");
            }
            Ok(bundle::certify(&dir, ours))
        })
        .await
        .unwrap_or(Certificate {
            status: ExitStatus::Unknown(255),
            exited_at: now,
            oom_killed: false,
            oom_cgroup: None,
            killed_by: None,
            peak_memory: None,
        });
        Buried { certificate, left }
    }

    /// Ends a shim whose bundle is gone, and what the OCI runtime still knows by this id.
    pub(super) async fn end_orphan(self: &Arc<Self>, id: &str) -> Result<(), Error> {
        let bundles = self.layout.bundles();
        let shims = blocking(move || Ok(crate::holders::orphaned_shims(&bundles))).await?;
        for (_, shim) in shims.into_iter().filter(|(pod, _)| pod == id) {
            shim.kill();
            shim.gone(super::start::AFTER_KILL).await;
        }
        for handler in &self.cfg.handlers {
            let known = handler.runtime_root.join(&self.cfg.namespace).join(id);
            if known.exists() && known.starts_with(&self.cfg.state) {
                self.runtime_delete(handler, id).await?;
                if known.exists() {
                    return Err(Error::internal(format!("the OCI runtime does not delete {}", known.display())));
                }
            }
        }
        Ok(())
    }

    /// What a killed call of the OCI runtime left would make its delete fail half done.
    /// Our own shim sees to that itself.
    pub(super) async fn remove_own_binary(&self, handler: &Handler, id: &str) {
        let (root, id) = (handler.runtime_root.join(&self.cfg.namespace), id.to_string());
        let removed = blocking(move || {
            oci::remove_own_binary(&root, &id);
            Ok(())
        });
        drop(removed.await);
    }

    /// The last means: the OCI runtime itself, where the shim's `delete` failed. It takes
    /// no offence at a container that it does not know.
    async fn runtime_delete(&self, handler: &Handler, id: &str) -> Result<(), Error> {
        let root = handler.runtime_root.join(&self.cfg.namespace);
        self.remove_own_binary(handler, id).await;
        let run = tokio::process::Command::new(&handler.runtime_binary)
            .arg("--root")
            .arg(root)
            .args(["delete", "--force", id])
            .stdin(std::process::Stdio::null())
            .kill_on_drop(true)
            .output();
        let what = || format!("{} delete --force {id}", handler.runtime_binary.display());
        let bound = handler.timeouts.cleanup;
        match step(format!("'{}'", what()), tokio::time::timeout(bound, run)).await {
            Ok(Ok(out)) if out.status.success() => Ok(()),
            Ok(Ok(out)) => {
                let said = String::from_utf8_lossy(&out.stderr);
                Err(Error::internal(format!("{}: {}: {}", what(), out.status, said.trim())))
            }
            Ok(Err(e)) => Err(e).context_kind(ErrorKind::FailedPrecondition, what),
            Err(_) => Err(Error::deadline(format!("{} took longer than {bound:?} and was killed", what()))),
        }
        .inspect_err(|e| tracing::warn!(container = id, error = %e, "the OCI runtime does not delete it"))
    }
}
