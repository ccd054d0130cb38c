//! Entries become files.
//!
//! Every path is resolved by the kernel inside of the layer's directory
//! (`openat2` with `RESOLVE_IN_ROOT`), and every last component is created,
//! never opened, so that neither `..`, absolute names nor links that the same
//! layer made can lead outside (CVE-2021-32760).
//!
//! Whiteouts (`.wh.NAME`, `.wh..wh..opq`) become what overlayfs understands: a
//! character device 0:0, and `trusted.overlay.opaque`.

use super::{Entry, Kind, Reader};
use rustix::fd::{AsFd, BorrowedFd, OwnedFd};
use rustix::fs::{AtFlags, FileType, Gid, Mode, OFlags, ResolveFlags, Stat, Timespec, Timestamps, Uid, XattrFlags};
use rustix::io::Errno;
use std::io::Read;
use std::path::{Path, PathBuf};
use types::{Error, Result, ResultExt};

const WHITEOUT: &[u8] = b".wh.";
const OPAQUE: &[u8] = b".wh..wh..opq";
/// Other names that aufs kept for itself.
const AUFS: &[u8] = b".wh..wh.";
const OPAQUE_XATTR: &std::ffi::CStr = c"trusted.overlay.opaque";
/// How many bytes of directory names are kept to set their times at the end;
/// directories beyond keep the time of unpacking.
const DIRS_MAX: usize = 64 << 20;

/// How many symlinks may lead to a directory, as the kernel has it.
const MOST_SYMLINKS: usize = 40;

const DIR: OFlags = OFlags::RDONLY.union(OFlags::DIRECTORY).union(OFlags::CLOEXEC);
const INSIDE: ResolveFlags = ResolveFlags::IN_ROOT.union(ResolveFlags::NO_MAGICLINKS).union(ResolveFlags::NO_XDEV);

/// Unpacks the tar `source` into the empty directory `root`; `parents` are the
/// directories of the layers beneath, topmost first.
pub(super) fn extract(source: impl Read, root: &Path, parents: &[PathBuf]) -> Result<()> {
    let open = |path: &Path| {
        rustix::fs::open(path, DIR | OFlags::NOFOLLOW, Mode::empty()).context(|| format!("open {}", path.display()))
    };
    let mut extractor = Extractor {
        root: open(root)?,
        parents: parents.iter().map(|p| open(p)).collect::<Result<_>>()?,
        last_dir: None,
        dir_times: Vec::new(),
        dir_bytes: 0,
    };
    let mut reader = Reader::new(source);
    while let Some(entry) = reader.next()? {
        extractor
            .entry(&entry, &mut reader)
            .map_err(|e| e.within(format!("entry {:?}", String::from_utf8_lossy(&entry.path))))?;
    }
    extractor.finish()
}

struct Extractor {
    root: OwnedFd,
    parents: Vec<OwnedFd>,
    /// The directory of the last entry, since its siblings mostly follow.
    last_dir: Option<(Vec<u8>, OwnedFd)>,
    dir_times: Vec<(Vec<u8>, Timestamps)>,
    dir_bytes: usize,
}

/// A path's components. `..` is refused: no builder writes it.
fn components(path: &[u8]) -> Result<Vec<&[u8]>> {
    let parts: Vec<&[u8]> = path.split(|b| *b == b'/').filter(|p| !p.is_empty() && *p != b".").collect();
    if parts.contains(&b"..".as_slice()) {
        return Err(Error::invalid("a path with '..' leads outside"));
    }
    Ok(parts)
}

/// Where a symlink in the directory of these components leads, in the layer's root.
fn target_of(dir: &[&[u8]], target: &[u8]) -> Vec<Vec<u8>> {
    let from = if target.starts_with(b"/") { &[] } else { dir };
    let mut parts: Vec<Vec<u8>> = from.iter().map(|part| part.to_vec()).collect();
    for part in target.split(|b| *b == b'/') {
        match part {
            b"" | b"." => {}
            b".." => drop(parts.pop()),
            part => parts.push(part.to_vec()),
        }
    }
    parts
}

/// `openat2` inside of `dir`, again where a concurrent rename made it unsure.
fn open_inside(dir: BorrowedFd<'_>, path: &[u8], flags: OFlags, more: ResolveFlags) -> rustix::io::Result<OwnedFd> {
    let path = if path.is_empty() { b".".as_slice() } else { path };
    loop {
        match rustix::fs::openat2(dir, path, flags | OFlags::CLOEXEC, Mode::empty(), INSIDE | more) {
            Err(Errno::AGAIN) => {}
            other => return other,
        }
    }
}

