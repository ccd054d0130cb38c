//! The two CRI services and the admin service on one listener.

use crate::authority::LenientAuthority;
use crate::errors::{not_yet, status};
use crate::node::Node;
use ::images::Images;
use ::pods::Pods;
use proto::admin::admin_server::AdminServer;
use proto::cri::image_service_server::ImageServiceServer;
use proto::cri::runtime_service_server::{RuntimeService, RuntimeServiceServer};
use proto::cri::*;
use std::pin::Pin;
use std::sync::Arc;
use tokio::net::UnixListener;
use tokio_stream::{Stream, StreamExt, wrappers::UnixListenerStream};
use tonic::{Request, Response, Status};
use types::{Result, ResultExt};

/// The largest request in bytes: a pod's configuration is far below.
const LARGEST_REQUEST: usize = 16 << 20;
/// The largest answer in bytes: ExecSync's two streams of 16 MiB and their frame.
const LARGEST_ANSWER: usize = 64 << 20;
/// How many entries one message of a streamed list carries.
const PER_MESSAGE: usize = 256;

/// What serves CRI.
#[derive(Clone)]
pub struct Cri {
    /// Pods and containers.
    pub pods: Pods,
    /// Images.
    pub images: Images,
    /// What the node can do, for Status.
    pub node: Arc<Node>,
}

/// Serves CRI and the admin service until `stop` is done; calls that run then are
/// given no time: their work goes on in owners and shims.
///
/// # Errors
/// When the listener fails.
pub async fn serve(cri: Cri, listener: UnixListener, stop: impl Future<Output = ()>) -> Result<()> {
    let incoming = UnixListenerStream::new(listener).map(|s| s.map(LenientAuthority::new));
    let runtime = RuntimeServiceServer::new(cri.clone())
        .max_decoding_message_size(LARGEST_REQUEST)
        .max_encoding_message_size(LARGEST_ANSWER);
    let images = ImageServiceServer::new(cri.clone())
        .max_decoding_message_size(LARGEST_REQUEST)
        .max_encoding_message_size(LARGEST_ANSWER);
    let server = tonic::transport::Server::builder()
        // Small windows would make a 32 MiB answer wait for its reader's updates.
        .initial_stream_window_size(1 << 20)
        .initial_connection_window_size(4 << 20)
        .http2_max_pending_accept_reset_streams(Some(64))
        .add_service(runtime)
        .add_service(images)
        .add_service(AdminServer::new(cri))
        .serve_with_incoming(incoming);
    tokio::select! {
        done = server => done.context(|| "serve CRI".into()),
        () = stop => Ok(()),
    }
}

type Answer<T> = Result<Response<T>, Status>;
/// A streamed answer.
pub(crate) type Streamed<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

/// A list in messages of a bounded size.
pub(crate) fn in_chunks<T: Send + 'static, M: Send + 'static>(
    items: Vec<T>,
    message: impl Fn(Vec<T>) -> M + Send + 'static,
) -> Streamed<M> {
    let mut items = items.into_iter();
    Box::pin(tokio_stream::iter(std::iter::from_fn(move || {
        let chunk: Vec<T> = items.by_ref().take(PER_MESSAGE).collect();
        if chunk.is_empty() { None } else { Some(Ok(message(chunk))) }
    })))
}

#[tonic::async_trait]
impl RuntimeService for Cri {
    async fn version(&self, _: Request<VersionRequest>) -> Answer<VersionResponse> {
        Ok(Response::new(self.node.version()))
    }
    async fn status(&self, r: Request<StatusRequest>) -> Answer<StatusResponse> {
        Ok(Response::new(self.node.status(&self.pods, r.get_ref().verbose).await))
    }
    async fn runtime_config(&self, _: Request<RuntimeConfigRequest>) -> Answer<RuntimeConfigResponse> {
        Ok(Response::new(self.node.runtime_config()))
    }
    async fn update_runtime_config(
        &self,
        r: Request<UpdateRuntimeConfigRequest>,
    ) -> Answer<UpdateRuntimeConfigResponse> {
        let config = r.into_inner().runtime_config.and_then(|c| c.network_config).unwrap_or_default();
        let taken = self.pods.set_pod_cidr(&config.pod_cidr).await;
        taken.map(|()| Response::new(UpdateRuntimeConfigResponse {})).map_err(status("UpdateRuntimeConfig"))
    }

