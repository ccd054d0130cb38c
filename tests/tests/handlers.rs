//! Handlers: which shim runs a pod, what is said of it, and what becomes of it when
//! shim or configuration change (behaviours.md section 3).
#![allow(clippy::unwrap_used, reason = "a test that lacks its fixtures has to stop")]

use longshore_tests::{Cri, Daemon, IMAGE, bin_dir, busybox, container, signal, wait_for};
use prost::Message;
use proto::containerd::events::{TaskExit, TaskOom};
use proto::cri::*;
use std::io::Write;
use std::process::{Command, Stdio};
use std::time::Duration;
use tonic::Code;

const BOUND: Duration = Duration::from_secs(30);
/// Speaks gRPC and stands before our own shim.
const GRPC_SHIM: &str = env!("CARGO_BIN_EXE_containerd-shim-grpctest-v2");

async fn start(config: &str) -> (Daemon, Cri) {
    let daemon = Daemon::with(config).await;
    daemon.import(&busybox(), IMAGE);
    let cri = daemon.cri().await;
    (daemon, cri)
}

fn grpc() -> String {
    // A bound that passes before a test's patience does.
    format!(
        "[runtimes.grpc]\nshim = {GRPC_SHIM:?}\ntimeouts = {{ create = 10 }}\n[runtimes.grpc.options]\nkind = \"runc\"\n"
    )
}

async fn pod_info(cri: &Cri, pod: &str) -> serde_json::Value {
    serde_json::from_str(&cri.pod_status(pod).await.unwrap().info["info"]).unwrap()
}

async fn state_of(cri: &Cri, pod: &str) -> PodSandboxState {
    cri.pod_status(pod).await.unwrap().status.unwrap().state()
}