fn stat_at(dir: BorrowedFd<'_>, name: &[u8]) -> rustix::io::Result<Option<Stat>> {
    match rustix::fs::statat(dir, name, AtFlags::SYMLINK_NOFOLLOW) {
        Ok(stat) => Ok(Some(stat)),
        Err(Errno::NOENT) => Ok(None),
        Err(e) => Err(e),
    }
}

fn kind_of(stat: &Stat) -> FileType {
    FileType::from_raw_mode(stat.st_mode)
}

fn is_whiteout(stat: &Stat) -> bool {
    kind_of(stat) == FileType::CharacterDevice && stat.st_rdev == 0
}

impl Extractor {
    fn entry(&mut self, entry: &Entry, data: &mut impl Read) -> Result<()> {
        let parts = components(&entry.path)?;
        let Some((name, above)) = parts.split_last() else {
            return self.root_entry(entry);
        };
        let dir = self.directory(above)?;
        let done = if *name == OPAQUE {
            set_opaque(dir.as_fd())
        } else if name.starts_with(AUFS) {
            Ok(())
        } else if let Some(hidden) = name.strip_prefix(WHITEOUT) {
            self.whiteout(dir.as_fd(), hidden)
        } else {
            self.create(dir.as_fd(), name, &parts, entry, data)
        };
        self.last_dir = Some((above.join(&b'/'), dir));
        done
    }

    /// `./` itself.
    fn root_entry(&mut self, entry: &Entry) -> Result<()> {
        if entry.kind != Kind::Dir {
            return Err(Error::invalid("the root can only be a directory"));
        }
        let root = self.root.try_clone().context(|| "duplicate a descriptor".into())?;
        dress(root.as_fd(), entry)?;
        self.remember(Vec::new(), entry);
        Ok(())
    }

    /// The directory of these components, made where it is missing.
    fn directory(&mut self, parts: &[&[u8]]) -> Result<OwnedFd> {
        let path = parts.join(&b'/');
        match self.last_dir.take() {
            Some((last, fd)) if last == path => return Ok(fd),
            _ => {}
        }
        match open_inside(self.root.as_fd(), &path, DIR, ResolveFlags::empty()) {
            Ok(fd) => return Ok(fd),
            Err(Errno::NOENT | Errno::NOTDIR) => {}
            Err(e) => return Err(e).context(|| "open its directory".into()),
        }
        self.make_directories(parts, MOST_SYMLINKS)
    }

    /// Makes those of these components that are missing.
    fn make_directories(&mut self, parts: &[&[u8]], symlinks: usize) -> Result<OwnedFd> {
        let what = || "open a directory above".to_owned();
        let mut at = self.root.try_clone().context(|| "duplicate a descriptor".into())?;
        for (depth, name) in parts.iter().enumerate() {
            let so_far = parts[..=depth].join(&b'/');
            at = match open_inside(self.root.as_fd(), &so_far, DIR, ResolveFlags::empty()) {
                Ok(fd) => fd,
                Err(Errno::NOENT | Errno::NOTDIR) => match rustix::fs::readlinkat(&at, *name, Vec::new()) {
                    // What it leads to has no entry, or none yet.
                    Ok(target) if symlinks > 0 => {
                        let target = target_of(&parts[..depth], target.to_bytes());
                        let target: Vec<&[u8]> = target.iter().map(Vec::as_slice).collect();
                        self.make_directories(&target, symlinks - 1)?;
                        open_inside(self.root.as_fd(), &so_far, DIR, ResolveFlags::empty()).context(what)?
                    }
                    _ => self.implied(at.as_fd(), name, &so_far)?,
                },
                Err(e) => return Err(e).context(what),
            };
        }
        Ok(at)
    }

    /// Makes a directory that has no entry of its own. In the merged view it
    /// stands before the same one of the layers beneath, so it looks like that.
    fn implied(&mut self, at: BorrowedFd<'_>, name: &[u8], path: &[u8]) -> Result<OwnedFd> {
        let what = || format!("make the directory {:?} above", String::from_utf8_lossy(path));
        let hidden = stat_at(at, name).context(what)?.is_some_and(|s| is_whiteout(&s));
        if hidden {
            rustix::fs::unlinkat(at, name, AtFlags::empty()).context(what)?;
        }
        rustix::fs::mkdirat(at, name, Mode::from_raw_mode(0o755)).context(what)?;
        let fd = rustix::fs::openat(at, name, DIR | OFlags::NOFOLLOW, Mode::empty()).context(what)?;
        rustix::fs::fchmod(&fd, Mode::from_raw_mode(0o755)).context(what)?;
        if hidden {
            set_opaque(fd.as_fd())?;
        } else if let Some(stat) = self.beneath(path) {
            let (uid, gid) = (Uid::from_raw(stat.st_uid), Gid::from_raw(stat.st_gid));
            rustix::fs::fchown(&fd, Some(uid), Some(gid)).context(what)?;
            rustix::fs::fchmod(&fd, Mode::from_raw_mode(stat.st_mode)).context(what)?;
        }
        Ok(fd)
    }

