//! A daemon that remembers pods and containers and runs nothing, for the tests of
//! the commands.

use crate::cli::args::Cli;
use crate::cli::{Context, dispatch};
use clap::Parser;
use proto::cri::image_service_server::{ImageService, ImageServiceServer};
use proto::cri::runtime_service_server::{RuntimeService, RuntimeServiceServer};
use proto::cri::*;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use tokio_stream::wrappers::{BroadcastStream, UnixListenerStream};
use tokio_stream::{Stream, StreamExt};
use tonic::{Request, Response, Status};
use types::Result;

type Reply<T> = std::result::Result<Response<T>, Status>;
type Streamed<T> = std::pin::Pin<Box<dyn Stream<Item = std::result::Result<T, Status>> + Send>>;

/// What a container of the fake writes to its log when it is started.
pub const OUTPUT: &str = "2024-01-01T00:00:00.000000000Z stdout F hello\n";

#[derive(Default)]
struct State {
    pods: Vec<PodSandbox>,
    containers: Vec<(Container, ContainerStatus)>,
    calls: Vec<String>,
}

/// The fake and where it listens.
pub struct Fake {
    dir: tempfile::TempDir,
    state: Arc<Mutex<State>>,
    events: tokio::sync::broadcast::Sender<ContainerEventResponse>,
}

impl Fake {
    /// Starts it.
    pub fn start() -> Arc<Self> {
        let fake = Arc::new(Self {
            dir: tempfile::tempdir().unwrap(),
            state: Arc::default(),
            events: tokio::sync::broadcast::channel(16).0,
        });
        let listener = tokio::net::UnixListener::bind(fake.socket()).unwrap();
        tokio::spawn(
            tonic::transport::Server::builder()
                .add_service(RuntimeServiceServer::from_arc(fake.clone()))
                .add_service(ImageServiceServer::from_arc(fake.clone()))
                .serve_with_incoming(UnixListenerStream::new(listener)),
        );
        fake
    }

    /// Its socket.
    pub fn socket(&self) -> PathBuf {
        self.dir.path().join("s")
    }

    /// Its root, as `Status` tells it.
    pub fn root(&self) -> &Path {
        self.dir.path()
    }

    /// The calls that changed something, in their order.
    pub fn calls(&self) -> Vec<String> {
        self.state.lock().unwrap().calls.clone()
    }

    /// Adds a pod with one container, as if made by somebody else.
    pub fn add(&self, pod: &str, container: &str, name: &str, state: ContainerState) {
        let metadata = PodSandboxMetadata { name: format!("pod-{name}"), uid: pod.into(), ..Default::default() };
        let mut all = self.state.lock().unwrap();
        all.pods.push(PodSandbox { id: pod.into(), metadata: Some(metadata), ..Default::default() });
        let mut made = Container { id: container.into(), pod_sandbox_id: pod.into(), ..Default::default() };
        made.metadata = Some(ContainerMetadata { name: name.into(), attempt: 0 });
        made.set_state(state);
        let status = ContainerStatus { id: container.into(), state: state.into(), ..Default::default() };
        all.containers.push((made, status));
    }

    fn note(&self, call: &str, id: &str) {
        self.state.lock().unwrap().calls.push(format!("{call} {id}"));
    }

    fn end(&self, id: &str, code: i32) {
        let mut all = self.state.lock().unwrap();
        for (container, status) in all.containers.iter_mut().filter(|(c, _)| c.id == id) {
            container.set_state(ContainerState::ContainerExited);
            status.set_state(ContainerState::ContainerExited);
            status.exit_code = code;
        }
        drop(all);
        let event = ContainerEventResponse { container_id: id.into(), ..Default::default() };
        let _ = self.events.send(event);
    }
}

/// Runs a command line as the binary would.
pub async fn command(fake: &Fake, words: &[&str]) -> Result<u8> {
    let cli = Cli::parse_from(["longshore"].iter().chain(words));
    dispatch(&Context { socket: fake.socket(), format: cli.output }, cli.command).await
}

macro_rules! runtime {
    (served { $($served:tt)* } unserved { $($name:ident $request:ident $response:ident;)* }
     streams { $($stream:ident $sname:ident $srequest:ident $sresponse:ident;)* }) => {
        #[tonic::async_trait]
        impl RuntimeService for Fake {
            type GetContainerEventsStream = Streamed<ContainerEventResponse>;
            $($served)*
            $(async fn $name(&self, _: Request<$request>) -> Reply<$response> {
                Err(Status::unimplemented(stringify!($name)))
            })*
            $(type $stream = Streamed<$sresponse>;
            async fn $sname(&self, _: Request<$srequest>) -> Reply<Self::$stream> {
                Err(Status::unimplemented(stringify!($sname)))
            })*
        }
    };
}

