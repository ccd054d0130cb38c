//! A runc-compatible binary behind the seam.
//!
//! Each call is one short-lived process. It is spawned by `std` (vfork-like, so
//! the cost does not grow with us), awaited by pidfd, and killed at its
//! deadline or when its caller gives it up. Of our environment it gets what says where
//! things are, and every descriptor of ours is close-on-exec, so nothing but the three
//! standard streams reaches it or the container (CVE-2024-21626).

use crate::children::descendants;
use crate::{Checkpoint, Child, Children, Launch, Restore, Runtime, State, Stdio, message};
use async_trait::async_trait;
use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};
use sys::pidfd::PidFd;
use tokio::sync::watch;
use types::{Error, ErrorKind, ExitStatus, Result, ResultExt, Signal};

/// How a runtime's binary is called.
#[derive(Debug, Clone)]
pub struct Config {
    /// The binary.
    pub binary: PathBuf,
    /// The runtime's state directory (`--root`); its own default where `None`.
    pub root: Option<PathBuf>,
    /// Where its short-lived log and pid files go; a directory of ours.
    pub scratch: PathBuf,
    /// Cgroups are systemd's (`--systemd-cgroup`).
    pub systemd_cgroup: bool,
    /// `create --no-pivot`.
    pub no_pivot: bool,
    /// `create --no-new-keyring`.
    pub no_new_keyring: bool,
    /// The longest that `create`, `exec`, `checkpoint` and `restore` may take, which may wait
    /// for slow disks; the others get at most [`SHORT`].
    pub deadline: Duration,
}

/// What a runtime gets of our environment: where programs, its user's configuration and
/// the user's systemd are (without root, runc and crun reach it by the latter two).
const INHERITED: [&str; 5] = ["PATH", "HOME", "TMPDIR", "XDG_RUNTIME_DIR", "DBUS_SESSION_BUS_ADDRESS"];

/// The longest that a call may take that waits for no disk.
pub const SHORT: Duration = Duration::from_secs(20);

/// How long a call that is to be killed, and what it has borne, may take to stop.
const STOPS: Duration = Duration::from_secs(1);
/// How long what was killed may take to die.
pub const DEATHS: Duration = Duration::from_secs(5);

impl Config {
    /// Defaults for a binary: its own state directory, 60 s for the longest calls.
    pub fn new(binary: impl Into<PathBuf>, scratch: impl Into<PathBuf>) -> Self {
        Self {
            binary: binary.into(),
            root: None,
            scratch: scratch.into(),
            systemd_cgroup: false,
            no_pivot: false,
            no_new_keyring: false,
            deadline: Duration::from_secs(60),
        }
    }
}

/// A runc-compatible binary.
#[derive(Debug, Clone)]
pub struct Command {
    config: Config,
    children: Children,
    abort: Option<watch::Receiver<bool>>,
    victims: Option<Victims>,
}

type Tell = dyn Fn(&[i32]) + Send + Sync;

/// Told of the processes that a call has borne when it has to be killed, while
/// they still live.
#[derive(Clone)]
struct Victims(Arc<Tell>);

impl std::fmt::Debug for Victims {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Victims")
    }
}

/// How one call went.
struct Output {
    status: ExitStatus,
    stdout: Option<File>,
    log: String,
}

enum Capture {
    /// Standard output is of no interest.
    No,
    /// Standard output goes to memory and is read afterwards.
    Stdout,
}

impl Command {
    /// The binary of `config`; its processes enter the book `children`.
    pub fn new(config: Config, children: Children) -> Self {
        Self { config, children, abort: None, victims: None }
    }

    /// The same binary, whose calls end early, with `Cancelled`, once `abort` has
    /// become true. A call that ends early, for this reason or at its deadline, is
    /// killed with its processes; `victims` is told of these first, in case more is
    /// known by them of what the runtime has made and not yet written down: runc
    /// writes its state only after the last hook, and can't delete what it does not
    /// know.
    #[must_use]
    pub fn until(&self, abort: watch::Receiver<bool>, victims: impl Fn(&[i32]) + Send + Sync + 'static) -> Self {
        Self { abort: Some(abort), victims: Some(Victims(Arc::new(victims))), ..self.clone() }
    }

