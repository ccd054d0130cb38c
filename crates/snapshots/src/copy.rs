//! Copies a layer with its owners mapped, for runtimes and kernels that know no
//! idmapped mounts. Whiteouts, opaque directories, hard links, devices, file
//! capabilities and times come along.

use crate::IdMap;
use crate::tree::{Visitor, open_dir, walk};
use rustix::fd::{AsFd, BorrowedFd, OwnedFd};
use rustix::fs::{AtFlags, FileType, Gid, Mode, OFlags, Stat, Timespec, Timestamps, Uid, XattrFlags};
use rustix::io::Errno;
use std::collections::HashMap;
use std::ffi::{CStr, CString};
use std::path::Path;
use types::{Error, Result, ResultExt};

const CAPABILITY: &CStr = c"security.capability";
const ACLS: [&CStr; 2] = [c"system.posix_acl_access", c"system.posix_acl_default"];
/// The largest attribute that the kernel takes, in bytes.
const XATTR_MAX: usize = 64 << 10;

/// Fills the empty directory `to` with a copy of `from`.
pub(crate) fn copy_mapped(from: &Path, to: &Path, map: &IdMap) -> Result<()> {
    let source = open_dir(from)?;
    let target = open_dir(to)?;
    let stat = rustix::fs::fstat(&source).context(|| format!("look at {}", from.display()))?;
    let root = target.try_clone().context(|| "duplicate a descriptor".into())?;
    let mut copier = Copier { map, at: target, root, stats: vec![stat], path: Vec::new(), links: HashMap::new() };
    let what = || format!("copy layer {} for a user namespace", from.display());
    let again = source.try_clone().context(what)?;
    walk(source, &mut copier).map_err(|e| e.within(what()))?;
    copier.finish_dir(again.as_fd()).map_err(|e| e.within(what()))
}

struct Copier<'a> {
    map: &'a IdMap,
    /// The directory in the copy that stands for the one being walked.
    at: OwnedFd,
    root: OwnedFd,
    /// Of the directories on the way down to `at`, the root's first.
    stats: Vec<Stat>,
    path: Vec<CString>,
    /// Where the first name of a file with several is, by inode.
    links: HashMap<u64, CString>,
}

