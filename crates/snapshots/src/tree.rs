//! Walking and removing directory trees that somebody else filled.
//!
//! A container may nest directories deeper than any path, stack or table of
//! descriptors allows, and change them meanwhile. So nothing here recurses, no
//! path is longer than one name, and a walk holds one descriptor: it comes back
//! up through `..` and checks that it got where it came from.

use crate::Usage;
use rustix::fd::{AsFd, BorrowedFd, OwnedFd};
use rustix::fs::{AtFlags, Dir, FileType, Mode, OFlags, Stat};
use rustix::io::Errno;
use std::collections::HashSet;
use std::ffi::{CStr, CString};
use std::path::Path;
use types::{Result, ResultExt};

const DIR_FLAGS: OFlags = OFlags::RDONLY.union(OFlags::DIRECTORY).union(OFlags::NOFOLLOW).union(OFlags::CLOEXEC);

/// Opens a directory without following a link in its place.
pub(crate) fn open_dir(path: &Path) -> Result<OwnedFd> {
    rustix::fs::open(path, DIR_FLAGS, Mode::empty()).context(|| format!("open directory {}", path.display()))
}

/// What a walk tells about.
pub(crate) trait Visitor {
    /// Anything but a directory, in the directory `dir`.
    fn entry(&mut self, dir: BorrowedFd<'_>, name: &CStr, stat: &Stat) -> Result<()>;
    /// A directory, before what is in it.
    fn enter(&mut self, dir: BorrowedFd<'_>, name: &CStr, stat: &Stat) -> Result<()>;
    /// The end of the directory last entered; `from` is that directory.
    fn leave(&mut self, from: BorrowedFd<'_>) -> Result<()>;
}

/// The names in a directory, `.` and `..` left out.
fn names(dir: BorrowedFd<'_>) -> rustix::io::Result<Vec<CString>> {
    let mut all = Vec::new();
    for entry in Dir::read_from(dir)? {
        let entry = entry?;
        if entry.file_name() != c"." && entry.file_name() != c".." {
            all.push(entry.file_name().to_owned());
        }
    }
    Ok(all)
}

/// Visits all that is below `root`. What vanishes meanwhile is passed over; a
/// directory moved away under the walk ends it early.
pub(crate) fn walk(root: OwnedFd, visitor: &mut impl Visitor) -> Result<()> {
    struct Level {
        pending: Vec<CString>,
        identity: (u64, u64),
    }
    let identity = |fd: BorrowedFd<'_>| rustix::fs::fstat(fd).map(|s| (s.st_dev, s.st_ino));
    let read = || "read a directory".to_owned();
    let mut at = root;
    let mut levels =
        vec![Level { pending: names(at.as_fd()).context(read)?, identity: identity(at.as_fd()).context(read)? }];
    while let Some(level) = levels.last_mut() {
        let Some(name) = level.pending.pop() else {
            levels.pop();
            let Some(above) = levels.last() else { return Ok(()) };
            visitor.leave(at.as_fd())?;
            let up = rustix::fs::openat(&at, c"..", DIR_FLAGS, Mode::empty()).context(read)?;
            if identity(up.as_fd()).context(read)? != above.identity {
                return Ok(());
            }
            at = up;
            continue;
        };
        let stat = match rustix::fs::statat(&at, &name, AtFlags::SYMLINK_NOFOLLOW) {
            Ok(stat) => stat,
            Err(Errno::NOENT) => continue,
            Err(e) => return Err(e).context(|| format!("look at {}", name.to_string_lossy())),
        };
        if FileType::from_raw_mode(stat.st_mode) != FileType::Directory {
            visitor.entry(at.as_fd(), &name, &stat)?;
            continue;
        }
        let below = match rustix::fs::openat(&at, &name, DIR_FLAGS, Mode::empty()) {
            Ok(fd) => fd,
            Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP) => continue,
            Err(e) => return Err(e).context(|| format!("open {}", name.to_string_lossy())),
        };
        visitor.enter(at.as_fd(), &name, &stat)?;
        levels.push(Level {
            pending: names(below.as_fd()).context(read)?,
            identity: identity(below.as_fd()).context(read)?,
        });
        at = below;
    }
    Ok(())
}

/// The disk use of everything below `path`, which itself counts too.
pub(crate) fn usage(path: &Path) -> Result<Usage> {
    struct Count {
        total: Usage,
        linked: HashSet<u64>,
    }
    impl Count {
        fn add(&mut self, stat: &Stat) {
            let first = stat.st_nlink < 2 || self.linked.insert(stat.st_ino);
            if first {
                self.total += Usage { bytes: u64::try_from(stat.st_blocks).unwrap_or(0) * 512, inodes: 1 };
            }
        }
    }
    impl Visitor for Count {
        fn entry(&mut self, _: BorrowedFd<'_>, _: &CStr, stat: &Stat) -> Result<()> {
            self.add(stat);
            Ok(())
        }
        fn enter(&mut self, _: BorrowedFd<'_>, _: &CStr, stat: &Stat) -> Result<()> {
            // A directory's link count says nothing about second names.
            self.total += Usage { bytes: u64::try_from(stat.st_blocks).unwrap_or(0) * 512, inodes: 1 };
            Ok(())
        }
        fn leave(&mut self, _: BorrowedFd<'_>) -> Result<()> {
            Ok(())
        }
    }
    let root = open_dir(path)?;
    let own = rustix::fs::fstat(&root).context(|| format!("look at {}", path.display()))?;
    let bytes = u64::try_from(own.st_blocks).unwrap_or(0) * 512;
    let mut count = Count { total: Usage { bytes, inodes: 1 }, linked: HashSet::new() };
    walk(root, &mut count).map_err(|e| e.within(format!("measure {}", path.display())))?;
    Ok(count.total)
}

/// Removes `path` with all that is below it; one that is not there is no error.
///
/// A directory that isn't empty is first moved up beside the others, so that
/// the tree is never worked on more than two levels deep.
pub(crate) fn remove(path: &Path) -> Result<()> {
    let what = || format!("remove {}", path.display());
    let top = match rustix::fs::open(path, DIR_FLAGS, Mode::empty()) {
        Ok(fd) => fd,
        Err(Errno::NOENT) => return Ok(()),
        Err(e) => return Err(e).context(what),
    };
    empty(top.as_fd()).map_err(|e| e.within(what()))?;
    match rustix::fs::unlinkat(rustix::fs::CWD, path, AtFlags::REMOVEDIR) {
        Ok(()) | Err(Errno::NOENT) => Ok(()),
        Err(e) => Err(e).context(what),
    }
}

/// Removes everything in the directory `top`, however deep it is.
///
/// # Errors
/// At the first entry that can't be removed, naming it.
pub fn empty(top: BorrowedFd<'_>) -> Result<()> {
    let mut moved = 0u64;
    loop {
        let all = names(top).context(|| "read a directory".into())?;
        if all.is_empty() {
            return Ok(());
        }
        for name in all {
            remove_one(top, &name, &mut moved).context(|| format!("remove {}", name.to_string_lossy()))?;
        }
    }
}

fn remove_one(top: BorrowedFd<'_>, name: &CStr, moved: &mut u64) -> rustix::io::Result<()> {
    match rustix::fs::unlinkat(top, name, AtFlags::empty()) {
        Err(Errno::ISDIR) => {}
        Ok(()) | Err(Errno::NOENT) => return Ok(()),
        Err(e) => return Err(e),
    }
    let dir = rustix::fs::openat(top, name, DIR_FLAGS, Mode::empty())?;
    for child in names(dir.as_fd())? {
        match rustix::fs::unlinkat(&dir, &child, AtFlags::empty()) {
            Err(Errno::ISDIR) => {}
            Ok(()) | Err(Errno::NOENT) => continue,
            Err(e) => return Err(e),
        }
        match rustix::fs::unlinkat(&dir, &child, AtFlags::REMOVEDIR) {
            Err(Errno::NOTEMPTY | Errno::EXIST) => {}
            Ok(()) | Err(Errno::NOENT) => continue,
            Err(e) => return Err(e),
        }
        loop {
            *moved += 1;
            let place = format!(".removing-{moved}");
            match rustix::fs::renameat_with(&dir, &child, top, place, rustix::fs::RenameFlags::NOREPLACE) {
                Ok(()) => break,
                Err(Errno::EXIST) => {}
                Err(e) => return Err(e),
            }
        }
    }
    match rustix::fs::unlinkat(top, name, AtFlags::REMOVEDIR) {
        Ok(()) | Err(Errno::NOENT) => Ok(()),
        Err(e) => Err(e),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tree_deeper_than_any_path_is_measured_and_removed() {
        let dir = tempfile::tempdir().unwrap();
        let top = dir.path().join("top");
        std::fs::create_dir(&top).unwrap();
        let mut at = open_dir(&top).unwrap();
        for _ in 0..3000 {
            rustix::fs::mkdirat(&at, "deep", Mode::RWXU).unwrap();
            at = rustix::fs::openat(&at, "deep", DIR_FLAGS, Mode::empty()).unwrap();
        }
        rustix::fs::symlinkat("/etc", &at, "link").unwrap();
        drop(at);
        assert_eq!(usage(&top).unwrap().inodes, 3002);
        remove(&top).unwrap();
        assert!(!top.exists());
        remove(&top).unwrap();
        assert!(Path::new("/etc/passwd").exists());
    }

    #[test]
    fn hard_links_count_once() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("a"), vec![1u8; 8192]).unwrap();
        let before = usage(dir.path()).unwrap();
        std::fs::hard_link(dir.path().join("a"), dir.path().join("b")).unwrap();
        assert_eq!(usage(dir.path()).unwrap().inodes, before.inodes);
        assert_eq!(before.inodes, 2);
    }
}
