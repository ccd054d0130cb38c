//! A handler whose shim serves the sandbox API: the pod's own task is not a task but
//! its sandbox.
//!
//! ```text
//!  create_task(pod's id) ──► CreateSandbox      kill_task ───► StopSandbox
//!  start_task ─────────────► StartSandbox       delete_task ─► ShutdownSandbox
//!  Wait ───────────────────► WaitSandbox        State ───────► SandboxStatus
//! ```
//!
//! So pods need to know nothing of it. A sandbox's pid may be 0: it need not be a
//! process.

use super::Inner;
use super::bundle::{blocking, write_atomic};
use super::pod::Pod;
use super::rpc::{Fault, call};
use super::shim::Shim;
use super::task::{Task, time};
use crate::api::{PodSpec, TaskSpec, TaskState};
use proto::containerd::runtime::sandbox::v1 as wire;
use std::sync::Arc;
use std::time::Duration;
use types::{Certificate, Error, ErrorKind, ExitStatus, Result};

/// In the pod's bundle: its sandbox was started.
const STARTED: &str = "sandbox";
/// What SandboxStatus says of a sandbox that is over, in containerd's words.
const OVER: [&str; 2] = ["SANDBOX_NOTREADY", "NOTREADY"];

impl Inner {
    /// CreateSandbox. The task's specification is that of a pause process; of it
    /// counts which network namespace the pod has.
    pub(super) async fn create_sandbox(
        self: &Arc<Self>,
        pod: &Arc<Pod>,
        shim: &Arc<Shim>,
        spec: &PodSpec,
        task: &TaskSpec,
        options: Option<prost_types::Any>,
    ) -> Result<u32> {
        let entry = Arc::new(Task::new(&spec.id));
        pod.update(|s| {
            if s.tasks.contains_key(&spec.id) {
                return Err(Error::exists(format!("pod {} has a sandbox already", spec.id)));
            }
            s.tasks.insert(spec.id.clone(), entry.clone());
            Ok(())
        })?;
        let bound = shim.timeouts().create;
        let request = wire::CreateSandboxRequest {
            sandbox_id: spec.id.clone(),
            bundle_path: self.layout.pod(&spec.id).to_string_lossy().into_owned(),
            rootfs: Vec::new(),
            options,
            netns_path: netns(&task.config_json).unwrap_or_default(),
            annotations: spec.annotations.clone().into_iter().collect(),
        };
        let created = call(bound, shim.sandbox().create_sandbox(bound, request)).await;
        if let Err(e) = created {
            pod.update(|s| s.tasks.remove(&spec.id));
            let unserved = matches!(e, Fault::Status(ErrorKind::Unimplemented, _));
            let e = e.within(&format!("create the sandbox of pod {}", spec.id), bound);
            return Err(if unserved {
                e.hint(format!(
                    "its shim {} serves no sandboxes: set runtimes.{}.sandbox to pinned or pause",
                    shim.handler.shim.display(),
                    shim.handler.name
                ))
            } else {
                e
            });
        }
        entry.set_made();
        Ok(0)
    }

    /// StartSandbox, and from then on its end is awaited.
    pub(super) async fn start_sandbox(self: &Arc<Self>, pod: &Arc<Pod>, shim: &Arc<Shim>) -> Result<()> {
        let bound = shim.timeouts().create;
        let request = wire::StartSandboxRequest { sandbox_id: pod.id.clone() };
        match call(bound, shim.sandbox().start_sandbox(bound, request)).await {
            Ok(_) => {}
            Err(e) => return Err(e.within(&format!("start the sandbox of pod {}", pod.id), bound)),
        }
        let marker = self.layout.pod(&pod.id).join(STARTED);
        blocking(move || write_atomic(&marker, b"")).await?;
        if let Some(task) = pod.task(&pod.id) {
            self.watch_sandbox(pod, shim, &task);
        }
        Ok(())
    }

    /// Takes over the sandbox that an earlier daemon started. Its shim can't be asked
    /// whether there is one: Go's says nothing of that.
    pub(super) fn adopt_sandbox(self: &Arc<Self>, pod: &Arc<Pod>, shim: &Arc<Shim>) {
        if shim.is_sandbox(&pod.id) && pod.task(&pod.id).is_none() && self.layout.pod(&pod.id).join(STARTED).exists() {
            let task = Arc::new(Task::found(&pod.id));
            pod.update(|s| s.tasks.insert(pod.id.clone(), task.clone()));
            self.watch_sandbox(pod, shim, &task);
        }
    }

