//! From the caller's child to a daemon.
//!
//! ```text
//! caller ── conmon ──(start pipe: "you are in your cgroup")── fork ── exit 0
//!                                                              └─ the monitor
//! ```
//!
//! What is wrong with the call is said on standard error before the fork, what goes
//! wrong later on the sync pipe.

use crate::exit::write_whole;
use crate::flags::Flags;
use crate::log::Logs;
use crate::monitor::{Monitor, Origin};
use crate::settings::Settings;
use crate::sync_pipe::SyncPipe;
use crate::{oom, say};
use rustix::fs::{Mode, OFlags};
use std::collections::BTreeMap;
use std::os::fd::{OwnedFd, RawFd};
use std::path::Path;
use sys::fork::{Forked, fork};
use types::{Error, Result, ResultExt};

/// Monitors what the flags name; returns the code to exit with.
pub fn run(flags: Flags, inherited: BTreeMap<RawFd, OwnedFd>) -> i32 {
    rustix::process::umask(Mode::WGRP | Mode::WOTH);
    match prepare(flags, inherited) {
        Ok(Some(ready)) => ready.monitor(),
        Ok(None) => 0,
        Err(e) => {
            say::error(format_args!("{e}"));
            1
        }
    }
}

/// A daemon that has not started anything yet.
struct Ready {
    settings: Settings,
    logs: Logs,
    caller: SyncPipe,
    origin: Origin,
}

/// A descriptor that the caller names in the environment.
fn pipe(name: &str, inherited: &mut BTreeMap<RawFd, OwnedFd>) -> Result<Option<OwnedFd>> {
    let Some(value) = std::env::var_os(name) else { return Ok(None) };
    let number = value.to_str().and_then(|v| v.parse::<RawFd>().ok());
    let number = number.ok_or_else(|| Error::invalid(format!("unable to parse {name}={}", value.display())))?;
    let taken = inherited.remove(&number);
    taken.map(Some).ok_or_else(|| Error::invalid(format!("{name} names descriptor {number}, which is not open")))
}

/// `None` in the process that the caller started, once the daemon is made.
fn prepare(flags: Flags, mut inherited: BTreeMap<RawFd, OwnedFd>) -> Result<Option<Ready>> {
    let cwd = std::env::current_dir().context(|| "Failed to get working directory".into())?;
    let marks_nothing = flags.no_container_partial_message;
    let settings = Settings::new(flags, &cwd)?;
    say::configure(settings.level, settings.syslog.then_some(settings.id.as_str()));
    if marks_nothing && settings.logs.journal.is_none() {
        say::warn(format_args!("--no-container-partial-message has no effect without journald log driver"));
    }
    let logs = Logs::open(&settings.logs)?;
    let start = pipe("_OCI_STARTPIPE", &mut inherited)?;
    let sync = pipe("_OCI_SYNCPIPE", &mut inherited)?;
    let attach = pipe("_OCI_ATTACHPIPE", &mut inherited)?;
    if settings.mode.waits_for_client() && attach.is_none() {
        return Err(Error::invalid("--attach specified but _OCI_ATTACHPIPE was not"));
    }
    let oom_score = oom::spare_us();
    if let Some(start) = &start {
        let mut bytes = [0u8; 64];
        rustix::io::retry_on_intr(|| rustix::io::read(start, &mut bytes))
            .context(|| "start-pipe read failed".into())?;
    }
    if settings.sync {
        write_own_pid(settings.own_pid_file.as_deref(), std::process::id())?;
    } else if let Forked::Parent(pid) = fork().context(|| "Failed to fork the create command".into())? {
        let written = write_own_pid(settings.own_pid_file.as_deref(), pid.unsigned_abs());
        if written.is_err()
            && let Ok(daemon) = sys::pidfd::PidFd::open(pid)
        {
            // Nobody would know of it.
            let _ = daemon.signal(types::Signal::KILL);
        }
        return written.map(|()| None);
    }
    let caller = SyncPipe::new(sync, settings.api, settings.mode.is_exec());
    // The second word on it starts the exec that waits for its client.
    let start = start.filter(|_| settings.mode.waits_for_client());
    let origin = Origin { inherited, start, attach, oom_score };
    Ok(Some(Ready { settings, logs, caller, origin }))
}

fn write_own_pid(path: Option<&Path>, pid: u32) -> Result<()> {
    let Some(path) = path else { return Ok(()) };
    let mut temporary = path.as_os_str().to_os_string();
    temporary.push(".new");
    write_whole(path, Path::new(&temporary), &pid.to_string())
        .context(|| format!("Failed to write conmon pidfile {}", path.display()))
}

impl Ready {
    fn monitor(self) -> i32 {
        let Self { settings, logs, mut caller, origin } = self;
        if let Err(e) = leave_caller(settings.logs.passthrough) {
            return refuse(&mut caller, &e);
        }
        let passthrough = settings.logs.passthrough;
        match Monitor::start(settings, logs, origin) {
            Ok(monitor) => {
                if passthrough && let Err(e) = null_streams() {
                    say::warn(format_args!("{e}"));
                }
                monitor.serve(caller)
            }
            Err(e) => refuse(&mut caller, &e),
        }
    }
}

fn refuse(caller: &mut SyncPipe, e: &Error) -> i32 {
    say::error(format_args!("{e}"));
    caller.send(-1, Some(&e.to_string()));
    1
}

/// A session of our own, no stream of the caller's (it waits for their end), and the
/// parent of whoever loses its own below us.
fn leave_caller(keep_streams: bool) -> Result<()> {
    if !keep_streams {
        null_streams()?;
    }
    // With --sync we may lead a group already; then we stay in its session.
    let _ = rustix::process::setsid();
    rustix::process::set_child_subreaper(Some(rustix::process::getpid()))
        .context(|| "Failed to set as subreaper".into())
}

fn null_streams() -> Result<()> {
    let what = || "leave the caller's streams".to_string();
    let null = rustix::fs::open("/dev/null", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty()).context(what)?;
    rustix::stdio::dup2_stdin(&null).context(what)?;
    rustix::stdio::dup2_stdout(&null).context(what)?;
    rustix::stdio::dup2_stderr(&null).context(what)
}