async fn until_not_ready(cri: &Cri, pod: &str) {
    let deadline = std::time::Instant::now() + BOUND;
    while state_of(cri, pod).await == PodSandboxState::SandboxReady {
        assert!(std::time::Instant::now() < deadline, "the pod is still READY");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_handler_is_chosen_by_name_and_told_of() {
    let config = format!("{}[runtimes.gone]\nshim = \"io.containerd.nosuch.v2\"\n[runtimes.plain]\n", grpc());
    let (daemon, cri) = start(&config).await;
    let status = cri.runtime.clone().status(StatusRequest { verbose: true }).await.unwrap().into_inner();
    let default = longshore_tests::handler().name();
    let mut names: Vec<_> = status.runtime_handlers.iter().map(|h| h.name.as_str()).collect();
    names.sort_unstable();
    let mut wanted = vec!["", default, "grpc", "plain"];
    wanted.sort_unstable();
    assert_eq!(names, wanted, "one that can't run is not offered");
    let features = |name: &str| status.runtime_handlers.iter().find(|h| h.name == name).unwrap().features;
    // The same OCI runtime, and so the same features.
    assert!(features("").is_some() && features("") == features("plain"));
    let info: serde_json::Value = serde_json::from_str(&status.info["info"]).unwrap();
    assert!(info["handlers"]["gone"]["broken"].as_str().unwrap().contains("containerd-shim-nosuch-v2"), "{info}");
    assert!(info["handlers"]["plain"]["runtime"]["version"].is_string(), "{info}");

    let e = cri.run_pod_by("kata", &daemon.pod("unknown")).await.unwrap_err();
    assert_eq!(e.code(), Code::InvalidArgument);
    assert!(e.message().contains("\"kata\"") && e.message().contains("plain"), "{e}");
    let e = cri.run_pod_by("gone", &daemon.pod("broken")).await.unwrap_err();
    assert_eq!(e.code(), Code::FailedPrecondition);
    assert!(e.message().contains("containerd-shim-nosuch-v2"), "{e}");
    assert!(cri.pods().await.unwrap().is_empty());

    let pod = cri.run_pod_by("plain", &daemon.pod("named")).await.unwrap();
    assert_eq!(pod_info(&cri, &pod).await["runtimeHandler"], "plain");
    assert_eq!(cri.pod_status(&pod).await.unwrap().status.unwrap().runtime_handler, "plain");
    cri.remove_pod(&pod).await.unwrap();
}

/// Everything once: start, exec, log, ends, and a daemon and a shim that die.
async fn live(daemon: &mut Daemon, handler: &str) {
    let cri = daemon.cri().await;
    let before = daemon.footprint();
    let mut config = daemon.pod(handler);
    config.log_directory = daemon.dir().join("logs").to_string_lossy().into_owned();
    let pod = cri.run_pod_by(handler, &config).await.unwrap();
    let shim = u32::try_from(pod_info(&cri, &pod).await["shimPid"].as_u64().unwrap()).unwrap();
    let mut talker = container("talker", IMAGE, &["sh", "-c", "echo hello; sleep 100000"]);
    talker.log_path = "talker.log".into();
    let talker = cri.run(&pod, &talker, &config).await.unwrap();
    let brief = cri.run(&pod, &container("brief", IMAGE, &["sh", "-c", "exit 5"]), &config).await.unwrap();
    assert_eq!(cri.exited(&brief, BOUND).await.exit_code, 5);
    assert_eq!(cri.exec(&talker, &["echo", "a"], 10).await.unwrap().stdout, "a\n");
    let e = cri.exec(&talker, &["sleep", "100"], 1).await.unwrap_err();
    assert_eq!(e.code(), Code::DeadlineExceeded, "{e}");
    let log = daemon.dir().join("logs/talker.log");
    wait_for("its line is logged", BOUND, || std::fs::read_to_string(&log).is_ok_and(|t| t.contains("stdout F hello")));

    daemon.kill();
    daemon.begin().await;
    let cri = daemon.cri().await;
    assert_eq!(state_of(&cri, &pod).await, PodSandboxState::SandboxReady);
    assert_eq!(cri.exec(&talker, &["echo", "b"], 10).await.unwrap().stdout, "b\n");
    assert_eq!(cri.status(&brief).await.unwrap().exit_code, 5);

    signal(shim, rustix::process::Signal::KILL);
    assert_eq!(cri.exited(&talker, BOUND).await.exit_code, 137);
    cri.stop_pod(&pod).await.unwrap();
    cri.stop_pod(&pod).await.unwrap();
    cri.remove_pod(&pod).await.unwrap();
    daemon.leaves_nothing_but(&before);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_shim_that_speaks_grpc_runs_pods() {
    let (mut daemon, _) = start(&grpc()).await;
    live(&mut daemon, "grpc").await;
    // Its answer is kept, and was what was dialled.
    let cri = daemon.cri().await;
    let pod = cri.run_pod_by("grpc", &daemon.pod("kept")).await.unwrap();
    let kept = std::fs::read(daemon.state().join("bundles").join(&pod).join("bootstrap.json")).unwrap();
    let kept: serde_json::Value = serde_json::from_slice(&kept).unwrap();
    assert_eq!((kept["protocol"].as_str(), kept["version"].as_u64()), (Some("grpc"), Some(3)), "{kept}");
    // Stopped, it fails its own calls alone, with an error that says so, and heals.
    let id = cri.run(&pod, &container("main", IMAGE, &["sleep", "1000"]), &daemon.pod("kept")).await.unwrap();
    let in_front = daemon.shims().into_iter().find(|p| exe(*p).ends_with("grpctest-v2")).unwrap();
    signal(in_front, rustix::process::Signal::STOP);
    let e = cri.exec(&id, &["true"], 2).await.unwrap_err();
    assert!(e.message().contains("did not answer within 10s"), "{e}");
    signal(in_front, rustix::process::Signal::CONT);
    assert_eq!(cri.exec(&id, &["echo", "on"], 10).await.unwrap().stdout, "on\n");
    cri.remove_pod(&pod).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn an_exec_that_waits_for_a_dead_daemon_to_read_holds_up_no_end() {
    let (mut daemon, cri) = start(&grpc()).await;
    let before = daemon.footprint();
    let config = daemon.pod("unread");
    let pod = cri.run_pod_by("grpc", &config).await.unwrap();
    let id = cri.run(&pod, &container("main", IMAGE, &["sleep", "100000"]), &config).await.unwrap();
    let bundle = daemon.bundles().join(&pod).join("tasks").join(&id);
    let hold = bundle.join("hold-exec-start");
    std::fs::write(&hold, "").unwrap();
    let pending = tokio::spawn({
        let (cri, id) = (cri.clone(), id.clone());
        async move { cri.exec(&id, &["sleep", "100000"], 0).await }
    });
    wait_for("the shim starts the exec", BOUND, || bundle.join("exec-start-held").exists());
    daemon.kill();
    assert!(pending.await.unwrap().is_err());
    std::fs::remove_file(&hold).unwrap();
    // Only now does it look for a reader, and there is none.
    tokio::time::sleep(Duration::from_millis(100)).await;
    daemon.begin().await;
    let cri = daemon.cri().await;
    let execs = || std::fs::read_dir(bundle.join("execs")).map_or(0, Iterator::count);
    wait_for("the exec is gone", BOUND, || execs() == 0);
    assert_eq!(cri.exec(&id, &["echo", "on"], 10).await.unwrap().stdout, "on\n");
    cri.stop(&id, 0).await.unwrap();
    assert_eq!(cri.status(&id).await.unwrap().exit_code, 137);
    cri.stop_pod(&pod).await.unwrap();
    cri.remove_pod(&pod).await.unwrap();
    daemon.leaves_nothing_but(&before);
}

fn exe(pid: u32) -> String {
    std::fs::read_link(format!("/proc/{pid}/exe")).unwrap_or_default().to_string_lossy().into_owned()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pods_own_task_is_a_pause_or_its_shim() {
    let config = "[runtimes.vm]\nsandbox = \"pause\"\n[runtimes.api]\nsandbox = \"shim\"\nshim = SHIM\n";
    let shim = bin_dir().join("containerd-shim-longshore-v2");
    let (mut daemon, _) = start(&config.replace("SHIM", &format!("{shim:?}"))).await;
    for handler in ["vm", "api"] {
        live(&mut daemon, handler).await;
        let cri = daemon.cri().await;
        let before = daemon.footprint();
        let mut config = daemon.pod("own");
        config.metadata.as_mut().unwrap().name = format!("own-{handler}");
        let pod = cri.run_pod_by(handler, &config).await.unwrap();
        let id = cri.run(&pod, &container("main", IMAGE, &["sleep", "100000"]), &config).await.unwrap();
        let pid = u32::try_from(pod_info(&cri, &pod).await["pid"].as_u64().unwrap()).unwrap();
        if handler == "vm" {
            // A process of its own, whose end is the pod's, but not its containers'.
            wait_for("the pod's own process", BOUND, || longshore_tests::command_line(pid).contains("/init"));
            signal(pid, rustix::process::Signal::KILL);
            until_not_ready(&cri, &pod).await;
            assert_eq!(cri.status(&id).await.unwrap().state(), ContainerState::ContainerRunning);
        } else {
            // Its sandbox is no process, and its end is its shim's.
            assert_eq!(pid, 0);
            let shim = u32::try_from(pod_info(&cri, &pod).await["shimPid"].as_u64().unwrap()).unwrap();
            signal(shim, rustix::process::Signal::KILL);
            assert_eq!(cri.exited(&id, BOUND).await.exit_code, 137);
            until_not_ready(&cri, &pod).await;
        }
        cri.remove_pod(&pod).await.unwrap();
        daemon.leaves_nothing_but(&before);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn pods_of_a_handler_that_is_gone_can_be_ended() {
    let (mut daemon, cri) = start("[runtimes.extra]\nroot = \"/run/longshore-test-extra\"\n").await;
    let before = daemon.footprint();
    let config = daemon.pod("orphan");
    let pod = cri.run_pod_by("extra", &config).await.unwrap();
    let id = cri.run(&pod, &container("main", IMAGE, &["sleep", "100000"]), &config).await.unwrap();
    assert!(daemon.terminate().success());
    std::fs::write(daemon.dir().join("config.toml"), "").unwrap();
    daemon.begin().await;
    let cri = daemon.cri().await;
    assert!(daemon.log().contains("its handler is no longer configured"));
    assert_eq!(cri.exec(&id, &["echo", "on"], 10).await.unwrap().stdout, "on\n");
    let e = cri.create(&pod, &container("next", IMAGE, &["true"]), &config).await.unwrap_err();
    assert_eq!(e.code(), Code::FailedPrecondition);
    assert!(e.message().contains("\"extra\" is no longer configured"), "{e}");
    // Its shim dies: what it left is ended with what began it.
    for shim in daemon.shims() {
        signal(shim, rustix::process::Signal::KILL);
    }
    assert_eq!(cri.exited(&id, BOUND).await.exit_code, 137);
    cri.stop_pod(&pod).await.unwrap();
    cri.remove_pod(&pod).await.unwrap();
    daemon.leaves_nothing_but(&before);
    let left = std::fs::read_dir("/run/longshore-test-extra/k8s.io").map_or(0, Iterator::count);
    let _ = std::fs::remove_dir_all("/run/longshore-test-extra");
    assert_eq!(left, 0, "the OCI runtime has forgotten it");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_shims_own_log_is_in_ours_also_after_a_restart() {
    let (mut daemon, cri) = start("").await;
    let pod = cri.run_pod(&daemon.pod("log")).await.unwrap();
    let fifo = daemon.state().join("bundles").join(&pod).join("log");
    for round in ["first", "second"] {
        let mut log = std::fs::OpenOptions::new().write(true).open(&fifo).unwrap();
        writeln!(log, "level=warning msg=\"the {round} line of a shim\"").unwrap();
        drop(log);
        let wanted = format!("the {round} line of a shim");
        wait_for("the daemon's log has it", BOUND, || {
            daemon.log().lines().any(|l| l.contains(&wanted) && l.contains("WARN") && l.contains(&pod))
        });
        daemon.kill();
        daemon.begin().await;
    }
    daemon.cri().await.remove_pod(&pod).await.unwrap();
}

/// What an older shim does with an event.
fn publish(daemon: &Daemon, topic: &str, kind: &str, event: &impl Message) -> (bool, String) {
    let any = prost_types::Any { type_url: kind.into(), value: event.encode_to_vec() };
    let mut child = Command::new(bin_dir().join("longshore"))
        .arg("--address")
        .arg(daemon.state().join("events/sock"))
        .args(["publish", "--topic", topic, "--namespace", "k8s.io"])
        .stdin(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    child.stdin.take().unwrap().write_all(&any.encode_to_vec()).unwrap();
    let out = child.wait_with_output().unwrap();
    (out.status.success(), String::from_utf8_lossy(&out.stderr).into_owned())
}

#[tokio::test(flavor = "multi_thread")]
async fn events_that_are_late_doubled_or_false_change_nothing() {
    let (daemon, cri) = start(&grpc()).await;
    let (ok, said) = publish(&daemon, "/tasks/oom", "containerd.events.TaskOOM", &TaskOom::default());
    assert!(!ok && said.contains("is the daemon up?"), "nobody listens before there is a foreign shim: {said}");
    let config = daemon.pod("events");
    let pod = cri.run_pod_by("grpc", &config).await.unwrap();
    let running = cri.run(&pod, &container("running", IMAGE, &["sleep", "1000"]), &config).await.unwrap();
    let ended = cri.run(&pod, &container("ended", IMAGE, &["sh", "-c", "exit 4"]), &config).await.unwrap();
    let before = cri.exited(&ended, BOUND).await;
    for id in [&running, &ended, &"0123".to_string()] {
        for _ in 0..2 {
            let exit = TaskExit { container_id: id.clone(), id: id.clone(), exit_status: 99, ..Default::default() };
            assert_eq!(publish(&daemon, "/tasks/exit", "containerd.events.TaskExit", &exit), (true, String::new()));
        }
    }
    let oom = TaskOom { container_id: ended.clone() };
    assert_eq!(publish(&daemon, "/tasks/oom", "containerd.events.TaskOOM", &oom), (true, String::new()));
    assert_eq!(cri.status(&running).await.unwrap().state(), ContainerState::ContainerRunning);
    let after = cri.status(&ended).await.unwrap();
    assert_eq!(
        (after.exit_code, after.finished_at, &after.reason),
        (before.exit_code, before.finished_at, &before.reason)
    );
    // Of a running one it is what an exit of 137 is read by.
    let oom = TaskOom { container_id: running.clone() };
    assert!(publish(&daemon, "/tasks/oom", "containerd.events.TaskOOM", &oom).0);
    cri.stop(&running, 0).await.unwrap();
    assert_eq!(cri.status(&running).await.unwrap().reason, "OOMKilled");
    let (ok, said) = publish(&daemon, "tasks/oom", "x", &TaskOom::default());
    assert!(!ok && said.contains("begins with a slash"), "{said}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_retry_of_a_stop_joins_the_one_that_runs() {
    let (daemon, cri) = start("").await;
    let mut config = daemon.pod("join");
    config.log_directory = daemon.dir().join("logs").to_string_lossy().into_owned();
    let pod = cri.run_pod(&config).await.unwrap();
    let script = "trap 'echo term' TERM; echo up; while :; do sleep 0.1; done";
    let mut c = container("deaf", IMAGE, &["sh", "-c", script]);
    c.log_path = "deaf.log".into();
    let id = cri.run(&pod, &c, &config).await.unwrap();
    let log = daemon.dir().join("logs/deaf.log");
    let said = |word: &str| std::fs::read_to_string(&log).unwrap_or_default().matches(word).count();
    wait_for("it listens", BOUND, || said("stdout F up") == 1);
    let stops: Vec<_> = (0..5)
        .map(|_| {
            let (cri, id) = (cri.clone(), id.clone());
            tokio::spawn(async move { cri.stop(&id, 5).await })
        })
        .collect();
    for stop in stops {
        stop.await.unwrap().unwrap();
    }
    let status = cri.status(&id).await.unwrap();
    assert_eq!((status.exit_code, status.reason.as_str()), (137, "Error"));
    assert_eq!(said("stdout F term"), 1, "one stop, one signal");
}
