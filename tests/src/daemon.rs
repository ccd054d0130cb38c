//! A private daemon of ours.

use crate::client::Cri;
use crate::node::{children, wait_for};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;
use testkit::{ImageBuilder, TempRoot};

/// Where the binaries under test are: `LONGSHORE_BIN_DIR`, or `out/bin`, which
/// `make build` fills.
pub fn bin_dir() -> PathBuf {
    let dir = std::env::var_os("LONGSHORE_BIN_DIR")
        .map_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join("../out/bin"), PathBuf::from);
    let dir = dir.canonicalize().unwrap_or_else(|e| panic!("no binaries in {}: {e}; run 'make build'", dir.display()));
    assert!(dir.join("longshore").is_file(), "no longshore in {}; run 'make build'", dir.display());
    dir
}

/// An image of busybox-static that every test may use.
pub fn busybox() -> ImageBuilder {
    ImageBuilder::busybox().cmd(["sh"])
}

/// A daemon with directories of its own. Dropped, it removes its pods, stops, and
/// leaves nothing.
pub struct Daemon {
    root: TempRoot,
    child: Option<Child>,
    config: String,
}

impl Daemon {
    /// Starts one with the default configuration.
    pub async fn start() -> Self {
        Self::with("").await
    }

    /// Starts one with a configuration file.
    pub async fn with(config: &str) -> Self {
        let root = TempRoot::new();
        std::fs::write(root.join("config.toml"), config).unwrap();
        let mut daemon = Self { root, child: None, config: config.to_string() };
        daemon.begin().await;
        daemon
    }

