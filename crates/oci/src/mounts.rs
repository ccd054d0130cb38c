//! The root file system's mounts, stacked on `<bundle>/rootfs` before the runtime's
//! create and taken off again after its delete.

use crate::idmap::{self, Lowers};
use rustix::fd::{AsFd, AsRawFd, OwnedFd};
use rustix::io::Errno;
use rustix::mount::{MountFlags, MountPropagationFlags, UnmountFlags, mount, mount_bind, mount_bind_recursive};
use rustix::mount::{mount_change, mount_remount, unmount};
use std::ffi::CString;
use std::path::{Path, PathBuf};
use types::{Error, Result, ResultExt};

/// One mount, as `mount(8)` would be told.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mount {
    /// "overlay", "bind", …
    pub kind: String,
    /// The source; "overlay" for an overlay.
    pub source: String,
    /// A directory of the root file system, where it isn't the root itself; as it is
    /// seen from inside.
    pub target: String,
    /// Options, as in fstab.
    pub options: Vec<String>,
}

/// The kernel takes one page of mount data.
const PAGE: usize = 4096;

/// One mount with its options sorted out.
#[derive(Debug, PartialEq, Eq)]
struct Plan {
    flags: MountFlags,
    bind: Option<bool>,
    propagation: Option<MountPropagationFlags>,
    data: Vec<String>,
    /// The source is a file, to be reached through a loop device.
    looped: bool,
}

fn plan(options: &[String]) -> Plan {
    let mut p = Plan { flags: MountFlags::empty(), bind: None, propagation: None, data: Vec::new(), looped: false };
    for o in options {
        let (flag, on) = match o.as_str() {
            "defaults" | "loud" => continue,
            "ro" => (MountFlags::RDONLY, true),
            "rw" => (MountFlags::RDONLY, false),
            "nosuid" => (MountFlags::NOSUID, true),
            "suid" => (MountFlags::NOSUID, false),
            "nodev" => (MountFlags::NODEV, true),
            "dev" => (MountFlags::NODEV, false),
            "noexec" => (MountFlags::NOEXEC, true),
            "exec" => (MountFlags::NOEXEC, false),
            "sync" => (MountFlags::SYNCHRONOUS, true),
            "async" => (MountFlags::SYNCHRONOUS, false),
            "dirsync" => (MountFlags::DIRSYNC, true),
            "noatime" => (MountFlags::NOATIME, true),
            "atime" => (MountFlags::NOATIME, false),
            "nodiratime" => (MountFlags::NODIRATIME, true),
            "diratime" => (MountFlags::NODIRATIME, false),
            "relatime" => (MountFlags::RELATIME, true),
            "norelatime" => (MountFlags::RELATIME, false),
            "strictatime" => (MountFlags::STRICTATIME, true),
            "nostrictatime" => (MountFlags::STRICTATIME, false),
            "bind" => {
                p.bind.get_or_insert(false);
                continue;
            }
            "rbind" => {
                p.bind = Some(true);
                continue;
            }
            "private" => {
                p.propagation = Some(MountPropagationFlags::PRIVATE);
                continue;
            }
            "rprivate" => {
                p.propagation = Some(MountPropagationFlags::PRIVATE | MountPropagationFlags::REC);
                continue;
            }
            "slave" => {
                p.propagation = Some(MountPropagationFlags::DOWNSTREAM);
                continue;
            }
            "rslave" => {
                p.propagation = Some(MountPropagationFlags::DOWNSTREAM | MountPropagationFlags::REC);
                continue;
            }
            "shared" => {
                p.propagation = Some(MountPropagationFlags::SHARED);
                continue;
            }
            "rshared" => {
                p.propagation = Some(MountPropagationFlags::SHARED | MountPropagationFlags::REC);
                continue;
            }
            "loop" => {
                p.looped = true;
                continue;
            }
            _ => {
                p.data.push(o.clone());
                continue;
            }
        };
        p.flags.set(flag, on);
    }
    p
}

/// Mounts `mounts` one upon the other on `root`; on a failure those that
/// succeeded are taken off again.
///
/// # Errors
/// Naming the mount that failed.
pub fn mount_rootfs(root: &Path, mounts: &[Mount]) -> Result<()> {
    if mounts.is_empty() {
        return Ok(());
    }
    std::fs::create_dir_all(root).context(|| format!("make {}", root.display()))?;
    for (done, m) in mounts.iter().enumerate() {
        if let Err(e) = mount_one(root, m) {
            let mut errors = vec![e];
            errors.extend(unmount_rootfs(root, stacked(&mounts[..done])).err());
            return Error::join("mount the root file system", errors);
        }
    }
    Ok(())
}

