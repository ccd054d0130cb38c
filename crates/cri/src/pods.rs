//! RunPodSandbox to ListPodSandbox, and the events of all.

use crate::map;
use crate::server::{Cri, Streamed};
use pods::{EventKind, PodEvent, PodFilter, PodPhase, PodView};
use proto::cri::*;
use serde_json::json;
use std::time::SystemTime;
use tokio::sync::broadcast::error::RecvError;
use types::{Error, Result};

impl Cri {
    pub(crate) async fn run_pod(&self, r: RunPodSandboxRequest) -> Result<RunPodSandboxResponse> {
        let config = r.config.ok_or_else(|| Error::invalid("the request has no pod configuration"))?;
        let pod_sandbox_id = self.pods.run_pod(config, &r.runtime_handler).await?;
        Ok(RunPodSandboxResponse { pod_sandbox_id })
    }

    pub(crate) async fn stop_pod(&self, r: StopPodSandboxRequest) -> Result<StopPodSandboxResponse> {
        self.pods.stop_pod(&r.pod_sandbox_id).await?;
        Ok(StopPodSandboxResponse {})
    }

    pub(crate) async fn remove_pod(&self, r: RemovePodSandboxRequest) -> Result<RemovePodSandboxResponse> {
        self.pods.remove_pod(&r.pod_sandbox_id).await?;
        Ok(RemovePodSandboxResponse {})
    }

    pub(crate) fn pod_status(&self, r: PodSandboxStatusRequest) -> Result<PodSandboxStatusResponse> {
        let view = self.pods.pod(&r.pod_sandbox_id)?;
        let info = if r.verbose { map::info(&verbose(&view)) } else { Default::default() };
        Ok(PodSandboxStatusResponse {
            status: Some(map::pod_status(&view.pod)),
            info,
            containers_statuses: view.containers.iter().map(|c| map::container_status(c)).collect(),
            timestamp: map::nanos(SystemTime::now()),
        })
    }

    pub(crate) fn list_pods(&self, filter: Option<PodSandboxFilter>) -> Result<Vec<PodSandbox>> {
        let filter = filter.unwrap_or_default();
        let phase = match filter.state {
            None => None,
            Some(s) => Some(match PodSandboxState::try_from(s.state) {
                Ok(PodSandboxState::SandboxReady) => PodPhase::Ready,
                Ok(PodSandboxState::SandboxNotready) => PodPhase::NotReady,
                Err(_) => return Err(Error::invalid(format!("pod state {} does not exist", s.state))),
            }),
        };
        let filter = PodFilter { id: filter.id, phase, labels: filter.label_selector.into_iter().collect() };
        Ok(self.pods.pods(&filter).iter().map(|p| map::pod(p)).collect())
    }

    pub(crate) fn events(&self) -> Streamed<ContainerEventResponse> {
        let receiver = self.pods.events();
        Box::pin(futures::stream::unfold(receiver, |mut receiver| async move {
            match receiver.recv().await {
                Ok(event) => Some((Ok(event_message(&event)), receiver)),
                // The client has missed events: it must list anew, and ending the
                // stream is how it is told.
                Err(RecvError::Lagged(n)) => {
                    let e = tonic::Status::data_loss(format!("{n} events were missed; list pods and containers anew"));
                    let (_, closed) = tokio::sync::broadcast::channel(1);
                    Some((Err(e), closed))
                }
                Err(RecvError::Closed) => None,
            }
        }))
    }
}

fn event_message(event: &PodEvent) -> ContainerEventResponse {
    let kind = match event.kind {
        EventKind::Created => ContainerEventType::ContainerCreatedEvent,
        EventKind::Started => ContainerEventType::ContainerStartedEvent,
        EventKind::Stopped => ContainerEventType::ContainerStoppedEvent,
        EventKind::Deleted => ContainerEventType::ContainerDeletedEvent,
    };
    ContainerEventResponse {
        container_id: event.id.clone(),
        container_event_type: kind.into(),
        created_at: map::nanos(event.at),
        pod_sandbox_status: event.view.as_ref().map(|v| map::pod_status(&v.pod)),
        containers_statuses: event
            .view
            .iter()
            .flat_map(|v| v.containers.iter().map(|c| map::container_status(c)))
            .collect(),
    }
}

/// Pod without a process: pid 0 (behaviours.md section 6).
fn verbose(view: &PodView) -> serde_json::Value {
    let state = &view.pod.state;
    json!({
        "pid": state.init_pid,
        "processStatus": if state.phase == PodPhase::Ready { "running" } else { "stopped" },
        "shimPid": state.process.as_ref().and_then(|p| p.shim_pid()).unwrap_or(0),
        "runtimeHandler": state.handler_name(),
        "sandbox": state.sandbox,
        "network": state.network,
        // Where tools look for it at containerd's.
        "cniResult": state.network.networks.first().and_then(|n| n.result.as_ref()),
        "config": &*view.pod.config,
    })
}