    /// How it is configured.
    pub fn config(&self) -> &Config {
        &self.config
    }

    fn name(&self) -> String {
        self.config.binary.file_name().unwrap_or(self.config.binary.as_os_str()).to_string_lossy().into_owned()
    }

    /// Spawns `runtime GLOBAL… verb args… `, waits for it and reads its log.
    async fn run(&self, verb: &str, args: &[&OsStr], stdio: Stdio, capture: Capture) -> Result<Output> {
        static SERIAL: AtomicU64 = AtomicU64::new(0);
        let serial = SERIAL.fetch_add(1, Ordering::Relaxed);
        let log = self.config.scratch.join(format!("oci-{verb}-{serial}.log"));
        let mut command = std::process::Command::new(&self.config.binary);
        command.env_clear();
        for (name, value) in INHERITED.iter().filter_map(|n| Some((n, std::env::var_os(n)?))) {
            command.env(name, value);
        }
        if let Some(root) = &self.config.root {
            command.arg("--root").arg(root);
        }
        command.arg("--log").arg(&log).args(["--log-format", "json"]);
        if self.config.systemd_cgroup {
            command.arg("--systemd-cgroup");
        }
        command.arg(verb).args(args);
        let stdout = match capture {
            Capture::No => None,
            Capture::Stdout => Some(memory_file()?),
        };
        set_stdio(&mut command, stdio, stdout.as_ref())?;
        // A group of its own: where the call has to be killed, its children go too.
        command.process_group(0);
        let spawned = command.spawn().context(|| format!("start {} for {verb}", self.config.binary.display()));
        // No word of a container, whose absence callers take for its end.
        let spawned = spawned.map_err(|e| match e.kind() {
            ErrorKind::NotFound => {
                e.with_kind(ErrorKind::FailedPrecondition).hint("is the OCI runtime installed there?")
            }
            _ => e,
        });
        // The command holds our copies of the container's streams.
        drop(command);
        let pid = i32::try_from(spawned?.id()).unwrap_or(-1);
        let child = self.children.adopt(pid)?;
        let deadline = if matches!(verb, "create" | "exec" | "checkpoint" | "restore") {
            self.config.deadline
        } else {
            self.config.deadline.min(SHORT)
        };
        let early = tokio::select! {
            biased;
            ended = child.wait() => Ok(ended.status),
            () = aborted(self.abort.clone()) => {
                Err(Error::new(ErrorKind::Cancelled, format!("{} {verb} was ended early, as was asked", self.name())))
            }
            () = tokio::time::sleep(deadline) => Err(Error::deadline(format!(
                "{} {verb} took longer than {} s and was killed",
                self.name(),
                deadline.as_secs()
            ))),
        };
        let status = match early {
            Ok(status) => status,
            Err(e) => {
                let gone = self.kill_all(&child).await;
                let _ = std::fs::remove_file(&log);
                return Err(if gone {
                    e
                } else {
                    e.hint(format!("it or what it had begun was killed and has not died within {} s", DEATHS.as_secs()))
                });
            }
        };
        // Only failures are of interest; a file that isn't there says nothing.
        let text = if status == ExitStatus::Code(0) { String::new() } else { read_capped(&log) };
        let _ = std::fs::remove_file(&log);
        Ok(Output { status, stdout, log: text })
    }

    /// Kills a call that has not been reaped yet, with all that it has borne, and awaits
    /// their deaths. False where one of them does not die, in a disk's wait say: once it
    /// does, the call is the sweeper's.
    async fn kill_all(&self, call: &Child) -> bool {
        let (pid, victims) = (call.pid(), self.victims.clone());
        let killed = tokio::task::spawn_blocking(move || {
            kill_call(pid, |borne| {
                if let Some(Victims(tell)) = &victims {
                    tell(borne);
                }
            })
        });
        let killed = killed.await.unwrap_or_default();
        let _ = call.signal(Signal::KILL);
        let until = Instant::now() + DEATHS;
        let ended = tokio::time::timeout(DEATHS, call.wait()).await.is_ok();
        // What they were about to make would come after whoever takes it away.
        let gone = move || killed.iter().all(|p| p.ended_within(until.saturating_duration_since(Instant::now())));
        ended && tokio::task::spawn_blocking(gone).await.unwrap_or(false)
    }