    /// What the layers beneath show at `path`, if it is a directory.
    fn beneath(&self, path: &[u8]) -> Option<Stat> {
        for parent in &self.parents {
            let found = open_inside(parent.as_fd(), path, OFlags::PATH | OFlags::NOFOLLOW, ResolveFlags::empty());
            if let Ok(stat) = found.and_then(|fd| rustix::fs::fstat(&fd)) {
                return (kind_of(&stat) == FileType::Directory).then_some(stat);
            }
        }
        None
    }

    /// Hides what the layers beneath have as `name`; what this layer has stays.
    fn whiteout(&mut self, dir: BorrowedFd<'_>, name: &[u8]) -> Result<()> {
        if name.is_empty() || name == b"." || name == b".." {
            return Err(Error::invalid("a whiteout of no name"));
        }
        let what = || format!("hide {:?}", String::from_utf8_lossy(name));
        if self.parents.is_empty() {
            return Ok(());
        }
        match stat_at(dir, name).context(what)? {
            Some(stat) if kind_of(&stat) == FileType::Directory => {
                let own = rustix::fs::openat(dir, name, DIR | OFlags::NOFOLLOW, Mode::empty()).context(what)?;
                set_opaque(own.as_fd())
            }
            Some(_) => Ok(()),
            None => rustix::fs::mknodat(dir, name, FileType::CharacterDevice, Mode::empty(), 0).context(what),
        }
    }

    /// Takes away what stands where `entry` goes, unless both are directories.
    /// True if that was a whiteout.
    fn clear(&mut self, dir: BorrowedFd<'_>, name: &[u8], kind: Kind) -> Result<bool> {
        let what = || "replace what was there".to_owned();
        let Some(old) = stat_at(dir, name).context(what)? else { return Ok(false) };
        if kind_of(&old) == FileType::Directory {
            if kind != Kind::Dir {
                remove_tree(dir, name)?;
            }
            return Ok(false);
        }
        rustix::fs::unlinkat(dir, name, AtFlags::empty()).context(what)?;
        Ok(is_whiteout(&old))
    }

    fn create(
        &mut self,
        dir: BorrowedFd<'_>,
        name: &[u8],
        parts: &[&[u8]],
        entry: &Entry,
        data: &mut impl Read,
    ) -> Result<()> {
        if entry.kind == Kind::HardLink {
            return self.hard_link(dir, name, entry);
        }
        let was_hidden = self.clear(dir, name, entry.kind)?;
        match entry.kind {
            Kind::File => {
                let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
                let fd =
                    rustix::fs::openat(dir, name, flags, Mode::RUSR | Mode::WUSR).context(|| "create it".into())?;
                let mut file = std::fs::File::from(fd);
                std::io::copy(&mut data.take(entry.size), &mut file).context(|| "write it".into())?;
                dress(file.as_fd(), entry)?;
                rustix::fs::futimens(&file, &times(entry)).context(|| "set its times".into())
            }
            Kind::Dir => {
                match rustix::fs::mkdirat(dir, name, Mode::RWXU) {
                    Ok(()) | Err(Errno::EXIST) => {}
                    Err(e) => return Err(e).context(|| "create it".into()),
                }
                let fd = rustix::fs::openat(dir, name, DIR | OFlags::NOFOLLOW, Mode::empty())
                    .context(|| "open it".into())?;
                dress(fd.as_fd(), entry)?;
                if was_hidden {
                    set_opaque(fd.as_fd())?;
                }
                self.remember(parts.join(&b'/'), entry);
                Ok(())
            }
            Kind::Symlink => {
                rustix::fs::symlinkat(entry.link.as_slice(), dir, name).context(|| "create it".into())?;
                dress_at(dir, name, entry)
            }
            Kind::Char if entry.device == (0, 0) => Ok(()),
            kind => {
                let kind = match kind {
                    Kind::Char => FileType::CharacterDevice,
                    Kind::Block => FileType::BlockDevice,
                    _ => FileType::Fifo,
                };
                let device = rustix::fs::makedev(entry.device.0, entry.device.1);
                rustix::fs::mknodat(dir, name, kind, Mode::RUSR | Mode::WUSR, device).context(|| "create it".into())?;
                dress_at(dir, name, entry)?;
                // Nobody else writes here, and it is no link: this can't follow one.
                rustix::fs::chmodat(dir, name, Mode::from_raw_mode(entry.mode), AtFlags::empty())
                    .context(|| "set its mode".into())
            }
        }
    }

