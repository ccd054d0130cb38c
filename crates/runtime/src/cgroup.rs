//! Shims and monitors live in a cgroup of the runtime's own, never in the pod's: the pod's
//! figures are the pod's (DESIGN.md, "Cgroups").

use std::fs;
use std::path::{Path, PathBuf};

/// How often a cgroup that is not empty yet is tried to be removed, and how far apart.
const SCRUBS: u32 = 40;
const SCRUB_PAUSE: std::time::Duration = std::time::Duration::from_millis(25);

/// Makes `cgroup` in each mounted hierarchy and returns their directories. What
/// can't be made is warned about: a shim elsewhere still works.
pub(crate) fn prepare(cgroup: &str) -> Vec<PathBuf> {
    let mounts = match fs::read_to_string("/proc/self/mounts") {
        Ok(m) => m,
        Err(e) => {
            tracing::warn!(error = %e, "/proc/self/mounts can't be read: nobody is moved out of the daemon's cgroup");
            return Vec::new();
        }
    };
    hierarchies(&mounts)
        .into_iter()
        .filter_map(|root| match make(&root, cgroup) {
            Ok(dir) => Some(dir),
            Err(e) => {
                tracing::warn!(hierarchy = %root.display(), cgroup, error = %e, "a cgroup can't be made");
                None
            }
        })
        .collect()
}

/// Moves a process into each of `dirs`.
pub(crate) fn place(dirs: &[PathBuf], pid: u32) {
    for dir in dirs {
        if let Err(e) = fs::write(dir.join("cgroup.procs"), pid.to_string()) {
            // ESRCH: it died; whoever watches it says so.
            if e.raw_os_error() != Some(rustix::io::Errno::SRCH.raw_os_error()) {
                tracing::warn!(pid, cgroup = %dir.display(), error = %e, "it stays in the daemon's cgroup");
            }
        }
    }
}

/// Whether a process is in `cgroup` in every hierarchy, as it says itself: moving it
/// once more would cost more than to ask.
pub(crate) fn is_placed(cgroup: &str, pid: u32) -> bool {
    // Without a cgroup namespace the path has what our own mounts begin with before it.
    fs::read_to_string(format!("/proc/{pid}/cgroup")).is_ok_and(|text| text.lines().all(|l| l.ends_with(cgroup)))
}

/// Removes `cgroup` and those that it was made in from every hierarchy, as far as
/// they are empty: the kernel refuses the others.
pub(crate) fn release(cgroup: &str) {
    let Ok(mounts) = fs::read_to_string("/proc/self/mounts") else { return };
    let inside = Path::new(cgroup.trim_start_matches('/'));
    for root in hierarchies(&mounts) {
        for part in inside.ancestors().filter(|p| !p.as_os_str().is_empty()) {
            if fs::remove_dir(root.join(part)).is_err() {
                break;
            }
        }
    }
}

/// Takes away the cgroup of a container that was never finished, with those below it,
/// and kills what is in them. A foreign shim's call of the OCI runtime can be killed
/// half-way: Go's does that when the connection that asked for it breaks; the runtime
/// then knows of no container, and its `delete` leaves the cgroup.
pub(crate) fn scrub(bundle: &Path) {
    let cgroup = oci::cgroup::Cgroup::of_bundle(bundle);
    for _ in 0..SCRUBS {
        if cgroup.remove().is_ok() {
            return;
        }
        cgroup.kill_everywhere();
        std::thread::sleep(SCRUB_PAUSE);
    }
    if let Err(e) = cgroup.remove() {
        tracing::warn!(bundle = %bundle.display(), error = %e, "the cgroup of a container that is gone stays");
    }
}

/// Removes `cgroup` itself from every hierarchy. False where some of it stays: the
/// kernel refuses while a process is in it.
pub(crate) fn remove(cgroup: &str) -> bool {
    let Ok(mounts) = fs::read_to_string("/proc/self/mounts") else { return false };
    let inside = Path::new(cgroup.trim_start_matches('/'));
    let gone = |root: PathBuf| match fs::remove_dir(root.join(inside)) {
        Ok(()) => true,
        Err(e) => e.kind() == std::io::ErrorKind::NotFound,
    };
    // In each of them, whatever the others say.
    hierarchies(&mounts).into_iter().map(gone).filter(|gone| !gone).count() == 0
}

