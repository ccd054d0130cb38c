//! Mounts: bind, tmpfs, propagation, detaching, and what `mountinfo` says.
//!
//! Every error names the operation and the path. Nothing here follows a symlink
//! when it unmounts.

use rustix::fd::{AsFd, BorrowedFd};
use rustix::io::Errno;
use rustix::mount::{MountFlags, MountPropagationFlags, UnmountFlags};
use std::ffi::{CString, OsString};
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};
use types::{Error, Result, ResultExt};

/// More mounts than this on one path are a fault, not a stack.
const DEEPEST_STACK: usize = 64;

/// Binds `source` over `target`, that one mount only.
///
/// # Errors
/// Names both paths; the kind follows the errno.
pub fn bind(source: &Path, target: &Path) -> Result<()> {
    rustix::mount::mount_bind(source, target).context(|| format!("bind {} over {}", source.display(), target.display()))
}

/// Binds `dir` with all that is mounted in it over itself, so that it is a mount
/// of its own whose propagation can be set.
///
/// # Errors
/// Names the path.
pub fn bind_onto_itself(dir: &Path) -> Result<()> {
    rustix::mount::mount_bind_recursive(dir, dir).context(|| format!("bind {} onto itself", dir.display()))
}

/// Mounts below `dir`, itself a mount point, no longer propagate anywhere.
///
/// # Errors
/// `InvalidArgument` where `dir` is no mount point.
pub fn make_private(dir: &Path) -> Result<()> {
    change(dir, MountPropagationFlags::PRIVATE, "private")
}

/// Mounts below `dir`, itself a mount point, propagate to and from its copies in
/// other mount namespaces.
///
/// # Errors
/// `InvalidArgument` where `dir` is no mount point.
pub fn make_shared(dir: &Path) -> Result<()> {
    change(dir, MountPropagationFlags::SHARED, "shared")
}

fn change(dir: &Path, to: MountPropagationFlags, word: &str) -> Result<()> {
    rustix::mount::mount_change(dir, to).context(|| format!("make the mount {} {word}", dir.display()))
}

/// Mounts a tmpfs, nosuid, nodev and noexec, on `target`; `options` as in
/// `tmpfs(5)`: `mode=1777,size=65536k`.
///
/// # Errors
/// `InvalidArgument` for an option that tmpfs doesn't know; names the target.
pub fn tmpfs(target: &Path, options: &str) -> Result<()> {
    let what = || format!("mount a tmpfs ({options}) on {}", target.display());
    let data = CString::new(options).context(what)?;
    let flags = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
    rustix::mount::mount("shm", target, "tmpfs", flags, data.as_c_str()).context(what)
}

/// Detaches the topmost mount of `target`, lazily: it leaves the tree at once,
/// and ends when its last user does. `false` when nothing is mounted there or
/// there is no such path.
///
/// # Errors
/// Names the path.
pub fn detach(target: &Path) -> Result<bool> {
    match rustix::mount::unmount(target, UnmountFlags::DETACH | UnmountFlags::NOFOLLOW) {
        Ok(()) => Ok(true),
        // EINVAL: no mount point. A missing parent is as good as a missing path.
        Err(Errno::INVAL | Errno::NOENT | Errno::NOTDIR) => Ok(false),
        Err(e) => Err(e).context(|| format!("unmount {}", target.display())),
    }
}

/// Detaches all mounts that are stacked on `target`; none is success.
///
/// # Errors
/// Names the path.
pub fn detach_all(target: &Path) -> Result<()> {
    for _ in 0..DEEPEST_STACK {
        if !detach(target)? {
            return Ok(());
        }
    }
    Err(Error::internal(format!("more than {DEEPEST_STACK} mounts are stacked on {}", target.display()))
        .hint("something mounts there again and again; look at /proc/self/mountinfo"))
}

/// One line of `/proc/self/mountinfo`, as far as anybody here needs it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MountEntry {
    /// Where it is mounted.
    pub target: PathBuf,
    /// Its file system's type: "tmpfs", "nsfs", "overlay", …
    pub fs_type: String,
    /// True when it propagates to a peer group.
    pub shared: bool,
}

/// The mounts of this mount namespace in the order in which they were made.
///
/// # Errors
/// Only where `/proc` can't be read.
pub fn mounts() -> Result<Vec<MountEntry>> {
    let text = std::fs::read("/proc/self/mountinfo").context(|| "read /proc/self/mountinfo".into())?;
    Ok(text.split(|b| *b == b'\n').filter_map(parse_line).collect())
}

/// The mount points at and below `dir`, the latest first, so that they can be
/// detached in this order.
///
/// # Errors
/// Only where `/proc` can't be read.
pub fn mounts_below(dir: &Path) -> Result<Vec<PathBuf>> {
    let mut found: Vec<PathBuf> =
        mounts()?.into_iter().filter(|m| m.target.starts_with(dir)).map(|m| m.target).collect();
    found.reverse();
    Ok(found)
}