    /// The same, but anything other than 0 is a failure: it names the call and has
    /// the runtime's own words. Which container it was the caller knows and says.
    async fn call(&self, verb: &str, args: &[&OsStr], stdio: Stdio, capture: Capture) -> Result<Output> {
        let out = self.run(verb, args, stdio, capture).await?;
        if out.status == ExitStatus::Code(0) {
            return Ok(out);
        }
        let words = message::last_error(&out.log);
        let kind = words.as_deref().map_or(ErrorKind::Internal, message::kind);
        let words = words.unwrap_or_else(|| match out.status {
            ExitStatus::Signal(n) => format!("it was killed by signal {n}"),
            other => format!("it exited with {} and wrote no error", other.code()),
        });
        let call = format!("{} {verb}", self.name());
        // runc says "runc create failed: …" itself.
        Err(Error::new(kind, if words.starts_with(&call) { words } else { format!("{call}: {words}") }))
    }

    async fn simple(&self, verb: &str, args: &[&str]) -> Result<()> {
        let args: Vec<&OsStr> = args.iter().map(OsStr::new).collect();
        self.call(verb, &args, Stdio::default(), Capture::No).await.map(drop)
    }

    /// Runs `create` or `exec` and adopts the process that it names, before the
    /// call counts as ended.
    async fn launch(&self, verb: &str, id: &str, head: &[&OsStr], launch: Launch) -> Result<Child> {
        let guard = self.children.begin_call();
        let mut args: Vec<&OsStr> = head.to_vec();
        args.extend([OsStr::new("--pid-file"), launch.pid_file.as_os_str()]);
        if let Some(socket) = &launch.console_socket {
            args.extend([OsStr::new("--console-socket"), socket.as_os_str()]);
        }
        args.push(OsStr::new(id));
        let done = self.call(verb, &args, launch.stdio, Capture::No).await;
        let pid = std::fs::read_to_string(&launch.pid_file);
        let _ = std::fs::remove_file(&launch.pid_file);
        done?;
        let pid: i32 = pid
            .context_kind(ErrorKind::Internal, || format!("{} {verb} left no pid file", self.name()))?
            .trim()
            .parse()
            .context(|| format!("{} {verb} left a pid file without a number", self.name()))?;
        let child = self.children.adopt(pid).map_err(|e| e.within(verb))?;
        drop(guard);
        Ok(child)
    }
}

#[async_trait]
impl Runtime for Command {
    async fn create(&self, id: &str, bundle: &Path, launch: Launch) -> Result<Child> {
        let mut args = vec![OsStr::new("--bundle"), bundle.as_os_str()];
        if self.config.no_pivot {
            args.push(OsStr::new("--no-pivot"));
        }
        if self.config.no_new_keyring {
            args.push(OsStr::new("--no-new-keyring"));
        }
        self.launch("create", id, &args, launch).await
    }

    async fn start(&self, id: &str) -> Result<()> {
        self.simple("start", &[id]).await
    }

    async fn exec(&self, id: &str, process: &Path, launch: Launch) -> Result<Child> {
        let args = [OsStr::new("--process"), process.as_os_str(), OsStr::new("--detach")];
        self.launch("exec", id, &args, launch).await
    }

    async fn kill(&self, id: &str, signal: Signal) -> Result<()> {
        self.simple("kill", &[id, &signal.number().to_string()]).await
    }

