//! A daemon in miniature for the manager's tests: real shims, a real OCI runtime.
//!
//! Dropping a [`Node`] ends whatever is left of its shims, containers, mounts and
//! cgroups, also when a test has panicked.
#![allow(dead_code, clippy::unwrap_used, reason = "each test file uses its part; a failure has to stop the test")]

pub mod monitored;
pub mod proxy;

use longshore_runtime::shim_v2::{Handler, ShimConfig, ShimManager, TaskOptions, Timeouts};
use longshore_runtime::{ExecSyncSpec, PodSpec, RootfsMount, Runtime, RuntimeEvent, TaskIo, TaskSpec};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};
use testkit::TempRoot;
use tokio::sync::mpsc::UnboundedReceiver;
use types::Certificate;

pub const NAMESPACE: &str = "longshore-test";

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    Ours,
    Go,
}

/// Our shim's binary: beside the tests, built if it isn't there.
fn our_shim() -> PathBuf {
    static PATH: OnceLock<PathBuf> = OnceLock::new();
    PATH.get_or_init(|| {
        if let Some(path) = std::env::var_os("LONGSHORE_TEST_SHIM") {
            return path.into();
        }
        let exe = std::env::current_exe().unwrap();
        let target = exe.ancestors().nth(3).unwrap();
        let build = ["build", "--quiet", "-p", "containerd-shim-longshore-v2", "--target-dir"];
        let status = Command::new(env!("CARGO")).args(build).arg(target).status().unwrap();
        assert!(status.success(), "build the shim");
        let path = target.join("debug/containerd-shim-longshore-v2");
        assert!(path.exists(), "{} is not there", path.display());
        path
    })
    .clone()
}

pub struct Node {
    pub root: TempRoot,
    pub kind: Kind,
    name: String,
    rt: Option<tokio::runtime::Runtime>,
    pub manager: Option<Arc<ShimManager>>,
    events: Option<UnboundedReceiver<RuntimeEvent>>,
    pub timeouts: Timeouts,
}

impl Node {
    pub fn new(kind: Kind) -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let root = TempRoot::new();
        let bin = root.join("rootfs/bin");
        for dir in ["proc", "sys", "dev", "tmp", "etc", "bin"] {
            std::fs::create_dir_all(root.join("rootfs").join(dir)).unwrap();
        }
        std::fs::copy("/bin/busybox", bin.join("busybox")).unwrap();
        for tool in ["sh", "sleep", "echo", "cat", "dd", "true", "false", "head", "yes", "trap", "kill"] {
            std::os::unix::fs::symlink("busybox", bin.join(tool)).unwrap();
        }
        let name = format!("longshore-test-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        let mut node = Self { root, kind, name, rt: None, manager: None, events: None, timeouts: Timeouts::default() };
        node.start();
        node
    }

    pub fn config(&self) -> ShimConfig {
        let handler = Handler {
            name: "test".into(),
            shim: match self.kind {
                Kind::Ours => our_shim(),
                Kind::Go => "/usr/bin/containerd-shim-runc-v2".into(),
            },
            runtime_binary: "/usr/sbin/runc".into(),
            runtime_root: self.root.join("runc"),
            systemd_cgroup: false,
            options: TaskOptions::runc(),
            sandbox: Default::default(),
            timeouts: self.timeouts.clone(),
        };
        ShimConfig {
            handlers: vec![handler],
            state: self.root.join("state"),
            namespace: NAMESPACE.into(),
            shim_cgroup: Some(format!("/{}/shims", self.name)),
        }
    }

    /// Starts the daemon's part.
    pub fn start(&mut self) {
        self.restart_with(self.config());
    }

    /// Starts the daemon's part anew, otherwise told.
    pub fn restart_with(&mut self, config: ShimConfig) {
        self.die();
        let rt = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
        let (tx, rx) = tokio::sync::mpsc::unbounded_channel();
        self.manager = Some(rt.block_on(ShimManager::new(config, tx)).unwrap());
        self.events = Some(rx);
        self.rt = Some(rt);
    }

