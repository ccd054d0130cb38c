//! What images and containers use of the disk. It takes a walk over the containers'
//! files, which may take long, so there is one at a time, on a task of its own, whoever
//! asks and whoever has gone meanwhile.

use futures::FutureExt;
use futures::future::{BoxFuture, Shared};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime};
use types::{Error, Result};

/// How long a walk answers for.
const LIFE: Duration = Duration::from_secs(10);
/// How long a walk is waited for where there is an older answer.
const PATIENCE: Duration = Duration::from_secs(2);

/// Disk use, for `ImageFsInfo`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FsUsage {
    /// The snapshots' directory.
    pub mountpoint: PathBuf,
    /// Layers and containers' changes, in bytes.
    pub used_bytes: u64,
    /// Layers and containers' changes.
    pub inodes_used: u64,
    /// When it was measured.
    pub timestamp: SystemTime,
}

type Walk = Shared<BoxFuture<'static, Result<FsUsage, Arc<Error>>>>;

#[derive(Default)]
struct Kept {
    last: Option<(Instant, FsUsage)>,
    walk: Option<Walk>,
}

/// The last answer, and the walk that is under way.
#[derive(Clone, Default)]
pub(crate) struct FsInfo(Arc<Mutex<Kept>>);

impl FsInfo {
    /// An answer: that of the last walk while it counts, else that of a new one, or of
    /// one that is under way; and where it takes long, the last one's after all.
    ///
    /// # Errors
    /// That of the walk.
    pub(crate) async fn ask(&self, walk: impl Future<Output = Result<FsUsage>> + Send + 'static) -> Result<FsUsage> {
        let (last, walk) = {
            let mut kept = self.kept();
            let last = match &kept.last {
                Some((at, usage)) if at.elapsed() < LIFE => return Ok(usage.clone()),
                last => last.as_ref().map(|(_, usage)| usage.clone()),
            };
            (last, kept.walk.get_or_insert_with(|| self.start(walk)).clone())
        };
        let found = match last {
            None => walk.await,
            Some(last) => tokio::time::timeout(PATIENCE, walk).await.unwrap_or(Ok(last)),
        };
        found.map_err(|e| e.copy())
    }

    /// Starts a walk; the lock is held meanwhile, so that it can't end before it is kept.
    fn start(&self, walk: impl Future<Output = Result<FsUsage>> + Send + 'static) -> Walk {
        let this = self.clone();
        let task = tokio::spawn(async move {
            // One that panics must not stay the one that is under way.
            let walked = std::panic::AssertUnwindSafe(walk).catch_unwind().await;
            let found = walked.unwrap_or_else(|_| Err(Error::internal("the walk over containers' files was lost")));
            let mut kept = this.kept();
            kept.walk = None;
            if let Ok(usage) = &found {
                kept.last = Some((Instant::now(), usage.clone()));
            }
            found.map_err(Arc::new)
        });
        async move { task.await.unwrap_or_else(|e| Err(Arc::new(Error::internal("measure the disk use").because(e)))) }
            .boxed()
            .shared()
    }

    fn kept(&self) -> MutexGuard<'_, Kept> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicUsize, Ordering};
    use tokio::sync::Semaphore;

    fn usage(used_bytes: u64) -> FsUsage {
        FsUsage { mountpoint: "/x".into(), used_bytes, inodes_used: 1, timestamp: SystemTime::UNIX_EPOCH }
    }

    #[tokio::test]
    async fn callers_that_leave_start_no_further_walk_and_lose_none() {
        let info = FsInfo::default();
        let (begun, gate) = (Arc::new(AtomicUsize::new(0)), Arc::new(Semaphore::new(0)));
        let ask = || {
            let (begun, gate) = (begun.clone(), gate.clone());
            info.ask(async move {
                begun.fetch_add(1, Ordering::SeqCst);
                let _ = gate.acquire().await;
                Ok(usage(7))
            })
        };
        for _ in 0..3 {
            assert!(tokio::time::timeout(Duration::from_millis(1), ask()).await.is_err());
        }
        gate.add_permits(1);
        assert_eq!(ask().await.unwrap(), usage(7));
        assert_eq!(ask().await.unwrap(), usage(7));
        assert_eq!(begun.load(Ordering::SeqCst), 1);
    }

    #[tokio::test]
    async fn the_last_answer_stands_in_for_a_walk_that_takes_long() {
        let info = FsInfo::default();
        let Some(long_ago) = Instant::now().checked_sub(LIFE) else { return };
        info.kept().last = Some((long_ago, usage(7)));
        assert_eq!(info.ask(std::future::pending()).await.unwrap(), usage(7));
        assert!(info.kept().walk.is_some());
    }

    #[tokio::test]
    async fn a_walk_that_fails_is_not_kept() {
        let info = FsInfo::default();
        assert!(info.ask(async { Err(Error::internal("no")) }).await.is_err());
        assert!(info.ask(async { panic!("in a test") }).await.is_err());
        assert_eq!(info.ask(async { Ok(usage(8)) }).await.unwrap(), usage(8));
    }
}
