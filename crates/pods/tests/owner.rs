//! The owner of a pod against a fake runtime: what can't be provoked with a real
//! one at will. Images, snapshots, namespaces and the database are real (root).
#![allow(clippy::unwrap_used, reason = "a test that lacks its fixtures has to stop")]

use longshore_pods as pods;
use pods::sandbox::{SandboxDirs, Sandboxes};
use pods::{ContainerFilter, ContainerState, EventKind, ExitReason, PodPhase, Pods, PodsConfig, Shared};
use proto::cri::*;
use runtime::fake::{Call, FakeRuntime, Script};
use runtime::{Runtime as _, TaskState};
use snapshots::{Overlay, Snapshotter};
use std::sync::Arc;
use std::time::Duration;
use testkit::{ImageBuilder, TempRoot};
use tokio::sync::{Notify, mpsc};
use types::{ErrorKind, ExitStatus};

const IMAGE: &str = "localhost/owner:1";
/// No call of a fake takes this long: one that does hangs.
const HANGS: Duration = Duration::from_secs(20);

struct Rig {
    pods: Pods,
    fake: Arc<FakeRuntime>,
    store: store::Store,
    snapshots: Arc<dyn Snapshotter>,
    images: images::Images,
    root: TempRoot,
}

/// Pods have lo alone, and nothing of the node's network is touched.
async fn no_network(root: &TempRoot, store: store::Store) -> network::Network {
    let cni = network::cni::CniConfig {
        conf_dir: root.join("net.d"),
        bin_dirs: vec![],
        networks: vec![],
        plugin_timeout: Duration::from_secs(5),
        gc: false,
        cache_dir: root.join("root/cni"),
    };
    let builtin = network::BuiltinConfig::default();
    let config = network::NetworkConfig { mode: network::Mode::None, cni, builtin, ranges_of_pod_cidr: false };
    network::Network::open(config, store).await.unwrap()
}

async fn rig() -> Rig {
    let root = TempRoot::new();
    let store = store::Store::open(&root.join("db")).unwrap();
    let snapshots: Arc<dyn Snapshotter> =
        Arc::new(Overlay::open(&root.join("snapshots"), store.clone()).await.unwrap());
    let config = images::ImagesConfig::new(root.join("images"));
    let images = images::Images::open(config, store.clone(), snapshots.clone()).await.unwrap();
    ImageBuilder::scratch().file("hello", b"x", 0o755).cmd(["/hello"]).oci_archive(&root.join("i.tar"), IMAGE);
    images.import(&root.join("i.tar"), None).await.unwrap();
    let (tx, events) = mpsc::unbounded_channel();
    let fake = FakeRuntime::new(tx);
    let pods = start(&root, store.clone(), &snapshots, &images, fake.clone(), events).await;
    Rig { pods, fake, store, snapshots, images, root }
}

async fn start(
    root: &TempRoot,
    store: store::Store,
    snapshots: &Arc<dyn Snapshotter>,
    images: &images::Images,
    fake: Arc<FakeRuntime>,
    events: mpsc::UnboundedReceiver<runtime::RuntimeEvent>,
) -> Pods {
    let dirs = SandboxDirs { state: root.join("state"), netns: root.join("netns") };
    let handler = pods::Handler {
        name: "runc".into(),
        node: pods::facts::node_facts(None).unwrap(),
        policy: spec::NodePolicy::default(),
        sandbox: runtime::SandboxKind::Pinned,
        broken: None,
    };
    let shared = Shared {
        config: PodsConfig {
            root: root.join("root"),
            state: root.join("state"),
            drain_exec_sync_io_timeout: Some(Duration::from_secs(1)),
            log_line_limit: 16384,
            pod_init: "/bin/true".into(),
            operation_timeout: Duration::from_secs(5),
        },
        journal: pods::Journal::start(store.clone()),
        store: store.clone(),
        runtime: fake,
        images: images.clone(),
        snapshots: snapshots.clone(),
        sandboxes: Sandboxes::prepare(dirs).unwrap(),
        network: no_network(root, store).await,
        timelines: telemetry::Timelines::new(),
        events: pods::Events::default(),
        registry: pods::Registry::default(),
        handlers: pods::Handlers::new(handler, Vec::new()),
        quarantine: pods::Quarantine::default(),
        health: pods::Health::default(),
    };
    Pods::start(Arc::new(shared), events).await.unwrap()
}

