//! Running a plugin: its environment, its input, its answer, and its end.
//!
//! A plugin is a process group of its own, because plugins run further ones (ipam):
//! where its time is over, or its caller has gone, the group is killed as a whole.

use super::config::NetworkList;
use ::types::{Error, ErrorKind, Result, ResultExt};
use rustix::process::{Pid, Signal, getpgid, kill_process_group};
use serde::Deserialize;
use serde_json::Value;
use std::collections::BTreeSet;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::time::{Duration, Instant};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::process::{Child, Command};

/// The most that a plugin may say on each stream.
const LONGEST_ANSWER: u64 = 1 << 20;
/// How long the streams are read after the plugin itself has ended, where a child of
/// it still holds them.
const LINGER: Duration = Duration::from_millis(100);
/// How long the death of a killed plugin is waited for.
const KILL_WAIT: Duration = Duration::from_secs(5);
/// A binary that is being replaced can't be run for a moment.
const BUSY_RETRIES: u32 = 10;

/// What a plugin is asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verb {
    /// Attach.
    Add,
    /// Detach.
    Del,
    /// Look whether it is still attached.
    Check,
    /// Free what belongs to no attachment in a list.
    Gc,
    /// Say whether pods can be attached.
    Status,
}

impl Verb {
    fn name(self) -> &'static str {
        match self {
            Self::Add => "ADD",
            Self::Del => "DEL",
            Self::Check => "CHECK",
            Self::Gc => "GC",
            Self::Status => "STATUS",
        }
    }
}

/// The pod that a call is about; GC and STATUS are about none.
#[derive(Debug, Clone, Copy)]
pub struct Subject<'a> {
    /// CNI_CONTAINERID.
    pub pod: &'a str,
    /// CNI_NETNS; empty where it is gone.
    pub netns: &'a Path,
    /// CNI_IFNAME.
    pub interface: &'a str,
    /// CNI_ARGS.
    pub args: &'a [(String, String)],
}

/// Where plugins are, and how long they may take.
#[derive(Debug)]
pub struct Plugins {
    dirs: Vec<PathBuf>,
    bound: Duration,
}

/// A plugin's word on why it failed.
#[derive(Debug, Deserialize)]
struct Failure {
    code: u32,
    msg: String,
    #[serde(default)]
    details: String,
}

/// An error of STATUS that says that running pods suffer too.
const LIMITED_CONNECTIVITY: u32 = 51;
/// Errors that say that it may go better later: try again, not available.
const LATER: [u32; 3] = [11, 50, LIMITED_CONNECTIVITY];

impl Plugins {
    /// Plugins in these directories, each call of one bounded.
    pub fn new(dirs: Vec<PathBuf>, bound: Duration) -> Self {
        Self { dirs, bound }
    }

    /// The binary of a plugin.
    ///
    /// # Errors
    /// `FailedPrecondition`, naming the plugin and the directories.
    pub fn find(&self, kind: &str) -> Result<PathBuf> {
        let runs = |p: &PathBuf| p.metadata().is_ok_and(|m| m.is_file() && m.permissions().mode() & 0o111 != 0);
        self.dirs.iter().map(|d| d.join(kind)).find(runs).ok_or_else(|| {
            let dirs: Vec<_> = self.dirs.iter().map(|d| d.display().to_string()).collect();
            Error::precondition(format!("the CNI plugin {kind} is not installed: not in {}", dirs.join(", ")))
                .hint("install it, or name its directory in network.cni.bin_dirs")
        })
    }

    /// Runs a plugin of a network and gives what it said.
    ///
    /// # Errors
    /// Names plugin, verb and network; its own words on JSON or stderr.
    pub async fn run(
        &self,
        list: &NetworkList,
        kind: &str,
        verb: Verb,
        subject: Option<Subject<'_>>,
        input: &serde_json::Map<String, Value>,
    ) -> Result<Vec<u8>> {
        let what = || format!("{} by the CNI plugin {kind} (network {})", verb.name(), list.name);
        let binary = self.find(kind).map_err(|e| e.within(what()))?;
        let input = serde_json::to_vec(input).context(what)?;
        let mut child = self.spawn(&binary, verb, subject).await.context_kind(ErrorKind::FailedPrecondition, what)?;
        let mut group = Group::of(&child);
        let said = match tokio::time::timeout(self.bound, converse(&mut child, &input)).await {
            Ok(said) => {
                group.has_ended();
                said.context(what)?
            }
            Err(_) => {
                group.kill();
                let dead = tokio::time::timeout(KILL_WAIT, child.wait()).await.is_ok();
                group.has_ended();
                let end = if dead { "was killed" } else { "does not die by SIGKILL" };
                return Err(Error::deadline(format!(
                    "{} took longer than {} s and {end}",
                    what(),
                    self.bound.as_secs()
                ))
                .hint(format!("its binary is {}", binary.display())));
            }
        };
        if said.status.success() {
            if !said.stderr.is_empty() {
                tracing::debug!("{} wrote: {}", what(), tail(&said.stderr));
            }
            return Ok(said.stdout);
        }
        Err(failure(&said).within(what()))
    }

