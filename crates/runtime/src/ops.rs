//! What is under way, and what each of it waits for: for people.
//!
//! ```text
//!  Ops::detached("stop pod x", work)          task-local: which operation this is
//!      └─ step("the shim's Delete", call)     listed with it while it is awaited
//! ```

use crate::api::Operation;
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

tokio::task_local! {
    /// The operation that the task works off, and its number.
    static CURRENT: (Ops, u64);
}

#[derive(Debug, Default, Clone)]
pub(crate) struct Ops {
    table: Arc<Mutex<Table>>,
}

#[derive(Debug, Default)]
struct Table {
    next: u64,
    running: BTreeMap<u64, Running>,
}

#[derive(Debug)]
struct Running {
    what: String,
    since: Instant,
    /// What is awaited now, by numbers of their own.
    steps: BTreeMap<u64, (String, Instant)>,
}

impl Table {
    fn number(&mut self) -> u64 {
        self.next += 1;
        self.next
    }
}

/// Dropped when the operation has ended.
#[derive(Debug)]
pub(crate) struct Op {
    ops: Ops,
    id: u64,
}

impl Op {
    /// Runs `work` as that of this operation, which ends with it.
    pub(crate) async fn scope<T>(self, work: impl Future<Output = T>) -> T {
        CURRENT.scope((self.ops.clone(), self.id), work).await
    }
}

impl Ops {
    fn table(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn begin(&self, what: String) -> Op {
        let mut table = self.table();
        let id = table.number();
        table.running.insert(id, Running { what, since: Instant::now(), steps: BTreeMap::new() });
        Op { ops: self.clone(), id }
    }

    pub(crate) fn list(&self) -> Vec<Operation> {
        let table = self.table();
        let all = table.running.values().map(|r| Operation {
            what: r.what.clone(),
            age: r.since.elapsed(),
            waits_for: r.steps.values().map(|(step, since)| (step.clone(), since.elapsed())).collect(),
        });
        all.collect()
    }
}

impl Drop for Op {
    fn drop(&mut self) {
        self.ops.table().running.remove(&self.id);
    }
}

/// Awaits `work`, which `what` names in a few words ("the shim's Delete"); the operation
/// that this is part of is listed with it meanwhile. Outside of one it is only awaited.
pub(crate) async fn step<T>(what: impl Into<String>, work: impl Future<Output = T>) -> T {
    let _step = CURRENT.try_with(|(ops, op)| Step::begin(ops, *op, what.into())).ok();
    work.await
}

/// Dropped when the step has ended, or its future was.
struct Step {
    ops: Ops,
    op: u64,
    id: u64,
}

impl Step {
    fn begin(ops: &Ops, op: u64, what: String) -> Self {
        let mut table = ops.table();
        let id = table.number();
        if let Some(running) = table.running.get_mut(&op) {
            running.steps.insert(id, (what, Instant::now()));
        }
        Self { ops: ops.clone(), op, id }
    }
}

impl Drop for Step {
    fn drop(&mut self) {
        if let Some(running) = self.ops.table().running.get_mut(&self.op) {
            running.steps.remove(&self.id);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn listed(ops: &Ops) -> Vec<(String, Vec<String>)> {
        let all = ops.list().into_iter();
        all.map(|o| (o.what, o.waits_for.into_iter().map(|(step, _)| step).collect())).collect()
    }

    #[tokio::test]
    async fn an_operation_is_listed_until_it_ends_with_what_it_waits_for() {
        let ops = Ops::default();
        let op = ops.begin("stop pod x".into());
        assert_eq!(listed(&ops), [("stop pod x".into(), vec![])]);
        let table = ops.clone();
        op.scope(async move {
            let inside = step("the shim's Delete", async {
                assert_eq!(listed(&table), [("stop pod x".into(), vec!["the shim's Delete".into()])]);
                std::future::pending::<()>().await;
            });
            // One that is given up waits no more.
            assert!(tokio::time::timeout(std::time::Duration::from_millis(5), inside).await.is_err());
            assert_eq!(listed(&table), [("stop pod x".into(), vec![])]);
        })
        .await;
        assert!(ops.list().is_empty());
        assert_eq!(step("something", async { 7 }).await, 7, "also outside of one");
    }
}