impl Copier<'_> {
    fn owner(&self, stat: &Stat) -> Result<(Uid, Gid)> {
        Ok((Uid::from_raw(self.map.uid(stat.st_uid)?), Gid::from_raw(self.map.gid(stat.st_gid)?)))
    }

    /// Gives the directory at hand what only its filled state can have.
    fn finish_dir(&mut self, from: BorrowedFd<'_>) -> Result<()> {
        let Some(stat) = self.stats.pop() else { return Ok(()) };
        self.dress(from, self.at.as_fd(), &stat)
    }

    /// Owner, attributes, mode and times of an open file or directory. The owner
    /// comes first: changing it clears setuid and capabilities.
    fn dress(&self, from: BorrowedFd<'_>, to: BorrowedFd<'_>, stat: &Stat) -> Result<()> {
        let (uid, gid) = self.owner(stat)?;
        let what = || "copy a file's attributes".to_owned();
        rustix::fs::fchown(to, Some(uid), Some(gid)).context(what)?;
        self.copy_xattrs(from, to)?;
        rustix::fs::fchmod(to, Mode::from_raw_mode(stat.st_mode)).context(what)?;
        rustix::fs::futimens(to, &times(stat)).context(what)
    }

    fn copy_xattrs(&self, from: BorrowedFd<'_>, to: BorrowedFd<'_>) -> Result<()> {
        let what = || "copy a file's extended attributes".to_owned();
        let mut list = vec![0u8; XATTR_MAX];
        let length = match rustix::fs::flistxattr(from, &mut list[..]) {
            Ok(n) => n,
            Err(Errno::OPNOTSUPP) => return Ok(()),
            Err(e) => return Err(e).context(what),
        };
        let mut value = vec![0u8; XATTR_MAX];
        for name in list[..length].split_inclusive(|b| *b == 0) {
            let Ok(name) = CStr::from_bytes_with_nul(name) else { continue };
            // A label belongs to the file system that it was found on.
            if name == c"security.selinux" {
                continue;
            }
            let n = rustix::fs::fgetxattr(from, name, &mut value[..]).context(what)?;
            let data = match name {
                name if name == CAPABILITY => self.namespaced(&value[..n])?,
                name if ACLS.contains(&name) => mapped_acl(self.map, &value[..n])?,
                _ => value[..n].to_vec(),
            };
            rustix::fs::fsetxattr(to, name, &data, XattrFlags::empty()).context(what)?;
        }
        Ok(())
    }

    /// A file's capabilities as the namespace's root owns them: revision 2 of
    /// the attribute counts only for the host's root, revision 3 names another.
    fn namespaced(&self, value: &[u8]) -> Result<Vec<u8>> {
        const REVISION_2: u32 = 0x0200_0000;
        const REVISION_3: u32 = 0x0300_0000;
        let magic = value.first_chunk::<4>().map_or(0, |b| u32::from_le_bytes(*b));
        if magic & 0xFF00_0000 != REVISION_2 || value.len() != 20 {
            return Ok(value.to_vec());
        }
        let magic = REVISION_3 | (magic & 0x00FF_FFFF);
        Ok([&magic.to_le_bytes(), &value[4..], &self.map.uid(0)?.to_le_bytes()].concat())
    }

    fn copy_file(&self, dir: BorrowedFd<'_>, name: &CStr, stat: &Stat) -> Result<()> {
        let what = || "copy a file".to_owned();
        let from = rustix::fs::openat(dir, name, OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC, Mode::empty())
            .context(what)?;
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let to = rustix::fs::openat(&self.at, name, flags, Mode::RUSR | Mode::WUSR).context(what)?;
        let (mut from, mut to) = (std::fs::File::from(from), std::fs::File::from(to));
        // Shares the blocks where the file system can.
        std::io::copy(&mut from, &mut to).context(what)?;
        self.dress(from.as_fd(), to.as_fd(), stat)
    }

    fn copy_other(&self, dir: BorrowedFd<'_>, name: &CStr, kind: FileType, stat: &Stat) -> Result<()> {
        let what = || "copy a special file".to_owned();
        if kind == FileType::Symlink {
            let target = rustix::fs::readlinkat(dir, name, Vec::new()).context(what)?;
            rustix::fs::symlinkat(&target, &self.at, name).context(what)?;
        } else {
            let mode = Mode::from_raw_mode(stat.st_mode);
            rustix::fs::mknodat(&self.at, name, kind, mode, stat.st_rdev).context(what)?;
        }
        let (uid, gid) = self.owner(stat)?;
        rustix::fs::chownat(&self.at, name, Some(uid), Some(gid), AtFlags::SYMLINK_NOFOLLOW).context(what)?;
        if kind != FileType::Symlink {
            let mode = Mode::from_raw_mode(stat.st_mode);
            rustix::fs::chmodat(&self.at, name, mode, AtFlags::empty()).context(what)?;
        }
        rustix::fs::utimensat(&self.at, name, &times(stat), AtFlags::SYMLINK_NOFOLLOW).context(what)
    }

    fn path_of(&self, name: &CStr) -> Result<CString> {
        let mut all: Vec<&[u8]> = self.path.iter().map(|p| p.to_bytes()).collect();
        all.push(name.to_bytes());
        CString::new(all.join(&b'/')).context(|| "name a file".into())
    }
}