    async fn run_pod_sandbox(&self, r: Request<RunPodSandboxRequest>) -> Answer<RunPodSandboxResponse> {
        self.run_pod(r.into_inner()).await.map(Response::new).map_err(status("RunPodSandbox"))
    }
    async fn stop_pod_sandbox(&self, r: Request<StopPodSandboxRequest>) -> Answer<StopPodSandboxResponse> {
        self.stop_pod(r.into_inner()).await.map(Response::new).map_err(status("StopPodSandbox"))
    }
    async fn remove_pod_sandbox(&self, r: Request<RemovePodSandboxRequest>) -> Answer<RemovePodSandboxResponse> {
        self.remove_pod(r.into_inner()).await.map(Response::new).map_err(status("RemovePodSandbox"))
    }
    async fn pod_sandbox_status(&self, r: Request<PodSandboxStatusRequest>) -> Answer<PodSandboxStatusResponse> {
        self.pod_status(r.into_inner()).map(Response::new).map_err(status("PodSandboxStatus"))
    }
    async fn list_pod_sandbox(&self, r: Request<ListPodSandboxRequest>) -> Answer<ListPodSandboxResponse> {
        let items = self.list_pods(r.into_inner().filter).map_err(status("ListPodSandbox"))?;
        Ok(Response::new(ListPodSandboxResponse { items }))
    }
    type StreamPodSandboxesStream = Streamed<StreamPodSandboxesResponse>;
    async fn stream_pod_sandboxes(
        &self,
        r: Request<StreamPodSandboxesRequest>,
    ) -> Answer<Self::StreamPodSandboxesStream> {
        let items = self.list_pods(r.into_inner().filter).map_err(status("StreamPodSandboxes"))?;
        Ok(Response::new(in_chunks(items, |pod_sandboxes| StreamPodSandboxesResponse { pod_sandboxes })))
    }

    async fn create_container(&self, r: Request<CreateContainerRequest>) -> Answer<CreateContainerResponse> {
        self.create(r.into_inner()).await.map(Response::new).map_err(status("CreateContainer"))
    }
    async fn start_container(&self, r: Request<StartContainerRequest>) -> Answer<StartContainerResponse> {
        self.start(r.into_inner()).await.map(Response::new).map_err(status("StartContainer"))
    }
    async fn stop_container(&self, r: Request<StopContainerRequest>) -> Answer<StopContainerResponse> {
        self.stop(r.into_inner()).await.map(Response::new).map_err(status("StopContainer"))
    }
    async fn remove_container(&self, r: Request<RemoveContainerRequest>) -> Answer<RemoveContainerResponse> {
        self.remove(r.into_inner()).await.map(Response::new).map_err(status("RemoveContainer"))
    }
    async fn list_containers(&self, r: Request<ListContainersRequest>) -> Answer<ListContainersResponse> {
        let containers = self.list_containers(r.into_inner().filter).map_err(status("ListContainers"))?;
        Ok(Response::new(ListContainersResponse { containers }))
    }
    type StreamContainersStream = Streamed<StreamContainersResponse>;
    async fn stream_containers(&self, r: Request<StreamContainersRequest>) -> Answer<Self::StreamContainersStream> {
        let items = self.list_containers(r.into_inner().filter).map_err(status("StreamContainers"))?;
        Ok(Response::new(in_chunks(items, |containers| StreamContainersResponse { containers })))
    }
    async fn container_status(&self, r: Request<ContainerStatusRequest>) -> Answer<ContainerStatusResponse> {
        self.container_status(r.into_inner()).await.map(Response::new).map_err(status("ContainerStatus"))
    }
    async fn update_container_resources(
        &self,
        r: Request<UpdateContainerResourcesRequest>,
    ) -> Answer<UpdateContainerResourcesResponse> {
        self.update(r.into_inner()).await.map(Response::new).map_err(status("UpdateContainerResources"))
    }
    async fn reopen_container_log(&self, r: Request<ReopenContainerLogRequest>) -> Answer<ReopenContainerLogResponse> {
        self.reopen_log(r.into_inner()).await.map(Response::new).map_err(status("ReopenContainerLog"))
    }
    async fn exec_sync(&self, r: Request<ExecSyncRequest>) -> Answer<ExecSyncResponse> {
        self.run_command(r.into_inner()).await.map(Response::new).map_err(status("ExecSync"))
    }

