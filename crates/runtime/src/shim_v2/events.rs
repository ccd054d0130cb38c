//! Where foreign shims send their events.
//!
//! Exits come by Wait (docs/decisions/0005-exits-by-wait.md); of the events only
//! one says what nothing else does: that the OOM killer struck.

use super::Inner;
use super::rpc::call;
use async_trait::async_trait;
use prost::Message;
use proto::containerd::events::TaskOom;
use proto::containerd::services::events::ttrpc::v1::{Events, EventsClient, ForwardRequest, register_events};
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::sync::{Arc, Weak};
use ttrpc::r#async::TtrpcContext;
use ttrpc::asynchronous::transport::Listener;
use types::{Error, Result, ResultExt};

struct Sink {
    inner: Weak<Inner>,
}

#[async_trait]
impl Events for Sink {
    async fn forward(&self, _ctx: &TtrpcContext, req: ForwardRequest) -> ttrpc::Result<()> {
        let Some(envelope) = req.envelope else { return Ok(()) };
        if envelope.topic == "/tasks/oom"
            && let Some(any) = envelope.event
            && let Ok(oom) = TaskOom::decode(any.value.as_slice())
            && let Some(inner) = self.inner.upgrade()
        {
            let pods: Vec<_> = inner.pods().values().cloned().collect();
            if let Some(task) = pods.iter().find_map(|p| p.task(&oom.container_id)) {
                task.oom.send_replace(true);
            }
        }
        Ok(())
    }
}

/// What `longshore publish` does, which older shims execute for each event: sends
/// it on to the daemon that serves at `address` (the shim's `-address`, without
/// the ending `.ttrpc`). `event` is an encoded `google.protobuf.Any`.
///
/// # Errors
/// `InvalidArgument` for what is no event; else why it could not be sent.
pub async fn publish(address: &std::path::Path, namespace: &str, topic: &str, event: &[u8]) -> Result<()> {
    const BOUND: std::time::Duration = std::time::Duration::from_secs(5);
    let what = || format!("publish an event of {topic} to {}", address.display());
    if !topic.starts_with('/') {
        return Err(Error::invalid(format!("{}: a topic begins with a slash", what())));
    }
    let event = prost_types::Any::decode(event)
        .context_kind(types::ErrorKind::InvalidArgument, || format!("{}: what came on stdin is no event", what()))?;
    let mut socket = address.as_os_str().to_owned();
    socket.push(".ttrpc");
    let stream = tokio::net::UnixStream::connect(&socket).await;
    let stream = stream.context_kind(types::ErrorKind::Unavailable, || format!("{}: is the daemon up?", what()))?;
    let client = EventsClient::new(ttrpc::r#async::Client::new(stream.into()), EventsClient::SERVICE);
    let envelope = proto::containerd::types::Envelope {
        timestamp: Some(crate::now().into()),
        namespace: namespace.to_string(),
        topic: topic.to_string(),
        event: Some(event),
    };
    let sent = call(BOUND, client.forward(BOUND, ForwardRequest { envelope: Some(envelope) })).await;
    sent.map(|_| ()).map_err(|e| e.within(&what(), BOUND))
}

/// Serves `<state>/events/sock.ttrpc` until the daemon ends.
pub(crate) async fn serve(inner: &Arc<Inner>) -> Result<()> {
    let mut path = inner.layout.events().into_os_string();
    path.push(".ttrpc");
    let path = std::path::PathBuf::from(path);
    let what = || format!("bind the events socket {}", path.display());
    if let Some(dir) = path.parent() {
        std::fs::DirBuilder::new().recursive(true).mode(0o700).create(dir).context(what)?;
    }
    match std::fs::remove_file(&path) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => return Err(e).context(what),
        _ => {}
    }
    let listener = std::os::unix::net::UnixListener::bind(&path).context(what)?;
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600)).context(what)?;
    let sink = Arc::new(Sink { inner: Arc::downgrade(inner) });
    let mut server = ttrpc::r#async::Server::new()
        .add_listener(Listener::try_from(listener).context(what)?)
        .register_service(register_events(sink, EventsClient::SERVICE));
    server.start().await.map_err(|e| Error::internal(what()).because(e))?;
    // Lives as long as the runtime that it was started on.
    tokio::spawn(async move {
        let _server = server;
        std::future::pending::<()>().await;
    });
    Ok(())
}