/// How many of these are stacked on the root itself; the others lie on those and go
/// with them.
pub fn stacked(mounts: &[Mount]) -> usize {
    mounts.iter().filter(|m| m.target.trim_matches('/').is_empty()).count()
}

/// Where a mount goes: the root, or a directory inside, which no symlink of the image
/// can lead out of. The descriptor keeps the path good.
fn place(root: &Path, target: &str) -> Result<(PathBuf, Option<OwnedFd>)> {
    use rustix::fs::{Mode, OFlags, ResolveFlags, open, openat2};
    if target.trim_matches('/').is_empty() {
        return Ok((root.to_path_buf(), None));
    }
    let what = || format!("find {target} in {}", root.display());
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let top = open(root, flags, Mode::empty()).context(what)?;
    let found = openat2(&top, target, flags, Mode::empty(), ResolveFlags::IN_ROOT).context(what)?;
    Ok((PathBuf::from(format!("/proc/self/fd/{}", found.as_raw_fd())), Some(found)))
}

fn mount_one(rootfs: &Path, m: &Mount) -> Result<()> {
    let (root, _held) = place(rootfs, &m.target)?;
    let root = root.as_path();
    let what =
        || format!("mount {} {} on {}", m.kind, m.source, rootfs.join(m.target.trim_start_matches('/')).display());
    let mut options = m.options.clone();
    let namespace = match idmap::take(&mut options).map_err(|e| e.within(what()))? {
        Some(mapping) => Some(mapping.namespace().map_err(|e| e.within(what()))?),
        None => None,
    };
    // Held until the overlay holds them itself.
    let _lowers = match &namespace {
        Some(namespace) if m.kind == "overlay" => {
            Some(map_lowers(rootfs, &mut options, namespace).map_err(|e| e.within(what()))?)
        }
        _ => None,
    };
    let p = plan(&options);
    if p.data.iter().any(|o| o.starts_with("X-") || o.starts_with("x-")) {
        return Err(Error::unimplemented(format!("{}: option {:?} is not served", what(), p.data)));
    }
    let bind = p.bind.is_some() || m.kind == "bind";
    if bind {
        match &namespace {
            Some(namespace) => sys::mount::bind_idmapped(Path::new(&m.source), root, namespace.as_fd())?,
            None if p.bind == Some(true) => mount_bind_recursive(&m.source, root).context(what)?,
            None => mount_bind(&m.source, root).context(what)?,
        }
    } else {
        // The mount holds the device, which frees itself with its last user.
        let device = match p.looped {
            true => Some(sys::loopdev::attach(Path::new(&m.source), p.flags.contains(MountFlags::RDONLY))?),
            false => None,
        };
        let source = device.as_ref().map_or_else(|| m.source.clone(), |d| d.path().display().to_string());
        let (dir, data) = shorten(&m.kind, &p.data);
        let data = CString::new(data).context(|| format!("{}: its options have a zero byte", what()))?;
        let (kind, flags, target) = (m.kind.clone(), p.flags, root.to_path_buf());
        let make = move || mount(source.as_str(), &target, kind.as_str(), flags, data.as_c_str());
        match dir {
            None => make().context(what)?,
            // Lower layers by names relative to a directory: only a thread of its
            // own may change into it.
            Some(dir) => std::thread::spawn(move || {
                sys::process::enter_directory_on_this_thread(&dir)?;
                make().map_err(std::io::Error::from)
            })
            .join()
            .map_err(|_| Error::internal(what()))?
            .context(what)?,
        }
    }
    // The descriptor is below the mount: found anew, it is the mount itself.
    let (mounted, held) = place(rootfs, &m.target)?;
    or_unmount(&mounted, held.is_some(), || {
        if bind && !p.flags.is_empty() {
            mount_remount(&mounted, p.flags | MountFlags::BIND, c"").context(what)?;
        }
        match p.propagation {
            Some(propagation) => mount_change(&mounted, propagation).context(what),
            None => Ok(()),
        }
    })
}

/// Takes a mount off again if what is still to be done to it fails: nobody else knows of it.
/// `through`: the path is a link to it, by a descriptor of ours.
fn or_unmount(mounted: &Path, through: bool, then: impl FnOnce() -> Result<()>) -> Result<()> {
    let Err(e) = then() else { return Ok(()) };
    let follow = if through { UnmountFlags::empty() } else { UnmountFlags::NOFOLLOW };
    match unmount(mounted, UnmountFlags::DETACH | follow) {
        Ok(()) => Err(e),
        Err(left) => Err(e.hint(format!("and it could not be taken off again: {left}"))),
    }
}

