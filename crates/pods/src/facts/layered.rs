//! Files of an image's root file system, read from its unpacked layers: when a
//! container is created nothing is mounted yet, the shim does that later.
//!
//! ```text
//! etc/passwd ── etc: merged from the layers that have it, top first
//!                    ├ a whiteout (character device 0:0) hides all below
//!                    ├ an opaque directory hides those below
//!                    └ passwd: the first that is no directory counts
//! ```
//! Each step opens one name without following it, so neither a symlink nor `..`
//! leaves the root; symlinks are followed here, by name, a bounded number of times.

use rustix::fs::{AtFlags, FileType, Mode, OFlags};
use rustix::io::Errno;
use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Component, Path, PathBuf};
use types::{Error, Result, ResultExt};

/// The kernel's own bound on symlinks in one path.
const MOST_SYMLINKS: usize = 40;
/// The longest path with all its symlinks put in, in names.
const MOST_STEPS: usize = 4096;

/// A root file system as its layers' directories, the top one first.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LayeredRoot(pub Vec<PathBuf>);

/// One merged directory: that of each layer that takes part, top first.
type Merged = Vec<OwnedFd>;

enum Found {
    Nothing,
    Directory(Merged),
    Symlink(OsString),
    /// The directory that the file is in.
    File(OwnedFd),
}

enum Resolved {
    Directory(Merged),
    /// The directory of one layer, and the file's name in it.
    File(OwnedFd, OsString),
}

fn describe(path: &str) -> String {
    format!("open /{} of the image", path.trim_start_matches('/'))
}

impl LayeredRoot {
    /// The layers of an overlay mount, from its options (`upperdir=`, `lowerdir=`).
    pub fn from_overlay<S: AsRef<str>>(options: &[S]) -> Self {
        let value = |key: &str| options.iter().find_map(|o| o.as_ref().strip_prefix(key));
        let mut layers: Vec<PathBuf> = value("upperdir=").map(PathBuf::from).into_iter().collect();
        let mut current = String::new();
        let mut escaped = false;
        for c in value("lowerdir=").unwrap_or("").chars() {
            match c {
                '\\' if !escaped => escaped = true,
                ':' if !escaped => layers.push(std::mem::take(&mut current).into()),
                other => {
                    escaped = false;
                    current.push(other);
                }
            }
        }
        layers.push(current.into());
        // `::` parts lower layers from data-only ones.
        layers.retain(|l| !l.as_os_str().is_empty());
        Self(layers)
    }

    /// Opens a regular file of the root file system; `None` if there is none at
    /// `path`, which is taken from the root.
    ///
    /// # Errors
    /// More than 40 symlinks, or what the layers' file system says.
    pub fn open(&self, path: &str) -> Result<Option<File>> {
        match self.resolve(path)? {
            Some(Resolved::File(dir, name)) => regular(&dir, &name).context(|| describe(path)),
            _ => Ok(None),
        }
    }

    /// The layers of what is at `sub_path`, top first, for a mount of it: those of a
    /// directory, or the one file. An empty path is the root itself.
    ///
    /// # Errors
    /// `InvalidArgument` for a path that is absolute, climbs, or leads nowhere.
    pub fn at(&self, sub_path: &str) -> Result<Vec<PathBuf>> {
        if sub_path.starts_with('/') || sub_path.split('/').any(|part| part == "..") {
            return Err(Error::invalid(format!("image_sub_path {sub_path:?} is not a path inside the image")));
        }
        let path_of = |fd: &OwnedFd| {
            let link = format!("/proc/self/fd/{}", fd.as_raw_fd());
            std::fs::read_link(&link).context(|| format!("image_sub_path {sub_path:?}: read {link}"))
        };
        match self.resolve(sub_path)? {
            Some(Resolved::Directory(merged)) => merged.iter().map(path_of).collect(),
            Some(Resolved::File(dir, name)) => Ok(vec![path_of(&dir)?.join(name)]),
            None => Err(Error::invalid(format!("image_sub_path {sub_path:?} does not exist in the image"))),
        }
    }

    /// Refuses an image in which a name of the root that the OCI runtime mounts on, and
    /// makes files in, is a symlink: runc up to 1.1 makes the links of /dev where it leads
    /// on the node (CVE-2025-31133 and its kin).
    ///
    /// # Errors
    /// `FailedPrecondition`, naming the symlink and its target.
    pub fn check_mount_points(&self) -> Result<()> {
        let roots = self.roots()?;
        for name in ["dev", "proc", "sys"] {
            if let Found::Symlink(target) = look_up(&roots, OsStr::new(name)).context(|| describe(name))? {
                let what = format!("/{name} of the image is a symlink, to {}", Path::new(&target).display());
                return Err(Error::precondition(what).hint("the image must have a directory there, or nothing"));
            }
        }
        Ok(())
    }

