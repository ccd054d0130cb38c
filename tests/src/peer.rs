//! Debian's containerd as a CRI runtime, with directories of its own.

use crate::client::Cri;
use crate::daemon::{bin_dir, signal};
use crate::node::{command_line, parent, processes};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};
use testkit::{ImageBuilder, TempRoot};

const PAUSE: &str = "localhost/pause:1";

/// A containerd whose CRI plugin runs pods with one runtime type. Dropped, it removes
/// its pods and ends; also when a test panics.
pub struct Containerd {
    root: TempRoot,
    child: Child,
}

impl Containerd {
    /// Starts one, with the image of its pods' pause containers; our shim is found as
    /// `io.containerd.longshore.v2`.
    pub async fn start(runtime_type: &str, pause: &ImageBuilder) -> Self {
        let root = TempRoot::new();
        let config = format!(
            "version = 2\nroot = '{0}/root'\nstate = '{0}/state'\n[grpc]\naddress = '{0}/c.sock'\n\
             [plugins.'io.containerd.grpc.v1.cri']\nsandbox_image = '{PAUSE}'\nrestrict_oom_score_adj = true\n\
             stream_server_address = '127.0.0.1'\nstream_server_port = '0'\n\
             [plugins.'io.containerd.grpc.v1.cri'.containerd.runtimes.runc]\nruntime_type = '{runtime_type}'\n\
             [plugins.'io.containerd.internal.v1.opt']\npath = '{0}/opt'\n",
            root.path().display()
        );
        std::fs::write(root.join("config.toml"), config).unwrap();
        let child = spawn(root.path());
        let peer = Self { root, child };
        peer.up().await;
        peer.import(pause, PAUSE);
        peer
    }

    async fn up(&self) {
        let deadline = Instant::now() + Duration::from_secs(20);
        loop {
            // The socket is there before its services are.
            if let Ok(cri) = Cri::connect(&self.socket()).await
                && cri.pods().await.is_ok()
            {
                return;
            }
            assert!(Instant::now() < deadline, "containerd does not answer\n{}", self.log());
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    /// SIGKILL, and another one in its place.
    pub async fn kill_9_and_restart(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        self.child = spawn(self.root.path());
        self.up().await;
    }

    /// Its client.
    pub async fn cri(&self) -> Cri {
        Cri::connect(&self.socket()).await.unwrap()
    }

    /// Its socket.
    pub fn socket(&self) -> PathBuf {
        self.root.join("c.sock")
    }

    /// Its pid.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Its directory.
    pub fn dir(&self) -> &Path {
        self.root.path()
    }

    /// A container's bundle.
    pub fn bundle(&self, id: &str) -> PathBuf {
        self.root.join("state/io.containerd.runtime.v2.task/k8s.io").join(id)
    }

    /// The shims that were started for it.
    pub fn shims(&self) -> Vec<u32> {
        let socket = self.socket().to_string_lossy().into_owned();
        let is_shim = |pid: &u32| {
            let line = command_line(*pid);
            line.contains("containerd-shim-") && line.contains(&socket)
        };
        let all: Vec<u32> = processes().into_iter().filter(is_shim).collect();
        // What a shim has just forked bears its command line until its exec.
        all.iter().copied().filter(|pid| parent(*pid).is_none_or(|p| !all.contains(&p))).collect()
    }

    /// Its log so far.
    pub fn log(&self) -> String {
        std::fs::read_to_string(self.root.join("log")).unwrap_or_default()
    }

    /// Gives it an image.
    pub fn import(&self, image: &ImageBuilder, name: &str) {
        let archive = self.root.join("image.tar");
        image.docker_archive(&archive, name);
        let out = Command::new("ctr")
            .arg("--address")
            .arg(self.socket())
            .args(["-n", "k8s.io", "images", "import"])
            .arg(&archive)
            .output()
            .unwrap();
        assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    }
}

fn spawn(root: &Path) -> Child {
    let log = std::fs::OpenOptions::new().create(true).append(true).open(root.join("log")).unwrap();
    let path = format!("{}:{}", bin_dir().display(), std::env::var("PATH").unwrap_or_default());
    Command::new("containerd")
        .arg("--config")
        .arg(root.join("config.toml"))
        .env("PATH", path)
        .stdin(Stdio::null())
        .stdout(log.try_clone().unwrap())
        .stderr(log)
        .spawn()
        .unwrap()
}

impl Drop for Containerd {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("--- containerd's log\n{}", self.log());
            for pid in self.shims() {
                for child in crate::node::children(pid) {
                    signal(child, rustix::process::Signal::KILL);
                }
                signal(pid, rustix::process::Signal::KILL);
            }
        }
        signal(self.child.id(), rustix::process::Signal::TERM);
        let _ = self.child.wait();
        let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
        let own = self.root.path().to_string_lossy().into_owned();
        for point in mounts.lines().filter_map(|l| l.split(' ').nth(4)).filter(|p| p.starts_with(&own)) {
            let _ = rustix::mount::unmount(point, rustix::mount::UnmountFlags::DETACH);
        }
        // The cgroup of this process's pods outlives them, empty, and so does the
        // runtime's state directory.
        for cgroup in crate::node::cgroups(&format!("longshore-e2e-{}", std::process::id())) {
            let below = std::fs::read_dir(&cgroup).into_iter().flatten().flatten();
            let mut dirs: Vec<PathBuf> = below.map(|e| e.path()).filter(|p| p.is_dir()).collect();
            dirs.push(cgroup);
            for dir in dirs {
                let _ = std::fs::remove_dir(dir);
            }
        }
        for dir in ["/run/longshore/runc/k8s.io", "/run/longshore/runc", "/run/longshore"] {
            let _ = std::fs::remove_dir(dir);
        }
    }
}
