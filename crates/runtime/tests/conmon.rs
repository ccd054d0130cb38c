//! Containers through a monitor: Debian's conmon, or the one that
//! `LONGSHORE_TEST_CONMON` names (behaviours.md section 2).

#![allow(clippy::unwrap_used, reason = "a failure has to stop the test")]

mod common;

use common::monitored::{Monitored, conmon, names};
use common::{alive, eventually, kill_9};
use longshore_runtime::{PodProcess, Runtime, TaskState};
use std::time::{Duration, Instant};
use types::{ErrorKind, ExitStatus, Signal};

#[test]
fn a_container_lives_and_is_gone_without_a_trace() {
    let mut node = Monitored::new();
    let process = node.run(node.m().start_pod(&node.pod("p"))).unwrap();
    assert_eq!(process, PodProcess::Monitors { monitor: conmon() });
    let spec = node.task("c", &["sh", "-c", "echo out; echo err >&2; exit 7"]);
    let pid = node.run(node.m().create_task(&node.pod("p"), &spec)).unwrap();
    assert_eq!(node.run(node.m().task_state("p", "c")).unwrap(), TaskState::Created);
    let e = node.run(node.m().create_task(&node.pod("p"), &spec)).unwrap_err();
    assert_eq!(e.kind(), ErrorKind::AlreadyExists);
    // In its cgroup, before there was a container: in every hierarchy that we could make one in.
    let monitor = node.m().monitor_pid("p", "c").unwrap();
    let cgroups = std::fs::read_to_string(format!("/proc/{monitor}/cgroup")).unwrap();
    let own = format!("{}/longshore-conmon-c", node.cgroup());
    assert!(cgroups.lines().filter(|l| l.ends_with(&own)).count() > 2, "{cgroups}");
    let of_init = std::fs::read_to_string(format!("/proc/{pid}/cgroup")).unwrap();
    assert!(!of_init.contains("longshore-conmon-c"), "{of_init}");
    let before = std::time::SystemTime::now();
    node.run(node.m().start_task("p", "c")).unwrap();
    let exit = node.exit_of("c");
    assert_eq!((exit.status, exit.oom_killed, exit.killed_by), (ExitStatus::Code(7), false, None));
    assert!(exit.exited_at >= before - Duration::from_secs(1));
    assert!(matches!(node.run(node.m().task_state("p", "c")).unwrap(), TaskState::Stopped(c) if c.status.code() == 7));
    let log = node.logged("c");
    let has = |end: &str| log.lines().any(|l| l.ends_with(end));
    assert!(has(" stdout F out") && has(" stderr F err"), "{log}");
    node.run(node.m().delete_task("p", "c")).unwrap();
    node.run(node.m().delete_task("p", "c")).unwrap();
    assert!(node.run(node.m().task_state("p", "c")).unwrap_err().is_not_found());
    node.no_event();
    node.end("p");
    node.run(node.m().stop_pod("p")).unwrap();
}

#[test]
fn a_stopped_container_tells_who_killed_it() {
    let mut node = Monitored::new();
    node.launch("p", "c", &["sleep", "1000"]);
    node.launch("p", "tidy", &["sh", "-c", "trap 'exit 3' TERM; echo up; while :; do sleep 0.1; done"]);
    assert!(matches!(node.run(node.m().delete_task("p", "c")).unwrap_err().kind(), ErrorKind::FailedPrecondition));
    // Before that, a signal would meet the runtime's own init.
    eventually("it has set its trap", || node.logged("tidy").contains(" F up"));
    node.run(node.m().kill_task("p", "tidy", Signal::TERM, false, "StopContainer")).unwrap();
    assert_eq!(node.exit_of("tidy").status, ExitStatus::Code(3));
    assert!(matches!(node.run(node.m().task_state("p", "tidy")), Ok(TaskState::Stopped(_))));
    node.run(node.m().kill_task("p", "c", Signal::KILL, false, "StopContainer")).unwrap();
    let exit = node.exit_of("c");
    assert_eq!((exit.status, exit.killed_by.as_deref()), (ExitStatus::Signal(9), Some("StopContainer")));
    // Gone before the signal: success.
    node.run(node.m().kill_task("p", "c", Signal::KILL, true, "again")).unwrap();
    node.run(node.m().kill_task("p", "nobody", Signal::KILL, true, "again")).unwrap();
    node.end("p");
}

