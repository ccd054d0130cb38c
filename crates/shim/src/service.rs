//! The task service, v2 and v3 alike: each call becomes a message to the
//! container's owner and awaits its answer, so that a call that is dropped
//! changes nothing.

use crate::container::{Msg, NewExec};
use crate::setup::{self, ProcessPeek};
use crate::shared::Shared;
use crate::state::View;
use crate::streams::Wanted;
use crate::wire;
use async_trait::async_trait;
use prost::Message;
use proto::containerd::task::v3::{self as task, Task};
use proto::containerd::v1::types::{ProcessInfo, Status};
use std::sync::Arc;
use ttrpc::r#async::TtrpcContext;
use types::{Certificate, Error, Result, Signal};

/// Serves tasks.
pub(crate) struct Tasks {
    pub shared: Arc<Shared>,
}

fn exec_id(id: String) -> Option<String> {
    (!id.is_empty()).then_some(id)
}

/// The process's document with the terminal that the request asks for.
fn exec_spec(req: &task::ExecProcessRequest) -> Result<(Vec<u8>, bool)> {
    let bad = |e: serde_json::Error| {
        Error::invalid(format!("the process of exec {} is no OCI process", req.exec_id)).because(e)
    };
    let bytes = req.spec.as_ref().map(|s| s.value.as_slice()).unwrap_or_default();
    let peek: ProcessPeek = serde_json::from_slice(bytes).map_err(bad)?;
    if peek.terminal == req.terminal {
        return Ok((bytes.to_vec(), peek.labelled()));
    }
    let mut document: serde_json::Value = serde_json::from_slice(bytes).map_err(bad)?;
    document["terminal"] = req.terminal.into();
    Ok((document.to_string().into_bytes(), peek.labelled()))
}

impl Tasks {
    async fn exited(&self, id: &str, exec: Option<String>) -> Result<Certificate> {
        let mut exit = self.shared.ask(id, |r| Msg::Wait(exec, r)).await?;
        let found = exit.wait_for(Option::is_some).await.map(|c| c.clone());
        found.ok().flatten().ok_or_else(|| Error::not_found(format!("container {id}")))
    }

    async fn process_info(&self, id: &str) -> Result<Vec<ProcessInfo>> {
        let pids = self.shared.ask(id, Msg::Pids).await?;
        let details = |exec_id: String| {
            proto::pack("containerd.runc.v1.ProcessDetails", &proto::containerd::runc::v1::ProcessDetails { exec_id })
        };
        Ok(pids.into_iter().map(|(pid, exec)| ProcessInfo { pid: wire::pid(pid), info: exec.map(details) }).collect())
    }
}

#[async_trait]
impl Task for Tasks {
    async fn create(&self, _: &TtrpcContext, req: task::CreateTaskRequest) -> ttrpc::Result<task::CreateTaskResponse> {
        let pid = setup::create(&self.shared, req).await.map_err(wire::error)?;
        Ok(task::CreateTaskResponse { pid: wire::pid(pid) })
    }

    async fn start(&self, _: &TtrpcContext, req: task::StartRequest) -> ttrpc::Result<task::StartResponse> {
        let exec = exec_id(req.exec_id);
        let pid = self.shared.ask(&req.id, |r| Msg::Start(exec, r)).await.map_err(wire::error)?;
        Ok(task::StartResponse { pid: wire::pid(pid) })
    }

    async fn delete(&self, _: &TtrpcContext, req: task::DeleteRequest) -> ttrpc::Result<task::DeleteResponse> {
        let exec = exec_id(req.exec_id);
        let (pid, exit) = self.shared.ask(&req.id, |r| Msg::Delete(exec, r)).await.map_err(wire::error)?;
        Ok(task::DeleteResponse {
            pid: wire::pid(pid),
            exit_status: wire::exit_status(exit.status),
            exited_at: Some(wire::timestamp(exit.exited_at)),
        })
    }

    async fn exec(&self, _: &TtrpcContext, req: task::ExecProcessRequest) -> ttrpc::Result<()> {
        types::check_identifier("exec id", &req.exec_id).map_err(wire::error)?;
        let (spec, labelled) = exec_spec(&req).map_err(wire::error)?;
        let wanted = Wanted { stdin: req.stdin, stdout: req.stdout, stderr: req.stderr, terminal: req.terminal };
        let new = NewExec { id: req.exec_id, wanted, spec, labelled };
        self.shared.ask(&req.id, |r| Msg::Exec(new, r)).await.map_err(wire::error)
    }

    async fn state(&self, _: &TtrpcContext, req: task::StateRequest) -> ttrpc::Result<task::StateResponse> {
        let exec = exec_id(req.exec_id.clone());
        let seen = self.shared.ask(&req.id, |r| Msg::State(exec, r)).await.map_err(wire::error)?;
        let (status, exit) = match seen.view {
            View::Created => (Status::Created, None),
            View::Running => (Status::Running, None),
            View::Paused => (Status::Paused, None),
            View::Stopped(exit) => (Status::Stopped, Some(exit)),
        };
        Ok(task::StateResponse {
            // The process's own: containerd's shim has an exec's id here.
            id: if req.exec_id.is_empty() { req.id } else { req.exec_id.clone() },
            bundle: seen.bundle.display().to_string(),
            pid: wire::pid(seen.pid),
            status: status.into(),
            stdin: seen.wanted.stdin,
            stdout: seen.wanted.stdout,
            stderr: seen.wanted.stderr,
            terminal: seen.wanted.terminal,
            exit_status: exit.as_ref().map_or(0, |e| wire::exit_status(e.status)),
            exited_at: exit.map(|e| wire::timestamp(e.exited_at)),
            exec_id: req.exec_id,
        })
    }

