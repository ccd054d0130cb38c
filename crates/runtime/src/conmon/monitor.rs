//! Monitors are started: command line, pipes, cgroup (behaviours.md section 2).
//!
//! ```text
//!  spawn ── fd 3 sync ◄── JSON lines          create: forks once more and ends; the
//!     │     fd 4 start ──► one byte           second one, in conmon.pid, is the monitor
//!     └─ into its cgroup, and only then       exec:   stays our child (--sync)
//!        the byte
//! ```

use super::config::Handler;
use super::sync::Sync;
use crate::bundle::blocking;
use crate::cgroup;
use oci::{Child, Children};
use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
use std::ffi::OsString;
use std::fs::File;
use std::io::{Read, Seek};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::Duration;
use sys::spawn::Surroundings;
use types::{Error, ExitStatus, Result, ResultExt};

/// Before the container's id, in the names of scopes and cgroups.
const PREFIX: &str = "longshore-conmon-";
/// A monitor's version: major, minor, patch.
pub(crate) type Version = (u32, u32, u32);
/// The first that can hand its own streams down (`-l passthrough`).
pub(crate) const PASSTHROUGH_SINCE: Version = (2, 1, 0);
/// The first that has a bound for all of a log (`--log-global-size-max`).
pub(crate) const LOG_BOUND_SINCE: Version = (2, 1, 2);
/// How long `--version` may take.
const VERSION_BOUND: Duration = Duration::from_secs(5);
/// How long systemd may take to make a scope.
const SCOPE_BOUND: Duration = Duration::from_secs(5);

/// What a create's monitor is told.
pub(crate) struct CreateArgs<'a> {
    pub(crate) id: &'a str,
    pub(crate) bundle: &'a Path,
    pub(crate) exits: &'a Path,
    pub(crate) runtime_root: &'a Path,
    pub(crate) terminal: bool,
    pub(crate) stdin: bool,
    pub(crate) log: Option<&'a Path>,
}

/// The container's init, by the runtime's word.
pub(crate) fn init_pid_file(bundle: &Path) -> PathBuf {
    bundle.join("pidfile")
}

/// The monitor itself.
pub(crate) fn monitor_pid_file(bundle: &Path) -> PathBuf {
    bundle.join("conmon.pid")
}

/// Where the OCI runtime logs its errors to.
pub(crate) fn runtime_log(dir: &Path) -> PathBuf {
    dir.join("runtime.log")
}

struct Args(Vec<OsString>);

impl Args {
    fn pair(&mut self, flag: &str, value: impl Into<OsString>) {
        self.0.extend([flag.into(), value.into()]);
    }

    fn flag(&mut self, flag: &str, on: bool) {
        if on {
            self.0.push(flag.into());
        }
    }

    fn runtime(&mut self, handler: &Handler, root: &Path, log: &Path) {
        self.pair("-r", &handler.runtime_binary);
        for argument in
            ["--root".into(), root.as_os_str().into(), "--log".into(), log.into(), "--log-format".into(), "json".into()]
                as [OsString; 6]
        {
            self.pair("--runtime-arg", argument);
        }
        self.pair("--log-level", "error");
    }
}

impl CreateArgs<'_> {
    /// The command line.
    pub(crate) fn arguments(&self, handler: &Handler) -> Vec<OsString> {
        let mut a = Args(Vec::new());
        a.flag("-s", handler.systemd_cgroup);
        a.pair("-c", self.id);
        a.pair("-u", self.id);
        a.pair("-n", self.id);
        a.runtime(handler, self.runtime_root, &runtime_log(self.bundle));
        a.pair("-b", self.bundle);
        a.pair("-p", init_pid_file(self.bundle));
        a.pair("-P", monitor_pid_file(self.bundle));
        let mut log = OsString::from(if self.log.is_some() { "k8s-file:" } else { "none" });
        log.push(self.log.unwrap_or(Path::new("")));
        a.pair("-l", log);
        a.pair("--exit-dir", self.exits);
        a.pair("--log-size-max", "-1");
        a.flag("--full-attach", true);
        a.flag("--no-pivot", handler.no_pivot_root);
        a.flag("--no-new-keyring", handler.no_new_keyring);
        a.flag("-t", self.terminal);
        a.flag("-i", self.stdin);
        a.0
    }
}

