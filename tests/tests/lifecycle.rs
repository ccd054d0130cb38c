//! Pods and containers from their making to their end, against a real daemon, shim
//! and runtime (behaviours.md sections 5 and 6).
#![allow(clippy::unwrap_used, reason = "a test that lacks its fixtures has to stop")]

use longshore_tests::{
    Cri, Daemon, Handler, IMAGE, busybox, children, command_line, container, handler, in_pid_namespace, namespace,
    not_with_monitors, signal, wait_for,
};
use proto::cri::*;
use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::time::{Duration, Instant};
use tokio::task::JoinSet;
use tonic::Code;

const BOUND: Duration = Duration::from_secs(30);

async fn start(config: &str) -> (Daemon, Cri) {
    let daemon = Daemon::with(config).await;
    daemon.import(&busybox(), IMAGE);
    let cri = daemon.cri().await;
    (daemon, cri)
}

fn security(config: &mut PodSandboxConfig) -> &mut NamespaceOption {
    let linux = config.linux.as_mut().unwrap();
    linux.security_context.as_mut().unwrap().namespace_options.as_mut().unwrap()
}

fn container_security(config: &mut ContainerConfig) -> &mut LinuxContainerSecurityContext {
    config.linux.as_mut().unwrap().security_context.as_mut().unwrap()
}

fn in_namespaces(mut config: ContainerConfig, of: &PodSandboxConfig) -> ContainerConfig {
    let mut of = of.clone();
    container_security(&mut config).namespace_options = Some(security(&mut of).clone());
    config
}

fn named(name: &str, attempt: u32, command: &[&str]) -> ContainerConfig {
    let mut config = container(name, IMAGE, command);
    config.metadata.as_mut().unwrap().attempt = attempt;
    config
}

async fn number(cri: &Cri, id: &str, key: &str) -> u32 {
    u32::try_from(cri.info(id).await.unwrap()[key].as_u64().unwrap()).unwrap()
}

/// GetContainerEvents from now on, by container.
struct Events(tonic::Streaming<ContainerEventResponse>, BTreeMap<String, Vec<ContainerEventType>>);

impl Events {
    async fn of(cri: &Cri) -> Self {
        let stream = cri.runtime.clone().get_container_events(GetEventsRequest {}).await.unwrap();
        Self(stream.into_inner(), BTreeMap::new())
    }