    /// The target's directory is resolved inside, its last component not
    /// followed: a link to a symlink is that symlink.
    fn hard_link(&mut self, dir: BorrowedFd<'_>, name: &[u8], entry: &Entry) -> Result<()> {
        let target = components(&entry.link)?;
        let what = || format!("link to {:?}", String::from_utf8_lossy(&entry.link));
        let Some((old_name, above)) = target.split_last() else {
            return Err(Error::invalid("a hard link to the root"));
        };
        let from = open_inside(self.root.as_fd(), &above.join(&b'/'), DIR, ResolveFlags::empty()).context(what)?;
        match stat_at(from.as_fd(), old_name).context(what)? {
            None => return Err(Error::invalid(what()).hint("the target is not in this layer")),
            Some(stat) if kind_of(&stat) == FileType::Directory => {
                return Err(Error::invalid("a hard link to a directory"));
            }
            Some(stat) => {
                let there = stat_at(dir, name).context(what)?;
                if there.is_some_and(|s| (s.st_dev, s.st_ino) == (stat.st_dev, stat.st_ino)) {
                    return Ok(());
                }
            }
        }
        self.clear(dir, name, entry.kind)?;
        rustix::fs::linkat(&from, *old_name, dir, name, AtFlags::empty()).context(what)
    }

    fn remember(&mut self, path: Vec<u8>, entry: &Entry) {
        self.dir_bytes += path.len() + size_of::<(Vec<u8>, Timestamps)>();
        if self.dir_bytes <= DIRS_MAX {
            self.dir_times.push((path, times(entry)));
        }
    }

    /// Sets the directories' times, which filling them has changed.
    fn finish(self) -> Result<()> {
        for (path, times) in &self.dir_times {
            // One that was replaced since is no directory any more.
            if let Ok(fd) = open_inside(self.root.as_fd(), path, DIR | OFlags::NOFOLLOW, ResolveFlags::NO_SYMLINKS) {
                rustix::fs::futimens(&fd, times)
                    .context(|| format!("set the times of {:?}", String::from_utf8_lossy(path)))?;
            }
        }
        Ok(())
    }
}

/// Removes a directory of this layer.
fn remove_tree(dir: BorrowedFd<'_>, name: &[u8]) -> Result<()> {
    let what = || "remove a directory".to_owned();
    let below = rustix::fs::openat(dir, name, DIR | OFlags::NOFOLLOW, Mode::empty()).context(what)?;
    snapshots::empty_directory(below.as_fd())?;
    rustix::fs::unlinkat(dir, name, AtFlags::REMOVEDIR).context(what)
}

fn set_opaque(dir: BorrowedFd<'_>) -> Result<()> {
    rustix::fs::fsetxattr(dir, OPAQUE_XATTR, b"y", XattrFlags::empty()).context(|| "make a directory opaque".into())
}

fn times(entry: &Entry) -> Timestamps {
    let time = Timespec { tv_sec: entry.mtime.0, tv_nsec: entry.mtime.1.into() };
    Timestamps { last_access: time, last_modification: time }
}

fn owner(entry: &Entry) -> (Option<Uid>, Option<Gid>) {
    (Some(Uid::from_raw(entry.uid)), Some(Gid::from_raw(entry.gid)))
}

/// Owner, attributes and mode of an open file or directory. The owner comes
/// first: changing it clears setuid and capabilities.
fn dress(fd: BorrowedFd<'_>, entry: &Entry) -> Result<()> {
    let (uid, gid) = owner(entry);
    rustix::fs::fchown(fd, uid, gid).context(|| "set its owner".into())?;
    for (name, value) in entry.xattrs.iter().filter(|(name, _)| is_allowed(name)) {
        match rustix::fs::fsetxattr(fd, name.as_slice(), value, XattrFlags::empty()) {
            // The file system here may know fewer attributes than the builder's.
            Ok(()) | Err(Errno::OPNOTSUPP) => {}
            Err(e) => return Err(e).context(|| format!("set its attribute {:?}", String::from_utf8_lossy(name))),
        }
    }
    rustix::fs::fchmod(fd, Mode::from_raw_mode(entry.mode)).context(|| "set its mode".into())
}

/// Owner and times of what can't be opened.
fn dress_at(dir: BorrowedFd<'_>, name: &[u8], entry: &Entry) -> Result<()> {
    let (uid, gid) = owner(entry);
    rustix::fs::chownat(dir, name, uid, gid, AtFlags::SYMLINK_NOFOLLOW).context(|| "set its owner".into())?;
    rustix::fs::utimensat(dir, name, &times(entry), AtFlags::SYMLINK_NOFOLLOW).context(|| "set its times".into())
}

/// Attributes that an image may bring. Labels are the host's business, and
/// overlayfs's own would let a layer redirect lookups.
fn is_allowed(name: &[u8]) -> bool {
    name == b"security.capability"
        || name.starts_with(b"system.posix_acl_")
        || (name.starts_with(b"user.") && !name.starts_with(b"user.overlay."))
}