runtime! {
    served {
        async fn status(&self, _: Request<StatusRequest>) -> Reply<StatusResponse> {
            let info = format!("{{\"root\": {:?}}}", self.root());
            Ok(Response::new(StatusResponse { info: [("info".to_string(), info)].into(), ..Default::default() }))
        }
        async fn run_pod_sandbox(&self, r: Request<RunPodSandboxRequest>) -> Reply<RunPodSandboxResponse> {
            let config = r.into_inner().config.unwrap();
            let id = format!("{:064x}", self.state.lock().unwrap().pods.len() + 0xa0);
            self.note("run_pod", &config.metadata.as_ref().unwrap().name);
            let pod = PodSandbox { id: id.clone(), metadata: config.metadata, labels: config.labels, ..Default::default() };
            self.state.lock().unwrap().pods.push(pod);
            std::fs::write(self.root().join("log_directory"), config.log_directory).unwrap();
            Ok(Response::new(RunPodSandboxResponse { pod_sandbox_id: id }))
        }
        async fn stop_pod_sandbox(&self, r: Request<StopPodSandboxRequest>) -> Reply<StopPodSandboxResponse> {
            let id = r.into_inner().pod_sandbox_id;
            self.note("stop_pod", &id);
            for pod in self.state.lock().unwrap().pods.iter_mut().filter(|p| p.id == id) {
                pod.set_state(PodSandboxState::SandboxNotready);
            }
            Ok(Response::new(Default::default()))
        }
        async fn remove_pod_sandbox(&self, r: Request<RemovePodSandboxRequest>) -> Reply<RemovePodSandboxResponse> {
            let id = r.into_inner().pod_sandbox_id;
            self.note("remove_pod", &id);
            let mut state = self.state.lock().unwrap();
            state.pods.retain(|p| p.id != id);
            state.containers.retain(|(c, _)| c.pod_sandbox_id != id);
            Ok(Response::new(Default::default()))
        }
        async fn list_pod_sandbox(&self, _: Request<ListPodSandboxRequest>) -> Reply<ListPodSandboxResponse> {
            Ok(Response::new(ListPodSandboxResponse { items: self.state.lock().unwrap().pods.clone() }))
        }
        async fn pod_sandbox_status(&self, r: Request<PodSandboxStatusRequest>) -> Reply<PodSandboxStatusResponse> {
            let id = r.into_inner().pod_sandbox_id;
            let status = PodSandboxStatus { id, ..Default::default() };
            Ok(Response::new(PodSandboxStatusResponse { status: Some(status), ..Default::default() }))
        }
        async fn create_container(&self, r: Request<CreateContainerRequest>) -> Reply<CreateContainerResponse> {
            let r = r.into_inner();
            let config = r.config.unwrap();
            if config.args.first().is_some_and(|a| a == "refuse-create") {
                return Err(Status::invalid_argument("refused"));
            }
            let mut state = self.state.lock().unwrap();
            let id = format!("{:064x}", state.containers.len() + 0xc0);
            let log_path = format!("{}/{}", r.sandbox_config.unwrap().log_directory, config.log_path);
            let container = Container {
                id: id.clone(), pod_sandbox_id: r.pod_sandbox_id, metadata: config.metadata, image: config.image,
                ..Default::default()
            };
            let code = config.args.first().and_then(|a| a.parse().ok()).unwrap_or(0);
            let status = ContainerStatus { id: id.clone(), log_path, exit_code: code, ..Default::default() };
            state.containers.push((container, status));
            Ok(Response::new(CreateContainerResponse { container_id: id }))
        }
        async fn start_container(&self, r: Request<StartContainerRequest>) -> Reply<StartContainerResponse> {
            let id = r.into_inner().container_id;
            let (log, code) = {
                let mut state = self.state.lock().unwrap();
                let (container, status) = state.containers.iter_mut().find(|(c, _)| c.id == id).unwrap();
                container.set_state(ContainerState::ContainerRunning);
                status.set_state(ContainerState::ContainerRunning);
                (status.log_path.clone(), status.exit_code)
            };
            if code == 128 {
                self.end(&id, 128);
                let mut state = self.state.lock().unwrap();
                state.containers.iter_mut().for_each(|(_, s)| s.reason = "StartError".into());
                return Err(Status::failed_precondition("no such file"));
            }
            std::fs::write(log, OUTPUT).unwrap();
            self.end(&id, code);
            Ok(Response::new(Default::default()))
        }
        async fn stop_container(&self, r: Request<StopContainerRequest>) -> Reply<StopContainerResponse> {
            let id = r.into_inner().container_id;
            self.note("stop", &id);
            self.end(&id, 137);
            Ok(Response::new(Default::default()))
        }
        async fn remove_container(&self, r: Request<RemoveContainerRequest>) -> Reply<RemoveContainerResponse> {
            let id = r.into_inner().container_id;
            self.note("remove", &id);
            self.state.lock().unwrap().containers.retain(|(c, _)| c.id != id);
            Ok(Response::new(Default::default()))
        }
        async fn list_containers(&self, _: Request<ListContainersRequest>) -> Reply<ListContainersResponse> {
            let containers = self.state.lock().unwrap().containers.iter().map(|(c, _)| c.clone()).collect();
            Ok(Response::new(ListContainersResponse { containers }))
        }
        async fn container_status(&self, r: Request<ContainerStatusRequest>) -> Reply<ContainerStatusResponse> {
            let id = r.into_inner().container_id;
            let state = self.state.lock().unwrap();
            let status = state.containers.iter().find(|(c, _)| c.id == id).map(|(_, s)| s.clone());
            let status = Some(status.ok_or_else(|| Status::not_found(format!("container {id}")))?);
            Ok(Response::new(ContainerStatusResponse { status, ..Default::default() }))
        }
        async fn exec_sync(&self, r: Request<ExecSyncRequest>) -> Reply<ExecSyncResponse> {
            let r = r.into_inner();
            self.note("exec", &r.container_id);
            // Longer than a client's usual limit of 4 MiB.
            let stdout = vec![b'x'; if r.cmd[0] == "long" { 16 << 20 } else { 0 }].into();
            Ok(Response::new(ExecSyncResponse { stdout, exit_code: 7, ..Default::default() }))
        }
        async fn get_container_events(&self, _: Request<GetEventsRequest>) -> Reply<Self::GetContainerEventsStream> {
            let events = BroadcastStream::new(self.events.subscribe());
            Ok(Response::new(Box::pin(events.map(|e| e.map_err(|e| Status::internal(e.to_string()))))))
        }
    }
    unserved {
        version VersionRequest VersionResponse;
        update_container_resources UpdateContainerResourcesRequest UpdateContainerResourcesResponse;
        reopen_container_log ReopenContainerLogRequest ReopenContainerLogResponse;
        exec ExecRequest ExecResponse;
        attach AttachRequest AttachResponse;
        port_forward PortForwardRequest PortForwardResponse;
        container_stats ContainerStatsRequest ContainerStatsResponse;
        list_container_stats ListContainerStatsRequest ListContainerStatsResponse;
        pod_sandbox_stats PodSandboxStatsRequest PodSandboxStatsResponse;
        list_pod_sandbox_stats ListPodSandboxStatsRequest ListPodSandboxStatsResponse;
        update_runtime_config UpdateRuntimeConfigRequest UpdateRuntimeConfigResponse;
        checkpoint_container CheckpointContainerRequest CheckpointContainerResponse;
        checkpoint_pod CheckpointPodRequest CheckpointPodResponse;
        restore_pod RestorePodRequest RestorePodResponse;
        list_metric_descriptors ListMetricDescriptorsRequest ListMetricDescriptorsResponse;
        list_pod_sandbox_metrics ListPodSandboxMetricsRequest ListPodSandboxMetricsResponse;
        runtime_config RuntimeConfigRequest RuntimeConfigResponse;
        update_pod_sandbox_resources UpdatePodSandboxResourcesRequest UpdatePodSandboxResourcesResponse;
    }
    streams {
        StreamPodSandboxesStream stream_pod_sandboxes StreamPodSandboxesRequest StreamPodSandboxesResponse;
        StreamContainersStream stream_containers StreamContainersRequest StreamContainersResponse;
        StreamContainerStatsStream stream_container_stats StreamContainerStatsRequest StreamContainerStatsResponse;
        StreamPodSandboxStatsStream stream_pod_sandbox_stats StreamPodSandboxStatsRequest StreamPodSandboxStatsResponse;
        StreamPodSandboxMetricsStream stream_pod_sandbox_metrics StreamPodSandboxMetricsRequest StreamPodSandboxMetricsResponse;
    }
}

