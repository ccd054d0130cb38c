//! Unix sockets in directories with long names, and never open to more users than
//! meant.

use rustix::fs::{Mode, OFlags};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use types::{Result, ResultExt};

/// A socket with a name in the file system, which it loses when it is dropped,
/// unless the name is another's by then.
#[derive(Debug)]
pub struct Named {
    /// The socket, non-blocking.
    pub fd: OwnedFd,
    path: PathBuf,
    inode: (u64, u64),
}

fn inode(path: &Path) -> std::io::Result<(u64, u64)> {
    let meta = path.symlink_metadata()?;
    Ok((meta.dev(), meta.ino()))
}

/// Binds a socket to `name` in `dir`, in place of what an earlier one has left.
///
/// # Errors
/// Those of the file system and of bind.
pub fn bind(dir: &Path, name: &str, kind: SocketType, mode: Mode) -> Result<Named> {
    let path = dir.join(name);
    let what = || format!("bind socket {}", path.display());
    // By the directory's descriptor: a socket's address has 107 bytes.
    let parent = path.parent().unwrap_or(dir);
    let parent =
        rustix::fs::open(parent, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty()).context(what)?;
    let file = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
    match std::fs::remove_file(&path) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => return Err(e).context(what),
        _ => {}
    }
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let fd = rustix::net::socket_with(AddressFamily::UNIX, kind, flags, None).context(what)?;
    let address = SocketAddrUnix::new(format!("/proc/self/fd/{}/{file}", parent.as_raw_fd())).context(what)?;
    // The file gets the socket's own mode: nobody else can connect before the next line.
    rustix::fs::fchmod(&fd, Mode::RWXU).context(what)?;
    rustix::net::bind(&fd, &address).context(what)?;
    rustix::fs::chmod(&path, mode).context(what)?;
    let inode = inode(&path).context(what)?;
    Ok(Named { fd, path, inode })
}

impl Named {
    /// Its name.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for Named {
    fn drop(&mut self) {
        if inode(&self.path).is_ok_and(|i| i == self.inode) {
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

/// A symbolic link that goes with its maker.
#[derive(Debug)]
pub struct Link {
    path: PathBuf,
    target: PathBuf,
}

/// The most bytes of a socket's address.
const ADDRESS: usize = 108;

impl Link {
    /// Makes `<dir>/<name>` lead to `target`, in place of an earlier link.
    ///
    /// # Errors
    /// Those of the file system.
    pub fn make(dir: &Path, name: &str, target: &Path) -> Result<Self> {
        let mut path = dir.join(name).into_os_string();
        // A client can't use a link that fills the address: conmon's own way out is
        // known to its clients, so it is ours.
        if path.len() == ADDRESS - 1 {
            let text = path.to_string_lossy().into_owned();
            path = text[..text.floor_char_boundary(ADDRESS - 2)].to_string().into();
        }
        let path = PathBuf::from(path);
        let what = || format!("link {} to {}", path.display(), target.display());
        match std::fs::remove_file(&path) {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => return Err(e).context(what),
            _ => {}
        }
        std::os::unix::fs::symlink(target, &path).context(what)?;
        Ok(Self { path, target: target.to_path_buf() })
    }

    /// Its path.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        if std::fs::read_link(&self.path).is_ok_and(|t| t == self.target) {
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn long_directories_can_be_bound_in() {
        let dir = tempfile::tempdir().unwrap();
        let long = dir.path().join("x".repeat(200));
        std::fs::create_dir(&long).unwrap();
        let first = bind(&long, "attach", SocketType::SEQPACKET, Mode::RWXU).unwrap();
        assert_eq!(long.join("attach").metadata().unwrap().permissions().mode() & 0o777, 0o700);
        // One of the same name comes, as an exec in the same directory does.
        let second = bind(&long, "attach", SocketType::SEQPACKET, Mode::RWXU).unwrap();
        drop(first);
        assert!(long.join("attach").exists(), "it is the second one's");
        drop(second);
        assert!(!long.join("attach").exists());
    }

    #[test]
    fn a_link_goes_with_its_maker_unless_it_is_another_s() {
        let dir = tempfile::tempdir().unwrap();
        let first = Link::make(dir.path(), "uuid", Path::new("/a")).unwrap();
        let second = Link::make(dir.path(), "uuid", Path::new("/b")).unwrap();
        drop(first);
        assert_eq!(std::fs::read_link(second.path()).unwrap(), Path::new("/b"));
        let name = "n".repeat(107 - 1 - dir.path().as_os_str().len());
        let cut = Link::make(dir.path(), &name, Path::new("/a")).unwrap();
        assert_eq!(cut.path().as_os_str().len(), 106);
        drop((second, cut));
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
    }
}
