//! `start`: a listening socket, a shim behind it, an answer.
//!
//! ```text
//! /run/longshore/s/<hash>   the socket, 0600 in 0700; never abstract (CVE-2020-15257)
//! <bundle>/address          unix://<socket>; callers reload from it
//! <bundle>/shim.pid
//! ```

use crate::flags::Flags;
use shim::bootstrap::{self, Bootstrap, Caller};
use std::io::{IsTerminal, Write};
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use types::{Error, ErrorKind, Result, ResultExt};

/// Socket addresses are short: 107 bytes.
const DIRECTORY: &str = "/run/longshore/s";
/// How often a socket is made whose directory goes meanwhile.
const BINDS: u32 = 50;
/// Set to 3 where the caller's JSON shall say version 3: for callers other than
/// containerd 1.7, which refuses it.
const VERSION: &str = "LONGSHORE_SHIM_VERSION";

/// Where the shim of this container listens. Members of a group have one socket,
/// whatever their bundles; others have one each.
fn socket_path(flags: &Flags, bundle: &Path, group: Option<&str>, told: &Bootstrap) -> PathBuf {
    if let Some(path) = &flags.socket {
        return path.strip_prefix("unix://").map_or_else(|_| path.clone(), |p| Path::new("/").join(p));
    }
    let address = told.caller.as_deref().unwrap_or(&flags.address);
    let directory = told.socket_dir.as_deref().unwrap_or(Path::new(DIRECTORY));
    let own = bundle.to_string_lossy();
    // A clash would meet a socket that is in use and fail.
    let name = match group {
        Some(group) => shim::short_name(&[address, &flags.namespace, "group", group]),
        None => shim::short_name(&[address, &flags.namespace, &flags.id, &own]),
    };
    directory.join(name)
}

/// Listens on `path`; a socket that nobody serves any more is replaced.
fn listen(path: &Path) -> Result<UnixListener> {
    let what = || format!("listen on {}", path.display());
    let mut bound = bind(path);
    for _ in 0..BINDS {
        // The last shim to end takes the directory away, perhaps at this moment: then
        // it is not there, or was there and can't be seen to be a directory.
        use std::io::ErrorKind::{AlreadyExists, NotFound};
        if !matches!(&bound, Err(e) if matches!(e.kind(), NotFound | AlreadyExists)) {
            break;
        }
        // Out of step with one who does the same.
        std::thread::sleep(std::time::Duration::from_millis(1));
        bound = bind(path);
    }
    match bound {
        Ok(listener) => Ok(listener),
        Err(e) if e.kind() == std::io::ErrorKind::AddrInUse => {
            Err(Error::exists(format!("a shim serves {} already", path.display())))
        }
        Err(e) => Err(e).context(what),
    }
}

/// Holds a directory of sockets for one at a time.
fn lock(dir: &Path) -> std::io::Result<std::fs::File> {
    let lock = std::fs::File::open(dir)?;
    rustix::fs::flock(&lock, rustix::fs::FlockOperation::LockExclusive)?;
    Ok(lock)
}

fn bind(path: &Path) -> std::io::Result<UnixListener> {
    let dir = path.parent().unwrap_or(Path::new("/"));
    std::fs::DirBuilder::new().recursive(true).mode(0o700).create(dir)?;
    // One at a time, or two that find the same dead socket would each remove it,
    // the second one the first one's new socket.
    let _lock = lock(dir)?;
    let listener = match UnixListener::bind(path) {
        Err(e) if e.kind() == std::io::ErrorKind::AddrInUse && UnixStream::connect(path).is_err() => {
            let _ = std::fs::remove_file(path);
            UnixListener::bind(path)?
        }
        other => other?,
    };
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600))?;
    Ok(listener)
}

/// How often a group's socket is tried while its last shim is ending.
const TRIES: u32 = 50;

