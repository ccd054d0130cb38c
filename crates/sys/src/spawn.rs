//! Starting a program with exactly the descriptors, arguments and environment
//! that it is given.
//!
//! By `posix_spawn`: it shares our memory with the child until exec, so a start
//! costs no copied pages however large we are, and a failed exec is our error.

use std::ffi::{CString, OsStr, OsString, c_char, c_int};
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

/// The number of the first descriptor that [`spawn`] hands down.
pub const FIRST: i32 = 3;

/// Starts `program` with `fds` as descriptors [`FIRST`] and following, standard
/// streams on /dev/null, and nothing in its environment but `env`; returns its
/// pid. Signals are unblocked and SIGPIPE has its default effect, as a program
/// expects it. Its working directory is ours. Nothing else is inherited: every
/// descriptor of ours is made close-on-exec, even those that we inherited
/// ourselves (kernels before 5.11 can't do that; there it holds for what we made).
///
/// The caller has to reap it.
///
/// # Errors
/// Those of fork and exec; `InvalidInput` where a text contains a NUL byte.
pub fn spawn(program: &Path, args: &[OsString], env: &[(&str, &str)], fds: &[BorrowedFd<'_>]) -> io::Result<i32> {
    start(program, args, env, fds, &Surroundings::default())
}

/// What a program finds around it, where that is not what [`spawn`] gives it.
#[derive(Debug, Default)]
pub struct Surroundings<'a> {
    /// Descriptors 0, 1 and 2; /dev/null where there is none.
    pub stdio: [Option<BorrowedFd<'a>>; 3],
    /// Its working directory; ours where there is none.
    pub directory: Option<&'a Path>,
    /// It leads a process group of its own.
    pub own_group: bool,
}

/// [`spawn`], with more said about the surroundings.
///
/// # Errors
/// Those of [`spawn`], and of a working directory that can't be entered.
pub fn start(
    program: &Path,
    args: &[OsString],
    env: &[(&str, &str)],
    fds: &[BorrowedFd<'_>],
    around: &Surroundings<'_>,
) -> io::Result<i32> {
    let path = CString::new(program.as_os_str().as_bytes())?;
    let args = std::iter::once(program.as_os_str())
        .chain(args.iter().map(OsString::as_os_str))
        .map(|a: &OsStr| CString::new(a.as_bytes()))
        .collect::<Result<Vec<_>, _>>()?;
    let env = env.iter().map(|(k, v)| CString::new(format!("{k}={v}"))).collect::<Result<Vec<_>, _>>()?;
    // First out of the way: a source may have a number that is another's target.
    let count = c_int::try_from(fds.len()).map_err(|_| io::Error::from(io::ErrorKind::InvalidInput))?;
    let sources =
        fds.iter().map(|fd| rustix::io::fcntl_dupfd_cloexec(fd, FIRST + count)).collect::<Result<Vec<_>, _>>()?;
    let stdio = around
        .stdio
        .iter()
        .map(|fd| fd.map(|fd| rustix::io::fcntl_dupfd_cloexec(fd, FIRST + count)).transpose())
        .collect::<Result<Vec<_>, _>>()?;
    let directory = around.directory.map(|d| CString::new(d.as_os_str().as_bytes())).transpose()?;
    crate::process::inherit_nothing();
    let mut space = MaybeUninit::uninit();
    let actions = Actions::new(&mut space)?;
    actions.null_streams()?;
    for (source, target) in stdio.iter().zip(0..) {
        if let Some(source) = source {
            actions.dup(source.as_raw_fd(), target)?;
        }
    }
    if let Some(directory) = &directory {
        actions.enter(directory)?;
    }
    for (source, target) in sources.iter().zip(FIRST..) {
        actions.dup(source.as_raw_fd(), target)?;
    }
    let mut space = MaybeUninit::uninit();
    let attributes = Attributes::new(&mut space, around.own_group)?;
    let (argv, envp) = (pointers(&args), pointers(&env));
    let mut pid = 0;
    // SAFETY: both arrays end in null and point into `args` and `env`, which
    // outlive the call; actions and attributes are initialised.
    check(unsafe {
        libc::posix_spawn(&raw mut pid, path.as_ptr(), actions.0, attributes.0, argv.as_ptr(), envp.as_ptr())
    })?;
    Ok(pid)
}

fn pointers(texts: &[CString]) -> Vec<*mut c_char> {
    texts.iter().map(|t| t.as_ptr().cast_mut()).chain([std::ptr::null_mut()]).collect()
}

/// These functions return the error's number.
fn check(code: c_int) -> io::Result<()> {
    if code == 0 { Ok(()) } else { Err(io::Error::from_raw_os_error(code)) }
}

/// What the child does with its descriptors before exec; freed when dropped.
struct Actions<'a>(&'a mut libc::posix_spawn_file_actions_t);

impl<'a> Actions<'a> {
    fn new(space: &'a mut MaybeUninit<libc::posix_spawn_file_actions_t>) -> io::Result<Self> {
        // SAFETY: the pointer is valid for writes; the value is used only if it
        // was initialised.
        unsafe {
            check(libc::posix_spawn_file_actions_init(space.as_mut_ptr()))?;
            Ok(Self(space.assume_init_mut()))
        }
    }

    fn null_streams(&self) -> io::Result<()> {
        // SAFETY: initialised by `new`; the path is copied by the call.
        check(unsafe {
            let actions = std::ptr::from_ref(self.0).cast_mut();
            libc::posix_spawn_file_actions_addopen(actions, 0, c"/dev/null".as_ptr(), libc::O_RDWR, 0)
        })?;
        self.dup(0, 1)?;
        self.dup(0, 2)
    }

    fn enter(&self, directory: &CString) -> io::Result<()> {
        // SAFETY: initialised by `new`; the path is copied by the call.
        check(unsafe {
            libc::posix_spawn_file_actions_addchdir_np(std::ptr::from_ref(self.0).cast_mut(), directory.as_ptr())
        })
    }

    fn dup(&self, source: c_int, target: c_int) -> io::Result<()> {
        // SAFETY: initialised by `new`; numbers alone are recorded.
        check(unsafe { libc::posix_spawn_file_actions_adddup2(std::ptr::from_ref(self.0).cast_mut(), source, target) })
    }
}

impl Drop for Actions<'_> {
    fn drop(&mut self) {
        // SAFETY: initialised by `new`, and not used afterwards.
        unsafe { libc::posix_spawn_file_actions_destroy(self.0) };
    }
}

