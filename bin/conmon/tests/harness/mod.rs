//! Drives the binary as CRI-O does: by arguments, pipes and files, with real runc
//! and a root file system of busybox.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test that lacks its fixtures has to stop")]
#![allow(dead_code, reason = "each test file uses a part")]

use std::ffi::OsString;
use std::io::{BufRead, BufReader, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

/// The binary under test.
pub const CONMON: &str = env!("CARGO_BIN_EXE_longshore-conmon");
/// Generous: the machine may be loaded.
pub const SOON: Duration = Duration::from_secs(60);

/// A directory with a bundle and all that belongs to one container; nothing is left
/// of it when it is dropped.
pub struct Node {
    pub dir: tempfile::TempDir,
    pub id: String,
    /// Monitors to be ended if a test fails.
    monitors: std::cell::RefCell<Vec<i32>>,
}

/// A monitor that has been started, and the caller's ends of its pipes.
pub struct Monitor {
    pub pid: i32,
    sync: BufReader<UnixStream>,
}

impl Node {
    /// A container that runs `args`.
    pub fn new(args: &[&str]) -> Self {
        Self::with(args, |_| {})
    }

    /// The same, with a change to its configuration.
    pub fn with(args: &[&str], change: impl FnOnce(&mut serde_json::Value)) -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let id = format!("conmon-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        let dir = tempfile::Builder::new().prefix("conmon").tempdir().unwrap();
        let node = Self { dir, id, monitors: std::cell::RefCell::default() };
        for d in ["bundle/rootfs/bin", "bundle/rootfs/proc", "bundle/rootfs/tmp", "exits", "persist", "sockets", "runc"]
        {
            std::fs::create_dir_all(node.path(d)).unwrap();
        }
        let bin = node.path("bundle/rootfs/bin");
        std::fs::copy("/bin/busybox", bin.join("busybox")).expect("busybox-static is installed");
        for name in ["sh", "sleep", "cat", "echo", "yes", "stty", "ls", "head", "tail", "dd", "kill", "env", "seq"] {
            std::os::unix::fs::symlink("busybox", bin.join(name)).unwrap();
        }
        let bundle = node.path("bundle");
        let spec = Command::new("runc").args(["spec", "--bundle"]).arg(&bundle).output().unwrap();
        assert!(spec.status.success(), "{spec:?}");
        let mut config: serde_json::Value =
            serde_json::from_slice(&std::fs::read(bundle.join("config.json")).unwrap()).unwrap();
        config["process"]["args"] = args.into();
        config["process"]["terminal"] = false.into();
        config["process"].as_object_mut().unwrap().remove("rlimits");
        config["root"]["readonly"] = false.into();
        config["linux"]["cgroupsPath"] = format!("/{}/c", node.id).into();
        change(&mut config);
        std::fs::write(bundle.join("config.json"), config.to_string()).unwrap();
        node
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub fn log(&self) -> PathBuf {
        self.path("log")
    }

    /// What every call has.
    pub fn common(&self) -> Vec<OsString> {
        let mut args: Vec<OsString> = Vec::new();
        let mut pair = |flag: &str, value: &dyn AsRef<Path>| args.extend([flag.into(), value.as_ref().into()]);
        pair("-c", &self.id);
        pair("-r", &runc());
        pair("--socket-dir-path", &self.path("sockets"));
        pair("--conmon-pidfile", &self.path("conmon.pid"));
        args.push("--runtime-arg".into());
        args.push(format!("--root={}", self.path("runc").display()).into());
        args
    }

    /// What create has beside that.
    pub fn create_args(&self) -> Vec<OsString> {
        let mut args = self.common();
        let mut pair = |flag: &str, value: &dyn AsRef<Path>| args.extend([flag.into(), value.as_ref().into()]);
        pair("-u", &self.id);
        pair("-b", &self.path("bundle"));
        pair("-p", &self.path("pid"));
        pair("--exit-dir", &self.path("exits"));
        pair("--persist-dir", &self.path("persist"));
        args
    }

    /// Starts a monitor with these arguments behind the usual ones.
    pub fn create(&self, more: &[&str]) -> Monitor {
        let mut args = self.create_args();
        args.extend(more.iter().map(Into::into));
        if !more.contains(&"-l") {
            args.extend(["-l".into(), self.log().into()]);
        }
        self.monitor(&args, &[])
    }

    /// An exec's process document.
    pub fn process(&self, args: &[&str], terminal: bool) -> PathBuf {
        let path = self.path(&format!("process-{}.json", std::fs::read_dir(self.dir.path()).unwrap().count()));
        let env = ["PATH=/bin"];
        let process = serde_json::json!({"args": args, "cwd": "/", "env": env, "terminal": terminal, "user": {"uid": 0, "gid": 0}});
        std::fs::write(&path, process.to_string()).unwrap();
        path
    }

    /// Starts a monitor of an exec.
    pub fn exec(&self, process: &Path, more: &[&str]) -> Monitor {
        let mut args = self.common();
        args.extend(["-e".into(), "--exec-process-spec".into(), process.into()]);
        args.extend(["-p".into(), self.path("exec.pid").into(), "-l".into(), self.path("exec.log").into()]);
        args.extend(more.iter().map(Into::into));
        self.monitor(&args, &[])
    }

    /// Starts the binary as CRI-O does, releases it, and reaps its first process.
    pub fn monitor(&self, args: &[OsString], env: &[(&str, &str)]) -> Monitor {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let (start_read, start_write) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).unwrap();
        let mut all = vec![("_OCI_SYNCPIPE", "3"), ("_OCI_STARTPIPE", "4"), ("PATH", "/usr/sbin:/usr/bin:/sbin:/bin")];
        all.extend_from_slice(env);
        let fds = [theirs.as_fd(), start_read.as_fd()];
        let first = sys::spawn::spawn(Path::new(CONMON), args, &all, &fds).unwrap();
        drop((theirs, start_read));
        std::fs::File::from(start_write).write_all(b"x").unwrap();
        let status = reap(first);
        assert_eq!(status, types::ExitStatus::Code(0), "the first process of {args:?}");
        let pid = std::fs::read_to_string(self.path("conmon.pid")).unwrap().trim().parse().unwrap();
        self.monitors.borrow_mut().push(pid);
        ours.set_read_timeout(Some(SOON)).unwrap();
        Monitor { pid, sync: BufReader::new(ours) }
    }

    /// The rest of CRI-O's part: `runc start`.
    pub fn start(&self) {
        let out = self.runc(&["start", &self.id]);
        assert!(out.status.success(), "{out:?}");
    }

    pub fn runc(&self, args: &[&str]) -> std::process::Output {
        Command::new("runc").arg("--root").arg(self.path("runc")).args(args).output().unwrap()
    }

    /// The exit file's content, once it is there.
    pub fn exit(&self) -> String {
        let path = self.path("exits").join(&self.id);
        wait_for("the exit file", || path.exists());
        std::fs::read_to_string(path).unwrap()
    }

    /// The texts of the log's lines, with their tags.
    pub fn lines(&self, log: &Path) -> Vec<String> {
        let text = std::fs::read_to_string(log).unwrap();
        text.lines().map(|l| l.splitn(3, ' ').nth(2).unwrap_or_default().to_string()).collect()
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        let _ = self.runc(&["delete", "--force", &self.id]);
        for pid in self.monitors.take() {
            if let Ok(p) = sys::pidfd::PidFd::open(pid)
                && command_line(pid).contains(&self.id)
            {
                let _ = p.signal(types::Signal::KILL);
            }
        }
        for hierarchy in std::fs::read_dir("/sys/fs/cgroup").into_iter().flatten().flatten() {
            for below in ["c", ""] {
                let _ = std::fs::remove_dir(hierarchy.path().join(&self.id).join(below));
            }
        }
        let _ = std::fs::remove_dir(Path::new("/sys/fs/cgroup").join(&self.id));
    }
}

impl Monitor {
    /// The next line of the sync pipe; `None` at its end.
    pub fn line(&mut self) -> Option<serde_json::Value> {
        let mut text = String::new();
        let n = self.sync.read_line(&mut text).expect("the monitor answers");
        (n > 0).then(|| serde_json::from_str(&text).unwrap_or_else(|e| panic!("{text:?}: {e}")))
    }

    /// The pid of create's answer.
    pub fn created(&mut self) -> i32 {
        let line = self.line().expect("the monitor answers");
        let pid = line["pid"].as_i64().or(line["data"].as_i64()).unwrap_or(-1);
        assert!(pid > 1, "{line}");
        i32::try_from(pid).unwrap()
    }

    /// Waits until it has ended.
    pub fn gone(&self) {
        wait_for("the monitor's end", || !alive(self.pid));
    }

    /// Its CPU time in clock ticks (10 ms).
    pub fn ticks(&self) -> u64 {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", self.pid)).unwrap();
        let fields: Vec<&str> = stat.rsplit(')').next().unwrap().split_whitespace().collect();
        fields[11].parse::<u64>().unwrap() + fields[12].parse::<u64>().unwrap()
    }
}

pub fn runc() -> PathBuf {
    ["/usr/sbin/runc", "/usr/bin/runc", "/usr/local/sbin/runc", "/usr/local/bin/runc"]
        .into_iter()
        .map(PathBuf::from)
        .find(|p| p.exists())
        .expect("runc is installed")
}

/// Whether a process is there and no zombie.
pub fn alive(pid: i32) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit(')').next().is_some_and(|s| !s.trim().is_empty() && !s.trim().starts_with(['Z', 'X']))
}