    fn resolve(&self, path: &str) -> Result<Option<Resolved>> {
        let what = || describe(path);
        let mut stack = vec![self.roots()?];
        let mut todo: Vec<OsString> = names(OsStr::new(path));
        let (mut symlinks, mut steps) = (0, 0);
        while let Some(name) = todo.pop() {
            steps += 1;
            if steps > MOST_STEPS {
                return Err(Error::invalid(format!("{}: the path is too long", what())));
            }
            if name == ".." {
                if stack.len() > 1 {
                    stack.pop();
                }
                continue;
            }
            let Some(dir) = stack.last() else { return Ok(None) };
            match look_up(dir, &name).context(what)? {
                Found::Nothing => return Ok(None),
                Found::Directory(merged) => stack.push(merged),
                Found::File(dir) if todo.is_empty() => return Ok(Some(Resolved::File(dir, name))),
                Found::File(_) => return Ok(None),
                Found::Symlink(target) => {
                    symlinks += 1;
                    if symlinks > MOST_SYMLINKS {
                        return Err(Error::invalid(format!("{}: more than {MOST_SYMLINKS} symlinks", what())));
                    }
                    if target.as_bytes().starts_with(b"/") {
                        stack.truncate(1);
                    }
                    todo.extend(names(&target));
                }
            }
        }
        Ok(stack.pop().map(Resolved::Directory))
    }

    fn roots(&self) -> Result<Merged> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        self.0
            .iter()
            .map(|l| rustix::fs::open(l, flags, Mode::empty()).context(|| format!("open the layer {}", l.display())))
            .collect()
    }
}

/// The names of a path, last first.
fn names(path: &OsStr) -> Vec<OsString> {
    let mut all: Vec<OsString> = Path::new(path)
        .components()
        .filter(|c| matches!(c, Component::Normal(_) | Component::ParentDir))
        .map(|c| c.as_os_str().to_os_string())
        .collect();
    all.reverse();
    all
}

/// One name in a merged directory.
fn look_up(dir: &Merged, name: &OsStr) -> rustix::io::Result<Found> {
    let mut merged = Merged::new();
    for layer in dir {
        let stat = match rustix::fs::statat(layer, name, AtFlags::SYMLINK_NOFOLLOW) {
            Ok(stat) => stat,
            Err(Errno::NOENT) => continue,
            Err(e) => return Err(e),
        };
        let kind = FileType::from_raw_mode(stat.st_mode);
        if kind == FileType::Directory {
            let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            let fd = rustix::fs::openat(layer, name, flags, Mode::empty())?;
            let opaque = is_opaque(&fd);
            merged.push(fd);
            if opaque {
                break;
            }
            continue;
        }
        let whiteout = kind == FileType::CharacterDevice && stat.st_rdev == 0;
        if whiteout || !merged.is_empty() {
            break;
        }
        return Ok(match kind {
            FileType::Symlink => {
                let target = rustix::fs::readlinkat(layer, name, Vec::new())?;
                Found::Symlink(OsString::from_vec(target.into_bytes()))
            }
            FileType::RegularFile => Found::File(layer.try_clone().map_err(|_| Errno::MFILE)?),
            _ => Found::Nothing,
        });
    }
    Ok(if merged.is_empty() { Found::Nothing } else { Found::Directory(merged) })
}

fn is_opaque(dir: &OwnedFd) -> bool {
    ["trusted.overlay.opaque", "user.overlay.opaque"].iter().any(|key| {
        let mut value = [0u8; 2];
        rustix::fs::fgetxattr(dir, *key, &mut value).is_ok_and(|n| &value[..n] == b"y")
    })
}