#[tonic::async_trait]
impl ImageService for Fake {
    type StreamImagesStream = Streamed<StreamImagesResponse>;
    async fn list_images(&self, _: Request<ListImagesRequest>) -> Reply<ListImagesResponse> {
        Ok(Response::new(Default::default()))
    }
    async fn stream_images(&self, _: Request<StreamImagesRequest>) -> Reply<Self::StreamImagesStream> {
        Err(Status::unimplemented("stream_images"))
    }
    async fn image_status(&self, r: Request<ImageStatusRequest>) -> Reply<ImageStatusResponse> {
        let name = r.into_inner().image.unwrap().image;
        let image = (name == "busybox").then(|| Image { id: "sha256:00".into(), ..Default::default() });
        Ok(Response::new(ImageStatusResponse { image, ..Default::default() }))
    }
    async fn pull_image(&self, r: Request<PullImageRequest>) -> Reply<PullImageResponse> {
        let name = r.into_inner().image.unwrap().image;
        self.note("pull", &name);
        Err(Status::not_found(format!("{name} is in no registry")))
    }
    async fn remove_image(&self, _: Request<RemoveImageRequest>) -> Reply<RemoveImageResponse> {
        Ok(Response::new(Default::default()))
    }
    async fn image_fs_info(&self, _: Request<ImageFsInfoRequest>) -> Reply<ImageFsInfoResponse> {
        Ok(Response::new(Default::default()))
    }
}