#[test]
fn a_paused_container_dies_of_a_signal() {
    let mut node = Monitored::new();
    let pid = node.launch("p", "c", &["sleep", "1000"]);
    node.run(node.m().pause_task("p", "c")).unwrap();
    assert_eq!(node.run(node.m().task_state("p", "c")).unwrap(), TaskState::Paused { pid });
    node.run(node.m().resume_task("p", "c")).unwrap();
    assert_eq!(node.run(node.m().task_state("p", "c")).unwrap(), TaskState::Running { pid });
    node.run(node.m().update_task("p", "c", r#"{"cpu":{"shares":200}}"#)).unwrap();
    node.run(node.m().pause_task("p", "c")).unwrap();
    node.run(node.m().kill_task("p", "c", Signal::KILL, false, "StopContainer")).unwrap();
    assert_eq!(node.exit_of("c").status, ExitStatus::Signal(9));
    node.end("p");
}

#[test]
fn a_create_that_fails_leaves_nothing_and_says_why() {
    let node = Monitored::new();
    let spec = node.task("c", &["/no/such/program"]);
    let e = node.run(node.m().create_task(&node.pod("p"), &spec)).unwrap_err();
    assert_eq!(e.kind(), ErrorKind::InvalidArgument, "{e}");
    assert!(e.to_string().contains("/no/such/program"), "{e}");
    assert!(!node.log("c").exists() && !node.bundle("p", "c").exists());
    assert_eq!(names(&node.root.join("runc/longshore-test")), Vec::<String>::new());
    // And its name is free again.
    node.launch("p", "c", &["true"]);
    node.end("p");
}

#[test]
fn a_monitor_that_can_not_be_started_or_fails_is_named() {
    let node = Monitored::with(|h| h.monitor = "/no/such/conmon".into());
    let e = node.run(node.m().create_task(&node.pod("p"), &node.task("c", &["true"]))).unwrap_err();
    assert!(e.to_string().contains("/no/such/conmon"), "{e}");
    node.end("p");
    let node = Monitored::with(|h| h.runtime_binary = "/no/such/runc".into());
    let e = node.run(node.m().create_task(&node.pod("p"), &node.task("c", &["true"]))).unwrap_err();
    assert!(e.to_string().contains("/no/such/runc"), "{e}");
}

/// A runtime that does `script` first, with `$verb` set; then it is runc.
fn runtime(node: &Monitored, script: &str) -> std::path::PathBuf {
    let path = node.root.join("runtime");
    let head = "#!/bin/bash\nfor a in \"$@\"; do case $a in create|exec|state|delete|start|kill) verb=$a; break;; esac; done\n";
    testkit::script(&path, format!("{head}{script}\nexec /usr/sbin/runc \"$@\"\n"));
    path
}

#[test]
fn a_create_that_hangs_is_ended_with_its_monitor_and_runtime_call() {
    let mut node = Monitored::stopped();
    let sign = node.root.join("creating");
    let script = format!("[[ $verb == create ]] && touch {} && sleep 1000", sign.display());
    node.handler.runtime_binary = runtime(&node, &script);
    node.handler.timeouts.create = Duration::from_secs(1);
    node.start();
    let begun = Instant::now();
    let e = node.run(node.m().create_task(&node.pod("p"), &node.task("c", &["true"]))).unwrap_err();
    assert_eq!(e.kind(), ErrorKind::DeadlineExceeded, "{e}");
    assert!(begun.elapsed() < Duration::from_secs(60), "{:?}", begun.elapsed());
    eventually("monitor and runtime call are gone", || node.processes().is_empty());
    // One that is called off ends at once.
    // It may have been killed before it came so far.
    let _ = std::fs::remove_file(&sign);
    node.die();
    node.handler.timeouts.create = Duration::from_secs(60);
    node.start();
    let spec = node.task("d", &["true"]);
    let (m, pod) = (node.m().clone(), node.pod("p"));
    let e = node.run(async {
        let create = m.create_task(&pod, &spec);
        let kill = async {
            while !sign.exists() {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
            m.kill_task("p", "d", Signal::KILL, true, "a cancelled start").await.unwrap();
        };
        tokio::join!(create, kill).0.unwrap_err()
    });
    assert_eq!(e.kind(), ErrorKind::Cancelled, "{e}");
    node.end("p");
    std::thread::sleep(Duration::from_millis(200));
    assert_eq!(names(&node.root.join("runc/longshore-test")), Vec::<String>::new(), "a late create brought it back");
}

#[test]
fn a_dead_monitor_ends_its_container_once() {
    let mut node = Monitored::new();
    let pid = node.launch("p", "c", &["sleep", "1000"]);
    node.launch("p", "other", &["sleep", "1000"]);
    kill_9(node.m().monitor_pid("p", "c").unwrap());
    let exit = node.exit_of("c");
    assert_eq!((exit.status, exit.killed_by.as_deref()), (ExitStatus::Signal(9), Some("the death of its monitor")));
    eventually("its process is gone", || !alive(pid));
    assert!(matches!(node.run(node.m().task_state("p", "other")).unwrap(), TaskState::Running { .. }));
    node.run(node.m().delete_task("p", "c")).unwrap();
    node.no_event();
    node.end("p");
}

#[test]
fn an_exit_that_the_monitor_misses_is_told() {
    let mut node = Monitored::new();
    let pid = node.launch("p", "c", &["sleep", "1000"]);
    let monitor = node.m().monitor_pid("p", "c").unwrap();
    common::signal(monitor, rustix::process::Signal::STOP);
    kill_9(pid);
    let exit = node.exit_of("c");
    // Nobody has reaped it: how it died can still be seen.
    assert_eq!(exit.status, ExitStatus::Signal(9));
    assert!(exit.killed_by.unwrap().contains("told no exit status"));
    node.end("p");
    assert!(!alive(monitor), "delete ends a monitor that hangs");
}

/// A monitor gives the runtime minutes to start an exec; a hang is ended by whom it serves.
#[test]
fn an_exec_whose_runtime_hangs_ends_with_its_caller() {
    let mut node = Monitored::stopped();
    let sign = node.root.join("executing");
    let script = format!("[[ $verb == exec ]] && touch {} && sleep 1000", sign.display());
    node.handler.runtime_binary = runtime(&node, &script);
    node.start();
    node.launch("p", "c", &["sleep", "1000"]);
    let before = node.processes();
    node.run(async {
        let exec = node.m().exec_sync("p", "c", node.exec(&["true"]));
        let hangs = async {
            while !sign.exists() {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        };
        tokio::select! {
            answer = exec => panic!("{answer:?}"),
            () = hangs => {}
        }
    });
    eventually("monitor and runtime call are gone", || node.processes().iter().all(|pid| before.contains(pid)));
    eventually("nothing goes on", || node.m().operations().is_empty());
    node.end("p");
}

#[test]
fn on_a_full_disk_no_container_runs_for_ever() {
    let mut node = Monitored::stopped();
    let exits = node.exits();
    std::fs::create_dir_all(&exits).unwrap();
    let options = c"size=4k,mode=0700";
    rustix::mount::mount("tmpfs", &exits, "tmpfs", rustix::mount::MountFlags::empty(), options).unwrap();
    // One page is all that it has.
    std::fs::write(exits.join("filler"), vec![1u8; 4096]).unwrap();
    node.start();
    node.launch("p", "c", &["sh", "-c", "exit 3"]);
    let exit = node.exit_of("c");
    // Older kernels forget how a process ended that its monitor has reaped.
    let forgotten = !testkit::kernel_is_at_least(6, 15) && exit.status == ExitStatus::Unknown(255);
    assert!(exit.status == ExitStatus::Code(3) || forgotten, "{exit:?}");
    assert!(exit.killed_by.unwrap().contains("full"), "the reason is told");
    assert!(matches!(node.run(node.m().task_state("p", "c")).unwrap(), TaskState::Stopped(_)));
    node.run(node.m().delete_task("p", "c")).unwrap();
    rustix::mount::unmount(&exits, rustix::mount::UnmountFlags::DETACH).unwrap();
    node.end("p");
}

#[test]
fn an_exit_file_that_holds_no_number_is_named() {
    let mut node = Monitored::new();
    node.launch("p", "c", &["sleep", "1000"]);
    std::fs::write(node.exits().join("c"), "seven").unwrap();
    let exit = node.exit_of("c");
    assert_eq!(exit.status, ExitStatus::Unknown(255));
    let why = exit.killed_by.unwrap();
    assert!(why.contains("exits/c") && why.contains("\"seven\""), "{why}");
}

#[test]
fn what_init_leaves_in_a_shared_pid_namespace_dies_with_it() {
    let mut node = Monitored::new();
    let spec = node.task_with("c", &["sh", "-c", "sleep 987 & exit 3"], |c| {
        c["linux"]["namespaces"] =
            serde_json::json!([{"type": "mount"}, {"type": "ipc"}, {"type": "uts"}, {"type": "network"}]);
    });
    node.begin("p", spec);
    assert_eq!(node.exit_of("c").status, ExitStatus::Code(3));
    node.end("p");
}

#[test]
fn the_oom_killer_is_named() {
    let mut node = Monitored::new();
    let spec = node.task_with("c", &["sh", "-c", "x=aaaaaaaa; while :; do x=$x$x; done"], |c| {
        c["linux"]["resources"] = serde_json::json!({"memory": {"limit": 16 << 20, "swap": 16 << 20}});
    });
    node.begin("p", spec);
    let exit = node.exit_of("c");
    assert_eq!((exit.status, exit.oom_killed), (ExitStatus::Signal(9), true), "{exit:?}");
    assert!(exit.peak_memory.is_some_and(|m| m > 1 << 20), "{exit:?}");
    node.end("p");
}

#[test]
fn a_log_is_opened_anew_and_nothing_is_lost() {
    let node = Monitored::new();
    node.launch("p", "c", &["sh", "-c", "n=0; while :; do echo $n; n=$((n+1)); sleep 0.01; done"]);
    let lines = |path: &std::path::Path| std::fs::read_to_string(path).unwrap_or_default().lines().count();
    eventually("it logs", || lines(&node.log("c")) > 3);
    // Still where it was: nothing to do, and nothing is lost by asking.
    node.run(node.m().reopen_log("p", "c")).unwrap();
    assert!(lines(&node.log("c")) > 3);
    let old = node.log("c.old");
    std::fs::rename(node.log("c"), &old).unwrap();
    node.run(node.m().reopen_log("p", "c")).unwrap();
    eventually("it logs again", || lines(&node.log("c")) > 3);
    node.run(node.m().kill_task("p", "c", Signal::KILL, false, "")).unwrap();
    eventually("it is dead", || matches!(node.run(node.m().task_state("p", "c")), Ok(TaskState::Stopped(_))));
    let all = std::fs::read_to_string(&old).unwrap() + &node.logged("c");
    let numbers: Vec<usize> = all.lines().map(|l| l.rsplit(' ').next().unwrap().parse().unwrap()).collect();
    assert_eq!(numbers, (0..numbers.len()).collect::<Vec<_>>());
    node.end("p");
}

#[test]
fn stdin_goes_in_and_ends() {
    let mut node = Monitored::new();
    let mut spec = node.task("c", &["sh", "-c", "cat; echo end"]);
    let fifo = node.root.join("stdin");
    stdio::fifo::make(&fifo).unwrap();
    spec.io.stdin = Some(fifo.clone());
    node.begin("p", spec);
    for text in ["one\n", "two\n"] {
        std::fs::write(&fifo, text).unwrap();
    }
    eventually("it is echoed", || node.logged("c").contains(" F two"));
    assert!(!node.logged("c").contains(" F end"), "a writer that goes is no end");
    node.run(node.m().close_stdin("p", "c")).unwrap();
    assert_eq!(node.exit_of("c").status, ExitStatus::Code(0));
    let log = node.logged("c");
    assert!(log.contains(" F one") && log.contains(" F end"), "{log}");
    assert!(node.run(node.m().close_stdin("p", "c")).is_err());
    node.end("p");
}

#[test]
fn a_terminal_has_the_size_that_it_is_given() {
    let mut node = Monitored::new();
    let mut spec = node.task_with(
        "c",
        &["sh", "-c", "echo ready; while [ \"$(stty size)\" != '33 101' ]; do sleep 0.05; done; echo done"],
        |c| {
            c["process"]["terminal"] = true.into();
        },
    );
    spec.io.terminal = true;
    node.begin("p", spec);
    eventually("it runs", || node.logged("c").contains("ready"));
    node.run(node.m().resize_task("p", "c", 101, 33)).unwrap();
    assert_eq!(node.exit_of("c").status, ExitStatus::Code(0));
    assert!(node.logged("c").contains("done"));
    node.end("p");
    node.launch("p", "plain", &["sleep", "1000"]);
    let e = node.run(node.m().resize_task("p", "plain", 1, 1)).unwrap_err();
    assert_eq!(e.kind(), ErrorKind::FailedPrecondition);
    node.end("p");
}

#[test]
fn a_restarted_daemon_finds_all_that_lives_and_has_died() {
    let mut node = Monitored::new();
    let pid = node.launch("p", "lives", &["sleep", "1000"]);
    node.launch("p", "dies", &["sh", "-c", "read -t 1 x; exit 9"]);
    let orphan = node.launch("p", "orphan", &["sleep", "1000"]);
    node.launch("p", "unasked", &["sleep", "1000"]);
    node.run(node.m().create_task(&node.pod("p"), &node.task("made", &["sleep", "1000"]))).unwrap();
    node.launch("stranger", "s", &["sleep", "1000"]);
    let monitor = node.m().monitor_pid("p", "orphan").unwrap();
    let lives = node.m().monitor_pid("p", "lives").unwrap();
    node.die();
    kill_9(monitor);
    eventually("it has died meanwhile", || node.exits().join("dies").exists());
    node.start();
    let found = node.recover("p", &["lives", "dies", "orphan", "made", "never"]);
    assert_eq!(found[0], Some(TaskState::Running { pid }));
    assert!(matches!(&found[1], Some(TaskState::Stopped(c)) if c.status == ExitStatus::Code(9)), "{found:?}");
    assert!(matches!(&found[2], Some(TaskState::Stopped(c)) if c.status == ExitStatus::Signal(9)), "{found:?}");
    assert_eq!((&found[3], &found[4]), (&Some(TaskState::Created), &None));
    eventually("its process is gone", || !alive(orphan));
    eventually("what nobody asked for is gone", || !node.m().owns("stranger") && !node.bundle("p", "unasked").exists());
    // It is watched as before.
    assert_eq!(node.m().monitor_pid("p", "lives"), Some(lives));
    let out = node.run(node.m().exec_sync("p", "lives", node.exec(&["echo", "hello"]))).unwrap();
    assert_eq!(out.stdout, "hello\n");
    let ended =
        |node: &Monitored, id: &str| matches!(node.run(node.m().task_state("p", id)), Ok(TaskState::Stopped(_)));
    node.run(node.m().kill_task("p", "lives", Signal::TERM, false, "")).unwrap();
    node.run(node.m().kill_task("p", "lives", Signal::KILL, false, "")).unwrap();
    eventually("it has ended", || ended(&node, "lives"));
    // Restarted once more, the end stands in the bundle.
    node.die();
    node.start();
    let found = node.recover("p", &["lives"]);
    assert!(matches!(&found[0], Some(TaskState::Stopped(c)) if c.status == ExitStatus::Signal(9)), "{found:?}");
    node.end("p");
}

#[test]
fn a_runtime_that_is_gone_has_ended_no_container() {
    let mut node = Monitored::stopped();
    node.handler.runtime_binary = runtime(&node, "");
    node.start();
    let pid = node.launch("p", "c", &["sleep", "1000"]);
    node.die();
    let (binary, aside) = (node.handler.runtime_binary.clone(), node.root.join("aside"));
    std::fs::rename(&binary, &aside).unwrap();
    node.start();
    assert_eq!(node.recover("p", &["c"]), [Some(TaskState::Running { pid })]);
    let e = node.run(node.m().stop_pod("p")).unwrap_err();
    assert!(e.to_string().contains(binary.to_str().unwrap()), "{e}");
    assert!(node.bundle("p", "c").exists(), "the next attempt finds it");
    std::fs::rename(&aside, &binary).unwrap();
    node.end("p");
}

/// A process that has nothing to do with any of it.
struct Innocent(std::process::Child);

impl Drop for Innocent {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn a_number_that_another_has_by_now_is_nobody_s() {
    let mut node = Monitored::new();
    let pid = node.launch("p", "c", &["sleep", "1000"]);
    let monitor = node.m().monitor_pid("p", "c").unwrap();
    node.die();
    kill_9(monitor);
    kill_9(pid);
    let mut innocent = Innocent(std::process::Command::new("/bin/sleep").arg("1000").spawn().unwrap());
    for file in ["conmon.pid", "pidfile"] {
        std::fs::write(node.bundle("p", "c").join(file), innocent.0.id().to_string()).unwrap();
    }
    node.start();
    let found = node.recover("p", &["c"]);
    assert!(matches!(&found[0], Some(TaskState::Stopped(c)) if [137, 255].contains(&c.status.code())), "{found:?}");
    node.run(node.m().kill_task("p", "c", Signal::KILL, true, "")).unwrap();
    node.end("p");
    let lives = innocent.0.try_wait().unwrap().is_none();
    assert!(lives, "a process of nobody's was killed");
}