/// Starts a shim, or finds the one of the container's group, and prints where it
/// listens.
///
/// # Errors
/// Naming what could not be made; nothing is left then.
pub fn start(flags: &Flags) -> Result<()> {
    types::check_identifier("id", &flags.id)?;
    let bundle = flags.bundle()?;
    let told = Bootstrap::read(&input()?, &flags.id, &flags.namespace, caller())?;
    let group = bootstrap::group(&bundle)?;
    let path = socket_path(flags, &bundle, group.as_deref(), &told);
    let address = format!("unix://{}", path.display());
    let mut tries = 0;
    loop {
        let refused = match listen(&path) {
            Ok(listener) => {
                let answered = spawn(flags, &told, &bundle, listener, &address).and_then(|mut shim| {
                    // A caller that has gone knows of no shim and ends none.
                    crate::print(told.answer(&address)).inspect_err(|_| end(&mut shim))
                });
                if answered.is_err() {
                    remove_socket(&path);
                    for name in ["address", "shim.pid"] {
                        let _ = std::fs::remove_file(bundle.join(name));
                    }
                }
                return answered;
            }
            Err(e) => e,
        };
        // The same start a second time: its answer is the first one's.
        let again = socket_of(&bundle).as_deref() == Some(&path);
        if refused.kind() != ErrorKind::AlreadyExists || !(again || group.is_some()) {
            return Err(refused);
        }
        match crate::runtime()?.block_on(bootstrap::pid_of(&path)) {
            Ok(pid) => {
                write(&bundle.join("address"), &address)?;
                write(&bundle.join("shim.pid"), &pid.to_string())?;
                return crate::print(told.answer(&address));
            }
            // It was about to end when we came: the next one is ours.
            Err(e) if tries == TRIES || e.kind() != ErrorKind::Unavailable => return Err(e),
            Err(_) => {
                tries += 1;
                std::thread::sleep(std::time::Duration::from_millis(20));
            }
        }
    }
}

/// What the caller says on standard input; a terminal says nothing.
fn input() -> Result<Vec<u8>> {
    let stdin = std::io::stdin();
    if stdin.is_terminal() { Ok(Vec::new()) } else { bootstrap::read_input(stdin.lock()) }
}

fn caller() -> Caller {
    Caller {
        takes_json: std::env::var_os("GRPC_ADDRESS").is_some(),
        wants_version_3: std::env::var_os(VERSION).is_some_and(|v| v == "3"),
    }
}

/// The caller wants containers of different shims never to share a core (containerd's
/// `sched_core`).
const CORE_SCHEDULING: &str = "SCHED_CORE";

/// Gives this process a core scheduling cookie of its own, which the shim and all its
/// containers inherit. Without SMT there is nothing to keep apart.
fn keep_cores_apart() -> Result<()> {
    use rustix::thread::{CoreSchedulingScope, create_core_scheduling_cookie};
    match create_core_scheduling_cookie(rustix::process::getpid(), CoreSchedulingScope::ThreadGroup) {
        Ok(()) | Err(rustix::io::Errno::NODEV) => Ok(()),
        Err(e) => Err(Error::precondition(format!("{CORE_SCHEDULING} is set, and the kernel has no core scheduling"))
            .because(e)
            .hint("set sched_core = false")),
    }
}

fn spawn(flags: &Flags, told: &Bootstrap, bundle: &Path, listener: UnixListener, address: &str) -> Result<Child> {
    if std::env::var_os(CORE_SCHEDULING).is_some_and(|v| !v.is_empty()) {
        keep_cores_apart()?;
    }
    write(&bundle.join("address"), address)?;
    let mut command = Command::new("/proc/self/exe");
    command
        .args(["-namespace", &flags.namespace, "-id", &flags.id, "-address", &flags.address])
        .args(["-publish-binary", &flags.publish_binary])
        .current_dir(bundle);
    if let Some(name) = std::env::args_os().next() {
        std::os::unix::process::CommandExt::arg0(&mut command, name);
    }
    if flags.debug || told.debug {
        command.arg("-debug");
    }
    if let Some(events) = &told.events {
        command.env("TTRPC_ADDRESS", events);
    }
    let mut child = sys::process::spawn_daemon(&mut command, &listener.into()).context(|| "start the shim".into())?;
    let joined = match told.shim_cgroup.as_str() {
        "" => Ok(()),
        cgroup => shim::join_cgroup(cgroup, child.id()),
    };
    adjust_oom_score(child.id());
    if let Err(e) = joined.and_then(|()| write(&bundle.join("shim.pid"), &child.id().to_string())) {
        end(&mut child);
        return Err(e);
    }
    Ok(child)
}

fn end(shim: &mut Child) {
    let _ = shim.kill();
    let _ = shim.wait();
}

