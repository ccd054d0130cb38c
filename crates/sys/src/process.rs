//! Processes of our own: starting a daemon with one inherited descriptor,
//! taking that descriptor up, signals of a process that is nothing but an init.

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};

/// The number under which a daemon finds the descriptor that it was given.
pub const INHERITED: i32 = 3;

/// Starts `command` as a daemon: a session of its own, standard streams on
/// /dev/null, and `fd` as descriptor [`INHERITED`]. Nothing else is inherited,
/// since every descriptor of ours is close-on-exec.
///
/// # Errors
/// Those of fork and exec.
pub fn spawn_daemon(command: &mut Command, fd: &OwnedFd) -> io::Result<Child> {
    let raw = fd.as_raw_fd();
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    // SAFETY: between fork and exec only setsid, dup2 and fcntl are called, all
    // of them async-signal-safe.
    unsafe {
        command.pre_exec(move || {
            if libc::setsid() < 0 {
                return Err(io::Error::last_os_error());
            }
            // dup2 onto itself would leave close-on-exec set.
            let r = if raw == INHERITED { libc::fcntl(raw, libc::F_SETFD, 0) } else { libc::dup2(raw, INHERITED) };
            if r < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
        });
    }
    command.spawn()
}

/// Makes every descriptor beyond the standard streams close-on-exec: what our
/// caller has left open by mistake goes no further than to us, so neither a
/// runtime nor a container can have it (CVE-2024-21626). First thing in a main.
pub fn inherit_nothing() {
    // SAFETY: a flag is set on descriptors; none is closed and no memory touched.
    unsafe {
        // Kernels before 5.11 refuse; the runtime does it once more for itself.
        libc::close_range(3, libc::c_uint::MAX, libc::CLOSE_RANGE_CLOEXEC as libc::c_int);
    }
}

/// Takes up the descriptor that [`spawn_daemon`] handed down, close-on-exec
/// again; once per process.
///
/// # Errors
/// EBADF where there is none, `AlreadyExists` the second time.
pub fn take_inherited() -> io::Result<OwnedFd> {
    static TAKEN: AtomicBool = AtomicBool::new(false);
    if TAKEN.swap(true, Ordering::SeqCst) {
        return Err(io::Error::new(io::ErrorKind::AlreadyExists, "the inherited descriptor was taken before"));
    }
    // SAFETY: fcntl on a number is harmless whatever the number is.
    if unsafe { libc::fcntl(INHERITED, libc::F_SETFD, libc::FD_CLOEXEC) } < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: it is open (checked above), it came with exec, and the flag above
    // makes this the only owner in this process.
    #[expect(clippy::disallowed_methods, reason = "this is where descriptors are made")]
    Ok(unsafe { OwnedFd::from_raw_fd(INHERITED) })
}

/// Moves the calling thread alone to another working directory: it stops
/// sharing that with the other threads. For threads that are thrown away.
///
/// # Errors
/// Those of unshare and chdir.
pub fn enter_directory_on_this_thread(dir: &std::path::Path) -> io::Result<()> {
    // SAFETY: CLONE_FS only gives this thread a working directory, root and
    // umask of its own; no memory or descriptor is concerned.
    if unsafe { libc::unshare(libc::CLONE_FS) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(rustix::process::chdir(dir)?)
}

/// What [`InitSignals::wait`] has seen.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum InitSignal {
    /// A child has ended.
    Child,
    /// SIGTERM or SIGINT.
    Terminate,
}

/// The signals of an init process, blocked and taken one by one.
pub struct InitSignals {
    set: libc::sigset_t,
}

impl InitSignals {
    /// Blocks SIGCHLD, SIGTERM and SIGINT in this thread.
    ///
    /// # Errors
    /// Those of sigprocmask.
    pub fn block() -> io::Result<Self> {
        // SAFETY: the set is initialised by sigemptyset before it is read.
        unsafe {
            let mut set = std::mem::zeroed();
            libc::sigemptyset(&raw mut set);
            for signal in [libc::SIGCHLD, libc::SIGTERM, libc::SIGINT] {
                libc::sigaddset(&raw mut set, signal);
            }
            if libc::sigprocmask(libc::SIG_BLOCK, &raw const set, std::ptr::null_mut()) < 0 {
                return Err(io::Error::last_os_error());
            }
            Ok(Self { set })
        }
    }

    /// Waits for the next of them.
    ///
    /// # Errors
    /// Those of sigwaitinfo, but for EINTR.
    pub fn wait(&self) -> io::Result<InitSignal> {
        loop {
            // SAFETY: the set is valid, and no information is asked for.
            match unsafe { libc::sigwaitinfo(&raw const self.set, std::ptr::null_mut()) } {
                libc::SIGCHLD => return Ok(InitSignal::Child),
                -1 => {
                    let e = io::Error::last_os_error();
                    if e.kind() != io::ErrorKind::Interrupted {
                        return Err(e);
                    }
                }
                _ => return Ok(InitSignal::Terminate),
            }
        }
    }
}

/// Reaps every child that has ended; for an init, which keeps no record.
pub fn reap_all() {
    // SAFETY: no status is asked for.
    while unsafe { libc::waitpid(-1, std::ptr::null_mut(), libc::WNOHANG) } > 0 {}
}
