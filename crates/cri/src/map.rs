//! From what pods, containers and images are to CRI's messages.

use ::images::Image;
use pods::{ContainerInfo, ContainerState, PodInfo, PodPhase};
use proto::cri;
use std::time::{SystemTime, UNIX_EPOCH};

/// Nanoseconds since the epoch, as CRI counts.
pub fn nanos(at: SystemTime) -> i64 {
    at.duration_since(UNIX_EPOCH).map_or(0, |d| i64::try_from(d.as_nanos()).unwrap_or(i64::MAX))
}

/// CRI's state of a pod.
pub fn pod_state(phase: PodPhase) -> cri::PodSandboxState {
    match phase {
        PodPhase::Ready => cri::PodSandboxState::SandboxReady,
        PodPhase::NotReady => cri::PodSandboxState::SandboxNotready,
    }
}

/// A pod in a list.
pub fn pod(pod: &PodInfo) -> cri::PodSandbox {
    cri::PodSandbox {
        id: pod.id.clone(),
        metadata: pod.config.metadata.clone(),
        state: pod_state(pod.state.phase).into(),
        created_at: nanos(pod.created_at),
        labels: pod.config.labels.clone(),
        annotations: pod.config.annotations.clone(),
        runtime_handler: pod.state.handler.clone(),
    }
}

/// A pod's status.
pub fn pod_status(pod: &PodInfo) -> cri::PodSandboxStatus {
    let options = pod
        .config
        .linux
        .as_ref()
        .and_then(|l| l.security_context.as_ref())
        .and_then(|s| s.namespace_options.clone())
        .unwrap_or_default();
    cri::PodSandboxStatus {
        id: pod.id.clone(),
        metadata: pod.config.metadata.clone(),
        state: pod_state(pod.state.phase).into(),
        created_at: nanos(pod.created_at),
        network: Some(network_status(pod)),
        linux: Some(cri::LinuxPodSandboxStatus { namespaces: Some(cri::Namespace { options: Some(options) }) }),
        labels: pod.config.labels.clone(),
        annotations: pod.config.annotations.clone(),
        runtime_handler: pod.state.handler.clone(),
    }
}

/// A pod's addresses; none in the node's network, as both peers have it.
fn network_status(pod: &PodInfo) -> cri::PodSandboxNetworkStatus {
    let mut addresses = pod.state.network.addresses().map(|a| a.to_string());
    let ip = addresses.next().unwrap_or_default();
    cri::PodSandboxNetworkStatus { ip, additional_ips: addresses.map(|ip| cri::PodIp { ip }).collect() }
}

/// CRI's state of a container.
pub fn container_state(state: &ContainerState) -> cri::ContainerState {
    match state {
        ContainerState::Created => cri::ContainerState::ContainerCreated,
        ContainerState::Running { .. } => cri::ContainerState::ContainerRunning,
        ContainerState::Exited { .. } => cri::ContainerState::ContainerExited,
    }
}

/// The image by its first tag: a kubelet asks for it by its id, and shows people
/// what is answered here.
fn image_spec(c: &ContainerInfo) -> Option<cri::ImageSpec> {
    let mut spec = c.config.image.clone()?;
    if !c.record.image_name.is_empty() {
        spec.image.clone_from(&c.record.image_name);
    }
    Some(spec)
}

/// A container in a list.
pub fn container(c: &ContainerInfo) -> cri::Container {
    cri::Container {
        id: c.id.clone(),
        pod_sandbox_id: c.pod_id.clone(),
        metadata: c.config.metadata.clone(),
        image: image_spec(c),
        image_ref: c.record.image_ref.clone(),
        state: container_state(c.state()).into(),
        created_at: nanos(c.created_at),
        labels: c.config.labels.clone(),
        annotations: c.config.annotations.clone(),
        image_id: c.record.image_id.clone(),
    }
}

/// A container's status.
pub fn container_status(c: &ContainerInfo) -> cri::ContainerStatus {
    let mut status = cri::ContainerStatus {
        id: c.id.clone(),
        metadata: c.config.metadata.clone(),
        state: container_state(c.state()).into(),
        created_at: nanos(c.created_at),
        image: image_spec(c),
        image_ref: c.record.image_ref.clone(),
        image_id: c.record.image_id.clone(),
        labels: c.config.labels.clone(),
        annotations: c.config.annotations.clone(),
        mounts: c.config.mounts.clone(),
        log_path: c.record.log_path.as_ref().map(|p| p.to_string_lossy().into_owned()).unwrap_or_default(),
        resources: c
            .record
            .resources
            .clone()
            .map(|linux| cri::ContainerResources { linux: Some(linux), windows: None }),
        user: Some(cri::ContainerUser {
            linux: Some(cri::LinuxContainerUser {
                uid: i64::from(c.record.user.uid),
                gid: i64::from(c.record.user.gid),
                supplemental_groups: c.record.user.groups.iter().map(|g| i64::from(*g)).collect(),
            }),
        }),
        stop_signal: pods::stop_signal_of(c).into(),
        ..Default::default()
    };
    match c.state() {
        ContainerState::Created => {}
        ContainerState::Running { started_at, .. } => status.started_at = nanos(*started_at),
        ContainerState::Exited { started_at, certificate, reason, message } => {
            status.finished_at = nanos(certificate.exited_at);
            // One that never started began and ended at once.
            status.started_at = started_at.map_or(status.finished_at, nanos);
            status.exit_code = certificate.status.code();
            status.reason = reason.as_str().to_string();
            status.message.clone_from(message);
        }
    }
    status
}

/// An image.
pub fn image(image: &Image) -> cri::Image {
    let (uid, username) = image_user(image);
    cri::Image {
        id: image.id.clone(),
        repo_tags: image.repo_tags.clone(),
        repo_digests: image.repo_digests.clone(),
        size: image.size,
        uid,
        username,
        spec: None,
        pinned: image.pinned,
    }
}

/// A numeric user as a uid, another by name; the group is none of CRI's business.
fn image_user(image: &Image) -> (Option<cri::Int64Value>, String) {
    let user = image.config.config().as_ref().and_then(|c| c.user().clone()).unwrap_or_default();
    let user = user.split(':').next().unwrap_or_default();
    match user.parse::<i64>() {
        Ok(uid) => (Some(cri::Int64Value { value: uid }), String::new()),
        Err(_) => (None, user.to_string()),
    }
}

/// JSON for the `info` of a verbose status, which crictl prints as it is.
pub fn info(value: &serde_json::Value) -> std::collections::HashMap<String, String> {
    std::collections::HashMap::from([("info".to_string(), value.to_string())])
}