/// Opens the file, unless it turned into something else since it was looked at.
fn regular(dir: &OwnedFd, name: &OsStr) -> rustix::io::Result<Option<File>> {
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let fd = rustix::fs::openat(dir, name, flags, Mode::empty())?;
    let kind = FileType::from_raw_mode(rustix::fs::fstat(fd.as_fd())?.st_mode);
    Ok((kind == FileType::RegularFile).then(|| File::from(fd)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;
    use std::os::unix::fs::symlink;

    struct Layers(tempfile::TempDir);

    impl Layers {
        fn new() -> Self {
            let dir = tempfile::tempdir().unwrap();
            for layer in ["top", "mid", "low"] {
                std::fs::create_dir_all(dir.path().join(layer).join("etc")).unwrap();
            }
            Self(dir)
        }

        fn at(&self, path: &str) -> PathBuf {
            self.0.path().join(path)
        }

        fn put(&self, path: &str, text: &str) {
            std::fs::create_dir_all(self.at(path).parent().unwrap()).unwrap();
            std::fs::write(self.at(path), text).unwrap();
        }

        fn read(&self, path: &str) -> Option<String> {
            let root = LayeredRoot(["top", "mid", "low"].iter().map(|l| self.at(l)).collect());
            let mut text = String::new();
            root.open(path).unwrap()?.read_to_string(&mut text).unwrap();
            Some(text)
        }
    }

    fn whiteout(path: &Path) {
        let _ = std::fs::remove_dir_all(path);
        rustix::fs::mknodat(rustix::fs::CWD, path, FileType::CharacterDevice, Mode::empty(), 0).unwrap();
    }

    #[test]
    fn upper_layers_hide_lower_ones() {
        let l = Layers::new();
        l.put("low/etc/passwd", "low");
        l.put("low/etc/group", "low");
        l.put("mid/etc/passwd", "mid");
        assert_eq!(l.read("etc/passwd").as_deref(), Some("mid"));
        assert_eq!(l.read("/etc/group").as_deref(), Some("low"));
        assert_eq!(l.read("etc/shadow"), None);
        whiteout(&l.at("top/etc/passwd"));
        assert_eq!(l.read("etc/passwd"), None, "a whiteout hides the file");
        whiteout(&l.at("mid/etc"));
        assert_eq!(l.read("etc/group"), None, "a whiteout hides the directory");
    }

    #[test]
    fn cve_2025_31133_a_symlink_to_mount_on_is_refused_unless_it_is_hidden() {
        let l = Layers::new();
        let check =
            || LayeredRoot(["top", "mid", "low"].iter().map(|layer| l.at(layer)).collect()).check_mount_points();
        check().unwrap();
        std::os::unix::fs::symlink("/etc", l.at("low/dev")).unwrap();
        let e = check().unwrap_err().to_string();
        assert!(e.contains("/dev of the image is a symlink, to /etc"), "{e}");
        std::fs::create_dir(l.at("top/dev")).unwrap();
        check().unwrap();
        std::os::unix::fs::symlink("tmp", l.at("mid/proc")).unwrap();
        check().unwrap_err();
        whiteout(&l.at("top/proc"));
        check().unwrap();
    }

    #[test]
    fn opaque_directories_hide_those_below() {
        let l = Layers::new();
        l.put("low/etc/group", "low");
        let fd = File::open(l.at("mid/etc")).unwrap();
        let set = rustix::fs::fsetxattr(&fd, "trusted.overlay.opaque", b"y", rustix::fs::XattrFlags::empty());
        if set == Err(Errno::OPNOTSUPP) {
            return;
        }
        set.unwrap();
        assert_eq!(l.read("etc/group"), None);
    }

    #[test]
    fn symlinks_cross_layers_and_never_leave_the_root() {
        let l = Layers::new();
        l.put("low/usr/etc/passwd", "image");
        std::fs::remove_dir(l.at("top/etc")).unwrap();
        symlink("/../../usr/etc", l.at("top/etc")).unwrap();
        assert_eq!(l.read("etc/passwd").as_deref(), Some("image"));
        l.put("mid/a/b", "");
        symlink("../../../../../../../../etc/hostname", l.at("mid/a/up")).unwrap();
        assert_eq!(l.read("a/up"), None, "the host's file is out of reach");
        symlink("loop", l.at("mid/loop")).unwrap();
        let root = LayeredRoot(vec![l.at("mid")]);
        assert!(root.open("loop").unwrap_err().to_string().contains("symlinks"));
    }

    #[test]
    fn only_regular_files_are_opened() {
        let l = Layers::new();
        rustix::fs::mknodat(rustix::fs::CWD, l.at("top/etc/passwd"), FileType::Fifo, Mode::RUSR, 0).unwrap();
        assert_eq!(l.read("etc/passwd"), None);
        assert_eq!(l.read("etc"), None);
        l.put("low/file", "x");
        assert_eq!(l.read("file/below"), None);
    }

    #[test]
    fn sub_paths_are_found_layer_by_layer() {
        let l = Layers::new();
        l.put("low/etc/group", "low");
        l.put("mid/etc/passwd", "mid");
        l.put("low/usr/share/x", "x");
        symlink("/usr", l.at("mid/link")).unwrap();
        let root = LayeredRoot(["top", "mid", "low"].iter().map(|layer| l.at(layer)).collect());
        let real = |path: &str| l.at(path).canonicalize().unwrap();
        assert_eq!(root.at("").unwrap(), [real("top"), real("mid"), real("low")]);
        assert_eq!(root.at("etc/").unwrap(), [real("top/etc"), real("mid/etc"), real("low/etc")]);
        assert_eq!(root.at("link/share").unwrap(), [real("low/usr/share")]);
        assert_eq!(root.at("etc/group").unwrap(), [real("low/etc/group")]);
        for bad in ["/etc", "../x", "etc/../etc", "not-existing", "etc/group/x"] {
            assert_eq!(root.at(bad).unwrap_err().kind(), types::ErrorKind::InvalidArgument, "{bad}");
        }
    }

    #[test]
    fn overlay_options_give_the_layers() {
        let root = LayeredRoot::from_overlay(&["index=off", "lowerdir=/a\\:b:/c::/d", "upperdir=/u", "workdir=/w"]);
        assert_eq!(root.0, ["/u", "/a:b", "/c", "/d"].map(PathBuf::from));
    }
}
