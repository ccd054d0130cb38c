//! A shim, started as its callers start it, and what it says.
#![allow(dead_code, clippy::unwrap_used)]

#[path = "../../../../crates/shim/tests/common/mod.rs"]
pub mod common;

use common::Bundle;
use prost::Message;
use proto::containerd::events as ev;
use proto::containerd::runc::v1::Options;
use proto::containerd::services::events::ttrpc::v1::{Events, EventsClient, ForwardRequest, register_events};
use proto::containerd::task::v3 as task;
use proto::containerd::types::Mount;
use proto::longshore_shim::LongshoreClient;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Arc, Mutex};
use std::time::Duration;

pub const BINARY: &str = env!("CARGO_BIN_EXE_containerd-shim-longshore-v2");
pub const CALL: Duration = Duration::from_secs(300);

/// Topic, container, exec or empty, exit status.
pub type Seen = (String, String, String, u32);

#[derive(Default)]
pub struct Recorder {
    pub seen: Mutex<Vec<Seen>>,
}

#[async_trait::async_trait]
impl Events for Recorder {
    async fn forward(&self, _: &ttrpc::r#async::TtrpcContext, req: ForwardRequest) -> ttrpc::Result<()> {
        let e = req.envelope.unwrap();
        let v = e.event.unwrap().value;
        let v = v.as_slice();
        let (id, exec, code) = match e.topic.as_str() {
            "/tasks/create" => (ev::TaskCreate::decode(v).unwrap().container_id, String::new(), 0),
            "/tasks/start" => (ev::TaskStart::decode(v).unwrap().container_id, String::new(), 0),
            "/tasks/exit" => {
                let m = ev::TaskExit::decode(v).unwrap();
                let exec = if m.id == m.container_id { String::new() } else { m.id };
                (m.container_id, exec, m.exit_status)
            }
            "/tasks/delete" => {
                let m = ev::TaskDelete::decode(v).unwrap();
                (m.container_id, String::new(), m.exit_status)
            }
            "/tasks/oom" => (ev::TaskOom::decode(v).unwrap().container_id, String::new(), 0),
            "/tasks/exec-added" => {
                let m = ev::TaskExecAdded::decode(v).unwrap();
                (m.container_id, m.exec_id, 0)
            }
            "/tasks/exec-started" => {
                let m = ev::TaskExecStarted::decode(v).unwrap();
                (m.container_id, m.exec_id, 0)
            }
            "/tasks/paused" => (ev::TaskPaused::decode(v).unwrap().container_id, String::new(), 0),
            "/tasks/resumed" => (ev::TaskResumed::decode(v).unwrap().container_id, String::new(), 0),
            "/tasks/checkpointed" => (ev::TaskCheckpointed::decode(v).unwrap().container_id, String::new(), 0),
            other => panic!("unknown topic {other}"),
        };
        self.seen.lock().unwrap().push((e.topic, id, exec, code));
        Ok(())
    }
}

/// A running shim; killed and cleaned up when dropped.
pub struct Shim {
    pub dir: tempfile::TempDir,
    pub pid: i32,
    pub task: task::TaskClient,
    pub private: LongshoreClient,
    pub events: Arc<Recorder>,
    _server: ttrpc::r#async::Server,
}

impl Shim {
    pub async fn start() -> Self {
        Self::start_as(proto::TASK_SERVICES[0]).await
    }

    pub async fn start_as(service: &str) -> Self {
        Self::start_with(service, None).await
    }