/// Puts mapped layers in the place of an overlay's lower ones. The upper one is
/// the container's own: its owners are right as they are.
fn map_lowers(root: &Path, options: &mut [String], namespace: &OwnedFd) -> Result<Lowers> {
    let lower = options
        .iter_mut()
        .find(|o| o.starts_with("lowerdir="))
        .ok_or_else(|| Error::invalid("an overlay without lowerdir can't be mapped"))?;
    let layers: Vec<&str> = lower["lowerdir=".len()..].split(':').collect();
    let lowers = Lowers::bind(root.parent().unwrap_or(root), &layers, namespace)?;
    *lower = format!("lowerdir={}", lowers.paths().join(":"));
    Ok(lowers)
}

/// Does any of the mounts need a user namespace, and so a process, to be made?
pub fn are_mapped(mounts: &[Mount]) -> bool {
    mounts.iter().any(|m| idmap::asked(&m.options))
}

/// Joins mount data. An overlay with so many layers that the data exceeds a page
/// gets them relative to their common directory, which is returned.
fn shorten(kind: &str, options: &[String]) -> (Option<PathBuf>, String) {
    let joined = options.join(",");
    if kind != "overlay" || joined.len() < PAGE {
        return (None, joined);
    }
    let Some(lower) = options.iter().find_map(|o| o.strip_prefix("lowerdir=")) else { return (None, joined) };
    let layers: Vec<&str> = lower.split(':').collect();
    let first = layers[0];
    let common = layers
        .iter()
        .fold(first.len(), |n, l| first.bytes().zip(l.bytes()).take(n).take_while(|(a, b)| a == b).count());
    let Some(slash) = first[..common].rfind('/').filter(|n| *n > 0) else { return (None, joined) };
    let relative: Vec<&str> = layers.iter().map(|l| &l[slash + 1..]).collect();
    let lower = format!("lowerdir={}", relative.join(":"));
    let options: Vec<&str> =
        options.iter().map(|o| if o.starts_with("lowerdir=") { lower.as_str() } else { o.as_str() }).collect();
    (Some(PathBuf::from(&first[..slash])), options.join(","))
}