    async fn spawn(&self, binary: &Path, verb: Verb, subject: Option<Subject<'_>>) -> std::io::Result<Child> {
        let mut command = Command::new(binary);
        let path = std::env::join_paths(&self.dirs).map_err(std::io::Error::other)?;
        command
            .env_clear()
            .env("PATH", std::env::var_os("PATH").unwrap_or_else(|| "/usr/sbin:/usr/bin:/sbin:/bin".into()))
            .env("CNI_COMMAND", verb.name())
            .env("CNI_PATH", path)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .current_dir("/")
            .process_group(0)
            .kill_on_drop(true);
        if let Some(subject) = subject {
            let args: Vec<String> = subject.args.iter().map(|(k, v)| format!("{k}={v}")).collect();
            command
                .env("CNI_CONTAINERID", subject.pod)
                .env("CNI_NETNS", subject.netns)
                .env("CNI_IFNAME", subject.interface)
                .env("CNI_ARGS", args.join(";"));
        }
        let mut left = BUSY_RETRIES;
        loop {
            match command.spawn() {
                Err(e) if e.kind() == std::io::ErrorKind::ExecutableFileBusy && left > 0 => left -= 1,
                other => return other,
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    }
}

struct Said {
    status: ExitStatus,
    stdout: Vec<u8>,
    stderr: Vec<u8>,
}

/// Gives a plugin its input, takes its output, and waits for its end.
async fn converse(child: &mut Child, input: &[u8]) -> std::io::Result<Said> {
    let (mut stdout, mut stderr) = (Vec::new(), Vec::new());
    let (stdin, out, err) = (child.stdin.take(), child.stdout.take(), child.stderr.take());
    let status = {
        let write = async {
            if let Some(mut stdin) = stdin {
                // One that does not read its input may still answer.
                let _ = stdin.write_all(input).await;
            }
        };
        let read_out = async {
            match out {
                Some(out) => out.take(LONGEST_ANSWER).read_to_end(&mut stdout).await.map(|_| ()),
                None => Ok(()),
            }
        };
        let read_err = async {
            match err {
                Some(err) => err.take(LONGEST_ANSWER).read_to_end(&mut stderr).await.map(|_| ()),
                None => Ok(()),
            }
        };
        let mut streams = std::pin::pin!(async { tokio::join!(write, read_out, read_err) });
        tokio::select! {
            _ = &mut streams => child.wait().await?,
            status = child.wait() => {
                let _ = tokio::time::timeout(LINGER, &mut streams).await;
                status?
            }
        }
    };
    Ok(Said { status, stdout, stderr })
}

/// Why a plugin failed, in its own words.
fn failure(said: &Said) -> Error {
    let stderr = tail(&said.stderr);
    let with_stderr = |e: Error| if stderr.is_empty() { e } else { e.hint(format!("its stderr: {stderr}")) };
    match serde_json::from_slice::<Failure>(&said.stdout) {
        Ok(f) => {
            let details = if f.details.is_empty() { String::new() } else { format!(": {}", f.details) };
            let kind = if LATER.contains(&f.code) { ErrorKind::Unavailable } else { ErrorKind::Internal };
            with_stderr(Error::new(kind, format!("{}{details} (code {})", f.msg.trim_end(), f.code)))
        }
        Err(_) => {
            let said_out = tail(&said.stdout);
            let words = if said_out.is_empty() { "it said nothing".into() } else { format!("it said {said_out:?}") };
            with_stderr(Error::internal(format!("{}, and no error in CNI's form: {words}", said.status)))
        }
    }
}

/// The end of what a plugin said, on one line.
fn tail(said: &[u8]) -> String {
    let text = String::from_utf8_lossy(said);
    let text = text.trim();
    let from = text.char_indices().rev().nth(1000).map_or(0, |(i, _)| i);
    text[from..].replace('\n', "; ")
}

/// A plugin's process group, killed when it is dropped before its end was seen.
struct Group(Option<Pid>);

impl Group {
    fn of(child: &Child) -> Self {
        Self(child.id().and_then(|id| Pid::from_raw(i32::try_from(id).ok()?)))
    }

    fn kill(&self) {
        if let Some(pid) = self.0 {
            let _ = kill_process_group(pid, Signal::KILL);
        }
    }

    /// Its leader was reaped: the number may soon be another's.
    fn has_ended(&mut self) {
        self.0 = None;
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        self.kill();
    }
}

/// Ends the plugins that run for these pods, a former daemon's or those of a call that
/// was given up: an ADD that goes on would undo what is being freed. They are known by the
/// pod's id in their environment, as is what they have borne. Of a pod that is `live`, that
/// may be meant to last (a name server, a proxy): only the plugins themselves are ended,
/// programs of these directories, with their process groups.
///
/// # Errors
/// Names those that don't die.
pub fn end_orphans(pods: &BTreeSet<String>, live: &BTreeSet<String>, dirs: &[PathBuf]) -> Result<()> {
    let dirs: Vec<PathBuf> = dirs.iter().flat_map(|d| [Some(d.clone()), d.canonicalize().ok()]).flatten().collect();
    let mut found = Vec::new();
    let entries = std::fs::read_dir("/proc").context(|| "list /proc".into())?;
    for entry in entries.flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|n| n.parse::<i32>().ok()) else { continue };
        // Opened before its environment is read, so that it stays the same process.
        let Ok(process) = sys::pidfd::PidFd::open(pid) else { continue };
        let Ok(environment) = std::fs::read(entry.path().join("environ")) else { continue };
        let pod = environment.split(|b| *b == 0).find_map(|v| v.strip_prefix(b"CNI_CONTAINERID="));
        let Some(pod) = pod.and_then(|p| std::str::from_utf8(p).ok()).filter(|p| pods.contains(*p)) else { continue };
        if live.contains(pod) {
            if !is_of(&entry.path(), &dirs) {
                continue;
            }
            let group = Group(Pid::from_raw(pid).filter(|p| getpgid(Some(*p)).is_ok_and(|g| g == *p)));
            group.kill();
        }
        let _ = process.signal(::types::Signal::KILL);
        found.push((pid, process));
    }
    let until = Instant::now() + KILL_WAIT;
    let stuck: Vec<String> = found
        .iter()
        .filter(|(_, p)| !p.ended_within(until.saturating_duration_since(Instant::now())))
        .map(|(pid, _)| pid.to_string())
        .collect();
    if !stuck.is_empty() {
        return Err(Error::deadline(format!("CNI plugins that were killed don't die: pids {}", stuck.join(", "))));
    }
    Ok(())
}

