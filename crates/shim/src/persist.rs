//! What outlives the shim, in each container's bundle.
//!
//! ```text
//! <bundle>/exit.json           init's death certificate, written before it is published
//! <bundle>/init.pid            init's pid, as containerd's shim writes it
//! <bundle>/longshore-task.json which runtime and root, for `delete` after a crash
//! ```

use serde::{Deserialize, Serialize};
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use types::{Certificate, Result, ResultExt};

const EXIT: &str = "exit.json";
const TASK: &str = "longshore-task.json";
/// Also where the OCI runtime writes it.
pub const PID: &str = "init.pid";

/// How to reach the container when the shim is gone.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TaskRecord {
    /// The runtime's binary.
    pub binary: PathBuf,
    /// The runtime's state directory.
    pub root: PathBuf,
    /// Cgroups are systemd's.
    #[serde(default)]
    pub systemd_cgroup: bool,
    /// How many mounts we have stacked on `<bundle>/rootfs`.
    #[serde(default)]
    pub rootfs_mounts: usize,
}

fn write(bundle: &Path, name: &str, value: &impl Serialize) -> Result<()> {
    let what = || format!("write {}", bundle.join(name).display());
    let bytes = serde_json::to_vec(value).context(what)?;
    let temporary = bundle.join(format!(".{name}.new"));
    std::fs::OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(&temporary)
        .and_then(|mut f| f.write_all(&bytes))
        .and_then(|()| std::fs::rename(&temporary, bundle.join(name)))
        .context(what)
}

fn read<T: for<'de> Deserialize<'de>>(bundle: &Path, name: &str) -> Result<T> {
    let path = bundle.join(name);
    let bytes = std::fs::read(&path).context(|| format!("read {}", path.display()))?;
    serde_json::from_slice(&bytes).context(|| format!("{} is damaged", path.display()))
}

/// Writes init's pid, for `delete` and for people's scripts.
///
/// # Errors
/// Those of the file system.
pub fn write_pid(bundle: &Path, pid: i32) -> Result<()> {
    let path = bundle.join(PID);
    std::fs::write(&path, pid.to_string()).context(|| format!("write {}", path.display()))
}

/// Reads init's pid; `None` where there never was one.
pub fn read_pid(bundle: &Path) -> Option<i32> {
    std::fs::read_to_string(bundle.join(PID)).ok()?.trim().parse().ok()
}

/// Writes init's death certificate, atomically.
///
/// # Errors
/// Those of the file system.
pub fn write_exit(bundle: &Path, exit: &Certificate) -> Result<()> {
    write(bundle, EXIT, exit)
}

/// Reads init's death certificate; `NotFound` while it lives.
///
/// # Errors
/// Those of the file system, and `Internal` where it is damaged.
pub fn read_exit(bundle: &Path) -> Result<Certificate> {
    read(bundle, EXIT)
}

/// Removes what an earlier container left in this bundle.
pub fn forget(bundle: &Path) {
    for name in [EXIT, PID] {
        let _ = std::fs::remove_file(bundle.join(name));
    }
}

/// Writes how to reach the container.
///
/// # Errors
/// Those of the file system.
pub fn write_task(bundle: &Path, task: &TaskRecord) -> Result<()> {
    write(bundle, TASK, task)
}

/// Reads how to reach the container.
///
/// # Errors
/// Those of the file system, and `Internal` where it is damaged.
pub fn read_task(bundle: &Path) -> Result<TaskRecord> {
    read(bundle, TASK)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::{Duration, SystemTime};

    #[test]
    fn a_certificate_survives() {
        let dir = tempfile::tempdir().unwrap();
        assert!(read_exit(dir.path()).unwrap_err().is_not_found());
        let exit = Certificate {
            oom_killed: true,
            peak_memory: Some(5),
            ..crate::state::plain(types::ExitStatus::Signal(9), SystemTime::UNIX_EPOCH + Duration::from_nanos(123))
        };
        write_exit(dir.path(), &exit).unwrap();
        assert_eq!(read_exit(dir.path()).unwrap(), exit);
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1, "no temporary file is left");
    }
}
