//! A CRI client with a raised message limit, and the usual configurations.

use crate::node::command_line;
use hyper_util::rt::TokioIo;
use proto::cri::image_service_client::ImageServiceClient;
use proto::cri::runtime_service_client::RuntimeServiceClient;
use proto::cri::*;
use std::path::Path;
use tokio::net::UnixStream;
use tonic::Status;
use tonic::transport::{Channel, Endpoint};

const LONGEST_MESSAGE: usize = 64 << 20;

/// Both services of a CRI socket. Clones share one connection.
#[derive(Clone)]
pub struct Cri {
    /// Pods and containers.
    pub runtime: RuntimeServiceClient<Channel>,
    /// Images.
    pub images: ImageServiceClient<Channel>,
}

/// The configuration of a pod in the node's network whose containers have pid
/// namespaces of their own, as a kubelet asks for most.
pub fn pod(name: &str) -> PodSandboxConfig {
    PodSandboxConfig {
        metadata: Some(PodSandboxMetadata {
            name: name.into(),
            uid: format!("uid-{name}"),
            namespace: "test".into(),
            attempt: 0,
        }),
        linux: Some(LinuxPodSandboxConfig {
            cgroup_parent: format!("/longshore-e2e-{}/{name}", std::process::id()),
            security_context: Some(LinuxSandboxSecurityContext {
                namespace_options: Some(NamespaceOption {
                    network: NamespaceMode::Node.into(),
                    pid: NamespaceMode::Container.into(),
                    ..Default::default()
                }),
                ..Default::default()
            }),
            ..Default::default()
        }),
        ..Default::default()
    }
}

/// The configuration of a container of `image` that runs `command`, for a pod made
/// by [`pod`].
pub fn container(name: &str, image: &str, command: &[&str]) -> ContainerConfig {
    ContainerConfig {
        metadata: Some(ContainerMetadata { name: name.into(), attempt: 0 }),
        image: Some(ImageSpec { image: image.into(), ..Default::default() }),
        command: command.iter().map(ToString::to_string).collect(),
        linux: Some(LinuxContainerConfig {
            resources: Some(LinuxContainerResources::default()),
            security_context: Some(LinuxContainerSecurityContext {
                namespace_options: Some(NamespaceOption {
                    network: NamespaceMode::Node.into(),
                    pid: NamespaceMode::Container.into(),
                    ..Default::default()
                }),
                ..Default::default()
            }),
        }),
        ..Default::default()
    }
}

impl Cri {
    /// Connects to a CRI socket.
    pub async fn connect(socket: &Path) -> Result<Self, tonic::transport::Error> {
        let path = socket.to_path_buf();
        let channel = Endpoint::from_static("http://localhost")
            .connect_with_connector(tower::service_fn(move |_| {
                let path = path.clone();
                async move { UnixStream::connect(path).await.map(TokioIo::new) }
            }))
            .await?;
        Ok(Self {
            runtime: RuntimeServiceClient::new(channel.clone())
                .max_decoding_message_size(LONGEST_MESSAGE)
                .max_encoding_message_size(LONGEST_MESSAGE),
            images: ImageServiceClient::new(channel),
        })
    }

    /// RunPodSandbox.
    pub async fn run_pod(&self, config: &PodSandboxConfig) -> Result<String, Status> {
        self.run_pod_by("", config).await
    }

    /// RunPodSandbox with a handler.
    pub async fn run_pod_by(&self, handler: &str, config: &PodSandboxConfig) -> Result<String, Status> {
        let request = RunPodSandboxRequest { config: Some(config.clone()), runtime_handler: handler.into() };
        Ok(self.runtime.clone().run_pod_sandbox(request).await?.into_inner().pod_sandbox_id)
    }

    /// CreateContainer.
    pub async fn create(&self, pod: &str, config: &ContainerConfig, of: &PodSandboxConfig) -> Result<String, Status> {
        let request = CreateContainerRequest {
            pod_sandbox_id: pod.into(),
            config: Some(config.clone()),
            sandbox_config: Some(of.clone()),
        };
        Ok(self.runtime.clone().create_container(request).await?.into_inner().container_id)
    }

    /// StartContainer.
    pub async fn start(&self, id: &str) -> Result<(), Status> {
        self.runtime.clone().start_container(StartContainerRequest { container_id: id.into() }).await.map(drop)
    }

    /// CreateContainer and StartContainer, until its process is the command.
    pub async fn run(&self, pod: &str, config: &ContainerConfig, of: &PodSandboxConfig) -> Result<String, Status> {
        let id = self.create(pod, config, of).await?;
        self.start(&id).await?;
        self.is_command(&id).await?;
        Ok(id)
    }

