//! A daemon in miniature for the monitors' backend: real conmon, real runc.
//!
//! Dropping a [`Monitored`] ends whatever is left of its containers, monitors, mounts
//! and cgroups, also when a test has panicked.

use longshore_runtime::conmon::{ConmonConfig, ConmonManager, Handler, Timeouts};
use longshore_runtime::{
    ExecSyncSpec, PodSpec, RecoverPod, RootfsMount, Runtime, RuntimeEvent, TaskIo, TaskSpec, TaskState,
};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;
use testkit::TempRoot;
use tokio::sync::mpsc::UnboundedReceiver;
use types::Certificate;

const NAMESPACE: &str = "longshore-test";

/// The conmon under test: `LONGSHORE_TEST_CONMON`, else the original.
pub fn conmon() -> PathBuf {
    std::env::var_os("LONGSHORE_TEST_CONMON").map_or_else(|| "/usr/bin/conmon".into(), PathBuf::from)
}

pub struct Monitored {
    pub root: TempRoot,
    name: String,
    rt: Option<tokio::runtime::Runtime>,
    manager: Option<Arc<ConmonManager>>,
    events: Option<UnboundedReceiver<RuntimeEvent>>,
    pub handler: Handler,
}

impl Monitored {
    pub fn new() -> Self {
        Self::with(|_| {})
    }

    /// With a handler of its own making.
    pub fn with(change: impl FnOnce(&mut Handler)) -> Self {
        let mut node = Self::stopped();
        change(&mut node.handler);
        node.start();
        node
    }

