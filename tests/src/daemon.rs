//! A private daemon of ours.

use crate::client::{Cri, pod};
use crate::handler::handler;
use crate::node::{Footprint, children, parent, processes, wait_for};
use proto::cri::PodSandboxConfig;
use std::collections::{BTreeMap, BTreeSet};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;
use testkit::{ImageBuilder, TempRoot};

/// How many daemons this process has made, and how many there are now.
static MADE: AtomicUsize = AtomicUsize::new(0);
static ALIVE: AtomicUsize = AtomicUsize::new(0);

/// Where the binaries under test are: `LONGSHORE_BIN_DIR`, or `out/bin`, which
/// `make build` fills.
pub fn bin_dir() -> PathBuf {
    let dir = std::env::var_os("LONGSHORE_BIN_DIR")
        .map_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join("../out/bin"), PathBuf::from);
    let dir = dir.canonicalize().unwrap_or_else(|e| panic!("no binaries in {}: {e}; run 'make build'", dir.display()));
    assert!(dir.join("longshore").is_file(), "no longshore in {}; run 'make build'", dir.display());
    dir
}

/// The name of [`busybox`]'s image where a test has no other.
pub const IMAGE: &str = "localhost/test/busybox:1";

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
    /// The network namespace that it runs in; `None` is the test's own.
    netns: Option<PathBuf>,
    /// Where its binaries are.
    bin: PathBuf,
    cgroup: String,
    /// Ids of pods that were seen, whose netns may be left.
    seen: Mutex<BTreeSet<String>>,
}

impl Daemon {
    /// Starts one with the default configuration.
    pub async fn start() -> Self {
        Self::with("").await
    }

    /// Starts one that has [`IMAGE`].
    pub async fn stocked() -> (Self, Cri) {
        let daemon = Self::start().await;
        daemon.import(&busybox(), IMAGE);
        let cri = daemon.cri().await;
        (daemon, cri)
    }

    /// Starts one with a configuration file.
    pub async fn with(config: &str) -> Self {
        Self::on(TempRoot::new(), config).await
    }

    /// Starts one with a configuration file, on a given directory.
    pub async fn on(root: TempRoot, config: &str) -> Self {
        Self::at(root, config, None, bin_dir()).await
    }

    /// Starts one whose network is the namespace at this path.
    pub async fn in_netns(root: TempRoot, config: &str, netns: &Path) -> Self {
        Self::at(root, config, Some(netns.to_path_buf()), bin_dir()).await
    }

    /// Starts one whose binaries, and those that it runs, are the ones in `bin`.
    pub async fn of_binaries(root: TempRoot, config: &str, bin: &Path) -> Self {
        Self::at(root, config, None, bin.to_path_buf()).await
    }

    /// Its binaries are in another place from its next start on.
    pub fn move_to(&mut self, bin: &Path) {
        self.bin = bin.to_path_buf();
    }

    async fn at(root: TempRoot, config: &str, netns: Option<PathBuf>, bin: PathBuf) -> Self {
        let cgroup = format!("longshore-e2e-{}-{}", std::process::id(), MADE.fetch_add(1, Ordering::Relaxed));
        ALIVE.fetch_add(1, Ordering::Relaxed);
        std::fs::write(root.join("config.toml"), config).unwrap();
        std::fs::create_dir(root.join("config.toml.d")).unwrap();
        let shims = format!("[runtime]\nshim_cgroup = \"/{cgroup}/shims\"\n");
        std::fs::write(root.join("config.toml.d/shims.toml"), shims).unwrap();
        std::fs::write(root.join("config.toml.d/handler.toml"), handler().config()).unwrap();
        // Daemons of several tests run at once: the node's network is nobody's.
        if !config.contains("[network]") {
            std::fs::write(root.join("config.toml.d/network.toml"), "[network]\nmode = \"none\"\n").unwrap();
        }
        let config = config.to_string();
        let mut daemon = Self { root, child: None, config, netns, bin, cgroup, seen: Mutex::default() };
        daemon.begin().await;
        daemon
    }

