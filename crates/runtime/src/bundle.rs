//! Bundles on disk.
//!
//! ```text
//! <state>/                          0711
//!   events/sock.ttrpc               where foreign shims send events; 0600 in 0700
//!   bundles/                        0711
//!     <pod>/                        0700, or 0710 with the group of its mapped root
//!       config.json                 the sandbox annotations only
//!       handler.json                with which shim and OCI runtime it was begun
//!       bootstrap.json              how to reach the shim, 0600
//!       sandbox                     of a handler with the sandbox API: it was started
//!       address, log                the shim's: its socket's address, its log FIFO
//!       tasks/<container>/
//!         config.json rootfs/       the OCI bundle
//!         exit.json                 the death certificate, written before it is told
//!         condemned                 it counts as never made, and is being undone
//!         io.json out err           a foreign shim's FIFOs, and where they are logged
//!         execs/<exec>/{out,err}    FIFOs of a running ExecSync; a marker, too:
//!                                   what stands here after a restart is killed
//! ```

use crate::PodSpec;
use rustix::fs::{AtFlags, CWD, FileType, Mode};
use rustix::mount::UnmountFlags;
use std::fs;
use std::io::Write;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use types::{Certificate, Error, ErrorKind, Result, ResultExt};

/// The file in a task's bundle that says that it counts as never made.
const CONDEMNED: &str = "condemned";

/// Where everything lies.
#[derive(Debug, Clone)]
pub(crate) struct Layout {
    state: PathBuf,
}

impl Layout {
    pub(crate) fn new(state: PathBuf) -> Self {
        Self { state }
    }

    pub(crate) fn events(&self) -> PathBuf {
        self.state.join("events/sock")
    }

    pub(crate) fn bundles(&self) -> PathBuf {
        self.state.join("bundles")
    }

    pub(crate) fn pod(&self, pod: &str) -> PathBuf {
        self.bundles().join(pod)
    }

    pub(crate) fn tasks(&self, pod: &str) -> PathBuf {
        self.pod(pod).join("tasks")
    }

    pub(crate) fn task(&self, pod: &str, id: &str) -> PathBuf {
        self.tasks(pod).join(id)
    }

    pub(crate) fn exec(&self, pod: &str, id: &str, exec: &str) -> PathBuf {
        self.task(pod, id).join("execs").join(exec)
    }

    /// Makes the directories that all pods share. Their way must be passable for
    /// the mapped root of a user-namespaced pod, so they are 0711; what lies
    /// below is closed.
    pub(crate) fn prepare(&self) -> Result<()> {
        for dir in [self.state.clone(), self.bundles()] {
            fs::DirBuilder::new()
                .recursive(true)
                .mode(0o711)
                .create(&dir)
                .context(|| format!("create {}", dir.display()))?;
        }
        let dir = self.bundles();
        fs::set_permissions(&dir, fs::Permissions::from_mode(0o711)).context(|| format!("chmod {}", dir.display()))
    }
}

/// Runs file work where it may block.
pub(crate) async fn blocking<T: Send + 'static>(work: impl FnOnce() -> Result<T> + Send + 'static) -> Result<T> {
    match tokio::task::spawn_blocking(work).await {
        Ok(r) => r,
        Err(e) => Err(Error::internal("file work ended early").because(e)),
    }
}

/// A directory that is closed to all but root, or to all but root and one group
/// that may pass through it.
fn closed_dir(path: &Path, gid: Option<u32>) -> Result<()> {
    match fs::DirBuilder::new().mode(0o700).create(path) {
        Ok(()) => {}
        Err(e) if e.kind() == std::io::ErrorKind::AlreadyExists => {}
        Err(e) => return Err(e).context(|| format!("create bundle {}", path.display())),
    }
    if let Some(gid) = gid {
        std::os::unix::fs::chown(path, None, Some(gid))
            .context(|| format!("chown {} to group {gid}", path.display()))?;
        fs::set_permissions(path, fs::Permissions::from_mode(0o710))
            .context(|| format!("chmod {} to 0710", path.display()))?;
    }
    Ok(())
}

