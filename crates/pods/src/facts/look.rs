//! Looks at paths that callers name, which may lie on a file system that never answers
//! (a dead NFS server's). Such a look can't be ended: it keeps its thread until the file
//! system answers. So these threads are none of the pool that everything else needs,
//! there are few of them, and no path ever holds two.
//!
//! ```text
//! run ─► thread ─► at(path): free ──────────────────► the look itself
//!                            another is there ──────► waits for its end
//!                            and for a while already ► refused
//! ```

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, LazyLock, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use tokio::sync::{Semaphore, oneshot};
use types::{Error, Result, ResultExt};

/// All looks of this process: threads that hang are the whole process's.
static LOOKS: LazyLock<Arc<Looks>> = LazyLock::new(|| {
    Arc::new(Looks::new(Bounds { wait: Duration::from_secs(20), silent: Duration::from_secs(10), threads: 32 }))
});
const HINT: &str = "its file system (a network's, or a failing disk's) does not answer: repair it, or unmount it lazily \
                    (umount -l)";

/// How long and how many.
#[derive(Debug, Clone, Copy)]
struct Bounds {
    /// How long a caller waits.
    wait: Duration,
    /// A path that has not answered for so long is not looked at by others.
    silent: Duration,
    /// The most threads.
    threads: usize,
}

#[derive(Debug)]
struct Looks {
    bounds: Bounds,
    threads: Arc<Semaphore>,
    /// What is being looked at, and since when.
    under_way: Mutex<HashMap<PathBuf, Instant>>,
    ended: Condvar,
}

/// What work on a thread of its own looks through.
#[derive(Debug, Clone)]
pub struct Look {
    looks: Arc<Looks>,
    now: Arc<Mutex<Option<PathBuf>>>,
}

/// Runs `work` on a thread of its own, where it may look at paths that a caller named.
///
/// # Errors
/// Its own; `FailedPrecondition` for a path that has not answered others for a while,
/// `DeadlineExceeded` when it does not answer within 20 s.
pub async fn looking<T: Send + 'static>(work: impl FnOnce(&Look) -> Result<T> + Send + 'static) -> Result<T> {
    LOOKS.run(work).await
}

impl Looks {
    fn new(bounds: Bounds) -> Self {
        let threads = Arc::new(Semaphore::new(bounds.threads));
        Self { bounds, threads, under_way: Mutex::default(), ended: Condvar::new() }
    }

    fn under_way(&self) -> MutexGuard<'_, HashMap<PathBuf, Instant>> {
        self.under_way.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn run<T: Send + 'static>(
        self: &Arc<Self>,
        work: impl FnOnce(&Look) -> Result<T> + Send + 'static,
    ) -> Result<T> {
        let wait = self.bounds.wait;
        let look = Look { looks: self.clone(), now: Arc::default() };
        let permit = tokio::time::timeout(wait, self.threads.clone().acquire_owned()).await;
        let Ok(Ok(permit)) = permit else { return Err(self.none_free()) };
        let (tx, rx) = oneshot::channel();
        let on_thread = look.clone();
        let thread = std::thread::Builder::new().name("look".into()).spawn(move || {
            let _ = tx.send(work(&on_thread));
            drop(permit);
        });
        thread.context(|| "start a thread that looks at paths of the host".into())?;
        match tokio::time::timeout(wait, rx).await {
            Ok(Ok(outcome)) => outcome,
            Ok(Err(_)) => Err(Error::internal("the thread that looked at paths of the host was lost")),
            Err(_) => {
                let at = look.now.lock().unwrap_or_else(PoisonError::into_inner).clone();
                let path = at.map_or_else(|| "a host path".to_string(), |path| format!("host path {}", path.display()));
                let threads = self.bounds.threads;
                let held = threads.saturating_sub(self.threads.available_permits());
                tracing::warn!("{path} does not answer; {held} of {threads} threads are held by such paths");
                Err(Error::deadline(format!("{path} has not answered for {} s", wait.as_secs())).hint(HINT))
            }
        }
    }

    fn none_free(&self) -> Error {
        let mut paths: Vec<String> = self.under_way().keys().map(|p| p.display().to_string()).collect();
        paths.sort();
        Error::unavailable(format!("too many host paths do not answer: {}", paths.join(", "))).hint(HINT)
    }

    /// Waits while another looks at the path, and no longer than that may take.
    fn enter(&self, path: &Path) -> Result<Instant> {
        let mut under_way = self.under_way();
        while let Some(since) = under_way.get(path) {
            let age = since.elapsed();
            if age >= self.bounds.silent {
                let silent = format!("host path {} has not answered for {} s", path.display(), age.as_secs());
                return Err(Error::precondition(silent).hint(HINT));
            }
            let left = self.bounds.silent - age;
            under_way = self.ended.wait_timeout(under_way, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        let since = Instant::now();
        under_way.insert(path.to_owned(), since);
        Ok(since)
    }
}

impl Look {
    /// Looks at `path`, alone.
    ///
    /// # Errors
    /// `FailedPrecondition` where another has waited for its answer for too long.
    pub fn at<T>(&self, path: &Path, look: impl FnOnce() -> T) -> Result<T> {
        struct Leave<'a>(&'a Look, &'a Path, Instant);
        impl Drop for Leave<'_> {
            fn drop(&mut self) {
                let Self(look, path, since) = self;
                look.looks.under_way().remove(*path);
                look.looks.ended.notify_all();
                *look.now.lock().unwrap_or_else(PoisonError::into_inner) = None;
                if since.elapsed() >= look.looks.bounds.silent {
                    tracing::warn!("host path {} has answered after {} s", path.display(), since.elapsed().as_secs());
                }
            }
        }
        let since = self.looks.enter(path)?;
        *self.now.lock().unwrap_or_else(PoisonError::into_inner) = Some(path.to_owned());
        let _leave = Leave(self, path, since);
        Ok(look())
    }
}