    /// Kills the daemon's part: every task of it ends where it stands.
    pub fn die(&mut self) {
        self.manager = None;
        self.events = None;
        if let Some(rt) = self.rt.take() {
            rt.shutdown_timeout(Duration::from_secs(5));
        }
    }

    pub fn run<T>(&self, work: impl Future<Output = T>) -> T {
        let bounded = async { tokio::time::timeout(Duration::from_secs(400), work).await };
        self.rt.as_ref().unwrap().block_on(bounded).expect("within 400 s")
    }

    pub fn spawn<T: Send + 'static>(
        &self,
        work: impl Future<Output = T> + Send + 'static,
    ) -> tokio::task::JoinHandle<T> {
        self.rt.as_ref().unwrap().spawn(work)
    }

    pub fn m(&self) -> &Arc<ShimManager> {
        self.manager.as_ref().unwrap()
    }

    pub fn event(&mut self) -> RuntimeEvent {
        let mut events = self.events.take().unwrap();
        let event = self.run(async { tokio::time::timeout(Duration::from_secs(20), events.recv()).await });
        self.events = Some(events);
        event.expect("an event within 20 s").unwrap()
    }

    pub fn no_event(&mut self) {
        let next = self.events.as_mut().unwrap().try_recv();
        assert!(next.is_err(), "unexpected {next:?}");
    }

    /// The next event, which must be the end of `id`.
    pub fn exit_of(&mut self, id: &str) -> Certificate {
        match self.event() {
            RuntimeEvent::Exited { container, certificate, .. } if container == id => certificate,
            other => panic!("expected the end of {id}, got {other:?}"),
        }
    }

    pub fn pod(&self, id: &str) -> PodSpec {
        let annotations = BTreeMap::from([
            ("io.kubernetes.cri.container-type".to_string(), "sandbox".to_string()),
            ("io.kubernetes.cri.sandbox-id".to_string(), id.to_string()),
        ]);
        PodSpec { id: id.into(), handler: String::new(), annotations, bundle_gid: None }
    }

    pub fn task(&self, pod: &str, id: &str, args: &[&str]) -> TaskSpec {
        let config = serde_json::json!({
            "ociVersion": "1.0.2",
            "process": {
                "terminal": false, "user": {"uid": 0, "gid": 0}, "args": args,
                "env": ["PATH=/bin"], "cwd": "/", "noNewPrivileges": true,
            },
            "root": {"path": "rootfs"},
            "mounts": [
                {"destination": "/proc", "type": "proc", "source": "proc"},
                {"destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "mode=755"]},
            ],
            "linux": {
                "cgroupsPath": format!("/{}/{id}", self.name),
                "namespaces": [{"type": "pid"}, {"type": "mount"}, {"type": "ipc"}, {"type": "uts"}, {"type": "network"}],
            },
            "annotations": {
                "io.kubernetes.cri.container-type": "container",
                "io.kubernetes.cri.sandbox-id": pod,
            },
        });
        let source = self.root.join("rootfs").to_string_lossy().into_owned();
        TaskSpec {
            id: id.into(),
            config_json: config.to_string(),
            rootfs: vec![RootfsMount { kind: "bind".into(), source, options: vec!["rbind".into(), "rw".into()] }],
            io: TaskIo { log_path: Some(self.log(id)), log_limit: 16384, terminal: false, stdin: None },
        }
    }

    pub fn log(&self, id: &str) -> PathBuf {
        self.root.join("logs").join(format!("{id}.log"))
    }

    /// Makes and starts a container.
    pub fn launch(&self, pod: &str, id: &str, args: &[&str]) -> u32 {
        let (spec, task) = (self.pod(pod), self.task(pod, id, args));
        self.run(async {
            let pid = self.m().create_task(&spec, &task).await.unwrap();
            self.m().start_task(pod, id).await.unwrap();
            pid
        })
    }

    pub fn exec(&self, args: &[&str]) -> ExecSyncSpec {
        let process = serde_json::json!({
            "terminal": false, "user": {"uid": 0, "gid": 0}, "args": args,
            "env": ["PATH=/bin"], "cwd": "/", "noNewPrivileges": true,
        });
        ExecSyncSpec {
            process_json: process.to_string(),
            timeout: None,
            drain_timeout: Some(Duration::from_secs(15)),
            keep: 16 << 20,
        }
    }

    pub fn bundle(&self, pod: &str) -> PathBuf {
        self.root.join("state/bundles").join(pod)
    }

    /// Nothing of any pod may be left.
    pub fn assert_clean(&self) {
        let bundles = self.root.join("state/bundles");
        eventually("no bundle is left", || std::fs::read_dir(&bundles).unwrap().next().is_none());
        eventually("no shim is left", || self.processes().is_empty());
        let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
        assert!(!mounts.contains(&self.root.path().to_string_lossy().into_owned()), "a mount is left");
    }

    /// The processes that work in our state directory.
    fn processes(&self) -> Vec<i32> {
        let entries = std::fs::read_dir("/proc").unwrap().flatten();
        let pids = entries.filter_map(|e| e.file_name().to_str()?.parse::<i32>().ok());
        pids.filter(|pid| {
            std::fs::read_link(format!("/proc/{pid}/cwd")).is_ok_and(|cwd| cwd.starts_with(self.root.path()))
        })
        .collect()
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        self.die();
        for pid in self.processes() {
            if let Some(pid) = rustix::process::Pid::from_raw(pid) {
                let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
            }
        }
        for pod in std::fs::read_dir(self.root.join("state/bundles")).into_iter().flatten().flatten() {
            let address = std::fs::read_to_string(pod.path().join("address")).unwrap_or_default();
            let _ = std::fs::remove_file(address.trim_start_matches("unix://"));
        }
        let runc = self.root.join("runc").join(NAMESPACE);
        for id in std::fs::read_dir(&runc).into_iter().flatten().flatten() {
            let _ =
                Command::new("runc").arg("--root").arg(&runc).args(["delete", "--force"]).arg(id.file_name()).output();
        }
        for hierarchy in std::fs::read_dir("/sys/fs/cgroup").into_iter().flatten().flatten() {
            remove_cgroups(&hierarchy.path().join(&self.name));
        }
    }
}

