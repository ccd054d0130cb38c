//! Events to the caller, in order, by ttrpc to TTRPC_ADDRESS.
//!
//! One task owns the connection. A caller that is away, or hangs, is tried again with
//! growing pauses; an event that has failed ten times is dropped, as is the oldest when
//! a thousand wait, at the moment when one more comes: after a reconnection State and Wait are
//! the truth (behaviours.md section 3).

use prost::Message;
use proto::containerd::events as wire;
use proto::containerd::services::events::ttrpc::v1::{EventsClient, ForwardRequest};
use proto::containerd::types::Envelope;
use std::collections::VecDeque;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, SystemTime};
use tokio::sync::watch;
use types::{Result, ResultExt};

const LONGEST_QUEUE: usize = 1024;
const TRIES: u32 = 10;
const FIRST_PAUSE: Duration = Duration::from_millis(50);
const LONGEST_PAUSE: Duration = Duration::from_secs(5);
const CALL: Duration = Duration::from_secs(5);

/// An event, on its topic.
#[derive(Debug, Clone, PartialEq)]
pub enum Event {
    /// /tasks/create
    Create(wire::TaskCreate),
    /// /tasks/start
    Start(wire::TaskStart),
    /// /tasks/exit
    Exit(wire::TaskExit),
    /// /tasks/delete
    Delete(wire::TaskDelete),
    /// /tasks/oom
    Oom(wire::TaskOom),
    /// /tasks/paused
    Paused(wire::TaskPaused),
    /// /tasks/resumed
    Resumed(wire::TaskResumed),
    /// /tasks/exec-added
    ExecAdded(wire::TaskExecAdded),
    /// /tasks/exec-started
    ExecStarted(wire::TaskExecStarted),
    /// /tasks/checkpointed
    Checkpointed(wire::TaskCheckpointed),
}

impl Event {
    /// Its topic, the full name of its message, its bytes.
    fn parts(&self) -> (&'static str, &'static str, Vec<u8>) {
        match self {
            Self::Create(m) => ("/tasks/create", "containerd.events.TaskCreate", m.encode_to_vec()),
            Self::Start(m) => ("/tasks/start", "containerd.events.TaskStart", m.encode_to_vec()),
            Self::Exit(m) => ("/tasks/exit", "containerd.events.TaskExit", m.encode_to_vec()),
            Self::Delete(m) => ("/tasks/delete", "containerd.events.TaskDelete", m.encode_to_vec()),
            Self::Oom(m) => ("/tasks/oom", "containerd.events.TaskOOM", m.encode_to_vec()),
            Self::Paused(m) => ("/tasks/paused", "containerd.events.TaskPaused", m.encode_to_vec()),
            Self::Resumed(m) => ("/tasks/resumed", "containerd.events.TaskResumed", m.encode_to_vec()),
            Self::ExecAdded(m) => ("/tasks/exec-added", "containerd.events.TaskExecAdded", m.encode_to_vec()),
            Self::ExecStarted(m) => ("/tasks/exec-started", "containerd.events.TaskExecStarted", m.encode_to_vec()),
            Self::Checkpointed(m) => ("/tasks/checkpointed", "containerd.events.TaskCheckpointed", m.encode_to_vec()),
        }
    }
}

/// What has been handed in and not been sent or dropped, oldest first. Each event has
/// its number.
#[derive(Debug, Default)]
struct Queue {
    waiting: VecDeque<Envelope>,
    /// The number of the next event to be handed in.
    next: u64,
    sending: Option<u64>,
}

impl Queue {
    fn push(&mut self, event: Envelope) {
        if self.waiting.len() == LONGEST_QUEUE {
            self.waiting.pop_front();
        }
        self.waiting.push_back(event);
        self.next += 1;
    }

    fn pop(&mut self) -> Option<Envelope> {
        let number = self.oldest_waiting();
        let event = self.waiting.pop_front();
        self.sending = event.is_some().then_some(number);
        event
    }

    fn oldest_waiting(&self) -> u64 {
        self.next - self.waiting.len() as u64
    }

    /// Whether everything before this number has been sent or dropped.
    fn is_through(&self, number: u64) -> bool {
        self.sending.unwrap_or_else(|| self.oldest_waiting()) >= number
    }
}

/// Where events are handed in. Clones share the queue.
#[derive(Clone)]
pub struct Publisher {
    queue: Option<Arc<watch::Sender<Queue>>>,
    namespace: String,
}

impl Publisher {
    /// Publishes to the socket at `address`; to nobody where it is empty.
    pub fn new(address: &str, namespace: &str) -> Self {
        let path = address.strip_prefix("unix://").unwrap_or(address);
        let queue = (!path.is_empty()).then(|| {
            let queue = Arc::new(watch::channel(Queue::default()).0);
            tokio::spawn(Sender { path: path.into(), client: None }.run(queue.clone()));
            queue
        });
        Self { queue, namespace: namespace.into() }
    }