#[cfg(test)]
impl Look {
    /// For tests of what looks.
    pub(super) fn here() -> Self {
        Self { looks: LOOKS.clone(), now: Arc::default() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc;
    use types::ErrorKind;

    fn looks(wait: u64, silent: u64, threads: usize) -> Arc<Looks> {
        let [wait, silent] = [wait, silent].map(Duration::from_millis);
        Arc::new(Looks::new(Bounds { wait, silent, threads }))
    }

    /// A look that hangs until the sender is dropped.
    fn hanging(path: &'static str) -> (mpsc::Sender<()>, impl FnOnce(&Look) -> Result<bool> + Send + 'static) {
        let (tx, rx) = mpsc::channel::<()>();
        (tx, move |look: &Look| look.at(Path::new(path), || rx.recv().is_err()))
    }

    fn quick(path: &'static str) -> impl FnOnce(&Look) -> Result<bool> + Send + 'static {
        move |look: &Look| look.at(Path::new(path), || true)
    }

    #[tokio::test]
    async fn a_path_that_hangs_holds_one_thread_and_no_other_path() {
        let looks = looks(2000, 50, 4);
        let (dead, hang) = hanging("/dead/a");
        let e = looks.run(hang).await.unwrap_err();
        assert!(e.kind() == ErrorKind::DeadlineExceeded && e.to_string().contains("/dead/a"), "{e}");
        // It may take longer than the bound on a busy machine: refused all the same.
        for _ in 0..20 {
            let e = looks.run(quick("/dead/a")).await.unwrap_err();
            assert!(e.to_string().contains("/dead/a has not answered"), "{e}");
        }
        assert_eq!(looks.under_way().len(), 1);
        drop(dead);
        // It answers at last: whoever asks then is served again.
        let all = looks.threads.clone().acquire_many_owned(4).await.unwrap();
        assert!(looks.under_way().is_empty());
        drop(all);
    }

    #[tokio::test]
    async fn other_paths_are_looked_at_meanwhile_and_the_same_once_it_answers() {
        let looks = looks(60_000, 60_000, 4);
        let (slow, hang) = hanging("/slow");
        let first = tokio::spawn({
            let looks = looks.clone();
            async move { looks.run(hang).await }
        });
        while looks.under_way().is_empty() {
            tokio::task::yield_now().await;
        }
        assert!(looks.run(quick("/other")).await.unwrap());
        let second = tokio::spawn({
            let looks = looks.clone();
            async move { looks.run(quick("/slow")).await }
        });
        drop(slow);
        assert!(first.await.unwrap().unwrap() && second.await.unwrap().unwrap());
    }

    #[tokio::test]
    async fn so_many_threads_hang_and_no_more() {
        let looks = looks(2000, 60_000, 1);
        let (_dead, hang) = hanging("/dead");
        assert!(looks.run(hang).await.is_err());
        let e = looks.run(quick("/other")).await.unwrap_err();
        assert!(e.kind() == ErrorKind::Unavailable && e.to_string().contains("/dead"), "{e}");
    }
}
