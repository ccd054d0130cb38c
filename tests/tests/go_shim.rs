//! What Go's shim (Debian's package containerd) does where ours can't: it is borne with.
//! The whole suite runs with it by `LONGSHORE_TEST_HANDLER=go-shim`.
#![allow(clippy::unwrap_used, reason = "a test that lacks its fixtures has to stop")]

use longshore_tests::{Cri, Daemon, IMAGE, busybox, command_line, container, signal, wait_for};
use proto::cri::*;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::time::Duration;
use testkit::TempRoot;

const BOUND: Duration = Duration::from_secs(30);
const HANDLER: &str = "[runtimes.go]\nshim = \"io.containerd.runc.v2\"\n";

/// Looks for a while, without holding up anything else.
async fn until(what: &str, mut done: impl AsyncFnMut() -> bool) {
    let deadline = tokio::time::Instant::now() + BOUND;
    while !done().await {
        assert!(tokio::time::Instant::now() < deadline, "not in time: {what}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

async fn shim_of(cri: &Cri, pod: &str) -> u32 {
    let info: serde_json::Value = serde_json::from_str(&cri.pod_status(pod).await.unwrap().info["info"]).unwrap();
    u32::try_from(info["shimPid"].as_u64().unwrap()).unwrap()
}

/// Starts a container, again while the daemon still cleans up after its restart.
async fn starts(cri: &Cri, id: &str) {
    until("the container starts", async || match cri.start(id).await {
        Err(e) if e.message().contains("cleaned up after a restart") => false,
        other => other.map(|()| true).unwrap(),
    })
    .await;
    assert_eq!(cri.exec(id, &["echo", "runs"], 10).await.unwrap().stdout, "runs\n");
}

/// It kills its call of the OCI runtime's `start` when the daemon that asked for it
/// dies: the runtime's init, which is let go by nobody, ends with 1.
#[tokio::test(flavor = "multi_thread")]
async fn a_start_that_broke_off_with_the_daemon_can_be_asked_for_again() {
    let mut daemon = Daemon::with(HANDLER).await;
    daemon.import(&busybox(), IMAGE);
    let before = daemon.footprint();
    let config = daemon.pod("broken");
    let pod = daemon.cri().await.run_pod_by("go", &config).await.unwrap();
    let c = container("main", IMAGE, &["sleep", "100000"]);
    let id = daemon.cri().await.create(&pod, &c, &config).await.unwrap();
    let mut met = false;
    for _ in 0..20 {
        daemon.terminate();
        assert!(daemon.begin_doomed("task.start.before").await);
        let cri = daemon.cri().await;
        until("the daemon dies of the start", async || {
            // Once more where it had yet to clean up.
            let _ = cri.start(&id).await;
            daemon.has_died()
        })
        .await;
        let task = daemon.state().join("bundles").join(&pod).join("tasks").join(&id);
        let init: u32 = std::fs::read_to_string(task.join("init.pid")).unwrap().trim().parse().unwrap();
        // What a start does that is killed between opening and reading.
        let fifo = daemon.state().join("oci/k8s.io").join(&id).join("exec.fifo");
        let nonblocking = i32::try_from(rustix::fs::OFlags::NONBLOCK.bits()).unwrap();
        drop(std::fs::OpenOptions::new().read(true).custom_flags(nonblocking).open(&fifo).unwrap());
        wait_for("init ends, or becomes the command", BOUND, || {
            let line = command_line(init);
            line.is_empty() || line == "sleep 100000"
        });
        // Where it was faster than we are, it runs; that is taken back in any case.
        met = command_line(init).is_empty();
        daemon.begin().await;
        let status = daemon.cri().await.status(&id).await.unwrap();
        assert_eq!(status.state(), ContainerState::ContainerCreated, "{status:?}");
        if met {
            break;
        }
    }
    assert!(met, "init has met a reader each time");
    let cri = daemon.cri().await;
    starts(&cri, &id).await;
    cri.remove_pod(&pod).await.unwrap();
    daemon.leaves_nothing_but(&before);
}

/// It opens its log before it serves, and waits there for somebody who reads it.
#[tokio::test(flavor = "multi_thread")]
async fn a_shim_whose_daemon_died_as_it_came_up_is_found_again() {
    let mut daemon = Daemon::with(HANDLER).await;
    daemon.import(&busybox(), IMAGE);
    let before = daemon.footprint();
    let config = daemon.pod("waits");
    let cri = daemon.cri().await;
    let pod = cri.run_pod_by("go", &config).await.unwrap();
    let shim = shim_of(&cri, &pod).await;
    daemon.terminate();
    assert!(daemon.begin_doomed("shim.start.after").await);
    let cri = daemon.cri().await;
    signal(shim, rustix::process::Signal::KILL);
    wait_for("its first shim is dead", BOUND, || command_line(shim).is_empty());
    let id = cri.create(&pod, &container("main", IMAGE, &["sleep", "100000"]), &config).await.unwrap();
    assert!(cri.start(&id).await.is_err());
    wait_for("the daemon dies", BOUND, || daemon.has_died());
    daemon.begin().await;
    assert!(!daemon.log().contains("did not answer"), "{}", daemon.log());
    let cri = daemon.cri().await;
    // Nobody had come to put it into its cgroup either.
    let shim = daemon.runs("containerd-shim-");
    assert_eq!(shim.len(), 1);
    let cgroups = || std::fs::read_to_string(format!("/proc/{}/cgroup", shim[0])).unwrap();
    wait_for("it is with the shims", BOUND, || cgroups().lines().all(|l| l.ends_with("/shims")));
    starts(&cri, &id).await;
    cri.remove_pod(&pod).await.unwrap();
    daemon.leaves_nothing_but(&before);
}

/// An OCI runtime that dawdles in its `create`, when it has made the cgroups, while
/// there is a file `slow`.
fn slow_runtime(dir: &Path) {
    let script = r#"#!/bin/sh
dir=$(dirname "$0")
for last; do :; done
case " $* " in *" create "*)
    if [ -e "$dir/slow" ]; then
        own=$(cat "$dir/slow")
        for h in /sys/fs/cgroup /sys/fs/cgroup/*; do
            [ ! -d "$h/${own%/*}" ] || mkdir -p "$h/$own/$last"
        done
        touch "$dir/begun"
        exec sleep 1000
    fi
esac
exec runc "$@"
"#;
    let path = dir.join("slow-runc");
    testkit::script(&path, script);
}

/// Its calls of the OCI runtime die with it: what they had made half is ours to find.
#[tokio::test(flavor = "multi_thread")]
async fn a_shim_that_dies_in_a_create_leaves_no_cgroup() {
    let root = TempRoot::new();
    slow_runtime(root.path());
    let runtime = root.join("slow-runc");
    let daemon = Daemon::on(root, &format!("{HANDLER}binary = {runtime:?}\n")).await;
    daemon.import(&busybox(), IMAGE);
    let before = daemon.footprint();
    let cri = daemon.cri().await;
    let mut config = daemon.pod("dies");
    let slow = daemon.dir().join("slow");
    let begun = daemon.dir().join("begun");
    // With an init, whose creation is RunPodSandbox's; then of a container's.
    let linux = config.linux.as_mut().unwrap();
    let options = linux.security_context.as_mut().unwrap().namespace_options.as_mut().unwrap();
    options.pid = NamespaceMode::Pod.into();
    std::fs::write(&slow, format!("{}/dies", daemon.cgroup())).unwrap();
    let made = tokio::spawn({
        let (cri, config) = (cri.clone(), config.clone());
        async move { cri.run_pod_by("go", &config).await }
    });
    wait_for("the runtime dawdles", BOUND, || begun.exists());
    until("its shim is seen", async || !daemon.runs("containerd-shim-").is_empty()).await;
    daemon.runs("containerd-shim-").iter().for_each(|s| signal(*s, rustix::process::Signal::KILL));
    made.await.unwrap().unwrap_err();
    daemon.leaves_nothing_but(&before);

    std::fs::remove_file(&slow).unwrap();
    std::fs::remove_file(&begun).unwrap();
    let pod = cri.run_pod_by("go", &daemon.pod("dies")).await.unwrap();
    let id = cri.create(&pod, &container("main", IMAGE, &["sleep", "100000"]), &config).await.unwrap();
    let bare = daemon.footprint();
    std::fs::write(&slow, format!("{}/dies", daemon.cgroup())).unwrap();
    let started = tokio::spawn({
        let (cri, id) = (cri.clone(), id.clone());
        async move { cri.start(&id).await }
    });
    wait_for("the runtime dawdles", BOUND, || begun.exists());
    signal(shim_of(&cri, &pod).await, rustix::process::Signal::KILL);
    started.await.unwrap().unwrap_err();
    daemon.leaves_nothing_but(&bare);
    std::fs::remove_file(&slow).unwrap();
    cri.remove_pod(&pod).await.unwrap();
    daemon.leaves_nothing_but(&before);
}