    /// [`pod`](crate::pod), in a cgroup of this daemon's own.
    pub fn pod(&self, name: &str) -> PodSandboxConfig {
        let mut config = pod(name);
        if let Some(linux) = &mut config.linux {
            linux.cgroup_parent = format!("/{}/{name}", self.cgroup);
        }
        config
    }

    /// The name of its cgroup, directly below each hierarchy's root.
    pub fn cgroup(&self) -> &str {
        &self.cgroup
    }

    /// Starts the daemon again, after [`Daemon::kill`] or [`Daemon::terminate`].
    pub async fn begin(&mut self) {
        self.spawn(None);
        let deadline = tokio::time::Instant::now() + Duration::from_secs(60);
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

    /// Starts it so that it dies at a fault point; false where it dies in its start.
    pub async fn begin_doomed(&mut self, point: &str) -> bool {
        self.spawn(Some(point));
        let deadline = tokio::time::Instant::now() + Duration::from_secs(60);
        loop {
            if self.has_died() {
                return false;
            }
            if let Ok(cri) = Cri::connect(&self.socket()).await
                && cri.pods().await.is_ok()
            {
                return true;
            }
            assert!(tokio::time::Instant::now() < deadline, "the daemon does not answer\n{}", self.log());
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    /// Whether the daemon has ended by a signal; any other end is a failure.
    pub fn has_died(&mut self) -> bool {
        use std::os::unix::process::ExitStatusExt;
        match self.child.as_mut().and_then(|c| c.try_wait().ok().flatten()) {
            None => false,
            Some(status) if status.signal() == Some(9) => true,
            Some(status) => panic!("the daemon has ended by itself: {status}\n{}", self.log()),
        }
    }

    fn spawn(&mut self, fault: Option<&str>) {
        let log = std::fs::OpenOptions::new().create(true).append(true).open(self.log_path()).unwrap();
        let mut command = self.serve();
        command.stdin(Stdio::null()).stdout(log.try_clone().unwrap()).stderr(log).process_group(0);
        if let Some(point) = fault {
            command.env("LONGSHORE_FAULT", point);
        }
        self.child = Some(loop {
            match command.spawn() {
                // A test beside this one forked while the program was copied to its place.
                Err(e) if e.kind() == std::io::ErrorKind::ExecutableFileBusy => {
                    std::thread::sleep(Duration::from_millis(10));
                }
                child => break child.unwrap(),
            }
        });
    }

    /// The command line that serves from its directories.
    pub fn serve(&self) -> Command {
        let binary = self.bin.join("longshore");
        let mut command = match &self.netns {
            None => Command::new(binary),
            // Not `ip netns exec`, which would hide our mounts from the node.
            Some(netns) => {
                let mut command = Command::new("nsenter");
                command.arg(format!("--net={}", netns.display())).arg("--").arg(binary);
                command
            }
        };
        command
            .arg("serve")
            .arg("--config")
            .arg(self.root.join("config.toml"))
            .arg("--socket")
            .arg(self.socket())
            .arg("--root")
            .arg(self.root.join("root"))
            .arg("--state")
            .arg(self.state());
        command
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

    /// Where the bundles of pods are.
    pub fn bundles(&self) -> PathBuf {
        self.state().join(if handler().monitored() { "conmon/bundles" } else { "bundles" })
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

    /// The lines of its log in which something is named, whenever they are asked for.
    pub fn said_of(&self) -> impl Fn(&str) -> Vec<String> + Send + 'static {
        let path = self.log_path();
        move |what| {
            let text = std::fs::read_to_string(&path).unwrap_or_default();
            text.lines().filter(|l| l.contains(what)).map(str::to_string).collect()
        }
    }

    /// All that it has logged.
    pub fn log(&self) -> String {
        std::fs::read_to_string(self.log_path()).unwrap_or_default()
    }

    /// Its pid.
    pub fn pid(&self) -> u32 {
        self.child.as_ref().unwrap().id()
    }

    /// Changes its database, while it does not run.
    pub fn sql(&self, text: &str) {
        assert!(self.child.is_none(), "two who write");
        let database = rusqlite::Connection::open(self.root.join("root/db/longshore.db")).unwrap();
        database.execute_batch(text).unwrap();
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

    /// The exit code and the findings of `longshore doctor`, which is told of this state
    /// directory.
    pub fn doctor(&self, state: &Path, more: &[&str]) -> (i32, Vec<serde_json::Value>) {
        let (root, config) = (self.dir().join("root"), self.dir().join("config.toml"));
        let mut args = vec!["doctor", "-o", "json"];
        for (flag, path) in [("--config", config.as_path()), ("--root", root.as_path()), ("--state", state)] {
            args.extend([flag, path.to_str().unwrap()]);
        }
        args.extend(more);
        let (code, out, err) = self.cli(&args);
        let said: serde_json::Value = serde_json::from_str(&out).unwrap_or_else(|e| panic!("{e}: {out}{err}"));
        (code, said["findings"].as_array().unwrap().clone())
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
        self.see_pods();
        let mut child = self.child.take().unwrap();
        child.kill().unwrap();
        child.wait().unwrap();
        self.see_pods();
    }

    /// Notes the pods of which anything lies in the state directory.
    fn see_pods(&self) -> BTreeSet<String> {
        let mut seen = self.seen.lock().unwrap();
        for dir in ["ns", "bundles", "conmon/bundles"] {
            let Ok(entries) = std::fs::read_dir(self.state().join(dir)) else { continue };
            seen.extend(entries.flatten().map(|e| e.file_name().to_string_lossy().into_owned()));
        }
        seen.clone()
    }

    /// Removes its cgroups, in which no process may be any more.
    pub fn remove_cgroups(&self) {
        wait_for("its cgroups are gone", Duration::from_secs(20), || remove_cgroups(&self.cgroup));
    }

    /// What the node holds of it and its pods now.
    pub fn footprint(&self) -> Footprint {
        let own = self.child.as_ref().map(Child::id);
        Footprint::of(self.dir(), &self.cgroup, &self.see_pods(), own)
    }

    /// That the node holds no more of it than `before`, at the latest after 20 s:
    /// the kernel frees some things later.
    pub fn leaves_nothing_but(&self, before: &Footprint) {
        let deadline = std::time::Instant::now() + Duration::from_secs(20);
        loop {
            let more = self.footprint().beyond(before);
            if more.is_empty() {
                return;
            }
            assert!(std::time::Instant::now() < deadline, "left behind: {more:#?}");
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    /// SIGTERM, and its end.
    pub fn terminate(&mut self) -> std::process::ExitStatus {
        let mut child = self.child.take().unwrap();
        signal(child.id(), rustix::process::Signal::TERM);
        child.wait().unwrap()
    }

    /// The pids of the shims, or monitors, that it started: they are nobody's
    /// children but PID 1's.
    pub fn shims(&self) -> Vec<u32> {
        self.runs(if handler().monitored() { "conmon" } else { "containerd-shim-" })
    }

    /// The processes in its directory whose binary has `name` in its path.
    pub fn runs(&self, name: &str) -> Vec<u32> {
        let own = self.dir().to_string_lossy().into_owned();
        let is_one = |pid: u32| {
            let cwd = std::fs::read_link(format!("/proc/{pid}/cwd")).unwrap_or_default();
            let exe = std::fs::read_link(format!("/proc/{pid}/exe")).unwrap_or_default();
            // What only starts one, or cleans up after one, is none.
            let line = crate::node::command_line(pid);
            exe.to_string_lossy().contains(name)
                && cwd.to_string_lossy().contains(&own)
                && ![" start", " delete"].iter().any(|action| line.ends_with(action))
        };
        let found = processes().into_iter().filter(|pid| is_one(*pid));
        let found: BTreeMap<u32, u32> = found.filter_map(|pid| Some((pid, parent(pid)?))).collect();
        // What one has just forked bears its name until it is something else.
        found.iter().filter(|(_, parent)| !found.contains_key(parent)).map(|(pid, _)| *pid).collect()
    }
}

/// Sends a signal; a process that is gone is no trouble.
pub fn signal(pid: u32, signal: rustix::process::Signal) {
    let pid = i32::try_from(pid).ok().and_then(rustix::process::Pid::from_raw).unwrap();
    let _ = rustix::process::kill_process(pid, signal);
}

impl Daemon {
    /// Stops and removes every pod; a daemon that is dead is started again for it
    /// where there is anything of pods.
    fn remove_pods(&mut self) -> Vec<String> {
        let ended = self.child.as_mut().is_none_or(|c| c.try_wait().is_ok_and(|s| s.is_some()));
        if ended {
            let idle = |dir: &str| std::fs::read_dir(self.state().join(dir)).map_or(0, Iterator::count) == 0;
            if idle("bundles") && idle("conmon/bundles") && idle("ns") {
                return Vec::new();
            }
            self.spawn(None);
        }
        let socket = self.socket();
        // A runtime of its own: the test's may be the one that is unwinding.
        let cleaned = std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(async {
                let all = async {
                    loop {
                        match Cri::connect(&socket).await {
                            Ok(cri) => return cri.remove_all().await,
                            Err(_) if ended => tokio::time::sleep(Duration::from_millis(50)).await,
                            Err(_) => return Vec::new(),
                        }
                    }
                };
                tokio::time::timeout(Duration::from_secs(60), all).await
            })
        });
        match cleaned.join() {
            Ok(Ok(failures)) => failures.iter().map(ToString::to_string).collect(),
            Ok(Err(_)) => vec!["it took longer than a minute".into()],
            Err(_) => vec!["the client panicked".into()],
        }
    }

    /// By force, what a killed daemon or a failed test left.
    fn sweep(&self) {
        let own = format!("/{}/", self.cgroup);
        for pid in self.shims() {
            for child in children(pid) {
                signal(child, rustix::process::Signal::KILL);
            }
            signal(pid, rustix::process::Signal::KILL);
        }
        for pid in processes() {
            let cgroup = std::fs::read_to_string(format!("/proc/{pid}/cgroup")).unwrap_or_default();
            if cgroup.contains(&own) {
                signal(pid, rustix::process::Signal::KILL);
            }
        }
        for id in self.see_pods() {
            let pin = crate::node::netns(&id);
            let _ = rustix::mount::unmount(&pin, rustix::mount::UnmountFlags::DETACH);
            let _ = std::fs::remove_file(&pin);
        }
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("--- the daemon's log\n{}", self.log());
        }
        let failures = self.remove_pods();
        if let Some(mut child) = self.child.take() {
            signal(child.id(), rustix::process::Signal::TERM);
            let _ = child.wait();
        }
        self.sweep();
        let panicking = std::thread::panicking();
        let mut all = vec![self.cgroup.clone()];
        if ALIVE.fetch_sub(1, Ordering::Relaxed) == 1 {
            all.push(format!("longshore-e2e-{}", std::process::id()));
        }
        for _ in 0..100 {
            // The process's own is again in use where another test has begun since.
            all.retain(|name| (*name == self.cgroup || ALIVE.load(Ordering::Relaxed) == 0) && !remove_cgroups(name));
            if all.is_empty() {
                break;
            }
            std::thread::sleep(Duration::from_millis(50));
        }
        if !panicking {
            wait_for("the shims' end", Duration::from_secs(10), || self.shims().is_empty());
            assert!(failures.is_empty(), "pods could not be removed: {failures:?}");
        }
    }
}

/// Removes empty cgroups of the test's own name in every hierarchy.
/// True when none is left.
fn remove_cgroups(name: &str) -> bool {
    let dirs = crate::node::cgroups(name);
    for dir in &dirs {
        remove_tree(dir);
    }
    dirs.iter().all(|dir| !dir.exists())
}

fn remove_tree(dir: &Path) {
    let Ok(entries) = std::fs::read_dir(dir) else { return };
    for entry in entries.flatten().filter(|e| e.file_type().is_ok_and(|t| t.is_dir())) {
        remove_tree(&entry.path());
    }
    let _ = std::fs::remove_dir(dir);
}