/// Writes a file at once or not at all, 0600.
pub(crate) fn write_atomic(path: &Path, text: &[u8]) -> Result<()> {
    let mut tmp = path.as_os_str().to_owned();
    tmp.push(".tmp");
    let tmp = PathBuf::from(tmp);
    let written = fs::OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(&tmp)
        .and_then(|mut f| f.write_all(text))
        .and_then(|()| fs::rename(&tmp, path));
    if written.is_err() {
        let _ = fs::remove_file(&tmp);
    }
    written.context(|| format!("write {}", path.display()))
}

/// A FIFO, 0600; one that is there already is taken.
pub(crate) fn make_fifo(path: &Path) -> Result<()> {
    match rustix::fs::mknodat(CWD, path, FileType::Fifo, Mode::RUSR | Mode::WUSR, 0) {
        Ok(()) | Err(rustix::io::Errno::EXIST) => Ok(()),
        Err(e) => Err(e).context(|| format!("create FIFO {}", path.display())),
    }
}

/// The directories of a pod that has no process of its own.
pub(crate) fn make_plain_pod(dir: &Path, gid: Option<u32>) -> Result<()> {
    closed_dir(dir, gid)?;
    closed_dir(&dir.join("tasks"), gid)
}

/// Makes the pod's bundle.
pub(crate) fn make_pod(dir: &Path, spec: &PodSpec) -> Result<()> {
    make_plain_pod(dir, spec.bundle_gid)?;
    let config = serde_json::json!({ "ociVersion": "1.0.2", "annotations": spec.annotations });
    write_atomic(&dir.join("config.json"), config.to_string().as_bytes())?;
    make_fifo(&dir.join("log"))
}

/// Makes a container's bundle; what a failed attempt left there goes first.
pub(crate) fn make_task(dir: &Path, gid: Option<u32>, config_json: &str) -> Result<()> {
    if dir.exists() {
        remove_task(dir)?;
    }
    closed_dir(dir, gid)?;
    // 0711: a task without a mapped root may still run as another uid.
    let rootfs = dir.join("rootfs");
    fs::DirBuilder::new().mode(0o711).create(&rootfs).context(|| format!("create {}", rootfs.display()))?;
    closed_dir(&dir.join("execs"), None)?;
    write_atomic(&dir.join("config.json"), config_json.as_bytes())
}

/// Notes that the task in this bundle counts as never made. No bundle is none.
pub(crate) fn condemn(dir: &Path) -> Result<()> {
    let path = dir.join(CONDEMNED);
    match fs::OpenOptions::new().create(true).append(true).mode(0o600).open(&path) {
        Ok(_) => Ok(()),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(()),
        Err(e) => Err(e).context(|| format!("write {}", path.display())),
    }
}

/// Whether the task in this bundle counts as never made.
pub(crate) fn is_condemned(dir: &Path) -> bool {
    dir.join(CONDEMNED).exists()
}

/// Unmounts whatever is mounted on the bundle's rootfs, all layers of it.
pub(crate) fn unmount_rootfs(dir: &Path) -> Result<()> {
    let rootfs = dir.join("rootfs");
    // Each round takes one mount off; so many are never stacked there.
    for _ in 0..64 {
        match rustix::mount::unmount(&rootfs, UnmountFlags::DETACH | UnmountFlags::NOFOLLOW) {
            Ok(()) => {}
            Err(rustix::io::Errno::INVAL | rustix::io::Errno::NOENT) => return Ok(()),
            Err(e) => return Err(e).context(|| format!("unmount {}", rootfs.display())),
        }
    }
    Err(Error::internal(format!("unmount {}: there is always one more mount", rootfs.display())))
}

