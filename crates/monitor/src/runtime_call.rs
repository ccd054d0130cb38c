//! The one call of the OCI runtime: create, restore or exec.
//!
//! The runtime gets our environment and the process's own streams, which it hands
//! down; so it is forked from here and not called as `oci`'s commands are, whose
//! environment is empty and whose errors come in a file.

use crate::settings::{Mode, Settings};
use rustix::fs::{FileType, Mode as Permissions};
use std::ffi::OsString;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::path::Path;
use sys::fork::{Forked, fork};
use sys::pidfd::PidFd;
use types::{Error, Result, ResultExt};

/// What the runtime's own process is given.
#[derive(Debug, Default)]
pub struct Given {
    /// The process's streams; `None` for all of them: it keeps ours.
    pub streams: Option<[Option<OwnedFd>; 3]>,
    /// Where the runtime sends a terminal.
    pub console: Option<std::path::PathBuf>,
    /// The call begins only when something comes here.
    pub start: Option<OwnedFd>,
    /// The caller's oom_score_adj.
    pub oom_score: Option<String>,
}

/// The runtime's command line behind its name.
pub fn arguments(s: &Settings, console: Option<&Path>) -> Vec<OsString> {
    let mut args: Vec<OsString> = Vec::new();
    if s.systemd_cgroup && !s.mode.is_exec() {
        args.push("--systemd-cgroup".into());
    }
    args.extend(s.runtime_args.iter().cloned());
    let pid_file = s.pid_file.as_os_str();
    match &s.mode {
        Mode::Exec { process, .. } => {
            args.extend(["exec".into(), "--pid-file".into(), pid_file.into()]);
            args.extend(["--process".into(), process.into(), "--detach".into()]);
        }
        Mode::Create { bundle } | Mode::Restore { bundle, .. } => {
            let verb = if matches!(s.mode, Mode::Create { .. }) { "create" } else { "restore" };
            args.extend([verb.into(), "--bundle".into(), bundle.into(), "--pid-file".into(), pid_file.into()]);
            args.extend(s.no_pivot.then(|| "--no-pivot".into()));
            args.extend(s.no_new_keyring.then(|| "--no-new-keyring".into()));
            // A restored container runs at once, and runc would stay with it.
            if let Mode::Restore { image, .. } = &s.mode {
                args.extend(["--detach".into(), "--image-path".into(), image.into()]);
                args.extend(["--work-path".into(), bundle.into()]);
            }
        }
    }
    args.extend(s.runtime_opts.iter().cloned());
    if let Some(console) = console {
        args.extend(["--console-socket".into(), console.into()]);
    }
    args.push(s.id.clone().into());
    args
}

/// Removes what an earlier process has left there: only what this call writes may
/// name our process, or we would signal a stranger.
pub fn forget_pid_file(path: &Path) {
    if path.symlink_metadata().is_ok_and(|m| m.is_file()) {
        let _ = std::fs::remove_file(path);
    }
}

/// The pid that the runtime has written.
///
/// # Errors
/// Where it has written none.
pub fn read_pid_file(path: &Path) -> Result<i32> {
    let text = std::fs::read_to_string(path).context(|| format!("Failed to read pidfile {}", path.display()))?;
    let pid: i32 = text.trim().parse().context(|| format!("pidfile {} holds no number", path.display()))?;
    // 1 is the init of this namespace, and less means groups.
    if pid > 1 { Ok(pid) } else { Err(Error::internal(format!("pidfile {} holds {pid}", path.display()))) }
}

/// Starts the call. The descriptors of the caller's in `inherited` go on to the
/// runtime, under their numbers.
///
/// # Errors
/// Those of fork.
pub fn launch<'a>(s: &Settings, given: Given, inherited: impl Iterator<Item = &'a OwnedFd>) -> Result<PidFd> {
    let mut command = std::process::Command::new(&s.runtime);
    command.args(arguments(s, given.console.as_deref()));
    let parent = std::process::id();
    match fork().context(|| format!("fork for {}", s.runtime.display()))? {
        Forked::Parent(pid) => PidFd::open(pid).context(|| format!("open the process of {}", s.runtime.display())),
        Forked::Child => {
            let e = become_runtime(command, s, &given, inherited, parent);
            // Standard error is the process's pipe now: this is what the caller is told.
            eprintln!("{}: {e}", s.runtime.display());
            std::process::exit(127)
        }
    }
}

