//! `start`: a listening socket, a shim behind it, an answer.
//!
//! ```text
//! /run/longshore/s/<hash>   the socket, 0600 in 0700; never abstract (CVE-2020-15257)
//! <bundle>/address          unix://<socket>; callers reload from it
//! <bundle>/shim.pid
//! ```

use crate::flags::Flags;
use std::io::Write;
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::Command;
use types::{Error, Result, ResultExt};

/// Socket addresses are short: 107 bytes.
const DIRECTORY: &str = "/run/longshore/s";

/// FNV-1a: a name, no secret; a clash would meet a socket that is in use and fail.
fn hash(parts: &[&str]) -> u128 {
    const PRIME: u128 = 0x0100_0000_0000_0000_0000_013b;
    parts
        .iter()
        .flat_map(|p| p.bytes().chain([0]))
        .fold(0x6c62_272e_07bb_0142_62b8_2175_6295_c58d, |h, b| (h ^ u128::from(b)).wrapping_mul(PRIME))
}

fn socket_path(flags: &Flags, bundle: &Path) -> PathBuf {
    if let Some(path) = &flags.socket {
        return path.strip_prefix("unix://").map_or_else(|_| path.clone(), |p| Path::new("/").join(p));
    }
    let name = hash(&[&flags.address, &flags.namespace, &flags.id, &bundle.to_string_lossy()]);
    Path::new(DIRECTORY).join(format!("{name:032x}"))
}

/// Listens on `path`; a socket that nobody serves any more is replaced.
fn listen(path: &Path) -> Result<UnixListener> {
    let what = || format!("listen on {}", path.display());
    let bind = || {
        if let Some(dir) = path.parent() {
            std::fs::DirBuilder::new().recursive(true).mode(0o700).create(dir)?;
        }
        UnixListener::bind(path)
    };
    // The last shim to end takes the directory away, perhaps at this moment.
    let bound = match bind().or_else(|e| if e.kind() == std::io::ErrorKind::NotFound { bind() } else { Err(e) }) {
        Err(e) if e.kind() == std::io::ErrorKind::AddrInUse => {
            if UnixStream::connect(path).is_ok() {
                return Err(Error::exists(format!("a shim serves {} already", path.display())));
            }
            let _ = std::fs::remove_file(path);
            UnixListener::bind(path)
        }
        other => other,
    };
    let listener = bound.context(what)?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600)).context(what)?;
    Ok(listener)
}

/// Starts a shim and prints where it listens.
///
/// # Errors
/// Naming what could not be made; nothing is left then.
pub fn start(flags: &Flags) -> Result<()> {
    types::check_identifier("id", &flags.id)?;
    let bundle = flags.bundle()?;
    let path = socket_path(flags, &bundle);
    let address = format!("unix://{}", path.display());
    let listener = match listen(&path) {
        Ok(l) => l,
        // The same start a second time: its answer is the first one's.
        Err(e) if e.kind() == types::ErrorKind::AlreadyExists && socket_of(&bundle).as_deref() == Some(&path) => {
            return crate::print(answer(&address));
        }
        Err(e) => return Err(e),
    };
    let started = spawn(flags, &bundle, listener, &address);
    if started.is_err() {
        remove_socket(&path);
        let _ = std::fs::remove_file(bundle.join("address"));
    }
    started?;
    crate::print(answer(&address))
}

fn spawn(flags: &Flags, bundle: &Path, listener: UnixListener, address: &str) -> Result<()> {
    write(&bundle.join("address"), address)?;
    let mut command = Command::new("/proc/self/exe");
    command
        .args(["-namespace", &flags.namespace, "-id", &flags.id, "-address", &flags.address])
        .args(["-publish-binary", &flags.publish_binary])
        .current_dir(bundle);
    if let Some(name) = std::env::args_os().next() {
        std::os::unix::process::CommandExt::arg0(&mut command, name);
    }
    if flags.debug {
        command.arg("-debug");
    }
    let mut child = sys::process::spawn_daemon(&mut command, &listener.into()).context(|| "start the shim".into())?;
    if let Err(e) = write(&bundle.join("shim.pid"), &child.id().to_string()) {
        let _ = child.kill();
        let _ = child.wait();
        return Err(e);
    }
    Ok(())
}

fn write(path: &Path, text: &str) -> Result<()> {
    let temporary = path.with_extension("new");
    std::fs::File::create(&temporary)
        .and_then(|mut f| f.write_all(text.as_bytes()))
        .and_then(|()| std::fs::rename(&temporary, path))
        .context(|| format!("write {}", path.display()))
}

/// containerd 1.6 sets no GRPC_ADDRESS and takes a bare address; later ones take
/// JSON, and version 2 of it is understood by all of them.
fn answer(address: &str) -> String {
    if std::env::var_os("GRPC_ADDRESS").is_some() {
        format!("{{\"version\":2,\"address\":\"{address}\",\"protocol\":\"ttrpc\"}}")
    } else {
        address.to_string()
    }
}

/// The socket that a bundle's address names.
pub fn socket_of(bundle: &Path) -> Option<PathBuf> {
    let text = std::fs::read_to_string(bundle.join("address")).ok()?;
    text.trim().strip_prefix("unix://").filter(|p| p.starts_with('/')).map(PathBuf::from)
}

/// Removes a socket, and our own directory with the last one in it.
pub fn remove_socket(path: &Path) {
    let _ = std::fs::remove_file(path);
    if path.parent() == Some(Path::new(DIRECTORY)) {
        let _ = std::fs::remove_dir(DIRECTORY);
    }
}

/// Removes the socket of a shim that is gone; one that is served stays, for a
/// pod's shim serves other bundles too.
pub fn forget_socket(bundle: &Path) {
    if let Some(path) = socket_of(bundle)
        && UnixStream::connect(&path).is_err()
    {
        remove_socket(&path);
    }
}

/// A RuntimeInfo: name and version.
pub fn info() -> Vec<u8> {
    shim::runtime_info("io.containerd.longshore.v2")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn socket_names_are_short_and_differ() {
        let flags = |id: &str| Flags { id: id.into(), namespace: "k8s.io".into(), ..Flags::default() };
        let a = socket_path(&flags("a"), Path::new("/b"));
        assert!(a.as_os_str().len() < 100);
        assert_ne!(a, socket_path(&flags("b"), Path::new("/b")));
        assert_eq!(a, socket_path(&flags("a"), Path::new("/b")));
    }

    #[test]
    fn a_stale_socket_is_replaced_and_a_served_one_is_not() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("d/s");
        drop(listen(&path).unwrap());
        let served = listen(&path).unwrap();
        assert_eq!(path.metadata().unwrap().permissions().mode() & 0o777, 0o600);
        assert_eq!(dir.path().join("d").metadata().unwrap().permissions().mode() & 0o777, 0o700);
        assert_eq!(listen(&path).unwrap_err().kind(), types::ErrorKind::AlreadyExists);
        drop(served);
    }
}