    /// Reads until every one of these has been deleted.
    async fn until_deleted(&mut self, ids: &BTreeSet<String>) {
        let read = async {
            while !ids.iter().all(|id| {
                let seen = self.1.get(id).map_or(&[][..], Vec::as_slice);
                seen.contains(&ContainerEventType::ContainerDeletedEvent)
            }) {
                let event = self.0.message().await.unwrap().expect("the stream goes on");
                self.1.entry(event.container_id.clone()).or_default().push(event.container_event_type());
            }
        };
        tokio::time::timeout(BOUND, read).await.expect("all events come");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_hundred_that_exit_at_once_are_all_reported_right_and_in_order() {
    use ContainerEventType::*;
    let (daemon, cri) = start("").await;
    let mut events = Events::of(&cri).await;
    let config = daemon.pod("brief");
    let pod = cri.run_pod(&config).await.unwrap();
    let before = daemon.footprint();
    let mut all = JoinSet::new();
    let next = std::sync::Arc::new(std::sync::atomic::AtomicI32::new(0));
    for _ in 0..4 {
        let (cri, pod, config, next) = (cri.clone(), pod.clone(), config.clone(), next.clone());
        all.spawn(async move {
            let mut ids = Vec::new();
            loop {
                let n = next.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
                if n >= 100 {
                    return ids;
                }
                let code = (n * 7) % 256;
                let script = format!("exit {code}");
                let command = if code == 0 { vec!["true"] } else { vec!["sh", "-c", &script] };
                let id = cri.run(&pod, &container(&format!("c{n}"), IMAGE, &command), &config).await.unwrap();
                let status = cri.exited(&id, BOUND).await;
                assert_eq!(status.exit_code, code);
                assert_eq!(status.reason, if code == 0 { "Completed" } else { "Error" });
                assert!(
                    status.created_at <= status.started_at && status.started_at <= status.finished_at,
                    "{status:?}"
                );
                // Code and time never change afterwards.
                let again = cri.status(&id).await.unwrap();
                assert_eq!((again.exit_code, again.finished_at), (status.exit_code, status.finished_at));
                cri.remove(&id).await.unwrap();
                ids.push(id);
            }
        });
    }
    let ids: BTreeSet<String> = all.join_all().await.into_iter().flatten().collect();
    assert_eq!(ids.len(), 100);
    events.until_deleted(&ids).await;
    let order = [ContainerCreatedEvent, ContainerStartedEvent, ContainerStoppedEvent, ContainerDeletedEvent];
    for id in &ids {
        assert_eq!(events.1[id], order, "{id}");
    }
    daemon.leaves_nothing_but(&before);
}

#[tokio::test(flavor = "multi_thread")]
async fn execs_end_with_their_container_under_load() {
    let (daemon, cri) = start("").await;
    for (name, pid) in
        [("private", NamespaceMode::Container), ("node", NamespaceMode::Node), ("pod", NamespaceMode::Pod)]
    {
        let mut config = daemon.pod(name);
        security(&mut config).pid = pid.into();
        let pod = cri.run_pod(&config).await.unwrap();
        let c = in_namespaces(container("main", IMAGE, &["sleep", "100000"]), &config);
        let id = cri.run(&pod, &c, &config).await.unwrap();
        let mut execs = JoinSet::new();
        for _ in 0..20 {
            let (cri, id) = (cri.clone(), id.clone());
            execs.spawn(async move { cri.exec(&id, &["sh", "-c", "echo up; sleep 4321 & wait"], 0).await });
        }
        let cgroup = format!("/{}/{name}/", daemon.cgroup());
        let sleepers = || {
            let own = |pid: u32| std::fs::read_to_string(format!("/proc/{pid}/cgroup")).unwrap_or_default();
            let all = std::fs::read_dir("/proc").unwrap().flatten();
            let pids = all.filter_map(|e| e.file_name().to_string_lossy().parse::<u32>().ok());
            pids.filter(|p| command_line(*p) == "sleep 4321" && own(*p).contains(&cgroup)).count()
        };
        wait_for("all execs run", BOUND, || sleepers() == 20);
        let begun = Instant::now();
        cri.stop(&id, 0).await.unwrap();
        let status = cri.status(&id).await.unwrap();
        assert_eq!(status.state(), ContainerState::ContainerExited, "{name}");
        // Where it is no init of a pid namespace, SIGTERM may have been quicker.
        assert!(status.exit_code == 137 || (name != "private" && status.exit_code == 143), "{name}: {status:?}");
        // The container has exited: so have its execs, and their callers know at once.
        if handler() == Handler::GoShim {
            // It has sent the signals, and awaits no death.
            wait_for("its execs are dead", BOUND, || sleepers() == 0);
        }
        assert_eq!(sleepers(), 0, "{name}");
        let done = tokio::time::timeout(Duration::from_secs(5), execs.join_all()).await;
        for out in done.unwrap_or_else(|_| panic!("{name}: execs go on after their container")) {
            let out = out.unwrap();
            assert_eq!((out.exit_code, &out.stdout[..]), (137, &b"up\n"[..]), "{name}");
        }
        println!("{name}: 20 execs and their container ended in {:?}", begun.elapsed());
        cri.remove_pod(&pod).await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn one_shim_serves_a_pod_for_life_and_its_death_is_survived() {
    if not_with_monitors("a pod has no shim") {
        return;
    }
    let (daemon, cri) = start("").await;
    let config = daemon.pod("life");
    let pod = cri.run_pod(&config).await.unwrap();
    let shim = u32::try_from(pod_info(&cri, &pod).await["shimPid"].as_u64().unwrap()).unwrap();
    assert_eq!(daemon.shims(), [shim]);
    for name in ["init-1", "init-2"] {
        let id = cri.run(&pod, &named(name, 0, &["sh", "-c", "exit 0"]), &config).await.unwrap();
        assert_eq!(cri.exited(&id, BOUND).await.exit_code, 0);
        assert_eq!(number(&cri, &id, "shimPid").await, shim);
    }
    for attempt in 0..4 {
        let id = cri.run(&pod, &named("main", attempt, &["sleep", "100000"]), &config).await.unwrap();
        assert_eq!(number(&cri, &id, "shimPid").await, shim);
        cri.stop(&id, 0).await.unwrap();
        assert_eq!(cri.status(&id).await.unwrap().exit_code, 137);
    }

    let id = cri.run(&pod, &named("main", 4, &["sleep", "100000"]), &config).await.unwrap();
    let ended = cri.run(&pod, &named("ended", 0, &["sh", "-c", "exit 6"]), &config).await.unwrap();
    cri.exited(&ended, BOUND).await;
    let init = number(&cri, &id, "pid").await;
    signal(shim, rustix::process::Signal::KILL);
    let status = cri.exited(&id, BOUND).await;
    assert_eq!(status.exit_code, 137, "{status:?}");
    assert_eq!(cri.status(&ended).await.unwrap().exit_code, 6, "what had ended before keeps its code");
    wait_for("the container's process is gone", BOUND, || command_line(init).is_empty());
    assert_eq!(cri.pod_status(&pod).await.unwrap().status.unwrap().state(), PodSandboxState::SandboxReady);
    assert_eq!(cri.exec(&id, &["true"], 5).await.unwrap_err().code(), Code::FailedPrecondition);
    let id = cri.run(&pod, &named("main", 5, &["sleep", "100000"]), &config).await.unwrap();
    assert_eq!(cri.exec(&id, &["echo", "again"], 5).await.unwrap().stdout, "again\n");
    let new = daemon.shims();
    assert!(new.len() == 1 && new[0] != shim, "{new:?}");
    assert_eq!(number(&cri, &id, "shimPid").await, new[0]);
}

async fn pod_info(cri: &Cri, pod: &str) -> serde_json::Value {
    serde_json::from_str(&cri.pod_status(pod).await.unwrap().info["info"]).unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn the_oom_killer_is_named() {
    let (daemon, cri) = start("").await;
    let config = daemon.pod("oom");
    let pod = cri.run_pod(&config).await.unwrap();
    let mut c = container("hungry", IMAGE, &["dd", "if=/dev/zero", "of=/dev/null", "bs=512M", "count=1"]);
    c.linux.as_mut().unwrap().resources.as_mut().unwrap().memory_limit_in_bytes = 32 << 20;
    let id = cri.run(&pod, &c, &config).await.unwrap();
    let status = cri.exited(&id, BOUND).await;
    assert_eq!((status.exit_code, status.reason.as_str()), (137, "OOMKilled"), "{status:?}");
    // The same end by a plain SIGKILL is none.
    let id = cri.run(&pod, &container("killed", IMAGE, &["sleep", "100000"]), &config).await.unwrap();
    cri.stop(&id, 0).await.unwrap();
    let status = cri.status(&id).await.unwrap();
    assert_eq!((status.exit_code, status.reason.as_str()), (137, "Error"), "{status:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stop_is_honoured_bounded_and_can_be_hastened() {
    let (daemon, cri) = start("").await;
    let mut config = daemon.pod("stop");
    config.log_directory = daemon.dir().join("logs").to_string_lossy().into_owned();
    let pod = cri.run_pod(&config).await.unwrap();
    let tidy = "trap 'exit 5' TERM; echo up; while :; do sleep 0.05; done";
    let mut c = container("tidy", IMAGE, &["sh", "-c", tidy]);
    c.log_path = "tidy.log".into();
    let id = cri.run(&pod, &c, &config).await.unwrap();
    // The trap stands only once the shell has read it.
    let log = daemon.dir().join("logs/tidy.log");
    wait_for("its trap stands", BOUND, || std::fs::read_to_string(&log).unwrap_or_default().contains("stdout F up"));
    let begun = Instant::now();
    cri.stop(&id, 60).await.unwrap();
    assert_eq!(cri.status(&id).await.unwrap().exit_code, 5);
    assert!(begun.elapsed() < Duration::from_secs(10), "{:?}", begun.elapsed());

    // Init of a pid namespace doesn't die of a signal that it doesn't handle.
    let id = cri.run(&pod, &container("deaf", IMAGE, &["sleep", "100000"]), &config).await.unwrap();
    let begun = Instant::now();
    cri.stop(&id, 2).await.unwrap();
    assert_eq!(cri.status(&id).await.unwrap().exit_code, 137);
    assert!((Duration::from_secs(2)..Duration::from_secs(12)).contains(&begun.elapsed()), "{:?}", begun.elapsed());

    let id = cri.run(&pod, &container("hastened", IMAGE, &["sleep", "100000"]), &config).await.unwrap();
    let first = tokio::spawn({
        let (cri, id) = (cri.clone(), id.clone());
        async move { cri.stop(&id, 600).await }
    });
    tokio::time::sleep(Duration::from_millis(300)).await;
    // Its grace period delays no status, list or exec.
    assert_eq!(cri.status(&id).await.unwrap().state(), ContainerState::ContainerRunning);
    assert_eq!(cri.exec(&id, &["echo", "here"], 5).await.unwrap().stdout, "here\n");
    // A longer one changes nothing, a shorter one does.
    let longer = tokio::spawn({
        let (cri, id) = (cri.clone(), id.clone());
        async move { cri.stop(&id, 6000).await }
    });
    let begun = Instant::now();
    cri.stop(&id, 1).await.unwrap();
    first.await.unwrap().unwrap();
    longer.await.unwrap().unwrap();
    assert!((Duration::from_secs(1)..Duration::from_secs(10)).contains(&begun.elapsed()), "{:?}", begun.elapsed());
    assert_eq!(cri.status(&id).await.unwrap().exit_code, 137);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stop_overtakes_a_start_that_hangs() {
    // A runtime whose `create` takes half a minute when we say so.
    let dir = tempdir();
    let hang = dir.path().join("hang");
    let slow = runtime(dir.path(), &format!("[ ! -e {} ] || sleep 31.5", hang.display()));
    let (daemon, cri) = start(&format!("[runtime]\nbinary = {slow:?}\n")).await;
    let config = daemon.pod("hang");
    let pod = cri.run_pod(&config).await.unwrap();
    let before = daemon.footprint();
    let neighbour = cri.run(&pod, &container("neighbour", IMAGE, &["sleep", "100000"]), &config).await.unwrap();
    let id = cri.create(&pod, &container("main", IMAGE, &["sleep", "100000"]), &config).await.unwrap();
    std::fs::write(&hang, "").unwrap();
    let starting = tokio::spawn({
        let (cri, id) = (cri.clone(), id.clone());
        async move { cri.start(&id).await }
    });
    tokio::time::sleep(Duration::from_millis(500)).await;
    let begun = Instant::now();
    // Create holds a lock of Go's shim that each other call takes, in all versions.
    if handler() != Handler::GoShim {
        assert_eq!(cri.exec(&neighbour, &["echo", "free"], 5).await.unwrap().stdout, "free\n");
    }
    cri.stop(&id, 30).await.unwrap();
    let took = begun.elapsed();
    let e = starting.await.unwrap().unwrap_err();
    println!("a start that hung was stopped in {took:?}: {e}");
    assert!(took < Duration::from_secs(50), "{took:?}");
    assert!(e.message().contains("StopContainer"), "{e}");
    assert_eq!(cri.status(&id).await.unwrap().state(), ContainerState::ContainerExited);
    std::fs::remove_file(&hang).unwrap();
    // As long as the runtime's call goes on it is refused, as a kubelet sees it: it
    // asks again.
    let deadline = Instant::now() + BOUND;
    while let Err(e) = cri.remove(&id).await {
        assert_eq!(e.code(), Code::FailedPrecondition, "{e}");
        assert!(Instant::now() < deadline, "{e}");
        tokio::time::sleep(Duration::from_millis(500)).await;
    }
    cri.stop(&neighbour, 0).await.unwrap();
    cri.remove(&neighbour).await.unwrap();
    daemon.leaves_nothing_but(&before);
}

/// What recovery could not come to, since the shim hung, is undone by the next start.
#[tokio::test(flavor = "multi_thread")]
async fn a_start_whose_daemon_died_gives_way_to_the_next() {
    if handler() != Handler::Ours {
        return;
    }
    let dir = tempdir();
    let hang = dir.path().join("hang");
    let slow = runtime(dir.path(), &format!("while [ -e {} ]; do sleep 0.05; done", hang.display()));
    let (mut daemon, cri) = start(&format!("[runtime]\nbinary = {slow:?}\n")).await;
    let config = daemon.pod("half");
    let pod = cri.run_pod(&config).await.unwrap();
    let before = daemon.footprint();
    let id = cri.create(&pod, &container("main", IMAGE, &["sleep", "100000"]), &config).await.unwrap();
    std::fs::write(&hang, "").unwrap();
    let starting = tokio::spawn({
        let (cri, id) = (cri.clone(), id.clone());
        async move { cri.start(&id).await }
    });
    let rootfs = daemon.bundles().join(&pod).join("tasks").join(&id).join("rootfs");
    let mounted = || std::fs::read_to_string("/proc/self/mountinfo").unwrap().contains(rootfs.to_str().unwrap());
    wait_for("the shim creates it", BOUND, mounted);
    let shims = daemon.shims();
    shims.iter().for_each(|s| signal(*s, rustix::process::Signal::STOP));
    daemon.kill();
    assert!(starting.await.unwrap().is_err());
    daemon.begin().await;
    shims.iter().for_each(|s| signal(*s, rustix::process::Signal::CONT));
    std::fs::remove_file(&hang).unwrap();
    let cri = daemon.cri().await;
    cri.start(&id).await.unwrap();
    assert_eq!(cri.exec(&id, &["echo", "once"], 10).await.unwrap().stdout, "once\n");
    cri.stop(&id, 0).await.unwrap();
    cri.remove(&id).await.unwrap();
    daemon.leaves_nothing_but(&before);
}

/// A directory for scripts, logs and other files of the host's.
fn tempdir() -> testkit::TempRoot {
    testkit::TempRoot::new()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_shared_pid_namespace_has_an_init_that_reaps_and_must_live() {
    let (daemon, cri) = start("").await;
    let mut config = daemon.pod("init");
    security(&mut config).pid = NamespaceMode::Pod.into();
    let before = daemon.footprint();
    let pod = cri.run_pod(&config).await.unwrap();
    let init = u32::try_from(pod_info(&cri, &pod).await["pid"].as_u64().unwrap()).unwrap();
    assert_ne!(init, 0);
    let script = "i=0; while [ $i -lt 20 ]; do (sleep 0.2 &); i=$((i+1)); done; exec sleep 100000";
    let a =
        cri.run(&pod, &in_namespaces(container("a", IMAGE, &["sh", "-c", script]), &config), &config).await.unwrap();
    let b = cri.run(&pod, &in_namespaces(container("b", IMAGE, &["sleep", "200000"]), &config), &config).await.unwrap();
    let pid = number(&cri, &a, "pid").await;
    assert_eq!(namespace(pid, "pid"), namespace(init, "pid"));
    wait_for("init has reaped what the containers left to it", BOUND, || {
        let all = in_pid_namespace(init);
        children(init).is_empty()
            && all.iter().all(|(_, line)| line.starts_with("sleep") || !line.is_empty())
            && !all.iter().any(|(_, line)| line == "sleep 0.2")
    });
    let seen = cri.exec(&b, &["ps"], 5).await.unwrap().stdout;
    assert!(String::from_utf8_lossy(&seen).contains("sleep 100000"), "{seen:?}");
    // One container's end is not the other's.
    cri.stop(&a, 0).await.unwrap();
    assert_eq!(cri.status(&b).await.unwrap().state(), ContainerState::ContainerRunning);
    cri.remove(&a).await.unwrap();

    signal(init, rustix::process::Signal::KILL);
    assert_eq!(cri.exited(&b, BOUND).await.exit_code, 137);
    let ready = PodSandboxState::SandboxReady;
    let deadline = Instant::now() + BOUND;
    while cri.pod_status(&pod).await.unwrap().status.unwrap().state() == ready {
        assert!(Instant::now() < deadline, "a pod without its init is NOTREADY");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let e = cri.create(&pod, &container("c", IMAGE, &["true"]), &config).await.unwrap_err();
    assert_eq!(e.code(), Code::FailedPrecondition, "{e}");
    cri.stop_pod(&pod).await.unwrap();
    cri.remove_pod(&pod).await.unwrap();
    daemon.leaves_nothing_but(&before);
}

#[tokio::test(flavor = "multi_thread")]
async fn rotating_a_log_loses_no_line() {
    const LINES: usize = 200_000;
    let (daemon, cri) = start("").await;
    let mut config = daemon.pod("log");
    let dir = daemon.dir().join("pod-logs");
    config.log_directory = dir.to_string_lossy().into_owned();
    let pod = cri.run_pod(&config).await.unwrap();
    let script = format!("seq 1 {LINES} | while read n; do echo line $n; done; echo end >&2");
    let mut c = container("talker", IMAGE, &["sh", "-c", &script]);
    c.log_path = "talker/0.log".into();
    let id = cri.run(&pod, &c, &config).await.unwrap();
    let log = dir.join("talker/0.log");
    let reopen = || async {
        cri.runtime.clone().reopen_container_log(ReopenContainerLogRequest { container_id: id.clone() }).await
    };
    let mut files: Vec<PathBuf> = Vec::new();
    while cri.status(&id).await.unwrap().state() == ContainerState::ContainerRunning && files.len() < 20 {
        let old = dir.join(format!("talker/0.log.{}", files.len()));
        std::fs::rename(&log, &old).unwrap();
        files.push(old);
        match reopen().await {
            Ok(_) => assert!(log.exists(), "reopening makes it anew"),
            // It has just ended; what came after is in the old file.
            Err(e) => {
                assert_eq!(e.code(), Code::FailedPrecondition, "{e}");
                break;
            }
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    assert!(files.len() >= 2, "the container was too fast for this test");
    cri.exited(&id, BOUND).await;
    assert_eq!(reopen().await.unwrap_err().code(), Code::FailedPrecondition);
    files.push(log);
    let text: String = files.iter().filter_map(|f| std::fs::read_to_string(f).ok()).collect();
    let (mut next, mut ends) = (1, 0);
    // Streams are read in turn: the pieces of one may stand between those of the other.
    let mut pieces = std::collections::HashMap::<&str, String>::new();
    for line in text.lines() {
        let [time, stream, tag, rest] = line.splitn(4, ' ').collect::<Vec<_>>()[..] else { panic!("{line:?}") };
        assert!(time.contains('T'), "{line}");
        // A conmon logs what it has read, whole lines or not.
        if tag == "P" && handler().monitored() {
            pieces.entry(stream).or_default().push_str(rest);
            continue;
        }
        assert_eq!(tag, "F", "{line}");
        let rest = pieces.remove(stream).unwrap_or_default() + rest;
        match stream {
            "stdout" => {
                assert_eq!(rest, format!("line {next}"));
                next += 1;
            }
            _ => ends += usize::from(rest == "end"),
        }
    }
    assert_eq!((next - 1, ends), (LINES, 1), "in {} files", files.len());
}

#[tokio::test(flavor = "multi_thread")]
async fn containers_of_a_pod_share_localhost_and_shm() {
    let (daemon, cri) = start("").await;
    let before = daemon.footprint();
    let mut config = daemon.pod("share");
    security(&mut config).network = NamespaceMode::Pod.into();
    config.hostname = "shared-host".into();
    let pod = cri.run_pod(&config).await.unwrap();
    assert!(longshore_tests::netns(&pod).exists());
    let serve = "echo noted >/dev/shm/note; while :; do echo hello | nc -l -p 8080; done";
    let a = cri.run(&pod, &in_namespaces(container("a", IMAGE, &["sh", "-c", serve]), &config), &config).await.unwrap();
    let b = cri.run(&pod, &in_namespaces(container("b", IMAGE, &["sleep", "100000"]), &config), &config).await.unwrap();
    let ask =
        "for n in $(seq 200); do nc 127.0.0.1 8080 </dev/null && break; sleep 0.2; done; cat /dev/shm/note; hostname";
    let out = cri.exec(&b, &["sh", "-c", ask], 60).await.unwrap();
    assert_eq!(out.stdout, "hello\nnoted\nshared-host\n", "{:?}", out.stderr);
    let (pa, pb) = (number(&cri, &a, "pid").await, number(&cri, &b, "pid").await);
    for kind in ["net", "ipc", "uts"] {
        assert_eq!(namespace(pa, kind), namespace(pb, kind), "{kind}");
        assert_ne!(namespace(pa, kind), namespace(std::process::id(), kind), "{kind}");
    }
    for kind in ["pid", "mnt"] {
        assert_ne!(namespace(pa, kind), namespace(pb, kind), "{kind}");
    }
    cri.stop_pod(&pod).await.unwrap();
    cri.remove_pod(&pod).await.unwrap();
    daemon.leaves_nothing_but(&before);
}

#[tokio::test(flavor = "multi_thread")]
async fn namespaces_are_as_asked_for() {
    let (daemon, cri) = start("").await;
    let own = |kind: &str| namespace(std::process::id(), kind);
    let mut config = daemon.pod("node");
    *security(&mut config) = NamespaceOption {
        network: NamespaceMode::Node.into(),
        pid: NamespaceMode::Node.into(),
        ipc: NamespaceMode::Node.into(),
        ..Default::default()
    };
    let pod = cri.run_pod(&config).await.unwrap();
    let id = cri.run(&pod, &in_namespaces(container("a", IMAGE, &["sleep", "1000"]), &config), &config).await.unwrap();
    let pid = number(&cri, &id, "pid").await;
    for kind in ["net", "pid", "ipc", "uts"] {
        assert_eq!(namespace(pid, kind), own(kind), "{kind}");
    }
    assert_ne!(namespace(pid, "mnt"), own("mnt"));

    // TARGET: another container's pid namespace.
    let config = daemon.pod("target");
    let pod = cri.run_pod(&config).await.unwrap();
    let target = cri.run(&pod, &container("target", IMAGE, &["sleep", "1000"]), &config).await.unwrap();
    let mut debugger = container("debugger", IMAGE, &["sleep", "2000"]);
    let options = container_security(&mut debugger).namespace_options.as_mut().unwrap();
    options.pid = NamespaceMode::Target.into();
    options.target_id.clone_from(&target);
    let id = cri.run(&pod, &debugger, &config).await.unwrap();
    let (theirs, its) = (number(&cri, &target, "pid").await, number(&cri, &id, "pid").await);
    assert_eq!(namespace(theirs, "pid"), namespace(its, "pid"));
    assert_ne!(namespace(theirs, "pid"), own("pid"));
    // The target's end is that of its namespace.
    cri.stop(&target, 0).await.unwrap();
    assert_eq!(cri.exited(&id, BOUND).await.exit_code, 137);
}

#[tokio::test(flavor = "multi_thread")]
async fn limits_change_in_the_cgroup_and_in_the_status() {
    let (daemon, cri) = start("").await;
    let config = daemon.pod("limits");
    let pod = cri.run_pod(&config).await.unwrap();
    let mut c = container("main", IMAGE, &["sleep", "1000"]);
    c.linux.as_mut().unwrap().resources =
        Some(LinuxContainerResources { cpu_shares: 512, memory_limit_in_bytes: 64 << 20, ..Default::default() });
    let id = cri.run(&pod, &c, &config).await.unwrap();
    // The memory's limit, the CPU's quota, its weight. Version 2 has files of other names in
    // one hierarchy, and a runtime's own conversion of shares to weights.
    let v2 = std::path::Path::new("/sys/fs/cgroup/cgroup.controllers").exists();
    let limits = || {
        let file = |controller: &str, v1: &str, name: &str| {
            let dir = if v2 { "/sys/fs/cgroup".into() } else { format!("/sys/fs/cgroup/{controller}") };
            let path = format!("{dir}/{}/limits/{id}/{}", daemon.cgroup(), if v2 { name } else { v1 });
            let text = std::fs::read_to_string(&path).unwrap_or_else(|e| panic!("{path}: {e}"));
            text.split_whitespace().next().unwrap_or_default().to_string()
        };
        let memory = file("memory", "memory.limit_in_bytes", "memory.max");
        (memory, file("cpu", "cpu.cfs_quota_us", "cpu.max"), file("cpu", "cpu.shares", "cpu.weight"))
    };
    let (memory, quota, first_weight) = limits();
    assert_eq!((memory, quota.as_str()), ((64 << 20).to_string(), if v2 { "max" } else { "-1" }));
    assert!(v2 || first_weight == "512");
    let linux = LinuxContainerResources {
        cpu_shares: 256,
        cpu_quota: 50_000,
        cpu_period: 100_000,
        memory_limit_in_bytes: 96 << 20,
        ..Default::default()
    };
    let update = UpdateContainerResourcesRequest { container_id: id.clone(), linux: Some(linux), ..Default::default() };
    cri.runtime.clone().update_container_resources(update).await.unwrap();
    let (memory, quota, weight) = limits();
    assert_eq!((memory, quota), ((96 << 20).to_string(), "50000".into()));
    let number = |w: &str| w.parse::<u64>().unwrap();
    assert!(if v2 { number(&weight) < number(&first_weight) } else { weight == "256" }, "{first_weight} {weight}");
    let told = cri.status(&id).await.unwrap().resources.unwrap().linux.unwrap();
    assert_eq!((told.cpu_shares, told.cpu_quota, told.memory_limit_in_bytes), (256, 50_000, 96 << 20));
}

#[tokio::test(flavor = "multi_thread")]
async fn ends_are_idempotent_and_ids_may_be_short() {
    let (daemon, cri) = start("").await;
    let unknown = "0123456789abcdef";
    cri.stop_pod(unknown).await.unwrap();
    cri.remove_pod(unknown).await.unwrap();
    cri.stop(unknown, 0).await.unwrap();
    cri.remove(unknown).await.unwrap();
    for e in [cri.status(unknown).await.unwrap_err(), cri.start(unknown).await.unwrap_err()] {
        assert_eq!(e.code(), Code::NotFound, "{e}");
    }
    let before = daemon.footprint();
    let config = daemon.pod("twice");
    let pod = cri.run_pod(&config).await.unwrap();
    let id = cri.create(&pod[..12], &container("main", IMAGE, &["sleep", "1000"]), &config).await.unwrap();
    cri.start(&id[..12]).await.unwrap();
    assert_eq!(cri.status(&id[..10]).await.unwrap().id, id);
    assert_eq!(cri.exec(&id[..16], &["echo", "a"], 5).await.unwrap().stdout, "a\n");
    assert_eq!(cri.pod_status(&pod[..8]).await.unwrap().status.unwrap().id, pod);
    assert_eq!(cri.status("").await.unwrap_err().code(), Code::InvalidArgument);
    for _ in 0..2 {
        cri.stop(&id[..12], 0).await.unwrap();
    }
    assert_eq!(cri.start(&id).await.unwrap_err().code(), Code::FailedPrecondition, "a container starts once");
    for _ in 0..2 {
        cri.remove(&id).await.unwrap();
    }
    for _ in 0..2 {
        cri.stop_pod(&pod).await.unwrap();
    }
    for _ in 0..2 {
        cri.remove_pod(&pod[..12]).await.unwrap();
    }
    daemon.leaves_nothing_but(&before);
}

/// A runc that is killed in exec leaves a mount of its binary beside its state, over
/// which its delete would fail half done.
#[tokio::test(flavor = "multi_thread")]
async fn a_mount_of_the_runtime_s_own_outlives_no_container() {
    let (daemon, cri) = start("").await;
    let before = daemon.footprint();
    let config = daemon.pod("killed-exec");
    let pod = cri.run_pod(&config).await.unwrap();
    let id = cri.run(&pod, &container("main", IMAGE, &["sleep", "1000"]), &config).await.unwrap();
    let state = daemon.state().join("oci/k8s.io").join(&id);
    assert!(state.join("state.json").exists(), "this is where runc keeps its state");
    let own = state.join("runc.aB3xYz");
    std::fs::write(&own, "").unwrap();
    rustix::mount::mount_bind(state.join("state.json"), &own).unwrap();
    cri.stop(&id, 0).await.unwrap();
    cri.remove(&id).await.unwrap();
    cri.stop_pod(&pod).await.unwrap();
    cri.remove_pod(&pod).await.unwrap();
    daemon.leaves_nothing_but(&before);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_retry_joins_the_attempt_that_runs() {
    // A runtime whose `create` takes long enough to be met.
    let dir = tempdir();
    let slow = runtime(dir.path(), "sleep 0.7");
    let (daemon, cri) = start(&format!("[runtime]\nbinary = {slow:?}\n")).await;
    let mut config = daemon.pod("joined");
    // Its init is a task, which that runtime makes.
    security(&mut config).pid = NamespaceMode::Pod.into();
    let calls: Vec<_> = (0..5).map(|_| cri.run_pod(&config)).collect();
    let ids: BTreeSet<String> = futures(calls).await.into_iter().map(Result::unwrap).collect();
    assert_eq!(ids.len(), 1);
    let pod = ids.into_iter().next().unwrap();
    assert_eq!(daemon.shims().len(), 1);
    assert_eq!(cri.run_pod(&config).await.unwrap_err().code(), Code::AlreadyExists);
    let c = in_namespaces(container("main", IMAGE, &["sleep", "1000"]), &config);
    let calls: Vec<_> = (0..5).map(|_| cri.create(&pod, &c, &config)).collect();
    // CreateContainer is quick: a late one finds the container made.
    let mut ids = BTreeSet::new();
    for made in futures(calls).await {
        match made {
            Ok(id) => drop(ids.insert(id)),
            Err(e) => assert_eq!(e.code(), Code::AlreadyExists, "{e}"),
        }
    }
    assert_eq!(ids.len(), 1);
    let id = ids.into_iter().next().unwrap();
    let calls: Vec<_> = (0..5).map(|_| cri.start(&id)).collect();
    for started in futures(calls).await {
        started.unwrap();
    }
    assert_eq!(cri.create(&pod, &c, &config).await.unwrap_err().code(), Code::AlreadyExists);
}

/// A runtime that does something before each `create`, then what runc does.
fn runtime(dir: &std::path::Path, before_create: &str) -> PathBuf {
    let path = dir.join("slow-runc");
    let script = format!(
        "#!/bin/sh\nfor a in \"$@\"; do\n  if [ \"$a\" = create ]; then {before_create}; fi\ndone\nexec runc \"$@\"\n"
    );
    testkit::script(&path, script);
    path
}

/// A client that gives up doesn't end what it asked for, and leaks nothing.
#[tokio::test(flavor = "multi_thread")]
async fn a_caller_that_gives_up_leaves_no_half() {
    let (daemon, cri) = start("").await;
    let before = daemon.footprint();
    for n in 0..6 {
        let config = daemon.pod("given-up");
        let given_up = tokio::time::timeout(Duration::from_millis(5 + 12 * n), cri.run_pod(&config)).await;
        let pod = match given_up {
            Ok(id) => id.unwrap(),
            Err(_) => match cri.run_pod(&config).await {
                Ok(id) => id,
                Err(e) => {
                    assert_eq!(e.code(), Code::AlreadyExists);
                    cri.pods().await.unwrap().remove(0)
                }
            },
        };
        assert_eq!(cri.pods().await.unwrap(), std::slice::from_ref(&pod));
        cri.remove_pod(&pod).await.unwrap();
    }
    daemon.leaves_nothing_but(&before);
}

/// All at once.
async fn futures<T>(calls: Vec<impl Future<Output = T>>) -> Vec<T> {
    let mut calls: Vec<_> = calls.into_iter().map(Box::pin).collect();
    let mut done: Vec<Option<T>> = calls.iter().map(|_| None).collect();
    std::future::poll_fn(|cx| {
        for (call, done) in calls.iter_mut().zip(&mut done) {
            if done.is_none()
                && let std::task::Poll::Ready(t) = call.as_mut().poll(cx)
            {
                *done = Some(t);
            }
        }
        if done.iter().all(Option::is_some) { std::task::Poll::Ready(()) } else { std::task::Poll::Pending }
    })
    .await;
    done.into_iter().flatten().collect()
}