    /// Hands in an event; never waits.
    pub fn publish(&self, event: &Event) {
        let Some(queue) = &self.queue else { return };
        let (topic, type_url, value) = event.parts();
        let envelope = Envelope {
            timestamp: Some(crate::wire::timestamp(SystemTime::now())),
            namespace: self.namespace.clone(),
            topic: topic.into(),
            event: Some(prost_types::Any { type_url: type_url.into(), value }),
        };
        queue.send_modify(|q| q.push(envelope));
    }

    /// Waits, at most for `bound`, until what was handed in has been sent or dropped.
    pub async fn flush(&self, bound: Duration) {
        let Some(queue) = &self.queue else { return };
        let last = queue.borrow().next;
        let _ = tokio::time::timeout(bound, queue.subscribe().wait_for(|q| q.is_through(last))).await;
    }
}

struct Sender {
    path: PathBuf,
    client: Option<EventsClient>,
}

impl Sender {
    /// Ends with the process only.
    async fn run(mut self, queue: Arc<watch::Sender<Queue>>) {
        let mut news = queue.subscribe();
        loop {
            let mut event = None;
            queue.send_modify(|q| event = q.pop());
            match event {
                Some(event) => self.send(event).await,
                None => {
                    let _ = news.wait_for(|q| !q.waiting.is_empty()).await;
                }
            }
        }
    }

    async fn send(&mut self, envelope: Envelope) {
        let mut pause = FIRST_PAUSE;
        for attempt in 1..=TRIES {
            match self.try_send(&envelope).await {
                Ok(()) => return,
                Err(e) if attempt == TRIES => {
                    crate::log::warn(format_args!("event {} is dropped: {e}", envelope.topic));
                }
                Err(_) => {
                    self.client = None;
                    tokio::time::sleep(pause).await;
                    pause = (pause * 2).min(LONGEST_PAUSE);
                }
            }
        }
    }

    async fn try_send(&mut self, envelope: &Envelope) -> Result<()> {
        let what = || format!("forward an event to {}", self.path.display());
        let client = match &self.client {
            Some(c) => c.clone(),
            None => {
                let stream = tokio::net::UnixStream::connect(&self.path).await.context(what)?;
                let client = ttrpc::r#async::Client::new(stream.into());
                self.client.insert(EventsClient::new(client, EventsClient::SERVICE)).clone()
            }
        };
        client.forward(CALL, ForwardRequest { envelope: Some(envelope.clone()) }).await.context(what)?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proto::containerd::services::events::ttrpc::v1::{Events, register_events};
    use std::sync::{Arc, Mutex};

    #[derive(Default)]
    struct Recorder(Mutex<Vec<String>>);

    #[async_trait::async_trait]
    impl Events for Recorder {
        async fn forward(&self, _: &ttrpc::r#async::TtrpcContext, req: ForwardRequest) -> ttrpc::Result<()> {
            let event = req.envelope.and_then(|e| e.event).unwrap();
            self.0.lock().unwrap().push(wire::TaskOom::decode(event.value.as_slice()).unwrap().container_id);
            Ok(())
        }
    }

    fn oom(id: usize) -> Event {
        Event::Oom(wire::TaskOom { container_id: id.to_string() })
    }

    #[tokio::test]
    async fn without_an_address_nothing_is_kept() {
        let p = Publisher::new("", "ns");
        p.publish(&oom(1));
        p.flush(Duration::from_secs(1)).await;
    }

    #[tokio::test]
    async fn a_caller_that_comes_late_gets_all_in_order() {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("s");
        let p = Publisher::new(socket.to_str().unwrap(), "ns");
        for n in 0..20 {
            p.publish(&oom(n));
        }
        tokio::time::sleep(Duration::from_millis(200)).await;
        let recorder = Arc::new(Recorder::default());
        let mut server = ttrpc::r#async::Server::new()
            .bind(&format!("unix://{}", socket.display()))
            .unwrap()
            .register_service(register_events(recorder.clone(), EventsClient::SERVICE));
        server.start().await.unwrap();
        p.flush(Duration::from_secs(10)).await;
        let want: Vec<String> = (0..20).map(|n: usize| n.to_string()).collect();
        assert_eq!(*recorder.0.lock().unwrap(), want);
    }

    #[test]
    fn the_oldest_makes_room_and_who_flushes_waits_for_what_is_left() {
        let event = |n: usize| Envelope { topic: n.to_string(), ..Envelope::default() };
        let mut q = Queue::default();
        assert!(q.is_through(0));
        q.push(event(0));
        assert_eq!(q.pop(), Some(event(0)), "it is being sent");
        for n in 1..=2 * LONGEST_QUEUE {
            q.push(event(n));
        }
        assert_eq!(q.waiting.len(), LONGEST_QUEUE);
        assert!(!q.is_through(1), "the first is still being sent");
        let last = q.next;
        let mut seen = Vec::new();
        while let Some(e) = q.pop() {
            assert!(!q.is_through(last));
            seen.push(e.topic);
        }
        assert!(q.is_through(last));
        let want: Vec<String> = (LONGEST_QUEUE + 1..=2 * LONGEST_QUEUE).map(|n| n.to_string()).collect();
        assert_eq!(seen, want);
    }
}
