//! Failures: each with the right gRPC code, a message that names the culprit, and
//! nothing left behind.
#![allow(clippy::unwrap_used, reason = "a test that lacks its fixtures has to stop")]

use longshore_tests::{Cri, Daemon, Footprint, Handler, IMAGE, busybox, container, not_with};
use proto::cri::*;
use std::time::Duration;
use testkit::TempRoot;
use tonic::{Code, Status};

const BOUND: Duration = Duration::from_secs(30);

/// A daemon with one pod, in which things fail.
struct World {
    cri: Cri,
    pod: String,
    config: PodSandboxConfig,
    before: Footprint,
    daemon: Daemon,
}

async fn world(daemon: Daemon) -> World {
    daemon.import(&busybox(), IMAGE);
    let cri = daemon.cri().await;
    let config = daemon.pod("errors");
    let pod = cri.run_pod(&config).await.unwrap();
    let before = daemon.footprint();
    World { cri, pod, config, before, daemon }
}

impl World {
    async fn create(&self, config: &ContainerConfig) -> Result<String, Status> {
        self.cri.create(&self.pod, config, &self.config).await
    }

    /// CreateContainer is refused so, and leaves nothing.
    async fn refuses(&self, config: &ContainerConfig, code: Code, says: &[&str]) {
        let e = self.create(config).await.expect_err("it is refused");
        assert_eq!(e.code(), code, "{e}");
        for part in says {
            assert!(e.message().contains(part), "{part:?} is missing in: {}", e.message());
        }
        assert_eq!(self.count().await, 0);
        self.daemon.leaves_nothing_but(&self.before);
    }

    /// StartContainer fails: the container is an exit with 128 that says why.
    async fn start_fails(&self, config: &ContainerConfig, says: &[&str]) {
        let id = self.create(config).await.unwrap();
        let e = self.cri.start(&id).await.expect_err("it can't start");
        let status = self.cri.status(&id).await.unwrap();
        assert_eq!(status.state(), ContainerState::ContainerExited);
        assert_eq!((status.exit_code, status.reason.as_str()), (128, "StartError"), "{status:?}");
        assert_eq!((status.started_at, status.finished_at), (status.created_at, status.created_at), "{status:?}");
        for part in says {
            assert!(e.message().contains(part), "{part:?} is missing in: {}", e.message());
            assert!(status.message.contains(part), "{part:?} is missing in: {}", status.message);
        }
        // It is an exit like others: it can be stopped, not started, and removed.
        self.cri.stop(&id, 0).await.unwrap();
        assert_eq!(self.cri.start(&id).await.unwrap_err().code(), Code::FailedPrecondition);
        self.cri.remove(&id).await.unwrap();
        self.daemon.leaves_nothing_but(&self.before);
    }

    async fn count(&self) -> usize {
        let request = ListContainersRequest::default();
        self.cri.runtime.clone().list_containers(request).await.unwrap().into_inner().containers.len()
    }
}

fn mount(host: &str, at: &str) -> Mount {
    Mount { container_path: at.into(), host_path: host.into(), ..Default::default() }
}

