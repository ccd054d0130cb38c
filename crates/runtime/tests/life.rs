//! A pod's life through the manager, with our shim and with containerd's.

#![allow(clippy::unwrap_used, reason = "a failure has to stop the test")]

mod common;

use common::proxy::Proxy;
use common::{Kind, Node, alive, eventually, kill_9};
use longshore_runtime::{PodProcess, RecoverPod, Runtime, RuntimeEvent, TaskState};
use std::time::{Duration, Instant};
use types::{ErrorKind, ExitStatus, Signal};

fn a_pod_runs(kind: Kind) {
    let mut node = Node::new(kind);
    let m = node.m().clone();
    let pod = node.pod("pod1");
    let first = node.run(m.start_pod(&pod)).unwrap();
    assert_eq!(matches!(first, PodProcess::Shim { own: true, .. }), kind == Kind::Ours);
    assert_eq!(node.run(m.start_pod(&pod)).unwrap(), first, "one shim for the whole life of a pod");
    assert_eq!(m.shim_pid("pod1"), first.shim_pid());
    eventually("the shim has a cgroup of the runtime's", || {
        let cgroups = std::fs::read_to_string(format!("/proc/{}/cgroup", first.shim_pid().unwrap())).unwrap();
        cgroups.lines().all(|l| l.ends_with("/shims"))
    });

    node.launch("pod1", "c1", &["/bin/sh", "-c", "echo to-out; echo to-err >&2; exit 7"]);
    assert_eq!(node.exit_of("c1").status, ExitStatus::Code(7));
    let state = node.run(m.task_state("pod1", "c1")).unwrap();
    assert!(matches!(state, TaskState::Stopped(c) if c.status == ExitStatus::Code(7)));
    node.run(m.delete_task("pod1", "c1")).unwrap();
    node.run(m.delete_task("pod1", "c1")).unwrap();
    let log = node.log("c1");
    eventually("the log has both lines", || {
        let text = std::fs::read_to_string(&log).unwrap_or_default();
        text.contains(" stdout F to-out\n") && text.contains(" stderr F to-err\n")
    });

    let pid = node.launch("pod1", "c2", &["/bin/sleep", "1000"]);
    assert_eq!(node.run(m.task_state("pod1", "c2")).unwrap(), TaskState::Running { pid });
    assert_eq!(node.run(m.pids("pod1", "c2")).unwrap(), [pid]);
    node.run(m.pause_task("pod1", "c2")).unwrap();
    assert_eq!(node.run(m.task_state("pod1", "c2")).unwrap(), TaskState::Paused { pid });
    node.run(m.resume_task("pod1", "c2")).unwrap();
    node.run(m.update_task("pod1", "c2", r#"{"pids":{"limit":77}}"#)).unwrap();
    let refused = node.run(m.delete_task("pod1", "c2")).unwrap_err();
    // containerd 1.6's shim says Unknown.
    let kind_of_refusal = if kind == Kind::Ours { ErrorKind::FailedPrecondition } else { ErrorKind::Internal };
    assert_eq!(refused.kind(), kind_of_refusal, "{refused}");
    let again = node.task("pod1", "c2", &["/bin/true"]);
    assert_eq!(node.run(m.create_task(&pod, &again)).unwrap_err().kind(), ErrorKind::AlreadyExists);
    node.run(m.kill_task("pod1", "c2", Signal::KILL, false, "a test")).unwrap();
    let end = node.exit_of("c2");
    assert_eq!((end.status, end.killed_by.as_deref()), (ExitStatus::Signal(9), Some("a test")));
    node.run(m.kill_task("pod1", "c2", Signal::TERM, false, "late")).unwrap();
    assert_eq!(m.shim_pid("pod1"), first.shim_pid());
    assert!(alive(first.shim_pid().unwrap()));

    // One is dead and one runs when the pod is stopped.
    let pid = node.launch("pod1", "c3", &["/bin/sleep", "1000"]);
    node.run(m.stop_pod("pod1")).unwrap();
    node.run(m.stop_pod("pod1")).unwrap();
    assert_eq!(node.exit_of("c3").status, ExitStatus::Signal(9));
    assert!(!alive(pid) && !alive(first.shim_pid().unwrap()));
    node.no_event();
    assert_eq!(node.run(m.task_state("pod1", "c3")).unwrap_err().kind(), ErrorKind::NotFound);
    assert!(m.operations().is_empty());
    node.assert_clean();
}

fn what_fails_leaves_nothing(kind: Kind) {
    let mut node = Node::new(kind);
    let m = node.m().clone();
    let pod = node.pod("pod1");
    node.run(m.start_pod(&pod)).unwrap();
    let task = node.task("pod1", "bad", &["/bin/no-such-command"]);
    let e = node.run(async {
        match m.create_task(&pod, &task).await {
            Err(e) => Err(e),
            Ok(_) => m.start_task("pod1", "bad").await,
        }
    });
    let e = e.unwrap_err();
    assert!(e.to_string().contains("no-such-command"), "the runtime's own words are passed on: {e}");
    node.run(m.delete_task("pod1", "bad")).unwrap();
    assert!(!node.bundle("pod1").join("tasks/bad").exists());

    let mut task = node.task("pod1", "mount", &["/bin/true"]);
    task.rootfs[0].source = "/no/such/rootfs".into();
    assert!(node.run(m.create_task(&pod, &task)).is_err());
    assert!(!node.bundle("pod1").join("tasks/mount").exists());
    // The same name works once the cause is gone.
    node.launch("pod1", "mount", &["/bin/true"]);
    assert_eq!(node.exit_of("mount").status, ExitStatus::Code(0));
    node.run(m.stop_pod("pod1")).unwrap();
    node.assert_clean();
}

fn a_dead_shim_is_buried_and_replaced(kind: Kind) {
    let mut node = Node::new(kind);
    let m = node.m().clone();
    let pod = node.pod("pod1");
    let first = node.run(m.start_pod(&pod)).unwrap();
    let (a, b) = (node.launch("pod1", "a", &["/bin/sleep", "1000"]), node.launch("pod1", "b", &["/bin/sleep", "1000"]));
    node.launch("pod1", "done", &["/bin/sh", "-c", "exit 3"]);
    let done = node.exit_of("done");
    kill_9(first.shim_pid().unwrap());
    for _ in 0..2 {
        match node.event() {
            RuntimeEvent::Exited { container, certificate, .. } => {
                assert!(container == "a" || container == "b");
                assert_eq!(certificate.status.code(), 137);
            }
            RuntimeEvent::ShimGone { .. } => panic!("the shim's end is told after that of its containers"),
        }
    }
    assert!(matches!(node.event(), RuntimeEvent::ShimGone { pod } if pod == "pod1"));
    assert!(!alive(a) && !alive(b));
    let state = node.run(m.task_state("pod1", "done")).unwrap();
    assert_eq!(state, TaskState::Stopped(done), "an end that was told never changes");
    for id in ["a", "b", "done"] {
        node.run(m.delete_task("pod1", id)).unwrap();
    }
    node.launch("pod1", "a", &["/bin/sh", "-c", "exit 4"]);
    let second = m.shim_pid("pod1").unwrap();
    assert_ne!(first.shim_pid().unwrap(), second);
    assert_eq!(node.exit_of("a").status, ExitStatus::Code(4));
    // And once more, with stop straight after the kill.
    node.launch("pod1", "c", &["/bin/sleep", "1000"]);
    kill_9(second);
    node.run(m.stop_pod("pod1")).unwrap();
    assert_eq!(node.exit_of("c").status.code(), 137);
    node.assert_clean();
}

#[test]
fn what_can_not_be_ended_after_its_shim_is_not_forgotten() {
    let mut node = Node::new(Kind::Ours);
    let (binary, aside) = (node.root.join("runtime"), node.root.join("aside"));
    std::os::unix::fs::symlink("/usr/sbin/runc", &binary).unwrap();
    let mut config = node.config();
    config.handlers[0].runtime_binary = binary.clone();
    node.restart_with(config);
    let m = node.m().clone();
    let pod = node.run(m.start_pod(&node.pod("pod1"))).unwrap();
    let pid = node.launch("pod1", "c", &["/bin/sleep", "1000"]);
    std::fs::rename(&binary, &aside).unwrap();
    kill_9(pod.shim_pid().unwrap());
    assert_eq!(node.exit_of("c").status.code(), 255);
    assert!(alive(pid), "a runtime that can't be asked has killed nobody");
    // As the daemon does once the exit is recorded: the bundle must still lead to it.
    for _ in 0..2 {
        let e = node.run(m.delete_task("pod1", "c")).unwrap_err();
        assert!(e.to_string().contains(binary.to_str().unwrap()), "{e}");
    }
    let e = node.run(m.stop_pod("pod1")).unwrap_err();
    assert!(e.to_string().contains(binary.to_str().unwrap()), "{e}");
    assert!(alive(pid));
    std::fs::rename(&aside, &binary).unwrap();
    node.run(m.delete_task("pod1", "c")).unwrap();
    assert!(!alive(pid));
    node.run(m.stop_pod("pod1")).unwrap();
    node.assert_clean();
}

/// Its containers go on, and their ends are heard of.
#[test]
fn a_broken_connection_is_not_the_death_of_the_shim() {
    let mut node = Node::new(Kind::Ours);
    let (proxy, config) = Proxy::before(&node);
    node.restart_with(config);
    let m = node.m().clone();
    let shim = node.run(m.start_pod(&node.pod("pod1"))).unwrap().shim_pid().unwrap();
    let pid = node.launch("pod1", "c", &["/bin/sleep", "1000"]);
    let (mm, exec) = (m.clone(), node.exec(&["/bin/sleep", "777"]));
    let exec = node.spawn(async move { mm.exec_sync("pod1", "c", exec).await });
    eventually("the exec runs", || node.run(m.pids("pod1", "c")).is_ok_and(|pids| pids.len() == 2));
    proxy.cut();
    assert_eq!(node.run(m.task_state("pod1", "c")).unwrap(), TaskState::Running { pid }, "it lives");
    let e = node.run(exec).unwrap().unwrap_err();
    assert_eq!(e.kind(), ErrorKind::Unavailable, "{e}");
    assert_eq!(node.run(m.pids("pod1", "c")).unwrap(), [pid], "its exec is ended by a new connection");
    let execs = node.bundle("pod1").join("tasks/c/execs");
    assert!(std::fs::read_dir(&execs).unwrap().next().is_none());
    // One that can't be reached for a while is not killed, nor are its containers ended.
    let aside = node.root.join("aside");
    std::fs::rename(proxy.socket(), &aside).unwrap();
    proxy.cut();
    let e = node.run(m.task_state("pod1", "c")).unwrap_err();
    assert_eq!(e.kind(), ErrorKind::Unavailable, "{e}");
    std::thread::sleep(Duration::from_secs(2));
    std::fs::rename(&aside, proxy.socket()).unwrap();
    assert!(alive(shim) && alive(pid));
    eventually("it is reached again", || node.run(m.task_state("pod1", "c")).is_ok());
    node.no_event();
    node.run(m.kill_task("pod1", "c", Signal::KILL, false, "a test")).unwrap();
    assert_eq!(node.exit_of("c").status, ExitStatus::Signal(9));
    node.run(m.stop_pod("pod1")).unwrap();
    node.assert_clean();
}

fn a_dead_daemon_harms_nobody(kind: Kind) {
    let mut node = Node::new(kind);
    let m = node.m().clone();
    let shim = node.run(m.start_pod(&node.pod("pod1"))).unwrap();
    let lives = node.launch("pod1", "lives", &["/bin/sh", "-c", "trap 'exit 5' TERM; while :; do sleep 0.1; done"]);
    let dies = node.launch("pod1", "dies", &["/bin/sh", "-c", "while [ ! -e /go ]; do sleep 0.05; done; exit 6"]);
    let other = node.run(m.start_pod(&node.pod("pod2"))).unwrap();
    node.launch("pod2", "lost", &["/bin/sleep", "1000"]);
    let stranger = node.run(m.start_pod(&node.pod("pod3"))).unwrap();
    let strange = node.launch("pod3", "strange", &["/bin/sleep", "1000"]);
    let exec = node.exec(&["/bin/sleep", "777"]);
    let mm = m.clone();
    node.spawn(async move { mm.exec_sync("pod1", "lives", exec).await });
    let exec_runs = |pids: Vec<u32>| {
        pids.iter().any(|p| std::fs::read_to_string(format!("/proc/{p}/cmdline")).is_ok_and(|c| c.contains("777")))
    };
    eventually("the exec runs", || exec_runs(node.run(m.pids("pod1", "lives")).unwrap()));
    drop(m);

    node.die();
    std::fs::write(node.root.join("rootfs/go"), "").unwrap();
    eventually("it dies without a daemon", || !alive(dies));
    if kind == Kind::Ours {
        let told = node.bundle("pod1").join("tasks/dies/exit.json");
        eventually("its exit is kept", || told.exists());
    }
    assert!(alive(lives) && alive(shim.shim_pid().unwrap()));
    kill_9(other.shim_pid().unwrap());
    // A daemon that died before its Create.
    let halves = ["pod1", "pod2"].map(|pod| node.bundle(pod).join("tasks/half"));
    halves.iter().for_each(|half| std::fs::create_dir_all(half.join("rootfs")).unwrap());
    node.start();
    let m = node.m().clone();
    let ask = |pod: &str, ids: &[&str]| RecoverPod {
        spec: node.pod(pod),
        containers: ids.iter().map(ToString::to_string).collect(),
    };
    let asked = vec![
        ask("pod1", &["lives", "dies", "never-made", "half"]),
        ask("pod2", &["lost", "half"]),
        ask("pod4", &["gone"]),
    ];
    let mut found = node.run(m.recover(asked)).into_iter().map(Result::unwrap);
    let pod1 = found.next().unwrap();
    assert_eq!(pod1.process, Some(shim));
    let of = |id: &str| pod1.containers.iter().find(|c| c.0 == id).unwrap().1.clone();
    assert_eq!(of("lives"), Some(TaskState::Running { pid: lives }));
    assert!(matches!(of("dies"), Some(TaskState::Stopped(c)) if c.status == ExitStatus::Code(6)));
    assert_eq!((of("never-made"), of("half")), (None, None));
    let pod2 = found.next().unwrap();
    assert_eq!(pod2.process, None);
    let of = |id: &str| pod2.containers.iter().find(|c| c.0 == id).unwrap().1.clone();
    assert!(matches!(of("lost"), Some(TaskState::Stopped(c)) if c.status.code() == 137));
    assert_eq!(of("half"), None);
    assert!(halves.iter().all(|half| !half.exists()));
    let pod4 = found.next().unwrap();
    assert_eq!((pod4.process, &pod4.containers[0].1), (None, &None));
    eventually("a pod that nobody knows is gone", || !alive(strange) && !alive(stranger.shim_pid().unwrap()));

    eventually("the old daemon's exec is killed", || !exec_runs(node.run(m.pids("pod1", "lives")).unwrap()));
    let said = node.run(m.exec_sync("pod1", "lives", node.exec(&["/bin/echo", "still here"]))).unwrap();
    assert_eq!(said.stdout, "still here\n");
    node.run(m.kill_task("pod1", "lives", Signal::TERM, false, "a test")).unwrap();
    let end = loop {
        // That of `dies` may come again, and that of a pod that nobody knows:
        // consumers are idempotent.
        match node.event() {
            RuntimeEvent::Exited { container, certificate, .. } if container == "lives" => break certificate,
            RuntimeEvent::Exited { container, .. } if container == "dies" || container == "strange" => {}
            other => panic!("unexpected {other:?}"),
        }
    };
    assert_eq!(end.status, ExitStatus::Code(5));
    for pod in ["pod1", "pod2", "pod4"] {
        node.run(m.stop_pod(pod)).unwrap();
    }
    node.assert_clean();
}

/// A command that exits at once: its exit is told, once, with its code, also
/// where it comes before the answer to Start.
fn no_quick_exit_is_lost(kind: Kind) {
    let mut node = Node::new(kind);
    let m = node.m().clone();
    for n in 0..25 {
        let (id, code) = (format!("c{n}"), n.to_string());
        node.launch("pod1", &id, &["/bin/sh", "-c", &format!("exit {code}")]);
        assert_eq!(node.exit_of(&id).status, ExitStatus::Code(n));
        node.run(m.delete_task("pod1", &id)).unwrap();
        node.no_event();
    }
    node.run(m.stop_pod("pod1")).unwrap();
    node.assert_clean();
}

/// SIGSTOP makes a shim hang: calls to it end at their bounds, also after a
/// restart of the daemon, and SIGCONT heals it.
fn a_shim_that_hangs_harms_its_own_pod_only(kind: Kind) {
    let mut node = Node::new(kind);
    node.timeouts.load = Duration::from_secs(5);
    let shim = node.run(node.m().start_pod(&node.pod("pod1"))).unwrap();
    let pid = node.launch("pod1", "c1", &["/bin/sleep", "1000"]);
    common::signal(shim.shim_pid().unwrap(), rustix::process::Signal::STOP);
    let m = node.m().clone();
    let began = Instant::now();
    let e = node.run(m.task_state("pod1", "c1")).unwrap_err();
    assert_eq!(e.kind(), ErrorKind::DeadlineExceeded, "{e}");
    assert!(began.elapsed() < Duration::from_secs(30));
    node.launch("pod2", "c2", &["/bin/true"]);
    assert_eq!(node.exit_of("c2").status, ExitStatus::Code(0));
    node.run(m.delete_task("pod2", "c2")).unwrap();

    drop(m);
    node.die();
    node.start();
    let m = node.m().clone();
    let asked = vec![
        RecoverPod { spec: node.pod("pod1"), containers: vec!["c1".into()] },
        RecoverPod { spec: node.pod("pod2"), containers: vec![] },
    ];
    let found = node.run(m.recover(asked.clone()));
    assert_eq!(found[0].as_ref().unwrap_err().kind(), ErrorKind::DeadlineExceeded);
    assert!(found[1].as_ref().unwrap().process.is_some());
    common::signal(shim.shim_pid().unwrap(), rustix::process::Signal::CONT);
    assert_eq!(node.run(m.task_state("pod1", "c1")).unwrap(), TaskState::Running { pid });
    node.run(m.kill_task("pod1", "c1", Signal::KILL, false, "a test")).unwrap();
    assert_eq!(node.exit_of("c1").status, ExitStatus::Signal(9));
    node.run(m.delete_task("pod1", "c1")).unwrap();
    a_hung_shim_that_dies_unexamined(&mut node);
    let m = node.m().clone();
    // One that hangs for good is stopped all the same.
    let pid = node.launch("pod1", "c3", &["/bin/sleep", "1000"]);
    let shim = m.shim_pid("pod1").unwrap();
    common::signal(shim, rustix::process::Signal::STOP);
    node.run(m.stop_pod("pod1")).unwrap();
    assert!(!alive(pid) && !alive(shim));
    node.run(m.stop_pod("pod2")).unwrap();
    node.assert_clean();
}

/// The ends of its containers are told all the same: one that came before is in its
/// bundle, where our shim writes it.
fn a_hung_shim_that_dies_unexamined(node: &mut Node) {
    let shim = node.m().shim_pid("pod1").unwrap();
    node.launch("pod1", "before", &["/bin/sh", "-c", "exit 7"]);
    assert_eq!(node.exit_of("before").status, ExitStatus::Code(7));
    let pid = node.launch("pod1", "with", &["/bin/sleep", "1000"]);
    common::signal(shim, rustix::process::Signal::STOP);
    node.die();
    node.start();
    let m = node.m().clone();
    let asked = RecoverPod { spec: node.pod("pod1"), containers: vec!["before".into(), "with".into()] };
    // Else it is a bundle of no known pod.
    let other = RecoverPod { spec: node.pod("pod2"), containers: vec![] };
    assert!(node.run(m.recover(vec![asked, other])).remove(0).is_err());
    kill_9(shim);
    for (id, code) in [("before", if node.kind == Kind::Ours { 7 } else { 137 }), ("with", 137)] {
        let state = node.run(m.task_state("pod1", id)).unwrap();
        assert!(matches!(&state, TaskState::Stopped(c) if c.status.code() == code), "{id}: {state:?}");
        node.run(m.delete_task("pod1", id)).unwrap();
        assert_eq!(node.run(m.task_state("pod1", id)).unwrap_err().kind(), ErrorKind::NotFound);
    }
    assert!(!alive(pid));
}

fn a_log_is_reopened(kind: Kind) {
    let node = Node::new(kind);
    let m = node.m().clone();
    node.launch("pod1", "c1", &["/bin/sh", "-c", "i=0; while :; do echo line $i; i=$((i+1)); sleep 0.01; done"]);
    let (log, old) = (node.log("c1"), node.root.join("old.log"));
    eventually("it logs", || std::fs::read_to_string(&log).is_ok_and(|t| t.contains("line 5\n")));
    std::fs::rename(&log, &old).unwrap();
    node.run(m.reopen_log("pod1", "c1")).unwrap();
    eventually("it logs on", || std::fs::read_to_string(&log).is_ok_and(|t| t.lines().count() > 5));
    node.run(m.stop_pod("pod1")).unwrap();
    let all = std::fs::read_to_string(&old).unwrap() + &std::fs::read_to_string(&log).unwrap();
    for (i, line) in all.lines().enumerate() {
        assert!(line.ends_with(&format!(" stdout F line {i}")), "{line} is no line {i}");
    }
    node.assert_clean();
}

macro_rules! both {
    ($($case:ident),*) => {
        mod ours { use super::*; $(#[test] fn $case() { super::$case(Kind::Ours) })* }
        mod go { use super::*; $(#[test] fn $case() { super::$case(Kind::Go) })* }
    };
}

both!(
    a_pod_runs,
    what_fails_leaves_nothing,
    a_dead_shim_is_buried_and_replaced,
    a_dead_daemon_harms_nobody,
    a_shim_that_hangs_harms_its_own_pod_only,
    a_log_is_reopened,
    no_quick_exit_is_lost
);

/// containerd 2.3's dialect: our shim speaks it to whom it is spoken to in it.
#[test]
fn a_protobuf_answer_is_understood_and_kept() {
    use prost::Message;
    use proto::containerd::runtime::bootstrap::v1::BootstrapParams;
    use std::os::unix::fs::PermissionsExt;
    let mut node = Node::new(Kind::Ours);
    let params = BootstrapParams {
        instance_id: "pod1".into(),
        namespace: common::NAMESPACE.into(),
        containerd_version: "2.3.0".into(),
        ..Default::default()
    };
    std::fs::write(node.root.join("params"), params.encode_to_vec()).unwrap();
    let mut cfg = node.config();
    let script = node.root.join("shim");
    let shim = cfg.handlers[0].shim.display().to_string();
    let params = node.root.join("params").display().to_string();
    testkit::script(&script, format!("#!/bin/sh\nexec {shim} \"$@\" <{params}\n"));
    cfg.handlers[0].shim = script;
    node.restart_with(cfg);
    let m = node.m().clone();
    let first = node.run(m.start_pod(&node.pod("pod1"))).unwrap();
    let kept = node.bundle("pod1").join("bootstrap.json");
    let text = std::fs::read_to_string(&kept).unwrap();
    assert!(text.contains("\"version\":3"), "{text}");
    assert_eq!(kept.metadata().unwrap().permissions().mode() & 0o777, 0o600);
    node.launch("pod1", "c1", &["/bin/sh", "-c", "exit 3"]);
    assert_eq!(node.exit_of("c1").status, ExitStatus::Code(3));
    drop(m);
    // Read back; and without it the bundle's address is, as older shims leave it.
    for remove in [false, true] {
        node.die();
        if remove {
            std::fs::remove_file(&kept).unwrap();
        }
        node.start();
        let m = node.m().clone();
        let asked = RecoverPod { spec: node.pod("pod1"), containers: Vec::new() };
        let found = node.run(m.recover(vec![asked])).remove(0).unwrap();
        assert_eq!(found.process, Some(first.clone()));
        let text = std::fs::read_to_string(&kept).unwrap();
        assert!(text.contains(if remove { "\"version\":2" } else { "\"version\":3" }), "{text}");
    }
    node.run(node.m().stop_pod("pod1")).unwrap();
    node.assert_clean();
}

/// A shim that can't start: a script in its place.
#[test]
fn a_shim_that_fails_is_quoted_and_leaves_nothing() {
    let mut node = Node::new(Kind::Go);
    let script = node.root.join("shim");
    for (body, said, kind) in [
        ("echo out of luck >&2; exit 3", "out of luck", ErrorKind::Internal),
        ("echo nonsense", "nonsense", ErrorKind::Internal),
        ("exec sleep 60", "was killed", ErrorKind::DeadlineExceeded),
        ("echo '{\"version\":9,\"address\":\"unix:///x\"}'", "version 9", ErrorKind::Unimplemented),
        ("echo unix:///no/such/socket", "/no/such/socket", ErrorKind::Unavailable),
    ] {
        testkit::script(&script, format!("#!/bin/sh\n{body}\n"));
        // Only one that says nothing may run into its bound.
        let launch = if body.contains("sleep") { Duration::from_millis(500) } else { Duration::from_secs(60) };
        node.timeouts.launch = launch;
        let mut cfg = node.config();
        cfg.handlers[0].shim.clone_from(&script);
        let (tx, _events) = tokio::sync::mpsc::unbounded_channel();
        let m = node.run(longshore_runtime::shim_v2::ShimManager::new(cfg, tx)).unwrap();
        let e = node.run(m.start_pod(&node.pod("pod1"))).unwrap_err();
        assert!(e.to_string().contains(said), "{e}");
        assert_eq!(e.kind(), kind, "{e}");
        assert!(m.shim_pid("pod1").is_none());
        node.assert_clean();
    }
}
