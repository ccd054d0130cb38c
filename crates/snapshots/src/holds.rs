//! What is needed by an operation under way.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError, Weak};
use tokio::sync::OwnedMutexGuard;

/// Counts, per key, the operations that need it.
#[derive(Debug, Clone, Default)]
pub struct Holds {
    counts: Arc<Mutex<HashMap<String, usize>>>,
}

impl Holds {
    /// Holds `keys` until the returned value is dropped.
    pub fn hold(&self, keys: Vec<String>) -> Hold {
        let mut counts = self.counts.lock().unwrap_or_else(PoisonError::into_inner);
        for key in &keys {
            *counts.entry(key.clone()).or_default() += 1;
        }
        Hold { keys, holds: self.clone() }
    }

    /// True while somebody holds `key`.
    pub fn is_held(&self, key: &str) -> bool {
        self.counts.lock().unwrap_or_else(PoisonError::into_inner).contains_key(key)
    }
}

/// Keys that are held; dropping it lets them go.
#[derive(Debug)]
#[must_use = "dropping it lets the layers go"]
pub struct Hold {
    keys: Vec<String>,
    holds: Holds,
}

impl Drop for Hold {
    fn drop(&mut self) {
        let mut counts = self.holds.counts.lock().unwrap_or_else(PoisonError::into_inner);
        for key in &self.keys {
            if let Some(count) = counts.get_mut(key) {
                *count -= 1;
                if *count == 0 {
                    counts.remove(key);
                }
            }
        }
    }
}

/// A lock per key, so that one piece of work is done once however many want it.
#[derive(Debug, Default)]
pub struct KeyLocks {
    locks: Mutex<HashMap<String, Weak<tokio::sync::Mutex<()>>>>,
}

impl KeyLocks {
    /// Waits for its turn on `key`.
    pub async fn lock(&self, key: &str) -> OwnedMutexGuard<()> {
        let lock = {
            let mut locks = self.locks.lock().unwrap_or_else(PoisonError::into_inner);
            locks.retain(|_, lock| lock.strong_count() > 0);
            match locks.get(key).and_then(Weak::upgrade) {
                Some(lock) => lock,
                None => {
                    let lock = Arc::new(tokio::sync::Mutex::new(()));
                    locks.insert(key.to_owned(), Arc::downgrade(&lock));
                    lock
                }
            }
        };
        lock.lock_owned().await
    }
}
