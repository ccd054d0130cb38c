//! Writes of pods and containers, in the order in which they were decided.
//!
//! A pod's owner never awaits IO: it hands a write over and goes on; what must
//! wait for the write (an answer, above all) is a call-back that runs after it.

use fault::Step;
use store::{ContainerRecord, PodRecord, Store};
use tokio::sync::mpsc;
use types::Result;

/// One write.
pub enum Write {
    /// A new pod.
    Pod(PodRecord),
    /// A pod's changed state.
    PodState(String, String),
    /// A pod that is gone, with its timeline.
    DeletePod(String),
    /// A new container.
    Container(ContainerRecord),
    /// A container's changed state.
    ContainerState(String, String),
    /// A container that is gone.
    DeleteContainer(String),
    /// A pod's timeline.
    Timeline(String, String),
}

impl Write {
    fn step(&self) -> Option<Step> {
        Some(match self {
            Self::Pod(_) => Step::RecordPod,
            Self::PodState(..) => Step::RecordPodState,
            Self::DeletePod(_) => Step::ForgetPod,
            Self::Container(_) => Step::RecordContainer,
            Self::ContainerState(..) => Step::RecordContainerState,
            Self::DeleteContainer(_) => Step::ForgetContainer,
            Self::Timeline(..) => return None,
        })
    }
}

type Then = Box<dyn FnOnce(Result<()>) + Send>;

/// The queue before the database. Clones share it.
#[derive(Clone)]
pub struct Journal {
    queue: mpsc::UnboundedSender<(Write, Then)>,
}

impl Journal {
    /// Starts the journal's task; it ends when the last clone is dropped.
    pub fn start(store: Store) -> Self {
        let (queue, mut writes) = mpsc::unbounded_channel::<(Write, Then)>();
        tokio::spawn(async move {
            while let Some((write, then)) = writes.recv().await {
                let step = write.step();
                if let Some(step) = step {
                    fault::before(step);
                }
                let outcome = apply(&store, write).await;
                if let Some(step) = step {
                    fault::after(step);
                }
                then(outcome);
            }
        });
        Self { queue }
    }

    /// Queues a write; `then` runs after it, with its outcome.
    pub fn submit(&self, write: Write, then: impl FnOnce(Result<()>) + Send + 'static) {
        // The task ends only with the process: a send that fails is a shutdown.
        let _ = self.queue.send((write, Box::new(then)));
    }

    /// Queues a write whose failure is only worth a line in the log: the state in
    /// memory is right, and recovery finds the truth from what runs.
    pub fn note(&self, write: Write) {
        self.submit(write, |outcome| {
            if let Err(e) = outcome {
                tracing::warn!("the database misses a change until the next one: {e}");
            }
        });
    }

    /// Waits until all that was queued before is written.
    pub async fn flush(&self) {
        let (tx, rx) = tokio::sync::oneshot::channel();
        self.submit(Write::Timeline(String::new(), String::new()), move |_| {
            let _ = tx.send(());
        });
        let _ = rx.await;
    }
}

async fn apply(store: &Store, write: Write) -> Result<()> {
    match write {
        Write::Pod(record) => store.put_pod(record).await,
        Write::PodState(id, json) => store.update_pod_state(&id, json).await,
        Write::DeletePod(id) => store.delete_pod(&id).await,
        Write::Container(record) => store.put_container(record).await,
        Write::ContainerState(id, json) => store.update_container_state(&id, json).await,
        Write::DeleteContainer(id) => store.delete_container(&id).await,
        Write::Timeline(id, _) if id.is_empty() => Ok(()),
        Write::Timeline(id, json) => store.put_timeline(&id, json).await,
    }
}
