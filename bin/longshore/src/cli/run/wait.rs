//! The end of a container, by CRI's events; nothing is polled.

use crate::cli::client::{Answer, Client, error, present};
use proto::cri::{ContainerState, ContainerStatus, ContainerStatusRequest, GetEventsRequest};
use std::time::{Duration, Instant};
use types::{Error, ErrorKind, Result};

/// How long a daemon may be away (it restarts, its containers go on) before we give up.
const ABSENCE: Duration = Duration::from_secs(30);
/// How long to wait before the connection is tried again.
const RETRY: Duration = Duration::from_millis(200);

/// The container's status.
///
/// # Errors
/// As the call.
pub async fn status(client: &mut Client, id: &str) -> Result<ContainerStatus> {
    let request = ContainerStatusRequest { container_id: id.to_string(), verbose: false };
    let answer = client.runtime.container_status(request).await.answer(|| format!("ask for container {id}"))?;
    present(answer.status, || format!("status of container {id}"))
}

/// Waits for the container's end, and gives its last status.
///
/// # Errors
/// `NotFound` when it is removed meanwhile; `Unavailable` when the daemon stays away
/// for longer than half a minute.
pub async fn exit(client: &mut Client, id: &str) -> Result<ContainerStatus> {
    let mut away_since: Option<Instant> = None;
    loop {
        match watch(client, id, &mut away_since).await {
            Ok(Some(status)) => return Ok(status),
            // The stream ended: the daemon did, or it tells that events were lost.
            Ok(None) => {}
            Err(e) if e.kind() == ErrorKind::Unavailable => {
                let since = *away_since.get_or_insert_with(Instant::now);
                if since.elapsed() > ABSENCE {
                    return Err(e.within(format!("wait for container {id}")).hint("the container goes on"));
                }
            }
            Err(e) => return Err(e),
        }
        tokio::time::sleep(RETRY).await;
    }
}

/// Subscribes first and asks then, so that no end falls in between. A daemon that answers
/// is not away.
async fn watch(client: &mut Client, id: &str, away_since: &mut Option<Instant>) -> Result<Option<ContainerStatus>> {
    let events = client.runtime.get_container_events(GetEventsRequest::default()).await;
    let mut events = events.answer(|| "subscribe to events".to_string())?;
    loop {
        let now = status(client, id).await?;
        *away_since = None;
        if now.state() == ContainerState::ContainerExited {
            return Ok(Some(now));
        }
        loop {
            match events.message().await {
                Ok(Some(event)) if event.container_id == id => break,
                Ok(Some(_)) => {}
                Ok(None) => return Ok(None),
                Err(status) if status.code() == tonic::Code::DataLoss => return Ok(None),
                // A dropped connection shows as one of several codes.
                Err(status) => {
                    let lost: Error = error(&status);
                    return Err(lost.with_kind(ErrorKind::Unavailable));
                }
            }
        }
    }
}