pub(crate) fn remove_cgroups(dir: &Path) {
    for below in std::fs::read_dir(dir).into_iter().flatten().flatten() {
        if below.file_type().is_ok_and(|t| t.is_dir()) {
            remove_cgroups(&below.path());
        }
    }
    let until = Instant::now() + Duration::from_secs(3);
    while dir.exists() && std::fs::remove_dir(dir).is_err() && Instant::now() < until {
        std::thread::sleep(Duration::from_millis(20));
    }
}

pub fn eventually(what: &str, mut holds: impl FnMut() -> bool) {
    let until = Instant::now() + Duration::from_secs(60);
    while !holds() {
        assert!(Instant::now() < until, "not within 60 s: {what}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

pub fn kill_9(pid: u32) {
    signal(pid, rustix::process::Signal::KILL);
}

pub fn signal(pid: u32, signal: rustix::process::Signal) {
    let raw = rustix::process::Pid::from_raw(i32::try_from(pid).unwrap()).unwrap();
    rustix::process::kill_process(raw, signal).unwrap();
    if signal == rustix::process::Signal::STOP {
        eventually("it has stopped", || std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap().contains(") T "));
    }
}

pub fn alive(pid: u32) -> bool {
    // A zombie is dead: only its parent has not looked yet.
    std::fs::read_to_string(format!("/proc/{pid}/stat")).is_ok_and(|s| !s.contains(") Z "))
}