/// What an exec's monitor is told.
pub(crate) struct ExecArgs<'a> {
    pub(crate) container: &'a str,
    pub(crate) exec: &'a str,
    pub(crate) dir: &'a Path,
    pub(crate) runtime_root: &'a Path,
    /// The log file; `None` hands our own streams down.
    pub(crate) log: Option<&'a Path>,
    /// The most bytes of it, where the monitor knows such a bound.
    pub(crate) log_bound: Option<u64>,
    /// Whole seconds after which the monitor itself ends the command, for the case
    /// that we can't.
    pub(crate) timeout: Option<u64>,
}

impl ExecArgs<'_> {
    /// The command line.
    pub(crate) fn arguments(&self, handler: &Handler) -> Vec<OsString> {
        let mut a = Args(Vec::new());
        // Takes no value.
        a.flag("--api-version", true);
        a.flag("--sync", true);
        a.pair("-c", self.container);
        a.pair("-u", self.exec);
        a.runtime(handler, self.runtime_root, &runtime_log(self.dir));
        a.pair("-p", self.dir.join("pid"));
        a.flag("-e", true);
        a.pair("--exec-process-spec", self.dir.join("process.json"));
        match self.log {
            None => a.pair("-l", "passthrough"),
            Some(path) => {
                let mut log = OsString::from("k8s-file:");
                log.push(path);
                a.pair("-l", log);
            }
        }
        if let Some(bytes) = self.log_bound {
            a.pair("--log-global-size-max", bytes.to_string());
        }
        if let Some(seconds) = self.timeout {
            a.pair("-T", seconds.to_string());
        }
        a.0
    }
}

/// How a monitor is started.
pub(crate) struct Launch<'a> {
    pub(crate) binary: &'a Path,
    pub(crate) arguments: Vec<OsString>,
    /// Its working directory.
    pub(crate) directory: &'a Path,
    /// Its stdout and stderr, to hand down.
    pub(crate) streams: Option<(BorrowedFd<'a>, BorrowedFd<'a>)>,
    /// It waits for our byte.
    pub(crate) start_pipe: bool,
}

/// A monitor that was started: the process that we have borne.
pub(crate) struct Started {
    pub(crate) child: Child,
    pub(crate) sync: Sync,
    start: Option<OwnedFd>,
    words: Option<File>,
}

fn pair() -> Result<(OwnedFd, OwnedFd)> {
    socketpair(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None)
        .context(|| "make a monitor's pipes".into())
}

impl Launch<'_> {
    /// Starts it with nothing but PATH and the pipes' numbers in its environment, in
    /// a process group of its own.
    ///
    /// # Errors
    /// Naming the binary, where it can't be started.
    pub(crate) fn start(self, children: &Children) -> Result<Started> {
        let what = || format!("start the monitor {}", self.binary.display());
        let (sync, their_sync) = if self.start_pipe { pair()? } else { stdio::fifo::pipe()? };
        let start = if self.start_pipe { Some(pair()?) } else { None };
        let words =
            rustix::fs::memfd_create("conmon", rustix::fs::MemfdFlags::CLOEXEC).map(File::from).context(what)?;
        let path = std::env::var("PATH").unwrap_or_else(|_| "/usr/sbin:/usr/bin:/sbin:/bin".into());
        let mut env = vec![("PATH", path.as_str()), ("_OCI_SYNCPIPE", "3")];
        let mut fds = vec![their_sync.as_fd()];
        if let Some((_, theirs)) = &start {
            env.push(("_OCI_STARTPIPE", "4"));
            fds.push(theirs.as_fd());
        }
        let (out, err) = self.streams.unwrap_or((words.as_fd(), words.as_fd()));
        let around =
            Surroundings { stdio: [None, Some(out), Some(err)], directory: Some(self.directory), own_group: true };
        let pid = sys::spawn::start(self.binary, &self.arguments, &env, &fds, &around).context(what)?;
        let child = children.adopt(pid)?;
        Ok(Started {
            child,
            sync: Sync::new(sync)?,
            start: start.map(|(ours, _)| ours),
            words: self.streams.is_none().then_some(words),
        })
    }
}

impl Started {
    /// The process that we have borne.
    pub(crate) fn pid(&self) -> u32 {
        u32::try_from(self.child.pid()).unwrap_or(0)
    }

    /// Lets it go on. One that has gone already tells why by its end.
    pub(crate) fn release(&mut self) {
        if let Some(start) = self.start.take() {
            let _ = rustix::io::write(&start, b"\0");
        }
    }