    /// Not started yet.
    pub fn stopped() -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let root = TempRoot::new();
        let bin = root.join("rootfs/bin");
        for dir in ["proc", "sys", "dev", "tmp", "etc", "bin"] {
            std::fs::create_dir_all(root.join("rootfs").join(dir)).unwrap();
        }
        std::fs::copy("/bin/busybox", bin.join("busybox")).unwrap();
        for tool in ["sh", "sleep", "echo", "cat", "dd", "true", "false", "head", "yes", "kill", "stty", "tail", "id"] {
            std::os::unix::fs::symlink("busybox", bin.join(tool)).unwrap();
        }
        let name = format!("longshore-conmon-test-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        let handler = Handler {
            name: "conmon".into(),
            monitor: conmon(),
            runtime_binary: "/usr/sbin/runc".into(),
            runtime_root: root.join("runc"),
            systemd_cgroup: false,
            no_pivot_root: false,
            no_new_keyring: false,
            exec_by_log: false,
            timeouts: Timeouts::default(),
        };
        Self { root, name, rt: None, manager: None, events: None, handler }
    }

    pub fn start(&mut self) {
        let rt = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
        let (tx, rx) = tokio::sync::mpsc::unbounded_channel();
        let cfg = ConmonConfig {
            handlers: vec![self.handler.clone()],
            state: self.root.join("state"),
            namespace: NAMESPACE.into(),
            monitor_cgroup: Some(self.cgroup()),
        };
        self.manager = Some(rt.block_on(ConmonManager::new(cfg, tx)).unwrap());
        self.events = Some(rx);
        self.rt = Some(rt);
    }

    /// The cgroup below which the monitors' are.
    pub fn cgroup(&self) -> String {
        format!("/{}/monitors", self.name)
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
        let bounded = async { tokio::time::timeout(Duration::from_secs(120), work).await };
        self.rt.as_ref().unwrap().block_on(bounded).expect("within two minutes")
    }

    pub fn spawn<T: Send + 'static>(
        &self,
        work: impl Future<Output = T> + Send + 'static,
    ) -> tokio::task::JoinHandle<T> {
        self.rt.as_ref().unwrap().spawn(work)
    }

    pub fn m(&self) -> &Arc<ConmonManager> {
        self.manager.as_ref().unwrap()
    }

    /// The next event, which must be the end of `id`.
    pub fn exit_of(&mut self, id: &str) -> Certificate {
        let mut events = self.events.take().unwrap();
        let event = self.run(async { tokio::time::timeout(Duration::from_secs(30), events.recv()).await });
        self.events = Some(events);
        match event.expect("an event within 30 s").unwrap() {
            RuntimeEvent::Exited { container, certificate, .. } if container == id => certificate,
            other => panic!("expected the end of {id}, got {other:?}"),
        }
    }

    pub fn no_event(&mut self) {
        let next = self.events.as_mut().unwrap().try_recv();
        assert!(next.is_err(), "unexpected {next:?}");
    }

    pub fn pod(&self, id: &str) -> PodSpec {
        PodSpec { id: id.into(), handler: String::new(), annotations: BTreeMap::new(), bundle_gid: None }
    }

    pub fn task(&self, id: &str, args: &[&str]) -> TaskSpec {
        self.task_with(id, args, |_| {})
    }

    pub fn task_with(&self, id: &str, args: &[&str], change: impl FnOnce(&mut serde_json::Value)) -> TaskSpec {
        let mut config = serde_json::json!({
            "ociVersion": "1.0.2",
            "process": {
                "terminal": false, "user": {"uid": 0, "gid": 0}, "args": args,
                "env": ["PATH=/bin"], "cwd": "/", "noNewPrivileges": true,
            },
            "root": {"path": "rootfs"},
            "mounts": [
                {"destination": "/proc", "type": "proc", "source": "proc"},
                {"destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "mode=755"]},
                {"destination": "/dev/pts", "type": "devpts", "source": "devpts",
                 "options": ["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620"]},
            ],
            "linux": {
                "cgroupsPath": format!("/{}/{id}", self.name),
                "namespaces": [{"type": "pid"}, {"type": "mount"}, {"type": "ipc"}, {"type": "uts"}, {"type": "network"}],
            },
        });
        change(&mut config);
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

    pub fn logged(&self, id: &str) -> String {
        std::fs::read_to_string(self.log(id)).unwrap_or_default()
    }

    /// Makes and starts a container.
    pub fn launch(&self, pod: &str, id: &str, args: &[&str]) -> u32 {
        self.begin(pod, self.task(id, args))
    }

    pub fn begin(&self, pod: &str, task: TaskSpec) -> u32 {
        let spec = self.pod(pod);
        self.run(async {
            let pid = self.m().create_task(&spec, &task).await.unwrap();
            self.m().start_task(pod, &task.id).await.unwrap();
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

    /// After a restart: what is found of one pod's containers.
    pub fn recover(&self, pod: &str, containers: &[&str]) -> Vec<Option<TaskState>> {
        let asked =
            RecoverPod { spec: self.pod(pod), containers: containers.iter().map(ToString::to_string).collect() };
        let mut found = self.run(self.m().recover(vec![asked]));
        assert_eq!(found.len(), 1);
        let found = found.remove(0).unwrap().containers;
        let state = |id: &&str| found.iter().find(|(c, _)| c == id).unwrap().1.clone();
        containers.iter().map(state).collect()
    }

    pub fn bundle(&self, pod: &str, id: &str) -> PathBuf {
        self.root.join("state/conmon/bundles").join(pod).join("tasks").join(id)
    }

    pub fn exits(&self) -> PathBuf {
        self.root.join("state/conmon/exits")
    }

    /// Stops the pod, after which nothing of it may be left.
    pub fn end(&self, pod: &str) {
        self.run(self.m().stop_pod(pod)).unwrap();
        assert!(!self.m().owns(pod));
        assert_eq!(names(&self.exits()), Vec::<String>::new());
        assert_eq!(names(&self.root.join("state/conmon/bundles")), Vec::<String>::new());
        super::eventually("no process is left", || self.processes().is_empty());
        let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
        assert!(!mounts.contains(&self.root.join("state").to_string_lossy().into_owned()), "a mount is left");
        super::eventually("no cgroup of a monitor is left", || {
            hierarchies().iter().all(|h| {
                names(&h.join(self.cgroup().trim_start_matches('/')))
                    .iter()
                    .all(|n| !n.starts_with("longshore-conmon-"))
            })
        });
    }

    /// The processes that name our directory: monitors, runtime calls.
    pub fn processes(&self) -> Vec<u32> {
        let root = self.root.path().to_string_lossy().into_owned();
        let entries = std::fs::read_dir("/proc").unwrap().flatten();
        let pids = entries.filter_map(|e| e.file_name().to_str()?.parse::<u32>().ok());
        pids.filter(|pid| *pid != std::process::id())
            .filter(|pid| {
                // A container's init that reaps nobody keeps its dead.
                if !super::alive(*pid) {
                    return false;
                }
                let line = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
                let cgroup = std::fs::read_to_string(format!("/proc/{pid}/cgroup")).unwrap_or_default();
                String::from_utf8_lossy(&line).contains(&root) || cgroup.contains(&format!("/{}/", self.name))
            })
            .collect()
    }
}

fn hierarchies() -> Vec<PathBuf> {
    std::fs::read_dir("/sys/fs/cgroup").into_iter().flatten().flatten().map(|e| e.path()).collect()
}

/// The names in a directory.
pub fn names(dir: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(dir).into_iter().flatten().flatten();
    entries
        .filter(|e| e.file_type().is_ok_and(|t| t.is_dir() || t.is_file()))
        .map(|e| e.file_name().to_string_lossy().into_owned())
        .filter(|n| n != "filler")
        .collect()
}

impl Drop for Monitored {
    fn drop(&mut self) {
        self.die();
        for pid in self.processes() {
            if let Some(pid) = i32::try_from(pid).ok().and_then(rustix::process::Pid::from_raw) {
                let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
            }
        }
        let runc = self.root.join("runc").join(NAMESPACE);
        for id in std::fs::read_dir(&runc).into_iter().flatten().flatten() {
            let _ =
                Command::new("runc").arg("--root").arg(&runc).args(["delete", "--force"]).arg(id.file_name()).output();
        }
        for hierarchy in hierarchies() {
            super::remove_cgroups(&hierarchy.join(&self.name));
        }
    }
}
