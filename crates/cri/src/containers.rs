//! CreateContainer to ReopenContainerLog.

use crate::map;
use crate::server::Cri;
use pods::{ContainerFilter, ContainerInfo, running_pid};
use proto::cri::*;
use serde_json::json;
use std::time::Duration;
use types::{Error, Result};

/// A grace period that never ends in practice: a kubelet's is hours at most.
const LONGEST_GRACE: u64 = 365 * 24 * 3600;

/// StopContainer's timeout: -1 is the default of 10 s (behaviours.md section 2), any other
/// negative number a caller's mistake for "at once", as in both peers.
fn grace(seconds: i64) -> Duration {
    let seconds = if seconds == -1 { 10 } else { u64::try_from(seconds).unwrap_or(0) };
    Duration::from_secs(seconds.min(LONGEST_GRACE))
}

impl Cri {
    pub(crate) async fn create(&self, r: CreateContainerRequest) -> Result<CreateContainerResponse> {
        let config = r.config.ok_or_else(|| Error::invalid("the request has no container configuration"))?;
        let container_id = self.pods.create_container(&r.pod_sandbox_id, config).await?;
        Ok(CreateContainerResponse { container_id })
    }

    pub(crate) async fn start(&self, r: StartContainerRequest) -> Result<StartContainerResponse> {
        self.pods.start_container(&r.container_id).await?;
        Ok(StartContainerResponse {})
    }

    pub(crate) async fn stop(&self, r: StopContainerRequest) -> Result<StopContainerResponse> {
        self.pods.stop_container(&r.container_id, grace(r.timeout)).await?;
        Ok(StopContainerResponse {})
    }

    pub(crate) async fn remove(&self, r: RemoveContainerRequest) -> Result<RemoveContainerResponse> {
        self.pods.remove_container(&r.container_id).await?;
        Ok(RemoveContainerResponse {})
    }

    pub(crate) fn list_containers(&self, filter: Option<proto::cri::ContainerFilter>) -> Result<Vec<Container>> {
        let filter = filter.unwrap_or_default();
        let state = match filter.state {
            None => None,
            Some(s) => Some(
                ContainerState::try_from(s.state)
                    .map_err(|_| Error::invalid(format!("container state {} does not exist", s.state)))?
                    .as_str_name(),
            ),
        };
        let filter = ContainerFilter {
            id: filter.id,
            state,
            pod_id: filter.pod_sandbox_id,
            labels: filter.label_selector.into_iter().collect(),
        };
        Ok(self.pods.containers(&filter).iter().map(|c| map::container(c)).collect())
    }

    pub(crate) async fn container_status(&self, r: ContainerStatusRequest) -> Result<ContainerStatusResponse> {
        let container = self.pods.container(&r.container_id)?;
        let info = if r.verbose { map::info(&self.verbose(&container).await?) } else { Default::default() };
        Ok(ContainerStatusResponse { status: Some(map::container_status(&container)), info })
    }

    async fn verbose(&self, c: &ContainerInfo) -> Result<serde_json::Value> {
        let spec: serde_json::Value = match self.pods.spec_json(&c.id).await {
            Ok(text) => serde_json::from_str(&text).unwrap_or_default(),
            // One that is being removed has none any more.
            Err(e) if e.is_not_found() => serde_json::Value::Null,
            Err(e) => return Err(e),
        };
        let pod = self.pods.pod(&c.pod_id)?;
        let state = &pod.pod.state;
        Ok(json!({
            "sandboxID": c.pod_id,
            "pid": running_pid(c).unwrap_or(0),
            "shimPid": state.process.as_ref().and_then(|p| p.shim_pid()).unwrap_or(0),
            "runtimeHandler": state.handler_name(),
            "snapshotKey": c.id,
            "stdin": c.record.stdin,
            "warnings": c.record.warnings,
            "death": death(c),
            "config": &*c.config,
            "runtimeSpec": spec,
        }))
    }

    pub(crate) async fn update(&self, r: UpdateContainerResourcesRequest) -> Result<UpdateContainerResourcesResponse> {
        let linux = r.linux.ok_or_else(|| {
            Error::invalid(format!("the update of container {:?} has no Linux resources", r.container_id))
        })?;
        self.pods.update_container(&r.container_id, linux).await?;
        Ok(UpdateContainerResourcesResponse {})
    }

    pub(crate) async fn reopen_log(&self, r: ReopenContainerLogRequest) -> Result<ReopenContainerLogResponse> {
        self.pods.reopen_log(&r.container_id).await?;
        Ok(ReopenContainerLogResponse {})
    }
}

/// The death certificate, for people.
fn death(c: &ContainerInfo) -> serde_json::Value {
    match c.state() {
        pods::ContainerState::Exited { certificate, reason, .. } => {
            json!({ "certificate": certificate, "reason": reason.as_str() })
        }
        _ => serde_json::Value::Null,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stop_without_a_grace_period_of_its_own_has_ten_seconds() {
        let seconds = [-1, 0, -2, i64::MIN, 30, i64::MAX].map(|s| grace(s).as_secs());
        assert_eq!(seconds, [10, 0, 0, 0, 30, LONGEST_GRACE]);
    }
}