/// The mount that `path` lies in: the last one with the longest matching path.
///
/// # Errors
/// Where `/proc` can't be read, or shows no root.
pub fn mount_of(path: &Path) -> Result<MountEntry> {
    mounts()?
        .into_iter()
        .filter(|m| path.starts_with(&m.target))
        // Of equals `max_by_key` gives the last, which is the one on top.
        .max_by_key(|m| m.target.components().count())
        .ok_or_else(|| Error::internal(format!("no mount of /proc/self/mountinfo holds {}", path.display())))
}

/// `36 35 98:0 /root /target opts shared:1 … - type source opts`
fn parse_line(line: &[u8]) -> Option<MountEntry> {
    let mut fields = line.split(|b| *b == b' ');
    let target = fields.by_ref().nth(4)?;
    let _options = fields.next()?;
    let mut shared = false;
    for field in fields.by_ref() {
        if field == b"-" {
            break;
        }
        shared |= field.starts_with(b"shared:");
    }
    let fs_type = String::from_utf8_lossy(fields.next()?).into_owned();
    Some(MountEntry { target: PathBuf::from(unescape(target)), fs_type, shared })
}

/// The kernel writes blank, tab, newline and backslash as `\ooo`.
fn unescape(field: &[u8]) -> OsString {
    let mut out = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((&byte, tail)) = rest.split_first() {
        let octal = tail.get(..3).filter(|d| byte == b'\\' && d.iter().all(|c| (b'0'..=b'7').contains(c)));
        if let Some(digits) = octal {
            let value = digits.iter().fold(0u32, |v, d| v * 8 + u32::from(d - b'0'));
            out.push(u8::try_from(value).unwrap_or(b'?'));
            rest = &tail[3..];
        } else {
            out.push(byte);
            rest = tail;
        }
    }
    OsString::from_vec(out)
}

/// `struct mount_attr` of the kernel, as it was first published (32 bytes).
#[repr(C)]
struct MountAttr {
    set: u64,
    clear: u64,
    propagation: u64,
    userns_fd: u64,
}

/// `MOUNT_ATTR_IDMAP`.
const ATTR_IDMAP: u64 = 0x0010_0000;

/// Attaches a copy of the mount at `source` to `target`, its files' owners mapped
/// by `user_namespace`.
///
/// # Errors
/// `Unimplemented` on a kernel, or for a file system, without idmapped mounts;
/// else names both paths.
pub fn bind_idmapped(source: &Path, target: &Path, user_namespace: BorrowedFd<'_>) -> Result<()> {
    use rustix::fd::AsRawFd;
    use rustix::fs::CWD;
    use rustix::mount::{MoveMountFlags, OpenTreeFlags};
    let what = || format!("bind {} over {} with mapped owners", source.display(), target.display());
    let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    let tree = rustix::mount::open_tree(CWD, source, flags).context(what)?;
    let fd = u64::try_from(user_namespace.as_raw_fd()).context(what)?;
    let attr = MountAttr { set: ATTR_IDMAP, clear: 0, propagation: 0, userns_fd: fd };
    // SAFETY: the path is an empty C string, `attr` is a live mount_attr of the
    // size that is passed, and both descriptors are open for the call.
    let rc = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            tree.as_raw_fd(),
            c"".as_ptr(),
            libc::AT_EMPTY_PATH,
            &raw const attr,
            size_of::<MountAttr>(),
        )
    };
    if rc != 0 {
        let e = std::io::Error::last_os_error();
        let kind = match e.raw_os_error() {
            Some(libc::ENOSYS | libc::EINVAL | libc::EOPNOTSUPP) => types::ErrorKind::Unimplemented,
            _ => types::ErrorKind::Internal,
        };
        return Err(Error::new(kind, what()).because(e));
    }
    rustix::mount::move_mount(tree.as_fd(), "", CWD, target, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH).context(what)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_of_mountinfo_is_read() {
        let line = br"36 35 98:0 /a /mnt/with\040blank\134 rw,noatime master:1 shared:7 - ext3 /dev/root rw";
        let entry = parse_line(line).unwrap();
        assert_eq!(entry.target, Path::new(r"/mnt/with blank\"));
        assert_eq!(entry.fs_type, "ext3");
        assert!(entry.shared);
        assert!(parse_line(b"").is_none() && parse_line(b"1 2 3").is_none());
    }

    #[test]
    fn detaching_what_is_not_mounted_is_no_error() {
        assert!(!detach(Path::new("/nonexistent/path")).unwrap());
        detach_all(&std::env::temp_dir().join("longshore-no-such-mount")).unwrap();
    }
}