impl Visitor for Copier<'_> {
    fn entry(&mut self, dir: BorrowedFd<'_>, name: &CStr, stat: &Stat) -> Result<()> {
        let kind = FileType::from_raw_mode(stat.st_mode);
        if kind == FileType::Socket {
            return Ok(());
        }
        let linked = stat.st_nlink > 1;
        if linked && let Some(first) = self.links.get(&stat.st_ino) {
            return rustix::fs::linkat(&self.root, first, &self.at, name, AtFlags::empty())
                .context(|| format!("link {}", name.to_string_lossy()));
        }
        let copied = match kind {
            FileType::RegularFile => self.copy_file(dir, name, stat),
            kind => self.copy_other(dir, name, kind, stat),
        };
        copied.map_err(|e: Error| e.within(name.to_string_lossy()))?;
        if linked {
            let path = self.path_of(name)?;
            self.links.insert(stat.st_ino, path);
        }
        Ok(())
    }

    fn enter(&mut self, _: BorrowedFd<'_>, name: &CStr, stat: &Stat) -> Result<()> {
        let what = || format!("make directory {}", name.to_string_lossy());
        rustix::fs::mkdirat(&self.at, name, Mode::RWXU).context(what)?;
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        self.at = rustix::fs::openat(&self.at, name, flags, Mode::empty()).context(what)?;
        self.stats.push(*stat);
        self.path.push(name.to_owned());
        Ok(())
    }

    fn leave(&mut self, from: BorrowedFd<'_>) -> Result<()> {
        let name = self.path.pop().unwrap_or_default();
        self.finish_dir(from).map_err(|e| e.within(name.to_string_lossy()))?;
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        self.at = rustix::fs::openat(&self.at, c"..", flags, Mode::empty()).context(|| "go up in the copy".into())?;
        Ok(())
    }
}

/// A POSIX access control list with its users and groups mapped as owners are: a version
/// of 4 bytes, then entries of 8 (tag, permissions, id), little endian
/// (linux/posix_acl_xattr.h).
fn mapped_acl(map: &IdMap, value: &[u8]) -> Result<Vec<u8>> {
    const USER: u16 = 0x02;
    const GROUP: u16 = 0x08;
    let mut mapped = value.to_vec();
    for entry in mapped.get_mut(4..).unwrap_or_default().chunks_exact_mut(8) {
        let (tag, id) = (u16::from_le_bytes([entry[0], entry[1]]), [entry[4], entry[5], entry[6], entry[7]]);
        let id = match tag {
            USER => map.uid(u32::from_le_bytes(id))?,
            GROUP => map.gid(u32::from_le_bytes(id))?,
            _ => continue,
        };
        entry[4..].copy_from_slice(&id.to_le_bytes());
    }
    Ok(mapped)
}

#[allow(clippy::unnecessary_cast, reason = "the width of these fields differs between platforms")]
fn times(stat: &Stat) -> Timestamps {
    Timestamps {
        last_access: Timespec { tv_sec: stat.st_atime as i64, tv_nsec: stat.st_atime_nsec as _ },
        last_modification: Timespec { tv_sec: stat.st_mtime as i64, tv_nsec: stat.st_mtime_nsec as _ },
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::IdRange;

    #[test]
    fn users_and_groups_of_access_lists_are_mapped() {
        let range = |host| vec![IdRange { container: 0, host, size: 1000 }];
        let map = IdMap { uids: range(100_000), gids: range(200_000) };
        // user::rwx, user:5:r--, group::r--, group:6:rw-, mask::rwx, other::---
        let list = |user: u32, group: u32| {
            let entries: [(u16, u16, u32); 6] =
                [(1, 7, !0), (2, 4, user), (4, 4, !0), (8, 6, group), (0x10, 7, !0), (0x20, 0, !0)];
            let mut bytes = 2u32.to_le_bytes().to_vec();
            for (tag, permissions, id) in entries {
                bytes.extend([tag.to_le_bytes(), permissions.to_le_bytes()].concat());
                bytes.extend(id.to_le_bytes());
            }
            bytes
        };
        assert_eq!(mapped_acl(&map, &list(5, 6)).unwrap(), list(100_005, 200_006));
        assert!(mapped_acl(&map, &list(5000, 6)).is_err());
        assert_eq!(mapped_acl(&map, &[2]).unwrap(), [2]);
    }
}
