//! The shim as its callers see it: the real binary, the real runtime.
#![allow(clippy::unwrap_used)]

mod harness;

use harness::common::{Bundle, Shape, sh};
use harness::{CALL, Fifo, Io, Shim, code, until};
use proto::containerd::task::v3 as task;
use rustix::fs::{Mode, OFlags};
use std::time::{Duration, Instant};

fn topics(seen: &[harness::Seen]) -> Vec<&str> {
    seen.iter().map(|s| s.0.as_str()).collect()
}

#[tokio::test]
async fn a_container_lives_and_dies_with_all_its_events() {
    let shim = Shim::start().await;
    let b = Bundle::new(&Shape { args: sh("echo out; echo err >&2; exit 7"), ..Shape::default() });
    let (out, err) = (Fifo::new(b.path(), "o"), Fifo::new(b.path(), "e"));
    let pid = shim.create(&b, Io { stdout: out.uri(), stderr: err.uri(), ..Io::default() }).await.unwrap();
    assert_eq!(shim.state(&b).await.unwrap().status, 1);
    assert_eq!(shim.start_task(&b).await.unwrap(), pid);
    assert_eq!(shim.wait(&b, "").await.unwrap(), 7);
    assert_eq!(out.text().await, "out\n");
    assert_eq!(err.text().await, "err\n");
    let state = shim.state(&b).await.unwrap();
    assert_eq!((state.status, state.exit_status), (3, 7));
    assert!(b.path().join("exit.json").exists());
    assert_eq!(shim.delete(&b, "").await.unwrap(), 7);
    let seen = shim.events_until(&b, "/tasks/delete").await;
    assert_eq!(topics(&seen), ["/tasks/create", "/tasks/start", "/tasks/exit", "/tasks/delete"]);
    assert_eq!(seen[2].3, 7);
    assert_eq!(code(&shim.state(&b).await.unwrap_err()), ttrpc::Code::NOT_FOUND);
    let began = Instant::now();
    shim.task.shutdown(CALL, task::ShutdownRequest::default()).await.unwrap();
    for _ in 0..30_000 {
        if !shim.alive() {
            eprintln!("ended {:?} after Shutdown", began.elapsed());
            assert!(!shim.dir.path().join("s/shim.sock").exists(), "the socket is removed");
            return;
        }
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
    panic!("the shim has not ended");
}

#[tokio::test]
async fn task_v2_is_served_under_its_own_name() {
    let shim = Shim::start_as(proto::TASK_SERVICES[1]).await;
    let c = shim.task.connect(CALL, task::ConnectRequest { id: "pod".into() }).await.unwrap();
    assert_eq!((i32::try_from(c.shim_pid).unwrap(), c.task_pid), (shim.pid, 0));
}

#[tokio::test]
async fn a_command_that_exits_at_once_a_hundred_times() {
    let shim = Shim::start().await;
    let b = Bundle::new(&Shape { args: sh("exit 3"), ..Shape::default() });
    for round in 0..100 {
        shim.events.seen.lock().unwrap().clear();
        shim.create(&b, Io::default()).await.unwrap();
        shim.start_task(&b).await.unwrap();
        assert_eq!(shim.wait(&b, "").await.unwrap(), 3, "round {round}");
        assert_eq!(shim.delete(&b, "").await.unwrap(), 3);
        let seen = shim.events_until(&b, "/tasks/delete").await;
        assert_eq!(topics(&seen), ["/tasks/create", "/tasks/start", "/tasks/exit", "/tasks/delete"]);
        assert_eq!(seen[2].3, 3);
    }
}

#[tokio::test]
async fn execs_have_streams_codes_and_errors_of_their_own() {
    let shim = Shim::start().await;
    let b = Bundle::new(&Shape::default());
    shim.create(&b, Io::default()).await.unwrap();
    shim.start_task(&b).await.unwrap();
    let (out, stdin) = (Fifo::new(b.path(), "o"), b.path().join("i"));
    stdio::fifo::make(&stdin).unwrap();
    let io = Io { stdin: stdin.to_str().unwrap(), stdout: out.uri(), ..Io::default() };
    shim.exec(&b, "one", &sh("cat; exit 5"), io).await.unwrap();
    std::fs::write(&stdin, "through stdin").unwrap();
    tokio::time::sleep(Duration::from_millis(100)).await;
    let req = task::StateRequest { id: b.id.clone(), exec_id: "one".into() };
    assert_eq!(shim.task.state(CALL, req).await.unwrap().status, 2, "stdin stays open until CloseIO");
    let close = task::CloseIoRequest { id: b.id.clone(), exec_id: "one".into(), stdin: true };
    shim.task.close_io(CALL, close).await.unwrap();
    assert_eq!(shim.wait(&b, "one").await.unwrap(), 5);
    assert_eq!(out.text().await, "through stdin");
    assert_eq!(code(&shim.kill(&b, "one", 9).await.unwrap_err()), ttrpc::Code::NOT_FOUND);
    assert_eq!(shim.delete(&b, "one").await.unwrap(), 5);

    let e = shim.exec(&b, "bad", &["/bin/nope".to_string()], Io::default()).await.unwrap_err();
    assert!(e.to_string().contains("nope"), "{e}");
    assert_eq!(shim.wait(&b, "bad").await.unwrap(), 255);
    shim.delete(&b, "bad").await.unwrap();
    assert_eq!(code(&shim.wait(&b, "none").await.unwrap_err()), ttrpc::Code::NOT_FOUND);
    let e = shim.exec(&b, "../x", &sh("true"), Io::default()).await.unwrap_err();
    assert_eq!(code(&e), ttrpc::Code::INVALID_ARGUMENT);

    assert_eq!(code(&shim.delete(&b, "").await.unwrap_err()), ttrpc::Code::FAILED_PRECONDITION);
    shim.kill(&b, "", 9).await.unwrap();
    assert_eq!(shim.wait(&b, "").await.unwrap(), 137);
    shim.delete(&b, "").await.unwrap();
}

#[tokio::test]
async fn two_hundred_execs_at_once_delay_nobody() {
    let shim = Shim::start().await;
    let b = Bundle::new(&Shape::default());
    shim.create(&b, Io::default()).await.unwrap();
    shim.start_task(&b).await.unwrap();
    let mut slowest = Duration::ZERO;
    let began = Instant::now();
    {
        let all = async {
            let one = |n: usize| {
                let (shim, b) = (&shim, &b);
                async move {
                    let exec = format!("e{n}");
                    let out = Fifo::new(b.path(), &format!("o{n}"));
                    let script = format!("echo {n}; exit {}", n % 100);
                    shim.exec(b, &exec, &sh(&script), Io { stdout: out.uri(), ..Io::default() }).await.unwrap();
                    assert_eq!(shim.wait(b, &exec).await.unwrap() as usize, n % 100);
                    assert_eq!(out.text().await, format!("{n}\n"));
                    shim.delete(b, &exec).await.unwrap();
                }
            };
            let mut set = Vec::new();
            for n in 0..200 {
                set.push(Box::pin(one(n)));
            }
            join_all(set).await;
        };
        // Polled beside each other: a call that isn't polled keeps its place in the
        // client's queue, and the next one would wait behind it for ever.
        let sampler = async {
            loop {
                tokio::time::sleep(Duration::from_millis(50)).await;
                let began = Instant::now();
                shim.state(&b).await.unwrap();
                slowest = slowest.max(began.elapsed());
            }
        };
        tokio::select! {
            () = all => {}
            () = sampler => {}
        }
    }
    let all = began.elapsed();
    eprintln!("slowest State: {slowest:?}, of {all:?}");
    // Far from having waited for all of them, whatever the machine is.
    assert!(slowest < all / 4, "{slowest:?} of {all:?}");
    shim.kill(&b, "", 9).await.unwrap();
    shim.wait(&b, "").await.unwrap();
    shim.delete(&b, "").await.unwrap();
    let seen = shim.events_until(&b, "/tasks/delete").await;
    assert_eq!(seen.iter().filter(|s| s.0 == "/tasks/exit").count(), 201);
    for n in 0..200 {
        let of: Vec<&str> = seen.iter().filter(|s| s.2 == format!("e{n}")).map(|s| s.0.as_str()).collect();
        assert_eq!(of, ["/tasks/exec-added", "/tasks/exec-started", "/tasks/exit"]);
    }
}

/// All futures, each polled when it asks for it.
async fn join_all<F: Future<Output = ()>>(mut all: Vec<std::pin::Pin<Box<F>>>) {
    std::future::poll_fn(move |cx| {
        all.retain_mut(|f| f.as_mut().poll(cx).is_pending());
        if all.is_empty() { std::task::Poll::Ready(()) } else { std::task::Poll::Pending }
    })
    .await;
}

#[tokio::test]
async fn without_a_pid_namespace_what_remains_is_killed_and_init_s_exit_is_last() {
    let shim = Shim::start().await;
    let script = "sleep 1000 & sleep 1000 & while [ ! -e /go ]; do sleep 0.05; done; exit 4";
    let shape = Shape { private_pids: false, args: sh(script), ..Shape::default() };
    let b = Bundle::new(&shape);
    shim.create(&b, Io::default()).await.unwrap();
    shim.start_task(&b).await.unwrap();
    for exec in ["a", "b"] {
        shim.exec(&b, exec, &sh("sleep 1000"), Io::default()).await.unwrap();
    }
    std::fs::write(b.path().join("rootfs/go"), "").unwrap();
    let began = Instant::now();
    assert_eq!(shim.wait(&b, "").await.unwrap(), 4);
    assert!(began.elapsed() < Duration::from_secs(20));
    assert_eq!(shim.wait(&b, "a").await.unwrap(), 137);
    shim.delete(&b, "").await.unwrap();
    let seen = shim.events_until(&b, "/tasks/delete").await;
    let exits: Vec<(&str, u32)> = seen.iter().filter(|s| s.0 == "/tasks/exit").map(|s| (s.2.as_str(), s.3)).collect();
    assert_eq!(exits.len(), 3);
    assert_eq!(exits[2], ("", 4), "{exits:?}");
}

/// Whether `pid` is alive; a zombie is not.
fn lives(pid: &str) -> bool {
    let of = |file: &str| std::fs::read_to_string(format!("/proc/{pid}/{file}")).unwrap_or_default();
    let stat = of("stat");
    // One without memory is all but a zombie, and has left its cgroup.
    !stat.is_empty() && !stat.contains(") Z ") && !stat.contains(") X ") && !of("statm").starts_with("0 ")
}

#[tokio::test]
async fn when_init_s_exit_is_told_nothing_of_its_container_is_alive() {
    let shim = Shim::start().await;
    // Memory makes a process slow to die.
    let script = "trap 'exit 4' TERM; n=0
        while [ $n -lt 10 ]; do (head -c 5000000 /dev/zero | tail -c 5000000 | sleep 1000) & n=$((n+1)); done
        while :; do sleep 0.05; done";
    for _ in 0..5 {
        let b = Bundle::new(&Shape { private_pids: false, args: sh(script), ..Shape::default() });
        shim.create(&b, Io::default()).await.unwrap();
        shim.start_task(&b).await.unwrap();
        let mut pids = Vec::new();
        for _ in 0..1000 {
            pids = shim.task.pids(CALL, task::PidsRequest { id: b.id.clone() }).await.unwrap().processes;
            if pids.len() > 20 {
                break;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        assert!(pids.len() > 20, "{pids:?}");
        shim.kill(&b, "", 15).await.unwrap();
        assert_eq!(shim.wait(&b, "").await.unwrap(), 4);
        let left: Vec<String> = pids.iter().map(|p| p.pid.to_string()).filter(|p| lives(p)).collect();
        assert!(left.is_empty(), "{left:?}");
        shim.delete(&b, "").await.unwrap();
    }
}

#[tokio::test]
async fn a_terminal_carries_both_ways_and_is_resized() {
    let shim = Shim::start().await;
    let b = Bundle::new(&Shape::default());
    shim.create(&b, Io::default()).await.unwrap();
    shim.start_task(&b).await.unwrap();
    let (out, stdin) = (Fifo::new(b.path(), "o"), b.path().join("i"));
    stdio::fifo::make(&stdin).unwrap();
    let io = Io { stdin: stdin.to_str().unwrap(), stdout: out.uri(), terminal: true, ..Io::default() };
    let script = "stty -echo; echo ready; touch /ready; read line; stty size; echo got $line; exit 9";
    shim.exec(&b, "t", &sh(script), io).await.unwrap();
    let resize = task::ResizePtyRequest { id: b.id.clone(), exec_id: "t".into(), width: 101, height: 33 };
    shim.task.resize_pty(CALL, resize).await.unwrap();
    until("a terminal without echo", || b.path().join("rootfs/ready").exists()).await;
    std::fs::write(&stdin, "hello\n").unwrap();
    assert_eq!(shim.wait(&b, "t").await.unwrap(), 9);
    assert_eq!(out.text().await, "ready\r\n33 101\r\ngot hello\r\n");
    shim.delete(&b, "t").await.unwrap();
    shim.kill(&b, "", 9).await.unwrap();
    shim.wait(&b, "").await.unwrap();
    shim.delete(&b, "").await.unwrap();
}

#[tokio::test]
async fn the_cri_log_is_complete_when_the_exit_is_told_and_is_reopened() {
    let shim = Shim::start().await;
    let script = "echo one; while [ ! -e /go ]; do sleep 0.05; done; echo two >&2; seq 1 5000";
    let b = Bundle::new(&Shape { args: sh(script), ..Shape::default() });
    let log = b.path().join("logs/0.log");
    let uri = format!("cri://{}?limit=16384", log.display());
    shim.create(&b, Io { stdout: &uri, stderr: &uri, ..Io::default() }).await.unwrap();
    shim.start_task(&b).await.unwrap();
    until("the first line", || std::fs::read_to_string(&log).is_ok_and(|l| l.ends_with(" stdout F one\n"))).await;
    std::fs::rename(&log, b.path().join("logs/old")).unwrap();
    let reopen = proto::longshore_shim::ReopenLogRequest { id: b.id.clone() };
    shim.private.reopen_log(CALL, reopen).await.unwrap();
    std::fs::write(b.path().join("rootfs/go"), "").unwrap();
    assert_eq!(shim.wait(&b, "").await.unwrap(), 0);
    let old = std::fs::read_to_string(b.path().join("logs/old")).unwrap();
    assert!(old.ends_with(" stdout F one\n"), "{old}");
    let text = std::fs::read_to_string(&log).unwrap();
    assert_eq!(text.lines().count(), 5001);
    assert!(text.contains(" stderr F two\n") && text.ends_with(" stdout F 5000\n"));
    shim.delete(&b, "").await.unwrap();
    let features = shim.private.features(CALL, Default::default()).await.unwrap();
    assert!(features.features.iter().any(|f| f == "reopen-log"));
}

#[tokio::test]
async fn the_oom_killer_is_named_in_the_certificate() {
    let shim = Shim::start().await;
    let args = sh("dd if=/dev/zero of=/dev/null bs=64M count=1");
    let b = Bundle::new(&Shape { args, memory: Some(16 << 20), ..Shape::default() });
    shim.create(&b, Io::default()).await.unwrap();
    shim.start_task(&b).await.unwrap();
    let exit = shim.wait(&b, "").await.unwrap();
    assert_eq!(exit, 137);
    let req = proto::longshore_shim::CertificateRequest { id: b.id.clone(), exec_id: String::new() };
    let c = shim.private.certificate(CALL, req).await.unwrap();
    assert!(c.oom_killed && c.signal == 9 && c.peak_memory > 1 << 20 && !c.oom_cgroup.is_empty(), "{c:?}");
    shim.events_until(&b, "/tasks/oom").await;
    shim.delete(&b, "").await.unwrap();
}

#[tokio::test]
async fn a_container_is_frozen_killed_while_frozen_and_deleted_unstarted() {
    let shim = Shim::start().await;
    let b = Bundle::new(&Shape::default());
    shim.create(&b, Io::default()).await.unwrap();
    shim.start_task(&b).await.unwrap();
    shim.task.pause(CALL, task::PauseRequest { id: b.id.clone() }).await.unwrap();
    assert_eq!(shim.state(&b).await.unwrap().status, 4);
    shim.kill(&b, "", 9).await.unwrap();
    assert_eq!(shim.wait(&b, "").await.unwrap(), 137);
    shim.delete(&b, "").await.unwrap();

    shim.create(&b, Io::default()).await.unwrap();
    assert_eq!(shim.delete(&b, "").await.unwrap(), 137);
    assert_eq!(code(&shim.delete(&b, "").await.unwrap_err()), ttrpc::Code::NOT_FOUND);
}

#[tokio::test]
async fn a_failed_create_leaves_nothing_and_names_the_cause() {
    let shim = Shim::start().await;
    let b = Bundle::new(&Shape { args: vec!["/bin/nope".into()], ..Shape::default() });
    let e = shim.create(&b, Io::default()).await.unwrap_err();
    // Which container it was is the caller's to say, and each step is named once.
    let said = e.to_string();
    assert!(said.contains("/bin/nope") && said.matches("runc create").count() == 1, "{said}");
    assert_eq!(code(&shim.state(&b).await.unwrap_err()), ttrpc::Code::NOT_FOUND);
    let bad = Io { stdout: "npipe:///bin/logger", ..Io::default() };
    assert_eq!(code(&shim.create(&b, bad).await.unwrap_err()), ttrpc::Code::UNIMPLEMENTED);
    b.configure(&Shape { args: sh("exit 2"), ..Shape::default() });
    shim.create(&b, Io::default()).await.unwrap();
    shim.start_task(&b).await.unwrap();
    assert_eq!(shim.wait(&b, "").await.unwrap(), 2);
    shim.delete(&b, "").await.unwrap();
}

#[tokio::test]
async fn pids_stats_and_update_speak_of_the_container() {
    let shim = Shim::start().await;
    let b = Bundle::new(&Shape { memory: Some(64 << 20), ..Shape::default() });
    let pid = shim.create(&b, Io::default()).await.unwrap();
    shim.start_task(&b).await.unwrap();
    let exec = shim.exec(&b, "x", &sh("sleep 1000"), Io::default()).await.unwrap();
    let pids = shim.task.pids(CALL, task::PidsRequest { id: b.id.clone() }).await.unwrap().processes;
    assert!(pids.iter().any(|p| p.pid == pid && p.info.is_none()));
    assert!(pids.iter().any(|p| p.pid == exec && p.info.is_some()));
    let update = |limit: i64| task::UpdateTaskRequest {
        id: b.id.clone(),
        resources: Some(prost_types::Any {
            type_url: "types.containerd.io/opencontainers/runtime-spec/1/LinuxResources".into(),
            value: format!("{{\"memory\":{{\"limit\":{limit},\"swap\":{limit}}}}}").into_bytes(),
        }),
        ..Default::default()
    };
    shim.task.update(CALL, update(128 << 20)).await.unwrap();
    let stats = shim.task.stats(CALL, task::StatsRequest { id: b.id.clone() }).await.unwrap().stats.unwrap();
    if stats.type_url == "io.containerd.cgroups.v1.Metrics" {
        let m: proto::cgroups::v1::Metrics = prost::Message::decode(stats.value.as_slice()).unwrap();
        assert_eq!(m.memory.unwrap().usage.unwrap().limit, 128 << 20);
        assert!(m.pids.unwrap().current >= 2);
    }
    shim.kill(&b, "", 9).await.unwrap();
    shim.wait(&b, "").await.unwrap();
    shim.delete(&b, "").await.unwrap();
}

#[tokio::test]
async fn a_pipe_held_by_a_grandchild_ends_with_the_exec_s_delete() {
    let shim = Shim::start().await;
    let b = Bundle::new(&Shape::default());
    shim.create(&b, Io::default()).await.unwrap();
    shim.start_task(&b).await.unwrap();
    let fds = || std::fs::read_dir(format!("/proc/{}/fd", shim.pid)).unwrap().count();
    let before = fds();
    let out = Fifo::new(b.path(), "o");
    shim.exec(&b, "g", &sh("sleep 1000 & echo started"), Io { stdout: out.uri(), ..Io::default() }).await.unwrap();
    assert_eq!(shim.wait(&b, "g").await.unwrap(), 0);
    let began = Instant::now();
    shim.delete(&b, "g").await.unwrap();
    assert!(began.elapsed() < Duration::from_secs(20));
    // The last call's own may be closed a moment later.
    until("a shim that keeps nothing of it", || fds() <= before).await;
    shim.kill(&b, "", 9).await.unwrap();
    shim.wait(&b, "").await.unwrap();
    assert_eq!(out.text().await, "started\n");
    shim.delete(&b, "").await.unwrap();
}

#[tokio::test]
async fn after_kill_9_delete_cleans_up_and_tells_the_exit() {
    let shim = Shim::start().await;
    let b = Bundle::new(&Shape::default());
    let pid = shim.create(&b, Io::default()).await.unwrap();
    shim.start_task(&b).await.unwrap();
    let p = sys::pidfd::PidFd::open(shim.pid).unwrap();
    p.signal(types::Signal::KILL).unwrap();
    let out = std::process::Command::new(harness::BINARY)
        .args(["-namespace", "test", "-id", &b.id, "-bundle"])
        .arg(b.path())
        .arg("delete")
        .output()
        .unwrap();
    assert!(out.status.success(), "{out:?}");
    assert_eq!(shim::decode_delete(&out.stdout).unwrap().exit_status, 137);
    for _ in 0..6000 {
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        if stat.is_empty() || stat.contains(") Z ") {
            return;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    panic!("init {pid} is still alive");
}

#[tokio::test]
async fn exits_of_execs_precede_init_s_under_load() {
    let shim = Shim::start().await;
    for round in 0..3 {
        let b = Bundle::new(&Shape { private_pids: round != 1, ..Shape::default() });
        shim.create(&b, Io::default()).await.unwrap();
        shim.start_task(&b).await.unwrap();
        let mut all = Vec::new();
        for n in 0..40 {
            let (shim, b) = (&shim, &b);
            all.push(Box::pin(async move {
                // Some are refused, because init is being killed meanwhile.
                let _ = shim.exec(b, &format!("e{n}"), &sh("sleep 1000"), Io::default()).await;
            }));
        }
        let killer = async {
            tokio::time::sleep(Duration::from_millis(150)).await;
            shim.kill(&b, "", 9).await.unwrap();
        };
        tokio::join!(join_all(all), killer);
        assert_eq!(shim.wait(&b, "").await.unwrap(), 137);
        shim.delete(&b, "").await.unwrap();
        let seen = shim.events_until(&b, "/tasks/delete").await;
        let count = |topic: &str| seen.iter().filter(|s| s.0 == topic).count();
        assert_eq!(count("/tasks/exit"), count("/tasks/exec-started") + 1);
        let exits: Vec<_> = seen.iter().filter(|s| s.0 == "/tasks/exit").collect();
        assert_eq!(exits.last().unwrap().2, "", "init's exit is the last");
    }
}

#[tokio::test]
async fn cve_2024_21626_no_descriptor_reaches_the_container() {
    let shim = Shim::start().await;
    let list = "for f in /proc/self/fd/*; do test -e $f && echo ${f##*/}; done; touch /done; sleep 1000";
    let b = Bundle::new(&Shape { args: sh(list), ..Shape::default() });
    let (out, exec_out) = (Fifo::new(b.path(), "o"), Fifo::new(b.path(), "e"));
    shim.create(&b, Io { stdout: out.uri(), ..Io::default() }).await.unwrap();
    shim.start_task(&b).await.unwrap();
    until("init's list", || b.path().join("rootfs/done").exists()).await;
    shim.exec(
        &b,
        "x",
        &sh(&list.replace("touch /done; sleep 1000", "")),
        Io { stdout: exec_out.uri(), ..Io::default() },
    )
    .await
    .unwrap();
    shim.wait(&b, "x").await.unwrap();
    shim.kill(&b, "", 9).await.unwrap();
    shim.wait(&b, "").await.unwrap();
    for text in [out.text().await, exec_out.text().await] {
        assert_eq!(text, "0\n1\n2\n");
    }
    shim.delete(&b, "").await.unwrap();
}

#[tokio::test]
async fn cve_2022_23471_failed_terminal_execs_leak_nothing() {
    let shim = Shim::start().await;
    let b = Bundle::new(&Shape::default());
    shim.create(&b, Io::default()).await.unwrap();
    shim.start_task(&b).await.unwrap();
    let count = |what: &str| std::fs::read_dir(format!("/proc/{}/{what}", shim.pid)).unwrap().count();
    let out = Fifo::new(b.path(), "o");
    let mut before = (0, 0);
    for n in 0..30 {
        let exec = format!("e{n}");
        let io = Io { stdout: out.uri(), terminal: true, ..Io::default() };
        shim.exec(&b, &exec, &["/bin/nope".to_string()], io).await.unwrap_err();
        shim.delete(&b, &exec).await.unwrap();
        if n == 4 {
            before = (count("fd"), count("task"));
        }
    }
    let open = || (count("fd"), count("task"));
    until("no descriptor and no thread more", || open().0 <= before.0 && open().1 <= before.1).await;
    assert_eq!(std::fs::read_dir(shim.dir.path().join("s")).unwrap().count(), 1, "only the shim's own socket is left");
    shim.kill(&b, "", 9).await.unwrap();
    shim.wait(&b, "").await.unwrap();
    shim.delete(&b, "").await.unwrap();
}

#[tokio::test]
async fn cve_2020_15257_the_socket_is_a_file_that_is_closed_to_others() {
    use std::os::unix::fs::PermissionsExt;
    let shim = Shim::start().await;
    let socket = shim.dir.path().join("s/shim.sock");
    assert_eq!(socket.metadata().unwrap().permissions().mode() & 0o777, 0o600);
    assert_eq!(socket.parent().unwrap().metadata().unwrap().permissions().mode() & 0o777, 0o700);
    let inodes: Vec<String> = std::fs::read_dir(format!("/proc/{}/fd", shim.pid))
        .unwrap()
        .filter_map(|e| Some(std::fs::read_link(e.ok()?.path()).ok()?.display().to_string()))
        .filter_map(|l| Some(l.strip_prefix("socket:[")?.trim_end_matches(']').to_string()))
        .collect();
    for line in std::fs::read_to_string("/proc/net/unix").unwrap().lines().skip(1) {
        let fields: Vec<&str> = line.split_whitespace().collect();
        if fields.get(6).is_some_and(|i| inodes.iter().any(|x| x == i)) {
            assert!(!fields.get(7).is_some_and(|p| p.starts_with('@')), "abstract: {line}");
        }
    }
}

#[tokio::test]
async fn a_second_start_answers_with_the_first_shim() {
    let shim = Shim::start().await;
    let again = std::process::Command::new(harness::BINARY)
        .args(["-namespace", "test", "-id", "pod", "-socket"])
        .arg(shim.dir.path().join("s/shim.sock"))
        .arg("start")
        .current_dir(shim.dir.path())
        .env_remove("GRPC_ADDRESS")
        .output()
        .unwrap();
    assert!(again.status.success() && again.stderr.is_empty(), "{again:?}");
    // Without GRPC_ADDRESS the answer is a bare address (containerd 1.6).
    let want = format!("unix://{}", shim.dir.path().join("s/shim.sock").display());
    assert_eq!(String::from_utf8(again.stdout).unwrap(), want);
    assert_eq!(std::fs::read_to_string(shim.dir.path().join("shim.pid")).unwrap(), shim.pid.to_string());
}

/// Takes `n` lines from the reading end and closes it.
async fn some_lines(path: &std::path::Path, n: usize) -> Vec<u64> {
    let path = path.to_path_buf();
    let read = move || {
        use std::io::Read;
        let mut file = std::fs::File::open(path).unwrap();
        let (mut all, mut one, mut lines) = (String::new(), [0], 0);
        // A byte at a time, so that none is taken that is not looked at.
        while lines < n {
            assert_eq!(file.read(&mut one).unwrap(), 1, "no end while the shim holds the other one");
            all.push(char::from(one[0]));
            lines += usize::from(one[0] == b'\n');
        }
        all.lines().map(|l| l.parse().unwrap()).collect()
    };
    tokio::time::timeout(CALL, tokio::task::spawn_blocking(read)).await.expect("the writer goes on").unwrap()
}

#[tokio::test]
async fn a_reader_that_goes_harms_no_writer_and_the_next_one_misses_nothing() {
    let shim = Shim::start().await;
    let script = "i=0; while [ $i -lt 40000 ]; do echo $i || exit 3; i=$((i+1)); done; exit 8";
    let b = Bundle::new(&Shape { args: sh(script), ..Shape::default() });
    let path = b.path().join("o");
    stdio::fifo::make(&path).unwrap();
    shim.create(&b, Io { stdout: path.to_str().unwrap(), ..Io::default() }).await.unwrap();
    shim.start_task(&b).await.unwrap();
    let mut seen = Vec::new();
    for _ in 0..3 {
        seen.extend(some_lines(&path, 500).await);
        // Nobody reads; it fills the pipe and waits.
        tokio::time::sleep(Duration::from_millis(300)).await;
        assert_eq!(shim.state(&b).await.unwrap().status, 2);
    }
    seen.extend(some_lines(&path, 40_000 - seen.len()).await);
    assert!(seen.iter().copied().eq(0..40_000), "each once and in order");
    assert_eq!(shim.wait(&b, "").await.unwrap(), 8);
    shim.delete(&b, "").await.unwrap();
}

#[tokio::test]
async fn after_kill_9_delete_tells_the_exit_that_was_written_and_leaves_no_mount() {
    let shim = Shim::start().await;
    let (ended, running) = (
        Bundle::new(&Shape { args: sh("exit 7"), ..Shape::default() }),
        Bundle::new(&Shape { private_pids: false, args: sh("sleep 1000 & sleep 1000"), ..Shape::default() }),
    );
    for b in [&ended, &running] {
        let root = b.path().join("rootfs").display().to_string();
        let bind = |options: &[&str]| proto::containerd::types::Mount {
            r#type: "bind".into(),
            source: root.clone(),
            options: options.iter().map(ToString::to_string).collect(),
            ..Default::default()
        };
        let options =
            proto::containerd::runc::v1::Options { root: b.runtime_root().display().to_string(), ..Default::default() };
        let req = task::CreateTaskRequest {
            id: b.id.clone(),
            bundle: b.path().display().to_string(),
            rootfs: vec![bind(&["rbind", "rw"]), bind(&["rbind", "rw"])],
            options: Some(proto::pack("containerd.runc.v1.Options", &options)),
            ..Default::default()
        };
        shim.task.create(CALL, req).await.unwrap();
        shim.start_task(b).await.unwrap();
    }
    shim.exec(&running, "x", &sh("sleep 1000"), Io::default()).await.unwrap();
    assert_eq!(shim.wait(&ended, "").await.unwrap(), 7);
    let mut pids = Vec::new();
    for _ in 0..6000 {
        pids = shim.task.pids(CALL, task::PidsRequest { id: running.id.clone() }).await.unwrap().processes;
        if pids.len() >= 3 {
            break;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    assert!(pids.len() >= 3, "{pids:?}");
    sys::pidfd::PidFd::open(shim.pid).unwrap().signal(types::Signal::KILL).unwrap();
    for (b, code) in [(&ended, 7), (&running, 137)] {
        let mounted = || std::fs::read_to_string("/proc/self/mountinfo").unwrap().contains(b.path().to_str().unwrap());
        assert!(mounted());
        // Twice: whoever is not sure that it was done does it again.
        for _ in 0..2 {
            let out = std::process::Command::new(harness::BINARY)
                .args(["-namespace", "test", "-id", &b.id, "-bundle"])
                .arg(b.path())
                .arg("delete")
                .output()
                .unwrap();
            assert!(out.status.success(), "{out:?}");
            let told = shim::decode_delete(&out.stdout).unwrap();
            assert_eq!(told.exit_status, code);
            let pid = std::fs::read_to_string(b.path().join("init.pid")).unwrap();
            assert_eq!(told.pid.to_string(), pid, "whose exit it is");
        }
        assert!(!mounted(), "no mount is left");
    }
    for p in pids {
        let stat = || std::fs::read_to_string(format!("/proc/{}/stat", p.pid)).unwrap_or_default();
        for _ in 0..1000 {
            if stat().is_empty() || stat().contains(") Z ") {
                break;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        assert!(stat().is_empty() || stat().contains(") Z "), "{} lives on", p.pid);
    }
}

#[tokio::test]
async fn what_people_do_to_containerd_s_shim_harms_neither() {
    let shim = Shim::start().await;
    let b = Bundle::new(&Shape::default());
    let init = shim.create(&b, Io::default()).await.unwrap();
    assert_eq!(std::fs::read_to_string(b.path().join("init.pid")).unwrap(), init.to_string());
    shim.start_task(&b).await.unwrap();
    let exec = shim.exec(&b, "e", &sh("sleep 1000"), Io::default()).await.unwrap();
    // A size for a process without a terminal says nothing, and does nothing.
    for exec_id in ["", "e"] {
        let resize = task::ResizePtyRequest { id: b.id.clone(), exec_id: exec_id.into(), width: 80, height: 25 };
        shim.task.resize_pty(CALL, resize).await.unwrap();
    }
    let state = || task::StateRequest { id: b.id.clone(), exec_id: "e".into() };
    let seen = shim.task.state(CALL, state()).await.unwrap();
    assert_eq!((seen.id.as_str(), seen.status), ("e", 2));
    shim.task.pause(CALL, task::PauseRequest { id: b.id.clone() }).await.unwrap();
    assert_eq!(shim.task.state(CALL, state()).await.unwrap().status, 4, "an exec is frozen with its container");
    let pids = shim.task.pids(CALL, task::PidsRequest { id: b.id.clone() }).await.unwrap().processes;
    assert!(pids.iter().any(|p| p.pid == exec && p.info.is_some()), "{pids:?}");
    shim.task.resume(CALL, task::ResumeRequest { id: b.id.clone() }).await.unwrap();
    // Go's shims print their stacks at SIGUSR1, and don't care for SIGUSR2.
    for signal in ["SIGUSR1", "SIGUSR2", "SIGTERM", "SIGINT"] {
        sys::pidfd::PidFd::open(shim.pid).unwrap().signal(signal.parse().unwrap()).unwrap();
    }
    tokio::time::sleep(Duration::from_millis(200)).await;
    assert!(shim.alive());
    assert_eq!(shim.state(&b).await.unwrap().status, 2);
    shim.kill(&b, "", 9).await.unwrap();
    assert_eq!(shim.wait(&b, "").await.unwrap(), 137);
    shim.delete(&b, "").await.unwrap();
}

#[tokio::test]
async fn the_metrics_have_every_controller_of_the_container() {
    let shim = Shim::start().await;
    let b = Bundle::new(&Shape { args: sh("sync; sleep 1000"), ..Shape::default() });
    shim.create(&b, Io::default()).await.unwrap();
    shim.start_task(&b).await.unwrap();
    let stats = shim.task.stats(CALL, task::StatsRequest { id: b.id.clone() }).await.unwrap().stats.unwrap();
    let pid = shim.state(&b).await.unwrap().pid;
    let cgroup = std::fs::read_to_string(format!("/proc/{pid}/cgroup")).unwrap();
    let has = |controller: &str| cgroup.lines().any(|l| l.split(':').nth(1).is_some_and(|c| c == controller));
    if stats.type_url == "io.containerd.cgroups.v1.Metrics" {
        let m = <proto::cgroups::v1::Metrics as prost::Message>::decode(stats.value.as_slice()).unwrap();
        assert_eq!(m.blkio.is_some(), has("blkio"));
        let sizes = std::fs::read_dir("/sys/kernel/mm/hugepages").map_or(0, Iterator::count);
        if has("hugetlb") {
            assert_eq!(m.hugetlb.len(), sizes, "{:?}", m.hugetlb);
        }
        assert!(m.pids.is_none_or(|p| p.current >= 1));
    } else {
        let m = <proto::cgroups::v2::Metrics as prost::Message>::decode(stats.value.as_slice()).unwrap();
        assert!(m.io.is_some() && m.rdma.is_some());
    }
    shim.kill(&b, "", 9).await.unwrap();
    shim.wait(&b, "").await.unwrap();
    shim.delete(&b, "").await.unwrap();
}

#[tokio::test]
async fn a_terminal_s_last_bytes_wait_for_a_reader_that_comes_late() {
    // A terminal holds 4095 bytes that nobody takes.
    const BYTES: usize = 3000;
    let shim = Shim::start().await;
    let b = Bundle::new(&Shape::default());
    shim.create(&b, Io::default()).await.unwrap();
    shim.start_task(&b).await.unwrap();
    let path = b.path().join("o");
    stdio::fifo::make(&path).unwrap();
    // Full before the exec writes: how much else would fit depends on the sizes of the shim's writes.
    let flags = OFlags::RDWR | OFlags::NONBLOCK;
    let full = rustix::fs::open(&path, flags, Mode::empty()).unwrap();
    let before = std::iter::from_fn(|| rustix::io::write(&full, &[b'y'; 4096]).ok()).sum::<usize>();
    let io = Io { stdout: path.to_str().unwrap(), terminal: true, ..Io::default() };
    let script = format!("head -c {BYTES} /dev/zero | tr '\\0' x; exit 6");
    shim.exec(&b, "t", &sh(&script), io).await.unwrap();
    drop(full); // the shim has both ends
    assert_eq!(shim.wait(&b, "t").await.unwrap(), 6);
    let read = async {
        tokio::time::sleep(Duration::from_millis(1200)).await;
        let mut sink = stdio::Capped::new(1 << 20);
        stdio::collect(stdio::fifo::open_reader(&path).unwrap(), &mut sink).await.unwrap();
        sink.into_kept()
    };
    let (deleted, all) = tokio::join!(shim.delete(&b, "t"), read);
    assert_eq!((deleted.unwrap(), all.len()), (6, before + BYTES));
    assert!(all[before..].iter().all(|&c| c == b'x'));
    shim.kill(&b, "", 9).await.unwrap();
    shim.wait(&b, "").await.unwrap();
    shim.delete(&b, "").await.unwrap();
}