/// The shim goes before its caller where memory runs out: one more than the caller's
/// score, as containerd's shims have it. It is a wish, and its failure none of the
/// start's.
fn adjust_oom_score(shim: u32) {
    let caller = std::os::unix::process::parent_id();
    let score =
        std::fs::read_to_string(format!("/proc/{caller}/oom_score_adj")).ok().and_then(|s| s.trim().parse().ok());
    if let Some(score) = score {
        let _ = std::fs::write(format!("/proc/{shim}/oom_score_adj"), oom_score_after(score).to_string());
    }
}

/// The next score; 1000 is the highest.
fn oom_score_after(caller: i32) -> i32 {
    (caller + 1).min(1000)
}

fn write(path: &Path, text: &str) -> Result<()> {
    let temporary = path.with_extension("new");
    std::fs::File::create(&temporary)
        .and_then(|mut f| f.write_all(text.as_bytes()))
        .and_then(|()| std::fs::rename(&temporary, path))
        .context(|| format!("write {}", path.display()))
}

/// The socket that a bundle's address names.
pub fn socket_of(bundle: &Path) -> Option<PathBuf> {
    let text = std::fs::read_to_string(bundle.join("address")).ok()?;
    text.trim().strip_prefix("unix://").filter(|p| p.starts_with('/')).map(PathBuf::from)
}

/// Removes a socket that nobody serves, and our own directory with the last one in it.
/// One that is served stays: it is another shim's by now, or a pod's, which serves other
/// bundles too.
pub fn remove_socket(path: &Path) {
    // A `start` may be about to put its own in the same place.
    if let Some(Ok(_lock)) = path.parent().map(lock)
        && UnixStream::connect(path).is_err()
    {
        let _ = std::fs::remove_file(path);
    }
    remove_directory_of(path);
}

/// Removes our own directory, if this was the last socket in it.
pub fn remove_directory_of(path: &Path) {
    if path.parent() == Some(Path::new(DIRECTORY)) {
        let _ = std::fs::remove_dir(DIRECTORY);
    }
}

/// Removes the socket of a shim that is gone.
pub fn forget_socket(bundle: &Path) {
    if let Some(path) = socket_of(bundle) {
        remove_socket(&path);
    }
}

/// What `-info` prints, for the options on standard input.
///
/// # Errors
/// Where the options can't be read or the runtime that they name is not there.
pub fn info() -> Result<Vec<u8>> {
    crate::runtime()?.block_on(shim::runtime_info("io.containerd.longshore.v2", &input()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn socket_names_are_short_and_differ() {
        let flags = |id: &str| Flags { id: id.into(), namespace: "k8s.io".into(), ..Flags::default() };
        let told = Bootstrap::read(&[], "", "", Caller::default()).unwrap();
        let path = |id: &str, bundle: &str, group| socket_path(&flags(id), Path::new(bundle), group, &told);
        let a = path("a", "/b", None);
        assert!(a.as_os_str().len() < 100);
        assert_ne!(a, path("b", "/b", None));
        assert_eq!(a, path("a", "/b", None));
        let grouped = path("a", "/b", Some("g"));
        assert_eq!(grouped, path("c", "/d", Some("g")));
        assert!(grouped != path("a", "/b", Some("h")) && grouped != path("g", "/b", None));
        let mut elsewhere = told.clone();
        elsewhere.socket_dir = Some("/run/s".into());
        assert!(socket_path(&flags("a"), Path::new("/b"), None, &elsewhere).starts_with("/run/s"));
    }

    #[test]
    fn a_shim_starts_while_the_last_one_takes_the_directory_away() {
        let dir = tempfile::tempdir().unwrap();
        let shared = dir.path().join("s");
        let live = |name: &str| {
            let path = shared.join(name);
            for _ in 0..1000 {
                drop(listen(&path).unwrap());
                std::fs::remove_file(&path).unwrap();
                let _ = std::fs::remove_dir(&shared);
            }
        };
        std::thread::scope(|s| {
            s.spawn(|| live("a"));
            live("b");
        });
    }

    #[test]
    fn a_stale_socket_is_replaced_and_a_served_one_is_not() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("d/s");
        drop(listen(&path).unwrap());
        let served = listen(&path).unwrap();
        assert_eq!(path.metadata().unwrap().permissions().mode() & 0o777, 0o600);
        assert_eq!(dir.path().join("d").metadata().unwrap().permissions().mode() & 0o777, 0o700);
        assert_eq!(listen(&path).unwrap_err().kind(), ErrorKind::AlreadyExists);
        remove_socket(&path);
        assert!(path.exists(), "it is served");
        drop(served);
        remove_socket(&path);
        assert!(!path.exists());
    }
}