    /// With one more directory of programs.
    pub async fn start_with(service: &str, programs: Option<&Path>) -> Self {
        let dir = tempfile::Builder::new().prefix("lss").tempdir().unwrap();
        let events = Arc::new(Recorder::default());
        let address = dir.path().join("events.sock");
        let mut server = ttrpc::r#async::Server::new()
            .bind(&format!("unix://{}", address.display()))
            .unwrap()
            .register_service(register_events(events.clone(), EventsClient::SERVICE));
        server.start().await.unwrap();
        let socket = dir.path().join("s/shim.sock");
        let path = std::env::var_os("PATH").unwrap_or_default();
        let path = programs.map(Path::to_path_buf).into_iter().chain(std::env::split_paths(&path));
        let out = Command::new(BINARY)
            .env("PATH", std::env::join_paths(path).unwrap())
            .args(["-namespace", "test", "-id", "pod", "-address", "", "-publish-binary", "", "-socket"])
            .arg(&socket)
            .arg("start")
            .current_dir(dir.path())
            .env("TTRPC_ADDRESS", &address)
            .env("GRPC_ADDRESS", "x")
            .output()
            .unwrap();
        assert!(out.status.success() && out.stderr.is_empty(), "{out:?}");
        let answer: serde_json::Value = serde_json::from_slice(&out.stdout).unwrap();
        assert_eq!(answer["version"], 2);
        assert_eq!(answer["protocol"], "ttrpc");
        assert_eq!(answer["address"], format!("unix://{}", socket.display()));
        let client = connect(&socket).await;
        let task = task::TaskClient::new(client.clone(), service);
        let private = LongshoreClient::new(client, LongshoreClient::SERVICE);
        let pid = std::fs::read_to_string(dir.path().join("shim.pid")).unwrap().parse().unwrap();
        Self { dir, pid, task, private, events, _server: server }
    }

    pub async fn create(&self, b: &Bundle, io: Io<'_>) -> ttrpc::Result<u32> {
        let options = Options { root: b.runtime_root().display().to_string(), ..Default::default() };
        let req = task::CreateTaskRequest {
            id: b.id.clone(),
            bundle: b.path().display().to_string(),
            stdin: io.stdin.into(),
            stdout: io.stdout.into(),
            stderr: io.stderr.into(),
            terminal: io.terminal,
            options: Some(proto::pack("containerd.runc.v1.Options", &options)),
            ..Default::default()
        };
        self.task.create(CALL, req).await.map(|r| r.pid)
    }

    /// The same by another runtime, with mounts for its root.
    pub async fn create_by(&self, b: &Bundle, binary: &Path, rootfs: Vec<Mount>) -> ttrpc::Result<u32> {
        let options = Options {
            root: b.runtime_root().display().to_string(),
            binary_name: binary.display().to_string(),
            ..Default::default()
        };
        let req = task::CreateTaskRequest {
            id: b.id.clone(),
            bundle: b.path().display().to_string(),
            rootfs,
            options: Some(proto::pack("containerd.runc.v1.Options", &options)),
            ..Default::default()
        };
        self.task.create(CALL, req).await.map(|r| r.pid)
    }

    pub async fn start_task(&self, b: &Bundle) -> ttrpc::Result<u32> {
        self.task.start(CALL, task::StartRequest { id: b.id.clone(), exec_id: String::new() }).await.map(|r| r.pid)
    }

    pub async fn wait(&self, b: &Bundle, exec: &str) -> ttrpc::Result<u32> {
        let req = task::WaitRequest { id: b.id.clone(), exec_id: exec.into() };
        self.task.wait(CALL, req).await.map(|r| r.exit_status)
    }

    pub async fn kill(&self, b: &Bundle, exec: &str, signal: u32) -> ttrpc::Result<()> {
        let req = task::KillRequest { id: b.id.clone(), exec_id: exec.into(), signal, all: false };
        self.task.kill(CALL, req).await
    }

    pub async fn delete(&self, b: &Bundle, exec: &str) -> ttrpc::Result<u32> {
        let req = task::DeleteRequest { id: b.id.clone(), exec_id: exec.into() };
        self.task.delete(CALL, req).await.map(|r| r.exit_status)
    }

    pub async fn exec(&self, b: &Bundle, exec: &str, args: &[String], io: Io<'_>) -> ttrpc::Result<u32> {
        let spec = common::process(args, io.terminal).to_string().into_bytes();
        let req = task::ExecProcessRequest {
            id: b.id.clone(),
            exec_id: exec.into(),
            terminal: io.terminal,
            stdin: io.stdin.into(),
            stdout: io.stdout.into(),
            stderr: io.stderr.into(),
            spec: Some(prost_types::Any { type_url: String::new(), value: spec }),
        };
        self.task.exec(CALL, req).await?;
        self.task.start(CALL, task::StartRequest { id: b.id.clone(), exec_id: exec.into() }).await.map(|r| r.pid)
    }

