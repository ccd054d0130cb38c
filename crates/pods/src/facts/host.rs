//! What one container's configuration names on the host: devices, mount sources,
//! a seccomp profile.

use super::{Look, mountinfo};
use proto::cri;
use spec::{HostDevice, HostFacts};
use std::io::Read;
use std::os::unix::fs::{DirBuilderExt, FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use types::{Error, ErrorKind, Result, ResultExt};

/// The largest seccomp profile that is read, in bytes.
const LARGEST_PROFILE: u64 = 4 << 20;
/// The deepest directory below a device directory, and the most devices in one.
const DEEPEST: usize = 8;
const MOST_DEVICES: usize = 16_384;
/// Parts of /dev that a container has of its own.
const OWN_DIRECTORIES: [&str; 7] = ["pts", "shm", "fd", "mqueue", ".lxc", ".lxd-mounts", ".udev"];
const OWN_DEVICES: [&str; 2] = ["console", "ptmx"];

/// Looks at the host paths of a container's devices and propagating mounts, and at
/// all of /dev if it is privileged. What isn't there is left out; `spec` says so.
///
/// # Errors
/// A directory that can't be read, or one with more devices than is sensible.
pub fn host_facts(config: &cri::ContainerConfig, look: &Look) -> Result<HostFacts> {
    let mut facts = HostFacts::default();
    for device in &config.devices {
        let path = Path::new(&device.host_path);
        facts.devices.insert(device.host_path.clone(), look.at(path, || devices_at(path, &[], &[]))??);
    }
    let privileged = config.linux.as_ref().and_then(|l| l.security_context.as_ref()).is_some_and(|s| s.privileged);
    if privileged {
        facts.all_devices = devices_at(Path::new("/dev"), &OWN_DIRECTORIES, &OWN_DEVICES)?;
    }
    let private = cri::MountPropagation::PropagationPrivate as i32;
    let propagating: Vec<&cri::Mount> =
        config.mounts.iter().filter(|m| m.propagation != private && !m.host_path.is_empty()).collect();
    if !propagating.is_empty() {
        let mounts = mountinfo::read()?;
        for m in propagating {
            let path = Path::new(&m.host_path);
            if let Some(carrier) = mountinfo::carrier(&mounts, &look.at(path, || existing(path))?) {
                facts.propagation.insert(m.host_path.clone(), carrier.propagation);
            }
        }
    }
    Ok(facts)
}

/// The real path of `path`, or of its nearest ancestor that exists.
fn existing(path: &Path) -> PathBuf {
    path.ancestors().find_map(|p| p.canonicalize().ok()).unwrap_or_else(|| PathBuf::from("/"))
}

/// The device at `path`, or all below it. A device that vanishes meanwhile is left
/// out: hot-plugging is nobody's fault.
fn devices_at(path: &Path, skip_directories: &[&str], skip: &[&str]) -> Result<Vec<HostDevice>> {
    let Ok(metadata) = std::fs::metadata(path) else { return Ok(Vec::new()) };
    if !metadata.is_dir() {
        return Ok(device(path, &metadata).into_iter().collect());
    }
    let mut found = Vec::new();
    let mut todo = vec![(path.to_path_buf(), 0)];
    while let Some((dir, depth)) = todo.pop() {
        let entries = std::fs::read_dir(&dir).context(|| format!("read the devices of {}", dir.display()))?;
        for entry in entries.flatten() {
            let name = entry.file_name();
            let listed = |list: &[&str]| depth == 0 && list.iter().any(|s| name == *s);
            let Ok(metadata) = entry.path().symlink_metadata() else { continue };
            if metadata.is_dir() {
                if depth < DEEPEST && !listed(skip_directories) {
                    todo.push((entry.path(), depth + 1));
                }
            } else if !listed(skip) {
                found.extend(device(&entry.path(), &metadata));
            }
        }
        if found.len() > MOST_DEVICES {
            return Err(Error::invalid(format!("{} holds more than {MOST_DEVICES} devices", path.display())));
        }
    }
    found.sort_by(|a, b| a.path.cmp(&b.path));
    Ok(found)
}

fn device(path: &Path, metadata: &std::fs::Metadata) -> Option<HostDevice> {
    let kind = metadata.file_type();
    if !kind.is_char_device() && !kind.is_block_device() {
        return None;
    }
    Some(HostDevice {
        path: path.to_path_buf(),
        block: kind.is_block_device(),
        major: rustix::fs::major(metadata.rdev()),
        minor: rustix::fs::minor(metadata.rdev()),
        mode: metadata.mode() & 0o7777,
        uid: metadata.uid(),
        gid: metadata.gid(),
    })
}

/// Makes the host paths that don't exist, as directories with mode 0755
/// (behaviours.md section 6).
///
/// # Errors
/// The first that can't be made or looked at, a dangling symlink among them.
pub fn make_missing(paths: &[PathBuf], look: &Look) -> Result<()> {
    paths.iter().try_for_each(|path| look.at(path, || make_one(path))?)
}

fn make_one(path: &Path) -> Result<()> {
    match std::fs::metadata(path) {
        Ok(_) => Ok(()),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => std::fs::DirBuilder::new()
            .recursive(true)
            .mode(0o755)
            .create(path)
            .or_else(|e| unusable(e, || format!("make the host path {} of a mount", path.display()))),
        Err(e) => unusable(e, || format!("look at the host path {} of a mount", path.display())),
    }
}

/// What is in the way of a host path is the configuration's fault; a full or
/// failing disk isn't.
fn unusable(e: std::io::Error, what: impl FnOnce() -> String) -> Result<()> {
    use std::io::ErrorKind::{AlreadyExists, NotADirectory, NotFound};
    match e.kind() {
        AlreadyExists | NotADirectory | NotFound => Err(e).context_kind(ErrorKind::InvalidArgument, what),
        _ => Err(e).context(what),
    }
}

/// Reads a localhost seccomp profile.
///
/// # Errors
/// `InvalidArgument` for a file that isn't there, is no regular file, is too large
/// or no text.
pub fn read_profile(path: &Path) -> Result<String> {
    let invalid = |why: &str| Error::invalid(format!("seccomp: profile {}: {why}", path.display()));
    // Looked at before it is opened: a FIFO would hold the open for ever.
    let metadata = std::fs::metadata(path).map_err(|e| invalid("can't be read").because(e))?;
    if !metadata.is_file() {
        return Err(invalid("is no regular file"));
    }
    let file = std::fs::File::open(path).map_err(|e| invalid("can't be opened").because(e))?;
    let mut text = String::new();
    file.take(LARGEST_PROFILE + 1).read_to_string(&mut text).map_err(|e| invalid("can't be read").because(e))?;
    if text.len() as u64 > LARGEST_PROFILE {
        return Err(invalid("is larger than 4 MiB"));
    }
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_of_the_host_are_found() {
        let device = |host_path: &str| cri::Device { host_path: host_path.into(), ..Default::default() };
        let config = cri::ContainerConfig {
            devices: vec![device("/dev/null"), device("/dev/pts"), device("/no/such"), device("/etc/passwd")],
            linux: Some(cri::LinuxContainerConfig {
                security_context: Some(cri::LinuxContainerSecurityContext { privileged: true, ..Default::default() }),
                ..Default::default()
            }),
            mounts: vec![cri::Mount {
                host_path: "/no/such/dir".into(),
                propagation: cri::MountPropagation::PropagationBidirectional as i32,
                ..Default::default()
            }],
            ..Default::default()
        };
        let facts = host_facts(&config, &Look::here()).unwrap();
        let null = &facts.devices["/dev/null"][0];
        assert_eq!((null.block, null.major, null.minor), (false, 1, 3));
        assert!(facts.devices["/no/such"].is_empty() && facts.devices["/etc/passwd"].is_empty());
        assert!(facts.all_devices.iter().any(|d| d.path == Path::new("/dev/null")));
        assert!(!facts.all_devices.iter().any(|d| d.path.starts_with("/dev/pts") || d.path.ends_with("ptmx")));
        assert!(facts.propagation.contains_key("/no/such/dir"));
    }

    #[test]
    fn missing_host_paths_become_directories() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("file");
        std::fs::write(&file, "x").unwrap();
        let missing = dir.path().join("a/b");
        make_missing(&[file.clone(), missing.clone()], &Look::here()).unwrap();
        assert!(missing.is_dir() && file.is_file());
        assert_eq!(missing.metadata().unwrap().mode() & 0o7000, 0);
        let dangling = dir.path().join("dangling");
        std::os::unix::fs::symlink("/no/such/target", &dangling).unwrap();
        for in_the_way in [file.join("below"), dangling] {
            assert_eq!(make_missing(&[in_the_way], &Look::here()).unwrap_err().kind(), ErrorKind::InvalidArgument);
        }
    }

    #[test]
    fn profiles_are_read_bounded() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("p.json");
        std::fs::write(&path, "{}").unwrap();
        assert_eq!(read_profile(&path).unwrap(), "{}");
        for bad in [dir.path(), Path::new("/dev/zero"), Path::new("/no/such")] {
            assert_eq!(read_profile(bad).unwrap_err().kind(), types::ErrorKind::InvalidArgument);
        }
    }
}