/// The child's signals; freed when dropped.
struct Attributes<'a>(&'a mut libc::posix_spawnattr_t);

impl<'a> Attributes<'a> {
    fn new(space: &'a mut MaybeUninit<libc::posix_spawnattr_t>, own_group: bool) -> io::Result<Self> {
        // SAFETY: the pointer is valid for writes; the value is used only if it
        // was initialised.
        let new = unsafe {
            check(libc::posix_spawnattr_init(space.as_mut_ptr()))?;
            Self(space.assume_init_mut())
        };
        let mut flags = libc::POSIX_SPAWN_SETSIGMASK | libc::POSIX_SPAWN_SETSIGDEF;
        if own_group {
            // The group's number is its own, which is what it is initialised to ask for.
            flags |= libc::POSIX_SPAWN_SETPGROUP;
        }
        // SAFETY: the attributes were initialised above, the set is by
        // sigemptyset before it is read.
        unsafe {
            let mut set = MaybeUninit::uninit();
            libc::sigemptyset(set.as_mut_ptr());
            check(libc::posix_spawnattr_setsigmask(new.0, set.as_ptr()))?;
            libc::sigaddset(set.as_mut_ptr(), libc::SIGPIPE);
            check(libc::posix_spawnattr_setsigdefault(new.0, set.as_ptr()))?;
            check(libc::posix_spawnattr_setflags(new.0, libc::c_short::try_from(flags).unwrap_or(0)))?;
        }
        Ok(new)
    }
}

