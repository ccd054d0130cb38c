//! The shim's own cgroup, where the caller's options name one.

use std::path::{Component, Path, PathBuf};
use types::{Error, Result, ResultExt};

const MOUNT: &str = "/sys/fs/cgroup";

/// Moves the process `pid` into the cgroup `path`, relative to each hierarchy
/// that has it.
///
/// # Errors
/// `InvalidArgument` for a path that climbs, `NotFound` where no hierarchy has
/// it: the caller makes it, not we.
pub fn join(path: &str, pid: u32) -> Result<()> {
    join_below(Path::new(MOUNT), path, pid)
}

fn join_below(mount: &Path, path: &str, pid: u32) -> Result<()> {
    let relative = path.trim_start_matches('/');
    if relative.is_empty() || !Path::new(relative).components().all(|c| matches!(c, Component::Normal(_))) {
        return Err(Error::invalid(format!("the shim's cgroup {path:?} is no plain path")));
    }
    let procs = |hierarchy: &Path| hierarchy.join(relative).join("cgroup.procs");
    let mut found: Vec<PathBuf> = Vec::new();
    if mount.join("cgroup.procs").exists() {
        found.extend(Some(procs(mount)).filter(|p| p.exists()));
    } else {
        let all = std::fs::read_dir(mount).context(|| format!("list {}", mount.display()))?;
        // cpu and cpuacct are two names of one: the second write changes nothing.
        found.extend(all.flatten().map(|e| procs(&e.path())).filter(|p| p.exists()));
    }
    if found.is_empty() {
        let text = format!("the shim's cgroup {path} exists in no hierarchy below {}", mount.display());
        return Err(Error::not_found(text).hint("make it, or leave ShimCgroup out of the runtime's options"));
    }
    for file in found {
        std::fs::write(&file, pid.to_string()).context(|| format!("put the shim into {}", file.display()))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_joined_wherever_it_exists() {
        let dir = tempfile::tempdir().unwrap();
        for hierarchy in ["cpu/s", "memory/s", "pids"] {
            std::fs::create_dir_all(dir.path().join(hierarchy)).unwrap();
            std::fs::write(dir.path().join(hierarchy).join("cgroup.procs"), "").unwrap();
        }
        join_below(dir.path(), "/s", 7).unwrap();
        for hierarchy in ["cpu/s", "memory/s"] {
            assert_eq!(std::fs::read(dir.path().join(hierarchy).join("cgroup.procs")).unwrap(), b"7");
        }
        assert_eq!(std::fs::read(dir.path().join("pids/cgroup.procs")).unwrap(), b"");
        assert!(join_below(dir.path(), "/absent", 7).unwrap_err().is_not_found());
        for bad in ["", "/", "../x", "s/../../x"] {
            assert_eq!(join_below(dir.path(), bad, 7).unwrap_err().kind(), types::ErrorKind::InvalidArgument);
        }
    }
}