    type GetContainerEventsStream = Streamed<ContainerEventResponse>;
    async fn get_container_events(&self, _: Request<GetEventsRequest>) -> Answer<Self::GetContainerEventsStream> {
        Ok(Response::new(self.events()))
    }

    async fn exec(&self, _: Request<ExecRequest>) -> Answer<ExecResponse> {
        Err(not_yet("Exec"))
    }
    async fn attach(&self, _: Request<AttachRequest>) -> Answer<AttachResponse> {
        Err(not_yet("Attach"))
    }
    async fn port_forward(&self, _: Request<PortForwardRequest>) -> Answer<PortForwardResponse> {
        Err(not_yet("PortForward"))
    }
    async fn container_stats(&self, _: Request<ContainerStatsRequest>) -> Answer<ContainerStatsResponse> {
        Err(not_yet("ContainerStats"))
    }
    async fn list_container_stats(&self, _: Request<ListContainerStatsRequest>) -> Answer<ListContainerStatsResponse> {
        Err(not_yet("ListContainerStats"))
    }
    type StreamContainerStatsStream = Streamed<StreamContainerStatsResponse>;
    async fn stream_container_stats(
        &self,
        _: Request<StreamContainerStatsRequest>,
    ) -> Answer<Self::StreamContainerStatsStream> {
        Err(not_yet("StreamContainerStats"))
    }
    async fn pod_sandbox_stats(&self, _: Request<PodSandboxStatsRequest>) -> Answer<PodSandboxStatsResponse> {
        Err(not_yet("PodSandboxStats"))
    }
    async fn list_pod_sandbox_stats(
        &self,
        _: Request<ListPodSandboxStatsRequest>,
    ) -> Answer<ListPodSandboxStatsResponse> {
        Err(not_yet("ListPodSandboxStats"))
    }
    type StreamPodSandboxStatsStream = Streamed<StreamPodSandboxStatsResponse>;
    async fn stream_pod_sandbox_stats(
        &self,
        _: Request<StreamPodSandboxStatsRequest>,
    ) -> Answer<Self::StreamPodSandboxStatsStream> {
        Err(not_yet("StreamPodSandboxStats"))
    }
    async fn checkpoint_container(
        &self,
        _: Request<CheckpointContainerRequest>,
    ) -> Answer<CheckpointContainerResponse> {
        Err(not_yet("CheckpointContainer"))
    }
    async fn checkpoint_pod(&self, _: Request<CheckpointPodRequest>) -> Answer<CheckpointPodResponse> {
        Err(not_yet("CheckpointPod"))
    }
    async fn restore_pod(&self, _: Request<RestorePodRequest>) -> Answer<RestorePodResponse> {
        Err(not_yet("RestorePod"))
    }
    async fn list_metric_descriptors(
        &self,
        _: Request<ListMetricDescriptorsRequest>,
    ) -> Answer<ListMetricDescriptorsResponse> {
        Err(not_yet("ListMetricDescriptors"))
    }
    async fn list_pod_sandbox_metrics(
        &self,
        _: Request<ListPodSandboxMetricsRequest>,
    ) -> Answer<ListPodSandboxMetricsResponse> {
        Err(not_yet("ListPodSandboxMetrics"))
    }
    type StreamPodSandboxMetricsStream = Streamed<StreamPodSandboxMetricsResponse>;
    async fn stream_pod_sandbox_metrics(
        &self,
        _: Request<StreamPodSandboxMetricsRequest>,
    ) -> Answer<Self::StreamPodSandboxMetricsStream> {
        Err(not_yet("StreamPodSandboxMetrics"))
    }
    async fn update_pod_sandbox_resources(
        &self,
        _: Request<UpdatePodSandboxResourcesRequest>,
    ) -> Answer<UpdatePodSandboxResourcesResponse> {
        Err(not_yet("UpdatePodSandboxResources"))
    }
}