    pub async fn state(&self, b: &Bundle) -> ttrpc::Result<task::StateResponse> {
        self.task.state(CALL, task::StateRequest { id: b.id.clone(), exec_id: String::new() }).await
    }

    /// The events of a container, in their order, once `last` is among them.
    pub async fn events_until(&self, b: &Bundle, last: &str) -> Vec<Seen> {
        for _ in 0..6000 {
            let seen: Vec<Seen> = self.events.seen.lock().unwrap().iter().filter(|s| s.1 == b.id).cloned().collect();
            if seen.iter().any(|s| s.0 == last) {
                return seen;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        panic!("{last} was not seen: {:?}", self.events.seen.lock().unwrap());
    }

    pub fn alive(&self) -> bool {
        Path::new(&format!("/proc/{}/fd", self.pid)).exists()
            && !std::fs::read_to_string(format!("/proc/{}/stat", self.pid)).unwrap_or_default().contains(") Z ")
    }
}

impl Drop for Shim {
    fn drop(&mut self) {
        if let Ok(p) = sys::pidfd::PidFd::open(self.pid) {
            let _ = p.signal(types::Signal::KILL);
        }
    }
}

/// A runtime that is runc, but for `verb`, which does as `script` says before; it notes
/// its pid in `pid`.
pub fn runtime_but_for(dir: &Path, verb: &str, script: &str) -> PathBuf {
    let path = dir.join("runtime");
    let pid = dir.join("pid").display().to_string();
    let text = format!(
        "#!/bin/sh\nfor a in \"$@\"; do\n  if [ \"$a\" = {verb} ]; then echo $$ >{pid}.new; mv {pid}.new {pid}; {script}; fi\n\
         done\nexec runc \"$@\"\n"
    );
    testkit::script(&path, text);
    path
}

/// The pid in a file, once it is there.
pub async fn pid_in(path: &Path) -> i32 {
    for _ in 0..12_000 {
        if let Some(pid) = std::fs::read_to_string(path).ok().and_then(|t| t.trim().parse().ok()) {
            return pid;
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    panic!("{} never appeared", path.display());
}

/// Waits until `holds`, a minute at most.
pub async fn until(what: &str, mut holds: impl FnMut() -> bool) {
    for _ in 0..6000 {
        if holds() {
            return;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    panic!("waited in vain for {what}");
}

pub async fn connect(socket: &Path) -> ttrpc::r#async::Client {
    ttrpc::r#async::Client::new(tokio::net::UnixStream::connect(socket).await.unwrap().into())
}

#[derive(Default, Clone, Copy)]
pub struct Io<'a> {
    pub stdin: &'a str,
    pub stdout: &'a str,
    pub stderr: &'a str,
    pub terminal: bool,
}

/// A FIFO whose bytes are collected.
pub struct Fifo {
    pub path: PathBuf,
    reader: tokio::task::JoinHandle<Vec<u8>>,
}

impl Fifo {
    pub fn new(dir: &Path, name: &str) -> Self {
        let path = dir.join(name);
        stdio::fifo::make(&path).unwrap();
        let fd = stdio::fifo::open_reader(&path).unwrap();
        let reader = tokio::spawn(async move {
            let mut sink = stdio::Capped::new(16 << 20);
            stdio::collect(fd, &mut sink).await.unwrap();
            sink.into_kept()
        });
        Self { path, reader }
    }

    pub fn uri(&self) -> &str {
        self.path.to_str().unwrap()
    }

    pub async fn text(self) -> String {
        let bytes = tokio::time::timeout(CALL, self.reader).await.expect("the stream ends").unwrap();
        String::from_utf8(bytes).unwrap()
    }
}

pub fn code(e: &ttrpc::Error) -> ttrpc::Code {
    match e {
        ttrpc::Error::RpcStatus(s) => s.code(),
        other => panic!("no status: {other:?}"),
    }
}