pub fn command_line(pid: i32) -> String {
    let bytes = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    String::from_utf8_lossy(&bytes).replace('\0', " ")
}

pub fn wait_for(what: &str, mut holds: impl FnMut() -> bool) {
    let until = Instant::now() + SOON;
    while !holds() {
        assert!(Instant::now() < until, "waited in vain for {what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// Reaps a child of ours.
pub fn reap(pid: i32) -> types::ExitStatus {
    let child = sys::pidfd::PidFd::open(pid).unwrap();
    let until = Instant::now() + SOON;
    loop {
        match child.try_wait().unwrap() {
            sys::pidfd::Waited::Ended(status) => return status,
            _ if Instant::now() > until => panic!("process {pid} has not ended"),
            _ => std::thread::sleep(Duration::from_millis(10)),
        }
    }
}

/// An attach client.
pub fn attach(socket: &Path) -> OwnedFd {
    use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, socket_with};
    let fd = socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None).unwrap();
    rustix::net::connect(&fd, &SocketAddrUnix::new(socket).unwrap()).unwrap();
    fd
}

/// Packets of an attach client until `enough` of what they hold, marks taken off; or
/// their end.
pub fn receive(client: &OwnedFd, enough: impl Fn(&str) -> bool) -> String {
    let mut all = String::new();
    let until = Instant::now() + SOON;
    while !enough(&all) {
        let mut fds = [rustix::event::PollFd::new(client, rustix::event::PollFlags::IN)];
        let second = rustix::event::Timespec { tv_sec: 1, tv_nsec: 0 };
        if rustix::event::poll(&mut fds, Some(&second)).unwrap() == 0 {
            assert!(Instant::now() < until, "only {} bytes came: {:.200}", all.len(), all);
            continue;
        }
        let mut bytes = [0u8; 9000];
        let (_, n) = rustix::net::recv(client, &mut bytes[..], rustix::net::RecvFlags::empty()).unwrap();
        if n == 0 {
            break;
        }
        assert!(matches!(bytes[0], 2 | 3), "{:?}", &bytes[..n]);
        all.push_str(&String::from_utf8_lossy(&bytes[1..n]));
    }
    all
}
