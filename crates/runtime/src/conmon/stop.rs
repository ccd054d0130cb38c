//! A pod is stopped: its containers, each whatever becomes of the others, then its bundle.

use super::Inner;
use crate::bundle::{self, blocking};
use std::sync::Arc;
use tokio::task::JoinSet;
use types::{Error, Result, Signal};

impl Inner {
    pub(super) async fn stop_pod(self: &Arc<Self>, id: &str) -> Result<()> {
        let mut all = JoinSet::new();
        for container in self.known_tasks(id) {
            let (inner, pod) = (self.clone(), id.to_string());
            all.spawn(async move { inner.end_task(&pod, &container, "the end of its pod").await });
        }
        let mut errors: Vec<Error> = all.join_all().await.into_iter().filter_map(Result::err).collect();
        // The bundle leads the next attempt to what could not be ended.
        if errors.is_empty() {
            let dir = self.layout.pod(id);
            errors.extend(blocking(move || bundle::remove_pod(&dir)).await.err());
        }
        if errors.is_empty() {
            self.pods().remove(id);
        }
        Error::join(&format!("stop pod {id}"), errors)
    }

    /// SIGKILL, the end, delete: for what must go. An unknown one is success.
    pub(super) async fn end_task(self: &Arc<Self>, pod: &str, id: &str, why: &str) -> Result<()> {
        if let Ok(task) = self.task(pod, id) {
            self.kill_task(pod, id, Signal::KILL, true, why).await?;
            if task.live().is_some() {
                self.await_end(&task).await?;
            }
        }
        self.delete_task(pod, id).await
    }

    /// The tasks in the table and those whose bundles lie there.
    pub(super) fn known_tasks(&self, pod: &str) -> Vec<String> {
        let mut ids: Vec<String> = self.find(pod).map(|p| p.tasks().keys().cloned().collect()).unwrap_or_default();
        for id in bundle::list(&self.layout.tasks(pod)) {
            if !ids.contains(&id) {
                ids.push(id);
            }
        }
        ids
    }
}