    async fn kill(&self, _: &TtrpcContext, req: task::KillRequest) -> ttrpc::Result<()> {
        let signal = Signal::from_number(req.signal).map_err(wire::error)?;
        let (exec, all) = (exec_id(req.exec_id), req.all);
        // A runtime that hangs in create would keep whoever stops the container
        // waiting for its deadline.
        if exec.is_none() && signal == Signal::KILL && self.shared.end_creation(&req.id).await {
            return Ok(());
        }
        let ask = self.shared.ask(&req.id, |reply| Msg::Kill { exec, signal, all, reply });
        ask.await.map_err(wire::error)
    }

    async fn wait(&self, _: &TtrpcContext, req: task::WaitRequest) -> ttrpc::Result<task::WaitResponse> {
        let exit = self.exited(&req.id, exec_id(req.exec_id)).await.map_err(wire::error)?;
        Ok(task::WaitResponse {
            exit_status: wire::exit_status(exit.status),
            exited_at: Some(wire::timestamp(exit.exited_at)),
        })
    }

    async fn pids(&self, _: &TtrpcContext, req: task::PidsRequest) -> ttrpc::Result<task::PidsResponse> {
        let processes = self.process_info(&req.id).await.map_err(wire::error)?;
        Ok(task::PidsResponse { processes })
    }

    async fn resize_pty(&self, _: &TtrpcContext, req: task::ResizePtyRequest) -> ttrpc::Result<()> {
        let (exec, width, height) = (exec_id(req.exec_id), req.width, req.height);
        let ask = self.shared.ask(&req.id, |reply| Msg::Resize { exec, width, height, reply });
        ask.await.map_err(wire::error)
    }

    async fn close_io(&self, _: &TtrpcContext, req: task::CloseIoRequest) -> ttrpc::Result<()> {
        if !req.stdin {
            return Ok(());
        }
        let exec = exec_id(req.exec_id);
        self.shared.ask(&req.id, |r| Msg::CloseStdin(exec, r)).await.map_err(wire::error)
    }

    async fn update(&self, _: &TtrpcContext, req: task::UpdateTaskRequest) -> ttrpc::Result<()> {
        let resources = req.resources.map(|r| r.value).unwrap_or_default();
        if resources.is_empty() {
            return Ok(());
        }
        self.shared.ask(&req.id, |r| Msg::Update(resources, r)).await.map_err(wire::error)
    }

    async fn pause(&self, _: &TtrpcContext, req: task::PauseRequest) -> ttrpc::Result<()> {
        self.shared.ask(&req.id, |r| Msg::Pause(true, r)).await.map_err(wire::error)
    }

    async fn resume(&self, _: &TtrpcContext, req: task::ResumeRequest) -> ttrpc::Result<()> {
        self.shared.ask(&req.id, |r| Msg::Pause(false, r)).await.map_err(wire::error)
    }

    async fn stats(&self, _: &TtrpcContext, req: task::StatsRequest) -> ttrpc::Result<task::StatsResponse> {
        let stats = self.shared.ask(&req.id, Msg::Stats).await.map_err(wire::error)?;
        Ok(task::StatsResponse { stats: Some(stats) })
    }

    async fn checkpoint(&self, _: &TtrpcContext, req: task::CheckpointTaskRequest) -> ttrpc::Result<()> {
        let wanted = crate::checkpoint::wanted(&req).map_err(wire::error)?;
        self.shared.ask(&req.id, |r| Msg::Checkpoint(wanted, r)).await.map_err(wire::error)
    }

    async fn connect(&self, _: &TtrpcContext, req: task::ConnectRequest) -> ttrpc::Result<task::ConnectResponse> {
        if self.shared.is_closed() {
            return Err(wire::error(Error::unavailable("the shim is ending")));
        }
        // A shim without this task answers too: its own pid is what is asked for.
        let task_pid = match self.shared.ask(&req.id, |r| Msg::State(None, r)).await {
            Ok(seen) => wire::pid(seen.pid),
            Err(_) => 0,
        };
        Ok(task::ConnectResponse { shim_pid: std::process::id(), task_pid, version: env!("CARGO_PKG_VERSION").into() })
    }

    async fn shutdown(&self, _: &TtrpcContext, _: task::ShutdownRequest) -> ttrpc::Result<()> {
        // With containers left it is no end, and no failure either.
        let _ = self.shared.close();
        Ok(())
    }
}

/// Reads what `delete` prints.
///
/// # Errors
/// `Internal` where it is no answer.
pub fn decode_delete(bytes: &[u8]) -> Result<task::DeleteResponse> {
    task::DeleteResponse::decode(bytes).map_err(|e| Error::internal("the answer of delete can't be read").because(e))
}