    /// Starts the daemon again, after [`Daemon::kill`] or [`Daemon::terminate`].
    pub async fn begin(&mut self) {
        let log = std::fs::OpenOptions::new().create(true).append(true).open(self.log_path()).unwrap();
        let mut command = Command::new(bin_dir().join("longshore"));
        command
            .arg("serve")
            .arg("--config")
            .arg(self.root.join("config.toml"))
            .arg("--socket")
            .arg(self.socket())
            .arg("--root")
            .arg(self.root.join("root"))
            .arg("--state")
            .arg(self.state())
            .stdin(Stdio::null())
            .stdout(log.try_clone().unwrap())
            .stderr(log)
            .process_group(0);
        self.child = Some(command.spawn().unwrap());
        let deadline = tokio::time::Instant::now() + Duration::from_secs(20);
        loop {
            if let Ok(cri) = Cri::connect(&self.socket()).await
                && cri.pods().await.is_ok()
            {
                return;
            }
            let ended = self.child.as_mut().and_then(|c| c.try_wait().ok().flatten());
            assert!(ended.is_none(), "the daemon has ended: {ended:?}\n{}", self.log());
            assert!(tokio::time::Instant::now() < deadline, "the daemon does not answer\n{}", self.log());
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    /// Its client.
    pub async fn cri(&self) -> Cri {
        Cri::connect(&self.socket()).await.unwrap()
    }

    /// Its socket.
    pub fn socket(&self) -> PathBuf {
        self.root.join("l.sock")
    }

    /// Its state directory.
    pub fn state(&self) -> PathBuf {
        self.root.join("state")
    }

    /// Its directory as a whole.
    pub fn dir(&self) -> &Path {
        self.root.path()
    }

    /// Its configuration file's text.
    pub fn config(&self) -> &str {
        &self.config
    }

    fn log_path(&self) -> PathBuf {
        self.root.join("daemon.log")
    }

    /// All that it has logged.
    pub fn log(&self) -> String {
        std::fs::read_to_string(self.log_path()).unwrap_or_default()
    }

    /// Its pid.
    pub fn pid(&self) -> u32 {
        self.child.as_ref().unwrap().id()
    }

    /// Runs our command line against it and gives code, stdout and stderr.
    pub fn cli(&self, args: &[&str]) -> (i32, String, String) {
        let out = Command::new(bin_dir().join("longshore"))
            .arg("--socket")
            .arg(self.socket())
            .args(args)
            .stdin(Stdio::null())
            .output()
            .unwrap();
        let text = |b: &[u8]| String::from_utf8_lossy(b).into_owned();
        (out.status.code().unwrap_or(-1), text(&out.stdout), text(&out.stderr))
    }

    /// Imports an image under a name.
    pub fn import(&self, image: &ImageBuilder, name: &str) {
        let archive = self.root.join("image.tar");
        image.oci_archive(&archive, name);
        let (code, out, err) = self.cli(&["import", archive.to_str().unwrap()]);
        std::fs::remove_file(&archive).unwrap();
        assert_eq!(code, 0, "import: {out}{err}\n{}", self.log());
    }

    /// kill -9, and its death.
    pub fn kill(&mut self) {
        let mut child = self.child.take().unwrap();
        child.kill().unwrap();
        child.wait().unwrap();
    }

    /// SIGTERM, and its end.
    pub fn terminate(&mut self) -> std::process::ExitStatus {
        let mut child = self.child.take().unwrap();
        signal(child.id(), rustix::process::Signal::TERM);
        child.wait().unwrap()
    }

    /// The pids of the shims that it started, by their command lines: they are
    /// nobody's children but PID 1's.
    pub fn shims(&self) -> Vec<u32> {
        let own = self.dir().to_string_lossy().into_owned();
        processes()
            .into_iter()
            .filter(|pid| {
                let cwd = std::fs::read_link(format!("/proc/{pid}/cwd")).unwrap_or_default();
                let exe = std::fs::read_link(format!("/proc/{pid}/exe")).unwrap_or_default();
                exe.to_string_lossy().contains("containerd-shim-longshore-v2") && cwd.to_string_lossy().contains(&own)
            })
            .collect()
    }
}

fn processes() -> Vec<u32> {
    let names = std::fs::read_dir("/proc").unwrap().flatten();
    names.filter_map(|e| e.file_name().to_string_lossy().parse().ok()).collect()
}

fn signal(pid: u32, signal: rustix::process::Signal) {
    let pid = i32::try_from(pid).ok().and_then(rustix::process::Pid::from_raw).unwrap();
    let _ = rustix::process::kill_process(pid, signal);
}

impl Drop for Daemon {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("--- the daemon's log\n{}", self.log());
        }
        // A runtime of its own: the test's may be the one that is unwinding.
        let socket = self.socket();
        let cleaned = std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(async {
                let all = async {
                    match Cri::connect(&socket).await {
                        Ok(cri) => cri.remove_all().await,
                        Err(_) => Vec::new(),
                    }
                };
                tokio::time::timeout(Duration::from_secs(60), all).await
            })
        });
        let failures = cleaned.join();
        if let Some(mut child) = self.child.take() {
            signal(child.id(), rustix::process::Signal::TERM);
            let _ = child.wait();
        }
        // What a killed daemon or a failed test left.
        for pid in self.shims() {
            for child in children(pid) {
                signal(child, rustix::process::Signal::KILL);
            }
            signal(pid, rustix::process::Signal::KILL);
        }
        remove_cgroups(&format!("longshore-e2e-{}", std::process::id()));
        if !std::thread::panicking() {
            wait_for("the shims' end", Duration::from_secs(10), || self.shims().is_empty());
            if let Ok(Ok(failures)) = failures {
                assert!(failures.is_empty(), "pods could not be removed: {failures:?}");
            }
        }
    }
}

/// Removes empty cgroups of the test's own name in every hierarchy.
fn remove_cgroups(name: &str) {
    let Ok(hierarchies) = std::fs::read_dir("/sys/fs/cgroup") else { return };
    for dir in hierarchies.flatten().map(|h| h.path().join(name)).chain([Path::new("/sys/fs/cgroup").join(name)]) {
        remove_tree(&dir);
    }
}

fn remove_tree(dir: &Path) {
    let Ok(entries) = std::fs::read_dir(dir) else { return };
    for entry in entries.flatten().filter(|e| e.file_type().is_ok_and(|t| t.is_dir())) {
        remove_tree(&entry.path());
    }
    let _ = std::fs::remove_dir(dir);
}
