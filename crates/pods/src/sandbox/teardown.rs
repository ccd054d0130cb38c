//! The unwind of each step of a sandbox, and all of them: computed from the pod's
//! id, so that they need no record. Each is idempotent, goes on to its end and
//! adds what failed.

use super::layout::{self, Layout};
use fault::Step as Fault;
use network::NetnsDir;
use std::collections::BTreeSet;
use std::io::ErrorKind as Io;
use std::path::Path;
use types::{Error, Result, ResultExt, check_identifier};

/// The unwind of one step.
pub(super) type Undo = fn(&Layout, &NetnsDir, &mut Vec<Error>);

/// All unwinds in their order. The directory of the pins goes last: while it is
/// there, the next start knows of the pod.
const ALL: [(Fault, Undo); 5] = [
    (Fault::UnmakeInitRootfs, init_rootfs),
    (Fault::UnmakeShm, shm),
    (Fault::UnmakeFiles, files),
    (Fault::UnmakeNamespaces, namespaces),
    (Fault::UnmakeDirectories, directories),
];

/// Takes a sandbox down, whatever is there of it.
///
/// # Errors
/// All failures, joined.
pub(super) fn all(layout: &Layout, netns: &NetnsDir) -> Result<()> {
    let mut errors = Vec::new();
    for (point, undo) in ALL {
        fault::during(point, || undo(layout, netns, &mut errors));
    }
    Error::join(&format!("take down sandbox {:.12}", layout.id), errors)
}

pub(super) fn init_rootfs(layout: &Layout, _: &NetnsDir, errors: &mut Vec<Error>) {
    remove_tree(&layout.init_rootfs(), errors);
}

pub(super) fn shm(layout: &Layout, _: &NetnsDir, errors: &mut Vec<Error>) {
    let path = layout.shm();
    match sys::mount::detach_all(&path) {
        Ok(()) => errors.extend(gone(std::fs::remove_dir(&path), "remove", &path)),
        Err(e) => errors.push(e),
    }
}

pub(super) fn files(layout: &Layout, _: &NetnsDir, errors: &mut Vec<Error>) {
    for path in [layout.hostname(), layout.hosts(), layout.resolv_conf()] {
        errors.extend(gone(std::fs::remove_file(&path), "remove", &path));
    }
}

/// The net namespace's pin, and whatever else is pinned for the pod.
pub(super) fn namespaces(layout: &Layout, netns: &NetnsDir, errors: &mut Vec<Error>) {
    errors.extend(netns.unpin(&layout.id).err());
    let entries = match std::fs::read_dir(&layout.pins) {
        Err(e) => return errors.extend(gone(Err(e), "list", &layout.pins)),
        Ok(entries) => entries,
    };
    for entry in entries {
        match entry {
            Ok(entry) => unpin(&entry.path(), errors),
            Err(e) => errors.extend(gone(Err(e), "list", &layout.pins)),
        }
    }
}

/// Takes one pin away; none is success.
pub(super) fn unpin(path: &Path, errors: &mut Vec<Error>) {
    match sys::mount::detach_all(path) {
        Ok(()) => errors.extend(gone(std::fs::remove_file(path), "remove", path)),
        Err(e) => errors.push(e),
    }
}

pub(super) fn directories(layout: &Layout, _: &NetnsDir, errors: &mut Vec<Error>) {
    match std::fs::remove_dir(&layout.dir) {
        // Somebody else has files of the pod there, and takes them away himself.
        Err(e) if e.kind() == Io::DirectoryNotEmpty => {}
        other => errors.extend(gone(other, "remove", &layout.dir)),
    }
    errors.extend(gone(std::fs::remove_dir(&layout.pins), "remove", &layout.pins));
}

/// A failure, unless the object is gone already.
fn gone(outcome: std::io::Result<()>, verb: &str, path: &Path) -> Option<Error> {
    match outcome {
        Err(e) if e.kind() != Io::NotFound => Err::<(), _>(e).context(|| format!("{verb} {}", path.display())).err(),
        _ => None,
    }
}

/// Removes a directory that is ours alone, once nothing is mounted in it: a mount
/// that stayed would be emptied with it.
fn remove_tree(path: &Path, errors: &mut Vec<Error>) {
    if !path.exists() {
        return;
    }
    let before = errors.len();
    match sys::mount::mounts_below(path) {
        Ok(mounts) => errors.extend(mounts.iter().filter_map(|m| sys::mount::detach(m).err())),
        Err(e) => errors.push(e),
    }
    if errors.len() == before {
        errors.extend(gone(std::fs::remove_dir_all(path), "remove", path));
    }
}

/// The pods of which anything lies in this state directory.
pub(super) fn found(state: &Path) -> Result<BTreeSet<String>> {
    let (mut found, mut errors) = (BTreeSet::new(), Vec::new());
    for dir in [layout::pins(state), layout::dirs(state)] {
        match std::fs::read_dir(&dir) {
            Err(e) => errors.extend(gone(Err(e), "list", &dir)),
            Ok(entries) => found.extend(
                entries
                    .filter_map(|e| e.ok()?.file_name().into_string().ok())
                    .filter(|id| check_identifier("pod id", id).is_ok()),
            ),
        }
    }
    Error::join("look for sandboxes", errors).map(|()| found)
}

/// Takes down a sandbox whose pod nobody knows, with its directory as a whole.
pub(super) fn clear(layout: &Layout, netns: &NetnsDir) -> Result<()> {
    let mut errors: Vec<Error> = all(layout, netns).err().into_iter().collect();
    remove_tree(&layout.dir, &mut errors);
    Error::join(&format!("take down sandbox {:.12}", layout.id), errors)
}