fn pod_config(name: &str, pid: NamespaceMode) -> PodSandboxConfig {
    let options = NamespaceOption { network: NamespaceMode::Node.into(), pid: pid.into(), ..Default::default() };
    let sc = LinuxSandboxSecurityContext { namespace_options: Some(options), ..Default::default() };
    PodSandboxConfig {
        metadata: Some(PodSandboxMetadata { name: name.into(), uid: "u".into(), namespace: "n".into(), attempt: 0 }),
        linux: Some(LinuxPodSandboxConfig { security_context: Some(sc), ..Default::default() }),
        ..Default::default()
    }
}

fn container_config(name: &str) -> ContainerConfig {
    let options = NamespaceOption {
        network: NamespaceMode::Node.into(),
        pid: NamespaceMode::Container.into(),
        ..Default::default()
    };
    let sc = LinuxContainerSecurityContext { namespace_options: Some(options), ..Default::default() };
    ContainerConfig {
        metadata: Some(ContainerMetadata { name: name.into(), attempt: 0 }),
        image: Some(ImageSpec { image: IMAGE.into(), ..Default::default() }),
        linux: Some(LinuxContainerConfig { security_context: Some(sc), ..Default::default() }),
        ..Default::default()
    }
}

impl Rig {
    async fn pod(&self, name: &str) -> String {
        self.pods.run_pod(pod_config(name, NamespaceMode::Container), "").await.unwrap()
    }