    /// What it has said on its standard error before it had none any more.
    pub(crate) fn words(&mut self) -> Option<String> {
        let file = self.words.as_mut()?;
        let mut text = Vec::new();
        file.rewind().ok()?;
        file.take(4096).read_to_end(&mut text).ok()?;
        let text = String::from_utf8_lossy(&text);
        text.lines().map(str::trim).rfind(|l| !l.is_empty()).map(str::to_string)
    }
}

/// How it ended, for an error.
pub(crate) fn ended(status: ExitStatus) -> String {
    match status {
        ExitStatus::Signal(n) => format!("it was killed by signal {n}"),
        other => format!("it exited with {}", other.code()),
    }
}

/// The cgroup of a container's monitor below `parent`.
pub(crate) fn cgroup_of(parent: &str, id: &str) -> String {
    format!("{}/{PREFIX}{id}", parent.trim_end_matches('/'))
}

/// Puts a process into a cgroup of its own, before it is released. A failure is
/// logged: a monitor elsewhere still works.
pub(crate) async fn place(parent: Option<&str>, systemd: bool, id: &str, pid: u32) {
    let Some(parent) = parent else { return };
    if systemd {
        if let Err(e) = scope(id, pid).await {
            tracing::warn!(container = id, error = %e, "the monitor gets no scope and stays in the daemon's cgroup");
        }
        return;
    }
    let path = cgroup_of(parent, id);
    let placed = blocking(move || {
        cgroup::place(&cgroup::prepare(&path), pid);
        Ok(())
    });
    if let Err(e) = placed.await {
        tracing::warn!(container = id, error = %e, "the monitor stays in the daemon's cgroup");
    }
}

/// Asks systemd for a transient scope around `pid`.
async fn scope(id: &str, pid: u32) -> Result<()> {
    let run = tokio::process::Command::new("busctl")
        .args(scope_arguments(id, pid))
        .stdin(std::process::Stdio::null())
        .kill_on_drop(true)
        .output();
    let what = || format!("make the scope {PREFIX}{id}.scope");
    match tokio::time::timeout(SCOPE_BOUND, run).await {
        Ok(Ok(out)) if out.status.success() => Ok(()),
        Ok(Ok(out)) => Err(Error::internal(format!("{}: {}", what(), String::from_utf8_lossy(&out.stderr).trim()))),
        Ok(Err(e)) => Err(e).context(|| format!("{}: run busctl", what())),
        Err(_) => Err(Error::deadline(format!("{}: systemd took longer than {SCOPE_BOUND:?}", what()))),
    }
}

/// A call of StartTransientUnit, its signature `ssa(sv)a(sa(sv))`.
fn scope_arguments(id: &str, pid: u32) -> Vec<String> {
    let name = format!("{PREFIX}{id}.scope");
    let pid = pid.to_string();
    let fixed = [
        "call",
        "--quiet",
        "org.freedesktop.systemd1",
        "/org/freedesktop/systemd1",
        "org.freedesktop.systemd1.Manager",
        "StartTransientUnit",
        "ssa(sv)a(sa(sv))",
        &name,
        "fail",
        "2",
        "PIDs",
        "au",
        "1",
        &pid,
        "CollectMode",
        "s",
        "inactive-or-failed",
        "0",
    ];
    fixed.iter().map(ToString::to_string).collect()
}

/// Removes the cgroup of a monitor that has ended, which the original leaks.
pub(crate) async fn remove_cgroup(parent: Option<&str>, id: &str) {
    if let Some(parent) = parent {
        remove_emptied(cgroup_of(parent, id)).await;
    }
}

/// Removes the cgroups of monitors that ended while there was no daemon; those of
/// the living stay, for the kernel removes none that has a process.
pub(crate) fn sweep_cgroups(parent: &str) {
    for name in cgroup::below(parent).into_iter().filter(|n| n.starts_with(PREFIX)) {
        cgroup::remove(&format!("{}/{name}", parent.trim_end_matches('/')));
    }
}

/// Removes a cgroup whose processes have ended, or are about to.
pub(crate) async fn remove_emptied(path: String) {
    // A zombie that nobody has reaped yet keeps it for a moment.
    for _ in 0..50 {
        let path = path.clone();
        match blocking(move || Ok(cgroup::remove(&path))).await {
            Ok(true) => return,
            _ => tokio::time::sleep(Duration::from_millis(50)).await,
        }
    }
    tracing::warn!(cgroup = path, "a cgroup stays");
}