/// Takes up to `count` mounts off `root`; none there is no error.
///
/// # Errors
/// Those of umount, but for "nothing is mounted there".
pub fn unmount_rootfs(root: &Path, count: usize) -> Result<()> {
    for _ in 0..count {
        match unmount(root, UnmountFlags::DETACH | UnmountFlags::NOFOLLOW) {
            Ok(()) => {}
            Err(Errno::INVAL | Errno::NOENT) => break,
            Err(e) => return Err(e).context(|| format!("unmount {}", root.display())),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn options(o: &[&str]) -> Vec<String> {
        o.iter().map(ToString::to_string).collect()
    }

    fn bind_mount(source: &str, target: &str) -> Mount {
        let options = options(&["rbind", "ro"]);
        Mount { kind: "bind".into(), source: source.into(), target: target.into(), options }
    }

    #[test]
    fn a_target_inside_is_found_and_never_outside() {
        let (base, more, outside) =
            (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        std::fs::create_dir_all(base.path().join("srv/data")).unwrap();
        std::fs::create_dir_all(base.path().join(outside.path().strip_prefix("/").unwrap())).unwrap();
        std::os::unix::fs::symlink(outside.path(), base.path().join("link")).unwrap();
        std::fs::write(more.path().join("more"), "").unwrap();
        let root = outside.path().join("rootfs");
        let (base_path, more_path) = (base.path().to_str().unwrap(), more.path().to_str().unwrap());
        let all = [bind_mount(base_path, ""), bind_mount(more_path, "/srv/data"), bind_mount(more_path, "link")];
        assert_eq!(stacked(&all), 1);
        mount_rootfs(&root, &all).unwrap();
        assert!(root.join("srv/data/more").exists());
        assert!(!outside.path().join("more").exists(), "the link is followed inside");
        assert!(root.join(outside.path().strip_prefix("/").unwrap()).join("more").exists());
        unmount_rootfs(&root, stacked(&all)).unwrap();
        assert_eq!(std::fs::read_dir(&root).unwrap().count(), 0);
        let e = mount_rootfs(&root, &[bind_mount(base_path, ""), bind_mount(more_path, "/none")]).unwrap_err();
        assert!(e.to_string().contains("/none"), "{e}");
        assert_eq!(unmount(&root, UnmountFlags::DETACH), Err(Errno::INVAL));
    }

    #[test]
    fn a_file_is_mounted_through_a_loop_device_that_frees_itself() {
        let dir = tempfile::tempdir().unwrap();
        let image = dir.path().join("image");
        std::fs::File::create(&image).unwrap().set_len(4 << 20).unwrap();
        let made = std::process::Command::new("mkfs.ext4").arg("-q").arg(&image).status();
        if !made.is_ok_and(|s| s.success()) || !Path::new("/dev/loop-control").exists() {
            eprintln!("skipped: no mkfs.ext4, or no loop devices");
            return;
        }
        let root = dir.path().join("rootfs");
        let m = Mount {
            kind: "ext4".into(),
            source: image.display().to_string(),
            target: String::new(),
            options: options(&["loop", "ro"]),
        };
        mount_rootfs(&root, std::slice::from_ref(&m)).unwrap();
        assert!(root.join("lost+found").is_dir());
        let backed = || {
            std::fs::read_dir("/sys/block").unwrap().flatten().any(|d| {
                let file = std::fs::read_to_string(d.path().join("loop/backing_file")).unwrap_or_default();
                file.trim() == image.to_str().unwrap()
            })
        };
        assert!(backed());
        unmount_rootfs(&root, 1).unwrap();
        for _ in 0..6000 {
            if !backed() {
                return;
            }
            std::thread::sleep(std::time::Duration::from_millis(10));
        }
        panic!("the loop device is left");
    }

    #[test]
    fn flags_and_data_are_told_apart() {
        let p = plan(&options(&["ro", "rbind", "nosuid", "rprivate", "size=1m"]));
        assert_eq!(p.flags, MountFlags::RDONLY | MountFlags::NOSUID);
        assert_eq!(p.bind, Some(true));
        assert_eq!(p.data, ["size=1m"]);
        assert!(p.propagation.is_some());
    }

    #[test]
    fn many_layers_become_relative() {
        let layers: Vec<String> = (0..200).map(|n| format!("/var/lib/some/where/snapshots/{n}/fs")).collect();
        let o = vec![format!("lowerdir={}", layers.join(":")), "upperdir=/u".into()];
        let (dir, data) = shorten("overlay", &o);
        assert_eq!(dir.unwrap(), Path::new("/var/lib/some/where/snapshots"));
        assert!(data.starts_with("lowerdir=0/fs:1/fs:") && data.ends_with(",upperdir=/u") && data.len() < PAGE);
        assert_eq!(shorten("overlay", &options(&["lowerdir=/a:/b"])), (None, "lowerdir=/a:/b".into()));
    }

    #[test]
    fn an_overlay_of_many_layers_is_mounted_and_taken_off() {
        let dir = tempfile::tempdir().unwrap();
        let long = "x".repeat(60);
        let layers: Vec<String> = (0..100)
            .map(|n| {
                let d = dir.path().join(&long).join(n.to_string());
                std::fs::create_dir_all(&d).unwrap();
                std::fs::write(d.join(format!("f{n}")), "").unwrap();
                d.display().to_string()
            })
            .collect();
        let root = dir.path().join("rootfs");
        let m = Mount {
            kind: "overlay".into(),
            source: "overlay".into(),
            target: String::new(),
            options: vec![format!("lowerdir={}", layers.join(":"))],
        };
        mount_rootfs(&root, &[m]).unwrap();
        assert_eq!(std::fs::read_dir(&root).unwrap().count(), 100);
        unmount_rootfs(&root, 5).unwrap();
        assert_eq!(std::fs::read_dir(&root).unwrap().count(), 0);
    }

    #[test]
    fn a_mount_whose_second_step_fails_is_taken_off() {
        let (dir, source) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let root = dir.path().join("rootfs");
        std::fs::create_dir_all(source.path().join("inside")).unwrap();
        for target in ["", "inside"] {
            let all = [bind_mount(source.path().to_str().unwrap(), ""), bind_mount("/proc", target)];
            mount_rootfs(&root, &all).unwrap();
            let (mounted, held) = place(&root, target).unwrap();
            let e = or_unmount(&mounted, held.is_some(), || Err(Error::internal("second step"))).unwrap_err();
            assert!(e.to_string().ends_with("second step"), "{e}");
            assert!(root.join("inside").is_dir() && !root.join(target).join("self").exists(), "{target:?}");
            unmount_rootfs(&root, 2).unwrap();
        }
        assert_eq!(unmount(&root, UnmountFlags::DETACH), Err(Errno::INVAL));
    }

    #[test]
    fn a_failed_mount_leaves_none() {
        let dir = tempfile::tempdir().unwrap();
        let bind = |source: &str| bind_mount(source, "");
        let source = tempfile::tempdir().unwrap();
        let root = dir.path().join("rootfs");
        let e = mount_rootfs(&root, &[bind(source.path().to_str().unwrap()), bind("/nonexistent")]).unwrap_err();
        assert!(e.to_string().contains("/nonexistent"), "{e}");
        assert_eq!(unmount(&root, UnmountFlags::DETACH), Err(Errno::INVAL));
    }
}