    /// Waits until the runtime has been asked for this.
    async fn called(&self, call: Call) {
        while !self.fake.calls().iter().any(|(c, _)| *c == call) {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    async fn created(&self, pod: &str, name: &str) -> String {
        self.pods.create_container(pod, container_config(name)).await.unwrap()
    }

    async fn running(&self, pod: &str, name: &str) -> String {
        let id = self.created(pod, name).await;
        self.pods.start_container(&id).await.unwrap();
        id
    }
}

impl Rig {
    /// Another daemon on what this one has stored, with a runtime whose tasks the test
    /// makes.
    async fn again(&mut self, make: impl AsyncFnOnce(&FakeRuntime)) {
        let (tx, events) = mpsc::unbounded_channel();
        self.fake = FakeRuntime::new(tx);
        make(&self.fake).await;
        self.pods.close().await;
        let (fake, store) = (self.fake.clone(), self.store.clone());
        self.pods = start(&self.root, store, &self.snapshots, &self.images, fake, events).await;
    }

    /// Waits until this is true of a container's state.
    async fn state(&self, id: &str, what: &str, is: impl Fn(&ContainerState) -> bool) {
        let reached = async {
            while !is(self.pods.container(id).unwrap().state()) {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        let reached = tokio::time::timeout(HANGS, reached).await;
        assert!(reached.is_ok(), "{what}: {:?}", self.pods.container(id).unwrap().state());
    }
}

/// A task as an earlier daemon left it.
async fn left(fake: &FakeRuntime, pod: &str, id: &str, started: bool) {
    let spec =
        runtime::PodSpec { id: pod.into(), handler: String::new(), annotations: Default::default(), bundle_gid: None };
    let io = runtime::TaskIo { log_path: None, log_limit: 0, terminal: false, stdin: None };
    let task = runtime::TaskSpec { id: id.into(), config_json: "{}".into(), rootfs: Vec::new(), io };
    fake.create_task(&spec, &task).await.unwrap();
    if started {
        fake.start_task(pod, id).await.unwrap();
    }
}

/// Ends the test where the call hangs.
async fn soon<T>(call: impl Future<Output = T>) -> T {
    tokio::time::timeout(HANGS, call).await.expect("the call hangs")
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pod_is_removed_in_one_call_whatever_its_containers_do() {
    let rig = rig().await;
    for (n, containers) in ["", "c", "r", "crx"].iter().enumerate() {
        let pod = rig.pod(&format!("p{n}")).await;
        for (m, kind) in containers.chars().enumerate() {
            let id = rig.created(&pod, &format!("c{m}")).await;
            if kind != 'c' {
                rig.pods.start_container(&id).await.unwrap();
            }
            if kind == 'x' {
                rig.fake.exit(&pod, &id, ExitStatus::Code(3));
            }
        }
        soon(rig.pods.remove_pod(&pod)).await.unwrap();
        assert!(rig.pods.pod(&pod).unwrap_err().is_not_found());
    }
    assert!(rig.pods.containers(&ContainerFilter::default()).is_empty());
    assert!(rig.fake.pods().is_empty(), "shims are left");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_exit_that_overtakes_the_answer_to_its_start_is_kept() {
    let rig = rig().await;
    let pod = rig.pod("p").await;
    let id = rig.created(&pod, "c").await;
    let mut events = rig.pods.events();
    let gate = Arc::new(Notify::new());
    rig.fake.next(Call::StartTask, Script::LateAnswer(gate.clone()));
    let start = tokio::spawn({
        let (pods, id) = (rig.pods.clone(), id.clone());
        async move { pods.start_container(&id).await }
    });
    soon(rig.called(Call::StartTask)).await;
    let runs = async {
        while !matches!(rig.fake.task_state(&pod, &id).await, Ok(TaskState::Running { .. })) {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    };
    soon(runs).await;
    rig.fake.exit(&pod, &id, ExitStatus::Code(7));
    rig.fake.exit(&pod, &id, ExitStatus::Code(9));
    gate.notify_one();
    soon(start).await.unwrap().unwrap();
    soon(rig.pods.stop_container(&id, Duration::ZERO)).await.unwrap();
    let container = rig.pods.container(&id).unwrap();
    let ContainerState::Exited { certificate, reason, started_at, .. } = container.state() else {
        panic!("{:?}", container.state());
    };
    assert_eq!((*reason, certificate.status), (ExitReason::Error, ExitStatus::Code(7)));
    assert!(started_at.unwrap() <= certificate.exited_at);
    let mut kinds = Vec::new();
    while let Ok(event) = events.try_recv() {
        kinds.push(event.kind);
    }
    assert_eq!(kinds.iter().filter(|k| **k == EventKind::Stopped).count(), 1, "{kinds:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pod_that_could_not_be_examined_at_the_start_is_brought_in_line_later() {
    let mut rig = rig().await;
    let pod = rig.pod("p").await;
    let (ended, runs) = (rig.running(&pod, "ended").await, rig.running(&pod, "runs").await);
    // The daemon died before it could say that the second one runs.
    let (idle, came_up, half) =
        (rig.created(&pod, "idle").await, rig.created(&pod, "up").await, rig.created(&pod, "half").await);
    rig.again(async |fake| {
        for (id, started) in [(&ended, true), (&runs, true), (&came_up, true), (&half, false)] {
            left(fake, &pod, id, started).await;
        }
        fake.next(Call::Recover, Script::Fail(ErrorKind::DeadlineExceeded, "the shim hangs".into()));
        fake.next(Call::TaskState, Script::Fail(ErrorKind::DeadlineExceeded, "it still hangs".into()));
        fake.exit(&pod, &ended, ExitStatus::Code(7));
    })
    .await;
    rig.state(
        &ended,
        "its own code",
        |s| matches!(s, ContainerState::Exited { certificate, .. } if certificate.status == ExitStatus::Code(7)),
    )
    .await;
    rig.state(&came_up, "it runs", |s| matches!(s, ContainerState::Running { .. })).await;
    rig.state(&runs, "it runs on", |s| matches!(s, ContainerState::Running { .. })).await;
    soon(async {
        while rig.fake.tasks(&pod).iter().any(|(id, _)| *id == half || *id == ended) {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    })
    .await;
    for id in [&idle, &half] {
        assert!(matches!(rig.pods.container(id).unwrap().state(), ContainerState::Created));
        rig.pods.start_container(id).await.unwrap();
    }
    soon(rig.pods.remove_pod(&pod)).await.unwrap();
    assert!(rig.fake.pods().is_empty(), "shims are left");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stop_overtakes_a_start_that_hangs() {
    let rig = rig().await;
    let pod = rig.pod("p").await;
    let id = rig.created(&pod, "c").await;
    rig.fake.next(Call::StartTask, Script::Delay(Duration::from_secs(3)));
    let start = tokio::spawn({
        let (pods, id) = (rig.pods.clone(), id.clone());
        async move { pods.start_container(&id).await }
    });
    soon(rig.called(Call::StartTask)).await;
    soon(rig.pods.stop_container(&id, Duration::ZERO)).await.unwrap();
    let e = soon(start).await.unwrap().unwrap_err();
    assert_eq!(e.kind(), ErrorKind::FailedPrecondition, "{e}");
    let container = rig.pods.container(&id).unwrap();
    assert!(
        matches!(container.state(), ContainerState::Exited { reason: ExitReason::StartError, certificate, .. }
            if certificate.status.code() == 128),
        "{:?}",
        container.state()
    );
    assert!(rig.fake.tasks(&pod).is_empty(), "the task is left");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pods_stop_that_meets_a_start_leaves_nothing_running() {
    let rig = rig().await;
    for n in 0..20 {
        let pod = rig.pod(&format!("p{n}")).await;
        let id = rig.created(&pod, "c").await;
        let start = tokio::spawn({
            let (pods, id) = (rig.pods.clone(), id.clone());
            async move { pods.start_container(&id).await }
        });
        tokio::time::sleep(Duration::from_micros(150 * n)).await;
        soon(rig.pods.remove_pod(&pod)).await.unwrap();
        let _ = soon(start).await.unwrap();
    }
    assert!(rig.fake.pods().is_empty(), "shims are left");
}

#[tokio::test(flavor = "multi_thread")]
async fn retries_join_and_names_are_unique_until_they_are_free() {
    let rig = rig().await;
    rig.fake.next(Call::StartPod, Script::Delay(Duration::from_millis(300)));
    let config = pod_config("p", NamespaceMode::Container);
    let (a, b) = tokio::join!(rig.pods.run_pod(config.clone(), ""), rig.pods.run_pod(config.clone(), ""));
    let pod = a.unwrap();
    assert_eq!(pod, b.unwrap());
    assert_eq!(rig.pods.run_pod(config.clone(), "").await.unwrap_err().kind(), ErrorKind::AlreadyExists);
    let (a, b) = tokio::join!(
        rig.pods.create_container(&pod, container_config("c")),
        rig.pods.create_container(&pod, container_config("c"))
    );
    let ids = (a.unwrap(), b);
    assert!(ids.1.as_ref().is_ok_and(|id| *id == ids.0) || ids.1.unwrap_err().kind() == ErrorKind::AlreadyExists);
    soon(rig.pods.remove_pod(&pod)).await.unwrap();
    // A failed attempt gives the name back, and leaves nothing.
    rig.fake.next(Call::StartPod, Script::Fail(ErrorKind::Unavailable, "no shim today".into()));
    let e = rig.pods.run_pod(config.clone(), "").await.unwrap_err();
    assert!(e.kind() == ErrorKind::Unavailable && e.to_string().contains("no shim today"), "{e}");
    let pod = rig.pods.run_pod(config, "").await.unwrap();
    soon(rig.pods.remove_pod(&pod)).await.unwrap();
}

/// A dead init does not: `lifecycle.rs` has it, for it takes a real one.
#[tokio::test(flavor = "multi_thread")]
async fn a_dead_shim_leaves_the_pod_ready() {
    let rig = rig().await;
    let pod = rig.pod("p").await;
    let id = rig.running(&pod, "c").await;
    rig.fake.kill_shim(&pod);
    soon(rig.pods.stop_container(&id, Duration::from_secs(5))).await.unwrap();
    assert!(matches!(rig.pods.container(&id).unwrap().state(), ContainerState::Exited { .. }));
    assert_eq!(rig.pods.pod(&pod).unwrap().pod.state.phase, PodPhase::Ready);
    let again = rig.running(&pod, "d").await;
    assert!(matches!(rig.pods.container(&again).unwrap().state(), ContainerState::Running { .. }));
    soon(rig.pods.remove_pod(&pod)).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_process_that_nothing_ends_fails_the_stop_and_not_the_next_one() {
    let rig = rig().await;
    let pod = rig.pod("p").await;
    let id = rig.running(&pod, "c").await;
    for _ in 0..2 {
        rig.fake.next(Call::KillTask, Script::Fail(ErrorKind::Unavailable, "the shim is stuck".into()));
    }
    let e = soon(rig.pods.stop_container(&id, Duration::ZERO)).await.unwrap_err();
    assert!(e.to_string().contains("kill container c/0") && e.to_string().contains("the shim is stuck"), "{e}");
    // It gives in at last, and everything goes on.
    rig.fake.exit(&pod, &id, ExitStatus::Signal(9));
    soon(rig.pods.stop_container(&id, Duration::ZERO)).await.unwrap();
    soon(rig.pods.remove_pod(&pod)).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn two_updates_at_once_both_hold() {
    let rig = rig().await;
    let pod = rig.pod("p").await;
    let id = rig.running(&pod, "c").await;
    rig.fake.next(Call::UpdateTask, Script::Delay(Duration::from_millis(200)));
    let shares = LinuxContainerResources { cpu_shares: 77, ..Default::default() };
    let memory = LinuxContainerResources { memory_limit_in_bytes: 64 << 20, ..Default::default() };
    let (a, b) = tokio::join!(rig.pods.update_container(&id, shares), rig.pods.update_container(&id, memory));
    a.unwrap();
    b.unwrap();
    let limits = rig.pods.container(&id).unwrap().record.resources.clone().unwrap();
    assert_eq!((limits.cpu_shares, limits.memory_limit_in_bytes), (77, 64 << 20));
    soon(rig.pods.remove_pod(&pod)).await.unwrap();
}
