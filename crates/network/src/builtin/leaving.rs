//! Pods whose links the kernel still removes: nobody waits for that but those who need
//! what they hold.

use ::types::{Error, Result};
use std::collections::BTreeSet;
use tokio::sync::watch;
use tokio::task::JoinHandle;

/// The end of a pod's detachment, which comes also if nobody waits for it.
#[derive(Debug)]
pub struct Departure(JoinHandle<Result<()>>);

impl Departure {
    pub(super) fn new(gone: JoinHandle<Result<()>>) -> Self {
        Self(gone)
    }

    /// Waits for it.
    ///
    /// # Errors
    /// What is left; the addresses stay held then.
    pub async fn end(self) -> Result<()> {
        self.0.await.map_err(|e| Error::internal("detach a pod").because(e))?
    }
}

/// Who is leaving.
#[derive(Debug, Default)]
pub(super) struct Leaving(watch::Sender<BTreeSet<String>>);

impl Leaving {
    /// Those who are leaving now.
    pub(super) fn now(&self) -> BTreeSet<String> {
        self.0.borrow().clone()
    }

    /// Notes a pod until the mark is dropped. One turn per pod sees to it that there
    /// are no two marks of one.
    pub(super) fn mark(&self, pod_id: &str) -> Mark {
        self.0.send_modify(|all| {
            all.insert(pod_id.to_owned());
        });
        Mark { all: self.0.clone(), pod_id: pod_id.to_owned() }
    }

    /// Waits until all of `these` have left; false where there are none.
    pub(super) async fn wait_for(&self, these: BTreeSet<String>) -> bool {
        // The sender lives as long as this, so waiting can't fail.
        let _ = self.0.subscribe().wait_for(|now| now.is_disjoint(&these)).await;
        !these.is_empty()
    }
}

/// A pod that is leaving.
#[derive(Debug)]
pub(super) struct Mark {
    all: watch::Sender<BTreeSet<String>>,
    pod_id: String,
}

impl Drop for Mark {
    fn drop(&mut self) {
        self.all.send_modify(|all| {
            all.remove(&self.pod_id);
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn who_waits_waits_for_those_alone_who_were_leaving() {
        let leaving = Leaving::default();
        assert!(!leaving.wait_for(leaving.now()).await);
        let (first, _second) = (leaving.mark("a"), leaving.mark("b"));
        let of_first = BTreeSet::from(["a".to_owned()]);
        let mut waiting = std::pin::pin!(leaving.wait_for(of_first));
        assert!(futures::poll!(&mut waiting).is_pending());
        drop(first);
        assert!(waiting.await, "b is still leaving");
        assert_eq!(leaving.now(), BTreeSet::from(["b".to_owned()]));
    }
}