/// Only returns where the runtime can't be executed.
fn become_runtime<'a>(
    mut command: std::process::Command,
    s: &Settings,
    given: &Given,
    inherited: impl Iterator<Item = &'a OwnedFd>,
    parent: u32,
) -> Error {
    if let Err(e) = prepare(given, parent) {
        return e;
    }
    for fd in inherited {
        if let Err(e) = rustix::io::fcntl_setfd(fd, rustix::io::FdFlags::empty()) {
            return Error::internal("hand down a descriptor").because(e);
        }
    }
    if let Some(listen) = std::env::var_os("LISTEN_PID") {
        let ours = listen.to_str().is_some_and(|l| l == parent.to_string());
        if s.replace_listen_pid || ours {
            command.env("LISTEN_PID", std::process::id().to_string());
        }
    }
    if let Some(start) = &given.start {
        let mut bytes = [0u8; 64];
        // An end counts as a word: whoever could have held us back is gone.
        let _ = rustix::io::retry_on_intr(|| rustix::io::read(start, &mut bytes));
    }
    if let Some(score) = &given.oom_score {
        let _ = std::fs::write("/proc/self/oom_score_adj", score);
    }
    sys::signals::unblock_all();
    Error::internal("can't be executed").because(command.exec())
}

fn prepare(given: &Given, parent: u32) -> Result<()> {
    // Without us nobody would know of the container: the call ends with us.
    let kill = rustix::process::Signal::KILL;
    rustix::process::set_parent_process_death_signal(Some(kill)).context(|| "ask to die with the monitor".into())?;
    let now = rustix::process::getppid().map_or(0, |p| p.as_raw_nonzero().get().unsigned_abs());
    if now != parent {
        return Err(Error::internal("the monitor has died"));
    }
    let Some([stdin, stdout, stderr]) = &given.streams else { return Ok(()) };
    let null =
        rustix::fs::open("/dev/null", rustix::fs::OFlags::RDWR | rustix::fs::OFlags::CLOEXEC, Permissions::empty())
            .context(|| "open /dev/null".into())?;
    let or_null = |fd: &'_ Option<OwnedFd>| -> Result<OwnedFd> {
        let fd = fd.as_ref().unwrap_or(&null).as_fd();
        // Whoever the process runs as may open /dev/stdout anew.
        if is_pipe(fd)
            && let Err(e) = rustix::fs::fchmod(fd, Permissions::RWXU | Permissions::RWXG | Permissions::RWXO)
            && e != rustix::io::Errno::INVAL
        {
            crate::say::warn(format_args!("open a stream to every user: {e}"));
        }
        fd.try_clone_to_owned().context(|| "hand down a stream".into())
    };
    let (stdin, stdout, stderr) = (or_null(stdin)?, or_null(stdout)?, or_null(stderr)?);
    rustix::stdio::dup2_stdin(stdin).context(|| "give the runtime its stdin".into())?;
    rustix::stdio::dup2_stdout(stdout).context(|| "give the runtime its stdout".into())?;
    rustix::stdio::dup2_stderr(stderr).context(|| "give the runtime its stderr".into())
}

fn is_pipe(fd: impl AsFd) -> bool {
    rustix::fs::fstat(fd).is_ok_and(|s| FileType::from_raw_mode(s.st_mode) == FileType::Fifo)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::flags::Flags;

    fn settings(f: Flags) -> Settings {
        let base = Flags {
            cid: Some("id".into()),
            cuuid: Some("u".into()),
            runtime: Some("/bin/sh".into()),
            log_path: vec!["none".into()],
            container_pidfile: Some("/p".into()),
            bundle: Some("/b".into()),
            ..f
        };
        Settings::new(base, Path::new("/")).unwrap()
    }

    fn words(s: &Settings, console: Option<&str>) -> String {
        let words = arguments(s, console.map(Path::new));
        words.iter().map(|w| w.to_str().unwrap()).collect::<Vec<_>>().join(" ")
    }

    #[test]
    fn command_lines_are_the_runtime_s() {
        let create = settings(Flags {
            systemd_cgroup: true,
            no_pivot: true,
            runtime_arg: vec!["--debug".into()],
            ..Flags::default()
        });
        assert_eq!(words(&create, None), "--systemd-cgroup --debug create --bundle /b --pid-file /p --no-pivot id");
        let restore = settings(Flags {
            restore: Some("/image".into()),
            runtime_opt: vec!["--tcp-established".into()],
            ..Flags::default()
        });
        let want = "restore --bundle /b --pid-file /p --detach --image-path /image --work-path /b --tcp-established id";
        assert_eq!(words(&restore, None), want);
        let exec = settings(Flags {
            exec: true,
            exec_process_spec: Some("/spec".into()),
            systemd_cgroup: true,
            ..Flags::default()
        });
        let want = "exec --pid-file /p --process /spec --detach --console-socket /c id";
        assert_eq!(words(&exec, Some("/c")), want);
    }

    #[test]
    fn a_pid_file_names_a_process_or_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("pid");
        for (text, good) in
            [("12", true), ("12\n", true), ("0", false), ("1", false), ("-5", false), ("x", false), ("", false)]
        {
            std::fs::write(&path, text).unwrap();
            assert_eq!(read_pid_file(&path).is_ok(), good, "{text:?}");
        }
        forget_pid_file(&path);
        assert!(read_pid_file(&path).unwrap_err().is_not_found());
        forget_pid_file(Path::new("/dev/null"));
        assert!(Path::new("/dev/null").exists());
    }
}