fn security(config: &mut ContainerConfig) -> &mut LinuxContainerSecurityContext {
    config.linux.as_mut().unwrap().security_context.as_mut().unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_is_refused_by_name() {
    let w = world(Daemon::start().await).await;
    let main = || container("main", IMAGE, &["true"]);
    w.refuses(&container("main", "localhost/no/such:1", &["true"]), Code::NotFound, &["localhost/no/such:1"]).await;
    w.refuses(&container("main", "", &["true"]), Code::InvalidArgument, &["image"]).await;
    w.refuses(&container("", IMAGE, &["true"]), Code::InvalidArgument, &["name"]).await;

    let mut c = main();
    security(&mut c).run_as_username = "ghost".into();
    w.refuses(&c, Code::InvalidArgument, &["ghost"]).await;
    let mut c = main();
    security(&mut c).run_as_group = Some(Int64Value { value: 7 });
    w.refuses(&c, Code::InvalidArgument, &["group"]).await;
    let mut c = main();
    security(&mut c).capabilities = Some(Capability { add_capabilities: vec!["FLYING".into()], ..Default::default() });
    w.refuses(&c, Code::InvalidArgument, &["FLYING"]).await;

    // A host path below a file can't be made.
    let file = w.daemon.dir().join("a-file");
    std::fs::write(&file, "").unwrap();
    let below = file.join("child").to_string_lossy().into_owned();
    let mut c = main();
    c.mounts = vec![mount(&below, "/data")];
    w.refuses(&c, Code::InvalidArgument, &[&below]).await;
    let mut c = main();
    c.mounts = vec![mount("relative/path", "/data")];
    w.refuses(&c, Code::InvalidArgument, &["relative/path"]).await;
    let mut c = main();
    c.log_path = "../escape.log".into();
    w.refuses(&c, Code::InvalidArgument, &["../escape.log"]).await;

    let no_pod = w.cri.create("0123456789ab", &main(), &w.config).await.unwrap_err();
    assert_eq!(no_pod.code(), Code::NotFound, "{no_pod}");
    let pull = PullImageRequest {
        image: Some(ImageSpec { image: "127.0.0.1:1/no/such:1".into(), ..Default::default() }),
        ..Default::default()
    };
    let e = w.cri.images.clone().pull_image(pull).await.unwrap_err();
    assert!(e.message().contains("127.0.0.1:1"), "{e}");

    let mut nameless = w.daemon.pod("nameless");
    nameless.metadata.as_mut().unwrap().name = String::new();
    assert_eq!(w.cri.run_pod(&nameless).await.unwrap_err().code(), Code::InvalidArgument);
    let mut wrong = w.daemon.pod("wrong");
    wrong.linux.as_mut().unwrap().sysctls.insert("kernel.panic".into(), "1".into());
    let e = w.cri.run_pod(&wrong).await.unwrap_err();
    assert!(e.code() == Code::InvalidArgument && e.message().contains("kernel.panic"), "{e}");
    let request = RunPodSandboxRequest { config: Some(w.daemon.pod("handler")), runtime_handler: "nope".into() };
    let e = w.cri.runtime.clone().run_pod_sandbox(request).await.unwrap_err();
    assert!(e.code() == Code::InvalidArgument && e.message().contains("nope"), "{e}");
    assert_eq!(w.cri.pods().await.unwrap().len(), 1);
    w.daemon.leaves_nothing_but(&w.before);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_process_that_cannot_start_is_an_exit_that_says_why() {
    let w = world(Daemon::start().await).await;
    w.start_fails(&container("main", IMAGE, &["no-such-command"]), &["no-such-command"]).await;
    w.start_fails(&container("main", IMAGE, &["/etc/passwd"]), &["/etc/passwd", "permission denied"]).await;
    // Onto a file of the image's a directory can't be mounted.
    let mut c = container("main", IMAGE, &["true"]);
    let host = w.daemon.dir().join("a-dir");
    std::fs::create_dir(&host).unwrap();
    c.mounts = vec![mount(&host.to_string_lossy(), "/etc/passwd")];
    w.start_fails(&c, &["/etc/passwd"]).await;
    // The pod is none the worse for it.
    let id = w.create(&container("main", IMAGE, &["sh", "-c", "exit 2"])).await.unwrap();
    w.cri.start(&id).await.unwrap();
    assert_eq!(w.cri.exited(&id, BOUND).await.exit_code, 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn names_are_taken_once_and_stopped_pods_start_nothing() {
    let w = world(Daemon::start().await).await;
    let e = w.cri.run_pod(&w.config).await.unwrap_err();
    assert!(e.code() == Code::AlreadyExists && e.message().contains("errors"), "{e}");
    let c = container("main", IMAGE, &["sleep", "1000"]);
    let id = w.create(&c).await.unwrap();
    let created = w.daemon.footprint();
    let e = w.create(&c).await.unwrap_err();
    assert!(e.code() == Code::AlreadyExists && e.message().contains("main"), "{e}");
    w.daemon.leaves_nothing_but(&created);
    // The next attempt is another name, and a removed one is free.
    let mut next = c.clone();
    next.metadata.as_mut().unwrap().attempt = 1;
    let second = w.create(&next).await.unwrap();
    w.cri.remove(&second).await.unwrap();
    let second = w.create(&next).await.unwrap();

    w.cri.start(&id).await.unwrap();
    w.cri.stop_pod(&w.pod).await.unwrap();
    assert_eq!(w.cri.status(&id).await.unwrap().state(), ContainerState::ContainerExited);
    let stopped = w.daemon.footprint();
    let calls = [
        w.create(&container("late", IMAGE, &["true"])).await.map(drop),
        w.cri.start(&second).await,
        w.cri.exec(&id, &["true"], 5).await.map(drop),
    ];
    for e in calls {
        let e = e.unwrap_err();
        assert_eq!(e.code(), Code::FailedPrecondition, "{e}");
    }
    w.daemon.leaves_nothing_but(&stopped);
    assert_eq!(w.cri.pod_status(&w.pod).await.unwrap().status.unwrap().state(), PodSandboxState::SandboxNotready);
    w.cri.remove_pod(&w.pod).await.unwrap();
    // Its name is free again.
    let again = w.cri.run_pod(&w.config).await.unwrap();
    assert_ne!(again, w.pod);
}

/// A daemon on a disk of 64 MiB, and a pod with a container that runs and one that
/// ends after so many seconds.
async fn small(seconds: &str) -> (Daemon, Footprint, PodSandboxConfig, String, [String; 2]) {
    let daemon = Daemon::on(TempRoot::small_disk(64 << 20), "").await;
    daemon.import(&busybox(), IMAGE);
    let cri = daemon.cri().await;
    let empty = daemon.footprint();
    let config = daemon.pod("full");
    let pod = cri.run_pod(&config).await.unwrap();
    let main = cri.run(&pod, &container("main", IMAGE, &["sleep", "100000"]), &config).await.unwrap();
    let brief = cri.run(&pod, &container("brief", IMAGE, &["sleep", seconds]), &config).await.unwrap();
    (daemon, empty, config, pod, [main, brief])
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_disk_is_named() {
    let (daemon, empty, config, pod, _) = small("100000").await;
    let cri = daemon.cri().await;
    let registry = testkit::registry();
    let before = daemon.footprint();
    // The database gives up its ballast to whom needs it first: only then is the
    // disk full indeed.
    let mut fillers = vec![fill(daemon.dir(), 0)];
    let e = loop {
        match cri.create(&pod, &container("more", IMAGE, &["true"]), &config).await {
            Ok(more) => cri.remove(&more).await.unwrap(),
            Err(e) => break e,
        }
        assert!(fillers.len() < 5, "there is always more room");
        fillers.push(fill(daemon.dir(), fillers.len()));
    };
    let on = daemon.dir().to_str().unwrap();
    assert!(e.code() == Code::ResourceExhausted && e.message().contains(on), "{e}");
    daemon.leaves_nothing_but(&before);
    let e = cri.run_pod(&daemon.pod("more")).await.unwrap_err();
    assert!(e.code() == Code::ResourceExhausted && e.message().contains(on), "{e}");
    daemon.leaves_nothing_but(&before);
    let name = format!("{}/test/big:1", registry.host());
    registry.push("test/big", "1", &busybox().file("/big", &noise(8 << 20), 0o644));
    let pull = PullImageRequest { image: Some(ImageSpec { image: name, ..Default::default() }), ..Default::default() };
    let e = cri.images.clone().pull_image(pull).await.unwrap_err();
    assert!(e.code() == Code::ResourceExhausted && e.message().contains(on), "{e}");
    daemon.leaves_nothing_but(&before);

    // Once there is room again, all goes on as before.
    for filler in fillers {
        std::fs::remove_file(filler).unwrap();
    }
    cri.run(&pod, &container("more", IMAGE, &["true"]), &config).await.unwrap();
    cri.remove_pod(&pod).await.unwrap();
    daemon.leaves_nothing_but(&empty);
}

#[tokio::test(flavor = "multi_thread")]
async fn on_a_full_disk_every_end_is_carried_out_and_remembered() {
    // From 6.15 on the kernel tells the daemon what the monitor could not write.
    let told = testkit::kernel_is_at_least(6, 15);
    if !told && not_with(Handler::Conmon, "it can't write an exit status to a full disk") {
        return;
    }
    let (mut daemon, empty, config, pod, [main, brief]) = small("2").await;
    let cri = daemon.cri().await;
    let filler = fill(daemon.dir(), 0);
    assert_eq!(cri.status(&main).await.unwrap().state(), ContainerState::ContainerRunning);
    assert_eq!(cri.exited(&brief, BOUND).await.exit_code, 0);
    cri.stop(&main, 0).await.unwrap();
    daemon.kill();
    daemon.begin().await;
    let cri = daemon.cri().await;
    for (id, code) in [(&main, 137), (&brief, 0)] {
        let status = cri.status(id).await.unwrap();
        assert_eq!((status.state(), status.exit_code), (ContainerState::ContainerExited, code));
        cri.remove(id).await.unwrap();
    }
    cri.stop_pod(&pod).await.unwrap();
    cri.remove_pod(&pod).await.unwrap();
    assert_eq!(cri.pods().await.unwrap(), Vec::<String>::new());
    daemon.leaves_nothing_but(&empty);
    std::fs::remove_file(filler).unwrap();
    let pod = cri.run_pod(&config).await.unwrap();
    cri.run(&pod, &container("main", IMAGE, &["sleep", "100000"]), &config).await.unwrap();
}

/// Fills the file system that `dir` lies on, to the last byte.
fn fill(dir: &std::path::Path, n: usize) -> std::path::PathBuf {
    let path = dir.join(format!("filler-{n}"));
    let mut file = std::fs::File::create(&path).unwrap();
    let mut block = vec![1u8; 64 << 10];
    while !block.is_empty() {
        while std::io::Write::write_all(&mut file, &block).is_ok() {}
        block.truncate(block.len() / 2);
    }
    path
}

/// Bytes that don't compress.
fn noise(len: usize) -> Vec<u8> {
    let mut x = 1u32;
    let mut next = || {
        x ^= x << 13;
        x ^= x >> 17;
        x ^= x << 5;
        x.to_le_bytes()[0]
    };
    (0..len).map(|_| next()).collect()
}