    async fn delete(&self, id: &str, force: bool) -> Result<()> {
        let root = self.config.root.as_deref();
        root.inspect(|root| remove_own_binary(root, id));
        let forced = ["--force", id];
        match self.simple("delete", if force { &forced } else { &forced[1..] }).await {
            // A delete that has failed half done: by force runc takes the directory, too.
            Err(e) if e.is_not_found() && !force && root.is_some_and(|root| root.join(id).exists()) => {
                self.simple("delete", &forced).await
            }
            done => done,
        }
    }

    async fn state(&self, id: &str) -> Result<State> {
        let out = self.call("state", &[OsStr::new(id)], Stdio::default(), Capture::Stdout).await?;
        serde_json::from_slice(&stdout_of(out)?).context(|| format!("{} state printed no state", self.name()))
    }

    async fn pause(&self, id: &str) -> Result<()> {
        self.simple("pause", &[id]).await
    }

    async fn resume(&self, id: &str) -> Result<()> {
        self.simple("resume", &[id]).await
    }

    async fn update(&self, id: &str, resources: &[u8]) -> Result<()> {
        use std::io::Write;
        let mut file = memory_file()?;
        file.write_all(resources).and_then(|()| file.rewind()).context(|| "hand over resources".into())?;
        let stdio = Stdio { stdin: Some(OwnedFd::from(file)), ..Stdio::default() };
        let args = ["--resources", "-", id].map(OsStr::new);
        self.call("update", &args, stdio, Capture::No).await.map(drop)
    }

    async fn checkpoint(&self, id: &str, checkpoint: &Checkpoint) -> Result<()> {
        let mut args = checkpoint_arguments(checkpoint);
        args.push(id.into());
        let args: Vec<&OsStr> = args.iter().map(OsString::as_os_str).collect();
        let done = self.call("checkpoint", &args, Stdio::default(), Capture::No).await;
        done.map(drop).map_err(|e| with_criu_s_words(e, &checkpoint.work.join("dump.log")))
    }

    async fn restore(&self, id: &str, bundle: &Path, restore: &Restore, launch: Launch) -> Result<Child> {
        let mut args = vec![OsStr::new("--bundle"), bundle.as_os_str(), OsStr::new("--detach")];
        args.extend([OsStr::new("--image-path"), restore.image.as_os_str()]);
        args.extend([OsStr::new("--work-path"), restore.work.as_os_str()]);
        if self.config.no_pivot {
            args.push(OsStr::new("--no-pivot"));
        }
        let done = self.launch("restore", id, &args, launch).await;
        done.map_err(|e| with_criu_s_words(e, &restore.work.join("restore.log")))
    }

    async fn features(&self) -> Result<Option<serde_json::Value>> {
        let out = self.run("features", &[], Stdio::default(), Capture::Stdout).await?;
        if out.status != ExitStatus::Code(0) {
            return Ok(None);
        }
        Ok(serde_json::from_slice(&stdout_of(out)?).ok())
    }

    async fn version(&self) -> Result<String> {
        let mut out = self.run("--version", &[], Stdio::default(), Capture::Stdout).await?;
        if out.status != ExitStatus::Code(0) {
            let words = message::last_error(&out.log).unwrap_or_default();
            return Err(Error::internal(format!("{} --version failed: {words}", self.config.binary.display())));
        }
        out.log.clear();
        let text = String::from_utf8_lossy(&stdout_of(out)?).into_owned();
        Ok(text.lines().next().and_then(|l| l.split_whitespace().last()).unwrap_or("unknown").to_string())
    }
}

/// Ends once `abort` is true; never where it can't become true any more.
async fn aborted(abort: Option<watch::Receiver<bool>>) {
    if let Some(mut abort) = abort
        && abort.wait_for(|a| *a).await.is_ok()
    {
        return;
    }
    std::future::pending().await
}

