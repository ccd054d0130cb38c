//! What is under way, for people.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

#[derive(Debug, Default, Clone)]
pub(crate) struct Ops {
    table: Arc<Mutex<Table>>,
}

#[derive(Debug, Default)]
struct Table {
    next: u64,
    running: BTreeMap<u64, (String, Instant)>,
}

/// Dropped when the operation has ended.
#[derive(Debug)]
pub(crate) struct Op {
    ops: Ops,
    id: u64,
}

impl Ops {
    fn table(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn begin(&self, what: String) -> Op {
        let mut table = self.table();
        table.next += 1;
        let id = table.next;
        table.running.insert(id, (what, Instant::now()));
        Op { ops: self.clone(), id }
    }

    pub(crate) fn ages(&self) -> Vec<(String, Duration)> {
        self.table().running.values().map(|(what, since)| (what.clone(), since.elapsed())).collect()
    }

    pub(crate) fn list(&self) -> Vec<String> {
        self.ages().into_iter().map(|(what, age)| format!("{what}, for {age:.1?}")).collect()
    }
}

impl Drop for Op {
    fn drop(&mut self) {
        self.ops.table().running.remove(&self.id);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_operation_is_listed_until_it_ends() {
        let ops = Ops::default();
        let op = ops.begin("stop pod x".into());
        assert!(ops.list()[0].starts_with("stop pod x, for "));
        drop(op);
        assert!(ops.list().is_empty());
    }
}