    /// Waits until a started container's process is its command, or has ended: for a
    /// moment it is still runc's init, which a signal ends with a code of its own.
    pub async fn is_command(&self, id: &str) -> Result<(), Status> {
        let pid = self.pid_of(id).await?;
        while pid != 0 && command_line(pid).ends_with("runc init") {
            tokio::time::sleep(std::time::Duration::from_millis(2)).await;
        }
        Ok(())
    }

    /// ExecSync; `timeout` in seconds, 0 for none.
    pub async fn exec(&self, id: &str, cmd: &[&str], timeout: i64) -> Result<ExecSyncResponse, Status> {
        let cmd = cmd.iter().map(ToString::to_string).collect();
        let request = ExecSyncRequest { container_id: id.into(), cmd, timeout };
        self.runtime.clone().exec_sync(request).await.map(tonic::Response::into_inner)
    }

    /// ContainerStatus.
    pub async fn status(&self, id: &str) -> Result<ContainerStatus, Status> {
        let request = ContainerStatusRequest { container_id: id.into(), verbose: false };
        let status = self.runtime.clone().container_status(request).await?.into_inner().status;
        status.ok_or_else(|| Status::internal("no status"))
    }

    /// ContainerStatus's verbose information.
    pub async fn info(&self, id: &str) -> Result<serde_json::Value, Status> {
        let request = ContainerStatusRequest { container_id: id.into(), verbose: true };
        let info = self.runtime.clone().container_status(request).await?.into_inner().info;
        serde_json::from_str(&info["info"]).map_err(|e| Status::internal(e.to_string()))
    }

    /// The pid of a container's init; 0 for one that does not run.
    pub async fn pid_of(&self, id: &str) -> Result<u32, Status> {
        Ok(u32::try_from(self.info(id).await?["pid"].as_u64().unwrap_or(0)).unwrap())
    }

    /// PodSandboxStatus, verbose.
    pub async fn pod_status(&self, id: &str) -> Result<PodSandboxStatusResponse, Status> {
        let request = PodSandboxStatusRequest { pod_sandbox_id: id.into(), verbose: true };
        self.runtime.clone().pod_sandbox_status(request).await.map(tonic::Response::into_inner)
    }

    /// StopContainer.
    pub async fn stop(&self, id: &str, timeout: i64) -> Result<(), Status> {
        let request = StopContainerRequest { container_id: id.into(), timeout };
        self.runtime.clone().stop_container(request).await.map(drop)
    }

    /// RemoveContainer.
    pub async fn remove(&self, id: &str) -> Result<(), Status> {
        self.runtime.clone().remove_container(RemoveContainerRequest { container_id: id.into() }).await.map(drop)
    }

    /// StopPodSandbox.
    pub async fn stop_pod(&self, id: &str) -> Result<(), Status> {
        self.runtime.clone().stop_pod_sandbox(StopPodSandboxRequest { pod_sandbox_id: id.into() }).await.map(drop)
    }

    /// RemovePodSandbox.
    pub async fn remove_pod(&self, id: &str) -> Result<(), Status> {
        self.runtime.clone().remove_pod_sandbox(RemovePodSandboxRequest { pod_sandbox_id: id.into() }).await.map(drop)
    }

    /// All pods' ids.
    pub async fn pods(&self) -> Result<Vec<String>, Status> {
        let items = self.runtime.clone().list_pod_sandbox(ListPodSandboxRequest::default()).await?.into_inner().items;
        Ok(items.into_iter().map(|p| p.id).collect())
    }

    /// Stops and removes every pod, going on over failures, which are returned.
    pub async fn remove_all(&self) -> Vec<Status> {
        let mut failures = Vec::new();
        match self.pods().await {
            Ok(pods) => {
                for pod in pods {
                    failures.extend(self.stop_pod(&pod).await.err());
                    failures.extend(self.remove_pod(&pod).await.err());
                }
            }
            Err(e) => failures.push(e),
        }
        failures
    }

    /// Waits until a container has exited and gives its status.
    pub async fn exited(&self, id: &str, within: std::time::Duration) -> ContainerStatus {
        let deadline = tokio::time::Instant::now() + within;
        loop {
            let status = self.status(id).await.unwrap();
            if status.state() == ContainerState::ContainerExited {
                return status;
            }
            assert!(tokio::time::Instant::now() < deadline, "container {id} has not exited: {status:?}");
            tokio::time::sleep(std::time::Duration::from_millis(10)).await;
        }
    }
}