/// A runc protects its binary (CVE-2019-5736) by a mount of it in the container's
/// directory below `root`, in create as in exec. One that is killed before it has taken
/// that off again leaves it, and runc's delete then fails half done: it has removed its
/// state, not the directory, and knows the container no more when it is asked again.
/// No call may be under way that is to succeed: what is taken off may be that one's.
pub fn remove_own_binary(root: &Path, id: &str) {
    use rustix::mount::{UnmountFlags, unmount};
    let entries = std::fs::read_dir(root.join(id)).into_iter().flatten().flatten();
    for entry in entries.filter(|e| e.file_name().as_encoded_bytes().starts_with(b"runc.")) {
        // It is none where the call was killed just before or after.
        let _ = unmount(entry.path(), UnmountFlags::DETACH | UnmountFlags::NOFOLLOW);
        let _ = std::fs::remove_file(entry.path());
    }
}

/// Whether none of its threads runs: they have stopped or ended.
fn is_stopped(pid: i32) -> bool {
    let threads = std::fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten();
    threads.into_iter().all(|t| {
        let stat = std::fs::read_to_string(t.path().join("stat")).unwrap_or_default();
        stat.rsplit_once(") ").is_none_or(|(_, rest)| rest.starts_with(['T', 't', 'Z', 'X']))
    })
}

/// Kills a runtime call with all that it has borne: hooks are in its group, the
/// container's init is not. `tell` hears of these while they still live. `call` must
/// be sure to be the call's number. Returns them all: until they have ended, what they
/// were about to make may still come.
pub fn kill_call(call: i32, tell: impl FnOnce(&[i32])) -> Vec<PidFd> {
    let mut held: Vec<PidFd> = PidFd::open(call).into_iter().collect();
    let until = Instant::now() + STOPS;
    loop {
        // Once they are stopped they bear no more, and the next look shows all.
        held.iter().for_each(|p| drop(p.signal(Signal::STOP)));
        while !held.iter().all(|p| is_stopped(p.pid())) && Instant::now() < until {
            std::thread::sleep(Duration::from_millis(1));
        }
        let borne = descendants(call);
        let new = borne.iter().filter(|pid| held.iter().all(|h| h.pid() != **pid));
        let new: Vec<PidFd> = new.filter_map(|pid| PidFd::open(*pid).ok()).collect();
        if new.is_empty() {
            tell(&borne);
            break;
        }
        held.extend(new);
    }
    if let Some(group) = rustix::process::Pid::from_raw(call) {
        let _ = rustix::process::kill_process_group(group, rustix::process::Signal::KILL);
    }
    for process in &held {
        let _ = process.signal(Signal::KILL);
    }
    held
}

/// What a call that has not ended is about to make.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Unfinished {
    /// A container, new or from a checkpoint.
    Container,
    /// A process more in a container that there is.
    Exec,
}

/// The calls for the container of this bundle that make something and have not ended,
/// whoever began them.
pub fn unfinished_calls(bundle: &Path) -> Vec<(Unfinished, PidFd)> {
    let all = std::fs::read_dir("/proc").into_iter().flatten().flatten();
    all.filter_map(|e| e.file_name().to_str()?.parse().ok())
        .filter_map(|pid| {
            unfinished(pid, bundle)?;
            let held = PidFd::open(pid).ok()?;
            // Looked at again once it is held: the number may have moved on.
            Some((unfinished(pid, bundle)?, held))
        })
        .collect()
}

fn unfinished(pid: i32, bundle: &Path) -> Option<Unfinished> {
    let line = std::fs::read(format!("/proc/{pid}/cmdline")).ok()?;
    let words: Vec<&[u8]> = line.split(|b| *b == 0).collect();
    let after = |name: &[u8]| words.windows(2).find(|w| w[0] == name).map(|w| Path::new(OsStr::from_bytes(w[1])));
    let verb = words.iter().find(|w| matches!(**w, b"create" | b"restore" | b"exec"))?;
    if *verb == b"exec" {
        return (after(b"--process")?.parent() == Some(bundle)).then_some(Unfinished::Exec);
    }
    (after(b"--bundle")? == bundle).then_some(Unfinished::Container)
}

/// A failure of the runtime, with criu's last error where its log has one.
fn with_criu_s_words(e: Error, log: &Path) -> Error {
    match message::criu_error(&read_capped_end(log)) {
        Some(words) => e.with_kind(ErrorKind::FailedPrecondition).within(format!("criu says {words:?}")),
        None => e,
    }
}

