//! The root file system's mounts around a creation. They are made on a thread of their own,
//! for their disk may hang:
//!
//! ```text
//! creation --> thread mounts --> goes on
//!    |  killed, or the deadline has passed: it fails
//!    `--> thread, left behind, mounts at last --> taken off again
//! ```

use crate::log;
use crate::shared::Shared;
use oci::mounts;
use proto::containerd::types::Mount;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::watch;
use types::{Error, ErrorKind, Result};

/// How long a mount that is given up may still take, so that nothing of it is left when a
/// Kill is answered: one whose disk is well needs no longer.
const GRACE: Duration = Duration::from_secs(1);

pub(crate) fn asked(m: &Mount) -> mounts::Mount {
    mounts::Mount {
        kind: m.r#type.clone(),
        source: m.source.clone(),
        target: m.target.clone(),
        options: m.options.clone(),
    }
}

/// Takes the root file system off after a failure, and tells all that failed.
pub(crate) async fn unmounted(rootfs: PathBuf, stacked: usize, e: Error) -> Error {
    if stacked == 0 {
        return e;
    }
    match tokio::task::spawn_blocking(move || mounts::unmount_rootfs(&rootfs, stacked)).await {
        Ok(Err(more)) => e.hint(more.to_string()),
        Ok(Ok(())) | Err(_) => e,
    }
}

/// Mounts the root file system, at most for `deadline` and until `abort` is true.
///
/// # Errors
/// Those of the mount; `DeadlineExceeded`, `Cancelled`, and `Unavailable` while an earlier
/// mount hangs there.
pub(crate) async fn mount(
    shared: &Arc<Shared>,
    root: &Path,
    mounts: Vec<mounts::Mount>,
    deadline: Duration,
    abort: watch::Receiver<bool>,
) -> Result<()> {
    if mounts.is_empty() {
        return Ok(());
    }
    let names: Vec<String> = mounts.iter().map(|m| format!("{} {}", m.kind, m.source)).collect();
    let what = format!("mount [{}] on {}", names.join(", "), root.display());
    // Mapped owners take a process, which its own thread waits for: nobody else may
    // reap it.
    let call = mounts::are_mapped(&mounts).then(|| shared.children.begin_call());
    let (stacked, to) = (mounts::stacked(&mounts), root.to_path_buf());
    let work = move || {
        let _call = call;
        mounts::mount_rootfs(&to, &mounts)
    };
    let place = Place { root, stacked, what };
    bounded(shared, place, work, deadline, abort).await
}

/// What is mounted where.
struct Place<'a> {
    root: &'a Path,
    /// How many mounts there are to take off again.
    stacked: usize,
    what: String,
}

async fn bounded(
    shared: &Arc<Shared>,
    place: Place<'_>,
    work: impl FnOnce() -> Result<()> + Send + 'static,
    deadline: Duration,
    mut abort: watch::Receiver<bool>,
) -> Result<()> {
    let Place { root, stacked, what } = place;
    let mounting = shared.mounting(root)?;
    let mut thread = tokio::task::spawn_blocking(work);
    let ended = |done: std::result::Result<Result<()>, tokio::task::JoinError>| {
        done.unwrap_or_else(|e| Err(Error::internal("mount the root file system").because(e)))
    };
    let early = tokio::select! {
        biased;
        done = &mut thread => return ended(done),
        Ok(_) = abort.wait_for(|a| *a) => {
            Error::new(ErrorKind::Cancelled, format!("{what}: its container was killed meanwhile"))
        }
        () = tokio::time::sleep(deadline) => {
            let text = format!("{what} took longer than {} s", deadline.as_secs());
            Error::deadline(text).hint("see to the disk or server that its source is on")
        }
    };
    let root = root.to_path_buf();
    let mut undone = tokio::spawn(async move {
        let _mounting = mounting;
        // One that has failed has left nothing.
        if ended(thread.await).is_ok() {
            let done = tokio::task::spawn_blocking(move || mounts::unmount_rootfs(&root, stacked)).await;
            if let Ok(Err(e)) = done {
                log::warn(format_args!("after {what} was given up: {e}"));
            }
        }
    });
    let _ = tokio::time::timeout(GRACE, &mut undone).await;
    Err(early)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::shared::Settings;
    use std::sync::mpsc;

    fn mounted_on(root: &Path) -> usize {
        let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
        mounts.lines().filter(|l| l.split(' ').nth(4) == root.to_str()).count()
    }

    /// A mount that is made once the sender says so.
    fn late(root: &Path) -> (mpsc::Sender<()>, impl FnOnce() -> Result<()> + Send + 'static) {
        let (go, wait) = mpsc::channel();
        let root = root.to_path_buf();
        let options = vec!["bind".to_string()];
        let m = mounts::Mount { kind: "bind".into(), source: "/proc".into(), target: String::new(), options };
        (go, move || {
            let _ = wait.recv();
            mounts::mount_rootfs(&root, &[m])
        })
    }

    #[tokio::test]
    async fn a_mount_that_hangs_is_given_up_and_taken_off_when_it_comes() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().join("rootfs");
        let settings = Settings {
            id: "pod".into(),
            namespace: "test".into(),
            events: String::new(),
            sockets: dir.path().into(),
            socket: None,
        };
        let shared = Arc::new(Shared::new(settings, oci::Children::new()));
        let place = || Place { root: &root, stacked: 1, what: "mount [bind /proc]".into() };
        for killed in [false, true] {
            let (go, work) = late(&root);
            let (abort, aborted) = watch::channel(killed);
            let deadline = Duration::from_millis(if killed { 600_000 } else { 10 });
            let e = bounded(&shared, place(), work, deadline, aborted.clone()).await.unwrap_err();
            let want = if killed { ErrorKind::Cancelled } else { ErrorKind::DeadlineExceeded };
            assert!(e.kind() == want && e.to_string().contains("bind /proc"), "{e}");
            let (_go, next) = late(&root);
            let e = bounded(&shared, place(), next, deadline, aborted).await.unwrap_err();
            assert_eq!(e.kind(), ErrorKind::Unavailable, "it would be taken for the other one: {e}");
            drop((go, abort));
            while shared.mounting(&root).is_err() {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
            assert_eq!(mounted_on(&root), 0);
        }
        let (go, work) = late(&root);
        go.send(()).unwrap();
        let never = watch::channel(false).1;
        bounded(&shared, place(), work, Duration::from_secs(600), never).await.unwrap();
        assert_eq!(mounted_on(&root), 1);
        mounts::unmount_rootfs(&root, 1).unwrap();
    }
}