/// The version that this monitor says it is; `None` where it says none.
pub(crate) async fn version_of(binary: &Path) -> Option<Version> {
    let run = tokio::process::Command::new(binary)
        .arg("--version")
        .stdin(std::process::Stdio::null())
        .kill_on_drop(true)
        .output();
    match tokio::time::timeout(VERSION_BOUND, run).await {
        Ok(Ok(out)) => version(&String::from_utf8_lossy(&out.stdout)),
        _ => None,
    }
}

/// That of `conmon version X.Y.Z-dev`.
fn version(text: &str) -> Option<Version> {
    let word = text.lines().next()?.strip_prefix("conmon version ")?.split_whitespace().next()?;
    let mut numbers = word.split('.').map(|n| n.split(|c: char| !c.is_ascii_digit()).next()?.parse().ok());
    Some((numbers.next()??, numbers.next()??, numbers.next().flatten().unwrap_or(0)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn handler() -> Handler {
        Handler {
            name: "runc".into(),
            monitor: "/usr/bin/conmon".into(),
            runtime_binary: "/usr/sbin/runc".into(),
            runtime_root: "/run/r".into(),
            systemd_cgroup: false,
            no_pivot_root: false,
            no_new_keyring: false,
            exec_by_log: false,
            timeouts: Default::default(),
        }
    }

    fn line(args: Vec<OsString>) -> String {
        args.iter().map(|a| a.to_string_lossy().into_owned()).collect::<Vec<_>>().join(" ")
    }

    #[test]
    fn a_create_s_command_line_follows_what_is_asked() {
        let mut args = CreateArgs {
            id: "c",
            bundle: Path::new("/b"),
            exits: Path::new("/x"),
            runtime_root: Path::new("/run/r/ns"),
            terminal: false,
            stdin: true,
            log: Some(Path::new("/log/0.log")),
        };
        let runtime = "-r /usr/sbin/runc --runtime-arg --root --runtime-arg /run/r/ns --runtime-arg --log \
                       --runtime-arg /b/runtime.log --runtime-arg --log-format --runtime-arg json --log-level error";
        assert_eq!(
            line(args.arguments(&handler())),
            format!(
                "-c c -u c -n c {runtime} -b /b -p /b/pidfile -P /b/conmon.pid -l k8s-file:/log/0.log \
                 --exit-dir /x --log-size-max -1 --full-attach -i"
            )
        );
        args.log = None;
        args.terminal = true;
        let systemd = Handler { systemd_cgroup: true, no_pivot_root: true, ..handler() };
        let text = line(args.arguments(&systemd));
        assert!(text.starts_with("-s -c c ") && text.contains(" -l none ") && text.contains(" --no-pivot "), "{text}");
        assert!(text.ends_with("-t -i"), "{text}");
    }

    #[test]
    fn an_exec_s_command_line_has_neither_bundle_nor_exit_directory() {
        let args = ExecArgs {
            container: "c",
            exec: "e",
            dir: Path::new("/d"),
            runtime_root: Path::new("/r"),
            log: None,
            log_bound: None,
            timeout: Some(7),
        };
        let text = line(args.arguments(&handler()));
        assert!(text.starts_with("--api-version --sync -c c -u e "), "{text}");
        assert!(text.ends_with("-p /d/pid -e --exec-process-spec /d/process.json -l passthrough -T 7"), "{text}");
        assert!(!text.contains(" -b ") && !text.contains("--exit-dir"), "{text}");
        let text = line(ExecArgs { log: Some(Path::new("/d/log")), log_bound: Some(99), ..args }.arguments(&handler()));
        assert!(text.ends_with(" -l k8s-file:/d/log --log-global-size-max 99 -T 7"), "{text}");
    }

    #[test]
    fn versions_are_read_as_monitors_print_them() {
        assert_eq!(version("conmon version 2.1.6\ncommit: unknown\n"), Some((2, 1, 6)));
        assert_eq!(version("conmon version 2.0.30-dev\n"), Some((2, 0, 30)));
        assert_eq!(version("conmon version 2.2"), Some((2, 2, 0)));
        assert_eq!(version("runc version 1.1.5"), None);
        assert!(version("conmon version 10.0.0").is_some_and(|v| v >= PASSTHROUGH_SINCE));
    }

    #[test]
    fn a_scope_is_asked_for_as_systemd_wants_it() {
        let text = scope_arguments("abc", 7).join(" ");
        assert!(text.contains("StartTransientUnit ssa(sv)a(sa(sv)) longshore-conmon-abc.scope fail 2 PIDs au 1 7 "));
        assert_eq!(cgroup_of("/longshore/shims/", "abc"), "/longshore/shims/longshore-conmon-abc");
    }
}