    /// Keeps a WaitSandbox outstanding. An answer counts only where the sandbox is
    /// over: Go's runc shim answers at once.
    pub(super) fn watch_sandbox(self: &Arc<Self>, pod: &Arc<Pod>, shim: &Arc<Shim>, task: &Arc<Task>) {
        task.set_made();
        let (inner, pod, shim, task) = (self.clone(), pod.clone(), shim.clone(), task.clone());
        tokio::spawn(async move {
            let request = wire::WaitSandboxRequest { sandbox_id: pod.id.clone() };
            let answer = match call(Duration::ZERO, shim.sandbox().wait_sandbox(Duration::ZERO, request)).await {
                Ok(answer) => answer,
                // A shim that is gone is buried, and its sandbox with it.
                Err(Fault::Closed) => return,
                Err(e) => {
                    let e = e.within("wait for its end", Duration::ZERO);
                    tracing::info!(pod = pod.id, error = %e, "its sandbox's end is told by its shim's alone");
                    return;
                }
            };
            match inner.ask_sandbox(&pod, &shim).await {
                Ok(TaskState::Stopped(mut certificate)) => {
                    if answer.exit_status != 0 {
                        certificate.status = ExitStatus::from_code(answer.exit_status);
                    }
                    inner.ended(&pod, &task, certificate);
                }
                _ => tracing::debug!(pod = pod.id, "its shim's WaitSandbox tells no end"),
            }
        });
    }

    /// What the sandbox is, as a task would be.
    pub(super) async fn ask_sandbox(&self, pod: &Pod, shim: &Shim) -> Result<TaskState> {
        let bound = shim.timeouts().state;
        let request = wire::SandboxStatusRequest { sandbox_id: pod.id.clone(), verbose: false };
        let status = match call(bound, shim.sandbox().sandbox_status(bound, request)).await {
            Ok(status) => status,
            Err(e) => return Err(e.within(&format!("ask the state of the sandbox of pod {}", pod.id), bound)),
        };
        // Older shims leave the state empty: then it is as long as its shim is.
        if !OVER.contains(&status.state.as_str()) {
            return Ok(TaskState::Running { pid: status.pid });
        }
        Ok(TaskState::Stopped(Certificate {
            status: ExitStatus::Code(0),
            exited_at: status.exited_at.as_ref().and_then(time).unwrap_or_else(crate::now),
            oom_killed: false,
            oom_cgroup: None,
            killed_by: None,
            peak_memory: None,
        }))
    }

    /// StopSandbox: with it the containers end. One that is not there is stopped.
    pub(super) async fn stop_sandbox(&self, pod: &Pod, shim: &Shim) -> Result<()> {
        let bound = shim.timeouts().create;
        let seconds = u32::try_from(shim.timeouts().cleanup.as_secs()).unwrap_or(u32::MAX);
        let request = wire::StopSandboxRequest { sandbox_id: pod.id.clone(), timeout_secs: seconds };
        match call(bound, shim.sandbox().stop_sandbox(bound, request)).await {
            Ok(_) | Err(Fault::Closed) => Ok(()),
            Err(e) if e.is_not_found() => Ok(()),
            Err(e) => Err(e.within(&format!("stop the sandbox of pod {}", pod.id), bound)),
        }
    }

    /// Stops the sandbox and forgets it; ShutdownSandbox comes with the pod's end.
    pub(super) async fn delete_sandbox(&self, pod: &Pod, shim: &Shim) -> Result<()> {
        self.stop_sandbox(pod, shim).await?;
        if let Some(task) = pod.update(|s| s.tasks.remove(&pod.id)) {
            let ended = match self.ask_sandbox(pod, shim).await {
                Ok(TaskState::Stopped(certificate)) => certificate,
                _ => Certificate {
                    status: ExitStatus::Code(0),
                    exited_at: crate::now(),
                    oom_killed: false,
                    oom_cgroup: None,
                    killed_by: None,
                    peak_memory: None,
                },
            };
            self.ended(pod, &task, ended);
        }
        Ok(())
    }

    /// ShutdownSandbox: a shim that serves sandboxes ends with its own. Whether it has
    /// is seen at its process.
    pub(super) async fn shut_sandbox_down(&self, shim: &Shim) {
        let bound = shim.timeouts().shutdown;
        let request = wire::ShutdownSandboxRequest { sandbox_id: shim.pod.clone() };
        match call(bound, shim.sandbox().shutdown_sandbox(bound, request)).await {
            Ok(_) | Err(Fault::Closed) => {}
            Err(e) => {
                let e = e.within("shut the sandbox down", bound);
                tracing::warn!(pod = shim.pod, error = %e, "its shim is told to shut down as any other");
            }
        }
    }
}

/// The path of the net namespace in an OCI specification.
fn netns(config_json: &str) -> Option<String> {
    let config: serde_json::Value = serde_json::from_str(config_json).ok()?;
    let namespaces = config["linux"]["namespaces"].as_array()?;
    let net = namespaces.iter().find(|n| n["type"] == "network")?;
    net["path"].as_str().map(str::to_string)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_network_is_found_in_the_specification() {
        let of = |namespaces: &str| netns(&format!(r#"{{"linux":{{"namespaces":{namespaces}}}}}"#));
        assert_eq!(of(r#"[{"type":"ipc","path":"/i"},{"type":"network","path":"/n"}]"#).as_deref(), Some("/n"));
        assert_eq!(of(r#"[{"type":"network"}]"#), None);
        assert_eq!(of("[]"), None);
    }
}