impl Drop for Attributes<'_> {
    fn drop(&mut self) {
        // SAFETY: initialised by `new`, and not used afterwards.
        unsafe { libc::posix_spawnattr_destroy(self.0) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pidfd::{PidFd, Waited};
    use std::os::fd::AsFd;

    fn wait(pid: i32) -> types::ExitStatus {
        let p = PidFd::open(pid).unwrap();
        loop {
            match p.try_wait().unwrap() {
                Waited::Running => std::thread::sleep(std::time::Duration::from_millis(5)),
                Waited::Ended(status) => return status,
                Waited::NotOurs => panic!("not our child"),
            }
        }
    }

    #[test]
    fn it_has_what_it_was_given_and_nothing_else() {
        let (r, w) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).unwrap();
        // A static program: no loader opens anything of its own.
        let args = ["sleep".into(), "60".into()];
        let pid = spawn(Path::new("/bin/busybox"), &args, &[("A", "b c")], &[w.as_fd(), r.as_fd()]).unwrap();
        let process = std::path::PathBuf::from(format!("/proc/{pid}"));
        // We go on as soon as the child has left our memory, which is before it
        // has all of its own.
        let environ = loop {
            let environ = std::fs::read(process.join("environ")).unwrap();
            if !environ.is_empty() {
                break environ;
            }
            std::thread::sleep(std::time::Duration::from_millis(1));
        };
        let command = std::fs::read(process.join("cmdline")).unwrap();
        let mut fds: Vec<_> = std::fs::read_dir(process.join("fd"))
            .unwrap()
            .map(|e| {
                let e = e.unwrap();
                (e.file_name(), std::fs::read_link(e.path()).unwrap().display().to_string())
            })
            .collect();
        fds.sort();
        let status = std::fs::read_to_string(process.join("status")).unwrap();
        PidFd::open(pid).unwrap().signal(types::Signal::KILL).unwrap();
        assert_eq!(wait(pid), types::ExitStatus::Signal(9));
        assert_eq!((environ.as_slice(), command.as_slice()), (&b"A=b c\0"[..], &b"/bin/busybox\0sleep\x0060\0"[..]));
        let targets: Vec<&str> = fds.iter().map(|(_, target)| target.as_str()).collect();
        assert_eq!(targets[..3], ["/dev/null"; 3]);
        assert_eq!(targets.len(), 5, "{fds:?}");
        assert!(targets[3].starts_with("pipe:") && targets[3] == targets[4], "{fds:?}");
        // SIGPIPE is 13; Rust's own processes ignore it.
        let ignored = status.lines().find_map(|l| l.strip_prefix("SigIgn:")).unwrap().trim();
        assert_eq!(u64::from_str_radix(ignored, 16).unwrap() & (1 << 12), 0);
    }

    #[test]
    fn numbers_may_cross() {
        let (r, w) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).unwrap();
        let script = "echo hello >&4; read line <&3; test \"$line\" = hello";
        let pid = spawn(Path::new("/bin/sh"), &["-c".into(), script.into()], &[], &[r.as_fd(), w.as_fd()]).unwrap();
        assert_eq!(wait(pid), types::ExitStatus::Code(0));
    }

    #[test]
    fn surroundings_are_as_they_were_asked_for() {
        let dir = tempfile::tempdir().unwrap();
        let out = std::fs::File::create(dir.path().join("out")).unwrap();
        let around =
            Surroundings { stdio: [None, Some(out.as_fd()), None], directory: Some(dir.path()), own_group: true };
        // Own pid, group: fields 1 and 5 of stat.
        let script = "read -r stat </proc/self/stat; echo \"$PWD\"; echo \"$stat\" >&1; echo error >&2";
        let pid = start(Path::new("/bin/sh"), &["-c".into(), script.into()], &[], &[], &around).unwrap();
        assert_eq!(wait(pid), types::ExitStatus::Code(0));
        let text = std::fs::read_to_string(dir.path().join("out")).unwrap();
        let (pwd, stat) = text.trim().split_once('\n').unwrap();
        assert_eq!(Path::new(pwd), dir.path().canonicalize().unwrap());
        let fields: Vec<&str> = stat.split(' ').collect();
        assert_eq!((fields[0], fields[4]), (pid.to_string().as_str(), pid.to_string().as_str()), "{stat}");
    }

    #[test]
    fn a_program_that_is_not_there_is_our_error() {
        let e = spawn(Path::new("/nowhere/logger"), &[], &[], &[]).unwrap_err();
        assert_eq!(e.kind(), io::ErrorKind::NotFound);
        let e = spawn(Path::new("/bin/sh"), &["a\0b".into()], &[], &[]).unwrap_err();
        assert_eq!(e.kind(), io::ErrorKind::InvalidInput);
    }
}