/// Whether a process runs a program of these directories, or a script of theirs.
fn is_of(proc: &Path, dirs: &[PathBuf]) -> bool {
    let words = std::fs::read(proc.join("cmdline")).unwrap_or_default();
    let words = words.split(|b| *b == 0).take(3).map(|w| PathBuf::from(std::ffi::OsStr::from_bytes(w)));
    let exe = std::fs::read_link(proc.join("exe")).into_iter();
    exe.chain(words).any(|path| dirs.iter().any(|d| path.starts_with(d)))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A directory with the plugin `x`, a shell script.
    fn script(body: &str) -> (tempfile::TempDir, Plugins, NetworkList) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x");
        std::fs::write(&path, format!("#!/bin/sh\n{body}\n")).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
        let plugins = Plugins::new(vec!["/nowhere".into(), dir.path().to_owned()], Duration::from_secs(20));
        let list = NetworkList::parse(r#"{"cniVersion":"1.0.0","name":"net","type":"x"}"#).unwrap();
        (dir, plugins, list)
    }

    fn subject() -> Subject<'static> {
        Subject { pod: "pod-1", netns: Path::new("/run/netns/p"), interface: "eth0", args: &[] }
    }

    async fn add(plugins: &Plugins, list: &NetworkList) -> Result<Vec<u8>> {
        plugins.run(list, "x", Verb::Add, Some(subject()), &serde_json::Map::new()).await
    }

    #[tokio::test]
    async fn it_has_cnis_environment_and_no_other() {
        let (_dir, plugins, list) = script("env | sort; cat");
        let said = String::from_utf8(add(&plugins, &list).await.unwrap()).unwrap();
        let names: Vec<&str> = said.lines().filter_map(|l| l.split_once('=')).map(|(k, _)| k).collect();
        // PWD is the shell's own.
        let wanted =
            ["CNI_ARGS", "CNI_COMMAND", "CNI_CONTAINERID", "CNI_IFNAME", "CNI_NETNS", "CNI_PATH", "PATH", "PWD"];
        assert_eq!(names, wanted);
        assert!(said.contains("CNI_COMMAND=ADD") && said.ends_with("{}"), "{said}");
    }

    #[tokio::test]
    async fn a_failure_is_told_in_the_plugins_words() {
        for (body, kind, words) in [
            (
                r#"echo why >&2; echo '{"code":7,"msg":"bad","details":"net"}'; exit 1"#,
                ErrorKind::Internal,
                &["bad: net (code 7)", "its stderr: why", "ADD by the CNI plugin x (network net)"][..],
            ),
            (r#"echo '{"code":11,"msg":"later"}'; exit 1"#, ErrorKind::Unavailable, &["later (code 11)"]),
            ("echo rubbish; exit 3", ErrorKind::Internal, &["exit status: 3", "rubbish"]),
            ("exit 1", ErrorKind::Internal, &["it said nothing"]),
            ("kill -9 $$", ErrorKind::Internal, &["signal: 9"]),
        ] {
            let (_dir, plugins, list) = script(body);
            let e = add(&plugins, &list).await.unwrap_err();
            assert_eq!(e.kind(), kind, "{body}: {e}");
            for word in words {
                assert!(e.to_string().contains(word), "{body}: {e}");
            }
        }
    }

    #[tokio::test]
    async fn one_that_is_not_there_is_named() {
        let (_dir, plugins, list) = script("");
        let e = plugins.run(&list, "y", Verb::Del, None, &serde_json::Map::new()).await.unwrap_err();
        assert!(e.to_string().contains("plugin y is not installed: not in /nowhere"), "{e}");
    }

    #[tokio::test]
    async fn one_that_hangs_is_killed_with_its_children() {
        let (dir, mut plugins, list) = script("sleep 4711 & echo $! >\"$0.pid\"; wait");
        plugins.bound = Duration::from_secs(5);
        let e = add(&plugins, &list).await.unwrap_err();
        assert_eq!(e.kind(), ErrorKind::DeadlineExceeded);
        assert!(e.to_string().contains("was killed"), "{e}");
        let child = std::fs::read_to_string(dir.path().join("x.pid")).unwrap();
        let environ = format!("/proc/{}/cmdline", child.trim());
        let deadline = Instant::now() + Duration::from_secs(10);
        while std::fs::read(&environ).is_ok_and(|line| !line.is_empty()) {
            assert!(Instant::now() < deadline, "its child lives");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    #[tokio::test]
    async fn what_a_former_daemon_started_is_ended() {
        let (dir, plugins, list) = script("echo $$ >\"$0.pid\"; sleep 4712; exit 5");
        let pods = ["pod-of-a-former-daemon".to_owned()].into();
        let subject = Subject { pod: "pod-of-a-former-daemon", ..subject() };
        let running =
            tokio::spawn(
                async move { plugins.run(&list, "x", Verb::Add, Some(subject), &serde_json::Map::new()).await },
            );
        let deadline = Instant::now() + Duration::from_secs(20);
        while !std::fs::read_to_string(dir.path().join("x.pid")).is_ok_and(|pid| pid.ends_with('\n')) {
            assert!(Instant::now() < deadline, "the plugin does not run");
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        tokio::task::spawn_blocking(move || end_orphans(&pods, &BTreeSet::new(), &[])).await.unwrap().unwrap();
        let e = running.await.unwrap().unwrap_err();
        assert!(e.to_string().contains("signal: 9"), "{e}");
    }

    /// Such as a name server.
    #[tokio::test]
    async fn what_a_plugin_left_for_a_living_pod_lives_on() {
        let (dir, plugins, list) = script(
            "setsid sleep 4713 </dev/null >/dev/null 2>&1 & echo $! >\"$0.helper\"; echo $$ >\"$0.pid\"; sleep 4715 & wait",
        );
        let pods: BTreeSet<String> = ["pod-that-lives".to_owned()].into();
        let subject = Subject { pod: "pod-that-lives", ..subject() };
        let running =
            tokio::spawn(
                async move { plugins.run(&list, "x", Verb::Check, Some(subject), &serde_json::Map::new()).await },
            );
        let line = |pid: &str| std::fs::read_to_string(format!("/proc/{}/cmdline", pid.trim())).unwrap_or_default();
        let deadline = Instant::now() + Duration::from_secs(20);
        let helper = loop {
            let read = |name: &str| std::fs::read_to_string(dir.path().join(name)).ok().filter(|t| t.ends_with('\n'));
            if let (Some(helper), Some(_)) = (read("x.helper"), read("x.pid"))
                && line(&helper).starts_with("sleep")
            {
                break helper;
            }
            assert!(Instant::now() < deadline, "the plugin does not run");
            tokio::time::sleep(Duration::from_millis(10)).await;
        };
        let end = |live: BTreeSet<String>| {
            let (pods, dirs) = (pods.clone(), [dir.path().to_owned()]);
            async move { tokio::task::spawn_blocking(move || end_orphans(&pods, &live, &dirs)).await.unwrap() }
        };
        end(pods.clone()).await.unwrap();
        let e = running.await.unwrap().unwrap_err();
        assert!(e.to_string().contains("signal: 9"), "{e}");
        assert_eq!(line(&helper).replace("\0", " "), "sleep 4713 ");
        end(BTreeSet::new()).await.unwrap();
        assert_eq!(line(&helper), "", "without its pod it goes, too");
    }
}