fn checkpoint_arguments(c: &Checkpoint) -> Vec<OsString> {
    let mut args: Vec<OsString> = Vec::new();
    let mut pair = |name: &str, value: &OsStr| args.extend([name.into(), value.to_os_string()]);
    pair("--image-path", c.image.as_os_str());
    pair("--work-path", c.work.as_os_str());
    if let Some(parent) = &c.parent {
        pair("--parent-path", parent.as_os_str());
    }
    for namespace in &c.empty_namespaces {
        pair("--empty-ns", OsStr::new(namespace));
    }
    if !c.cgroups_mode.is_empty() {
        pair("--manage-cgroups-mode", OsStr::new(&c.cgroups_mode));
    }
    let flags = [
        (!c.exit, "--leave-running"),
        (c.open_tcp, "--tcp-established"),
        (c.external_unix_sockets, "--ext-unix-sk"),
        (c.terminal, "--shell-job"),
        (c.file_locks, "--file-locks"),
    ];
    args.extend(flags.into_iter().filter(|(on, _)| *on).map(|(_, name)| name.into()));
    args
}

/// A file in memory, as a place for output that is read when its writer has ended.
fn memory_file() -> Result<File> {
    rustix::fs::memfd_create("oci", rustix::fs::MemfdFlags::CLOEXEC)
        .map(File::from)
        .context(|| "make a file in memory for a runtime's output".into())
}

fn set_stdio(command: &mut std::process::Command, stdio: Stdio, stdout: Option<&File>) -> Result<()> {
    let or_null = |fd: Option<OwnedFd>| fd.map_or_else(std::process::Stdio::null, std::process::Stdio::from);
    command.stdin(or_null(stdio.stdin)).stderr(or_null(stdio.stderr));
    match stdout {
        Some(f) => command.stdout(f.try_clone().context(|| "share a file in memory".into())?),
        None => command.stdout(or_null(stdio.stdout)),
    };
    Ok(())
}

fn stdout_of(out: Output) -> Result<Vec<u8>> {
    let Some(mut file) = out.stdout else { return Ok(Vec::new()) };
    let mut bytes = Vec::new();
    file.rewind()
        .and_then(|()| file.take(1 << 20).read_to_end(&mut bytes))
        .context(|| "read a runtime's output".into())?;
    Ok(bytes)
}

/// The last 64 KiB of a log that grows with the container.
fn read_capped_end(path: &Path) -> String {
    let mut bytes = Vec::new();
    if let Ok(mut f) = File::open(path) {
        let length = f.metadata().map_or(0, |m| m.len());
        let _ = f.seek(SeekFrom::Start(length.saturating_sub(64 << 10)));
        let _ = f.take(64 << 10).read_to_end(&mut bytes);
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

/// The first 64 KiB of a log; a runtime's words are never longer, a hostile
/// configuration's may be.
fn read_capped(path: &Path) -> String {
    let mut bytes = Vec::new();
    if let Ok(f) = File::open(path) {
        let _ = f.take(64 << 10).read_to_end(&mut bytes);
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_checkpoint_s_flags_follow_what_is_asked() {
        let words = |c: &Checkpoint| {
            let all: Vec<String> = checkpoint_arguments(c).iter().map(|a| a.to_string_lossy().into_owned()).collect();
            all.join(" ")
        };
        let plain = Checkpoint { image: "/i".into(), work: "/w".into(), ..Checkpoint::default() };
        assert_eq!(words(&plain), "--image-path /i --work-path /w --leave-running");
        let all = Checkpoint {
            parent: Some("/p".into()),
            exit: true,
            open_tcp: true,
            empty_namespaces: vec!["network".into()],
            cgroups_mode: "full".into(),
            ..plain
        };
        let want = "--image-path /i --work-path /w --parent-path /p --empty-ns network --manage-cgroups-mode full";
        assert_eq!(words(&all), format!("{want} --tcp-established"));
    }
}