/// The names of the cgroups directly below `cgroup`, in whichever hierarchy.
pub(crate) fn below(cgroup: &str) -> std::collections::BTreeSet<String> {
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap_or_default();
    let inside = Path::new(cgroup.trim_start_matches('/'));
    let dirs = hierarchies(&mounts).into_iter().flat_map(|root| fs::read_dir(root.join(inside)).into_iter().flatten());
    dirs.flatten()
        .filter(|e| e.file_type().is_ok_and(|t| t.is_dir()))
        .filter_map(|e| e.file_name().into_string().ok())
        .collect()
}

fn hierarchies(mounts: &str) -> Vec<PathBuf> {
    let mut found: Vec<PathBuf> = Vec::new();
    for line in mounts.lines() {
        let mut words = line.split_whitespace();
        let (Some(_), Some(at), Some(kind)) = (words.next(), words.next(), words.next()) else { continue };
        if matches!(kind, "cgroup" | "cgroup2") && !found.iter().any(|f| f == Path::new(at)) {
            found.push(at.into());
        }
    }
    found
}

fn make(root: &Path, cgroup: &str) -> std::io::Result<PathBuf> {
    let mut dir = root.to_path_buf();
    for part in cgroup.split('/').filter(|p| !p.is_empty() && *p != "..") {
        let parent = dir.clone();
        dir.push(part);
        match fs::create_dir(&dir) {
            Ok(()) => {}
            Err(e) if e.kind() == std::io::ErrorKind::AlreadyExists => {}
            Err(e) => return Err(e),
        }
        // A v1 cpuset takes no process before it has CPUs and memory nodes.
        for file in ["cpuset.cpus", "cpuset.mems"] {
            if let (Ok(of_parent), Ok(own)) =
                (fs::read_to_string(parent.join(file)), fs::read_to_string(dir.join(file)))
                && own.trim().is_empty()
                && dir.join("cgroup.clone_children").exists()
            {
                fs::write(dir.join(file), of_parent.trim())?;
            }
        }
    }
    Ok(dir)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_hierarchy_counts_once() {
        let mounts = "proc /proc proc rw 0 0\ncgroup /sys/fs/cgroup/cpu cgroup rw,cpu 0 0\n\
                      cgroup /sys/fs/cgroup/cpu cgroup rw,cpu 0 0\ncgroup2 /sys/fs/cgroup/unified cgroup2 rw 0 0\n";
        assert_eq!(hierarchies(mounts), [Path::new("/sys/fs/cgroup/cpu"), Path::new("/sys/fs/cgroup/unified")]);
    }

    /// As a runtime that was killed in its `create` leaves it: a process in some of the
    /// hierarchies, and a cgroup below.
    #[test]
    fn what_a_killed_create_leaves_is_taken_away_with_what_is_below() {
        let name = format!("longshore-scrub-{}", std::process::id());
        let bundle = tempfile::tempdir().unwrap();
        let spec = serde_json::json!({"linux": {"cgroupsPath": format!("/{name}/c")}});
        fs::write(bundle.path().join("config.json"), spec.to_string()).unwrap();
        let dirs = prepare(&format!("/{name}/c/below"));
        assert!(!dirs.is_empty());
        let mut victim = std::process::Command::new("sleep").arg("1000").spawn().unwrap();
        place(&dirs[..1], victim.id());
        assert!(fs::read_to_string(dirs[0].join("cgroup.procs")).unwrap().contains(&victim.id().to_string()));
        // Nobody else waits for it, and a zombie keeps no cgroup.
        scrub(bundle.path());
        let mut ended = victim.try_wait().unwrap();
        for _ in 0..200 {
            if ended.is_some() {
                break;
            }
            std::thread::sleep(SCRUB_PAUSE);
            ended = victim.try_wait().unwrap();
        }
        let _ = victim.kill();
        let _ = victim.wait();
        let left: Vec<_> = dirs.iter().filter_map(|d| d.parent()).filter(|d| d.exists()).collect();
        release(&format!("/{name}/c/below"));
        release(&format!("/{name}"));
        assert!(ended.is_some(), "it was not killed");
        assert!(left.is_empty(), "{left:?}");
    }
}