/// Takes away the mount points that a runtime has made in a root file system whose
/// mount was gone already: empty directories and empty files. Anything else is nobody's
/// to remove, and stays.
fn remove_mount_points(rootfs: &Path) -> Result<()> {
    fn clear(dir: &Path, device: u64) -> std::io::Result<()> {
        for entry in fs::read_dir(dir)? {
            let path = entry?.path();
            let meta = path.symlink_metadata()?;
            if meta.dev() != device {
                continue;
            }
            if meta.is_dir() {
                clear(&path, device)?;
                // One that is not empty shows when the root is removed.
                let _ = fs::remove_dir(&path);
            } else if meta.is_file() && meta.len() == 0 {
                fs::remove_file(&path)?;
            }
        }
        Ok(())
    }
    let what = || format!("remove the mount points in {}", rootfs.display());
    if !sys::mount::mounts_below(rootfs)?.is_empty() {
        return Err(Error::internal(format!("{}: something is mounted there", what())));
    }
    let device = rootfs.symlink_metadata().context(what)?.dev();
    clear(rootfs, device).context(what)
}

/// Removes a container's bundle, its mounts first: nothing is ever removed
/// through a mount. The certificate goes before what says that it counts for nothing.
pub(crate) fn remove_task(dir: &Path) -> Result<()> {
    unmount_rootfs(dir)?;
    let rootfs = dir.join("rootfs");
    let removed = match fs::remove_dir(&rootfs) {
        Err(e) if e.kind() == std::io::ErrorKind::DirectoryNotEmpty => {
            remove_mount_points(&rootfs)?;
            fs::remove_dir(&rootfs)
        }
        other => other,
    };
    match removed {
        Ok(()) => {}
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => {}
        Err(e) => return Err(e).context(|| format!("remove {}", rootfs.display())),
    }
    let exit = dir.join("exit.json");
    match fs::remove_file(&exit) {
        Ok(()) => {}
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => {}
        Err(e) => return Err(e).context(|| format!("remove {}", exit.display())),
    }
    remove_tree(dir)
}

/// Removes a pod's bundle with those of its containers.
pub(crate) fn remove_pod(dir: &Path) -> Result<()> {
    let mut errors = Vec::new();
    for id in list(&dir.join("tasks")) {
        if let Err(e) = remove_task(&dir.join("tasks").join(id)) {
            errors.push(e);
        }
    }
    if errors.is_empty()
        && let Err(e) = remove_tree(dir)
    {
        errors.push(e);
    }
    Error::join(&format!("remove bundle {}", dir.display()), errors)
}

pub(crate) fn remove_tree(dir: &Path) -> Result<()> {
    match fs::remove_dir_all(dir) {
        Ok(()) => Ok(()),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(()),
        Err(e) => Err(e).context(|| format!("remove {}", dir.display())),
    }
}

/// The names in a directory; none where it can't be read.
pub(crate) fn list(dir: &Path) -> Vec<String> {
    let Ok(entries) = fs::read_dir(dir) else { return Vec::new() };
    entries.flatten().filter_map(|e| e.file_name().into_string().ok()).collect()
}

/// The death certificate that the bundle holds, if it holds one that can be read.
pub(crate) fn certificate(dir: &Path) -> Option<Certificate> {
    let path = dir.join("exit.json");
    let text = match fs::read(&path) {
        Ok(t) => t,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return None,
        Err(e) => {
            tracing::warn!(path = %path.display(), error = %e, "a death certificate can't be read");
            return None;
        }
    };
    serde_json::from_slice(&text)
        .inspect_err(|e| tracing::warn!(path = %path.display(), error = %e, "a death certificate is no certificate"))
        .ok()
}

/// Writes the certificate where the bundle holds none, and returns the one that
/// it holds then: code and time never change once written.
pub(crate) fn certify(dir: &Path, ours: Certificate) -> Certificate {
    if let Some(theirs) = certificate(dir) {
        return theirs;
    }
    let written = serde_json::to_vec(&ours)
        .context_kind(ErrorKind::Internal, || "encode a certificate".into())
        .and_then(|text| write_atomic(&dir.join("exit.json"), &text));
    if let Err(e) = written {
        tracing::warn!(bundle = %dir.display(), error = %e, "the death certificate is in memory only");
    }
    ours
}

