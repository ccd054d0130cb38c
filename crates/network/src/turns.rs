//! One operation per pod at a time.
//!
//! A caller that goes away leaves its operation running to its end. Without turns,
//! the removal that comes next would overtake it and find nothing to remove.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};
use tokio::sync::OwnedMutexGuard;

/// Who is at it, by pod.
#[derive(Debug, Default)]
pub(crate) struct Turns {
    pods: Mutex<BTreeMap<String, Arc<tokio::sync::Mutex<()>>>>,
}

impl Turns {
    /// Waits until every operation on this pod that asked before has ended; the next
    /// one waits until the result is dropped.
    pub(crate) async fn take(&self, pod_id: &str) -> OwnedMutexGuard<()> {
        let turn = {
            let mut pods = self.pods.lock().unwrap_or_else(PoisonError::into_inner);
            // Those that nobody has or waits for.
            pods.retain(|_, turn| Arc::strong_count(turn) > 1);
            pods.entry(pod_id.to_owned()).or_default().clone()
        };
        turn.lock_owned().await
    }
}