/// Removes the socket that a dead shim left.
pub(crate) fn remove_socket(address: &str) {
    let path = address.strip_prefix("unix://").unwrap_or(address);
    if path.starts_with('/') {
        let _ = rustix::fs::unlinkat(CWD, path, AtFlags::empty());
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::{Duration, SystemTime};
    use types::ExitStatus;

    fn mode(path: &Path) -> u32 {
        path.metadata().unwrap().mode() & 0o7777
    }

    #[test]
    fn bundles_are_closed_but_for_a_mapped_root() {
        let root = tempfile::tempdir().unwrap();
        let spec =
            |gid| PodSpec { id: "p".into(), handler: String::new(), annotations: Default::default(), bundle_gid: gid };
        let (plain, mapped) = (root.path().join("plain"), root.path().join("mapped"));
        make_pod(&plain, &spec(None)).unwrap();
        make_pod(&mapped, &spec(Some(4711))).unwrap();
        make_task(&mapped.join("tasks/c"), Some(4711), "{}").unwrap();
        assert_eq!((mode(&plain), mode(&plain.join("tasks"))), (0o700, 0o700));
        for dir in ["", "tasks", "tasks/c"] {
            let m = mapped.join(dir).metadata().unwrap();
            assert_eq!((m.mode() & 0o7777, m.gid()), (0o710, 4711), "{dir}");
        }
        assert_eq!(mode(&mapped.join("tasks/c/config.json")), 0o600);
        assert_eq!(mode(&mapped.join("log")), 0o600);
        remove_pod(&mapped).unwrap();
        remove_pod(&mapped).unwrap();
        assert!(!mapped.exists());
    }

    #[test]
    fn nothing_is_removed_through_what_is_no_empty_rootfs() {
        let root = tempfile::tempdir().unwrap();
        let task = root.path().join("c");
        make_task(&task, None, "{}").unwrap();
        std::fs::write(task.join("rootfs/precious"), "x").unwrap();
        assert!(remove_task(&task).is_err());
        assert!(task.join("rootfs/precious").exists());
    }

    /// A runtime that is killed goes on for one step, perhaps after its root is gone.
    #[test]
    fn mount_points_without_their_root_go_with_the_bundle() {
        let root = tempfile::tempdir().unwrap();
        let task = root.path().join("c");
        make_task(&task, None, "{}").unwrap();
        for dir in ["proc", "dev/pts", "etc"] {
            std::fs::create_dir_all(task.join("rootfs").join(dir)).unwrap();
        }
        std::fs::write(task.join("rootfs/etc/hosts"), "").unwrap();
        rustix::mount::mount_bind(root.path(), task.join("rootfs/etc")).unwrap();
        let e = remove_task(&task).unwrap_err();
        rustix::mount::unmount(task.join("rootfs/etc"), UnmountFlags::DETACH).unwrap();
        assert!(e.to_string().contains("is mounted there"), "{e}");
        assert!(task.join("rootfs/etc/hosts").exists());
        remove_task(&task).unwrap();
        assert!(!task.exists());
    }

    #[test]
    fn the_first_certificate_stands() {
        let root = tempfile::tempdir().unwrap();
        let end = |code, s| Certificate {
            status: ExitStatus::Code(code),
            exited_at: SystemTime::UNIX_EPOCH + Duration::from_secs(s),
            oom_killed: false,
            oom_cgroup: None,
            killed_by: None,
            peak_memory: None,
        };
        assert_eq!(certificate(root.path()), None);
        assert_eq!(certify(root.path(), end(1, 1)), end(1, 1));
        assert_eq!(certify(root.path(), end(2, 2)), end(1, 1));
        std::fs::write(root.path().join("exit.json"), "{").unwrap();
        assert_eq!(certificate(root.path()), None);
    }
}
